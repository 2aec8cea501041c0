"""Glorot and Bengio's measurements on untrained tanh nets: values, gradients and singular values, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gradlab.errors import unknown
from gradlab.measure.jacobian import jacobian_spectrum
from gradlab.nets import MLP, initialize

__all__ = ["SCHEMES", "LayerHistograms", "layer_histograms", "layer_singular_values"]

SCHEMES = {"standard": "default", "normalized": "glorot_uniform"}
"""Glorot and Bengio's names -> ours: U(+-1/sqrt(fan_in)) and U(+-sqrt(6/(fan_in + fan_out))), biases 0 in both."""


def _net(scheme: str, *, width: int, depth: int, in_features: int, seed: int) -> MLP:
    if scheme not in SCHEMES:
        raise unknown("scheme", scheme, SCHEMES)
    net = MLP(depth, width=width, in_features=in_features, classes=10, activation="tanh").double()
    initialize(net, SCHEMES[scheme], seed=seed)
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.Linear):
                layer.bias.zero_()  # torch's default draws them, the paper has none
    return net


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerHistograms:
    """Densities over units and samples, layer 1 (nearest the input) first.

    Args:
        activation_edges: Edges of the bins of activations, shape (bins + 1,).
        activations: Densities, shape (depth, bins).
        activation_std: Shape (depth,).
        gradient_edges: Edges of the bins of gradients, in units of the last layer's standard deviation.
        gradients: Densities, shape (depth, bins); what lies beyond the edges is left out of them.
        gradient_std: Standard deviations relative to the last layer's, shape (depth,).
    """

    activation_edges: npt.NDArray[np.float64]
    activations: npt.NDArray[np.float64]
    activation_std: npt.NDArray[np.float64]
    gradient_edges: npt.NDArray[np.float64]
    gradients: npt.NDArray[np.float64]
    gradient_std: npt.NDArray[np.float64]


def layer_histograms(
    scheme: str, x: torch.Tensor, labels: torch.Tensor, *, width: int, depth: int, seed: int, bins: int = 81
) -> LayerHistograms:
    """Return how activations and back-propagated gradients are distributed in each layer of an untrained tanh net.

    Gradients are those of the cross-entropy with respect to the activations, of all units and samples.

    Args:
        scheme: "standard" or "normalized", see `SCHEMES`.
        x: Inputs, (N, ...).
        labels: Classes from 0 to 9, (N,).
        width: Units of each hidden layer.
        depth: Hidden layers.
        seed: Of the weights.
        bins: Of both histograms.

    Raises:
        UsageError: An unknown scheme, or a count below 1.

    Source:
        Glorot & Bengio 2010, Fig. 6 and 7.
    """
    net = _net(scheme, width=width, depth=depth, in_features=x[0].numel(), seed=seed)
    h, kept = x.double().flatten(1), []
    for layer in (net.stem, *net.blocks):
        h = layer(h)
        h.retain_grad()
        kept.append(h)
    nn.functional.cross_entropy(net.head(h), labels).backward()
    values = [h.detach().flatten().numpy() for h in kept]
    grads = [h.grad.flatten().numpy() for h in kept if h.grad is not None]
    last = grads[-1].std()
    value_edges, grad_edges = np.linspace(-1, 1, bins + 1), np.linspace(-4, 4, bins + 1)
    return LayerHistograms(
        activation_edges=value_edges,
        activations=np.array([_density(each, value_edges) for each in values]),
        activation_std=np.array([each.std() for each in values]),
        gradient_edges=grad_edges,
        gradients=np.array([_density(each / last, grad_edges) for each in grads]),
        gradient_std=np.array([each.std() / last for each in grads]),
    )


def _density(values: npt.NDArray[np.float64], edges: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    counts, _ = np.histogram(values, bins=edges)
    density: npt.NDArray[np.float64] = counts / (len(values) * np.diff(edges))
    return density


def layer_singular_values(scheme: str, *, width: int, depth: int, seed: int) -> npt.NDArray[np.float64]:
    """Return the mean singular value of each layer's Jacobian d h_l / d h_{l-1} in an untrained tanh net.

    Args:
        scheme: "standard" or "normalized", see `SCHEMES`.
        width: Units of each layer, input included.
        depth: Layers.
        seed: Of weights and of the Gaussian input of variance 1.

    Returns:
        Shape (depth,), layer 1 first: lower than the others, since its input is larger than theirs.

    Note:
        A linear layer's would be that of the quarter circle, 8 / (3 pi) sigma_w = .849 (normalized) and .490.

    Source:
        Glorot & Bengio 2010, section 4.2.1: "around 0.8" normalized and "0.5" standard.
    """
    net = _net(scheme, width=width, depth=depth, in_features=width, seed=seed)
    h = torch.randn(1, width, generator=torch.Generator().manual_seed(~seed % 2**32), dtype=torch.float64)
    means = []
    for layer in (net.stem, *net.blocks):
        means.append(float(jacobian_spectrum(layer, h).mean()))
        with torch.no_grad():
            h = layer(h)
    return np.array(means)
