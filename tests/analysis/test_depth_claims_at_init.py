"""Claims about nets that are not trained, and about sizes and errors: tables that lead to each verdict."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from gradlab.analysis import depth_claims as decide
from gradlab.analysis.claims import Verdict

YES, NO, OPEN = Verdict.REPRODUCED, Verdict.NOT_REPRODUCED, Verdict.NOT_DECIDED
NOTHING = pd.DataFrame()


def verdicts(claims):
    return {claim.id: claim.verdict for claim in claims}


def by_id(claims):
    found = {claim.id: claim for claim in claims}
    assert len(found) == len(claims)
    return found


def rows(values, value, first_seed=0, **keys):
    return pd.DataFrame({value: values, "seed": range(first_seed, first_seed + len(values))}).assign(**keys)


# -- C2.4, C2.5 -------------------------------------------------------------------------------------------------------


def explosion(rate, seeds=3, jitter=0.001):
    """Rate is the growth of the squared norm a layer, backward."""
    place = np.arange(1, 41)
    frames = [
        pd.DataFrame({"place": place, "log_grad_norm": -place * 0.5 * (math.log(rate) + jitter * seed), "seed": seed})
        for seed in range(seeds)
    ]
    return pd.concat(frames)


THEORY = math.pi / (math.pi - 1)


@pytest.mark.parametrize(
    ("frame", "width", "verdict"),
    [
        (explosion(THEORY), 512, YES),
        (explosion(THEORY * 1.04), 512, NO),
        (explosion(THEORY * 1.04), 64, YES),
        (explosion(math.sqrt(THEORY)), 512, NO),
        (explosion(THEORY, seeds=1), 512, OPEN),
        (explosion(THEORY).query("seed == 0 or place < 20"), 512, YES),
        (NOTHING, 512, OPEN),
    ],
    ids=["theory", "4 % off", "narrow", "norm, not square", "one seed", "cut short", "nothing"],
)
def test_explosion(frame, width, verdict):
    claim = decide.explosion_claim(frame, width)
    assert claim.verdict is verdict
    assert (f"width {width}" if len(frame) else "No finished cell measured this.") in claim.detail


def shattering(plain=0.0, small=0.9, full=0.58, draws=20, spread=0.01):
    rng = np.random.default_rng(0)
    frames = [
        pd.DataFrame({"kind": kind, "draw": range(draws), "lag": 1, "autocorrelation": rng.normal(at, spread, draws)})
        for kind, at in (("plain-24", plain), ("residual-50 beta=0.1", small), ("residual-50 beta=1", full))
    ]
    frame = pd.concat(frames)
    return pd.concat([frame, frame.assign(lag=0, autocorrelation=1.0)])


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (shattering(), [YES, YES]),
        (shattering(plain=0.5), [NO, YES]),
        (shattering(small=0.5), [YES, NO]),
        (shattering(small=0.8), [YES, OPEN]),
        (shattering(draws=1), [OPEN, OPEN]),
        (shattering(draws=3, spread=0.1, small=0.8), [OPEN, OPEN]),
        (shattering()[lambda f: f["kind"] == "plain-24"], [YES, OPEN]),
        (shattering()[lambda f: f["kind"] != "plain-24"], [OPEN, YES]),
        (NOTHING, [OPEN, OPEN]),
    ],
    ids=["theory", "smooth", "white", "border", "one draw", "noisy", "plain only", "residual only", "nothing"],
)
def test_shattering(frame, expected):
    claims = decide.shattering_claims(frame)
    assert [claim.id for claim in claims] == ["C2.5a", "C2.5b"]
    assert [claim.verdict for claim in claims] == expected
    assert all(claim.detail for claim in claims)


def test_rule_of_shattering_was_another_one_once_the_interval_was_narrow():
    """It spoke of seeds, "at least 1", and its number was an end of the interval."""
    white = [decide.shattering_claims(frame)[0] for frame in (shattering(), shattering(draws=3, spread=0.1), NOTHING)]
    assert len({claim.rule for claim in white}) == 1
    assert "interval" in white[0].rule
    assert [claim.n for claim in white] == [20, 3, 0]
    assert white[0].low < white[0].measured < white[0].high
    assert white[0].measured == pytest.approx(0.0, abs=0.01)


# -- C3.4, C1.5, C2.1 -------------------------------------------------------------------------------------------------


def shares(factor=1.0, seeds=3):
    block = np.arange(1, 51)
    frames = [
        pd.DataFrame({"block": block, "share": factor * (1 + 0.01 * s) / (block + 1), "seed": s}) for s in range(seeds)
    ]
    return pd.concat(frames)


@pytest.mark.parametrize(
    ("frame", "verdict"),
    [(shares(), YES), (shares(1.3), NO), (shares(seeds=1), OPEN), (NOTHING, OPEN)],
    ids=["theory", "30 % off", "one seed", "nothing"],
)
def test_shares(frame, verdict):
    claims = decide.share_claims(frame)
    assert [claim.id for claim in claims] == ["C3.4 block 10", "C3.4 block 25", "C3.4 block 50"]
    for claim in claims:
        assert claim.verdict is verdict
        assert claim.detail


@pytest.mark.parametrize(
    ("quotient", "verdict"),
    [(16_728.76, YES), (16_000.0, NO), (math.nan, OPEN)],
    ids=["He's", "another", "not measured"],
)
def test_vgg(quotient, verdict):
    assert decide.vgg_claim(quotient).verdict is verdict


COUNTS = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962, 1202: 19_421_274}


@pytest.mark.parametrize(("change", "verdict"), [(0, YES), (1, NO), (-1, NO)], ids=["exact", "one more", "one less"])
def test_counts(change, verdict):
    counts = pd.DataFrame({"depth": COUNTS.keys(), "parameters": COUNTS.values()})
    counts.loc[3, "parameters"] += change
    claim = decide.counts_claim(counts)
    assert claim.verdict is verdict
    assert f"1202: {COUNTS[1202]:,}" in claim.detail


def test_no_counts():
    claim = decide.counts_claim(NOTHING)
    assert claim.verdict is OPEN
    assert claim.detail.startswith("No finished cell measured this.")


def errors(offset=0.0, depths=(20, 110)):
    table = {20: 8.75, 110: 6.43}
    frames = [
        rows(
            [table[d] + offset - 0.1, table[d] + offset + 0.1, table[d] + offset],
            "test_error",
            net="residual",
            norm="batch",
            depth=d,
        )
        for d in depths
    ]
    return pd.concat([*frames, rows([1.0], "test_error", net="plain", norm="batch", depth=20)])


def test_test_error_needs_the_papers_recipe():
    (claim,) = decide.test_error_claim(errors(), full_recipe=False)
    assert claim.verdict is OPEN
    assert "Needs the paper's recipe" in claim.detail
    assert "110: 6.43" in claim.statement


@pytest.mark.parametrize(("offset", "verdict"), [(0.3, YES), (2.0, NO)], ids=["near", "far"])
def test_test_error(offset, verdict):
    claims = decide.test_error_claim(errors(offset), full_recipe=True)
    assert verdicts(claims) == {"C2.1 error 20": verdict, "C2.1 error 110": verdict}


@pytest.mark.parametrize("frame", [NOTHING, errors(depths=())], ids=["nothing", "plain only"])
def test_test_error_without_residual_nets(frame):
    (claim,) = decide.test_error_claim(frame, full_recipe=True)
    assert (claim.id, claim.verdict) == ("C2.1 error", OPEN)
    assert claim.detail == "No finished cell measured this."
