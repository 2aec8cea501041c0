"""Weight initialisations by name, with their variances in closed form."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from gradlab.errors import UsageError
from gradlab.nets.checks import check_member, check_positive
from gradlab.nets.names import INITIALIZATIONS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["INITIALIZATIONS", "empty_on_cpu", "initialize", "weight_variance"]

Model = TypeVar("Model", bound=nn.Module)

_WEIGHT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_UNIFORM = ("default", "glorot_uniform")


@torch.no_grad()
def initialize(model: Model, scheme: str, *, gain: float = 1.0, seed: int | None = None) -> Model:
    """Draw the weights of every linear and convolution layer anew, in place.

    W = gain * w with w drawn as in `weight_variance`: normal for "lecun_normal", "glorot_normal" and "he_normal",
    uniform for "glorot_uniform" and "default" (torch's own reset), and gain * Q with Q semi-orthogonal over
    (out, in * kernel) for "orthogonal". Biases become 0, except under "default", which draws torch's uniform
    +-1/sqrt(fan_in), whatever the gain.

    Args:
        model: Any module. Only `nn.Linear` and `nn.Conv1d/2d/3d` are touched: normalisation layers, SkipInit scalars,
            transposed convolutions and recurrent layers stay as they are.
        scheme: One of `INITIALIZATIONS`.
        gain: Factor on the standard deviation of the weights, above 0. 1 is each paper's own value.
        seed: Seed of a generator of its own, which leaves torch's global random state untouched; None draws from the
            global generator.

    Returns:
        The same model.

    Raises:
        UsageError: Unknown scheme, or a gain that is not finite and above 0.

    Note:
        Drawn on the CPU, in the weight's dtype (float32 for 16-bit weights), and copied: one seed gives the same
        weights on every device. Weights on the meta device have no values and are passed over.

    Example:
        >>> layer = initialize(nn.Linear(3, 3, bias=False).double(), "orthogonal", gain=2.0, seed=0)
        >>> torch.allclose(layer.weight @ layer.weight.T, 4 * torch.eye(3, dtype=torch.float64))
        True

    Source:
        LeCun et al. 1998, Efficient BackProp, sec. 4.6; Glorot & Bengio 2010, eq. 12 and 16; He et al. 2015,
        Delving Deep into Rectifiers, sec. 2.2; Saxe et al. 2014 (arXiv 1312.6120); `torch.nn.Linear.reset_parameters`.
    """
    check_member("initialization", scheme, INITIALIZATIONS)
    _check_gain(gain)
    generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, _WEIGHT_LAYERS) and not layer.weight.is_meta:
            layer.weight.copy_(_draw_weight(layer.weight, scheme, gain, generator))
            if layer.bias is not None:
                layer.bias.copy_(_draw_bias(layer.bias, layer.weight, scheme, generator))
    return model


def weight_variance(scheme: str, fan_in: int, fan_out: int, gain: float = 1.0, *, kernel: int = 1) -> float:
    """Return the variance of one weight under a scheme.

    default gain^2/(3 fan_in); lecun_normal gain^2/fan_in; glorot_normal and glorot_uniform 2 gain^2/(fan_in + fan_out);
    he_normal 2 gain^2/fan_in; orthogonal gain^2/max(fan_out/kernel, fan_in), the mean square of a semi-orthogonal
    matrix of fan_out/kernel rows and fan_in columns.

    Args:
        scheme: One of `INITIALIZATIONS`.
        fan_in: Inputs of one unit: features, or input channels (of one group) times kernel entries.
        fan_out: Units one input reaches: features, or output channels times kernel entries.
        gain: Factor on the standard deviation, as in `initialize`.
        kernel: Entries of a convolution kernel (9 for 3x3), 1 for a linear layer; only "orthogonal" needs it.

    Returns:
        The variance; the mean is 0 in every scheme.

    Raises:
        UsageError: Unknown scheme, a fan or kernel below 1, or a gain that is not finite and above 0.

    Example:
        >>> weight_variance("he_normal", fan_in=100, fan_out=50)
        0.02

    Source:
        As `initialize`.
    """
    check_member("initialization", scheme, INITIALIZATIONS)
    check_positive(fan_in=fan_in, fan_out=fan_out, kernel=kernel)
    _check_gain(gain)
    unit = {
        "default": 1 / (3 * fan_in),
        "lecun_normal": 1 / fan_in,
        "glorot_normal": 2 / (fan_in + fan_out),
        "glorot_uniform": 2 / (fan_in + fan_out),
        "he_normal": 2 / fan_in,
        "orthogonal": 1 / max(fan_out / kernel, fan_in),
    }
    return gain**2 * unit[scheme]


def _check_gain(gain: float) -> None:
    if not (math.isfinite(gain) and gain > 0):
        raise UsageError(f"The gain is {gain!r}, but must be a finite number above 0.")


def _draw_weight(weight: Tensor, scheme: str, gain: float, generator: torch.Generator | None) -> Tensor:
    draw = empty_on_cpu(weight)
    if scheme == "orthogonal":
        return nn.init.orthogonal_(draw, gain=gain, generator=generator)
    kernel = math.prod(weight.shape[2:])
    fan_out, fan_in = weight.shape[0] * kernel, weight.shape[1] * kernel
    std = math.sqrt(weight_variance(scheme, fan_in, fan_out, gain, kernel=kernel))
    if scheme in _UNIFORM:
        bound = math.sqrt(3) * std  # a uniform on +-b has variance b^2/3
        return draw.uniform_(-bound, bound, generator=generator)
    return draw.normal_(0, std, generator=generator)


def _draw_bias(bias: Tensor, weight: Tensor, scheme: str, generator: torch.Generator | None) -> Tensor:
    if scheme != "default":
        return torch.zeros_like(bias)
    bound = 1 / math.sqrt(weight[0].numel())
    return empty_on_cpu(bias).uniform_(-bound, bound, generator=generator)


def empty_on_cpu(like: Tensor) -> Tensor:
    """Return a tensor to draw weights into: as `like` in shape, on the CPU, in float32 for 16-bit weights."""
    # The orthogonal draw needs a QR decomposition, which torch has for no 16-bit dtype.
    dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
    return torch.empty(like.shape, dtype=dtype, device="cpu")
