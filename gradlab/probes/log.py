"""A growing table: recorded steps in compact arrays, a frame when somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt
import pandas as pd

__all__ = ["TableLog"]

_Floats = npt.NDArray[np.float64]
#: Rows of the step buffer, shape (k, m, 8), and facts, shape (k, f), to the value columns, each of shape (k,).
Derive = Callable[[_Floats, _Floats], Mapping[str, _Floats]]
_WAITING = 1 << 20  # bytes of rows that wait to be worked on together: a call of numpy costs as much as a hundred rows


class _Raw(NamedTuple):
    """One step as its hooks left it: buffer rows, and for each table row which of them it is made of."""

    step: int
    number: int
    rows: _Floats
    slots: npt.NDArray[np.int64]
    facts: _Floats


@final
class TableLog:
    """Rows of one table, appended a step at a time.

    A step's keys (layer, call, ...) are nearly always those of the step before, so equal ones are kept once and a
    step costs its numbers only: eight bytes a value.

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
        self._steps.append((step, self._number(keys), values))

    def append_rows(
        self, step: int, keys: Sequence[tuple[object, ...]], rows: _Floats, slots: npt.NDArray[np.int64], facts: _Floats
    ) -> None:
        """Append one step as rows of the buffer, whose values are derived later.

        Args:
            step: Its number.
            keys: A tuple of keys for each of the k rows of the table; the same object as for the step before where
                they are the same.
            rows: All of the step's buffer rows, shape (slots, 8).
            slots: Shape (k, m): the places in `rows` that a row of the table is made of, -1 for none (NaN).
            facts: Shape (k, f), whatever else `derive` needs.
        """
        if not keys:
            return
        self._raw.append(_Raw(step, self._number(keys), rows, slots, facts))
        self._waiting += rows.nbytes
        if self._waiting >= _WAITING:
            self._settle()

    def _settle(self) -> None:
        """Derive the values of the steps that wait."""
        raw, self._raw, self._waiting = self._raw, [], 0
        if not raw or self._derive is None:
            return
        none = np.full((1, raw[0].rows.shape[1]), np.nan)
        starts = np.cumsum([0, *(len(one.rows) for one in raw)])
        slots = [
            np.where(one.slots < 0, starts[-1], one.slots + start) for one, start in zip(raw, starts, strict=False)
        ]
        rows = np.concatenate([*(one.rows for one in raw), none])[np.concatenate(slots)]
        values = self._derive(rows, np.concatenate([one.facts for one in raw]))
        stacked = np.column_stack([values[name] for name in self._value_names])
        ends = np.cumsum([len(one.slots) for one in raw])
        parts = np.split(stacked, ends[:-1])
        self._steps += [(one.step, one.number, part) for one, part in zip(raw, parts, strict=True)]

    def frame(self) -> pd.DataFrame:
        """Return everything appended, one row a key and step."""
        self._settle()
        if not self._steps:
            return pd.DataFrame()
        key_sets = [list(zip(*keys, strict=True)) for keys in self._interned]
        counts = [len(values) for _, _, values in self._steps]
        columns: dict[str, object] = {"step": np.repeat([step for step, _, _ in self._steps], counts)}
        for place, name in enumerate(self._key_names):
            columns[name] = [key for _, number, _ in self._steps for key in key_sets[number][place]]
        stacked = np.concatenate([values for _, _, values in self._steps])
        columns.update({name: stacked[:, place] for place, name in enumerate(self._value_names)})
        return pd.DataFrame(columns)
