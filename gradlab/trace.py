"""Trace: the tables that one watched run recorded, and their one-folder form on disk.

This module needs pandas and pyarrow, never torch: a laptop without torch reads and redraws a run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, cast, final

import pandas as pd

from gradlab.errors import StoreError, UsageError
from gradlab.storage import atomic_folder, read_json, read_table, write_json, write_table
from gradlab.trace_html import trace_html

__all__ = ["SCHEMA", "SCHEMA_VERSION", "Trace"]

SCHEMA_VERSION: Final = 1

#: Table -> column -> (pandas dtype, unit, meaning). Key columns come first. A table may carry further columns.
SCHEMA: Final[Mapping[str, Mapping[str, tuple[str, str, str]]]] = {
    "steps": {
        "step": ("int64", "step", "training step, from 0"),
        "loss": ("float64", "loss", "loss as given by Probe.log; NaN where none was given"),
        "seconds": ("float64", "s", "wall time since the step before was closed"),
        "skipped": ("bool", "1", "the gradient scaler skipped this update, or one of several optimizers'"),
        "loss_scale": ("float64", "1", "scale of the loss under AMP, else 1"),
        "learning_rate": ("float64", "1", "of the first optimizer's first parameter group"),
        "grad_norm": ("float64", "loss/parameter", "L2 norm of all parameter gradients as the optimizer uses them"),
        "clip_coefficient": ("float64", "1", "factor that clipping applied; NaN where none was told"),
    },
    "layers": {
        "step": ("int64", "step", "training step, from 0"),
        "layer": ("str", "", "dotted named_modules() path, or the name of a tap"),
        "call": ("int64", "1", "how often the layer had run before in this step"),
        "order": ("int64", "1", "place in this step's order of execution"),
        "kind": ("str", "", "class of the module, or 'tap'"),
        "output": ("str", "", "path of the tensor inside a nested output; empty where the output is a tensor"),
        "entries": ("int64", "1", "entries of the tensor, batch included"),
        "act_mean": ("float64", "output", "mean over all entries"),
        "act_std": ("float64", "output", "population standard deviation over all entries"),
        "act_norm": ("float64", "output", "L2 norm of all entries"),
        "act_abs_max": ("float64", "output", "largest absolute entry"),
        "act_zero_fraction": ("float64", "1", "share of entries that are exactly 0"),
        "act_nonfinite": ("float64", "1", "number of NaN and Inf entries"),
        "grad_norm": ("float64", "loss/output", "L2 norm of dL/d(output) over the whole batch"),
        "grad_abs_max": ("float64", "loss/output", "largest absolute entry of dL/d(output)"),
        "grad_zero_fraction": ("float64", "1", "share of entries of dL/d(output) that are exactly 0"),
        "grad_nonfinite": ("float64", "1", "number of NaN and Inf entries of dL/d(output)"),
    },
    "units": {
        "layer": ("str", "", "dotted path of an activation module"),
        "units": ("int64", "1", "channels of the layer"),
        "dead_fraction": ("float64", "1", "share of units active for no sample in the recorded window"),
        "saturated_fraction": ("float64", "1", "share of units saturated for most samples in the recorded window"),
    },
    "params": {
        "step": ("int64", "step", "training step, from 0"),
        "param": ("str", "", "dotted named_parameters() path"),
        "layer": ("str", "", "module that owns the parameter"),
        "entries": ("int64", "1", "entries of the parameter"),
        "weight_norm": ("float64", "parameter", "L2 norm before the update"),
        "grad_norm": ("float64", "loss/parameter", "L2 norm of the gradient as the optimizer uses it, after clipping"),
        "grad_norm_unclipped": ("float64", "loss/parameter", "the same before clipping; NaN where none was told"),
        "update_norm": ("float64", "parameter", "L2 norm of what the optimizer added"),
        "grad_nonfinite": ("float64", "1", "number of NaN and Inf entries of the gradient"),
    },
    "batchnorm": {
        "step": ("int64", "step", "training step, from 0"),
        "layer": ("str", "", "dotted path of the BatchNorm module"),
        "call": ("int64", "1", "how often the layer had run before in this step"),
        "training": ("bool", "1", "the layer normalized with batch statistics"),
        "channels": ("int64", "1", "channels of the layer"),
        "mean_gap": ("float64", "1", "RMS over channels of (batch mean - running mean)/batch std, var at least eps"),
        "var_gap": ("float64", "1", "RMS over channels of ln(batch/running variance), both unbiased, at least eps"),
        "grad_gain": ("float64", "1", "norm of dL/dx over norm of dL/dy, through this layer alone"),
        "act_gain": ("float64", "1", "std of the output over std of the input, both over all entries"),
        "scale_mean": ("float64", "1", "mean of gamma over channels; 1 where affine=False"),
        "scale_std": ("float64", "1", "population std of gamma over channels"),
        "scale_abs_max": ("float64", "1", "largest absolute gamma"),
        "scale_abs_min": ("float64", "1", "smallest absolute gamma"),
        "low_variance_fraction": ("float64", "1", "share of channels whose biased batch variance is below eps"),
    },
    "timesteps": {
        "step": ("int64", "step", "training step, from 0"),
        "layer": ("str", "", "dotted path of the recurrent module"),
        "call": ("int64", "1", "how often the layer had run before in this step"),
        "level": ("int64", "1", "layer inside the module, from 0, nearest the input"),
        "direction": ("str", "", "'forward' or 'backward' through the sequence"),
        "state": ("str", "", "'h' or 'c'"),
        "t": ("int64", "time step", "place in the sequence, from 0"),
        "norm": ("float64", "state", "L2 norm of the state over the batch (packed: over running sequences)"),
        "grad_norm": ("float64", "loss/state", "L2 norm of the total gradient dL/d(state)"),
        "log10_grad_norm": ("float64", "1", "log10 of grad_norm, exact where grad_norm underflows; -inf where it is 0"),
    },
    "gates": {
        "step": ("int64", "step", "training step, from 0"),
        "layer": ("str", "", "dotted path of the nn.LSTM or nn.GRU"),
        "call": ("int64", "1", "how often the layer had run before in this step"),
        "level": ("int64", "1", "layer inside the module, from 0, nearest the input"),
        "direction": ("str", "", "'forward' or 'backward' through the sequence"),
        "gate": ("str", "", "'i', 'f', 'o' of an LSTM, 'r', 'z' of a GRU; torch's z keeps memory"),
        "t": ("int64", "time step", "place in the sequence, from 0"),
        "mean": ("float64", "1", "mean over units and batch (packed: over running sequences)"),
        "closed_fraction": ("float64", "1", "share of units and samples whose gate is below 0.1"),
        "open_fraction": ("float64", "1", "share of units and samples whose gate is above 0.9"),
    },
}


@final
class Trace:
    """The tables one run recorded: what every analysis, claim and figure is computed from.

    Args:
        tables: Table name -> frame. Tables left out are empty; columns left out are filled with missing values.
        info: Facts about the recording (model, watched layers, what could not be seen): plain JSON data.

    Raises:
        UsageError: A table that the schema does not know.

    Example:
        >>> trace = Trace({"steps": pd.DataFrame({"step": [0, 1], "loss": [2.3, 2.1]})})
        >>> trace.steps["loss"].tolist(), len(trace.layers)
        ([2.3, 2.1], 0)
    """

    __slots__ = ("_info", "_tables")

    def __init__(self, tables: Mapping[str, pd.DataFrame] | None = None, info: Mapping[str, Any] | None = None) -> None:
        given = dict(tables or {})
        for name in given:
            if name not in SCHEMA:
                raise UsageError(f"A trace has no table '{name}'; its tables are {', '.join(SCHEMA)}.")
        self._tables = {name: _conform(name, given.get(name)) for name in SCHEMA}
        self._info: dict[str, Any] = dict(info or {})

    @property
    def steps(self) -> pd.DataFrame:
        """One row a recorded step."""
        return self._tables["steps"]

    @property
    def layers(self) -> pd.DataFrame:
        """One row a recorded step, layer and call."""
        return self._tables["layers"]

    @property
    def units(self) -> pd.DataFrame:
        """One row an activation layer: the state of its units over the recorded window."""
        return self._tables["units"]

    @property
    def params(self) -> pd.DataFrame:
        """One row a recorded step and parameter."""
        return self._tables["params"]

    @property
    def batchnorm(self) -> pd.DataFrame:
        """One row a recorded step, BatchNorm layer and call."""
        return self._tables["batchnorm"]

    @property
    def timesteps(self) -> pd.DataFrame:
        """One row a recorded step, recurrent layer (each level and direction of it), state and time step."""
        return self._tables["timesteps"]

    @property
    def gates(self) -> pd.DataFrame:
        """One row a recorded step, LSTM or GRU (each level and direction of it), gate and time step."""
        return self._tables["gates"]

    @property
    def tables(self) -> Mapping[str, pd.DataFrame]:
        """All tables by name."""
        return MappingProxyType(self._tables)

    @property
    def info(self) -> Mapping[str, Any]:
        """Facts about the recording: plain JSON data."""
        return MappingProxyType(self._info)

    @property
    def never_ran(self) -> tuple[str, ...]:
        """Watched layers that ran in no recorded step."""
        return tuple(self._info.get("never_ran", ()))

    def __repr__(self) -> str:
        rows = ", ".join(f"{name} {len(frame)}" for name, frame in self._tables.items() if len(frame))
        return f"Trace({rows or 'empty'})"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: what was recorded and what was not seen, all texts escaped."""
        return trace_html(self._tables, self._info)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trace):
            return NotImplemented
        return self._info == other._info and all(
            self._tables[name].equals(other._tables[name]) for name in self._tables
        )

    __hash__ = None  # type: ignore[assignment]  # holds frames, which are mutable

    def to_pandas(self) -> dict[str, pd.DataFrame]:
        """Return copies of the tables that are not empty, by name."""
        return {name: frame.copy() for name, frame in self._tables.items() if len(frame)}

    @classmethod
    def merge(cls, traces: Sequence[Trace], keys: Sequence[Mapping[str, Any]]) -> Trace:
        """Put several traces into one, each row marked with what tells its trace from the others.

        Args:
            traces: The traces.
            keys: For each trace, columns to add to all of its rows: settings of its cell, its seed.

        Returns:
            One trace. Its info lists each trace's under "merged".

        Raises:
            UsageError: Not one mapping a trace, or a key that is a column of a table.
        """
        if len(traces) != len(keys):
            raise UsageError(f"merge needs one mapping of keys a trace; got {len(traces)} traces and {len(keys)}.")
        for key in {key for mapping in keys for key in mapping}:
            clash = next((name for name, columns in SCHEMA.items() if key in columns), None)
            if clash is not None:
                raise UsageError(
                    f"merge: the key '{key}' is a column of the table {clash} already: choose another name."
                )
        tables = {}
        for name in SCHEMA:
            marked = [t._tables[name].assign(**k) for t, k in zip(traces, keys, strict=True) if len(t._tables[name])]
            if marked:
                tables[name] = pd.concat(marked, ignore_index=True)
        return cls(tables, {"merged": [dict(t._info) for t in traces]})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the trace to one new folder: a Parquet file a table that has rows, and `header.json`.

        The folder appears whole or not at all: it is written under a temporary name, flushed to the disk and renamed.

        Args:
            path: The folder to make. What exists is never overwritten.

        Returns:
            The folder.

        Raises:
            StoreError: The folder exists, or cannot be written (no permission, disk full).
            UsageError: The info or an extra column holds what JSON or Parquet cannot.
        """
        target = Path(path)
        with atomic_folder(target) as folder:
            for name, frame in self._tables.items():
                # Most tables of most traces are empty, and each file takes its time to be written and flushed.
                if len(frame) or len(frame.columns) > len(SCHEMA[name]):
                    write_table(frame, folder / f"{name}.parquet")
            header = {
                "format": "gradlab trace",
                "schema_version": SCHEMA_VERSION,
                "rows": {name: len(frame) for name, frame in self._tables.items()},
                "units": {t: {c: unit for c, (_, unit, _) in columns.items()} for t, columns in SCHEMA.items()},
                "info": self._info,
            }
            write_json(folder / "header.json", header)
        return target

    @staticmethod
    def header(path: str | os.PathLike[str]) -> dict[str, Any]:
        """Read what a saved trace says of itself: "rows" by table, and "info".

        Raises:
            StoreError: No trace is there, it is damaged, or a newer gradlab wrote it.
        """
        folder = Path(path)
        header = read_json(folder / "header.json", what="trace")
        version, rows, info = cast(Any, [header.get(key) for key in ("schema_version", "rows", "info")])
        whole = isinstance(version, int) and version >= 1 and isinstance(rows, dict) and isinstance(info, dict)
        if header.get("format") != "gradlab trace" or not whole:
            raise StoreError(f"{folder} is no gradlab trace, or damaged: its header.json does not describe one.")
        if version > SCHEMA_VERSION:
            reads = f"this gradlab reads up to {SCHEMA_VERSION}: update gradlab to read it."
            raise StoreError(f"The trace {folder} has schema version {version} and {reads}")
        return header

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read a trace that `save` wrote.

        Raises:
            StoreError: No trace is there, it is damaged, or a newer gradlab wrote it.
        """
        folder = Path(path)
        header = cls.header(folder)
        version, rows, info = header["schema_version"], header["rows"], header["info"]
        tables = {}
        for name, columns in SCHEMA.items():
            path = folder / f"{name}.parquet"
            if rows.get(name) == 0 and not path.exists():
                continue
            frame = read_table(path)
            known = version < SCHEMA_VERSION or set(columns) <= set(frame)  # an older gradlab may have known fewer
            if len(frame) != rows.get(name) or not known:
                raise StoreError(f"The trace {folder} is damaged: table {name} has not the rows and columns it had.")
            tables[name] = frame
        try:
            return cls(tables, info)
        except (TypeError, ValueError) as error:
            raise StoreError(f"The trace {folder} is damaged: a column holds values of a wrong type.") from error


def _conform(name: str, frame: pd.DataFrame | None) -> pd.DataFrame:
    """Return the frame with the schema's columns first, in the schema's types."""
    columns = SCHEMA[name]
    if frame is None:
        return _blank(name).copy()
    frame = frame.reset_index(drop=True)
    blank: dict[str, Any] = {"str": "", "bool": False, "float64": float("nan"), "int64": 0}
    missing = {column: blank[kind] for column, (kind, _, _) in columns.items() if column not in frame}
    if missing:
        frame = frame.assign(**missing)
    wrong = {column: kind for column, (kind, _, _) in columns.items() if frame.dtypes[column] != kind}
    if wrong:
        frame = frame.astype(wrong)
    return frame[[*columns, *(column for column in frame if column not in columns)]]


@cache
def _blank(name: str) -> pd.DataFrame:
    return pd.DataFrame({column: pd.Series(dtype=kind) for column, (kind, _, _) in SCHEMA[name].items()})
