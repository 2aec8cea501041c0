"""What BatchNorm does to untrained nets: explosion with depth, downscaled branches, shattered gradients."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gradlab.measure.initialization import gradient_profile, initialized
from gradlab.nets import MLP, activation_module

__all__ = ["batchnorm_explosion", "residual_branch_share", "residual_growth", "shattering"]


def batchnorm_explosion(
    *, width: int, batch_size: int, depth: int, seed: int, activation: str = "relu", norm: str = "batch"
) -> npt.NDArray[np.float64]:
    """Return ln of the gradient norm at each normalized tensor of a plain BatchNorm MLP.

    At the normalized tensor the scale of the weights drops out: BN(aWx) = BN(Wx). Without normalization it is taken
    before the activation all the same, with He's initialization.

    Args:
        width: Units a layer.
        batch_size: Samples; the rate depends weakly on it.
        depth: Hidden layers.
        seed: Of weights, input and cotangent.
        activation: By torch's name.
        norm: "batch", or "none" to compare with.

    Returns:
        Shape (depth,), layer 1 (nearest the input) first. It falls with the layer: the gradient explodes backward.

    Source:
        Yang et al. 2019, arXiv 1902.08129.
    """
    net = MLP(depth, width=width, in_features=width, classes=1, activation=activation, norm=norm, bias=False)
    # Three streams a seed: with seed + 1 and seed + 2 neighbouring seeds would share draws.
    initialized(net, "he_normal", seed=3 * seed)
    generator = torch.Generator().manual_seed(3 * seed + 1)
    x = torch.randn(batch_size, width, generator=generator, dtype=torch.float64)
    kind = nn.BatchNorm1d if norm == "batch" else nn.Linear
    trace = gradient_profile(
        net, x, seed=3 * seed + 2, layers=lambda name, module: isinstance(module, kind) and name != "head"
    )
    log_norms: npt.NDArray[np.float64] = np.log(trace.layers.sort_values("order")["grad_norm"].to_numpy())
    return log_norms


def residual_branch_share(*, width: int, batch_size: int, blocks: int, seed: int) -> npt.NDArray[np.float64]:
    """Return the branch's share of each block's output variance in a pre-activation residual net with BatchNorm.

    Blocks are h + W relu(BN(h)), He weights, Gaussian input. The variance is over the batch, averaged over units.

    Returns:
        Shape (blocks,), block 1 first; theory 1 / (block + 1).

    Source:
        De & Smith 2020, arXiv 2002.10444.
    """
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    h = gaussian(batch_size, width)
    shares = []
    for _ in range(blocks):
        normalized = nn.functional.batch_norm(h, None, None, training=True)
        branch = normalized.relu() @ (gaussian(width, width) * (2 / width) ** 0.5)
        h = h + branch
        shares.append(float(branch.var(0, correction=0).mean() / h.var(0, correction=0).mean()))
    return np.array(shares)


def residual_growth(
    *, width: int, batch_size: int, blocks: int, seed: int, normalized: bool, branch_scale: float = 1.0
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return how signal and gradient grow through a pre-activation residual net at initialization.

    Blocks are h + alpha W relu(N(h)), N BatchNorm or nothing, He weights; Gaussian input of variance 1, Gaussian
    cotangent at the output.

    Args:
        width: Units.
        batch_size: Samples.
        blocks: Blocks.
        seed: Of input, weights and cotangent.
        normalized: Whether N is BatchNorm.
        branch_scale: alpha. Default 1.

    Returns:
        Two arrays of shape (blocks + 1,), from the input to the last block's output: the mean square of the signal
        relative to the input's (its variance over draws of the weights), and the mean square of the gradient relative
        to the output's.

    Source:
        De & Smith 2020, arXiv 2002.10444, sections 2 and 3.
    """
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    h = gaussian(batch_size, width).requires_grad_(True)
    states = [h]
    for _ in range(blocks):
        inner = nn.functional.batch_norm(h, None, None, training=True) if normalized else h
        h = h + branch_scale * (inner.relu() @ (gaussian(width, width) * (2 / width) ** 0.5))
        states.append(h)
    gradients = torch.autograd.grad((h * gaussian(batch_size, width)).sum(), states)

    def mean_squares(tensors: list[torch.Tensor] | tuple[torch.Tensor, ...]) -> npt.NDArray[np.float64]:
        out: npt.NDArray[np.float64] = torch.stack([t.detach().square().mean() for t in tensors]).numpy()
        return out

    signal, gradient = mean_squares(states), mean_squares(gradients)
    return signal / signal[0], gradient / gradient[-1]


def shattering(
    *, depth: int, seed: int, residual: bool, beta: float = 1.0, width: int = 200, points: int = 256, lags: int = 16
) -> npt.NDArray[np.float64]:
    """Return the autocorrelation of a net's input gradient along a line: how white it has become.

    A scalar input runs over [-2, 2] and enters as relu(w x); `depth` layers follow, BatchNorm over the points. Plain:
    h = relu(BN(W h)). Residual: h = h + beta W relu(BN(h)). The first layer matters for the residual net: entered as
    w x + b instead, its autocorrelation at lag 1 is about 0.1 lower at depth 50 and beta 0.1.

    Args:
        depth: Layers.
        seed: Of the weights.
        residual: Which of the two nets.
        beta: Scale of the residual branch; the result depends on it, so it is part of any claim.
        width: Units a layer.
        points: Points on the line.
        lags: Autocorrelation is returned for lags 0 to `lags`.

    Returns:
        Shape (lags + 1,); 1 at lag 0.

    Source:
        Balduzzi et al. 2017, arXiv 1702.08591.
    """
    generator = torch.Generator().manual_seed(seed)

    def gaussian(rows: int, columns: int, variance: float) -> torch.Tensor:
        scale: float = variance**0.5
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64) * scale

    def batch_norm(z: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(z, None, None, training=True)

    relu = activation_module("relu")
    x = torch.linspace(-2, 2, points, dtype=torch.float64)[:, None].requires_grad_(True)
    h = relu(x @ gaussian(1, width, 1.0))
    for _ in range(depth):
        weight = gaussian(width, width, 2 / width)
        h = h + beta * relu(batch_norm(h)) @ weight if residual else relu(batch_norm(h @ weight))
    (gradient,) = torch.autograd.grad((h @ gaussian(width, 1, 1 / width)).sum(), x)
    g = gradient[:, 0] - gradient.mean()
    acf = torch.stack([(g[: points - lag] * g[lag:]).sum() for lag in range(lags + 1)]) / (g * g).sum()
    out: npt.NDArray[np.float64] = acf.numpy()
    return out
