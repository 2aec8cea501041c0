"""The split of the gradient through time against torch's own fused nets and naive autograd."""

import numpy as np
import pytest
import torch
from torch import nn

from gradlab.errors import UsageError
from gradlab.measure.cell_state import cell_gradient

nets = pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])


def build(kind, *, hidden=6, inputs=3, steps=12, warmup=4, bias=True):
    torch.manual_seed(0)
    return kind(inputs, hidden, bias=bias).double(), torch.randn(warmup + steps, 2, inputs, dtype=torch.float64)


def fused_reference(net, x, *, warmup, seed):
    """Total gradient by torch's fused net run one step at a time, so that every state is in the graph."""
    lstm = isinstance(net, nn.LSTM)
    with torch.no_grad():
        _, state = net(x[:warmup]) if warmup else (None, None)
    if state is None:
        zeros = x.new_zeros(1, x.shape[1], net.hidden_size)
        state = (zeros, zeros) if lstm else zeros
    state = tuple(s.clone().requires_grad_() for s in state) if lstm else state.clone().requires_grad_()
    hidden, memories = [], []
    for step in x[warmup:]:
        _, state = net(step[None], state)
        hidden.append(state[0] if lstm else state)
        memories.append(state[1] if lstm else state)
    v = torch.randn(x.shape[1], net.hidden_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    grads = torch.autograd.grad((memories[-1][0] * v).sum(), memories, retain_graph=True)
    if lstm:
        # The fused step hides that h_t = o tanh(c_t) reads c_t: add what comes back through it, o = h_t / tanh(c_t).
        through = torch.autograd.grad((memories[-1][0] * v).sum(), hidden, allow_unused=True)
        grads = [
            g if t is None else g + t * h / c.tanh() * (1 - c.tanh() ** 2)
            for g, t, h, c in zip(grads, through, hidden, memories, strict=True)
        ]
    return np.array([grad[0].norm(dim=1).log().mean().item() for grad in reversed(grads)])


@nets
@pytest.mark.parametrize("warmup", [0, 4], ids=["from-zero", "warmed-up"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_total_gradient_equals_the_fused_net(kind, warmup, bias):
    net, x = build(kind, warmup=warmup, bias=bias)
    got = cell_gradient(net, x, warmup=warmup, seed=3)
    np.testing.assert_allclose(got.log_full, fused_reference(net, x, warmup=warmup, seed=3), rtol=1e-10, atol=1e-12)
    assert got.lag.tolist() == list(range(12))


@nets
def test_path_along_the_memory_is_exactly_the_product_of_gates(kind):
    net, x = build(kind, steps=40)
    assert cell_gradient(net, x, warmup=4).path_error < 1e-13


@nets
def test_without_recurrent_weights_there_is_no_other_path(kind):
    # An LSTM's gates then read the input only. A GRU's candidate and gates too.
    net, x = build(kind, steps=30)
    with torch.no_grad():
        net.weight_hh_l0.zero_()
    got = cell_gradient(net, x, warmup=4)
    np.testing.assert_allclose(got.log_full, got.log_path, rtol=1e-12, atol=1e-12)


@nets
def test_known_gates_decay_by_their_value(kind):
    net, x = build(kind, steps=30)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.bias_ih_l0[6:12] = 1.0  # second of torch's gates: f of an LSTM, z of a GRU
    got = cell_gradient(net, x, warmup=4)
    sigma = 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(np.diff(got.log_path), np.log(sigma), rtol=1e-12)
    assert got.gate_mean == pytest.approx(sigma)
    assert got.gate_geometric == pytest.approx(sigma)
    np.testing.assert_allclose(got.gate_by_unit, sigma)


def test_default_lstm_vanishes_at_the_tabulated_rate():
    torch.manual_seed(0)
    got = cell_gradient(nn.LSTM(1, 128), torch.randn(250, 8, 1) * 0.5, warmup=100)
    rate = np.exp(np.polyfit(got.lag[10:100], got.log_full[10:100], 1)[0])
    assert rate == pytest.approx(0.646, rel=0.05)


@pytest.mark.parametrize(
    ("net", "inputs", "warmup"),
    [
        (nn.RNN(2, 3), torch.zeros(9, 1, 2), 4),
        (nn.LSTM(2, 3, num_layers=2), torch.zeros(9, 1, 2), 4),
        (nn.LSTM(2, 3, bidirectional=True), torch.zeros(9, 1, 2), 4),
        (nn.LSTM(2, 3, proj_size=2), torch.zeros(9, 1, 2), 4),
        (nn.GRU(2, 3), torch.zeros(5, 1, 2), 4),
        (nn.GRU(2, 3), torch.zeros(9, 2), 4),
    ],
    ids=["rnn", "two-layers", "two-directions", "projection", "one-step", "two-dimensions"],
)
def test_what_it_cannot_measure_is_one_sentence(net, inputs, warmup):
    with pytest.raises(UsageError, match="cell_gradient needs"):
        cell_gradient(net, inputs, warmup=warmup)
