"""Correlations, depth scales and the critical line against closed forms, double quadrature and published numbers."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from gradlab.analysis import phases
from gradlab.analysis.activations import ACTIVATIONS, Activation
from gradlab.analysis.correlations import correlation_fixed_point, correlation_map, depth_scale
from gradlab.analysis.phases import critical_line, phase_diagram
from gradlab.analysis.theory import fixed_point, gradient_gain, length_map
from gradlab.errors import UsageError

ERF = Activation(name="erf", phi=math.erf, derivative=lambda x: 2 / math.sqrt(math.pi) * math.exp(-x * x))
SINE = Activation(name="sine", phi=math.sin, derivative=math.cos)
ALL = sorted(ACTIVATIONS)

# Claim C1.2: tanh, sigma_b^2 = .05: sigma_w^2, c* and xi_c.
PUBLISHED = [
    (1.0, 1.0, 3.63),
    (1.3, 1.0, 7.83),
    (1.5, 1.0, 15.8),
    (2.0, 0.7441, 25.2),
    (2.5, 0.4468, 11.8),
    (3.0, 0.2993, 9.05),
    (4.0, 0.1651, 6.98),
]


def grid_mean(f, q, c):
    """E[f(u) f(v)] by a double trapezoid sum, sharing nothing with the code under test."""
    z = np.linspace(-9.0, 9.0, 1201)
    weight = np.exp(-z * z / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    u = math.sqrt(q) * z
    v = math.sqrt(q) * (c * z[:, None] + math.sqrt(1 - c * c) * z[None, :])
    return float(weight * f(u) @ (f(v) @ weight))


@pytest.mark.parametrize("c", [-0.5, 0.0, 0.6, 0.99, 1.0], ids=str)
def test_correlations_of_erf_and_sine_in_closed_form(c):
    q = fixed_point(ERF, 3.0, 0.2)
    expected = (3 * 2 / math.pi * math.asin(2 * q * c / (1 + 2 * q)) + 0.2) / q
    assert correlation_map(ERF, c, 3.0, 0.2) == pytest.approx(expected, abs=1e-8)
    q = fixed_point(SINE, 2.5, 0.3)
    assert correlation_map(SINE, c, 2.5, 0.3) == pytest.approx(
        (2.5 * math.exp(-q) * math.sinh(q * c) + 0.3) / q, abs=1e-8
    )


@pytest.mark.parametrize("c", [-0.9, 0.0, 0.5, 0.999], ids=str)
def test_kinks_in_closed_form_and_by_quadrature(c):
    # Cho & Saul's arc-cosine kernel.
    angle = math.acos(c)
    expected = (math.sin(angle) + (math.pi - angle) * c) / math.pi
    assert correlation_map("relu", c, 2.0) == pytest.approx(expected, abs=1e-9)
    bare = Activation(name="bare", phi=lambda x: max(x, 0.0), derivative=lambda x: float(x > 0))
    assert correlation_map(bare, c, 2.0) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("c", [0.2, 0.9], ids=str)
@pytest.mark.parametrize(
    ("name", "f"), [("tanh", np.tanh), ("softsign", lambda x: x / (1 + abs(x)))], ids=["tanh", "softsign"]
)
def test_correlations_agree_with_a_double_sum(name, f, c):
    q = fixed_point(name, 4.0, 0.1)
    expected = (4 * grid_mean(f, q, c) + 0.1) / q
    assert correlation_map(name, c, 4.0, 0.1) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("name", ALL)
def test_a_correlation_of_1_stays_and_its_slope_is_chi(name):
    pair = (1.3, 0.1)
    assert correlation_map(name, 1.0, *pair) == pytest.approx(1.0, abs=1e-9)
    near = 1e-4
    slope = (1.0 - correlation_map(name, 1.0 - near, *pair)) / near
    if math.isfinite(fixed_point(name, *pair)):
        # Kinks make the map leave its tangent as the square root of the distance.
        assert slope == pytest.approx(gradient_gain(name, *pair) ** 2, rel=2e-2)


@pytest.mark.parametrize(("weight_var", "c", "scale"), PUBLISHED, ids=lambda value: f"{value:g}")
def test_published_fixed_points_and_scales_of_tanh(weight_var, c, scale):
    assert correlation_fixed_point("tanh", weight_var, 0.05) == pytest.approx(c, abs=6e-5)
    found = depth_scale("tanh", weight_var, 0.05)
    assert found.correlation == pytest.approx(scale, rel=2e-3)
    chi = gradient_gain("tanh", weight_var, 0.05) ** 2
    assert found.gradient == pytest.approx(-1 / math.log(chi), rel=1e-9)
    assert (found.gradient > 0) == (c == 1.0)


def test_iterating_the_map_ends_at_its_fixed_point():
    q, c = fixed_point(ERF, 4.0, 0.1), 0.0
    for _ in range(300):
        c = (4 * 2 / math.pi * math.asin(2 * q * c / (1 + 2 * q)) + 0.1) / q
    assert correlation_fixed_point(ERF, 4.0, 0.1) == pytest.approx(c, abs=1e-7)


def test_without_biases_odd_activations_lose_all_correlation():
    assert correlation_fixed_point("tanh", 3.0) == 0.0
    assert correlation_fixed_point("relu", 4.0) == 1.0  # the length diverges, and correlations still go to 1
    assert correlation_fixed_point("linear", 1.0) == 1.0


def test_scales_are_infinite_where_chi_is_1():
    assert depth_scale("relu", 2.0).gradient == math.inf
    assert depth_scale("relu", 2.0).correlation == math.inf
    assert depth_scale("tanh", 1.0).gradient == math.inf
    assert abs(depth_scale("tanh", critical_line("tanh", 0.05), 0.05).gradient) > 1e6


def test_the_critical_line_of_tanh_and_of_homogeneous_activations():
    assert critical_line("tanh", 0.05) == pytest.approx(1.76095, abs=6e-6)
    assert critical_line("tanh", 0.0) == pytest.approx(1.0, rel=1e-9)
    for bias_var in (0.0, 0.3):
        assert critical_line("relu", bias_var) == 2.0
        assert critical_line("leaky_relu", bias_var) == pytest.approx(2 / (1 + 1e-4), rel=1e-12)
    assert critical_line(lambda x: 3.0, 0.1) == math.inf


@pytest.mark.parametrize(
    ("name", "bias_var"),
    [*((name, 0.1) for name in ALL if ACTIVATIONS[name].slopes is None), ("gelu", 0.0), ("elu", 0.0), ("tanh", 0.0)],
    ids=str,
)
def test_the_critical_line_parts_vanishing_from_exploding(name, bias_var):
    at = critical_line(name, bias_var)
    assert gradient_gain(name, at * (1 - 1e-4), bias_var) < 1.0
    assert gradient_gain(name, at * (1 + 1e-6), bias_var) >= 1.0 - 1e-6


@pytest.mark.parametrize("name", [*ALL, "sine", "cube"])
def test_the_phase_diagram_is_that_of_its_points(name):
    activation = {"sine": SINE, "cube": lambda x: x**3}.get(name, name)
    weights, biases = np.array([0.3, 1.0, 1.9, 4.2]), np.array([0.0, 0.05, 0.4])
    found = phase_diagram(activation, weights, biases)
    for i, weight_var in enumerate(weights):
        for j, bias_var in enumerate(biases):
            q = fixed_point(activation, weight_var, bias_var)
            if name == "hardtanh" and q < 0.02:
                continue  # it comes to rest as exp(-1 / q): where exactly is a matter of rounding
            assert found.length[i, j] == pytest.approx(q, rel=1e-5)
            if math.isfinite(q) or name != "cube":
                assert found.gain[i, j] == pytest.approx(gradient_gain(activation, weight_var, bias_var), rel=1e-5)


def test_a_large_phase_diagram_is_fast_cached_and_read_only():
    phases._moments.cache_clear()
    phases._phase_diagram.cache_clear()
    weights, biases = np.linspace(0.5, 5, 100), np.linspace(0, 0.3, 60)
    started = time.process_time()
    found = phase_diagram("tanh", weights, biases)
    assert time.process_time() - started < 5.0
    assert found.gain.shape == (100, 60)
    assert phase_diagram("tanh", weights, biases) is found
    with pytest.raises(ValueError, match="read-only"):
        found.gain[0, 0] = 0.0
    # The line chi_1 = 1 runs between the points where the gain passes 1.
    crossing = weights[np.argmax(found.gain[:, 10] >= 1.0)]
    assert crossing - 0.05 <= critical_line("tanh", biases[10]) <= crossing


def test_length_map_rests_at_the_lengths_of_the_diagram():
    found = phase_diagram("gelu", [1.0, 2.0], [0.1, 0.3])
    for i, weight_var in enumerate(found.weight_var):
        for j, bias_var in enumerate(found.bias_var):
            q = float(found.length[i, j])
            assert length_map("gelu", q, weight_var, bias_var) == pytest.approx(q, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: correlation_map("tanh", 1.5, 1.0), "c is 1.5"),
        (lambda: correlation_map("tanh", math.nan, 1.0), "c is nan"),
        (lambda: correlation_fixed_point("tanhh", 1.0), "Did you mean 'tanh'"),
        (lambda: depth_scale("tanh", -1.0), "weight_var is -1.0"),
        (lambda: critical_line("tanh", -1.0), "bias_var is -1.0"),
        (lambda: phase_diagram("tanh", [], [0.1]), "weight_var has shape (0,)"),
        (lambda: phase_diagram("tanh", [1.0], 0.1), "bias_var has shape ()"),
        (lambda: phase_diagram("tanh", ["a"], [0.1]), "must be a list of numbers"),
        (lambda: phase_diagram("tanh", [0.0], [0.1]), "weight_var is 0.0"),
        (lambda: phase_diagram("tanh", [1.0], [math.nan]), "bias_var is nan"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_values_are_told_in_one_sentence(call, says):
    with pytest.raises(UsageError) as told:
        call()
    assert says in str(told.value)
