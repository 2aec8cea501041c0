"""Rescaled backward passes through depth against closed forms and against float64 autograd with retain_grad."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradlab as gl
from gradlab.errors import UsageError
from gradlab.nets import MLP, CifarNet, initialize


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(3)


def randn(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def exact_orthogonal(size):
    """Return an orthogonal matrix of entries +-1/2 and 0, exact in every dtype."""
    h2 = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    block = torch.kron(h2, h2) / 2
    return torch.block_diag(*[block] * (size // 4))[torch.roll(torch.arange(size), 3)]


@pytest.mark.parametrize("gain", [0.5, 1.5])
def test_deep_linear_net_of_a_thousand_layers_in_float32(gain):
    depth = 1000
    net = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(depth)))
    with torch.no_grad():
        for layer in net:
            layer.weight.copy_(gain * exact_orthogonal(8))
    table = gl.adjoint(net, torch.zeros(3, 8))
    log10 = table["log10_grad_norm"].to_numpy()
    np.testing.assert_array_equal(table["order"], np.arange(depth + 1))
    np.testing.assert_allclose(log10 - log10[-1], (depth - np.arange(depth + 1)) * np.log10(gain), rtol=1e-5, atol=1e-5)


def retained(net, x, names, loss):
    outputs = {}
    hooks = [
        net.get_submodule(n).register_forward_hook(
            lambda m, i, out, n=n: (out.retain_grad(), outputs.update({n: out}))[-1]
        )
        for n in names
    ]
    x = x.clone().requires_grad_()
    loss(net(x)).backward()
    for hook in hooks:
        hook.remove()
    return [float(x.grad.norm()), *(float(outputs[n].grad.norm()) for n in names)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: MLP(6, width=8, in_features=5, classes=3, activation="tanh"),
        lambda: MLP(6, width=8, in_features=5, classes=3, activation="relu", norm="batch", skip=True),
        lambda: CifarNet(14, width=3, in_channels=1, skip=False),
        lambda: CifarNet(14, width=3, in_channels=1, skip=True),
    ],
    ids=["tanh mlp", "residual mlp", "plain cifar", "residual cifar"],
)
def test_depth_equals_retain_grad_in_float64(make, rng):
    torch.manual_seed(2)
    net = initialize(make().double(), "he_normal", seed=0).train()
    x = randn(rng, 6, 1, 8, 8) if isinstance(net, CifarNet) else randn(rng, 6, 5)
    buffers = {k: v.clone() for k, v in net.named_buffers()}
    table = gl.adjoint(net, x, loss=lambda y: y.square().sum())
    for name, value in net.named_buffers():
        assert torch.equal(value, buffers[name]), name
    names = list(table["layer"][1:])
    assert len(names) > 6
    expected = retained(net, x, names, lambda y: y.square().sum())
    np.testing.assert_allclose(10 ** table["log10_grad_norm"], expected, rtol=1e-10)
    assert not any(m._forward_hooks for m in net.modules())


def test_in_place_operations_after_a_cut(rng):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True)).double()
    plain = nn.Sequential(net[0], nn.ReLU(), net[2], nn.ReLU())
    x = randn(rng, 3, 4)
    found, expected = (gl.adjoint(m, x, loss=torch.sum)["log10_grad_norm"] for m in (net, plain))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_module_used_twice_is_cut_at_each_call(rng):
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.Tanh(), shared).double()
    table = gl.adjoint(net, randn(rng, 3, 4), cuts=["0"])
    assert list(table["call"]) == [0, 0, 1]


def test_named_cuts_come_in_order_of_execution(rng):
    net = CifarNet(8, width=2, in_channels=1).double()
    table = gl.adjoint(net, randn(rng, 2, 1, 8, 8), cuts=["stages.2", "stem"])
    assert list(table["layer"]) == ["input", "stem", "stages.2"]


def test_tokens_have_no_gradient_so_the_input_is_no_cut(rng):
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)).double()
    table = gl.adjoint(net, torch.tensor([[0, 1], [2, 3]]))
    assert list(table["order"]) == [1, 2]
    assert list(table["layer"]) == ["0", "1"]


def test_a_dead_layer_is_exactly_zero_before_it(rng):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        net[0].bias.fill_(-100.0)
    log10 = gl.adjoint(net, randn(rng, 3, 4))["log10_grad_norm"].to_numpy()
    assert np.isneginf(log10[:2]).all()
    assert np.isfinite(log10[2:]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_non_finite_gradients_are_kept_as_such(value, rng):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()
    log10 = gl.adjoint(net, randn(rng, 3, 4), loss=lambda y: (y * value).sum())["log10_grad_norm"].to_numpy()
    assert not np.isfinite(log10).any()
    assert not np.isneginf(log10).any()


def test_checkpointed_blocks_equal_plain_ones(rng):
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)).double()

    class Net(nn.Module):
        def __init__(self, *, save_memory):
            super().__init__()
            self.blocks, self.save_memory = blocks, save_memory

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False) if self.save_memory else block(x)
            return x

    x, names = randn(rng, 3, 4), ["blocks.0", "blocks.1", "blocks.2"]
    found, expected = (gl.adjoint(Net(save_memory=m), x, cuts=names)["log10_grad_norm"] for m in (True, False))
    np.testing.assert_array_equal(found, expected)


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        a = self.a(x)
        return self.c(self.b(a) + a)


def test_a_skip_around_a_cut_is_found(rng):
    with pytest.raises(UsageError, match="from 'c' to 'a' around the cut 'b'"):
        gl.adjoint(Skipping(), torch.ones(2, 4))
    assert list(gl.adjoint(Skipping(), torch.ones(2, 4), cuts=["a", "c"])["layer"]) == ["input", "a", "c"]
