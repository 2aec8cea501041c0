"""MLflow: a trace as metrics of a run."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Collection, Mapping
from typing import Any, Final

from gradlab.errors import UsageError
from gradlab.integrations.extras import missing
from gradlab.integrations.scalars import last_step, scalars
from gradlab.trace import Trace

try:
    import mlflow
    from mlflow.entities import Metric
except ImportError as error:
    raise missing("mlflow", extra="mlflow") from error

__all__ = ["log_trace", "metric_name"]

_BATCH: Final = 1000  # the most metrics that MLflow takes at once
_LONGEST: Final = 250


def log_trace(
    trace: Trace,
    run_id: str | None = None,
    columns: Mapping[str, Collection[str]] | None = None,
    *,
    after: int = -1,
    client: Any = None,
) -> int:
    """Log a trace's numbers as metrics by training step.

    NaN is logged as it is, and Inf too: a database shows Inf as the largest float64, 1.8e308.

    Args:
        trace: The trace, of a training that may go on.
        run_id: The run; the active one by default.
        columns: Table -> columns; `gradlab.integrations.scalars.SCALARS` by default.
        after: Only steps after this one.
        client: An `mlflow.MlflowClient`; one for the current tracking URI by default.

    Returns:
        The last step of the trace: give it as `after` the next time.

    Raises:
        UsageError: No run is active, a table or column that is unknown, or a trace merged from several.
    """
    if run_id is None:
        active = mlflow.active_run()
        if active is None:
            raise UsageError("No run of mlflow is active: call mlflow.start_run first, or give a run_id.")
        run_id = active.info.run_id
    rows = scalars(trace, columns, after=after)
    names = {tag: metric_name(tag) for tag in {row.tag for row in rows}}
    now = int(time.time() * 1000)
    metrics = [Metric(names[row.tag], row.value, now, row.step) for row in rows]
    client = mlflow.MlflowClient() if client is None else client
    for first in range(0, len(metrics), _BATCH):
        client.log_batch(run_id, metrics=metrics[first : first + _BATCH])
    return max(after, last_step(trace))


def metric_name(tag: str) -> str:
    """Return a name that MLflow takes: the tag, or what is legal of it and a hash, so that no two tags share a name.

    MLflow allows letters, digits, "_", "-", ".", ":", " " and "/" (a folder, where runs are files), 250 in all.

    Example:
        >>> metric_name("layers.grad_norm/encoder.0"), metric_name("layers.grad_norm/relu(x)")
        ('layers.grad_norm/encoder.0', 'layers.grad_norm/relu_x_-6e166a3a')
    """
    head, slash, label = tag.partition("/")
    legal = f"{head}{slash}{re.sub(r'[^A-Za-z0-9_. -]', '_', label)}"
    if legal == tag and len(tag) <= _LONGEST and label not in (".", ".."):
        return tag
    return f"{legal[: _LONGEST - 9]}-{hashlib.sha256(tag.encode()).hexdigest()[:8]}"
