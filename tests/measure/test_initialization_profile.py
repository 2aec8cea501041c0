"""Gradient profiles at initialization against autograd, a closed form and He's constant."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gradlab.errors import UsageError
from gradlab.measure.initialization import gradient_profile, initialized, vgg_b_gradient
from gradlab.nets import MLP, CifarNet


@pytest.mark.parametrize(("seed", "size"), [(0, 16), (1, 16), (0, 32)])
def test_vgg_b_is_hes_constant_whatever_the_draw(seed, size):
    # Written out: nine ReLU layers of fan-out 9d, He's std over .01 each.
    widths = (64, 128, 128, 256, 256, 512, 512, 512, 512)
    expected = np.prod([np.sqrt(2 / (9 * width)) / 0.01 for width in widths])
    assert vgg_b_gradient(seed=seed, size=size) == pytest.approx(expected, rel=1e-10)
    assert expected == pytest.approx(16_728.76, abs=0.005)


def test_vgg_b_scales_with_the_std():
    assert vgg_b_gradient(size=16, std=0.02) == pytest.approx(vgg_b_gradient(size=16) / 2**9, rel=1e-10)


@pytest.mark.parametrize("gain", [0.9, 1.0, 1.2])
def test_an_orthogonal_linear_net_has_exactly_geometric_gradients(gain):
    from gradlab.nets import initialize

    depth = 30
    net = MLP(depth, width=12, in_features=12, classes=3, activation="linear", bias=False).double()
    initialize(net, "orthogonal", gain=gain, seed=1)
    x = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    trace = gradient_profile(
        net,
        x,
        seed=2,
        layers=lambda _, module: (
            isinstance(module, nn.Linear) and module.in_features == 12 and module.out_features == 12
        ),
    )
    norms = trace.layers.sort_values("order")["grad_norm"].to_numpy()
    np.testing.assert_allclose(norms / norms[-1], gain ** np.arange(depth - 1, -1, -1), rtol=1e-12)


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_equals_retain_grad_in_float64(skip, norm):
    def make():
        return initialized(CifarNet(8, width=3, in_channels=1, skip=skip, norm=norm), "he_normal", seed=4)

    x = torch.randn(6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layers = gradient_profile(make(), x, seed=7, layers=["stem.relu", "stages.*.activation"]).layers
    net, kept = make(), {}
    net.train()
    h = net.stem(x)
    h.retain_grad()
    kept["stem.relu"] = h
    for stage, blocks in enumerate(net.stages):
        for place, block in enumerate(blocks):
            h = block(h)
            h.retain_grad()
            kept[f"stages.{stage}.{place}.activation"] = h
    noise = torch.randn(h.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (h * noise).sum().backward()
    assert dict(zip(layers["layer"], layers["grad_norm"], strict=True)) == pytest.approx(
        {name: float(tensor.grad.norm()) for name, tensor in kept.items()}, rel=1e-12
    )


def test_batchnorm_uses_the_batch_even_if_the_net_was_in_evaluation_mode():
    net = initialized(CifarNet(8, width=3, in_channels=1), "he_normal", seed=4).eval()
    x = 5 + torch.randn(6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    trace = gradient_profile(net, x, seed=7)
    assert trace.batchnorm["training"].all()


def test_no_hook_and_no_second_step_is_left():
    net = initialized(MLP(2, width=4, in_features=3, classes=2), "he_normal", seed=0)
    x = torch.ones(2, 3, dtype=torch.float64)
    first, second = (gradient_profile(net, x, seed=s).layers["grad_norm"].to_numpy() for s in (0, 0))
    np.testing.assert_array_equal(first, second)
    assert not any(m._forward_hooks for m in net.modules())


def test_a_net_without_features_is_one_sentence():
    with pytest.raises(UsageError, match="gradient_profile needs a model with a method 'features'; Linear has none"):
        gradient_profile(nn.Linear(2, 2), torch.ones(1, 2), seed=0)
