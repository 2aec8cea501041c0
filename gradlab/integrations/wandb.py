"""Weights & Biases: a trace as metrics of a run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from gradlab.errors import UsageError
from gradlab.integrations.extras import missing
from gradlab.integrations.scalars import by_step, last_step, scalars
from gradlab.trace import Trace

try:
    import wandb
except ImportError as error:
    raise missing("wandb", extra="wandb") from error

__all__ = ["STEP", "log_trace"]

#: The metric that is the x axis of all others. The run's own step only goes up and drops what comes later.
STEP = "training_step"


def log_trace(
    trace: Trace, run: Any = None, columns: Mapping[str, Collection[str]] | None = None, *, after: int = -1
) -> int:
    """Log a trace's numbers as metrics against the training step.

    NaN and Inf are logged as they are.

    Args:
        trace: The trace, of a training that may go on.
        run: What `wandb.init` returned; the active run by default.
        columns: Table -> columns; `gradlab.integrations.scalars.SCALARS` by default.
        after: Only steps after this one.

    Returns:
        The last step of the trace: give it as `after` the next time.

    Raises:
        UsageError: No run is active, a table or column that is unknown, or a trace merged from several.
    """
    run = wandb.run if run is None else run
    if run is None:
        raise UsageError("No run of wandb is active: give the one that wandb.init returned.")
    rows = scalars(trace, columns, after=after)
    run.define_metric(STEP, hidden=True)
    for section in sorted({row.tag.partition("/")[0] for row in rows}):
        run.define_metric(f"{section}/*", step_metric=STEP)
    for step, values in by_step(rows):
        run.log({STEP: step, **values})
    return max(after, last_step(trace))
