"""Where wide random nets pass from order to chaos: the critical line, and the whole plane of variances.

As in `gradlab.analysis.theory`, `weight_var` is sigma_w^2 = fan_in * Var(W) and `bias_var` is sigma_b^2 = Var(b).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq

from gradlab.analysis.activations import named, root_mean_square
from gradlab.analysis.theory import (
    _LONGEST,
    _MARGINAL,
    _VANISHING,
    _check_variances,
    _gain_at,
    fixed_point,
    gradient_gain,
)
from gradlab.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from gradlab.analysis.activations import Activation, ActivationLike

__all__ = ["PhaseDiagram", "critical_line", "phase_diagram"]

_LARGEST_WEIGHT_VAR = 1e6
_LARGEST_SIZE = 1e50
_TABLE = np.linspace(-8.0, 14.0, 22 * 16 + 1)  # log10 of the lengths at which a phase diagram is tabulated


def critical_line(activation: ActivationLike, bias_var: float) -> float:
    """Return the weight variance at which the gradient neither vanishes nor explodes: chi_1 = 1.

    Args:
        activation: A name of `ACTIVATIONS`, an `Activation`, or a function of one float.
        bias_var: sigma_b^2, at least 0.

    Returns:
        The smallest sigma_w^2 with chi_1 >= 1; inf where there is none up to 1e6.

    Raises:
        UsageError: An unknown activation, or a value out of range.

    Note:
        Where chi_1 jumps past 1, as for gelu without biases, whose length goes to 0 on one side and to inf on the
        other, it is the place of the jump.

    Example:
        >>> round(critical_line("tanh", 0.05), 5), critical_line("relu", 0.0)
        (1.76095, 2.0)

    Source:
        Schoenholz et al. 2017 (arXiv 1611.01232), section 3.
    """
    phi = named(activation)
    _check_variances(1.0, bias_var)
    if phi.second_moment is not None:
        return 1.0 / phi.second_moment if phi.second_moment > 0 else math.inf
    if bias_var == 0.0 and phi.phi(0.0) == 0.0:
        # The length 0 is at rest; while it is where the length goes, chi_1 is that of small signals.
        small = 1.0 / root_mean_square(phi.derivative, _VANISHING) ** 2
        if fixed_point(phi, small * (1 - 1e-6)) < 1e-3:
            return small
    return _where_it_rests(phi, bias_var) or _by_bisection(phi, bias_var)


def _where_it_rests(phi: Activation, bias_var: float) -> float:
    """Return sigma_w^2 from the length q at which chi_1 = (q - sigma_b^2) E[phi'^2] / E[phi^2] passes 1, or 0."""

    def excess(log_rise: float) -> float:
        rise = math.exp(log_rise)
        q = bias_var + rise
        # A constant phi has slope 0; one that overflows rests nowhere near.
        slope, size = max(root_mean_square(phi.derivative, q), 1e-150), root_mean_square(phi.phi, q)
        return math.log(rise) + 2 * (math.log(min(slope, 1e150)) - math.log(min(max(size, 1e-150), 1e150)))

    places = np.linspace(math.log(1e-6), math.log(1e6), 25)
    below = float(places[0])
    for place in places[1:]:
        if excess(place) >= 0.0:
            if excess(below) >= 0.0:
                return 0.0
            rise = math.exp(brentq(excess, below, place, xtol=1e-13, rtol=1e-13))
            q = bias_var + rise
            found = rise / root_mean_square(phi.phi, q) ** 2
            # A length can be at rest there and yet not be the one that the net goes to.
            return found if abs(fixed_point(phi, found, bias_var) / q - 1) < 1e-5 else 0.0
        below = float(place)
    return 0.0


def _by_bisection(phi: Activation, bias_var: float) -> float:
    low, high = 0.0, 1.0
    while gradient_gain(phi, high, bias_var) < 1.0:
        low, high = high, 2 * high
        if high > _LARGEST_WEIGHT_VAR:
            return math.inf
    while high - low > 1e-8 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if gradient_gain(phi, middle, bias_var) >= 1.0 else (middle, high)
    return high


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PhaseDiagram:
    """Fixed points and gradient gains over a grid of weight and bias variances.

    Args:
        activation: Its name.
        weight_var: sigma_w^2, shape (m,).
        bias_var: sigma_b^2, shape (n,).
        length: q*, shape (m, n): 0 and inf where the length vanishes and diverges.
        gain: sqrt(chi_1), the factor a layer on the gradient norm, shape (m, n).
    """

    activation: str
    weight_var: NDArray[np.float64]
    bias_var: NDArray[np.float64]
    length: NDArray[np.float64]
    gain: NDArray[np.float64]


def phase_diagram(activation: ActivationLike, weight_var: ArrayLike, bias_var: ArrayLike) -> PhaseDiagram:
    """Return the fixed point of the length and the gradient gain on a whole grid, as fast as on a few points.

    The moments of the activation are tabulated once against the length and interpolated, which agrees with
    `fixed_point` and `gradient_gain` to about 1e-6; the result is cached.

    Args:
        activation: A name of `ACTIVATIONS`, an `Activation`, or a function of one float.
        weight_var: Values of sigma_w^2, shape (m,).
        bias_var: Values of sigma_b^2, shape (n,).

    Returns:
        Arrays of shape (m, n), not writable.

    Raises:
        UsageError: An unknown activation, a value out of range, or values that are no list of numbers.

    Example:
        >>> diagram = phase_diagram("tanh", [1.0, 2.0, 3.0], [0.05, 0.1])
        >>> diagram.gain.shape, round(float(diagram.gain[1, 0]), 4)
        ((3, 2), 1.0236)

    Source:
        Poole et al. 2016 (arXiv 1606.05340), Fig. 1; Schoenholz et al. 2017 (arXiv 1611.01232), Fig. 1.
    """
    phi = named(activation)
    axes = []
    for name, given in (("weight_var", weight_var), ("bias_var", bias_var)):
        try:
            values = np.asarray(given, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{name} is {given!r:.60}, but it must be a list of numbers; give one.") from error
        if values.ndim != 1 or not values.size:
            raise UsageError(f"{name} has shape {values.shape}, but it must be a list of one value or more; give one.")
        axes.append(tuple(values.tolist()))
    for value in axes[0]:
        _check_variances(value, 0.0)
    for value in axes[1]:
        _check_variances(1.0, value)
    return _phase_diagram(phi, axes[0], axes[1])


@lru_cache(maxsize=64)
def _phase_diagram(phi: Activation, weight_vars: tuple[float, ...], bias_vars: tuple[float, ...]) -> PhaseDiagram:
    w, b = np.array(weight_vars), np.array(bias_vars)
    weights, biases = (grid.ravel() for grid in np.meshgrid(w, b, indexing="ij"))
    if phi.second_moment is not None:
        length = np.array([fixed_point(phi, *pair) for pair in zip(weights.tolist(), biases.tolist(), strict=True)])
        gain = np.sqrt(weights * phi.second_moment)
    else:
        length, gain = _grid(phi, weights, biases)
    arrays = [w, b, length.reshape(w.size, b.size), gain.reshape(w.size, b.size)]
    for array in arrays:
        array.flags.writeable = False
    return PhaseDiagram(activation=phi.name, weight_var=arrays[0], bias_var=arrays[1], length=arrays[2], gain=arrays[3])


@lru_cache(maxsize=64)
def _moments(phi: Activation) -> tuple[CubicSpline, CubicSpline]:
    """Return ln E[phi^2] and ln E[phi'^2] against ln q, up to where they can be computed."""
    rows = []
    for exponent in _TABLE:
        try:
            sizes = [root_mean_square(function, 10.0**exponent) for function in (phi.phi, phi.derivative)]
        except UsageError:  # sin, say, is too rough for the quadrature at lengths that no fixed point has
            if exponent <= 1.0:
                raise
            break
        if max(sizes) > _LARGEST_SIZE:  # it diverges from here, or before
            break
        rows.append([exponent * math.log(10), *(2 * math.log(max(size, 1e-150)) for size in sizes)])
    log_q, square, slope_square = np.array(rows).T
    return CubicSpline(log_q, square), CubicSpline(log_q, slope_square)


def _grid(
    phi: Activation, weights: NDArray[np.float64], biases: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    square, slope_square = _moments(phi)
    log_q = square.x
    start = int(np.argmin(np.abs(log_q)))  # a length of 1, as in `fixed_point`

    def growth(at: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return sigma_w^2 E[phi^2] + sigma_b^2 - q at ln q, one place for each pair or a row of places for all."""
        grown: NDArray[np.float64] = np.exp(square(at))
        if at.ndim == 2:
            return weights[:, None] * grown + biases[:, None] - np.exp(at)
        return weights * grown + biases - np.exp(at)

    table = growth(log_q[None, :])
    rises = table[:, start] > 0
    # Where the length grows from 1 it rests before the first place that shrinks it; else after the last that grows it.
    shrinks, grows = table[:, start:] <= 0, table[:, : start + 1] >= 0
    upper = start + np.argmax(shrinks, axis=1)
    lower = start - np.argmax(grows[:, ::-1], axis=1)
    left = np.where(rises, upper - 1, lower).clip(0, log_q.size - 2)
    low, high = log_q[left], log_q[left + 1]
    for _ in range(50):
        middle = (low + high) / 2
        grown = growth(middle) > 0
        low, high = np.where(grown, middle, low), np.where(grown, high, middle)
    length = np.exp((low + high) / 2)
    length = np.where(np.abs(table[:, start]) <= _MARGINAL, 1.0, length)
    length = np.where(rises & ~shrinks.any(axis=1), math.inf, length)
    length = np.where(~rises & ~grows.any(axis=1), 0.0, length)
    inside = np.log(np.clip(length, 1e-300, 1e300)).clip(log_q[0], log_q[-1])
    gain = np.sqrt(weights) * np.exp(slope_square(inside) / 2)
    for end, reached in ((0.0, length == 0.0), (_LONGEST, np.isinf(length))):
        if reached.any():
            gain = np.where(reached, np.sqrt(weights) * _gain_at(phi, end, 1.0), gain)
    return length, gain
