"""How fast the gradient through time of a trace falls: rate and half-life of every recurrent layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gradlab.analysis.decay import fit_decay
from gradlab.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Hashable

    import pandas as pd

__all__ = ["gradient_half_life"]

_RUN = ["step", "layer", "call", "level", "direction", "state"]
_COLUMNS = ["state", "t", "log10_grad_norm"]


def gradient_half_life(timesteps: pd.DataFrame, *, skip: int = 0, confidence: float = 0.95) -> pd.DataFrame:
    """Fit ln |dL/d(state)| against lag and return after how many time steps the gradient has halved.

    half_life = ln 2 / -slope, slope in nats a step back in time. The lag of a forward sweep is T - 1 - t; a backward
    sweep ends at t = 0, so there it is t.

    Args:
        timesteps: `trace.timesteps`, of one trace or several merged ones (further key columns are kept apart).
        skip: Lags below this are left out: near the loss the fall is not yet exponential. Default 0.
        confidence: Of the interval. Default .95.

    Returns:
        One row a step, layer, call, level, direction and state: gain (factor on the norm a step back), half_life,
        half_life_low, half_life_high (time steps; inf where the gradient does not fall), r_squared, shape (as in
        `DecayFit.best`: a half-life means something where it is "exponential"), points, dropped (norms of 0 and
        non-finite ones).

    Raises:
        DataError: The table is empty or lacks a column.

    Note:
        Meant for losses at the end of the sequence. Where every time step has a loss of its own, gradients of later
        losses arrive on top of those of earlier ones, and the total need not fall although each of them does. The
        interval takes the time steps as independent, which they are not: it is too narrow.

    Example:
        >>> import numpy as np, pandas as pd
        >>> rows = {"layer": "rnn", "state": "h", "t": range(9), "log10_grad_norm": [t * np.log10(2) for t in range(9)]}
        >>> gradient_half_life(pd.DataFrame(rows))[["gain", "half_life", "shape"]].round(6).values.tolist()
        [[0.5, 1.0, 'exponential']]
    """
    import pandas as pd

    missing = [name for name in _COLUMNS if name not in timesteps]
    if timesteps.empty or missing:
        lacks = f"lacks {', '.join(missing)}" if missing else "is empty"
        raise DataError(f"The table of time steps {lacks}: record one with watch(model, timesteps=True).")
    values = {"t", "norm", "grad_norm", "log10_grad_norm"}
    by = [name for name in timesteps if name not in values]
    by.sort(key=lambda name: _RUN.index(name) if name in _RUN else -1)  # added keys first
    rows = []
    for key, own in timesteps.groupby(by, sort=False, dropna=False):
        rows.append(dict(zip(by, key, strict=True)) | _half_life(own, skip, confidence))
    return pd.DataFrame(rows)


def _half_life(own: pd.DataFrame, skip: int, confidence: float) -> dict[Hashable, object]:
    t = own["t"].to_numpy()
    backward = "direction" in own and (own["direction"] == "backward").all()
    lag = t - t.min() if backward else t.max() - t
    kept = lag >= skip
    fit = fit_decay(lag[kept], own["log10_grad_norm"].to_numpy()[kept] * math.log(10), confidence=confidence)
    # A steeper fall is a shorter half-life.
    low, middle, high = (_halving(slope) for slope in (fit.slope_low, fit.slope, fit.slope_high))
    return {
        "gain": fit.gain,
        "half_life": middle,
        "half_life_low": low,
        "half_life_high": high,
        "r_squared": fit.r_squared,
        "shape": str(fit.best),
        "points": fit.points,
        "dropped": fit.dropped,
    }


def _halving(slope: float) -> float:
    return math.log(2) / -slope if slope < 0 else math.nan if math.isnan(slope) else math.inf
