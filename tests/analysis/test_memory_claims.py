"""Claims about memory from hand-made runs."""

import math

import numpy as np
import pandas as pd
import pytest

from gradlab.analysis.memory_claims import memory_claims

NAN = float("nan")
SIZES = {"tanh": 1_185, "gru": 3_489, "lstm": 4_641, "lstm chrono": 4_641, "lstm bias 1": 4_641}
CHRONO, GRU = [600, 650, 550, 700, 600], [400, 450, 400, 500, 400]
LSTM, BIAS = [1050, NAN, 1100, NAN, 1150], [1000, NAN, NAN, 1150, 1100]


def adding(*, chrono=CHRONO, lstm=LSTM, tanh_best=0.16, length=100, cap=1200, **more):
    times = {"lstm chrono": chrono, "lstm": lstm, "lstm bias 1": BIAS, "gru": GRU, "tanh": [NAN] * 5} | more
    rows = []
    for net, solved in times.items():
        for seed, at in enumerate(solved):
            best = tanh_best if net == "tanh" else 0.1 if math.isnan(at) else 0.008
            rows.append((net, length, seed, cap, at, best, best, SIZES.get(net, 1)))
    names = ["net", "length", "seed", "steps", "solved_at", "best", "last", "parameters"]
    return pd.DataFrame(rows, columns=names)


def copying(*, tanh=1.005, chrono=1.06, cap=600):
    base = 0.1733
    rows = [
        (net, seed, 100, cap, base * (ratio + 1e-3 * seed), base)
        for net, ratio in (("tanh", tanh), ("lstm chrono", chrono))
        for seed in range(3)
    ]
    return pd.DataFrame(rows, columns=["net", "seed", "length", "steps", "last", "baseline"])


def query(*, off=1.005, latent=0.01, growing=0.17):
    rows = []
    for seed in range(3):
        for k in (1, 2, 4, 8, 16):
            bayes = math.log(2) * 0.95**k
            factor = off if k <= 8 else 1.06
            rows.append((f"markov {k}", seed, bayes * factor * (1 + 1e-3 * seed), NAN, bayes, 194 + 256 * k))
        for net in ("tanh", "gru", "lstm", "transformer"):
            rows.append((net, seed, latent, 100 + 50 * seed, 0.0, 1282))
        rows.append(("growing", seed, growing, NAN, 0.0, 16_578))
    return pd.DataFrame(rows, columns=["net", "seed", "last", "solved_at", "bayes", "parameters"]).assign(
        length=64, steps=600
    )


def table(off=1.0):
    rows = [(k, seed, off * math.log(2) * 0.95**k * (1 + 1e-3 * seed)) for k in (1, 32) for seed in range(3)]
    frame = pd.DataFrame(rows, columns=["window", "seed", "loss"])
    return frame.assign(bayes=math.log(2) * 0.95 ** frame["window"])


def decided(*tables):
    return {claim.id: claim for claim in memory_claims(*tables)}


def test_a_world_as_measured():
    found = decided(adding(), copying(), query(), table())
    verdicts = {name: str(claim.verdict) for name, claim in found.items()}
    assert len(found) == len(memory_claims(adding(), copying(), query(), table()))  # ids are unique
    reproduced = [
        "C5.7 chrono", "C5.7 chrono, bias 1", "C5.7 GRU", "C5.7 tanh", "C5.8 plateau", "C6 table", "C6 latent tanh RNN",
        "C6 latent GRU", "C6 latent LSTM", "C6 Transformer", "N7 growing", "N7 weights",
        *(f"C6 Markov {k}" for k in (1, 2, 4, 8)),
    ]  # fmt: skip
    assert {name for name, verdict in verdicts.items() if verdict == "reproduced"} == set(reproduced)
    assert "not reproduced" not in verdicts.values()
    assert "C6 Markov 16" not in found  # the rule is about k up to 8
    assert found["C5.7 chrono"].p_value == 1 / 252
    assert "the factor is 1.82" in found["C5.7 factor 7"].detail  # (1000 + 1150 + 1100 + 2 * 1200) / 3100
    assert "3,489 and 4,641 parameters." in found["C5.7 GRU"].detail
    assert "after 600 steps tanh 0.1743, lstm chrono 0.1839." in found["C5.8 plateau"].detail


def test_another_world_is_not_reproduced():
    tables = (
        adding(chrono=LSTM, lstm=CHRONO, tanh_best=0.005), copying(tanh=1.2), query(off=1.08, latent=0.3, growing=0.01),
        table(1.1),
    )  # fmt: skip
    found = decided(*tables)
    for name in (
        "C5.7 chrono", "C5.7 tanh", "C5.8 plateau", "C6 Markov 1", "C6 Markov 8", "C6 table", "C6 latent GRU",
        "C6 Transformer", "N7 growing",
    ):  # fmt: skip
        assert str(found[name].verdict) == "not reproduced", name


def test_short_runs_decide_nothing_about_long_ones():
    found = decided(adding(length=50), copying(chrono=0.99), query(), table())
    assert {str(found[name].verdict) for name in found if name.startswith("C5.7")} == {"not decided"}
    assert "T = 100 and more, and the longest here is 50" in found["C5.7 chrono"].detail
    assert str(found["C5.8 beats baseline"].verdict) == "not decided"


def test_only_the_longest_problem_counts():
    both = pd.concat([adding(length=50, chrono=LSTM, lstm=CHRONO), adding()])
    assert str(decided(both, copying(), query(), table())["C5.7 chrono"].verdict) == "reproduced"


@pytest.mark.parametrize(
    ("frame", "name", "verdict"),
    [
        (adding(irnn=[300] * 3), "C5.7 IRNN", "reproduced"),
        (adding(irnn=[NAN] * 3), "C5.7 IRNN", "not decided"),
        (adding(irnn=[NAN] * 3, cap=50_000), "C5.7 IRNN", "not reproduced"),
        (adding(orthogonal=[NAN] * 3), "C5.7 orthogonal tanh RNN", "not decided"),
    ],
    ids=["solves", "given up early", "given up late", "orthogonal"],
)
def test_failure_in_a_short_run_is_no_refutation(frame, name, verdict):
    assert str(decided(frame, copying(), query(), table())[name].verdict) == verdict


def test_copying_better_than_the_baseline_is_decided():
    found = decided(adding(), copying(chrono=0.5), query(), table())
    assert str(found["C5.8 beats baseline"].verdict) == "reproduced"
    late = decided(adding(), copying(chrono=1.0, cap=50_000), query(), table())
    assert str(late["C5.8 beats baseline"].verdict) == "not reproduced"


def test_weights_that_do_not_grow_evenly_are_seen():
    runs = query()
    runs.loc[runs["net"] == "markov 8", "parameters"] += 1
    assert str(decided(adding(), copying(), runs, table())["N7 weights"].verdict) == "not reproduced"


def test_nothing_measured_decides_nothing():
    empty = pd.DataFrame()
    assert {str(claim.verdict) for claim in memory_claims(empty, empty, empty, empty)} == {"not decided"}


def test_a_diverged_run_is_not_a_success():
    runs = query()
    runs.loc[(runs["net"] == "gru") & (runs["seed"] == 0), "last"] = np.inf
    assert str(decided(adding(), copying(), runs, table())["C6 latent GRU"].verdict) == "not decided"
