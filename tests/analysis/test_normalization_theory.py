"""Closed forms of normalized and residual nets against real nets and the published numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradlab.analysis.activations import Activation, piecewise_linear
from gradlab.analysis.normalization_theory import (
    batchnorm_gradient_gain,
    residual_batchnorm_share,
    residual_variance_growth,
)
from gradlab.errors import UsageError

ERF = Activation(name="erf", phi=math.erf, derivative=lambda x: 2 / math.sqrt(math.pi) * math.exp(-x * x))
KINKED = Activation(name="relu, slopes unsaid", phi=lambda x: max(x, 0.0), derivative=lambda x: float(x > 0))


def test_batchnorm_gain_of_relu_is_the_root_of_the_folk_number():
    assert batchnorm_gradient_gain() == pytest.approx(math.sqrt(math.pi / (math.pi - 1)), rel=1e-12)
    assert batchnorm_gradient_gain(KINKED) == pytest.approx(batchnorm_gradient_gain("relu"), rel=1e-10)
    assert batchnorm_gradient_gain("linear") == pytest.approx(1.0, rel=1e-12)


def test_batchnorm_gain_of_tanh_is_within_two_per_cent_of_the_measurement():
    assert batchnorm_gradient_gain("tanh") ** 2 == pytest.approx(1.197, rel=0.02)


def test_batchnorm_gain_of_erf_in_closed_form():
    expected = (4 / math.pi / math.sqrt(5)) / (2 / math.pi * math.asin(2 / 3))
    assert batchnorm_gradient_gain(ERF) ** 2 == pytest.approx(expected, rel=1e-10)


def log_square_gain(name, rng, *, batch, width, depth):
    """ln of the factor a layer on the squared gradient at normalized tensors of one net, backward written out."""
    phi = {"relu": lambda x: np.maximum(x, 0), "tanh": np.tanh}[name]
    slope = {"relu": lambda x: (x > 0) * 1.0, "tanh": lambda x: 1 - np.tanh(x) ** 2}[name]
    h, layers = rng.standard_normal((batch, width)), []
    for _ in range(depth):
        sd = h.std(0)
        z = (h - h.mean(0)) / sd
        W = rng.standard_normal((width, width)) / math.sqrt(width)
        layers.append((z, sd, W))
        h = phi(z) @ W.T
    g, log_square = rng.standard_normal(h.shape), []
    for z, sd, W in reversed(layers):
        g = (g @ W) * slope(z)
        log_square.append(math.log(np.sum(g * g)))
        g = (g - g.mean(0) - z * (g * z).mean(0)) / sd
    return np.polyfit(np.arange(4, depth - 2), log_square[4 : depth - 2], 1)[0]


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_batchnorm_gain_against_a_real_net(name):
    measured = math.exp(log_square_gain(name, np.random.default_rng(3), batch=256, width=256, depth=20))
    assert measured == pytest.approx(batchnorm_gradient_gain(name) ** 2, rel=0.04)


@pytest.mark.parametrize("name", ["relu", "tanh", "linear"])
@pytest.mark.parametrize("batch", [6, 16], ids=["batch-6", "batch-16"])
def test_finite_batch_gain_against_a_channel_drawn_at_random(name, batch):
    # One layer by hand: Gaussian channels over a batch of equal correlation, BatchNorm's Jacobian as a full matrix,
    # the gradient behind it drawn with the covariance of the fixed point. Width is infinite: channels are independent.
    rng = np.random.default_rng(5)
    draws = 40_000
    phi = {"relu": lambda x: np.maximum(x, 0), "tanh": np.tanh, "linear": lambda x: x}[name]
    slope = {"relu": lambda x: (x > 0) * 1.0, "tanh": lambda x: 1 - np.tanh(x) ** 2, "linear": np.ones_like}[name]
    h = rng.standard_normal((draws, batch))
    h -= h.mean(1, keepdims=True)
    sd = h.std(1, keepdims=True)
    z = h / sd
    spread = np.sum((phi(z) - phi(z).mean(1, keepdims=True)) ** 2, axis=1).mean() / (batch - 1)
    g = rng.standard_normal((draws, batch))
    g = slope(z) * (g - g.mean(1, keepdims=True))  # of covariance P, then through phi
    g = (g - g.mean(1, keepdims=True) - z * (g * z).mean(1, keepdims=True)) / sd  # torch's backward, written out
    squares = np.sum(g * g, axis=1) / (batch - 1)
    measured, error = squares.mean() / spread, squares.std() / spread / math.sqrt(draws)
    assert abs(measured - batchnorm_gradient_gain(name, batch_size=batch) ** 2) < 4 * error
    assert error < 0.03


def test_finite_batch_gain_in_closed_form():
    for batch in (4, 5, 8, 128):
        expected = (batch - 2) / (batch - 3)
        assert batchnorm_gradient_gain("linear", batch_size=batch) ** 2 == pytest.approx(expected, rel=1e-12)
    smooth = Activation(name="linear, slopes unsaid", phi=lambda x: x, derivative=lambda x: 1.0)
    assert batchnorm_gradient_gain(smooth, batch_size=6) ** 2 == pytest.approx(4 / 3, rel=1e-10)
    assert batchnorm_gradient_gain(KINKED, batch_size=16) == pytest.approx(
        batchnorm_gradient_gain("relu", batch_size=16), rel=1e-2
    )


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_finite_batch_gain_ends_at_that_of_the_infinite_batch(name):
    gains = [batchnorm_gradient_gain(name, batch_size=batch) for batch in (8, 32, 128, 100_000)]
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] == pytest.approx(batchnorm_gradient_gain(name), rel=3e-5)


@pytest.mark.parametrize(("name", "batch"), [("relu", 8), ("tanh", 16)])
def test_finite_batch_gain_against_a_real_net(name, batch):
    rng = np.random.default_rng(3)
    measured = math.exp(np.mean([log_square_gain(name, rng, batch=batch, width=384, depth=24) for _ in range(4)]))
    assert measured == pytest.approx(batchnorm_gradient_gain(name, batch_size=batch) ** 2, rel=0.03)
    assert measured > 1.03 * batchnorm_gradient_gain(name) ** 2  # the infinite batch would not do


def test_constant_activation_has_no_batchnorm_gain():
    with pytest.raises(UsageError, match="constant"):
        batchnorm_gradient_gain(piecewise_linear(0.0, 0.0))


def test_residual_closed_forms():
    assert [residual_batchnorm_share(block) for block in (10, 25, 50)] == pytest.approx(
        [0.0909, 0.0385, 0.0196], abs=6e-5
    )
    assert residual_variance_growth(50) == pytest.approx(2.0**50, rel=1e-12)
    assert residual_variance_growth(50, normalized=True) == 51.0
    assert residual_variance_growth(0) == residual_variance_growth(9, branch_scale=0.0) == 1.0
    blocks = 10_000
    assert residual_variance_growth(blocks, branch_scale=blocks**-0.5) == pytest.approx(math.e, rel=1e-4)


def test_residual_share_is_one_branch_of_the_normalized_variance():
    for block in (1, 7):
        assert residual_batchnorm_share(block) == 1 / residual_variance_growth(block, normalized=True)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: batchnorm_gradient_gain("gelu?"), "Unknown activation"),
        (lambda: batchnorm_gradient_gain("relu", batch_size=3), "batch_size is 3, but it must be a whole number"),
        (lambda: batchnorm_gradient_gain(piecewise_linear(0.0, 0.0), batch_size=8), "constant"),
        (lambda: residual_batchnorm_share(0), "block is 0"),
        (lambda: residual_variance_growth(-1), "blocks is -1"),
        (lambda: residual_variance_growth(1, branch_scale=math.nan), "branch_scale is nan"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_values_are_told_in_one_sentence(call, says):
    with pytest.raises(UsageError) as told:
        call()
    assert says in str(told.value)
