"""A trace as scalars by step: what every logger takes. Pure, and without any logger."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import pandas as pd

from gradlab.errors import UsageError, unknown
from gradlab.integrations.measured import measured
from gradlab.trace import SCHEMA, Trace

__all__ = ["SCALARS", "Scalar", "by_step", "last_step", "scalars"]

#: Table -> columns that are logged unless others are asked for. States and gates have a curve for each time step of a
#: sequence and are left to be asked for.
SCALARS: Final[Mapping[str, tuple[str, ...]]] = {
    "steps": ("loss", "seconds", "skipped", "loss_scale", "learning_rate", "grad_norm", "clip_coefficient"),
    "layers": ("act_mean", "act_std", "act_zero_fraction", "act_nonfinite", "grad_norm", "grad_nonfinite"),
    "params": ("weight_norm", "grad_norm", "update_norm", "grad_nonfinite"),
    "batchnorm": ("mean_gap", "var_gap", "grad_gain", "act_gain", "low_variance_fraction"),
    "units": ("dead_fraction", "saturated_fraction"),
}

_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "steps": (),
    "layers": ("layer", "call", "output"),
    "params": ("param",),
    "batchnorm": ("layer", "call"),
    "units": ("layer",),
    "timesteps": ("layer", "call", "level", "direction", "state", "t"),
    "gates": ("layer", "call", "level", "direction", "gate", "t"),
}


class Scalar(NamedTuple):
    """One number of a trace: the tag of its curve, its value and its training step."""

    tag: str
    value: float
    step: int


def scalars(trace: Trace, columns: Mapping[str, Collection[str]] | None = None, *, after: int = -1) -> list[Scalar]:
    """Return a trace's numbers as scalars by training step, earlier steps first.

    Missing values are left out; a NaN or Inf that was measured is kept (see `gradlab.integrations.measured`).

    Args:
        trace: The trace of one run.
        columns: Table -> its value columns, any of `gradlab.trace.SCHEMA`; `SCALARS` by default.
        after: Only steps after this one: the last step logged before.

    Returns:
        Scalars with tags such as "steps/loss", "layers.grad_norm/encoder.0", "layers.grad_norm/encoder.0 call1" (a
        second run in one step) and "params.update_norm/encoder.0.weight". The table `units`, a summary of all recorded
        steps, stands at the last of them.

    Raises:
        UsageError: A table or column that is unknown or no number, or a trace merged from several.

    Example:
        >>> layers = pd.DataFrame(
        ...     {"step": [0, 1], "layer": "a", "grad_norm": [0.5, float("nan")], "grad_nonfinite": [0, 3]}
        ... )
        >>> [tuple(row) for row in scalars(Trace({"layers": layers}), {"layers": ["grad_norm"]})]
        [('layers.grad_norm/a', 0.5, 0), ('layers.grad_norm/a', nan, 1)]
    """
    if "merged" in trace.info:
        runs = len(trace.info["merged"])
        raise UsageError(f"This trace is merged from {runs} runs, whose steps would overlap: log each by itself.")
    last = last_step(trace)
    found: list[Scalar] = []
    for table, names in _checked(SCALARS if columns is None else columns).items():
        frame = trace.tables[table]
        if "step" not in frame:
            frame = frame.assign(step=last)
        labels = _labels(table, frame)
        new = (frame["step"] > after).to_numpy()
        for name in names:
            shown = new & measured(trace, table, name)
            head = f"{table}/{name}" if table == "steps" else f"{table}.{name}/"
            values = frame[name].to_numpy(dtype=float)[shown].tolist()
            steps = frame["step"].to_numpy()[shown].tolist()
            tags = labels[shown].tolist()
            found += [Scalar(head + tag, value, step) for tag, value, step in zip(tags, values, steps, strict=True)]
    found.sort(key=lambda row: row.step)  # stable: within a step, tables and layers stay in their order
    return found


def by_step(rows: Sequence[Scalar]) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield each step with all of its scalars, for loggers that take a step at once.

    Args:
        rows: What `scalars` returned.

    Example:
        >>> list(by_step([Scalar("a", 1.0, 0), Scalar("b", 2.0, 0), Scalar("a", 3.0, 4)]))
        [(0, {'a': 1.0, 'b': 2.0}), (4, {'a': 3.0})]
    """
    steps: dict[int, dict[str, float]] = {}
    for row in rows:
        steps.setdefault(row.step, {})[row.tag] = row.value
    yield from steps.items()


def last_step(trace: Trace) -> int:
    """Return the last recorded step of a trace; -1 if there is none."""
    steps = [int(frame["step"].max()) for frame in trace.tables.values() if "step" in frame and len(frame)]
    return max(steps, default=-1)


def _checked(columns: Mapping[str, Collection[str]]) -> dict[str, list[str]]:
    for table, names in columns.items():
        if table not in SCHEMA:
            raise unknown("table", table, SCHEMA)
        numbers = [c for c, (kind, _, _) in SCHEMA[table].items() if c not in ("step", *_KEYS[table]) and kind != "str"]
        if isinstance(names, str):
            raise UsageError(
                f"columns takes several columns a table; got the text {names!r} for {table}: put it in []."
            )
        for name in names:
            if name not in numbers:
                raise unknown(f"column of {table}", name, numbers)
    return {table: list(names) for table, names in columns.items()}


def _labels(table: str, frame: pd.DataFrame) -> Any:
    """Return, row by row, what tells its curve from the others of its table, no two curves under one label.

    No slash joins the parts: where metrics are files, one curve's file would be another's folder.
    """
    if not _KEYS[table]:
        return pd.Series("", index=frame.index, dtype=object).to_numpy()
    keys = list(_KEYS[table])
    used: set[str] = set()
    of_key: dict[tuple[Any, ...], str] = {}
    rows = list(frame[keys].itertuples(index=False, name=None))
    for row in dict.fromkeys(rows):
        label = " ".join(part for key, value in zip(keys, row, strict=True) if (part := _part(key, value)))
        while label in used:  # a tap may have any name, also that of another curve
            label += "+"
        used.add(label)
        of_key[row] = label
    return pd.Series([of_key[row] for row in rows], dtype=object).to_numpy()


def _part(key: str, value: Any) -> str:
    if key in ("layer", "param"):
        return str(value) or "model"  # the watched model itself has the empty path
    if key in ("call", "level"):
        return f"{key}{value}" if value else ""
    if key == "output":
        return f"output.{value}" if value else ""
    return f"{key}{value}" if key == "t" else str(value)
