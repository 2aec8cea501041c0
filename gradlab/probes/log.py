"""A growing table: recorded steps in compact arrays, a frame when somebody asks.

What outgrows a few megabytes goes to a temporary folder as Parquet, part by part: memory stays flat however long
a run is recorded.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

__all__ = ["Keys", "TableLog"]

#: The key tuple of each row of a step.
Keys = Sequence[tuple[object, ...]]

_Floats = npt.NDArray[np.float64]
#: Columns of what else a step's values are made of: a number for all rows, or one a row.
Facts = Sequence[float | npt.NDArray[Any]]
#: Rows of the step buffer, shape (k, m, 8), and facts, shape (k, f), to the value columns, each of shape (k,).
Derive = Callable[[_Floats, _Floats], Mapping[str, _Floats]]
_IN_MEMORY = 32 << 20  # bytes of a table's values beyond which they go to the disk
_WAITING = 1 << 20  # bytes of rows that wait to be worked on together: a call of numpy costs as much as a hundred rows


class _Raw(NamedTuple):
    """One step as its hooks left it: buffer rows, and for each table row which of them it is made of."""

    step: int
    number: int
    rows: _Floats
    slots: npt.NDArray[np.int64]
    facts: Facts


def _column(parts: Sequence[float | npt.NDArray[Any]], counts: Sequence[int]) -> npt.NDArray[Any]:
    """Return a column of facts from those of each step, which has so many rows."""
    if not any(isinstance(part, np.ndarray) for part in parts):
        return np.repeat(np.array(parts), counts)
    spread = (
        part if isinstance(part, np.ndarray) else np.full(count, part)
        for part, count in zip(parts, counts, strict=True)
    )  # fmt: skip
    return np.concatenate(list(spread))


@final
class TableLog:
    """Rows of one table, appended a step at a time.

    A step's keys (layer, call, ...) are nearly always those of the step before, so equal ones are kept once and a
    step costs its numbers only: eight bytes a value. Values beyond 32 MB lie on the disk while the log lives, exact to
    the bit; where that cannot be written, they stay in memory.

    Args:
        keys: Names of the key columns, without "step".
        values: Names of the value columns.
        derive: Makes the values of steps appended as buffer rows; many steps at once.
    """

    def __init__(self, keys: Sequence[str], values: Sequence[str], derive: Derive | None = None) -> None:
        self._key_names, self._value_names = tuple(keys), tuple(values)
        self._interned: dict[tuple[tuple[object, ...], ...], int] = {}
        self._last: tuple[object, int] = (None, -1)  # the keys interned last, and their number
        self._steps: list[tuple[int, int, _Floats]] = []
        self._derive = derive
        self._raw: list[_Raw] = []
        self._waiting = 0
        self._bytes = 0  # of the values in memory
        self._limit = _IN_MEMORY
        self._parts: list[Path] = []
        self._aside: list[tuple[int, int, int]] = []  # step, number of its keys and rows of each step in the parts
        self._newest: tuple[int, int, _Floats] | None = None

    def _number(self, keys: Sequence[tuple[object, ...]]) -> int:
        if keys is not self._last[0]:
            self._last = (keys, self._interned.setdefault(tuple(keys), len(self._interned)))
        return self._last[1]

    def append(self, step: int, keys: Sequence[tuple[object, ...]], values: Mapping[str, _Floats] | _Floats) -> None:
        """Append one step's rows.

        Args:
            step: Its number.
            keys: A tuple of keys for each row.
            values: An entry of each value array for every row; or all of them, shape (rows, values).
        """
        if not keys:
            return
        if isinstance(values, Mapping):
            values = np.column_stack([values[name] for name in self._value_names])
        self._settle()
        self._keep([(step, self._number(keys), values)])

    def append_rows(
        self, step: int, keys: Sequence[tuple[object, ...]], rows: _Floats, slots: npt.NDArray[np.int64], facts: Facts
    ) -> None:
        """Append one step as rows of the buffer, whose values are derived later.

        Args:
            step: Its number.
            keys: A tuple of keys for each of the k rows of the table; the same object as for the step before where
                they are the same.
            rows: All of the step's buffer rows, shape (slots, 8).
            slots: Shape (k, m): the places in `rows` that a row of the table is made of, -1 for none (NaN).
            facts: f columns, whatever else `derive` needs.
        """
        if not keys:
            return
        self._raw.append(_Raw(step, self._number(keys), rows, slots, facts))
        self._waiting += rows.nbytes + 8 * len(facts) * len(keys)
        if self._waiting >= _WAITING:
            self._settle()

    def _settle(self) -> None:
        """Derive the values of the steps that wait."""
        raw, self._raw, self._waiting = self._raw, [], 0
        if not raw or self._derive is None:
            return
        none = np.full((1, raw[0].rows.shape[1]), np.nan)
        starts = np.cumsum([0, *(len(one.rows) for one in raw)])
        counts = [len(one.slots) for one in raw]
        slots = np.concatenate([one.slots for one in raw])
        slots = np.where(slots < 0, starts[-1], slots + np.repeat(starts[:-1], counts)[:, None])
        rows = np.take(np.concatenate([*(one.rows for one in raw), none]), slots, axis=0)  # much quicker than [slots]
        facts = [_column(parts, counts) for parts in zip(*(one.facts for one in raw), strict=True)]
        values = self._derive(rows, np.column_stack(facts) if facts else np.empty((len(slots), 0)))
        stacked = np.column_stack([values[name] for name in self._value_names])
        ends = np.cumsum(counts).tolist()
        spans = zip(raw, [0, *ends], ends, strict=False)
        self._keep([(one.step, one.number, stacked[start:end]) for one, start, end in spans])

    def _keep(self, steps: list[tuple[int, int, _Floats]]) -> None:
        self._steps += steps
        self._newest = steps[-1] if steps else self._newest
        self._bytes += sum(values.nbytes for _, _, values in steps)
        if self._bytes >= self._limit:
            self._spill()

    def _spill(self) -> None:
        """Write what is in memory as one more part."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            if not self._parts:
                folder = Path(tempfile.mkdtemp(prefix="gradlab-"))
                weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            else:
                folder = self._parts[0].parent
            part = folder / f"{len(self._parts):06d}.parquet"
            table = pa.Table.from_pandas(self._in_memory(), preserve_index=False)
            # The bytes of a float that change least lie together, where they compress; the last ones are noise.
            pq.write_table(
                table, part, compression="zstd", use_dictionary=["step", *self._key_names],
                use_byte_stream_split=list(self._value_names),
            )  # fmt: skip
        except OSError as error:
            self._limit = 2 * self._bytes
            text = f"A long recording cannot be put aside on the disk ({error}): its tables stay in memory."
            warnings.warn(text, UserWarning, stacklevel=2)
            return
        self._parts.append(part)
        self._aside += [(step, number, len(values)) for step, number, values in self._steps]
        self._steps, self._bytes = [], 0

    def frames(self) -> Iterator[pd.DataFrame]:
        """Yield everything appended, one row a key and step, in parts that fit into memory."""
        import pyarrow.parquet as pq

        self._settle()
        for part in self._parts:
            yield pq.read_table(part).to_pandas()
        if self._steps:
            yield self._in_memory()

    def last(self) -> tuple[int, Keys, dict[str, npt.NDArray[np.float64]]] | None:
        """Return the step appended last, with its keys and its value columns; None before the first."""
        self._settle()
        if self._newest is None:
            return None
        step, number, values = self._newest
        keys = next(islice(self._interned, number, None))
        return step, keys, dict(zip(self._value_names, values.T, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return everything appended as plain data and one tensor."""
        values = [frame[list(self._value_names)].to_numpy() for frame in self.frames()]
        return {
            "keys": [list(keys) for keys in self._interned],
            "steps": [*self._aside, *((step, number, len(values)) for step, number, values in self._steps)],
            "values": torch.from_numpy(np.concatenate(values or [np.empty((0, len(self._value_names)))])),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned, in place of what was appended."""
        for part in self._parts:
            part.unlink()
        self._parts, self._aside, self._steps, self._bytes, self._newest = [], [], [], 0, None
        self._raw, self._waiting, self._last = [], 0, (None, -1)
        self._interned = {tuple(map(tuple, keys)): number for number, keys in enumerate(state["keys"])}
        ends = np.cumsum([count for _, _, count in state["steps"]])
        parts = np.split(state["values"].numpy(), ends[:-1]) if len(ends) else []
        self._keep([(step, number, part) for (step, number, _), part in zip(state["steps"], parts, strict=True)])

    def frame(self) -> pd.DataFrame:
        """Return everything appended, one row a key and step."""
        frames = list(self.frames())
        return frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def _in_memory(self) -> pd.DataFrame:
        key_sets = [[np.array(column) for column in zip(*keys, strict=True)] for keys in self._interned]
        counts = [len(values) for _, _, values in self._steps]
        columns: dict[str, object] = {"step": np.repeat([step for step, _, _ in self._steps], counts)}
        for place, name in enumerate(self._key_names):
            columns[name] = np.concatenate([key_sets[number][place] for _, number, _ in self._steps])
        stacked = np.concatenate([values for _, _, values in self._steps])
        columns.update({name: stacked[:, place] for place, name in enumerate(self._value_names)})
        return pd.DataFrame(columns)
