"""Claims about forgetting from hand-made decays."""

import numpy as np
import pandas as pd
import pytest

from gradlab.analysis.forgetting_claims import forgetting_claims, rates_a_step

COUNTS = pd.DataFrame({"core": ["rnn", "gru", "lstm"], "parameters": [24_832, 74_496, 99_328]})


def tables(nets, *, exponent_off=0.0, steps=400):
    """`nets` maps a name to (gain, Pascanu's bound)."""
    rng = np.random.default_rng(0)
    lags, rates = [], []
    for net, (gain, bound) in nets.items():
        for seed in range(3):
            slope = np.log(gain) + 1e-3 * rng.standard_normal()
            lag = np.arange(0, steps, 5)
            lags.append(pd.DataFrame({"net": net, "seed": seed, "lag": lag, "log_norm": slope * lag}))
            rates.append((net, seed, slope + exponent_off, bound))
    return pd.concat(lags), pd.DataFrame(rates, columns=["net", "seed", "exponent", "pascanu_bound"])


def attention(slope):
    lag = np.arange(200)
    return pd.concat(pd.DataFrame({"seed": s, "lag": lag, "log_norm": slope * lag + 0.01 * s}) for s in range(3))


def verdicts(*args, **options):
    options = {"tabulated": True} | options
    return {claim.id: str(claim.verdict) for claim in forgetting_claims(*args, **options)}


NETS = {
    "tanh 1": (0.762, 1.98), "tanh 0.4": (0.339, 0.79), "relu 1": (0.705, 1.9), "sigmoid 8": (0.851, 3.9),
    "rnn default": (0.476, float("nan")),
}  # fmt: skip


def test_rates_of_exponentials_are_their_factors():
    lags, _ = tables({"tanh 1": (0.5, 1.0)})
    assert rates_a_step(lags)["gain"].tolist() == pytest.approx([0.5] * 3, rel=0.01)


def test_a_world_as_measured():
    found = verdicts(*tables(NETS), attention(1e-4), COUNTS)
    assert {found[f"C5.1 {net}"] for net in NETS} == {"reproduced"}
    assert found["C5.1 table tanh 1"] == found["C5.1 table relu 1"] == found["C5.1 table sigmoid 8"] == "reproduced"
    assert found["C5.2 sufficient"] == found["C5.2 not exploding"] == "reproduced"
    assert found["N8 sigmoid"] == "reproduced"
    assert found["N8 tanh"] == found["N8 relu"] == "not reproduced"
    assert found["C5.4"] == found["C6 attention"] == found["C6 recurrent"] == "reproduced"


def test_wrong_exponents_counterexamples_and_slopes_are_not_reproduced():
    nets = {"tanh 1": (1.2, 0.9), "sigmoid 8": (1.1, 3.9), "rnn default": (0.8, float("nan"))}
    found = verdicts(*tables(nets, exponent_off=0.1), attention(-0.1), COUNTS.assign(parameters=[10, 29, 41]))
    assert found["C5.1 tanh 1"] == found["C5.2 sufficient"] == found["C5.2 not exploding"] == "not reproduced"
    assert found["N8 sigmoid"] == found["C5.4"] == found["C6 attention"] == found["C6 recurrent"] == "not reproduced"


def test_other_sizes_are_not_held_against_the_table():
    assert not any("table" in name for name in verdicts(*tables(NETS), attention(0), COUNTS, tabulated=False))


def test_nothing_measured_decides_nothing():
    empty = pd.DataFrame()
    assert set(verdicts(empty, empty, empty, empty).values()) == {"not decided"}
