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


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_batchnorm_gain_against_a_real_net(name):
    rng = np.random.default_rng(3)
    phi = {"relu": lambda x: np.maximum(x, 0), "tanh": np.tanh}[name]
    slope = {"relu": lambda x: (x > 0) * 1.0, "tanh": lambda x: 1 - np.tanh(x) ** 2}[name]
    batch, width, depth = 256, 256, 20
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
    measured = math.exp(np.polyfit(np.arange(4, 18), log_square[4:18], 1)[0])
    assert measured == pytest.approx(batchnorm_gradient_gain(name) ** 2, rel=0.04)


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
