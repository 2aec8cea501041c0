"""TensorBoard: a trace as scalars."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from gradlab.integrations.extras import missing
from gradlab.integrations.scalars import last_step, scalars
from gradlab.trace import Trace

try:
    from torch.utils.tensorboard.writer import SummaryWriter
except ImportError as error:
    raise missing("tensorboard", extra="tensorboard") from error

__all__ = ["log_trace"]


def log_trace(
    trace: Trace,
    writer: SummaryWriter | str | os.PathLike[str],
    columns: Mapping[str, Collection[str]] | None = None,
    *,
    after: int = -1,
) -> int:
    """Write a trace's numbers as scalars by training step.

    NaN and Inf are written as they are; TensorBoard marks them on the curve. Numbers are written in double precision.

    Args:
        trace: The trace, of a training that may go on.
        writer: A `SummaryWriter`, which stays open, or a folder for one.
        columns: Table -> columns; `gradlab.integrations.scalars.SCALARS` by default.
        after: Only steps after this one.

    Returns:
        The last step of the trace: give it as `after` the next time.

    Raises:
        UsageError: A table or column that is unknown, or a trace merged from several.
    """
    rows = scalars(trace, columns, after=after)
    own = isinstance(writer, str | os.PathLike)
    target: Any = SummaryWriter(os.fspath(writer)) if own else writer
    try:
        for tag, value, step in rows:
            target.add_scalar(tag, value, step, new_style=True, double_precision=True)
        target.flush()
    finally:
        if own:
            target.close()
    return max(after, last_step(trace))
