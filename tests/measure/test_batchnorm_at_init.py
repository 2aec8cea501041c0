"""BatchNorm at initialization: the explosion rate, the downscaled branch and shattered gradients, against theory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gradlab.analysis.normalization_theory import batchnorm_gradient_gain, residual_batchnorm_share
from gradlab.measure.batchnorm import batchnorm_explosion, residual_branch_share, shattering


def squared_gain(log_norms, first=5, last=35):
    places = np.arange(first, last + 1)
    return math.exp(-2 * np.polyfit(places, log_norms[first - 1 : last], 1)[0])


def naive_log_norms(width, batch_size, depth, seed, scale=1.0):
    """The same net by hand: the same draws, BatchNorm written out, autograd at the normalized tensors."""
    from gradlab.measure.initialization import initialized
    from gradlab.nets import MLP

    net = MLP(depth, width=width, in_features=width, classes=1, norm="batch", bias=False)
    drawn = initialized(net, "he_normal", seed=3 * seed).state_dict()
    matrices = [drawn["stem.linear.weight"]] + [drawn[f"blocks.{i}.branch.linear.weight"] for i in range(depth - 1)]
    h = torch.randn(batch_size, width, generator=torch.Generator().manual_seed(3 * seed + 1), dtype=torch.float64)
    kept = []
    for matrix in matrices:
        z = h @ (scale * matrix).T
        z = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()
        z.requires_grad_(True)
        z.retain_grad()
        kept.append(z)
        h = z.clamp(min=0)
    noise = torch.randn(h.shape, generator=torch.Generator().manual_seed(3 * seed + 2), dtype=torch.float64)
    (h * noise).sum().backward()
    return np.log([float(z.grad.norm()) for z in kept])


def test_explosion_equals_a_naive_net():
    found = batchnorm_explosion(width=16, batch_size=12, depth=9, seed=3)
    np.testing.assert_allclose(found, naive_log_norms(16, 12, 9, 3), rtol=1e-9)


def test_the_scale_of_the_weights_drops_out():
    # BN(aWx) = BN(Wx) but for eps.
    np.testing.assert_allclose(naive_log_norms(16, 12, 9, 3, scale=3.0), naive_log_norms(16, 12, 9, 3), atol=1e-3)


def test_relu_explodes_at_pi_over_pi_minus_one():
    gain = squared_gain(batchnorm_explosion(width=512, batch_size=128, depth=40, seed=0))
    assert gain == pytest.approx(math.pi / (math.pi - 1), rel=0.02)
    assert gain == pytest.approx(batchnorm_gradient_gain("relu") ** 2, rel=0.02)


@pytest.mark.parametrize(("activation", "measured_before"), [("tanh", 1.197), ("linear", 1.0105)])
def test_other_activations_explode_less(activation, measured_before):
    gain = squared_gain(batchnorm_explosion(width=256, batch_size=128, depth=40, seed=0, activation=activation))
    assert gain == pytest.approx(measured_before, rel=0.02)
    assert gain == pytest.approx(batchnorm_gradient_gain(activation) ** 2, rel=0.02)


def test_explosion_repeats_by_seed():
    a, b, c = (batchnorm_explosion(width=8, batch_size=8, depth=4, seed=seed) for seed in (1, 1, 2))
    assert a.shape == (4,)
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c)


def test_the_branch_is_downscaled_to_one_over_depth():
    shares = np.mean(
        [residual_branch_share(width=256, batch_size=256, blocks=30, seed=seed) for seed in (0, 1)], axis=0
    )
    assert shares.shape == (30,)
    for block in range(10, 31):
        assert shares[block - 1] == pytest.approx(1 / (block + 1), rel=0.10)
        assert residual_batchnorm_share(block) == pytest.approx(1 / (block + 1))
    assert abs(shares[9] * 11 - 1) > 0.001  # measured, not computed


def test_the_branch_share_repeats_by_seed():
    a, b, c = (residual_branch_share(width=8, batch_size=8, blocks=3, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c)


# -- shattered gradients ----------------------------------------------------------------------------------------------


def acf(seeds=3, **settings):
    return np.mean([shattering(seed=seed, **settings) for seed in range(seeds)], axis=0)


def test_deep_plain_nets_shatter_and_residual_ones_do_not():
    shallow, deep = acf(depth=4, residual=False), acf(depth=24, residual=False)
    small, full = acf(depth=50, residual=True, beta=0.1), acf(depth=50, residual=True, beta=1.0)
    assert shallow[1] > 0.7
    assert abs(deep[1]) < 0.15
    assert small[1] > 0.8
    assert deep[1] < full[1] < small[1]
    assert shallow[1] > shallow[5]  # it falls with the lag


def test_autocorrelation_is_one_at_lag_zero_and_bounded():
    found = shattering(depth=3, seed=0, residual=False, width=20, points=64, lags=10)
    assert found.shape == (11,)
    assert found[0] == 1.0
    assert (np.abs(found) <= 1).all()


def test_autocorrelation_equals_a_naive_one():
    # The gradient by central differences: each point's own derivative, BatchNorm's coupling of the points included.
    depth, seed, width, points = 2, 5, 6, 12

    def total(x):
        generator = torch.Generator().manual_seed(seed)

        def draw(rows, columns, variance):
            return torch.randn(rows, columns, generator=generator, dtype=torch.float64) * math.sqrt(variance)

        h = (x[:, None] @ draw(1, width, 1.0)).clamp(min=0)
        for _ in range(depth):
            z = h @ draw(width, width, 2 / width)
            h = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()).clamp(min=0)
        return float((h @ draw(width, 1, 1 / width)).sum())

    x = torch.linspace(-2, 2, points, dtype=torch.float64)
    step = 1e-6 * torch.eye(points, dtype=torch.float64)
    g = np.array([(total(x + row) - total(x - row)) / 2e-6 for row in step])
    g -= g.mean()
    expected = [sum(g[i] * g[i + lag] for i in range(points - lag)) / sum(g * g) for lag in range(4)]
    found = shattering(depth=depth, seed=seed, residual=False, width=width, points=points, lags=3)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_shattering_repeats_by_seed():
    a, b, c = (shattering(depth=2, seed=seed, residual=True, width=8, points=16, lags=3) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c)


# -- growth along residual blocks -------------------------------------------------------------------------------------


def test_growth_equals_a_naive_net():
    from gradlab.measure.batchnorm import residual_growth

    width, batch, blocks, seed, alpha = 5, 7, 3, 4, 0.6
    signal, gradient = residual_growth(
        width=width, batch_size=batch, blocks=blocks, seed=seed, normalized=True, branch_scale=alpha
    )
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    states = [draw(batch, width)]
    matrices = [draw(width, width) * math.sqrt(2 / width) for _ in range(blocks)]
    noise = draw(batch, width)

    def step(h, matrix):
        z = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()
        return h + alpha * z.clamp(min=0) @ matrix

    for matrix in matrices:
        states.append(step(states[-1], matrix))
    squares = [float((state**2).mean()) for state in states]
    np.testing.assert_allclose(signal, np.array(squares) / squares[0], rtol=1e-10)
    g, back = noise, [float((noise**2).mean())]
    for matrix, h in zip(reversed(matrices), reversed(states[:-1]), strict=True):
        g = torch.autograd.functional.vjp(lambda x, matrix=matrix: step(x, matrix), h, g)[1]
        back.append(float((g**2).mean()))
    np.testing.assert_allclose(gradient, np.array(back[::-1]) / back[0], rtol=1e-10)


@pytest.mark.parametrize(
    ("how", "expected"),
    [({"normalized": False}, 2.0**20), ({"normalized": True}, 21.0), ({"normalized": False, "branch_scale": 0.0}, 1.0)],
    ids=["none", "batchnorm", "skipinit"],
)
def test_growth_against_theory(how, expected):
    from gradlab.measure.batchnorm import residual_growth

    found = [residual_growth(width=256, batch_size=64, blocks=20, seed=seed, **how)[0][-1] for seed in range(3)]
    assert np.exp(np.mean(np.log(found))) == pytest.approx(expected, rel=0.25)


def test_without_normalization_he_keeps_the_gradient():
    bare = batchnorm_explosion(width=256, batch_size=32, depth=30, seed=0, norm="none")
    assert bare.shape == (30,)
    assert squared_gain(bare, 3, 27) == pytest.approx(1.0, abs=0.05)
