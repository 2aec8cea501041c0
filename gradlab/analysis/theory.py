"""What theory says: gradient gains of wide random nets, and two closed forms for convolutional ones.

Throughout, `weight_var` is sigma_w^2 = fan_in * Var(W) and `bias_var` is sigma_b^2 = Var(b), for one layer
z_{l+1} = W phi(z_l) + b; `q` is the length, the mean square of the pre-activations z.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import TYPE_CHECKING

from scipy.optimize import brentq

from gradlab.analysis.activations import named, root_mean_square
from gradlab.errors import UsageError

if TYPE_CHECKING:
    from gradlab.analysis.activations import Activation, ActivationLike

__all__ = [
    "fixed_point",
    "gain_profile",
    "gradient_gain",
    "length_map",
    "valid_tap_fraction",
    "vgg_b_he_ratio",
]

_SHORTEST, _LONGEST, _STRIDE = 1e-8, 1e14, 1.5
_VANISHING = 1e-30
_MARGINAL = 1e-11  # relative change of the length below which it is rounding, not movement

# Output channels and kernel of the layers between conv1 and conv10 of VGG-B, conv2 first (Simonyan & Zisserman 2015).
_VGG_B_CONV2_TO_CONV10 = (64, 128, 128, 256, 256, 512, 512, 512, 512)
_VGG_KERNEL = 3


def _check_variances(weight_var: float, bias_var: float) -> None:
    if not (math.isfinite(weight_var) and weight_var > 0):
        raise UsageError(f"weight_var is {weight_var}, but it must be finite and above 0; give fan_in * Var(W).")
    if not (math.isfinite(bias_var) and bias_var >= 0):
        raise UsageError(f"bias_var is {bias_var}, but it must be finite and at least 0; give Var(b).")


def _check_whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise UsageError(f"{name} is {value!r}, but it must be a whole number of at least {least}; give one.")


def _check_length(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise UsageError(f"{name} is {value}, but a length must be finite and at least 0; give a mean square.")


def length_map(activation: ActivationLike, q: float, weight_var: float, bias_var: float = 0.0) -> float:
    """Return the length of the next layer, q' = sigma_w^2 E[phi(sqrt(q) z)^2] + sigma_b^2.

    Args:
        activation: A name of `ACTIVATIONS`, an `Activation`, or a function of one float.
        q: Length (mean square of the pre-activations) of this layer, at least 0.
        weight_var: sigma_w^2 = fan_in * Var(W).
        bias_var: sigma_b^2. Default 0, as in He's and Glorot's initializations.

    Returns:
        The next length; inf where phi overflows.

    Raises:
        UsageError: An unknown activation, or a value out of range.

    Example:
        >>> length_map("relu", 3.0, weight_var=2.0)
        3.0

    Source:
        Poole et al. 2016 (arXiv 1606.05340), section 2.
    """
    phi = named(activation)
    _check_variances(weight_var, bias_var)
    _check_length("q", q)
    return _next_length(phi, q, weight_var, bias_var)


def _next_length(phi: Activation, q: float, weight_var: float, bias_var: float) -> float:
    if phi.second_moment is not None:
        return weight_var * phi.second_moment * q + bias_var
    return weight_var * root_mean_square(phi.phi, q) ** 2 + bias_var


def _gain_at(phi: Activation, q: float, weight_var: float) -> float:
    if phi.second_moment is not None:
        return math.sqrt(weight_var * phi.second_moment)
    # At length 0 a kink at 0 still sees both its sides, so the limit is taken and not phi'(0).
    return math.sqrt(weight_var) * root_mean_square(phi.derivative, max(q, _VANISHING))


def fixed_point(activation: ActivationLike, weight_var: float, bias_var: float = 0.0, *, start: float = 1.0) -> float:
    """Return the length q* at which the length map, begun at `start`, comes to rest.

    Args:
        activation: A name of `ACTIVATIONS`, an `Activation`, or a function of one float.
        weight_var: sigma_w^2 = fan_in * Var(W).
        bias_var: sigma_b^2. Default 0.
        start: Length of the first layer. Default 1, that of a normalized input.

    Returns:
        q*; inf where the length diverges; `start` itself where every length is kept (relu at sigma_w^2 = 2).

    Raises:
        UsageError: An unknown activation, or a value out of range.

    Note:
        Found by bracketing, not by iterating, for at criticality the iteration never arrives: tanh at sigma_w^2 = 1 has
        q_l ~ 1/(2l) and q* = 0. Right for length maps that increase in q, as those of the usual activations do; of two
        fixed points closer than a factor 1.5 one may be missed, lengths below 1e-8 without bias count as 0 and those
        beyond 1e14 as inf.

    Example:
        >>> fixed_point("tanh", 1.0), fixed_point("relu", 4.0), round(fixed_point("relu", 1.0, 0.5), 6)
        (0.0, inf, 1.0)

    Source:
        Poole et al. 2016 (arXiv 1606.05340), section 2.
    """
    phi = named(activation)
    _check_variances(weight_var, bias_var)
    _check_length("start", start)
    if phi.second_moment is not None:
        return _homogeneous_fixed_point(weight_var * phi.second_moment, bias_var, start)

    def growth(q: float) -> float:
        return _next_length(phi, q, weight_var, bias_var) - q

    first = growth(start)
    if abs(first) <= _MARGINAL * start:
        return start
    if first > 0:
        low, high = start, max(start, _SHORTEST) * _STRIDE
        while growth(high) > 0:
            low, high = high, high * _STRIDE
            if high > _LONGEST:
                return math.inf
    else:
        low, high = start / _STRIDE, start
        while growth(low) < 0:
            low, high = low / _STRIDE, low
            if low < _SHORTEST:
                low = 0.0
                if growth(low) <= 0:
                    return 0.0
    return float(brentq(growth, low, high, xtol=1e-18, rtol=1e-13))


def _homogeneous_fixed_point(factor: float, bias_var: float, start: float) -> float:
    if start == 0.0 and bias_var == 0.0:
        return 0.0
    if abs(factor - 1.0) <= _MARGINAL:
        return start if bias_var == 0.0 else math.inf
    return bias_var / (1.0 - factor) if factor < 1.0 else math.inf


def gradient_gain(activation: ActivationLike, weight_var: float, bias_var: float = 0.0) -> float:
    """Return the factor by which the gradient norm changes per layer, going backward through a deep wide net.

    gain = sqrt(chi_1), chi_1 = sigma_w^2 E[phi'(sqrt(q*) z)^2], z ~ N(0, 1), at the fixed point q* of the length map.
    Below 1 gradients vanish exponentially, above 1 they explode, at 1 they change as a power of depth.

    Args:
        activation: A name of `ACTIVATIONS`, an `Activation`, or a function of one float.
        weight_var: sigma_w^2 = fan_in * Var(W): 2 for He, 1 for LeCun, 1/3 for `torch.nn.Linear`'s default.
        bias_var: sigma_b^2. Default 0.

    Returns:
        The gain of the norm (not of its square).

    Raises:
        UsageError: An unknown activation, or a value out of range.

    Note:
        Holds for infinite width and depth. For relu, leaky_relu and linear it depends on no length, so it is defined
        where the length diverges too; for others it is then taken at a length of 1e14, where phi' has reached its
        limits. tanh at weight_var 1 has q* = 0 and gain 1: it is critical, its gradient falls as a power of depth, and
        at finite depth the gain is still on its way (`gain_profile`; its log fitted over layers 10 to 40 gives .9773).

    Example:
        >>> round(gradient_gain("relu", 1 / 3), 4), round(gradient_gain("tanh", 2.0), 4)
        (0.4082, 1.0514)

    Source:
        Poole et al. 2016 (arXiv 1606.05340); Schoenholz et al. 2017 (arXiv 1611.01232), section 4.
    """
    phi = named(activation)
    q = fixed_point(phi, weight_var, bias_var)
    return _gain_at(phi, min(q, _LONGEST), weight_var)


def gain_profile(
    activation: ActivationLike, weight_var: float, bias_var: float = 0.0, *, depth: int, start: float = 1.0
) -> tuple[float, ...]:
    """Return the gain of the gradient norm at each layer, before the length has reached its fixed point.

    Entry l - 1 is sqrt(sigma_w^2 E[phi'(sqrt(q_l) z)^2]), the expected norm ratio g_l / g_{l+1} of the gradients with
    respect to the pre-activations of layers l and l + 1.

    Args:
        activation: A name of `ACTIVATIONS`, an `Activation`, or a function of one float.
        weight_var: sigma_w^2 = fan_in * Var(W).
        bias_var: sigma_b^2. Default 0.
        depth: Number of layers, at least 1.
        start: q_1, the length of the first layer's pre-activations. Default 1; inputs of mean square 1 make it
            sigma_w^2 + sigma_b^2.

    Raises:
        UsageError: An unknown activation, or a value out of range.

    Example:
        >>> gain_profile("linear", 4.0, depth=3)
        (2.0, 2.0, 2.0)

    Source:
        Schoenholz et al. 2017 (arXiv 1611.01232), section 4.
    """
    phi = named(activation)
    _check_variances(weight_var, bias_var)
    _check_length("start", start)
    _check_whole("depth", depth, 1)
    gains, q = [], start
    for _ in range(depth):
        gains.append(_gain_at(phi, q, weight_var))
        q = min(_next_length(phi, q, weight_var, bias_var), _LONGEST)
    return tuple(gains)


def vgg_b_he_ratio(std: float = 0.01) -> float:
    """Return how much larger He's initialization makes the gradient that VGG-B passes from conv10 to conv2.

    The product over conv2 .. conv10 of sqrt(2 / (k^2 c)) / std, with k = 3 and c the *output* channels of the layer:
    the fan-out, since it is the gradient that passes. A positively homogeneous net makes it exact, not only expected.

    Args:
        std: Standard deviation of the weights compared with He's. Default .01, that of the source.

    Returns:
        16728.76 at the default; the paper's rounded factors 5.9 * 4.2^2 * 2.9^2 * 2.1^4 give 17,023.

    Raises:
        UsageError: `std` is not above 0.

    Example:
        >>> round(vgg_b_he_ratio(), 2)
        16728.76

    Source:
        He et al. 2015b (arXiv 1502.01852), section 2.2; VGG-B: Simonyan & Zisserman 2015 (arXiv 1409.1556), table 1.
    """
    if not (math.isfinite(std) and std > 0):
        raise UsageError(f"std is {std}, but it must be finite and above 0; give a standard deviation such as 0.01.")
    return math.prod(math.sqrt(2 / (_VGG_KERNEL**2 * channels)) / std for channels in _VGG_B_CONV2_TO_CONV10)


def valid_tap_fraction(size: int, kernel: int = 3) -> float:
    """Return the share of a 2-D convolution's taps that fall inside the image, averaged over positions.

    ((3 - 2 / size) / 3)^2 for kernel 3. Zero padding removes the other taps, and their part of the squared norm.

    Args:
        size: Height and width of the image, in pixels.
        kernel: Height and width of the kernel, odd; the padding is (kernel - 1) / 2, which keeps the size. Default 3.

    Raises:
        UsageError: A value is not a whole number of at least 1, or `kernel` is even.

    Note:
        Stride and dilation 1. Circular padding removes no taps.

    Example:
        >>> round(valid_tap_fraction(4), 3)
        0.694
    """
    _check_whole("size", size, 1)
    _check_whole("kernel", kernel, 1)
    if kernel % 2 == 0:
        raise UsageError(f"kernel is {kernel}, but padding that keeps the size needs an odd one; give 1, 3, 5 or so.")
    half = kernel // 2
    taps = sum(min(size - 1, position + half) - max(0, position - half) + 1 for position in range(size))
    return (taps / (size * kernel)) ** 2
