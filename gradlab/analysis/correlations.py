"""Order and chaos in wide random nets: what becomes of the correlation of two inputs, and over how many layers.

As in `gradlab.analysis.theory`, `weight_var` is sigma_w^2 = fan_in * Var(W) and `bias_var` is sigma_b^2 = Var(b).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from scipy.optimize import brentq

from gradlab.analysis.activations import gaussian_mean, named, root_mean_square
from gradlab.analysis.theory import (
    _LONGEST,
    _MARGINAL,
    _VANISHING,
    _check_variances,
    _next_length,
    fixed_point,
    gradient_gain,
)
from gradlab.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradlab.analysis.activations import Activation, ActivationLike

__all__ = ["DepthScale", "correlation_fixed_point", "correlation_map", "depth_scale"]

_NEAREST_TO_1 = 1e-9  # a correlation this near 1 is 1


@lru_cache(maxsize=4096)  # a nest of two quadratures, and claims and figures ask for the same ones
def _overlap(phi: Activation, q: float, c: float, *, slopes: bool = False) -> float:
    """Return E[f(u) f(v)] for Gaussian u, v of variance q and correlation c, f being phi or its derivative."""
    if phi.slopes is not None:
        half, kink = (phi.slopes[1] + phi.slopes[0]) / 2, (phi.slopes[1] - phi.slopes[0]) / 2
        if slopes:
            return half**2 + kink**2 * 2 / math.pi * math.asin(c)
        return q * (half**2 * c + kink**2 * 2 / math.pi * (math.sqrt(1 - c * c) + c * math.asin(c)))
    f: Callable[[float], float] = phi.derivative if slopes else phi.phi
    size = root_mean_square(f, q)
    if c == 1.0 or not math.isfinite(size):
        return size * size
    rest = q * (1.0 - c) * (1.0 + c)

    def given(x: float) -> float:
        return f(x) * gaussian_mean(f, rest, mean=c * x, absolute=1e-10 * size, relative=1e-10)

    return gaussian_mean(given, q, absolute=1e-9 * size * size, relative=1e-9)


def _resting(phi: Activation, weight_var: float, bias_var: float) -> float:
    """Return the length at which correlations are followed: q*, or its nearest that can be computed."""
    return min(max(fixed_point(phi, weight_var, bias_var), _VANISHING), _LONGEST)


def _correlation(phi: Activation, c: float, weight_var: float, bias_var: float, q: float) -> float:
    # The length that follows q, which is q itself where q* is finite, keeps a correlation of 1 at 1 where it is not.
    found = (weight_var * _overlap(phi, q, c) + bias_var) / _next_length(phi, q, weight_var, bias_var)
    return min(max(found, -1.0), 1.0)


def _slope(phi: Activation, c: float, weight_var: float, bias_var: float, q: float) -> float:
    """Return dc'/dc of the correlation map: chi_1 at c = 1."""
    overlap = _overlap(phi, q, c, slopes=True)
    return weight_var * overlap * q / _next_length(phi, q, weight_var, bias_var)


def correlation_map(activation: ActivationLike, c: float, weight_var: float, bias_var: float = 0.0) -> float:
    """Return the correlation of two inputs one layer on, both at the fixed point q* of the length map.

    c' = (sigma_w^2 E[phi(u) phi(v)] + sigma_b^2) / q*, u and v Gaussian of variance q* and correlation c.

    Args:
        activation: A name of `ACTIVATIONS`, an `Activation`, or a function of one float.
        c: Correlation of the pre-activations of this layer, from -1 to 1.
        weight_var: sigma_w^2 = fan_in * Var(W).
        bias_var: sigma_b^2. Default 0.

    Returns:
        The next correlation, to about 1e-8. Where q* is 0 or inf: the limit.

    Raises:
        UsageError: An unknown activation, or a value out of range.

    Example:
        >>> round(correlation_map("relu", 0.0, 2.0), 6)  # 1 / pi
        0.31831

    Source:
        Poole et al. 2016 (arXiv 1606.05340), section 3; closed form for relu: Cho & Saul 2009.
    """
    phi = named(activation)
    _check_variances(weight_var, bias_var)
    if not -1.0 <= c <= 1.0:
        raise UsageError(f"c is {c}, but a correlation lies between -1 and 1; give one.")
    return _correlation(phi, float(c), weight_var, bias_var, _resting(phi, weight_var, bias_var))


def correlation_fixed_point(activation: ActivationLike, weight_var: float, bias_var: float = 0.0) -> float:
    """Return the correlation c* that any two different inputs reach in a deep wide net.

    1 in the ordered phase and on the critical line (chi_1 <= 1): the net forgets which input it was given. Below 1 in
    the chaotic phase.

    Args:
        activation: A name of `ACTIVATIONS`, an `Activation`, or a function of one float.
        weight_var: sigma_w^2 = fan_in * Var(W).
        bias_var: sigma_b^2. Default 0.

    Returns:
        c*, to about 1e-7, reached from correlations of 0 and above.

    Raises:
        UsageError: An unknown activation, or a value out of range.

    Note:
        The map is a power series with coefficients of at least 0 (squared Hermite coefficients), so it is convex for
        c >= 0 and has at most one fixed point below 1. A net of finite depth is near c* only where it is several times
        `depth_scale(...).correlation` deep.

    Example:
        >>> correlation_fixed_point("tanh", 1.5, 0.05), round(correlation_fixed_point("tanh", 4.0, 0.05), 3)
        (1.0, 0.165)

    Source:
        Poole et al. 2016 (arXiv 1606.05340), section 3.
    """
    phi = named(activation)
    _check_variances(weight_var, bias_var)
    q = _resting(phi, weight_var, bias_var)
    if _slope(phi, 1.0, weight_var, bias_var, q) <= 1.0 + _MARGINAL:
        return 1.0

    def change(c: float) -> float:
        return _correlation(phi, c, weight_var, bias_var, q) - c

    if change(0.0) <= _NEAREST_TO_1:
        return 0.0
    gap = 0.1
    while change(1.0 - gap) >= 0.0:
        gap /= 10.0
        if gap < _NEAREST_TO_1:
            return 1.0
    return float(brentq(change, 0.0, 1.0 - gap, xtol=1e-8, rtol=1e-8))


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthScale:
    """Over how many layers a wide net's gradient and correlations change by a factor e.

    Args:
        gradient: -1 / ln chi_1, for the squared norm (the norm itself takes twice as many): above 0 where the gradient
            vanishes, below 0 where it explodes, inf where it does neither.
        correlation: -1 / ln of the slope of the correlation map at c*, the rate at which the correlation of two inputs
            reaches c*; inf on the critical line.
    """

    gradient: float
    correlation: float


def depth_scale(activation: ActivationLike, weight_var: float, bias_var: float = 0.0) -> DepthScale:
    """Return the depth scales of the gradient and of correlations.

    Args:
        activation: A name of `ACTIVATIONS`, an `Activation`, or a function of one float.
        weight_var: sigma_w^2 = fan_in * Var(W).
        bias_var: sigma_b^2. Default 0.

    Raises:
        UsageError: An unknown activation, or a value out of range.

    Note:
        That nets can be trained up to about 6 correlation scales deep is an observation, not a theorem.

    Example:
        >>> scale = depth_scale("tanh", 1.5, 0.05)
        >>> round(scale.gradient, 1), round(scale.correlation, 1)
        (15.8, 15.8)

    Source:
        Schoenholz et al. 2017 (arXiv 1611.01232), sections 3 and 4.
    """
    phi = named(activation)
    chi = gradient_gain(phi, weight_var, bias_var) ** 2
    q = _resting(phi, weight_var, bias_var)
    slope = _slope(phi, correlation_fixed_point(phi, weight_var, bias_var), weight_var, bias_var, q)
    return DepthScale(gradient=_scale(chi), correlation=_scale(slope))


def _scale(factor: float) -> float:
    if abs(factor - 1.0) <= _MARGINAL:
        return math.inf
    return -1.0 / math.log(factor) if factor > 0.0 else 0.0
