"""Decay fits on curves whose law and rate are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from gradlab.analysis.decay import fit_decay
from gradlab.errors import UsageError

LAYERS = np.arange(1, 51)


@pytest.mark.parametrize("gain", [0.14, 0.9, 1.3], ids=str)
def test_exact_exponential(gain):
    fit = fit_decay(LAYERS, 2.0 + LAYERS * math.log(gain))
    assert fit.best == "exponential"
    assert (fit.gain, fit.intercept) == pytest.approx((gain, 2.0), rel=1e-12)
    assert (fit.gain_low, fit.gain_high, fit.r_squared) == pytest.approx((gain, gain, 1.0), rel=1e-9)
    assert (fit.depth_low, fit.depth_high, fit.seeds, fit.points, fit.dropped) == (1, 50, 1, 50, 0)
    assert fit.slopes == (fit.slope,)


def test_backward_gain_of_norms_listed_from_the_input():
    depth = 50
    log_norm = (depth - LAYERS) * math.log(0.8) + np.random.default_rng(0).normal(0, 0.1, (4, depth))
    backward, forward = fit_decay(LAYERS, log_norm, backward=True), fit_decay(depth - LAYERS, log_norm)
    assert backward.gain == pytest.approx(0.8, rel=2e-3)
    assert (backward.gain, backward.gain_low, backward.gain_high) == pytest.approx(
        (forward.gain, forward.gain_low, forward.gain_high), rel=1e-10
    )
    assert backward.gain_low < backward.gain < backward.gain_high
    assert backward.slope == pytest.approx(-forward.slope, rel=1e-10)


@pytest.mark.parametrize("exponent", [0.5, -1.5], ids=str)
def test_exact_power_law(exponent):
    fit = fit_decay(LAYERS, 1.0 + exponent * np.log(LAYERS))
    assert fit.best == "power law"
    assert (fit.exponent, fit.power_intercept, fit.power_r_squared) == pytest.approx((exponent, 1.0, 1.0), rel=1e-12)
    assert fit.r_squared < 0.98


@pytest.mark.parametrize("level", [0.0, -81.3, 1e-9], ids=str)
def test_constant_curve_is_flat_and_has_no_r_squared(level):
    fit = fit_decay(LAYERS, np.full((3, 50), level))
    assert fit.best == "flat"
    assert (fit.slope, fit.gain, fit.exponent) == (0.0, 1.0, 0.0)
    assert math.isnan(fit.r_squared)


def test_perfect_line_that_hardly_changes_is_flat():
    fit = fit_decay(LAYERS, LAYERS * 0.02)
    assert fit.best == "flat"
    assert fit.r_squared == pytest.approx(1.0)
    assert fit_decay(LAYERS, LAYERS * 0.0205).best == "exponential"


def test_noise_at_criticality_is_flat():
    assert fit_decay(LAYERS, np.random.default_rng(1).normal(0, 0.3, (5, 50))).best == "flat"


def test_changing_curve_that_no_law_fits_is_unclear():
    assert fit_decay(LAYERS, np.where(LAYERS < 25, 0.0, -20.0)).best == "unclear"


def test_power_law_is_left_out_where_depth_starts_at_zero():
    fit = fit_decay(np.arange(20), np.arange(20) * -0.5)
    assert fit.best == "exponential"
    assert math.isnan(fit.exponent)
    assert np.isnan(fit.exponents).all()


def test_one_seed_agrees_with_scipy_linregress():
    log_norm = LAYERS * -0.2 + np.random.default_rng(2).normal(0, 0.5, 50)
    fit, reference = fit_decay(LAYERS, log_norm, confidence=0.9), stats.linregress(LAYERS, log_norm)
    reach = stats.t.ppf(0.95, 48) * reference.stderr
    assert (fit.slope, fit.intercept) == pytest.approx((reference.slope, reference.intercept), rel=1e-10)
    assert fit.r_squared == pytest.approx(reference.rvalue**2, rel=1e-10)
    assert (fit.slope_low, fit.slope_high) == pytest.approx(
        (reference.slope - reach, reference.slope + reach), rel=1e-9
    )
    power = stats.linregress(np.log(LAYERS), log_norm)
    assert (fit.exponent, fit.power_r_squared) == pytest.approx((power.slope, power.rvalue**2), rel=1e-10)


def test_several_seeds_agree_with_the_t_interval_of_their_slopes():
    log_norm = LAYERS * -0.2 + np.random.default_rng(3).normal(0, 0.5, (4, 50))
    fit = fit_decay(LAYERS, log_norm)
    slopes = [stats.linregress(LAYERS, row).slope for row in log_norm]
    low, high = stats.t.interval(0.95, 3, np.mean(slopes), stats.sem(slopes))
    assert fit.slopes == pytest.approx(slopes, rel=1e-10)
    assert (fit.slope, fit.slope_low, fit.slope_high) == pytest.approx((np.mean(slopes), low, high), rel=1e-9)


@pytest.mark.parametrize("seeds", [1, 4], ids=["within a seed", "over seeds"])
def test_interval_covers_the_true_slope_as_often_as_it_says(seeds):
    rng, trials, covered = np.random.default_rng(4), 600, 0
    for _ in range(trials):
        fit = fit_decay(LAYERS, LAYERS * -0.1 + rng.normal(0, 1.0, (seeds, 50)), confidence=0.8)
        covered += fit.slope_low <= -0.1 <= fit.slope_high
    assert abs(covered / trials - 0.8) < 3 * math.sqrt(0.8 * 0.2 / trials)


def test_norms_of_zero_are_dropped_and_counted():
    with np.errstate(divide="ignore"):
        log_norm = np.log(np.where(LAYERS > 40, 0.0, 0.3**LAYERS))
    log_norm[:2] = math.nan, math.inf
    fit = fit_decay(LAYERS, log_norm)
    assert (fit.gain, fit.points, fit.dropped) == (pytest.approx(0.3, rel=1e-12), 38, 12)
    assert (fit.depth_low, fit.depth_high) == (3, 40)


def test_a_seed_too_short_to_fit_is_left_out_and_told():
    log_norm = np.tile(LAYERS * -0.5, (3, 1))
    log_norm[1, 2:] = -math.inf
    fit = fit_decay(LAYERS, log_norm)
    assert (fit.seeds, fit.points, fit.dropped) == (2, 100, 50)
    assert math.isnan(fit.slopes[1])
    assert fit.slope == pytest.approx(-0.5, rel=1e-12)


@pytest.mark.parametrize("curve", [np.full(50, -math.inf), np.full((2, 50), math.nan)], ids=["all zero", "all NaN"])
def test_nothing_to_fit_is_unclear_and_not_an_exception(curve):
    fit = fit_decay(LAYERS, curve)
    assert fit.best == "unclear"
    assert math.isnan(fit.slope)
    assert math.isnan(fit.gain)
    assert fit.points == 0
    assert fit.dropped == curve.size


def test_steep_growth_gives_an_infinite_gain_and_no_warning():
    assert fit_decay(LAYERS, LAYERS * 1e3).gain == math.inf


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: fit_decay([1, 2, 3], [1, 2]), "depth has shape (3,)"),
        (lambda: fit_decay([1, 2, 2], [1, 2, 3]), "occurs twice"),
        (lambda: fit_decay([1, 2, math.inf], [1, 2, 3]), "not finite"),
        (lambda: fit_decay([1, 2, 3], [1, 2, 3], confidence=1.0), "confidence is 1.0"),
        (lambda: fit_decay([1, 2, 3], [1, 2, 3], min_r_squared=1.0), "min_r_squared"),
    ],
    ids=["shape", "repeat", "infinite", "confidence", "limit"],
)
def test_bad_values_are_told(call, says):
    with pytest.raises(UsageError) as told:
        call()
    assert says in str(told.value)
