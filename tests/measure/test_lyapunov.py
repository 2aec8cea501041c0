"""Lyapunov exponents against closed forms, against Jacobians by autograd, and against the sweep back through time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gradlab.analysis import fit_decay
from gradlab.analysis.recurrent_theory import pascanu_bounds
from gradlab.errors import UsageError
from gradlab.measure.lyapunov import jacobian_lag_norms, lyapunov_exponents
from gradlab.measure.tangents import tangent_step

KINDS = [(nn.RNN, {}), (nn.RNN, {"nonlinearity": "relu"}), (nn.GRU, {}), (nn.LSTM, {}), (nn.LSTM, {"bias": False})]
IDS = ["tanh", "relu", "gru", "lstm", "lstm without bias"]


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(11)


def randn(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def driven(weight, **options):
    """Return h' = phi(W h + u): the input enters each unit as it is."""
    size = len(weight)
    net = nn.RNN(size, size, bias=False, **options).double()
    with torch.no_grad():
        net.weight_hh_l0.copy_(weight)
        net.weight_ih_l0.copy_(torch.eye(size))
    return net


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=IDS)
def test_step_and_tangents_equal_torch(kind, options, rng):
    torch.manual_seed(0)
    net = kind(3, 4, **options).double()
    step, size = tangent_step(net)
    x, state, v = randn(rng, 2, 3), 0.7 * randn(rng, 2, size), randn(rng, 2, 5, size)

    def torch_step(u, s):
        given = (s[None, None, :4], s[None, None, 4:]) if kind is nn.LSTM else s[None, None]
        last = net(u[None, None], given)[1]
        return torch.cat([part.flatten() for part in last]) if kind is nn.LSTM else last.flatten()

    new, moved = step(x, state, v)
    for n in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda s, n=n: torch_step(x[n], s), state[n])
        torch.testing.assert_close(new[n], torch_step(x[n], state[n]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(moved[n], v[n] @ jacobian.T, rtol=1e-10, atol=1e-12)


def test_linear_map_has_the_moduli_of_its_eigenvalues(rng):
    similar = torch.linalg.qr(randn(rng, 4, 4))[0] + 0.3 * randn(rng, 4, 4)
    turn = 0.8 * torch.tensor([[np.cos(1.0), -np.sin(1.0)], [np.sin(1.0), np.cos(1.0)]])
    weight = similar @ torch.block_diag(torch.diag(torch.tensor([1.3, 0.3])).double(), turn) @ similar.inverse()
    found = lyapunov_exponents(driven(weight), torch.zeros(4100, 2, 4), k=4, warmup=100)  # tanh'(0) = 1
    np.testing.assert_allclose(np.exp(found.exponents), [1.3, 0.8, 0.8, 0.3], rtol=1e-3)
    assert found.steps == 4000


def test_orthogonal_map_neither_grows_nor_shrinks(rng):
    weight = torch.linalg.qr(randn(rng, 6, 6))[0]
    found = lyapunov_exponents(driven(weight), torch.zeros(300, 3, 6), k=6)
    np.testing.assert_allclose(found.exponents, 0, atol=1e-14)
    assert (found.standard_errors < 1e-14).all()


def test_scalar_tanh_is_the_mean_of_its_log_slope(rng):
    w, u = -1.7, randn(rng, 500, 2, 1)
    found = lyapunov_exponents(driven(torch.full((1, 1), w, dtype=torch.float64)), u, warmup=50)
    logs = np.empty((450, 2))
    for n in range(2):
        h = 0.0
        for t in range(500):
            h = np.tanh(w * h + float(u[t, n, 0]))
            if t >= 50:
                logs[t - 50, n] = np.log(abs(w) * (1 - h * h))
    np.testing.assert_allclose(found.by_sample[:, 0], logs.mean(0), rtol=1e-12)
    blocks = logs.reshape(10, 45, 2).mean(1)
    over_time = np.sqrt(blocks.var(0, ddof=1).mean() / 20)
    over_samples = logs.mean(0).std(ddof=1) / np.sqrt(2)
    assert found.errors_over_time[0] == pytest.approx(over_time, rel=1e-10)
    assert found.errors_over_samples[0] == pytest.approx(over_samples, rel=1e-10)
    assert found.standard_errors[0] == pytest.approx(max(over_time, over_samples), rel=1e-10)


def test_standard_error_is_the_spread_over_repetitions(rng):
    found = [
        lyapunov_exponents(driven(torch.full((1, 1), 0.9, dtype=torch.float64)), randn(rng, 300, 4, 1), warmup=20)
        for _ in range(30)
    ]
    spread = np.std([f.exponents[0] for f in found], ddof=1)
    errors = np.median([f.errors_over_time[0] for f in found])
    assert 0.6 < errors / spread < 1.6  # the sd of 30 draws is itself known to 13 %


def test_exponents_sum_to_the_log_of_the_volume(rng):
    torch.manual_seed(1)
    net = nn.GRU(2, 3).double()
    u = randn(rng, 60, 1, 2)
    found = lyapunov_exponents(net, u, k=3, warmup=0)
    step, _ = tangent_step(net)
    h, total = torch.zeros(1, 3).double(), 0.0
    for x in u:
        h, rows = step(x, h, torch.eye(3).double()[None])
        total += float(torch.linalg.slogdet(rows[0])[1])
    assert found.exponents.sum() == pytest.approx(total / 60, rel=1e-10)
    assert (np.diff(found.exponents) < 0).all()


@pytest.mark.parametrize(
    ("gain", "kind", "published"), [(0.8, "tanh", 0.640), (1.0, "tanh", 0.762), (1.5, "tanh", 0.976)], ids=str
)
def test_c51_rate_backward_is_exp_of_the_exponent(gain, kind, published):
    rates, factors = [], []
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        net = driven(gain * randn(rng, 128, 128) / 128**0.5, nonlinearity=kind)
        u = 0.5 * randn(rng, 300, 8, 128)
        found = lyapunov_exponents(net, u, warmup=100)
        norms = jacobian_lag_norms(net, u, range(10, 191), seed=seed)
        rates.append(fit_decay(norms.lags, norms.log_norms).gain)
        factors.append(float(np.exp(found.exponents[0])))
        assert pascanu_bounds(net.weight_hh_l0.detach().numpy(), kind).can_explode  # yet it vanishes
    np.testing.assert_allclose(rates, factors, rtol=0.02)
    assert np.mean(factors) == pytest.approx(published, rel=0.03)


def test_a_step_given_as_a_function_equals_the_module(rng):
    net = driven(1.3 * randn(rng, 16, 16) / 4)
    u = randn(rng, 80, 3, 16)

    def step(x, h):
        return (x + h @ net.weight_hh_l0.T).tanh()

    module, function = (lyapunov_exponents(m, u, k=3, warmup=10, state_size=n) for m, n in ((net, None), (step, 16)))
    np.testing.assert_allclose(function.by_sample, module.by_sample, rtol=1e-10)
    module, function = (
        jacobian_lag_norms(m, u, [3, 40, 80], state_size=n, seed=4) for m, n in ((net, None), (step, 16))
    )
    np.testing.assert_allclose(function.log_norms, module.log_norms, rtol=1e-10)


def test_c51_sigmoid_by_its_step():
    rng = torch.Generator().manual_seed(0)
    weight, u = 8 * randn(rng, 128, 128) / 128**0.5, 0.5 * randn(rng, 300, 8, 128)

    def step(x, h):
        return (x + h @ weight.T).sigmoid()

    factor = float(np.exp(lyapunov_exponents(step, u, state_size=128).exponents[0]))
    norms = jacobian_lag_norms(step, u, range(10, 191), state_size=128)
    assert fit_decay(norms.lags, norms.log_norms).gain == pytest.approx(factor, rel=0.02)
    assert factor == pytest.approx(0.851, rel=0.05)
    assert pascanu_bounds(weight, "sigmoid").can_explode


def test_lag_norms_equal_autograd_and_follow_the_layout(rng):
    torch.manual_seed(2)
    net = nn.LSTM(3, 4, batch_first=True).double()
    x = randn(rng, 2, 15, 3)
    v = torch.randn(2, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    _, (h, c) = net(x[:, :9])
    h, c = h.detach().requires_grad_(), c.detach().requires_grad_()
    grads = torch.autograd.grad((net(x[:, 9:], (h, c))[0][:, -1] * v).sum(), (h, c))
    expected = {"h": grads[0][0].norm(dim=1), "cut": torch.cat([g[0] for g in grads], 1).norm(dim=1)}
    for state, norms in expected.items():
        found = jacobian_lag_norms(net, x, [6, 0], state=state, seed=5)
        np.testing.assert_allclose(found.log_norms[:, 0], norms.log(), rtol=1e-10)
        np.testing.assert_allclose(found.log_norms[:, 1], v.norm(dim=1).log(), rtol=1e-10)


def test_pascanu_bounds_of_a_gaussian_matrix(rng):
    w = 0.4 * randn(rng, 128, 128).numpy() / 128**0.5
    found = pascanu_bounds(w, "tanh")
    assert found.sigma_max == pytest.approx(np.linalg.svd(w)[1][0], rel=1e-12)
    assert (found.must_vanish, found.can_explode) == (True, False)
    assert pascanu_bounds(10 * w, "sigmoid").bound == pytest.approx(2.5 * found.sigma_max)
    edge = pascanu_bounds(np.eye(2), "relu")
    assert (edge.must_vanish, edge.can_explode) == (False, False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lyapunov_exponents(nn.Linear(2, 2), torch.zeros(9, 1, 2)), "is a Linear"),
        (lambda: lyapunov_exponents(nn.LSTM(2, 2, 2), torch.zeros(9, 1, 2)), "2 layers"),
        (lambda: lyapunov_exponents(nn.RNN(2, 2), torch.zeros(9, 1, 3)), r"\(T, N, 2\)"),
        (lambda: lyapunov_exponents(nn.RNN(2, 2), torch.zeros(9, 1, 2)), "warmup is 100 for a sequence of 9"),
        (lambda: lyapunov_exponents(nn.RNN(2, 2), torch.zeros(9, 1, 2), k=3, warmup=0), "k is 3"),
        (lambda: lyapunov_exponents(nn.RNN(2, 2), torch.zeros(9, 1, 2), warmup=0, blocks=1), "blocks is 1"),
        (lambda: jacobian_lag_norms(nn.RNN(2, 2), torch.zeros(9, 1, 2), [10]), "lag 10 is given for 9 steps"),
        (lambda: jacobian_lag_norms(nn.RNN(2, 2), torch.zeros(9, 1, 2), []), "No lag is given"),
        (lambda: jacobian_lag_norms(nn.RNN(2, 2), torch.zeros(9, 1, 2), [1], state="c"), "Unknown state 'c'"),
        (lambda: lyapunov_exponents(lambda x, h: h, torch.zeros(9, 1, 2), state_size=0), "state_size is 0"),
        (lambda: lyapunov_exponents(nn.RNN(2, 2), torch.zeros(9, 1, 2), state_size=2), "not a RNN"),
        (lambda: jacobian_lag_norms(nn.Tanh(), torch.zeros(9, 1, 2), [1]), "is a Tanh"),
        (lambda: pascanu_bounds(np.zeros((2, 3)), "tanh"), "square matrix"),
        (lambda: pascanu_bounds(np.eye(2), "tahn"), "Did you mean 'tanh'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refusals_are_one_sentence(call, message):
    with pytest.raises(UsageError, match=message):
        call()


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=IDS)
def test_no_sync_before_the_end(kind, options):
    with torch.device("meta"):
        net, x = kind(3, 4, **options), torch.zeros(12, 2, 3)
    found = lyapunov_exponents(net, x, k=2, warmup=2)
    assert found.by_sample.shape == (2, 2)
    assert np.isnan(found.exponents).all()
    assert np.isnan(jacobian_lag_norms(net, x, [1, 2]).log_norms).all()
