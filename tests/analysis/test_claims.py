"""Verdicts on numbers whose test is known, and on those that no test should decide."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from gradlab.analysis.claims import (
    Claim,
    Verdict,
    claims_from_json,
    claims_to_json,
    decide_exact,
    decide_greater,
    decide_theory,
    decide_threshold,
    mean_interval,
    not_decided,
)
from gradlab.errors import StoreError, UsageError

ABOUT = {"id": "C2.2a", "statement": "plain-56 trains worse than plain-20.", "source": "He et al. 2015, section 4.2"}
YES, NO, OPEN = Verdict.REPRODUCED, Verdict.NOT_REPRODUCED, Verdict.NOT_DECIDED
# Prototype of C2.2, per seed: the plain nets' gap from 20 to 56 layers, and its excess over the residual nets' gap.
PLAIN_GAPS = [0.667, 0.504, 0.625, 0.576, 0.519]
GAP_DIFFERENCES = [0.526, 0.291, 0.457, 0.064, 0.193]


@pytest.mark.parametrize("samples", [PLAIN_GAPS, [1.0, 2.0], [-3.0, 4.0, 1e3]], ids=["gaps", "two", "wide"])
@pytest.mark.parametrize("confidence", [0.5, 0.95], ids=str)
def test_mean_interval_is_student_s(samples, confidence):
    low, high = stats.t.interval(confidence, len(samples) - 1, np.mean(samples), stats.sem(samples))
    assert mean_interval(samples, confidence) == pytest.approx((np.mean(samples), low, high), rel=1e-12)


def test_mean_interval_by_hand():
    # t(.975, 4 degrees of freedom) = 2.776, from any table
    reach = 2.776 * math.sqrt(0.5)
    assert mean_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((3.0, 3 - reach, 3 + reach), rel=1e-3)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([], (math.nan,) * 3),
        ([2.5], (2.5, math.nan, math.nan)),
        ([1.0, math.nan], (math.nan,) * 3),
        ([1.0, math.inf], (math.nan,) * 3),
        ([0.1] * 3, (0.1, 0.1, 0.1)),
        ([0.0] * 3, (0.0, 0.0, 0.0)),
    ],
    ids=["none", "one", "NaN", "inf", "equal", "zeros"],
)
def test_mean_interval_at_the_edges(samples, expected):
    assert mean_interval(samples) == pytest.approx(expected, nan_ok=True, rel=1e-15)


def test_interval_of_vanished_norms_keeps_their_spread():
    small, plain = mean_interval([1e-300, 2e-300, 4e-300]), mean_interval([1.0, 2.0, 4.0])
    assert np.array(small) * 1e300 == pytest.approx(plain, rel=1e-12)


def test_gap_of_the_plain_nets():
    claim = decide_greater(PLAIN_GAPS, np.zeros(5), paired=True, alpha=0.01, **ABOUT)
    assert claim.verdict is YES
    assert claim.p_value == pytest.approx(2e-5, rel=0.3)
    assert claim.measured == pytest.approx(0.5782, rel=1e-9)
    assert (claim.low, claim.high) == pytest.approx(mean_interval(PLAIN_GAPS)[1:], rel=1e-12)
    assert claim.n == 5


def test_difference_of_gaps():
    claim = decide_greater(GAP_DIFFERENCES, np.zeros(5), paired=True, **ABOUT)
    assert (claim.measured, claim.p_value) == (pytest.approx(0.306, abs=5e-4), pytest.approx(0.011, abs=5e-4))
    assert claim.verdict is YES
    assert decide_greater(GAP_DIFFERENCES, np.zeros(5), paired=True, alpha=0.01, **ABOUT).verdict is OPEN


@pytest.mark.parametrize("paired", [True, False], ids=["paired", "welch"])
@pytest.mark.parametrize("shift", [-3.0, -0.2, 0.0, 0.2, 3.0], ids=str)
def test_greater_agrees_with_scipy_s_tests(paired, shift):
    rng = np.random.default_rng(5)
    a, b = rng.normal(shift, 1.0, 6), rng.normal(0.0, 2.0, 6 if paired else 9)
    test = stats.ttest_rel if paired else lambda *groups, **how: stats.ttest_ind(*groups, equal_var=False, **how)
    claim = decide_greater(a, b, paired=paired, **ABOUT)
    interval = test(a, b).confidence_interval(0.95)
    assert claim.p_value == pytest.approx(test(a, b, alternative="greater").pvalue, rel=1e-9)
    assert (claim.low, claim.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    less = test(a, b, alternative="less").pvalue
    assert claim.verdict is (YES if claim.p_value < 0.05 else NO if less < 0.05 else OPEN)


def test_greater_gives_all_three_verdicts():
    a, b = np.array([1.0, 1.1, 0.9, 1.2]), np.array([0.1, 0.2, 0.0, 0.1])
    assert decide_greater(a, b, paired=False, **ABOUT).verdict is YES
    swapped = decide_greater(b, a, paired=False, **ABOUT)
    assert swapped.verdict is NO
    assert "other direction" in swapped.detail
    assert decide_greater([1.0, 3.0], [0.0, 2.9], paired=False, **ABOUT).verdict is OPEN


@pytest.mark.parametrize("paired", [True, False], ids=["paired", "welch"])
def test_false_verdicts_are_no_more_frequent_than_alpha(paired):
    rng, trials, alpha = np.random.default_rng(6), 2000, 0.05
    verdicts = [
        decide_greater(rng.normal(size=5), rng.normal(size=5), paired=paired, alpha=alpha, **ABOUT).verdict
        for _ in range(trials)
    ]
    slack = 3 * math.sqrt(alpha * (1 - alpha) / trials)
    for wrong in (YES, NO):
        assert verdicts.count(wrong) / trials < alpha + slack
        assert verdicts.count(wrong) > 0


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        ([], [], "n is 0"),
        ([9.0], [1.0], "n is 1"),
        ([9.0, 9.1, 9.2], [1.0, math.nan, 1.1], "1 of 3 samples b are not finite"),
        ([9.0, math.inf, 9.2], [1.0, 1.2, 1.1], "1 of 3 samples a are not finite"),
        ([2.0] * 3, [2.0] * 3, "equal"),
        ([0.1 + 0.2] * 5, [0.3] * 5, "equal"),
    ],
    ids=["none", "one", "NaN", "inf", "equal", "equal but for rounding"],
)
@pytest.mark.parametrize("paired", [True, False], ids=["paired", "welch"])
def test_greater_does_not_decide_without_evidence(a, b, says, paired):
    claim = decide_greater(a, b, paired=paired, **ABOUT)
    assert claim.verdict is OPEN
    assert says in claim.detail


@pytest.mark.parametrize(
    ("n", "paired", "p_value", "verdict"),
    [(3, True, 1 / 8, OPEN), (5, True, 1 / 32, YES), (3, False, 1 / 20, OPEN), (4, False, 1 / 70, YES)],
    ids=["3 pairs", "5 pairs", "3+3", "4+4"],
)
def test_groups_without_spread_get_the_permutation_p(n, paired, p_value, verdict):
    claim = decide_greater([2.303] * n, [0.1] * n, paired=paired, **ABOUT)
    assert claim.p_value == pytest.approx(p_value)
    assert claim.verdict is verdict
    assert "no spread" in claim.detail
    assert decide_greater([0.1] * n, [2.303] * n, paired=paired, **ABOUT).verdict is {YES: NO, OPEN: OPEN}[verdict]


def test_one_group_without_spread_is_tested_by_the_other_s():
    stuck, learning = [2.303] * 3, [1.1, 1.2, 1.3]
    claim = decide_greater(stuck, learning, paired=False, **ABOUT)
    reference = stats.ttest_1samp(learning, 2.303, alternative="less")
    assert claim.p_value == pytest.approx(reference.pvalue, rel=1e-9)


def test_pairs_need_the_same_seeds():
    with pytest.raises(UsageError, match="3 and 2 samples"):
        decide_greater([1.0, 2.0, 3.0], [1.0, 2.0], paired=True, **ABOUT)
    assert decide_greater([1.0, 2.0, 3.0], [1.0, 2.0], paired=False, **ABOUT).n == 2


@pytest.mark.parametrize(
    ("samples", "within_se", "verdict"),
    [
        pytest.param([0.996, 1.003, 0.998], 3.0, YES, id="near and quiet"),
        pytest.param([0.9959, 0.9958, 0.9957], 3.0, NO, id="near, but biased beyond noise"),
        pytest.param([0.9959, 0.9958, 0.9957], None, YES, id="near and biased, noise not asked"),
        pytest.param([1.05, 1.0501, 1.0499], 3.0, NO, id="far and quiet"),
        pytest.param([1.05, 1.0501, 1.0499], None, NO, id="far and quiet, noise not asked"),
        pytest.param([0.8, 1.0, 1.3], 3.0, OPEN, id="far, within the noise"),
        pytest.param([0.8, 1.0, 1.3], None, OPEN, id="far, interval reaches the tolerance"),
        pytest.param([0.5, 1.0, 1.501], 3.0, OPEN, id="near by luck"),
        pytest.param([0.5, 1.0, 1.501], None, OPEN, id="near by luck, noise not asked"),
        pytest.param([1.0], 3.0, OPEN, id="one"),
        pytest.param([1.0], None, OPEN, id="one, noise not asked"),
        pytest.param([], 3.0, OPEN, id="none"),
        pytest.param([1.0, math.nan, 1.0], 3.0, OPEN, id="NaN"),
        pytest.param([1.0, 1.0, math.inf], None, OPEN, id="inf"),
        pytest.param([1.0 + 1e-15] * 3, 3.0, YES, id="equal to the theory but for rounding"),
        pytest.param([1.5] * 3, 3.0, NO, id="equal and far"),
    ],
)
def test_theory_verdicts(samples, within_se, verdict):
    claim = decide_theory(samples, 1.0, rel_tol=0.01, within_se=within_se, **ABOUT)
    assert claim.verdict is verdict
    negative = decide_theory([-value for value in samples], -1.0, rel_tol=0.01, within_se=within_se, **ABOUT)
    assert negative.verdict is verdict


def test_theory_shows_its_interval_and_its_rule():
    claim = decide_theory([1.20, 1.21, 1.22], 1.2112, rel_tol=0.02, unit="per layer", detail="Width 256.", **ABOUT)
    assert (claim.measured, claim.low, claim.high) == mean_interval([1.20, 1.21, 1.22])
    assert claim.rule.startswith("(T)")
    assert "3 standard errors" in claim.rule
    assert claim.detail.startswith("Width 256.")
    assert claim.unit == "per layer"
    without = decide_theory([1.20, 1.21, 1.22], 1.2112, rel_tol=0.02, within_se=None, **ABOUT)
    assert "no distance in standard errors is asked" in without.rule


def test_false_theory_is_seldom_reproduced():
    rng = np.random.default_rng(7)
    verdicts = [decide_theory(rng.normal(1.1, 0.02, 5), 1.0, rel_tol=0.02, **ABOUT).verdict for _ in range(500)]
    assert verdicts.count(YES) == 0
    assert verdicts.count(NO) > 450


@pytest.mark.parametrize(
    ("measured", "expected", "rel_tol", "verdict"),
    [
        (16_728.77, 16_728.7636, 1e-4, YES),
        (16_728.77, 16_728.7636, 1e-10, NO),
        (0.0, 0.0, 1e-10, YES),
        (1e-9, 0.0, 1e-10, NO),
        (-4.0, 4.0, 1e-3, NO),
        (math.nan, 1.0, 1e-3, OPEN),
        (math.inf, 1.0, 1e-3, NO),
    ],
    ids=["loose", "tight", "zero", "near zero", "sign", "NaN", "inf"],
)
def test_exact_verdicts(measured, expected, rel_tol, verdict):
    assert decide_exact(measured, expected, rel_tol=rel_tol, **ABOUT).verdict is verdict


@pytest.mark.parametrize(
    ("samples", "direction", "verdict"),
    [
        pytest.param([2.28, 2.3, 2.31], ">", YES, id="all"),
        pytest.param([2.28, 2.3, 2.1], ">", OPEN, id="most"),
        pytest.param([2.28, 2.1, 2.1], ">", NO, id="a minority"),
        pytest.param([2.28, 2.28, 2.1, 2.1], ">", OPEN, id="half"),
        pytest.param([1.0, 1.1, 1.2], "<", YES, id="all below"),
        pytest.param([2.2, 2.2, 2.2], "<", NO, id="on the threshold"),
        pytest.param([2.3, math.inf, 2.4], ">", YES, id="diverged counts as large"),
        pytest.param([1.0, math.nan, 1.0], "<", OPEN, id="NaN"),
        pytest.param([1.0, 1.0], "<", OPEN, id="two"),
        pytest.param([], "<", OPEN, id="none"),
    ],
)
def test_threshold_verdicts(samples, direction, verdict):
    assert decide_threshold(samples, threshold=2.2, direction=direction, **ABOUT).verdict is verdict


def test_threshold_shows_the_range_and_takes_one_number_where_told():
    claim = decide_threshold([3.0, 1.0, 2.0], threshold=0.5, direction=">", **ABOUT)
    assert (claim.measured, claim.low, claim.high, claim.n) == (2.0, 1.0, 3.0, 3)
    assert decide_threshold([0.85], threshold=0.8, direction=">", min_samples=1, **ABOUT).verdict is YES


def test_not_decided_carries_its_reason():
    claim = not_decided("Needs a GPU.", rule="(S) Five seeds.", expected="> 0", n=1, **ABOUT)
    assert (claim.verdict, claim.detail, claim.rule, claim.expected, claim.n) == (
        OPEN,
        "Needs a GPU.",
        "(S) Five seeds.",
        "> 0",
        1,
    )
    assert math.isnan(claim.measured)


def several_claims():
    return [
        decide_greater(PLAIN_GAPS, np.zeros(5), paired=True, unit="nats", **ABOUT),
        decide_threshold([1.0, 2.0, math.inf], threshold=-math.inf, direction=">", **ABOUT),
        not_decided("β·√2 was not measured.", **ABOUT),
    ]


def test_claims_survive_json():
    claims = several_claims()
    text = claims_to_json(claims)
    assert [claim.to_dict() for claim in claims_from_json(text)] == [claim.to_dict() for claim in claims]
    assert claims_from_json(text)[0] == claims[0]  # no NaN in it, so all of it compares
    assert claims_to_json(claims_from_json(text)) == text
    assert claims_from_json(text)[1].high == math.inf
    assert "β·√2" in text


def test_json_is_strict_and_says_its_schema():
    def refuse(name):
        raise AssertionError(name)

    document = json.loads(claims_to_json(several_claims()), parse_constant=refuse)
    assert document["schema"] == 1
    assert document["claims"][2]["measured"] is None
    assert document["claims"][1]["high"] == "inf"


def damaged(**changes):
    return json.dumps({"schema": 1, "claims": [several_claims()[0].to_dict() | changes]})


def without(name):
    row = several_claims()[0].to_dict()
    del row[name]
    return json.dumps({"schema": 1, "claims": [row]})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "no list 'claims'"),
        ('{"schema": 1}', "no list 'claims'"),
        ('{"schema": 2, "claims": []}', "schema 2"),
        ('{"schema": 1, "claims": [3]}', "A claim is 3"),
        (without("rule"), "lacks the fields ['rule']"),
        (damaged(more=1), "unknown ones ['more']"),
        (damaged(statement=3), "statement 3"),
        (damaged(measured="high"), "measured 'high'"),
        (damaged(p_value=True), "p_value True"),
        (damaged(n=2.5), "n 2.5"),
        (damaged(n=-1), "n of claim"),
        (damaged(verdict="maybe"), "verdict 'maybe'"),
        (damaged(verdict=["reproduced"]), "verdict ['reproduced']"),
        (damaged(id=""), "id of a claim is ''"),
    ],
    ids=lambda value: "" if value.startswith(("{", "[")) else value,
)
def test_damaged_claims_are_told_in_one_sentence(text, says):
    with pytest.raises(StoreError) as told:
        claims_from_json(text)
    assert says in str(told.value)


def test_a_claim_is_frozen_and_checks_its_verdict():
    claim = several_claims()[0]
    with pytest.raises(AttributeError):
        claim.n = 7
    with pytest.raises(UsageError, match="Did you mean 'reproduced'"):
        Claim(**{name: getattr(claim, name) for name in Claim.__slots__} | {"verdict": "reproducd"})


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: decide_exact(1.0, math.nan, **ABOUT), "expected is nan"),
        (lambda: decide_exact(1.0, 1.0, rel_tol=0.0, **ABOUT), "rel_tol is 0.0"),
        (lambda: decide_theory([1.0, 1.0], 0.0, rel_tol=0.1, **ABOUT), "expected is 0.0"),
        (lambda: decide_theory([1.0, 1.0], 1.0, rel_tol=0.1, within_se=0.0, **ABOUT), "within_se is 0.0"),
        (lambda: decide_theory([[1.0], [1.0]], 1.0, rel_tol=0.1, **ABOUT), "2 dimensions"),
        (lambda: decide_theory(["a"], 1.0, rel_tol=0.1, **ABOUT), "must be numbers"),
        (lambda: decide_greater([1.0], [1.0], paired=False, alpha=0.5, **ABOUT), "alpha is 0.5"),
        (lambda: decide_threshold([1.0], threshold=1.0, direction=">=", **ABOUT), "Unknown direction"),
        (lambda: decide_threshold([1.0], threshold=math.nan, direction=">", **ABOUT), "threshold is nan"),
        (lambda: decide_threshold([1.0], threshold=1.0, direction=">", min_samples=0, **ABOUT), "min_samples is 0"),
        (lambda: not_decided("x", id="C", statement="s"), "no source"),
        (lambda: not_decided("x", units="m", **ABOUT), "Did you mean 'unit'"),
        (lambda: mean_interval([1.0], 0.0), "confidence is 0.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_values_are_told(call, says):
    with pytest.raises(UsageError) as told:
        call()
    assert says in str(told.value)
