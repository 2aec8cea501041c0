"""A growing table: recorded steps in compact arrays, a frame when somebody asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, final

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

__all__ = ["Keys", "TableLog"]

#: The key tuple of each row of a step.
Keys = Sequence[tuple[object, ...]]


@final
class TableLog:
    """Rows of one table, appended a step at a time.

    A step's keys (layer, call, ...) are nearly always those of the step before, so equal ones are kept once and a
    step costs its numbers only: eight bytes a value.

    Args:
        keys: Names of the key columns, without "step".
        values: Names of the value columns.
    """

    def __init__(self, keys: Sequence[str], values: Sequence[str]) -> None:
        self._key_names, self._value_names = tuple(keys), tuple(values)
        self._interned: dict[tuple[tuple[object, ...], ...], int] = {}
        self._steps: list[tuple[int, int, npt.NDArray[np.float64]]] = []

    def append(
        self, step: int, keys: Sequence[tuple[object, ...]], values: Mapping[str, npt.NDArray[np.float64]]
    ) -> None:
        """Append one step's rows: a tuple of keys and an entry of each value array for every row."""
        if keys:
            number = self._interned.setdefault(tuple(keys), len(self._interned))
            self._steps.append((step, number, np.column_stack([values[name] for name in self._value_names])))

    def last(self) -> tuple[int, Keys, dict[str, npt.NDArray[np.float64]]] | None:
        """Return the step appended last, with its keys and its value columns; None before the first."""
        if not self._steps:
            return None
        step, number, values = self._steps[-1]
        keys = next(islice(self._interned, number, None))
        return step, keys, dict(zip(self._value_names, values.T, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return everything appended as plain data and one tensor."""
        values = [values for _, _, values in self._steps] or [np.empty((0, len(self._value_names)))]
        return {
            "keys": [list(keys) for keys in self._interned],
            "steps": [(step, number, len(values)) for step, number, values in self._steps],
            "values": torch.from_numpy(np.concatenate(values)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self._interned = {tuple(map(tuple, keys)): number for number, keys in enumerate(state["keys"])}
        ends = np.cumsum([count for _, _, count in state["steps"]])
        parts = np.split(state["values"].numpy(), ends[:-1]) if len(ends) else []
        self._steps = [(step, number, part) for (step, number, _), part in zip(state["steps"], parts, strict=True)]

    def frame(self) -> pd.DataFrame:
        """Return everything appended, one row a key and step."""
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
