"""Independent samples, one for each seed: their mean, its interval, and the difference of two groups."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import comb, stdtr, stdtrit

from gradlab.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["ROUNDING", "Difference", "as_samples", "check_fraction", "mean_difference", "mean_interval", "spread"]

ROUNDING = 1e-12
"""Relative differences below this are float64 rounding, not spread."""


def as_samples(samples: ArrayLike, name: str = "samples") -> NDArray[np.float64]:
    """Return the samples as float64 of shape (n,), or raise a UsageError that names them."""
    try:
        values = np.asarray(samples, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"The {name} are {samples!r:.60}, but they must be numbers, one for each seed.") from error
    if values.ndim != 1:
        raise UsageError(
            f"The {name} have {values.ndim} dimensions, but they must have 1; give one number for each seed."
        )
    return values


def check_fraction(name: str, value: float, most: float) -> None:
    """Raise a UsageError unless `value` lies between 0 and `most`, both excluded."""
    if not 0.0 < value < most:
        raise UsageError(f"{name} is {value}, but it must lie between 0 and {most:g}; give a number such as 0.05.")


def spread(values: NDArray[np.float64], scale: float) -> float:
    """Return the standard deviation of values of size `scale`: exactly 0 where they differ by rounding only."""
    if np.ptp(values) <= ROUNDING * scale:
        return 0.0
    largest = float(np.abs(values).max())  # scaled out, so that the squares of tiny or huge norms stay in range
    return float((values / largest).std(ddof=1)) * largest


def mean_interval(samples: ArrayLike, confidence: float = 0.95) -> tuple[float, float, float]:
    """Return the mean of independent samples and its two-sided Student t interval, mean +- t s / sqrt(n).

    Args:
        samples: One number for each seed, shape (n,).
        confidence: Probability that the interval covers the true mean. Default .95, the field's custom.

    Returns:
        (mean, low, high); the bounds are NaN for n = 1, all three for n = 0 or where a sample is not finite.

    Raises:
        UsageError: Samples that are no list of numbers, or a confidence outside (0, 1).

    Note:
        Assumes roughly normal samples.

    Example:
        >>> [round(value, 3) for value in mean_interval([1.0, 2.0, 3.0])]
        [2.0, -0.484, 4.484]
    """
    values = as_samples(samples)
    check_fraction("confidence", confidence, 1.0)
    if values.size == 0 or not np.isfinite(values).all():
        return math.nan, math.nan, math.nan
    mean = float(values.mean())
    if values.size == 1:
        return mean, math.nan, math.nan
    error = spread(values, float(np.abs(values).max())) / math.sqrt(values.size)
    reach = float(stdtrit(values.size - 1, (1 + confidence) / 2)) * error
    return mean, mean - reach, mean + reach


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The difference of two group means: `effect`, its interval (NaN where none), and one-sided p-values each way."""

    effect: float
    low: float
    high: float
    p_greater: float
    p_less: float
    remark: str


def mean_difference(a: NDArray[np.float64], b: NDArray[np.float64], *, paired: bool) -> Difference:
    """Return mean(a) - mean(b) with its two-sided 95 % interval and one-sided t-tests, Welch's or paired.

    Args:
        a: Finite samples, shape (n,), n at least 2.
        b: Finite samples, shape (m,), m at least 2; m = n where `paired`.
        paired: Whether a[i] and b[i] share a seed.

    Note:
        Assumes roughly normal samples. Without any spread a t-test would report p = 0; then p is the smallest that a
        permutation test can give, 2^-n or 1 / binomial(n + m, n), which is all that so many samples can carry.

    Example:
        >>> found = mean_difference(np.array([3.0, 4.0, 5.0]), np.array([1.0, 3.0, 2.0]), paired=True)
        >>> found.effect, round(found.p_greater, 4)
        (2.0, 0.0371)

    Source:
        Welch 1947, for unpaired groups of unequal variance.
    """
    scale = float(max(np.abs(a).max(), np.abs(b).max()))
    if paired:
        effect = float((a - b).mean())
        error, freedom = spread(a - b, scale) / math.sqrt(a.size), a.size - 1.0
    else:
        effect = float(a.mean() - b.mean())
        parts = [spread(group, float(np.abs(group).max())) / math.sqrt(group.size) for group in (a, b)]
        error = math.hypot(*parts)
        weights = [(part / error) ** 2 if error > 0 else 1.0 for part in parts]
        freedom = 1.0 / sum(weight**2 / (group.size - 1) for weight, group in zip(weights, (a, b), strict=True))
    if error > 0:
        t, reach = effect / error, float(stdtrit(freedom, 0.975)) * error
        return Difference(
            effect=effect,
            low=effect - reach,
            high=effect + reach,
            p_greater=float(stdtr(freedom, -t)),
            p_less=float(stdtr(freedom, t)),
            remark="",
        )
    if abs(effect) <= ROUNDING * scale:
        return Difference(
            effect=0.0, low=math.nan, high=math.nan, p_greater=1.0, p_less=1.0, remark="All samples are equal."
        )
    smallest = 0.5**a.size if paired else 1.0 / float(comb(a.size + b.size, a.size))
    return Difference(
        effect=effect,
        low=math.nan,
        high=math.nan,
        p_greater=smallest if effect > 0 else 1.0,
        p_less=smallest if effect < 0 else 1.0,
        remark="The samples have no spread, so p is the smallest a permutation test can give for this n.",
    )
