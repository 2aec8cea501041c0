"""Mean-field gains against closed forms, brute-force trapezoid sums and the published numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradlab.analysis.activations import ACTIVATIONS, Activation, gaussian_mean, piecewise_linear
from gradlab.analysis.theory import (
    fixed_point,
    gain_profile,
    gradient_gain,
    length_map,
    valid_tap_fraction,
    vgg_b_he_ratio,
)
from gradlab.errors import UsageError

ERF = Activation(name="erf", phi=math.erf, derivative=lambda x: 2 / math.sqrt(math.pi) * math.exp(-x * x))
SINE = Activation(name="sine", phi=math.sin, derivative=math.cos)
KINKED = Activation(name="relu, slopes unsaid", phi=lambda x: max(x, 0.0), derivative=lambda x: float(x > 0))


def trapezoid_mean(values_of, variance):
    """E[f(sqrt(variance) z)] by a fine trapezoid sum, sharing nothing with the code under test."""
    z = np.linspace(-12.0, 12.0, 48_001)
    weight = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return float(np.sum(values_of(math.sqrt(variance) * z) * weight) * (z[1] - z[0]))


# Theory column of claim C1.1 at sigma_w^2 = 1/3 (torch's default), 1 (LeCun), 2 (He), 4.
PUBLISHED = {
    "sigmoid": (0.1414, 0.2361, 0.3178, 0.4142),
    "tanh": (0.5774, 1.0, 1.0514, 1.1673),  # at 1 the net is critical: q* = 0, gain exactly 1
    "relu": (0.4082, 0.7071, 1.0, 1.4142),
    "linear": (0.5774, 1.0, 1.4142, 2.0),
}


@pytest.mark.parametrize(
    ("name", "weight_var", "gain"),
    [
        pytest.param(name, weight_var, gain, id=f"{name}-{weight_var:.2f}")
        for name, gains in PUBLISHED.items()
        for weight_var, gain in zip((1 / 3, 1.0, 2.0, 4.0), gains, strict=True)
    ],
)
def test_gain_of_the_published_table(name, weight_var, gain):
    assert gradient_gain(name, weight_var) == pytest.approx(gain, abs=6e-5)


@pytest.mark.parametrize("weight_var", [1.0, 2.0, 4.0, 40.0], ids=str)
@pytest.mark.parametrize(
    ("name", "phi", "slope"),
    [
        pytest.param("tanh", np.tanh, lambda x: 1 / np.cosh(x) ** 2, id="tanh"),
        pytest.param("sigmoid", lambda x: 1 / (1 + np.exp(-x)), lambda x: 0.25 / np.cosh(x / 2) ** 2, id="sigmoid"),
    ],
)
def test_gain_equals_that_of_the_iterated_length_map(name, phi, slope, weight_var):
    bias_var = 0.05
    q = 1.0
    for _ in range(300):
        q = weight_var * trapezoid_mean(lambda x: phi(x) ** 2, q) + bias_var
    gain = math.sqrt(weight_var * trapezoid_mean(lambda x: slope(x) ** 2, q))
    assert fixed_point(name, weight_var, bias_var) == pytest.approx(q, rel=1e-8)
    assert gradient_gain(name, weight_var, bias_var) == pytest.approx(gain, rel=1e-8)


@pytest.mark.parametrize("q", [1e-12, 1e-3, 1.0, 50.0, 1e6], ids=str)
def test_gaussian_means_of_erf_in_closed_form(q):
    square = 2 / math.pi * math.asin(2 * q / (1 + 2 * q))
    assert length_map(ERF, q, 3.0, 0.5) == pytest.approx(3 * square + 0.5, rel=1e-10)
    assert gaussian_mean(lambda x: ERF.derivative(x) ** 2, q) == pytest.approx(
        4 / math.pi / math.sqrt(1 + 4 * q), rel=1e-10
    )


def test_sine_rests_where_its_closed_form_says():
    q = fixed_point(SINE, 2.5, 0.3)
    assert q == pytest.approx(2.5 * (1 - math.exp(-2 * q)) / 2 + 0.3, rel=1e-10)
    assert gradient_gain(SINE, 2.5, 0.3) ** 2 == pytest.approx(2.5 * (1 + math.exp(-2 * q)) / 2, rel=1e-9)


@pytest.mark.parametrize(
    ("weight_var", "chi"),
    [(1.0, 0.7590), (1.3, 0.8802), (1.5, 0.9386), (1.76095, 1.0), (2.0, 1.0477), (3.0, 1.2089), (4.0, 1.3424)],
    ids=str,
)
def test_order_chaos_line_of_tanh(weight_var, chi):
    assert gradient_gain("tanh", weight_var, 0.05) ** 2 == pytest.approx(chi, abs=6e-5)


def test_critical_tanh_falls_as_a_power_of_depth():
    profile = np.log(gain_profile("tanh", 1.0, depth=50))
    log_norm = np.cumsum(profile[::-1])[::-1]
    layers = np.arange(10, 41)
    assert math.exp(-np.polyfit(layers, log_norm[9:40], 1)[0]) == pytest.approx(0.9773, abs=6e-5)
    assert math.exp(profile[:-1].sum()) == pytest.approx(0.121, abs=5e-4)
    # q_l ~ 1/(2l) makes g_l grow as the square root of l.
    late = np.log(gain_profile("tanh", 1.0, depth=2000))[1000:].sum()
    assert late == pytest.approx(-0.5 * math.log(2.0), rel=1e-2)


def test_gain_profile_ends_at_the_fixed_point():
    assert gain_profile("tanh", 2.0, depth=60)[-1] == pytest.approx(gradient_gain("tanh", 2.0), rel=1e-9)


@pytest.mark.parametrize(
    ("weight_var", "bias_var", "length"),
    [(1.0, 0.5, 1.0), (1.0, 0.0, 0.0), (2.0, 0.0, 7.0), (2.0, 0.1, math.inf), (4.0, 0.0, math.inf)],
    ids=str,
)
@pytest.mark.parametrize("activation", [ACTIVATIONS["relu"], KINKED], ids=["closed form", "quadrature"])
def test_relu_lengths_and_gains(activation, weight_var, bias_var, length):
    assert fixed_point(activation, weight_var, bias_var, start=7.0) == pytest.approx(length, rel=1e-10)
    assert gradient_gain(activation, weight_var, bias_var) == pytest.approx(math.sqrt(weight_var / 2), rel=1e-9)


def test_smooth_rectifier_diverges_with_the_gain_of_its_slopes():
    softplus = Activation(
        name="softplus", phi=lambda x: float(np.logaddexp(0.0, x)), derivative=lambda x: 0.5 * (1 + math.tanh(x / 2))
    )
    assert fixed_point(softplus, 4.0) == math.inf
    assert gradient_gain(softplus, 4.0) == pytest.approx(math.sqrt(2.0), rel=1e-6)


def test_overflowing_activation_diverges_quietly():
    exponential = Activation(name="exp", phi=math.exp, derivative=math.exp)
    assert fixed_point(exponential, 1.0) == math.inf
    numpy_exponential = Activation(name="exp", phi=np.exp, derivative=np.exp)
    assert fixed_point(numpy_exponential, 1.0) == math.inf


def test_starting_from_no_length_at_all():
    assert fixed_point("tanh", 2.0, start=0.0) == 0.0
    assert fixed_point("relu", 4.0, start=0.0) == 0.0
    assert fixed_point("tanh", 2.0, 0.1, start=0.0) == pytest.approx(fixed_point("tanh", 2.0, 0.1), rel=1e-10)


@pytest.mark.parametrize(
    ("slopes", "gains"),
    [((1.5, 1.5), (0.8660, 1.5, 2.1213, 3.0)), ((0.2, 1.5), (0.6178, 1.0700, 1.5133, 2.1401))],
    ids=["identity*1.5", "leaky(.2, 1.5)"],
)
def test_steeper_slopes_of_the_published_table(slopes, gains):
    activation = piecewise_linear(*slopes)
    assert [gradient_gain(activation, w) for w in (1 / 3, 1.0, 2.0, 4.0)] == pytest.approx(gains, abs=6e-5)


def test_leaky_relu_has_torch_s_default_slope():
    assert gradient_gain("leaky_relu", 2.0) == pytest.approx(math.sqrt(1 + 0.01**2), rel=1e-12)


def test_vgg_b_ratio_by_hand_and_from_the_rounded_factors():
    assert vgg_b_he_ratio() == pytest.approx(16_728.76, abs=5e-3)
    factors = {64: (5.9, 1), 128: (4.2, 2), 256: (2.9, 2), 512: (2.1, 4)}
    assert math.prod(rounded**count for rounded, count in factors.values()) == pytest.approx(17_023, abs=1)
    exact = 1.0
    for channels, (rounded, count) in factors.items():
        factor = math.sqrt(2 / (9 * channels)) / 0.01
        assert round(factor, 1) == rounded
        exact *= factor**count
    assert vgg_b_he_ratio() == pytest.approx(exact, rel=1e-12)
    # Fan-in would weigh the widths 2, 2, 2, 3 times and miss the published product by a factor 2.8.
    fan_in = math.prod(math.sqrt(2 / (9 * c)) / 0.01 for c in (64, 64, 128, 128, 256, 256, 512, 512, 512))
    assert fan_in / exact == pytest.approx(math.sqrt(8), rel=1e-12)
    assert vgg_b_he_ratio(0.02) == pytest.approx(exact / 2**9, rel=1e-12)


@pytest.mark.parametrize(("size", "fraction"), [(4, 0.694), (8, 0.840)], ids=str)
def test_valid_taps_of_the_published_sizes(size, fraction):
    assert valid_tap_fraction(size) == pytest.approx(fraction, abs=5e-4)
    assert valid_tap_fraction(size) == pytest.approx(((3 - 2 / size) / 3) ** 2, rel=1e-12)


@pytest.mark.parametrize(("size", "kernel"), [(1, 3), (2, 5), (5, 7), (9, 1), (6, 5)], ids=str)
def test_valid_taps_against_counting_with_a_padded_image(size, kernel):
    half = kernel // 2
    padded = np.pad(np.ones((size, size)), half)
    count = sum(padded[i : i + kernel, j : j + kernel].sum() for i in range(size) for j in range(size))
    assert valid_tap_fraction(size, kernel) == pytest.approx(count / (size * kernel) ** 2, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: gradient_gain("tanhh", 1.0), "Did you mean 'tanh'"),
        (lambda: gradient_gain("tanh", 0.0), "weight_var is 0.0"),
        (lambda: gradient_gain("tanh", math.nan), "weight_var is nan"),
        (lambda: gradient_gain("tanh", 1.0, -1.0), "bias_var is -1.0"),
        (lambda: length_map("tanh", -1.0, 1.0), "q is -1.0"),
        (lambda: fixed_point("tanh", 1.0, start=math.inf), "start is inf"),
        (lambda: gain_profile("tanh", 1.0, depth=0), "depth is 0"),
        (lambda: vgg_b_he_ratio(0.0), "std is 0.0"),
        (lambda: valid_tap_fraction(0), "size is 0"),
        (lambda: valid_tap_fraction(4, 2), "kernel is 2"),
        (lambda: valid_tap_fraction(True), "size is True"),
        (lambda: piecewise_linear(math.inf), "must be finite"),
        (
            lambda: length_map(Activation(name="bad", phi=lambda x: math.nan, derivative=abs), 1.0, 1.0),
            "finite everywhere",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_values_are_told_in_one_sentence(call, says):
    with pytest.raises(UsageError) as told:
        call()
    assert says in str(told.value)
