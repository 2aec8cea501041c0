"""Censored step counts: permutation and log-rank tests against enumeration, hand computation and scipy."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import norm, permutation_test

from gradlab.analysis.survival import decide_sooner, log_rank_p, permutation_p
from gradlab.errors import UsageError

NAN = float("nan")
ABOUT = {"id": "X", "statement": "Sooner.", "source": "made up"}


def naive_p(a, b):
    """Share of splits whose first mean is as small: each written out."""
    joined = [*a, *b]
    observed = np.mean(a)
    hits = [
        np.mean([joined[i] for i in chosen]) <= observed + 1e-9
        for chosen in itertools.combinations(range(len(joined)), len(a))
    ]
    return sum(hits) / len(hits)


@pytest.mark.parametrize(
    ("a", "b"),
    [([1, 2], [3, 4]), ([1, 3], [2, 4]), ([4, 3], [2, 1]), ([5, 5, 5], [5, 5]), ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1, 9])],
    ids=["apart", "mixed", "reversed", "ties", "rounding"],
)
def test_permutation_p_is_the_enumerated_share(a, b):
    assert permutation_p(a, b) == pytest.approx(naive_p(a, b), abs=1e-12)
    reference = permutation_test(
        (a, b), lambda x, y: np.mean(x) - np.mean(y), alternative="less", n_resamples=np.inf, vectorized=False
    )
    assert permutation_p(a, b) == pytest.approx(reference.pvalue, abs=1e-12)


def test_smallest_p_of_five_against_five_and_three_against_three():
    assert permutation_p(range(5), range(10, 15)) == 1 / 252
    assert permutation_p(range(3), range(10, 13)) == 1 / 20


def test_large_groups_are_sampled_and_agree_with_the_normal_limit():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 1, 15), rng.normal(0.4, 1, 15)
    z = (a.mean() - b.mean()) / math.sqrt(np.concatenate([a, b]).var(ddof=1) * 2 / 15)
    assert permutation_p(a, b) == pytest.approx(norm.cdf(z), abs=0.01)
    assert permutation_p(a, b) == permutation_p(a, b)


def naive_log_rank(a, b, cap):
    """Mantel's sum over event times of observed less expected events of `a`, over its standard deviation."""
    times = sorted({t for t in [*a, *b] if not math.isnan(t)})
    full_a, full_b = ([cap if math.isnan(t) else t for t in group] for group in (a, b))
    excess = variance = 0.0
    for t in times:
        at_risk_a, at_risk_b = (sum(x >= t for x in group) for group in (full_a, full_b))
        n = at_risk_a + at_risk_b
        events_a, events_b = (sum(x == t for x in group) for group in (a, b))
        d = events_a + events_b
        excess += events_a - d * at_risk_a / n
        if n > 1:
            variance += d * (at_risk_a / n) * (at_risk_b / n) * (n - d) / (n - 1)
    return 1 - norm.cdf(excess / math.sqrt(variance))


@pytest.mark.parametrize(
    ("a", "b"),
    [([6, 7, 6], [12, NAN, 14]), ([1, 3, NAN], [2, 4, 5]), ([1, 2, 3, 4], [NAN] * 3), ([NAN, NAN], [5, 7])],
    ids=["sooner", "mixed", "never", "later"],
)
def test_log_rank_is_mantels_sum(a, b):
    assert log_rank_p(a, b, 20) == pytest.approx(naive_log_rank(a, b, 20), abs=1e-12)


def test_log_rank_by_hand():
    # At t=1: 2 + 2 at risk, one event, in a: expected 1/2, variance 1/4. At t=2: 1 + 2 at risk, one event, in a:
    # expected 1/3, variance 2/9. At t=3: only b's two are at risk: nothing to compare.
    z = (2 - (1 / 2 + 1 / 3)) / math.sqrt(1 / 4 + 2 / 9)
    assert log_rank_p([1, 2], [3, NAN], 10) == pytest.approx(1 - norm.cdf(z))


@pytest.mark.parametrize(
    ("a", "b"), [([NAN, NAN], [NAN]), ([5, 5], [5]), ([], [5])], ids=["no events", "all at once", "empty"]
)
def test_log_rank_without_information_is_nan(a, b):
    assert math.isnan(log_rank_p(a, b, 10))


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ([600, 650, 700, 550, 600], [1200, 1100, NAN, 1400, NAN], "reproduced"),
        ([1200, 1100, NAN, 1400, NAN], [600, 650, 700, 550, 600], "not reproduced"),
        ([1000, 1400, 1200, NAN, 1100], [1050, NAN, 1150, 1300, 1200], "not decided"),
        ([NAN] * 5, [NAN] * 5, "not decided"),
        ([600, 650, 700], [1200, 1100, NAN], "not decided"),  # p is 1/20, and the rule wants less
        ([600], [1200], "not decided"),
        ([], [], "not decided"),
    ],
    ids=["sooner", "later", "mixed", "nobody", "too few", "one", "none"],
)
def test_verdicts(first, second, verdict):
    claim = decide_sooner(first, second, cap=1500, **ABOUT)
    assert str(claim.verdict) == verdict


def test_what_a_claim_tells():
    claim = decide_sooner([700] * 5, [1400, 1500, 1300, NAN, NAN], cap=1500, detail="Here.", **ABOUT)
    assert claim.measured == pytest.approx(1440 - 700)
    assert claim.low < claim.measured < claim.high
    assert claim.p_value == 1 / 252
    assert claim.detail.startswith("Here. Solved: 5 of 5 against 3 of 5. Mean steps 700 against 1440")
    assert "a factor of 2.06 or more." in claim.detail
    assert "Log-rank p" in claim.detail
    few = decide_sooner([7, 8], [9, 10], cap=20, **ABOUT)
    assert "no outcome would be significant" in few.detail


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: permutation_p([], [1]), "two groups of finite numbers"),
        (lambda: permutation_p([NAN], [1]), "two groups of finite numbers"),
        (lambda: decide_sooner([1, 99], [1, 2], cap=10, **ABOUT), "beyond the cap of 10 steps"),
        (lambda: decide_sooner([1, 2], [1, 2], cap=10, alpha=0.7, **ABOUT), "alpha is 0.7"),
    ],
    ids=["empty", "nan", "beyond", "alpha"],
)
def test_bad_input_is_one_sentence(call, text):
    with pytest.raises(UsageError, match=text):
        call()
