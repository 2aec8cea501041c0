"""Nets by name: the right weights, the rate of naive autograd, and names that mean nothing."""

import numpy as np
import pytest
import torch

from gradlab.errors import UsageError
from gradlab.measure.forgetting import attention_path, forgetting, spread_lags
from gradlab.measure.lyapunov import jacobian_lag_norms

PHI = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}


@pytest.mark.parametrize("kind", PHI, ids=str)
def test_vanilla_norms_are_those_of_the_net_and_inputs_it_names(kind):
    found = forgetting(f"{kind} 1.3", hidden=7, steps=25, warmup=5, batch_size=3, seed=4)
    w = torch.tensor(found.weight)
    x = torch.randn(30, 3, 7, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 0.5
    h, states = torch.zeros(3, 7, dtype=torch.float64, requires_grad=True), []
    for drive in x:
        h = PHI[kind](h @ w.T + drive)
        states.append(h)
    v = jacobian_lag_norms(lambda drive, state: state, x, [0], state_size=7, seed=4)  # the identity keeps v's norm
    np.testing.assert_allclose(found.log_norms[0], v.log_norms.mean(), rtol=1e-12)
    # Between lags the log norm changes by a mean over samples of what the Jacobians can do to any vector.
    for near, far, change in zip(found.lags, found.lags[1:], np.diff(found.log_norms), strict=False):
        bounds = []
        for sample in range(3):
            rows = [torch.autograd.grad(states[-1 - near][sample, k], states[-1 - far], retain_graph=True)[0][sample]
                    for k in range(7)]  # fmt: skip
            values = torch.linalg.svdvals(torch.stack(rows))
            bounds.append((values[-1].log().item(), values[0].log().item()))
        low, high = np.mean(bounds, axis=0)
        assert low - 1e-9 <= change <= high + 1e-9


def test_weights_are_what_the_name_says():
    gaussian = forgetting("tanh 2", hidden=64, steps=20, warmup=0).weight
    assert gaussian.std() * 8 == pytest.approx(2, rel=0.05)
    orthogonal = forgetting("orthogonal 1.5", hidden=16, steps=20, warmup=0).weight
    np.testing.assert_allclose(orthogonal @ orthogonal.T, 2.25 * np.eye(16), atol=1e-5)


def test_rate_equals_the_lyapunov_exponent_and_the_table():
    found = forgetting("tanh 1", hidden=128, steps=300, warmup=50, seed=0)
    kept = (found.lags >= 20) & (found.lags <= 225)
    rate = np.polyfit(found.lags[kept], found.log_norms[kept], 1)[0]
    assert np.exp(rate) == pytest.approx(np.exp(found.exponent), rel=0.02)
    assert np.exp(rate) == pytest.approx(0.762, rel=0.05)


def test_a_float32_lstm_is_followed_far_below_the_smallest_float():
    found = forgetting("lstm default", hidden=16, steps=600, warmup=10, batch_size=2)
    assert found.log_norms[-1] / np.log(10) < -60
    assert np.isfinite(found.log_norms).all()


@pytest.mark.parametrize("net", ["lstm bias 2", "gru bias 2", "gru chrono 50"], ids=str)
def test_open_gates_remember_longer_than_default_ones(net):
    options = {"hidden": 16, "steps": 60, "warmup": 10, "batch_size": 2}
    kind = net.partition(" ")[0]
    assert forgetting(net, **options).exponent > forgetting(f"{kind} default", **options).exponent


def test_attention_reaches_every_lag_alike_and_only_the_past():
    lags, log_norms = attention_path(steps=80, seed=1)
    assert lags.tolist() == list(range(80))
    assert abs(np.polyfit(lags[5:60], log_norms[5:60], 1)[0]) < 0.01


@pytest.mark.parametrize("net", ["elu 1", "lstm peephole", "rnn"], ids=str)
def test_unknown_nets_are_one_sentence(net):
    with pytest.raises(UsageError, match="Unknown"):
        forgetting(net, hidden=4, steps=20)


def test_lags_begin_at_0_end_at_the_last_and_are_few():
    lags = spread_lags(10_000)
    assert lags[0] == 0
    assert lags[-1] == 10_000
    assert lags == sorted(set(lags))
    assert len(lags) <= 60


@pytest.mark.parametrize("kind", ["tanh", "relu", "orthogonal"])
def test_exponents_are_those_of_the_step_written_out(kind):
    from gradlab.measure.lyapunov import lyapunov_exponents

    found = forgetting(f"{kind} 1.1", hidden=24, steps=60, warmup=10, batch_size=3, seed=2)
    w, phi = torch.tensor(found.weight), torch.relu if kind == "relu" else torch.tanh
    x = torch.randn(70, 3, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 0.5
    want = lyapunov_exponents(lambda drive, h: phi(h @ w.T + drive), x, warmup=10, state_size=24, seed=2)
    assert found.exponent == pytest.approx(float(want.exponents[0]), rel=1e-9)
    assert found.exponent_error == pytest.approx(float(want.standard_errors[0]), rel=1e-9, nan_ok=True)
