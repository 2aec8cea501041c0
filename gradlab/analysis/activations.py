"""Activations as mean-field theory sees them: phi, its derivative, and their Gaussian means."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.integrate import quad

from gradlab.errors import UsageError, unknown

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "ActivationLike",
    "gaussian_mean",
    "named",
    "piecewise_linear",
    "root_mean_square",
]

_NEAR, _REACH = 10.0, 38.0  # standard deviations: the Gaussian weight beyond is below 1e-22, and below the least float
_SHAPE_STEP = 8.0  # the usual activations bend at inputs of 1, and have finished at 8; those like 1 / x never finish
_STEP = 6e-6  # of central differences, relative: the cube root of the rounding error
_SMALLEST_STEP = 1e-6  # where phi(0) is not 0: differences of a smaller one would lose their digits
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
        The quadrature reaches 38 standard deviations, where a float ends: phi may grow as fast as exp(x)
        (then up to a variance of 200), not as exp(x^2).

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


ActivationLike = str | Activation | Callable[[float], float]
"""A name of `ACTIVATIONS`, an `Activation`, or any function of one float."""


def _sigmoid(x: float) -> float:
    # Each branch exponentiates a number below 0, which cannot overflow.
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def _silu_slope(x: float) -> float:
    s = _sigmoid(x)
    return s * (1.0 + x * _sigmoid(-x))


def _gelu_slope(x: float) -> float:
    return 0.5 * math.erfc(-x / _ROOT_2) + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


_ROOT_2 = math.sqrt(2.0)
_SELU_SCALE, _SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717

ACTIVATIONS: dict[str, Activation] = {
    "relu": piecewise_linear(0.0, name="relu"),
    "leaky_relu": piecewise_linear(0.01, name="leaky_relu"),  # torch's default negative_slope
    "linear": piecewise_linear(1.0, name="linear"),
    "tanh": Activation(name="tanh", phi=math.tanh, derivative=lambda x: 1.0 - math.tanh(x) ** 2),
    "sigmoid": Activation(name="sigmoid", phi=_sigmoid, derivative=lambda x: _sigmoid(x) * _sigmoid(-x)),
    "elu": Activation(
        name="elu",
        phi=lambda x: x if x > 0 else math.expm1(x),
        derivative=lambda x: 1.0 if x > 0 else math.exp(x),
    ),
    "selu": Activation(
        name="selu",
        phi=lambda x: _SELU_SCALE * (x if x > 0 else _SELU_ALPHA * math.expm1(x)),
        derivative=lambda x: _SELU_SCALE * (1.0 if x > 0 else _SELU_ALPHA * math.exp(x)),
    ),
    "gelu": Activation(name="gelu", phi=lambda x: 0.5 * x * math.erfc(-x / _ROOT_2), derivative=_gelu_slope),
    "silu": Activation(name="silu", phi=lambda x: x * _sigmoid(x), derivative=_silu_slope),
    "softplus": Activation(
        name="softplus", phi=lambda x: max(x, 0.0) + math.log1p(math.exp(-abs(x))), derivative=_sigmoid
    ),
    "softsign": Activation(
        name="softsign", phi=lambda x: x / (1.0 + abs(x)), derivative=lambda x: (1.0 + abs(x)) ** -2
    ),
    "hardtanh": Activation(
        name="hardtanh",
        phi=lambda x: min(max(x, -1.0), 1.0),
        derivative=lambda x: 1.0 if -1.0 < x < 1.0 else 0.0,
    ),
}
"""The activations known by torch's names (`torch.nn.functional`), with torch's default settings; "linear": identity."""


def named(activation: ActivationLike) -> Activation:
    """Return the activation of that name, or the one given.

    Args:
        activation: A name of `ACTIVATIONS`, an `Activation`, or any function of one float; the derivative of a bare
            function is taken by central differences.

    Raises:
        UsageError: No activation has that name, or a bare function does not turn a float into a float.

    Note:
        Differences are good to about 1e-7 where the function is computed to full precision. Near 0 a function such as
        exp(x) - 1 is not: give an `Activation` with the derivative then.

    Example:
        >>> named("relu").slopes, round(named(lambda x: x**3).derivative(2.0), 6)
        ((0.0, 1.0), 12.0)
    """
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS, "Others can be given as an Activation.")
        return ACTIVATIONS[activation]
    if not callable(activation):
        raise UsageError(
            f"The activation is {activation!r:.60}, but it must be a name such as 'tanh', an Activation or a function "
            "of one float; give one."
        )
    return _from_function(activation)


@lru_cache(maxsize=64)  # the same function is the same activation, so that what is cached for it is found again
def _from_function(function: Callable[[float], float]) -> Activation:
    name = getattr(function, "__name__", type(function).__name__)

    def phi(x: float) -> float:
        return float(function(x))

    try:
        at_0 = phi(0.0)
    except Exception as error:
        raise UsageError(
            f"The activation '{name}' fails at 0.0 ({type(error).__name__}), but it must turn a float into a float; "
            "give such a function."
        ) from error
    # Where phi(0) = 0, values near 0 are known to a relative precision, and so are differences of relative steps: they
    # see both sides of a kink at 0 at every length.
    least = _SMALLEST_STEP if at_0 != 0.0 else 1e-300

    def derivative(x: float) -> float:
        step = max(_STEP * abs(x), least)
        above, below = x + step, x - step
        return (phi(above) - phi(below)) / (above - below)

    return Activation(name=name, phi=phi, derivative=derivative)


def gaussian_mean(
    function: Callable[[float], float],
    variance: float,
    *,
    mean: float = 0.0,
    absolute: float = 0.0,
    relative: float = _RELATIVE_ERROR,
) -> float:
    """Return E[f(mean + sqrt(variance) z)] for z ~ N(0, 1), by adaptive quadrature.

    Args:
        function: f, a function of one float that grows slower than exp(x^2).
        variance: Variance of its argument, 0 or more.
        mean: Mean of its argument. Default 0.
        absolute: Absolute error that is good enough, needed where positive and negative parts may cancel. Default 0.
        relative: Relative error that is good enough and asked for. Default 1e-12.

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
        return float(function(mean))

    def integrand(z: float) -> float:
        return float(function(mean + scale * z)) * math.exp(-z * z / 2)

    return _integral(integrand, scale, mean, absolute, relative) / math.sqrt(2 * math.pi)


def root_mean_square(function: Callable[[float], float], variance: float) -> float:
    """Return sqrt(E[f(sqrt(variance) z)^2]) for z ~ N(0, 1): as `gaussian_mean`, where f^2 may overflow and f does not.

    Example:
        >>> import math
        >>> round(math.log(root_mean_square(math.exp, 200.0)), 6)  # E[exp(2x)] = exp(2 * 200)
        200.0
    """
    scale = math.sqrt(variance)
    if scale == 0.0:
        return abs(float(function(0.0)))

    def integrand(z: float) -> float:
        return (float(function(scale * z)) * math.exp(-z * z / 4)) ** 2

    return math.sqrt(_integral(integrand, scale, 0.0, 0.0, _RELATIVE_ERROR) / math.sqrt(2 * math.pi))


def _integral(
    integrand: Callable[[float], float], scale: float, mean: float, absolute: float, relative: float
) -> float:
    """Integrate over z what bends where mean + scale * z is of order 1, and may peak far out where phi grows fast."""
    sizes = [1.0]
    while sizes[-1] * _SHAPE_STEP < scale or len(sizes) < 2:
        sizes.append(sizes[-1] * _SHAPE_STEP)
    inner = [(edge - mean) / scale for size in sizes for edge in (-size, size)]
    breaks = sorted({-_NEAR, -mean / scale, 0.0, _NEAR, *inner})
    try:
        # A user's phi may overflow in a branch it then discards; full_output turns quad's warnings into return values.
        with np.errstate(all="ignore"):
            total, error, *_ = quad(
                integrand,
                -_REACH,
                _REACH,
                points=[place for place in breaks if abs(place) < _REACH],
                limit=400,
                epsabs=absolute + 1e-300,
                epsrel=relative,
                full_output=1,
            )
    except OverflowError:
        return math.inf
    if math.isinf(total):
        return float(total)
    if math.isnan(total) or error > _RELATIVE_ERROR_ALLOWED * abs(total) + absolute + 1e-290:
        raise UsageError(
            f"A Gaussian mean at variance {scale * scale:g} is {total:g} +- {error:g} before it is normalized, but it "
            f"must be a number known to a relative {_RELATIVE_ERROR_ALLOWED:g}; give a smooth activation that is "
            "finite everywhere."
        )
    return float(total)
