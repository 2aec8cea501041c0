"""Hand-made tables that lead to each verdict about depth, and tables that lack parts."""

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


# -- C2.2: degradation ------------------------------------------------------------------------------------------------

#: Measured once on CIFAR-10 at 16x16: gaps between depths 56 and 20, and between the nets of depth 56, five seeds.
PLAIN_GAP = np.array([0.667, 0.504, 0.625, 0.576, 0.519])
RESIDUAL_GAP = np.array([0.141, 0.213, 0.168, 0.512, 0.327])
DEEP_GAP = np.array([0.710, 0.525, 0.593, 0.259, 0.413])


def losses(seeds=5, norm="batch"):
    plain_20 = np.array([1.65, 1.63, 1.66, 1.64, 1.66])
    plain_56 = plain_20 + PLAIN_GAP
    residual_56 = plain_56 - DEEP_GAP
    places = {
        ("plain", 20): plain_20,
        ("plain", 56): plain_56,
        ("residual", 20): residual_56 - RESIDUAL_GAP,
        ("residual", 56): residual_56,
    }
    frames = [rows(v[:seeds], "loss", net=net, depth=depth, norm=norm) for (net, depth), v in places.items()]
    return pd.concat(frames, ignore_index=True)


def test_degradation_from_the_measured_numbers():
    claims = by_id(decide.degradation_claims(losses().sample(frac=1, random_state=0)))
    assert {key: claim.verdict for key, claim in claims.items()} == {
        "C2.2a": YES, "C2.2b": YES, "C2.2c": YES, "C2.2d": NO,
    }  # fmt: skip
    assert claims["C2.2a"].p_value == pytest.approx(2e-5, rel=0.3)
    assert claims["C2.2b"].p_value == pytest.approx(0.0015, rel=0.1)
    assert claims["C2.2c"].p_value == pytest.approx(0.011, rel=0.05)
    assert claims["C2.2c"].measured == pytest.approx(0.306, abs=5e-4)
    assert claims["C2.2a"].n == 5
    assert "plain-20 1.65" in claims["C2.2a"].detail


def test_without_degradation_the_claim_is_not_reproduced():
    frame = losses()
    frame["depth"] = frame["depth"].map({20: 56, 56: 20})
    found = verdicts(decide.degradation_claims(frame))
    assert found == {"C2.2a": NO, "C2.2b": YES, "C2.2c": NO, "C2.2d": YES}


def test_one_seed_decides_nothing():
    claims = by_id(decide.degradation_claims(losses(seeds=1)))
    assert {claim.verdict for claim in claims.values()} == {OPEN}
    assert "n is 1" in claims["C2.2a"].detail


def test_a_diverged_run_leaves_its_claims_open():
    frame = losses()
    frame.loc[(frame["net"] == "residual") & (frame["depth"] == 56) & (frame["seed"] == 2), "loss"] = math.inf
    claims = by_id(decide.degradation_claims(frame))
    assert {key: claim.verdict for key, claim in claims.items()} == {
        "C2.2a": YES, "C2.2b": OPEN, "C2.2c": OPEN, "C2.2d": OPEN,
    }  # fmt: skip
    assert "1 of 5 samples b are not finite" in claims["C2.2b"].detail


def test_pairs_are_made_by_seed_even_where_seeds_are_missing():
    # Paired by place, seed 3 of one net would meet seed 4 of the other.
    frame = losses()
    lacks = ((frame["net"] == "plain") & (frame["depth"] == 20) & (frame["seed"] == 3)) | (
        (frame["net"] == "plain") & (frame["depth"] == 56) & (frame["seed"] == 4)
    )
    claims = by_id(decide.degradation_claims(frame[~lacks]))
    assert claims["C2.2a"].verdict is OPEN
    assert "not finite (runs that diverged or are missing)" in claims["C2.2a"].detail
    assert claims["C2.2d"].verdict is NO
    assert claims["C2.2d"].n == 5


@pytest.mark.parametrize(
    "frame",
    [
        NOTHING,
        losses(norm="none"),
        losses().query("net == 'plain'"),
        losses().query("depth == 20"),
        losses().query("net == 'plain' and depth == 56"),
    ],
    ids=["nothing", "no BatchNorm", "one net", "one depth", "one cell kind"],
)
def test_degradation_needs_both_nets_at_two_depths(frame):
    claims = decide.degradation_claims(frame)
    assert [claim.id for claim in claims] == ["C2.2a", "C2.2b", "C2.2c", "C2.2d"]
    for claim in claims:
        assert claim.verdict is OPEN
        assert claim.detail == "Needs BatchNorm nets of both kinds at two depths at least."


def test_a_kind_of_net_missing_at_one_depth_leaves_its_claims_open():
    claims = by_id(decide.degradation_claims(losses().query("net == 'plain' or depth == 20")))
    assert {key: claim.verdict for key, claim in claims.items()} == {
        "C2.2a": YES, "C2.2b": OPEN, "C2.2c": OPEN, "C2.2d": OPEN,
    }  # fmt: skip


# -- C2.3: without BatchNorm, and profiles ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([2.303, 2.31, math.inf], YES),
        ([math.inf] * 3, YES),
        ([0.1, 0.2, 2.3], NO),
        ([2.3, 2.3, 0.1], OPEN),
        ([2.3, 2.3], OPEN),
        ([], OPEN),
    ],
    ids=["stuck", "diverged", "learns", "mixed", "few", "none"],
)
def test_nets_without_batchnorm(values, verdict):
    frame = rows(values, "loss", net="plain", norm="none", depth=56) if values else NOTHING
    plain, residual = decide.unnormalized_claims(frame, 56)
    assert (plain.id, plain.verdict) == ("C2.3 plain", verdict)
    assert (residual.id, residual.verdict) == ("C2.3 residual", OPEN)
    assert residual.detail.startswith("No such net was trained.")


TABLE = {
    "plain, BatchNorm": {20: 24.0, 56: 8.9e3, 110: 1.0e7},
    "plain, He": {20: 0.142, 56: 9.6e-3, 110: 4.3e-4},
    "plain, torch default": {20: 2.9e-8, 56: 4.1e-23, 110: 4.1e-46},
    "residual, BatchNorm": {20: 8.2, 56: 31.0, 110: 53.0},
    "residual, He": {20: 5.9, 56: 2.3e3, 110: 2.3e7},
    "residual, SkipInit": {20: 0.33, 56: 0.37, 110: 0.37},
}


def ratios(seeds=3, depths=(20, 56, 110)):
    frames = [
        rows(np.log10(ratio) + 0.05 * np.arange(seeds), "log10_ratio", net=net, depth=depth)
        for net, table in TABLE.items()
        for depth, ratio in table.items()
        if depth in depths
    ]
    return pd.concat(frames, ignore_index=True)


GENERAL = ["C2.3 vanish", "C2.3 explode", "C2.3 power", "C2.3 flat"]


def test_profiles_from_the_tabulated_numbers():
    claims = by_id(decide.profile_claims(ratios(), as_tabulated=True))
    assert list(claims) == [*GENERAL, *(f"C2.3 {net}" for net in TABLE)]
    assert {claim.verdict for claim in claims.values()} == {YES}
    assert claims["C2.3 vanish"].measured == pytest.approx(10 ** ((math.log10(4.1e-46) + 0.05) / 108))
    assert claims["C2.3 explode"].measured == pytest.approx(10 ** ((7 + 0.05) / 108))
    assert claims["C2.3 power"].measured == pytest.approx(math.log(53 / 8.2) / math.log(5.5))
    assert "plain-110" in claims["C2.3 vanish"].statement


def test_profiles_of_another_kind_are_not_reproduced():
    frame = ratios()
    frame["log10_ratio"] *= np.where(frame["net"] == "residual, SkipInit", 10, -3)
    claims = verdicts(decide.profile_claims(frame, as_tabulated=True))
    assert claims["C2.3 vanish"] is claims["C2.3 explode"] is claims["C2.3 flat"] is NO
    assert claims["C2.3 plain, He"] is claims["C2.3 residual, He"] is NO


def test_profiles_of_one_depth_have_no_power():
    claims = by_id(decide.profile_claims(ratios(depths=(20,)), as_tabulated=False))
    assert list(claims) == GENERAL
    assert claims["C2.3 power"].verdict is OPEN
    assert claims["C2.3 power"].detail.endswith("Needs two depths at least.")
    assert claims["C2.3 vanish"].verdict is YES


def test_profiles_of_one_seed_are_open():
    claims = decide.profile_claims(ratios(seeds=1), as_tabulated=False)
    assert {claim.verdict for claim in claims} == {OPEN}


def test_profiles_with_seeds_missing_at_one_depth():
    frame = ratios(seeds=4)
    claims = by_id(decide.profile_claims(frame[(frame["depth"] != 110) | (frame["seed"] != 1)], as_tabulated=False))
    assert claims["C2.3 vanish"].verdict is YES
    assert claims["C2.3 vanish"].n == 3
    for key in ("C2.3 power", "C2.3 flat"):
        assert claims[key].verdict is OPEN
        assert "1 of 4 samples are NaN" in claims[key].detail


@pytest.mark.parametrize("as_tabulated", [False, True])
def test_no_profiles_at_all(as_tabulated):
    claims = decide.profile_claims(NOTHING, as_tabulated=as_tabulated)
    assert [claim.id for claim in claims] == GENERAL
    for claim in claims:
        assert claim.verdict is OPEN
        assert claim.detail
        assert "nan" not in claim.statement


# -- C2.6 --------------------------------------------------------------------------------------------------------------


def responses(plain=(0.97, 0.98), residual=(0.82, 0.88), seeds=3):
    frames = [
        pd.DataFrame({
            "net": net, "depth": depth, "seed": seed, "second": [False, True, True, True],
            # The median of the second ones counts.
            "std": [50.0, at - 0.02, at + 0.001 * seed * (depth if net == "plain" else depth // 2), 30.0],
        })
        for net, stds in (("plain", plain), ("residual", residual))
        for depth, at in zip((20, 56), stds, strict=True)
        for seed in range(seeds)
    ]  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def test_responses():
    claims = by_id(decide.response_claims(responses()))
    assert {key: claim.verdict for key, claim in claims.items()} == {"C2.6 20": YES, "C2.6 56": YES, "C2.6 order": NO}
    assert claims["C2.6 20"].measured == pytest.approx(0.15 + 0.01)
    assert claims["C2.6 order"].measured == pytest.approx(-0.06 - 0.018)


def test_responses_the_other_way():
    found = verdicts(decide.response_claims(responses(plain=(0.8, 0.9), residual=(0.9, 0.8))))
    assert found == {"C2.6 20": NO, "C2.6 56": YES, "C2.6 order": YES}


@pytest.mark.parametrize(
    ("frame", "ids"),
    [
        (NOTHING, ["C2.6", "C2.6 order"]),
        (responses().query("net == 'plain'"), ["C2.6 20", "C2.6 56", "C2.6 order"]),
        (responses().query("net == 'residual' and depth == 20"), ["C2.6 20", "C2.6 order"]),
        (responses(seeds=1), ["C2.6 20", "C2.6 56", "C2.6 order"]),
    ],
    ids=["nothing", "plain only", "one net and depth", "one seed"],
)
def test_responses_with_parts_missing(frame, ids):
    claims = decide.response_claims(frame)
    assert [claim.id for claim in claims] == ids
    for claim in claims:
        assert claim.verdict is OPEN
        assert claim.statement
        assert claim.detail


def test_responses_are_paired_by_seed():
    frame = responses(seeds=5)
    claims = by_id(decide.response_claims(frame[(frame["net"] == "plain") | (frame["seed"] != 2)]))
    assert claims["C2.6 20"].verdict is OPEN
    assert "1 of 5 samples b are not finite" in claims["C2.6 20"].detail
