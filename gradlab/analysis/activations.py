"""Activations as mean-field theory sees them: phi, its derivative, and their Gaussian means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.integrate import quad
from scipy.special import expit

from gradlab.errors import UsageError, unknown

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ACTIVATIONS", "Activation", "gaussian_mean", "named", "piecewise_linear"]

_REACH = 14.0  # standard deviations: the Gaussian weight beyond is below 1e-42
_SHAPE_SCALES = (1.0, 8.0)  # inputs at which the usual activations bend and have finished bending
_RELATIVE_ERROR = 1e-12
_RELATIVE_ERROR_ALLOWED = 1e-8


@dataclass(frozen=True, kw_only=True, slots=True)
class Activation:
    """An activation phi with its derivative, as the theory of wide nets needs it.

    Args:
        name: What messages call it.
        phi: The activation, a function of one float.
        derivative: Its derivative; at a kink either one-sided value.
        slopes: (slope for x < 0, slope for x > 0) where phi is positively homogeneous (relu, linear), which gives
            closed forms in place of quadrature. Default None: not homogeneous.

    Note:
        The quadrature reaches 14 standard deviations, so phi must grow slower than exp(x).

    Example:
        >>> import math
        >>> sine = Activation(name="sine", phi=math.sin, derivative=math.cos)
        >>> sine.derivative(0.0)
        1.0
    """

    name: str
    phi: Callable[[float], float]
    derivative: Callable[[float], float]
    slopes: tuple[float, float] | None = None

    @property
    def second_moment(self) -> float | None:
        """E[phi(z)^2] = E[phi'(z)^2] for z ~ N(0, 1) where phi is positively homogeneous, else None."""
        return None if self.slopes is None else (self.slopes[0] ** 2 + self.slopes[1] ** 2) / 2


def piecewise_linear(negative_slope: float, positive_slope: float = 1.0, *, name: str = "") -> Activation:
    """Return the positively homogeneous activation with one slope on each side of 0.

    Args:
        negative_slope: Slope for x < 0.
        positive_slope: Slope for x > 0. Default 1, as in leaky ReLU.
        name: What messages call it. Default: made from the slopes.

    Raises:
        UsageError: A slope is not finite.

    Example:
        >>> piecewise_linear(0.2, 1.5).second_moment
        1.145
    """
    if not (math.isfinite(negative_slope) and math.isfinite(positive_slope)):
        raise UsageError(
            f"Slopes are ({negative_slope}, {positive_slope}), but both must be finite; give finite numbers."
        )
    return Activation(
        name=name or f"piecewise linear ({negative_slope:g}, {positive_slope:g})",
        phi=lambda x: (positive_slope if x > 0 else negative_slope) * x,
        derivative=lambda x: positive_slope if x > 0 else negative_slope,
        slopes=(float(negative_slope), float(positive_slope)),
    )


def _sigmoid(x: float) -> float:
    return float(expit(x))


ACTIVATIONS: dict[str, Activation] = {
    "relu": piecewise_linear(0.0, name="relu"),
    "leaky_relu": piecewise_linear(0.01, name="leaky_relu"),  # torch's default negative_slope
    "linear": piecewise_linear(1.0, name="linear"),
    "tanh": Activation(name="tanh", phi=math.tanh, derivative=lambda x: 1.0 - math.tanh(x) ** 2),
    "sigmoid": Activation(name="sigmoid", phi=_sigmoid, derivative=lambda x: _sigmoid(x) * _sigmoid(-x)),
}
"""The activations known by torch's names (`torch.nn.init.calculate_gain`, `torch.nn.functional`)."""


def named(activation: str | Activation) -> Activation:
    """Return the activation of that name, or the one given.

    Raises:
        UsageError: No activation has that name.
    """
    if isinstance(activation, Activation):
        return activation
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS, "Others can be given as an Activation.")
    return ACTIVATIONS[activation]


def gaussian_mean(function: Callable[[float], float], variance: float, *, absolute: float = 0.0) -> float:
    """Return E[f(sqrt(variance) z)] for z ~ N(0, 1), by adaptive quadrature.

    Args:
        function: f, a function of one float that grows slower than exp(x).
        variance: Variance of its argument, 0 or more.
        absolute: Absolute error that is good enough, needed where positive and negative parts may cancel. Default 0.

    Returns:
        The mean, to a relative 1e-8 (or `absolute`) or better; inf where f overflows.

    Raises:
        UsageError: f gives NaN or is too rough for the quadrature.

    Example:
        >>> round(gaussian_mean(lambda x: x * x, 4.0), 9)
        4.0
    """
    scale = math.sqrt(variance)
    if scale == 0.0:
        return float(function(0.0))
    # The integrand bends where its argument is of order 1, far inside one deviation where the variance is large.
    inner = [edge / scale for edge in _SHAPE_SCALES if edge / scale < _REACH]
    breaks = [-edge for edge in reversed(inner)] + [0.0, *inner]

    def integrand(z: float) -> float:
        return float(function(scale * z)) * math.exp(-z * z / 2)

    try:
        # A user's phi may overflow in a branch it then discards; full_output turns quad's warnings into return values.
        with np.errstate(all="ignore"):
            total, error, *_ = quad(
                integrand,
                -_REACH,
                _REACH,
                points=breaks,
                limit=400,
                epsabs=absolute + 1e-300,
                epsrel=_RELATIVE_ERROR,
                full_output=1,
            )
    except OverflowError:
        return math.inf
    if math.isinf(total):
        return float(total)
    if math.isnan(total) or error > _RELATIVE_ERROR_ALLOWED * abs(total) + absolute + 1e-290:
        raise UsageError(
            f"The Gaussian mean at variance {variance:g} is {total:g} +- {error:g}, but it must be a number known to a "
            f"relative {_RELATIVE_ERROR_ALLOWED:g}; give a smooth activation that is finite everywhere."
        )
    return float(total / math.sqrt(2 * math.pi))
