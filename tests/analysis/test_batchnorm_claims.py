"""Claims about BatchNorm from hand-made tables: worlds as published, and their opposites."""

import math

import numpy as np
import pandas as pd
import pytest

from gradlab.analysis import batchnorm_claims as training
from gradlab.analysis import batchnorm_init_claims as start

LR, BATCH = 0.05, 128


def verdicts(claims):
    return {claim.id: str(claim.verdict) for claim in claims}


def ends(loss, *, seeds=3, swapped=False):
    """Final losses; `loss` maps (norm, lr, scale, batch size) to a loss, spread a little over seeds."""
    other = {"batch": "none", "none": "batch"}
    rows = [
        (other[norm] if swapped else norm, lr, scale, size, seed, value * (1 + 0.01 * seed), 10.0)
        for (norm, lr, scale, size), value in loss.items()
        for seed in range(seeds)
    ]
    names = ["norm", "lr", "scale", "batch_size", "seed", "loss", "test_error"]
    return pd.DataFrame(rows, columns=names).assign(steps=300)


SCALES = {("batch", LR, s, BATCH): 0.03 for s in (1.0, 0.1, 0.001)} | {
    ("none", LR, s, BATCH): 0.005 if s == 1 else 2.303 for s in (1.0, 0.1, 0.001)
}
RATES = {
    ("batch", 0.01, 1.0, BATCH): 0.4,
    ("batch", 0.1, 1.0, BATCH): 0.02,
    ("batch", 3.0, 1.0, BATCH): 0.05,
    ("none", 0.01, 1.0, BATCH): 0.08,
    ("none", 0.1, 1.0, BATCH): 0.01,
    ("none", 3.0, 1.0, BATCH): math.inf,
}
SIZES = {(norm, LR, 1.0, size): (2.4 if norm == "batch" else 1.7) for norm in ("batch", "none") for size in (2, 4)}


def test_scale_is_decided_both_ways():
    found = verdicts(training.scale_claims(ends(SCALES), lr=LR, batch_size=BATCH, steps=300))
    assert set(found) == {"C3.1 train 0.1", "C3.1 train 0.001", "C3.1 bare", "C3.1 lower"}
    assert set(found.values()) == {"reproduced"}
    other = verdicts(training.scale_claims(ends(SCALES, swapped=True), lr=LR, batch_size=BATCH, steps=300))
    assert set(other.values()) == {"not reproduced"}


def test_a_slow_start_is_told_from_the_limit_that_eps_sets():
    """At 300 steps the mean over seeds is above the threshold though two of three are below; at 600 none is."""
    usual = ends(SCALES)
    slow = (usual["norm"] == "batch") & (usual["scale"] == 0.001)
    usual.loc[slow, "loss"] = [0.15, 0.1, 0.6]
    longer = ends({("batch", LR, 0.001, BATCH): 0.08, ("batch", LR, 3e-4, BATCH): 2.302}).assign(steps=600)
    claims = training.scale_claims(pd.concat([usual, longer]), lr=LR, batch_size=BATCH, steps=300)
    found = verdicts(claims)
    assert found["C3.1 train 0.1"] == "reproduced"
    assert found["C3.1 train 0.001"] == "not decided"
    assert found["C3.1 train 0.001 longer"] == "reproduced"
    assert found["C3.1 train limit"] == "reproduced"
    assert "600 steps" in next(claim.statement for claim in claims if claim.id == "C3.1 train limit")


def test_rates_are_decided_both_ways_and_the_worse_ones_printed():
    claims = training.rate_claims(ends(RATES), batch_size=BATCH)
    assert verdicts(claims) == {"C3.2": "reproduced", "C3.2 small": "reproduced"}
    assert claims[0].measured == pytest.approx(30)
    assert "0.01 (0.404 against 0.0808), 0.1 (0.0202 against 0.0101)." in claims[1].detail
    other = training.rate_claims(ends(RATES, swapped=True), batch_size=BATCH)
    assert verdicts(other) == {"C3.2": "not reproduced", "C3.2 small": "not reproduced"}


def test_pairs_are_of_one_seed_where_cells_are_missing():
    table = ends(RATES, seeds=4)
    table["loss"] *= 10.0 ** table["seed"]  # seeds differ by more than the norms do
    short = table[~((table["norm"] == "none") & (table["seed"] == 0))]
    claim = training.rate_claims(short[short["seed"] < 3], batch_size=BATCH)[1]
    assert claim.n == 2
    expected = np.mean([(0.4 - 0.08) * 10.0**seed * (1 + 0.01 * seed) for seed in (1, 2)])
    assert claim.measured == pytest.approx(expected)


def test_a_ratio_of_exactly_three_counts():
    table = ends({("batch", 0.3, 1.0, BATCH): 0.01, ("none", 0.3, 1.0, BATCH): 1.0} | {
        (norm, 0.1, 1.0, BATCH): 0.01 for norm in ("batch", "none")
    })  # fmt: skip
    assert verdicts(training.rate_claims(table, batch_size=BATCH))["C3.2"] == "reproduced"


def test_a_norm_that_never_trains_leaves_the_ratio_undecided():
    table = ends({("batch", 0.1, 1.0, BATCH): 0.01, ("none", 0.1, 1.0, BATCH): 2.3})
    assert verdicts(training.rate_claims(table, batch_size=BATCH))["C3.2"] == "not decided"


def test_tiny_batches_are_decided_both_ways():
    assert set(verdicts(training.batch_claims(ends(SIZES), lr=LR, batch_size=BATCH)).values()) == {"reproduced"}
    other = verdicts(training.batch_claims(ends(SIZES, swapped=True), lr=LR, batch_size=BATCH))
    assert set(other.values()) == {"not reproduced"}


def identity(error, ratio):
    rows = [
        (net, eps, 1e-3, seed, error if eps == 0 else 0.5, error if eps == 0 else 0.5, 1.0 if eps == 0 else ratio)
        for net in ("net", "one layer") for eps in (0.0, 1e-5) for seed in range(3)
    ]  # fmt: skip
    names = ["net", "epsilon", "factor", "seed", "output_error", "gradient_error", "gradient_ratio"]
    return pd.DataFrame(rows, columns=names)


def test_the_identity_is_judged_at_eps_0_alone():
    assert verdicts(training.identity_claims(identity(1e-14, 0.5))) == {"C3.1": "reproduced", "C3.1 eps": "reproduced"}
    other = verdicts(training.identity_claims(identity(1e-8, 1.0)))
    assert other == {"C3.1": "not reproduced", "C3.1 eps": "not reproduced"}


def landscape(rough, smooth, seeds=5):
    rows = [
        (norm, seed, updates, factor, 1.0, 1.0 - size * factor, 2.0, size * factor)
        for norm, size in (("none", rough), ("batch", smooth)) for seed in range(seeds)
        for updates in (0, 10) for factor in (0.5, 4.0)
    ]  # fmt: skip
    names = ["norm", "seed", "updates", "factor", "start", "loss", "grad_norm", "grad_change"]
    return pd.DataFrame(rows, columns=names)


def test_landscape_measures_are_ranges_over_factors():
    found = training.landscape_measures(landscape(1.0, 0.1), lr=0.1)
    rough = found[(found["norm"] == "none") & (found["updates"] == 0)].iloc[0]
    assert rough["loss_range"] == pytest.approx(3.5)
    assert rough["grad_change"] == pytest.approx(4.0)
    assert rough["relative_change"] == pytest.approx(2.0)
    assert rough["relative_range"] == pytest.approx(3.5 / (0.1 * 4))


def test_landscape_is_decided_both_ways_and_a_step_to_infinity_is_large():
    assert set(verdicts(training.landscape_claims(landscape(1.0, 0.1), lr=0.1)).values()) == {"reproduced"}
    assert set(verdicts(training.landscape_claims(landscape(0.1, 1.0), lr=0.1)).values()) == {"not reproduced"}
    wild = landscape(1.0, 0.1)
    wild.loc[wild["norm"] == "none", ["loss", "grad_change"]] = math.nan
    claims = training.landscape_claims(wild, lr=0.1)
    assert {str(claim.verdict) for claim in claims} == {"reproduced"}
    assert claims[0].measured == math.inf


def test_separation_by_permutation():
    about = {"id": "X", "statement": "Larger.", "source": "here"}
    separated = training.decide_separated([4, 5, 6.0], [1, 2, 3.0], **about)
    assert separated.p_value == pytest.approx(1 / 20)
    assert str(separated.verdict) == "reproduced"
    assert str(training.decide_separated([4, 5.0], [1, 2.0], **about).verdict) == "not decided"  # p = 1/6
    mixed = training.decide_separated([4, 5, 6, 7, 2.5], [1, 2, 3, 0, 0.5], **about)
    assert mixed.p_value < 0.05
    assert str(mixed.verdict) == "not decided"  # significant, but not on every seed
    assert str(training.decide_separated([1.0, math.nan], [1, 2.0], **about).verdict) == "not decided"


def modes(fast, slow, seeds=3):
    rows = [
        (momentum, seed, step, 1.0, 1.0 + (gap * (1 + 0.05 * seed) if step < 50 else 0.0))
        for momentum, gap in ((0.1, fast), (0.01, slow)) for seed in range(seeds) for step in (0, 10, 100)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["momentum", "seed", "step", "in_training", "in_evaluation"])


def test_lag_is_decided_both_ways():
    assert set(verdicts(training.running_claims(modes(0.1, 0.5))).values()) == {"reproduced"}
    assert set(verdicts(training.running_claims(modes(-0.1, -0.5))).values()) == {"not reproduced"}


def explosion(square, bare=1.0, depth=40, seeds=3):
    rows = [
        (activation, norm, size, 512, seed, place, -0.5 * place * math.log(value * (1 + 1e-4 * seed)))
        for activation, norm, size, value in (
            *(("relu", "batch", size, square) for size in (32, 128, 512)), ("relu", "none", 128, bare),
        )
        for seed in range(seeds) for place in range(1, depth + 1)
    ]  # fmt: skip
    names = ["activation", "norm", "batch_size", "width", "seed", "place", "log_grad_norm"]
    return pd.DataFrame(rows, columns=names)


def test_explosion_is_decided_both_ways():
    rate = math.pi / (math.pi - 1)
    assert start.squared_gains(explosion(rate))["gain"].iloc[0] == pytest.approx(rate)
    found = verdicts(start.explosion_claims(explosion(rate)))
    assert [found[f"C2.4 relu {size}"] for size in (32, 128, 512)] == ["reproduced"] * 3
    assert found["C2.4 worse"] == "reproduced"
    assert found["C2.4 finite"] == "not reproduced"  # 1.522 at a batch of 32
    assert found["C2.4 tanh 128"] == "not decided"
    other = verdicts(start.explosion_claims(explosion(rate * 1.03, bare=1.6)))
    assert other["C2.4 relu 32"] == "reproduced"  # 5 % there
    assert [other[f"C2.4 relu {size}"] for size in (128, 512)] == ["not reproduced"] * 2
    assert other["C2.4 worse"] == "not reproduced"


def growth(base, slope, end, seeds=3, blocks=50):
    block = np.arange(blocks + 1)
    frames = []
    for seed in range(seeds):
        near = 1 + 1e-3 * seed
        signals = {"no norm": base**block * near, "BatchNorm": 1 + slope * block * near}
        signals["no norm, scaled"] = end ** (block / blocks) * near
        for kind, signal in signals.items():
            columns = {"kind": kind, "block": block, "seed": seed, "signal": signal, "gradient": signal[::-1]}
            frames.append(pd.DataFrame(columns))
    return pd.concat(frames)


def test_growth_is_decided_both_ways():
    assert set(verdicts(start.growth_claims(growth(2.0, 1.0, 2.69))).values()) == {"reproduced"}
    assert set(verdicts(start.growth_claims(growth(1.9, 0.7, 4.0))).values()) == {"not reproduced"}


def test_a_short_net_leaves_deep_blocks_undecided():
    found = verdicts(start.growth_claims(growth(2.0, 1.0, 2.65, blocks=20)))
    assert found["C3.4 linear 10"] == "reproduced"
    assert found["C3.4 linear 25"] == found["C3.4 linear 50"] == "not decided"


def test_nothing_measured_decides_nothing():
    none = pd.DataFrame()
    claims = [
        *training.identity_claims(none), *training.scale_claims(none, lr=LR, batch_size=BATCH, steps=300),
        *training.rate_claims(none, batch_size=BATCH), *training.batch_claims(none, lr=LR, batch_size=BATCH),
        *training.landscape_claims(none, lr=0.1), *training.running_claims(none),
        *start.explosion_claims(none), *start.growth_claims(none),
    ]  # fmt: skip
    assert {str(claim.verdict) for claim in claims} == {"not decided"}
    assert len({claim.id for claim in claims}) == len(claims)
