"""The exact law of ln ||J u||^2 against its expansion, against direct sampling of chi-squares and against real nets."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradlab.analysis.finite_width import finite_width_log_norm
from gradlab.errors import UsageError

# Claim C1.3: width, depth, exact variance.
PUBLISHED = [(10, 10, 8.67), (20, 20, 6.24), (50, 20, 2.16), (50, 50, 5.41), (100, 50, 2.60), (25, 50, 11.84)]


@pytest.mark.parametrize(("width", "depth", "variance"), PUBLISHED, ids=str)
def test_published_variances(width, depth, variance):
    assert finite_width_log_norm(width, depth).variance == pytest.approx(variance, abs=6e-3)


def test_to_leading_order_the_mean_is_five_halves_of_beta_and_the_variance_5_beta():
    law = finite_width_log_norm(4000, 4000)
    assert law.beta == 1.0
    assert law.mean == pytest.approx(-2.5, rel=2e-3)
    assert law.variance == pytest.approx(5.0, rel=2e-3)
    # Of the norm itself, a layer: -5 / (4 n).
    assert finite_width_log_norm(256, 1).mean / 2 == pytest.approx(-5 / (4 * 256), rel=0.02)


def test_one_unit_in_closed_form():
    # The unit is on: ln(2 z^2), whose mean is 2 ln 2 + psi(1/2) = -gamma and whose variance is pi^2 / 2.
    law = finite_width_log_norm(1, 3)
    assert law.alive == pytest.approx(1 / 8, rel=1e-12)
    assert law.mean == pytest.approx(-3 * np.euler_gamma, rel=1e-9)
    assert law.variance == pytest.approx(3 * math.pi**2 / 2, rel=1e-9)


def test_against_samples_of_the_law():
    rng = np.random.default_rng(0)
    width, depth, nets = 12, 6, 200_000
    on = rng.binomial(width, 0.5, size=(nets, depth))
    total = np.log(2 / width * rng.chisquare(np.maximum(on, 1))).sum(axis=1)[(on > 0).all(axis=1)]
    law = finite_width_log_norm(width, depth)
    assert len(total) / nets == pytest.approx(law.alive, abs=3e-3)
    assert total.mean() == pytest.approx(law.mean, abs=4 * math.sqrt(law.variance / nets))
    assert total.var() == pytest.approx(law.variance, rel=4 * math.sqrt(4 / nets))


@pytest.mark.parametrize("bad", [0, -1, 2.5, True], ids=str)
def test_bad_sizes_are_one_sentence(bad):
    with pytest.raises(UsageError, match="width is"):
        finite_width_log_norm(bad, 3)
    with pytest.raises(UsageError, match="depth is"):
        finite_width_log_norm(3, bad)
