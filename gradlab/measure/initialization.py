"""How the gradient travels through a net at initialization."""

from __future__ import annotations

import torch
from torch import nn

from gradlab.errors import UsageError
from gradlab.nets import initialize
from gradlab.probes import LayerSelection, watch
from gradlab.trace import Trace

__all__ = ["gradient_profile", "vgg_b_gradient"]


def gradient_profile(model: nn.Module, x: torch.Tensor, *, seed: int, layers: LayerSelection = None) -> Trace:
    """Record one forward and backward pass of an untrained net, the gradient entering at its last feature tensor.

    The loss is the inner product of the features with fixed Gaussian noise, not a cross-entropy: that would add the
    softmax's saturation and the batch's size to what is measured. The net is in training mode, so BatchNorm uses the
    batch; in evaluation mode an untrained one does nothing.

    Args:
        model: Has a method `features`; float64 keeps vanishing gradients exact.
        x: Its input, shape as the model takes it.
        seed: Of the noise.
        layers: Which layers are recorded; see `watch`.

    Returns:
        A trace of one step. Ratios of its grad_norm mean something, absolute values do not.
    """
    features = getattr(model, "features", None)
    if not callable(features):
        raise UsageError(f"gradient_profile needs a model with a method 'features'; {type(model).__name__} has none.")
    generator = torch.Generator().manual_seed(seed)
    model.train()
    with watch(model, layers=layers) as probe:
        y = features(x)
        noise = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
        (y * noise).sum().backward()
        probe.step()
    return probe.trace


def vgg_b_gradient(*, seed: int = 0, std: float = 0.01, size: int = 32) -> float:
    """Measure how much smaller the gradient gets from conv10 to conv2 of VGG-B at a fixed std than at He's.

    The same Gaussian draws scaled in two ways: a ReLU net without biases is positively homogeneous, so the quotient
    of the two gradients is exact up to rounding, whatever the draw.

    Args:
        seed: Of the draws.
        std: The fixed standard deviation of the weights; 0.01 as in the paper.
        size: Side of the square input in pixels; a multiple of 16.

    Returns:
        The quotient of (gradient at conv2's input over gradient at conv10's output) of the two nets.

    Source:
        He et al. 2015b, arXiv 1502.01852, sec. 2.2: "1/1.7e4".
    """
    widths = (64, 64, 128, 128, 256, 256, 512, 512, 512, 512)
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(1, 3, size, size, generator=generator, dtype=torch.float64)
    draws = [
        torch.randn(out, inner, 3, 3, generator=generator, dtype=torch.float64)
        for inner, out in zip((3, *widths), widths, strict=False)
    ]

    def backward_ratio(fixed: float | None) -> torch.Tensor:
        h = image
        second: torch.Tensor | None = None
        for index, draw in enumerate(draws):
            # He's variance for the backward pass uses fan-out: 2 / (k^2 d).
            scale = fixed if fixed is not None else (2 / (9 * draw.shape[0])) ** 0.5
            if index == 1:
                second = h = h.detach().requires_grad_(True)
            z = nn.functional.conv2d(h, draw * scale, padding=1)
            h = z.relu()
            if index % 2 == 1 and index < len(draws) - 1:
                h = nn.functional.max_pool2d(h, 2)
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert second is not None
        (gradient,) = torch.autograd.grad((z * noise).sum(), second)
        norm: torch.Tensor = gradient.norm()
        return norm

    return float(backward_ratio(None) / backward_ratio(std))


def initialized(model: nn.Module, scheme: str, *, seed: int) -> nn.Module:
    """Return the model in float64 with weights of a scheme."""
    return initialize(model.double(), scheme, seed=seed)
