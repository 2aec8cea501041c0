"""Which numbers of a trace were measured: a NaN may be a missing value, or what the training came to."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from gradlab.trace import Trace

__all__ = ["measured"]

#: First word of a column -> the column of its row that counts NaN and Inf entries of the tensor behind it.
_COUNTED_BY: Final = {"act": "act_nonfinite", "grad": "grad_nonfinite"}


def measured(trace: Trace, table: str, column: str) -> npt.NDArray[np.bool_]:
    """Return, row by row, whether a trace's value was measured.

    Every number was, Inf too. A NaN was, where it is what a tensor held: where NaN or Inf entries of the tensor
    (or, for the norm over all parameters, of any gradient in the step) were counted; where other steps have a loss
    or a clipping coefficient; where a parameter's weight has a norm at other steps, or its update has and this step
    made one. Of `batchnorm` each NaN counts as missing: the NaN and Inf of these layers are counted in `layers`.

    Args:
        trace: The trace of one run.
        table: One of its tables.
        column: A column of it that holds numbers.
    """
    frame = trace.tables[table]
    number = frame[column].notna()
    if table == "steps" and column in ("loss", "clip_coefficient"):
        kept = pd.Series(bool(number.any()), index=frame.index)  # it is told at every step or at none
    elif table == "steps" and column == "grad_norm":
        kept = frame["step"].isin(trace.params.loc[trace.params["grad_nonfinite"] > 0, "step"])
    elif table == "params" and column in ("weight_norm", "update_norm"):
        kept = number.groupby(frame["param"]).transform("any")
        if column == "update_norm":
            kept &= ~frame["step"].isin(_without_update(trace))
    else:
        counter = _COUNTED_BY.get(column.partition("_")[0], "")
        kept = frame[counter] > 0 if counter in frame else pd.Series(False, index=frame.index)
    return np.asarray(number | kept, dtype=bool)


def _without_update(trace: Trace) -> list[int]:
    """Return the steps in which the optimizer changed nothing: skipped by the scaler, or open when the probe closed."""
    steps = trace.steps
    idle: list[int] = steps.loc[steps["skipped"], "step"].tolist()
    if trace.info.get("last_step_closed") is False:
        idle += steps["step"].tail(1).tolist()
    return idle
