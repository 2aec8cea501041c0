"""Rescaled backward passes through time against closed forms far outside float32, and float64 autograd within."""

from __future__ import annotations

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import gradlab as gl
from gradlab.errors import UsageError
from gradlab.nets import CifarNet
from gradlab.probes.rescale import down_by, exponent_of

KINDS = [nn.RNN, nn.GRU, nn.LSTM]


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(3)


def orthogonal(size, rng, dtype=torch.float64):
    return torch.linalg.qr(torch.randn(size, size, generator=rng, dtype=torch.float64))[0].to(dtype)


def exact_orthogonal(size):
    """Return an orthogonal matrix of entries +-1/2 and 0, exact in every dtype."""
    h2 = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    block = torch.kron(h2, h2) / 2
    return torch.block_diag(*[block] * (size // 4))[torch.roll(torch.arange(size), 3)]


def randn(rng, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)


def linear_rnn(weight):
    """Return a tanh nn.RNN that is linear, as tanh'(0) = 1 exactly: input and state stay 0."""
    size = len(weight)
    net = nn.RNN(size, size, bias=False)
    with torch.no_grad():
        net.weight_hh_l0.copy_(weight)
    return net


# -- the arithmetic ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_powers_of_two_are_exact_over_the_whole_range(dtype):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for value in (smallest, torch.finfo(dtype).tiny, 0.3, 1.0, torch.finfo(dtype).max):
        row = torch.tensor([[value, -value / 2]], dtype=dtype)
        e = exponent_of(row)
        scaled = down_by(row, e)
        assert 0.5 <= float(scaled.abs().max()) < 1
        assert math.ldexp(float(scaled[0, 0]), int(e)) == float(row[0, 0])


# -- time: closed forms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rho", "every"), [(0.5, 1), (1.5, 8)], ids=["vanishing", "exploding, in chunks"])
def test_linear_rnn_of_ten_thousand_steps_in_float32(rho, every):
    steps = 10_000
    net = linear_rnn(rho * exact_orthogonal(4))
    table = gl.adjoint(net, torch.zeros(steps, 1, 4), every=every)
    log10, t = table["log10_grad_norm"].to_numpy(), table["t"].to_numpy()
    np.testing.assert_array_equal(t, np.arange(0, steps + 1, every))
    expected = (steps - t) * np.log10(rho)
    np.testing.assert_allclose(log10 - log10[-1], expected, rtol=1e-5, atol=1e-5)
    assert abs(log10[0]) > 1700


def test_linear_rnn_with_rounded_weights_in_chunks(rng):
    weight = 0.7 * orthogonal(8, rng, torch.float32)
    table = gl.adjoint(linear_rnn(weight), torch.zeros(1000, 2, 8), every=16)
    g = randn(torch.Generator().manual_seed(0), 2, 8)
    expected = {1000: np.log10(float(g.norm()))}
    scale = 0.0
    for t in range(999, -1, -1):
        g = g @ weight.double()
        top = float(g.norm())
        g, scale = g / top, scale + np.log10(top)
        expected[t] = scale
    assert list(table["t"])[-2:] == [992, 1000]
    np.testing.assert_allclose(table["log10_grad_norm"], [expected[t] for t in table["t"]], atol=1e-4)


def test_default_lstm_runs_far_below_the_smallest_float32(rng):
    torch.manual_seed(0)
    net = nn.LSTM(4, 16)
    x = randn(rng, 2000, 2, 4, dtype=torch.float32)
    table = gl.adjoint(net, x, every=4)
    for _, rows in table.groupby("state"):
        log10 = rows["log10_grad_norm"].to_numpy()
        assert np.isfinite(log10).sum() >= len(log10) - 1  # c at the start of a chain may have no path
        assert log10[0] < -200
        slope = np.diff(log10[:400:100])
        assert (slope > 0).all()
    wide = gl.adjoint(net.double(), x.double(), every=4)
    np.testing.assert_allclose(table["log10_grad_norm"], wide["log10_grad_norm"], atol=0.02)


# -- time: float64 autograd by hand -----------------------------------------------------------------------------


def unrolled(net, x, loss):
    """Return norms of the total dL/dh_t and dL/dc_t of each level, by cells written out and retain_grad."""
    weights, size = dict(net.named_parameters()), net.hidden_size
    kept, sequence = {}, list(x)
    for level in range(net.num_layers):
        w_ih, w_hh = weights[f"weight_ih_l{level}"], weights[f"weight_hh_l{level}"]
        b_ih, b_hh = weights[f"bias_ih_l{level}"], weights[f"bias_hh_l{level}"]
        project = weights.get(f"weight_hr_l{level}")
        h = torch.zeros(x.shape[1], w_hh.shape[1], dtype=x.dtype, requires_grad=True)
        c = torch.zeros(x.shape[1], size, dtype=x.dtype, requires_grad=True)
        states = [(h, c)]
        for u in sequence:
            a, b = u @ w_ih.T + b_ih, h @ w_hh.T + b_hh
            if isinstance(net, nn.LSTM):
                i, f, g, o = (a + b).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                h = h if project is None else h @ project.T
                c.retain_grad()
            elif isinstance(net, nn.GRU):
                (ar, az, an), (br, bz, bn) = a.chunk(3, 1), b.chunk(3, 1)
                z = (az + bz).sigmoid()
                h = (1 - z) * (an + (ar + br).sigmoid() * bn).tanh() + z * h
            else:
                h = (a + b).relu() if net.nonlinearity == "relu" else (a + b).tanh()
            h.retain_grad()
            states.append((h, c))
        sequence = [h for h, _ in states[1:]]
        kept[level] = states
    loss(torch.stack(sequence)).backward()
    rows = []
    for level, states in kept.items():
        for state, place in (("h", 0), ("c", 1))[: 2 if isinstance(net, nn.LSTM) else 1]:
            for t, pair in enumerate(states):
                norms = pair[place].grad.norm(dim=1)
                rows += [(level, state, t, n, float(norms[n])) for n in range(len(norms))]
    return pd.DataFrame(rows, columns=["level", "state", "t", "sample", "norm"])


LOSSES = {
    "last": lambda out: (
        out[-1] * torch.linspace(-1, 2, out[-1].numel(), dtype=out.dtype).reshape(out[-1].shape)
    ).sum(),
    "all": lambda out: out.square().sum(),
    "early": lambda out: out[5].sum() + out[40].square().sum(),
}


@pytest.mark.parametrize("every", [1, 7], ids=["every step", "chunks"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.RNN, {}),
        (nn.RNN, {"num_layers": 2, "nonlinearity": "relu"}),
        (nn.GRU, {"num_layers": 2}),
        (nn.LSTM, {}),
        (nn.LSTM, {"num_layers": 3}),
        (nn.LSTM, {"num_layers": 2, "proj_size": 3}),
    ],
    ids=["rnn", "relu-2", "gru-2", "lstm", "lstm-3", "projected"],
)
def test_equals_unrolled_autograd_in_float64(kind, options, loss, every, rng):
    torch.manual_seed(1)
    net = kind(3, 5, **options).double()
    x = randn(rng, 60, 2, 3)
    expected = unrolled(copy.deepcopy(net), x, loss)
    table = gl.adjoint(net, x, loss=lambda out: loss(out[0]), every=every, per_sample=True)
    both = table.merge(expected, on=["level", "state", "t", "sample"])
    assert len(both) == (table["state"] != "cut").sum() > 0
    with np.errstate(divide="ignore"):
        want = np.log10(both["norm"].to_numpy())
    np.testing.assert_allclose(both["log10_grad_norm"], want, atol=1e-10)


def test_the_cut_of_an_lstm_is_the_gradient_of_its_state_pair(rng):
    net = nn.LSTM(3, 5).double()
    x = randn(rng, 20, 2, 3)
    table = gl.adjoint(net, x, loss=lambda out: out[0][-1].sum())
    _, (h, c) = net(x[:8])
    h, c = h.detach().requires_grad_(), c.detach().requires_grad_()
    grads = torch.autograd.grad(net(x[8:], (h, c))[0][-1].sum(), (h, c))
    expected = torch.cat([g.flatten() for g in grads]).norm()
    found = table.query("state == 'cut' and t == 8")["log10_grad_norm"].item()
    assert found == pytest.approx(float(expected.log10()), abs=1e-10)


def test_batch_norm_of_samples_joined(rng):
    net = nn.GRU(3, 5).double()
    x = randn(rng, 30, 4, 3)
    whole, single = gl.adjoint(net, x), gl.adjoint(net, x, per_sample=True)
    squares = (10 ** (2 * single["log10_grad_norm"])).groupby(single["t"]).sum()
    np.testing.assert_allclose(10 ** (2 * whole["log10_grad_norm"]), squares, rtol=1e-10)


class Reader(nn.Module):
    """Tokens in, one number for each sequence out; reads by the last state or by the outputs."""

    def __init__(self, kind, *, by_state):
        super().__init__()
        self.embedding, self.rnn, self.head = nn.Embedding(7, 3), kind(3, 5, 2, batch_first=True), nn.Linear(5, 2)
        self.by_state = by_state

    def forward(self, tokens):
        out, last = self.rnn(self.embedding(tokens))
        h = last[0] if isinstance(last, tuple) else last
        return self.head(h[-1] if self.by_state else out[:, -1])


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_inside_a_model_by_state_or_output(kind, rng):
    torch.manual_seed(0)
    net = Reader(kind, by_state=True).double()
    tokens, target = torch.randint(7, (4, 12), generator=rng), torch.tensor([0, 1, 1, 0])
    by_state = gl.adjoint(net, (tokens, target), loss=nn.functional.cross_entropy)
    net.by_state = False
    by_output = gl.adjoint(net, (tokens, target), loss=nn.functional.cross_entropy)
    np.testing.assert_allclose(by_state["log10_grad_norm"], by_output["log10_grad_norm"], atol=1e-10)
    assert set(by_state["layer"]) == {"rnn"}
    assert "forward" not in vars(net.rnn)


def test_initial_state_and_unbatched_input(rng):
    class Started(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.RNN(3, 5).double()

        def forward(self, x):
            return self.rnn(x, torch.full((1, 5), 0.4, dtype=x.dtype))[0][-1]

    net = Started()
    x = randn(rng, 9, 3)
    h = torch.full((1, 5), 0.4, dtype=x.dtype, requires_grad=True)
    (g,) = torch.autograd.grad(net.rnn(x, h)[0][-1].sum(), h)
    found = gl.adjoint(net, x, loss=torch.sum).query("t == 0")["log10_grad_norm"].item()
    assert found == pytest.approx(float(g.norm().log10()), abs=1e-10)


def test_dropout_between_layers_is_repeatable_and_keeps_the_rng(rng):
    net = nn.LSTM(3, 16, 2, dropout=0.5)
    x = randn(rng, 10, 2, 3, dtype=torch.float32)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = gl.adjoint(net, x)
    assert torch.equal(before, torch.get_rng_state())
    pd.testing.assert_frame_equal(first, gl.adjoint(net, x))
    torch.manual_seed(6)
    assert not np.allclose(first["log10_grad_norm"][0], gl.adjoint(net, x)["log10_grad_norm"][0])
    assert all(p.grad is None for p in net.parameters())


def test_a_nan_in_the_sequence_shows_as_nan_before_it(rng):
    x = randn(rng, 10, 1, 3)
    x[4] = torch.nan
    log10 = gl.adjoint(nn.RNN(3, 4).double(), x)["log10_grad_norm"]
    assert np.isfinite(log10[10])
    assert log10[:10].isna().all()


def test_loss_on_an_early_step_is_exactly_zero_later(rng):
    table = gl.adjoint(nn.GRU(3, 4).double(), randn(rng, 10, 1, 3), loss=lambda out: out[0][5].sum())
    assert np.isneginf(table.query("t > 6")["log10_grad_norm"]).all()
    assert np.isfinite(table.query("t <= 6")["log10_grad_norm"]).all()


# -- devices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.LSTM(3, 4, 2, dropout=0.2), (6, 2, 3)),
        (lambda: nn.GRU(3, 4), (6, 2, 3)),
        (lambda: nn.RNN(3, 4), (6, 2, 3)),
        (lambda: CifarNet(8, width=2), (2, 3, 8, 8)),
    ],
    ids=["lstm", "gru", "rnn", "cifar"],
)
def test_no_sync_before_the_end(make, shape):
    with torch.device("meta"):
        net, x = make(), torch.zeros(shape)
    table = gl.adjoint(net, x)
    assert len(table) > 4
    assert table["log10_grad_norm"].isna().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_cuda_equals_cpu(kind, rng):
    net, x = kind(3, 8, 2).double(), randn(rng, 40, 2, 3)
    cpu = gl.adjoint(net, x)["log10_grad_norm"]
    np.testing.assert_allclose(gl.adjoint(net.cuda(), x.cuda())["log10_grad_norm"], cpu, atol=1e-8)


# -- refusals ---------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(3, 3)

    def forward(self, x):
        return self.rnn(self.rnn(x)[0])[0]


@pytest.mark.parametrize(
    ("make", "x", "options", "message"),
    [
        (lambda: nn.LSTM(3, 4, bidirectional=True), (5, 2, 3), {}, "bidirectional"),
        (lambda: nn.LSTM(3, 4), (0, 2, 3), {}, "length 0"),
        (lambda: nn.ModuleList([nn.RNN(3, 4), nn.RNN(3, 4)]), (5, 2, 3), {}, "2 recurrent modules"),
        (Twice, (5, 2, 3), {}, "more than once"),
        (lambda: nn.LSTM(3, 4), (5, 2, 3), {"every": 0}, "'every' is 0"),
        (lambda: nn.Linear(3, 4), (5, 3), {"every": 2}, "through depth"),
        (lambda: nn.Sequential(nn.Linear(3, 4)), (5, 3), {"cuts": ["O"]}, "Unknown module 'O'"),
        (lambda: nn.Sequential(nn.Linear(3, 4)), (5, 3), {"cuts": []}, "list of cuts is empty"),
        (lambda: nn.Sequential(nn.Linear(3, 4)), (5, 3), {"cuts": 5}, "'cuts' is 5"),
        (lambda: nn.Sequential(nn.Linear(3, 4)), (5, 3), {"cuts": "0"}, "Unknown recurrent module '0'"),
        (lambda: nn.Sequential(nn.Linear(3, 4)), (5, 3), {"loss": lambda y: y}, "must be a tensor of one entry"),
        (lambda: nn.Linear(3, 4), (5, 3), {}, "name the cuts"),
        (lambda: nn.RNN(3, 4), (5, 2, 3), {"loss": lambda y: torch.zeros(())}, "does not depend"),
        (lambda: 3, (5, 3), {}, "needs a torch.nn.Module"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_refusals_are_one_sentence(make, x, options, message):
    model = make()
    with pytest.raises(UsageError, match=message):
        gl.adjoint(model, torch.zeros(x), **options)
    if isinstance(model, nn.Module):
        assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())


def test_a_watched_model_is_refused():
    net = nn.Sequential(nn.Linear(3, 3))
    with gl.watch(net), pytest.raises(UsageError, match="being watched"):
        gl.adjoint(net, torch.zeros(2, 3))
    assert len(gl.adjoint(net, torch.zeros(2, 3))) == 2
