"""Claims about architectures from hand-made tables: worlds in which they hold, and in which they do not."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from gradlab.analysis import architecture_claims as decide
from gradlab.analysis.architecture_size_claims import _CHANNELS, _COUNTS, _FIELDS, _SAVINGS
from gradlab.analysis.family_profiles import depth_slopes, dropout_gains, head_ratios, log_ratios, piece_gradients
from gradlab.errors import DataError

EMPTY = pd.DataFrame()


def verdicts(claims):
    assert len({claim.id for claim in claims}) == len(claims)
    return {claim.id: str(claim.verdict) for claim in claims}


def nets(change=0):
    rows = [(net, count + change, 1000) for _, family in _COUNTS.values() for net, count in family.items()]
    return pd.DataFrame(rows, columns=["net", "parameters", "linear_parameters"])


def fields(change=0):
    rows = [(net, place, field + change, field) for (net, place), field in _FIELDS.items()]
    rows += [("3x3", f"{n} of 3x3", 2 * n + 1 + change, 2 * n + 1) for n in (2, 3)]
    return pd.DataFrame(rows, columns=["net", "place", "measured", "arithmetic"])


def savings(change=0):
    rows = [(block, 100 * kept + change, 100 * plain) for block, (_, kept, plain, *_) in _SAVINGS.items()]
    return pd.DataFrame(rows, columns=["block", "parameters", "plain"])


def channels(change=0):
    return pd.DataFrame([(name, count + change) for name, count in _CHANNELS.items()], columns=["piece", "channels"])


def test_counts_decide_and_the_notes_wrong_numbers_are_not_reproduced() -> None:
    found = verdicts(decide.size_claims(nets(), fields(), savings(), channels()))
    wrong = {"N2 size", "N3 size"}
    assert {key for key, verdict in found.items() if verdict == "not reproduced"} == wrong
    assert set(found.values()) == {"reproduced", "not reproduced"}


def test_one_parameter_or_pixel_too_many_is_not_reproduced() -> None:
    found = verdicts(decide.size_claims(nets(1), fields(1), savings(1), channels(1)))
    assert {key for key, verdict in found.items() if verdict == "reproduced"} == {"N1 size"}  # "about 60M"


def test_the_notes_claims_show_the_count() -> None:
    claims = {claim.id: claim for claim in decide.size_claims(nets(), EMPTY, EMPTY, EMPTY)}
    assert claims["N2 size"].measured == 132_863_336
    assert "6,998,552" in claims["N3 size"].detail


def stacks(slopes, *, seeds=5, depths=(6, 12, 24, 40)):
    rng = np.random.default_rng(0)
    rows = []
    for (growth, norm), slope in slopes.items():
        for seed in range(seeds):
            off = 1e-3 * rng.standard_normal()
            rows += [("trunk.stem", np.exp((slope + off) * d), growth, norm, d, seed) for d in depths]
    return pd.DataFrame(rows, columns=["layer", "grad_norm", "growth", "norm", "depth", "seed"])


def test_slopes_of_exponentials_are_their_rates() -> None:
    table = depth_slopes(stacks({("plain", "none"): -0.9, ("dense", "none"): -0.02}, seeds=1))
    assert table["slope"].tolist() == pytest.approx([-0.9, -0.02], abs=3e-3)


def test_growth_as_published_and_otherwise() -> None:
    good = {("plain", "none"): -0.95, ("residual", "none"): 0.07, ("dense", "none"): -0.02}
    assert set(verdicts(decide.growth_claims(stacks(good))).values()) == {"reproduced"}
    bad = {("plain", "none"): -0.5, ("residual", "none"): 0.01, ("dense", "none"): -0.2}
    assert set(verdicts(decide.growth_claims(stacks(bad))).values()) == {"not reproduced"}
    assert verdicts(decide.growth_claims(stacks(good, seeds=2)))["C4 plain"] == "not decided"
    assert verdicts(decide.growth_claims(stacks(good, depths=(6,))))["C4 dense"] == "not decided"


def head_rows(ratio, seeds=3, norm="none"):
    rows = [
        ("trunk.conv2.conv.weight", (ratio if heads else 1.0) * (1 + 0.1 * seed), norm, init, heads, seed)
        for init in ("default", "he_normal")
        for heads in (False, True)
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows, columns=["param", "grad_norm", "norm", "init", "heads", "seed"])


@pytest.mark.parametrize(("ratio", "verdict"), [(92.0, "reproduced"), (1.5, "not reproduced")], ids=["92", "1.5"])
def test_heads(ratio: float, verdict: str) -> None:
    params = head_rows(ratio)
    assert head_ratios(params)["ratio"].tolist() == pytest.approx([ratio] * 6)
    (claim,) = decide.heads_claims(params)
    assert str(claim.verdict) == verdict
    assert "he_normal, no norm" in claim.detail


def profile(ratios, *, dropout=0.0, gain=2.0, seeds=5):
    """Two pieces with weights and a dropout between them; the ratio is first over last."""
    rng = np.random.default_rng(1)
    rows = []
    for (activation, init), ratio in ratios.items():
        for seed in range(seeds):
            noisy = ratio * (1 + 0.01 * rng.standard_normal())
            own = (activation, init, seed)
            rows += [
                ("trunk.conv1", "Sequential", 0, noisy, *own),
                ("trunk.flatten", "Flatten", 1, np.sqrt(gain * (1 + 0.005 * rng.standard_normal())), *own),
                ("trunk.dropout1", "Dropout", 2, 1.0, *own),
                ("trunk.linear2", "Sequential", 3, 1.0, *own),
            ]
    names = ["layer", "kind", "order", "grad_norm", "activation", "init", "seed"]
    return pd.DataFrame(rows, columns=names).assign(family="alexnet", norm="none", dropout=dropout)


def ends(losses, *, dropout=0.0, error=10.0, seeds=3):
    rng = np.random.default_rng(2)  # without any spread three pairs carry no p below 1/8
    rows = [
        (activation, seed, loss + 0.01 * rng.standard_normal(), error + 0.2 * rng.standard_normal())
        for activation, loss in losses.items()
        for seed in range(seeds)
    ]
    frame = pd.DataFrame(rows, columns=["activation", "seed", "train_loss", "test_error"])
    return frame.assign(family="alexnet", norm="none", dropout=dropout, heads=False, init="he_normal")


def test_pieces_without_weights_are_no_places() -> None:
    table = piece_gradients(profile({("relu", "default"): 0.1}, seeds=1), ["activation", "seed"])
    assert table["layer"].tolist() == ["trunk.conv1", "trunk.linear2"]
    assert table["log10_ratio"].tolist() == pytest.approx([-1.0, 0.0], abs=0.02)
    with pytest.raises(DataError, match="pieces of a net"):
        piece_gradients(EMPTY, ["seed"])
    assert len(log_ratios(profile({("relu", "default"): 0.1}))) == 5


def test_activations_as_the_notes_have_it_and_otherwise() -> None:
    both = ("he_normal", "default")
    good = {("relu", i): 0.9 for i in both} | {("tanh", i): 0.5 for i in both} | {("sigmoid", i): 1e-4 for i in both}
    found = verdicts(decide.activation_claims(profile(good), ends({"relu": 0.5, "tanh": 0.7, "sigmoid": 2.3})))
    assert len(found) == 6
    assert set(found.values()) == {"reproduced"}
    bad = {key: 1 / value for key, value in good.items()}
    found = verdicts(decide.activation_claims(profile(bad), ends({"relu": 0.7, "tanh": 0.5, "sigmoid": 0.1})))
    assert set(found.values()) == {"not reproduced"}


def test_a_diverged_run_leaves_the_comparison_undecided() -> None:
    table = ends({"relu": 0.5, "tanh": 0.7, "sigmoid": 2.3})
    table.loc[0, "train_loss"] = np.inf
    found = verdicts(decide.activation_claims(EMPTY, table))
    assert found["N1 tanh loss"] == found["N1 sigmoid loss"] == "not decided"


@pytest.mark.parametrize(("gain", "verdict"), [(2.0, "reproduced"), (1.0, "not reproduced")], ids=["2", "1"])
def test_dropout_gain_is_that_of_the_mask(gain: float, verdict: str) -> None:
    layers = profile({("relu", "he_normal"): 1.0}, dropout=0.5, gain=gain)
    assert dropout_gains(layers)["gain"].mean() == pytest.approx(gain, rel=0.01)
    table = pd.concat([ends({"relu": 1.0}, error=20.0), ends({"relu": 1.0}, dropout=0.5, error=11.0)])
    table["test_error"] += np.arange(len(table)) % 2
    found = verdicts(decide.dropout_claims(layers, table))
    assert found == {"N1 dropout gain": verdict, "N1 dropout error": "reproduced"}


def test_nothing_measured_decides_nothing() -> None:
    claims = [
        *decide.size_claims(EMPTY, EMPTY, EMPTY, EMPTY),
        *decide.growth_claims(EMPTY),
        *decide.heads_claims(EMPTY),
        *decide.activation_claims(EMPTY, EMPTY),
        *decide.dropout_claims(EMPTY, EMPTY),
    ]
    assert set(verdicts(claims).values()) == {"not decided"}
