"""Glorot and Bengio's layers against the quarter circle, plain autograd and numpy's histograms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from gradlab.errors import UsageError
from gradlab.measure.glorot import SCHEMES, _net, layer_histograms, layer_singular_values


@pytest.mark.parametrize(("scheme", "sigma"), [("normalized", 1.0), ("standard", 1 / math.sqrt(3))])
def test_a_linear_layer_has_the_mean_of_the_quarter_circle(scheme, sigma):
    net = _net(scheme, width=300, depth=1, in_features=300, seed=0)
    values = np.linalg.svd(net.stem.linear.weight.detach().numpy(), compute_uv=False)
    assert values.mean() == pytest.approx(8 / (3 * math.pi) * sigma, rel=0.01)
    assert not net.stem.linear.bias.any()


def test_mean_singular_values_are_those_of_slope_times_weight():
    found = layer_singular_values("normalized", width=40, depth=3, seed=2)
    net = _net("normalized", width=40, depth=3, in_features=40, seed=2)
    h = torch.randn(1, 40, generator=torch.Generator().manual_seed(~2 % 2**32), dtype=torch.float64)
    expected = []
    for layer in (net.stem, *net.blocks):
        linear = next(module for module in layer.modules() if isinstance(module, nn.Linear))
        with torch.no_grad():
            h = torch.tanh(h @ linear.weight.T)
            jacobian = (1 - h[0] ** 2)[:, None] * linear.weight
        expected.append(np.linalg.svd(jacobian.numpy(), compute_uv=False).mean())
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_histograms_are_numpys_of_plain_autograd():
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(20, 1, 4, 4, generator=generator), torch.arange(20) % 10
    found = layer_histograms("standard", x, labels, width=15, depth=3, seed=4, bins=21)
    net = _net("standard", width=15, depth=3, in_features=16, seed=4)
    h = torch.tanh(net.stem.linear(x.double().flatten(1)))
    h.retain_grad()
    nn.functional.cross_entropy(net.head(net.blocks(h)), labels).backward()
    values = h.detach().numpy().ravel()
    density, _ = np.histogram(values, bins=found.activation_edges, density=True)
    np.testing.assert_allclose(found.activations[0], density, rtol=1e-10)
    assert found.activation_std[0] == pytest.approx(values.std())
    assert found.gradient_std[-1] == pytest.approx(1.0)
    last = found.gradients[-1] * np.diff(found.gradient_edges)
    assert last.sum() == pytest.approx(1.0, abs=0.02)
    assert found.gradients.shape == found.activations.shape == (3, 21)


def test_the_standard_initialization_shrinks_both_ways():
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(50) % 10
    found = {s: layer_histograms(s, x, labels, width=120, depth=4, seed=0) for s in SCHEMES}
    assert found["standard"].gradient_std[0] < 0.3 < 0.6 < found["normalized"].gradient_std[0]
    assert found["standard"].activation_std[-1] < 0.5 * found["normalized"].activation_std[-1]


def test_an_unknown_scheme_is_one_sentence():
    with pytest.raises(UsageError, match=r"Unknown scheme 'normalised'. Did you mean 'normalized'"):
        layer_singular_values("normalised", width=4, depth=1, seed=0)
