"""Wide stacks against closed forms, plain autograd and the exact law of finite width."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from gradlab.analysis.finite_width import finite_width_log_norm
from gradlab.analysis.theory import gain_profile, gradient_gain
from gradlab.errors import UsageError
from gradlab.measure.mean_field import depth_profile, relu_log_norms, wide_stack


def naive(net, batch_size, seed):
    """Per-sample gradient norms at the pre-activations by one backward pass through the whole net."""
    generator = torch.Generator().manual_seed(seed)
    width = net[0].weight.shape[0]
    x = torch.randn(batch_size, width, generator=generator, dtype=torch.float64)
    v = torch.randn(batch_size, width, generator=generator, dtype=torch.float64)
    kept, h = [], x
    for place, layer in enumerate(net[:-1]):
        h = layer(h)
        if place % 2 == 0:
            h.retain_grad()
            kept.append(h)
    (h * v).sum().backward()
    return kept


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "0.2:1.5"])
def test_equals_one_backward_pass(activation):
    net = wide_stack(activation, "1.5", width=12, depth=7, seed=3, bias_var=0.1)
    found = depth_profile(net, batch_size=5, seed=4)
    kept = naive(net, 5, 4)
    np.testing.assert_allclose(found.log_grad_norm, [float(z.grad.norm(dim=1).log().mean()) for z in kept], rtol=1e-10)
    np.testing.assert_allclose(found.length, [float(z.detach().square().mean()) for z in kept], rtol=1e-12)
    for c, z in zip(found.correlation, kept, strict=True):
        gram = (z @ z.T).detach().numpy()
        pairs = gram[~np.eye(5, dtype=bool)]
        assert c == pytest.approx(pairs.mean() / np.diag(gram).mean(), rel=1e-10)


def test_an_orthogonal_linear_net_keeps_every_norm():
    net = wide_stack("linear", "orthogonal", width=16, depth=30, seed=0)
    found = depth_profile(net, batch_size=4, seed=1)
    np.testing.assert_allclose(found.log_grad_norm, found.log_grad_norm[-1], atol=1e-12)
    np.testing.assert_allclose(found.length, found.length[0], rtol=1e-12)
    np.testing.assert_allclose(found.correlation, found.correlation[0], atol=1e-12)


def test_a_gradient_far_below_the_smallest_float_is_a_number():
    net = wide_stack("sigmoid", "1", width=16, depth=600, seed=0)
    found = depth_profile(net, batch_size=2, seed=1)
    assert found.log_grad_norm[0] < math.log(5e-324)
    assert np.isfinite(found.log_grad_norm).all()
    slope = np.polyfit(np.arange(100, 500), found.log_grad_norm[100:500], 1)[0]
    assert math.exp(-slope) == pytest.approx(gradient_gain("sigmoid", 1.0), rel=0.05)


def test_a_dead_net_has_gradient_0_and_log_minus_infinity():
    net = wide_stack("0:0", "1", width=4, depth=3, seed=0)
    assert depth_profile(net, batch_size=2, seed=1).log_grad_norm.tolist()[:2] == [-math.inf, -math.inf]


@pytest.mark.parametrize("scheme", ["default", "he_normal", "orthogonal"])
def test_wide_nets_follow_the_theory_layer_by_layer(scheme):
    weight_var = {"default": 1 / 3, "he_normal": 2.0, "orthogonal": 1.0}[scheme]
    bias_var = 1 / (3 * 300) if scheme == "default" else 0.0
    net = wide_stack("tanh", scheme, width=300, depth=8, seed=0)
    found = depth_profile(net, batch_size=8, seed=1)
    expected = gain_profile("tanh", weight_var, bias_var, depth=7, start=weight_var + bias_var)
    np.testing.assert_allclose(np.exp(-np.diff(found.log_grad_norm)), expected, rtol=0.05)


@pytest.mark.parametrize(("width", "depth"), [(10, 10), (30, 20)], ids=str)
def test_relu_nets_follow_the_exact_law(width, depth):
    nets = 3000
    found = relu_log_norms(width=width, depth=depth, nets=nets, seed=5)
    law = finite_width_log_norm(width, depth)
    alive = found[np.isfinite(found)]
    assert len(alive) / nets == pytest.approx(law.alive, abs=4 * math.sqrt(0.01 / nets) + 1e-9)
    assert alive.mean() == pytest.approx(law.mean, abs=4 * math.sqrt(law.variance / nets))
    assert alive.var(ddof=1) == pytest.approx(law.variance, rel=4 * math.sqrt(2.5 / nets))


def test_relu_log_norms_equal_the_jacobian_of_a_net():
    width, depth = 6, 3
    found = relu_log_norms(width=width, depth=depth, nets=1, seed=9)
    generator = torch.Generator().manual_seed(9)
    x, u = torch.randn(1, width, 2, generator=generator, dtype=torch.float64)[0].T
    layers = nn.Sequential()
    for _ in range(depth):
        layer = nn.utils.skip_init(nn.Linear, width, width, bias=False, dtype=torch.float64)
        drawn = torch.randn(1, width, width, generator=generator, dtype=torch.float64)[0]
        layer.weight.data = drawn * math.sqrt(2 / width)
        layers.extend([layer, nn.ReLU()])
    jacobian = torch.autograd.functional.jacobian(layers, x)
    assert found[0] == pytest.approx(2 * math.log(float((jacobian @ (u / u.norm())).norm())), rel=1e-10)


@pytest.mark.parametrize("activation", ["gelu", "0.2:1.5"])
def test_nothing_waits_for_the_device(activation):
    net = wide_stack(activation, "1.5", width=8, depth=3, seed=0, bias_var=0.1, device="meta")
    assert np.isnan(depth_profile(net, batch_size=2, seed=0).log_grad_norm).all()
    assert np.isnan(relu_log_norms(width=4, depth=2, nets=3, seed=0, device="meta")).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: wide_stack("tahn", "1", width=4, depth=2, seed=0), "Did you mean 'tanh'"),
        (lambda: wide_stack("tanh", "he_norml", width=4, depth=2, seed=0), "Did you mean 'he_normal'"),
        (lambda: wide_stack("tanh", "-1", width=4, depth=2, seed=0), "sigma_w^2 must be finite and above 0"),
        (lambda: wide_stack("tanh", "1", width=0, depth=2, seed=0), "'width' is 0"),
        (lambda: wide_stack("tanh", "1", width=4, depth=0, seed=0), "'depth' is 0"),
        (lambda: wide_stack("tanh", "1", width=4, depth=2, seed=0, bias_var=-1.0), "bias_var is -1.0"),
        (
            lambda: depth_profile(wide_stack("tanh", "1", width=4, depth=2, seed=0), batch_size=1, seed=0),
            "batch_size is 1",
        ),
        (lambda: relu_log_norms(width=4, depth=2, nets=0, seed=0), "'nets' is 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_values_are_told_in_one_sentence(call, says):
    with pytest.raises(UsageError) as told:
        call()
    assert says in str(told.value)
