"""What mean-field theory speaks of, measured: gains, lengths and correlations, layer by layer, in nets of one width."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gradlab.errors import UsageError, unknown
from gradlab.nets import activation_module, initialize
from gradlab.nets.checks import check_positive
from gradlab.nets.names import ACTIVATIONS, INITIALIZATIONS, two_slopes

__all__ = ["DepthProfile", "TwoSlopes", "depth_profile", "relu_log_norms", "wide_stack"]


class TwoSlopes(nn.Module):
    """x times one slope below 0 and times another above: leaky ReLU without a slope of 1."""

    def __init__(self, below: float, above: float) -> None:
        super().__init__()
        self.below, self.above = below, above

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activations, as x in shape."""
        return torch.where(x > 0, self.above * x, self.below * x)


def wide_stack(
    activation: str,
    init: str,
    *,
    width: int,
    depth: int,
    seed: int,
    bias_var: float = 0.0,
    device: torch.device | str = "cpu",
) -> nn.Sequential:
    """Return `depth` layers W_l h + b_l and an activation each, all of one width, in float64.

    Args:
        activation: A name of `gradlab.nets.names.ACTIVATIONS`, or two slopes such as "0.2:1.5".
        init: A name of `INITIALIZATIONS`, or sigma_w^2 as a number: Gaussian weights of variance sigma_w^2 / width.
        width: Units of each layer, input included.
        depth: Layers.
        seed: Of the weights, drawn on the CPU whatever the device.
        bias_var: sigma_b^2 of Gaussian biases. Default 0: none; torch's default initialization draws its own.
        device: Where the net is to be.

    Raises:
        UsageError: An unknown activation or initialization, or a value out of range.

    Example:
        >>> net = wide_stack("tanh", "1.5", width=8, depth=3, seed=0)
        >>> len(net), net(torch.zeros(1, 8).double()).shape
        (6, torch.Size([1, 8]))
    """
    check_positive(width=width, depth=depth)
    slopes = two_slopes(activation)
    if slopes is None and activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS, "Two slopes are written 0.2:1.5.")
    if not (math.isfinite(bias_var) and bias_var >= 0):
        raise UsageError(f"bias_var is {bias_var}, but it must be finite and at least 0; give Var(b).")
    scheme, gain = _scheme(init)
    layers: list[nn.Module] = []
    for _ in range(depth):
        # Without torch's own draw, which would be overwritten.
        layers.append(nn.utils.skip_init(nn.Linear, width, width, dtype=torch.float64))
        layers.append(activation_module(activation) if slopes is None else TwoSlopes(*slopes))
    net = initialize(nn.Sequential(*layers), scheme, gain=gain, seed=seed)
    if bias_var > 0:
        generator = torch.Generator().manual_seed(~seed % 2**32)
        with torch.no_grad():
            for layer in net:
                if isinstance(layer, nn.Linear):
                    layer.bias.normal_(0, math.sqrt(bias_var), generator=generator)
    return net.to(device)


def _scheme(init: str) -> tuple[str, float]:
    if init in INITIALIZATIONS:
        return init, 1.0
    try:
        weight_var = float(init)
    except ValueError:
        raise unknown("initialization", init, INITIALIZATIONS, "A number stands for sigma_w^2.") from None
    if not (math.isfinite(weight_var) and weight_var > 0):
        raise UsageError(f"The initialization is {init}, but sigma_w^2 must be finite and above 0.")
    return "lecun_normal", math.sqrt(weight_var)


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthProfile:
    """What was measured at the pre-activations z_l of each layer, layer 1 (nearest the input) first; shapes (depth,).

    Args:
        log_grad_norm: ln of each sample's gradient norm at z_l, averaged over samples; -inf where it is 0.
        length: q_l, the mean square of z_l.
        correlation: Of the pre-activations of two inputs: mean product over mean square, over all pairs.
    """

    log_grad_norm: npt.NDArray[np.float64]
    length: npt.NDArray[np.float64]
    correlation: npt.NDArray[np.float64]


def depth_profile(
    net: nn.Sequential,
    *,
    batch_size: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> DepthProfile:
    """Send Gaussian inputs through a stack, and a Gaussian cotangent back from its last pre-activations.

    Args:
        net: As `wide_stack` returns it.
        batch_size: Independent inputs N(0, 1), at least 2.
        seed: Of inputs and cotangent, drawn on the CPU.
        progress: Called with (passes over a layer done, in all).

    Raises:
        UsageError: A batch of fewer than 2.

    Note:
        The norms are scaled by their largest entry before they are squared: a gradient of 1e-200 is one.
    """
    check_positive(batch_size=batch_size)
    if batch_size < 2:
        raise UsageError(f"batch_size is {batch_size}, but correlations need two inputs; give 2 or more.")
    linears = [layer for layer in net if isinstance(layer, nn.Linear)]
    activations = [layer for layer in net if not isinstance(layer, nn.Linear)]
    weight = linears[0].weight
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, weight.shape[1])
    h = torch.randn(shape, generator=generator, dtype=torch.float64).to(weight)
    cotangent = torch.randn((batch_size, weight.shape[0]), generator=generator, dtype=torch.float64).to(weight)
    total, kept = 2 * len(linears), []
    for place, (linear, activation) in enumerate(zip(linears, activations, strict=True)):
        progress(place, total)
        z = linear(h).detach().requires_grad_(True)
        h = activation(z)
        kept.append((z, h))
        h = h.detach()
    grad, log_norms = cotangent, []
    rest = torch.zeros(batch_size, dtype=torch.float64).to(weight)
    for place in reversed(range(len(linears))):
        progress(total - 1 - place, total)
        z, h = kept[place]
        if place < len(linears) - 1:
            (grad,) = torch.autograd.grad(h, z, grad @ linears[place + 1].weight)
        # Kept near 1 and its size put aside: through 400 layers of sigmoid it falls below the smallest float64.
        largest = grad.abs().amax(1)
        scale = torch.where(largest > 0, largest, 1.0)
        grad = grad / scale[:, None]
        rest = rest + scale.log()
        log_norms.append((rest + grad.norm(dim=1).log()).mean())
    lengths = torch.stack([z.detach().square().mean() for z, _ in kept])
    correlations = torch.stack([_correlation(z.detach()) for z, _ in kept])
    return DepthProfile(
        log_grad_norm=_host(torch.stack(log_norms[::-1])), length=_host(lengths), correlation=_host(correlations)
    )


def _correlation(z: torch.Tensor) -> torch.Tensor:
    """Return the mean product of different rows over the mean square of a row."""
    size = z.abs().max()
    z = z / torch.where(size > 0, size, 1.0)
    squares = z.square().sum()
    products = z.sum(0).square().sum() - squares
    return products / (len(z) - 1) / squares


def _host(values: torch.Tensor) -> npt.NDArray[np.float64]:
    if values.is_meta:
        return np.full(values.shape, np.nan)
    out: npt.NDArray[np.float64] = values.detach().double().cpu().numpy()
    return out


def relu_log_norms(
    *,
    width: int,
    depth: int,
    nets: int,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> npt.NDArray[np.float64]:
    """Return ln ||J u||^2 of many ReLU nets at He's initialization, J the Jacobian, u a unit vector.

    Args:
        width: Units of each layer, input included.
        depth: Layers W and ReLU.
        nets: Independent nets, each with a Gaussian input of its own.
        seed: Of everything, drawn on the CPU.
        device: Where to compute.
        progress: Called with (layers done, in all).

    Returns:
        Shape (nets,); -inf for a net with a dead layer. Its law: `gradlab.analysis.finite_width_log_norm`.

    Raises:
        UsageError: A value below 1.
    """
    check_positive(width=width, depth=depth, nets=nets)
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    pair = gaussian(nets, width, 2)  # the input, and u beside it: one product moves both
    u = pair[:, :, 1]
    pair[:, :, 1] = u / u.norm(dim=1, keepdim=True)
    total = torch.zeros(nets, dtype=torch.float64, device=device)
    for layer in range(depth):
        progress(layer, depth)
        z = torch.bmm(gaussian(nets, width, width), pair) * math.sqrt(2 / width)
        pair = z * (z[:, :, :1] > 0)
        # Both columns are brought back to length 1: positive scales do not change which units are on.
        norms = pair.norm(dim=1, keepdim=True)
        total = total + 2 * norms[:, 0, 1].log()
        pair = pair / torch.where(norms > 0, norms, 1.0)
    return _host(total)
