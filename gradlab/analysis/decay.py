"""How fast a norm falls or grows with depth or time: exponential and power-law fits, and which of them it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.special import stdtrit

from gradlab.analysis.samples import ROUNDING, check_fraction, mean_interval
from gradlab.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["DecayFit", "Shape", "fit_decay"]

Shape = Literal["exponential", "power law", "flat", "unclear"]
"""What a curve is called; "unclear": it changes, but neither law fits."""

_FEWEST = 3  # points that leave a line one degree of freedom


@dataclass(frozen=True, kw_only=True, slots=True)
class DecayFit:
    """Two fits of ln norm: slope * depth + intercept (exponential) and exponent * ln depth + intercept (power law).

    Every rate is the mean over seeds; `*_low` and `*_high` bound it over seeds, or within the seed where there is one.
    What could not be computed is NaN.

    Args:
        best: "exponential" or "power law" if that law fits and the curve changes enough, "flat" if it does not change
            enough, "unclear" if it changes but neither law fits or there are too few points.
        slope: d ln norm / d depth.
        slope_low: Lower end of its interval.
        slope_high: Upper end of its interval.
        intercept: ln norm of the exponential at depth 0.
        gain: exp(slope), the factor on the norm per unit of depth; exp(-slope) for fits made with `backward=True`.
        gain_low: Lower end of its interval.
        gain_high: Upper end of its interval.
        r_squared: R^2 of the exponential, pooled over seeds with a line of its own each; NaN for a constant curve.
        exponent: d ln norm / d ln depth.
        exponent_low: Lower end of its interval.
        exponent_high: Upper end of its interval.
        power_intercept: ln norm of the power law at depth 1.
        power_r_squared: R^2 of the power law, pooled likewise.
        slopes: The slope of each seed; NaN for a seed with fewer than 3 points.
        exponents: The exponent of each seed, likewise.
        depth_low: Smallest depth used.
        depth_high: Largest depth used.
        seeds: Seeds used.
        points: Points used, over all seeds.
        dropped: Points left out, over all seeds: norms of 0, non-finite ones, and seeds too short to fit.
        confidence: Of the intervals.
    """

    best: Shape
    slope: float
    slope_low: float
    slope_high: float
    intercept: float
    gain: float
    gain_low: float
    gain_high: float
    r_squared: float
    exponent: float
    exponent_low: float
    exponent_high: float
    power_intercept: float
    power_r_squared: float
    slopes: tuple[float, ...]
    exponents: tuple[float, ...]
    depth_low: float
    depth_high: float
    seeds: int
    points: int
    dropped: int
    confidence: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Lines:
    """Lines of ln norm against x, one for each seed."""

    rates: tuple[float, ...]
    rate: float
    low: float
    high: float
    intercept: float
    residual: float
    r_squared: float


_NO_LINES = _Lines(
    rates=(), rate=math.nan, low=math.nan, high=math.nan, intercept=math.nan, residual=math.inf, r_squared=math.nan
)


def _fit_lines(x: NDArray[np.float64], rows: NDArray[np.float64], used: NDArray[np.bool_], confidence: float) -> _Lines:
    """Fit a line to each row by least squares over its used points, and pool the residuals."""
    rates, intercepts = np.full(len(rows), math.nan), np.full(len(rows), math.nan)
    residual, total, error = 0.0, 0.0, math.nan
    for row, keep in enumerate(used):
        if not keep.any():
            continue
        at, values = x[keep], rows[row, keep]
        off, rise = at - at.mean(), values - values.mean()
        # A constant curve has only the rounding of its mean to explain.
        rise[np.abs(rise) <= ROUNDING * np.abs(values).max()] = 0.0
        spread = float(off @ off)
        rates[row] = float(off @ rise) / spread
        intercepts[row] = values.mean() - rates[row] * at.mean()
        left = rise - rates[row] * off
        residual += float(left @ left)
        total += float(rise @ rise)
        error = math.sqrt(float(left @ left) / (at.size - 2) / spread)
    fitted = rates[np.isfinite(rates)]
    rate, low, high = mean_interval(fitted, confidence)
    if fitted.size == 1:
        reach = float(stdtrit(int(used.sum()) - 2, (1 + confidence) / 2)) * error
        low, high = rate - reach, rate + reach
    return _Lines(
        rates=tuple(rates.tolist()),
        rate=rate,
        low=low,
        high=high,
        intercept=float(intercepts[np.isfinite(intercepts)].mean()),
        residual=residual,
        r_squared=1.0 - residual / total if total > 0 else math.nan,
    )


def _choose(lines: dict[Shape, tuple[_Lines, float]], *, min_r_squared: float, min_change: float, points: int) -> Shape:
    """Name the curve, from the lines of each law and the range of their x."""
    if points == 0:
        return "unclear"
    # Both laws have two parameters for each seed and see the same points, so AIC, BIC and residual agree on the order.
    better = min(lines, key=lambda law: lines[law][0].residual)
    found, reach = lines[better]
    if abs(found.rate) * reach <= min_change:
        return "flat"
    return better if found.r_squared > min_r_squared else "unclear"


def _exp(value: float) -> float:
    return math.exp(value) if not value > 700.0 else math.inf


def fit_decay(
    depth: ArrayLike,
    log_norm: ArrayLike,
    *,
    backward: bool = False,
    confidence: float = 0.95,
    min_r_squared: float = 0.98,
    min_change: float = 1.0,
) -> DecayFit:
    """Fit ln norm against depth, exponentially and as a power law, by least squares for each seed.

    exponential: ln norm = slope * depth + c; power law: ln norm = exponent * ln depth + c. The law with the smaller
    residual names the curve if its R^2 passes `min_r_squared` and its fitted change, |rate| * range, `min_change`. At
    criticality R^2 means nothing, so a curve that hardly changes is called flat whatever its R^2.

    Args:
        depth: Layers, or steps of time, shape (L,); the power law needs them above 0 and is else left out.
        log_norm: *Natural* log of the norms, shape (L,) or (seeds, L). -inf (a norm of 0), inf and NaN are left out and
            counted, never replaced.
        backward: Whether `depth` counts from the input while the gain is wanted per layer going backward, to the input:
            gain = exp(-slope). Default False: gain = exp(slope).
        confidence: Of the intervals. Default .95.
        min_r_squared: R^2 a law must pass. Default .98.
        min_change: Change of ln norm over the range of depth that the law must pass. Default 1, a factor e.

    Returns:
        The fits. With no seed of at least 3 usable points, all rates are NaN and `best` is "unclear".

    Raises:
        UsageError: Shapes that do not match, a depth that is not finite or repeats, or a limit out of range.

    Note:
        Intervals over seeds take the seeds as independent and roughly normal. Within one seed they take its points so,
        which norms along one net are not: such an interval is too narrow. Leave out the first and last layers, where
        the length of the signal has not settled.

    Example:
        >>> import numpy as np
        >>> layer = np.arange(10, 41)
        >>> fit = fit_decay(layer, layer * np.log(1.25), backward=True)
        >>> fit.best, round(fit.gain, 6)
        ('exponential', 0.8)
    """
    x, rows = np.array(depth, dtype=np.float64), np.array(log_norm, dtype=np.float64)
    rows = rows[None, :] if rows.ndim == 1 else rows
    if x.ndim != 1 or rows.ndim != 2 or rows.shape[1] != x.size:
        raise UsageError(
            f"depth has shape {x.shape} and log_norm {np.shape(log_norm)}, but they must be (L,) and (L,) or "
            "(seeds, L); give one log norm for each depth."
        )
    if not np.isfinite(x).all() or np.unique(x).size != x.size:
        raise UsageError("A depth is not finite or occurs twice, but each point needs its own; give distinct depths.")
    check_fraction("confidence", confidence, 1.0)
    if not (0.0 <= min_r_squared < 1.0 and 0.0 <= min_change < math.inf):
        raise UsageError(
            f"min_r_squared and min_change are {min_r_squared} and {min_change}, but the first must lie in [0, 1) and "
            "the second be finite and at least 0; give such as 0.98 and 1."
        )
    used = np.isfinite(rows)
    used[used.sum(axis=1) < _FEWEST] = False
    points, at = int(used.sum()), x[used.any(axis=0)]
    exponential, power = _NO_LINES, _NO_LINES
    lines: dict[Shape, tuple[_Lines, float]] = {}
    if points:
        exponential = _fit_lines(x, rows, used, confidence)
        lines["exponential"] = exponential, float(np.ptp(at))
        if at.min() > 0:
            log_x = np.log(np.where(x > 0, x, 1.0))
            power = _fit_lines(log_x, rows, used, confidence)
            lines["power law"] = power, float(np.ptp(np.log(at)))
    nothing = (math.nan,) * len(rows)
    gains = [_exp(-rate if backward else rate) for rate in (exponential.low, exponential.rate, exponential.high)]
    return DecayFit(
        best=_choose(lines, min_r_squared=min_r_squared, min_change=min_change, points=points),
        slope=exponential.rate,
        slope_low=exponential.low,
        slope_high=exponential.high,
        intercept=exponential.intercept,
        gain=gains[1],
        gain_low=gains[2] if backward else gains[0],
        gain_high=gains[0] if backward else gains[2],
        r_squared=exponential.r_squared,
        exponent=power.rate,
        exponent_low=power.low,
        exponent_high=power.high,
        power_intercept=power.intercept,
        power_r_squared=power.r_squared,
        slopes=exponential.rates or nothing,
        exponents=power.rates or nothing,
        depth_low=float(at.min()) if points else math.nan,
        depth_high=float(at.max()) if points else math.nan,
        seeds=int(used.any(axis=1).sum()),
        points=points,
        dropped=int(rows.size - points),
        confidence=confidence,
    )
