"""Claims about the memory of gated nets from hand-made decays."""

import numpy as np
import pandas as pd
import pytest

from gradlab.analysis.cell_claims import cell_claims, gains

NAMES = ["net", "init", "seed", "lag", "log_full", "log_path"]


def decays(rates, *, steps=200, seeds=3, spread=1e-3):
    """Exact exponentials; `rates` maps (net, init) to the factors a step by all paths and along the memory."""
    rng = np.random.default_rng(0)
    frames = []
    for (net, init), (full, path) in rates.items():
        for seed in range(seeds):
            lag = np.arange(steps)
            off = spread * rng.standard_normal()
            columns = {"lag": lag, "log_full": 1.5 + lag * (np.log(full) + off), "log_path": 1.5 + lag * np.log(path)}
            frames.append(pd.DataFrame({"net": net, "init": init, "seed": seed, **columns}))
    return pd.concat(frames, ignore_index=True)[NAMES]


def means(gate=0.5, bias=0.731, error=1e-15):
    rows = [("lstm", init, seed, error, g) for init, g in (("default", gate), ("bias 1", bias)) for seed in range(3)]
    return pd.DataFrame(rows, columns=["net", "init", "seed", "path_error", "gate_mean"])


def verdicts(gradients, table):
    return {claim.id: str(claim.verdict) for claim in cell_claims(gradients, table)}


def test_gains_of_exponentials_are_their_factors():
    table = gains(decays({("lstm", "default"): (0.65, 0.53), ("gru", "bias 1"): (0.8, 0.7)}, spread=0))
    assert table.groupby(["net", "init"])["full"].first().to_dict() == pytest.approx(
        {("lstm", "default"): 0.65, ("gru", "bias 1"): 0.8}
    )
    assert table["path"].tolist() == pytest.approx([0.53] * 3 + [0.7] * 3)


def test_a_world_as_published_reproduces_all():
    rates = {
        ("lstm", "default"): (0.646, 0.535),
        ("lstm", "bias 1"): (0.872, 0.758),
        ("lstm", "bias 2"): (0.987, 0.904),
        ("lstm", "bias 3"): (1.006, 0.963),
        ("lstm", "chrono 200"): (0.9926, 0.9921),
        ("gru", "default"): (0.639, 0.5),
    }
    assert set(verdicts(decays(rates), means()).values()) == {"reproduced"}


def test_a_world_where_the_cell_keeps_all_reproduces_none_of_the_vanishing():
    found = verdicts(decays({("lstm", "default"): (0.98, 0.9995), ("gru", "default"): (0.98, 0.9995)}), means(0.99))
    assert found["C5.5 vanish lstm"] == found["C5.5 vanish gru"] == "not reproduced"
    assert found["C5.5 rest default"] == "not reproduced"
    assert found["C5.6 default"] == "not reproduced"
    assert found["C5.5 gate default"] == "not reproduced"


def test_a_path_that_is_not_the_product_is_not_exact():
    found = verdicts(decays({("lstm", "default"): (0.6, 0.5)}), means(error=1e-6))
    assert found["C5.5 path"] == "not reproduced"


@pytest.mark.parametrize("steps", [20, 100], ids=["20-steps", "100-steps"])
def test_too_short_a_run_does_not_decide_the_horizon(steps):
    found = verdicts(decays({("lstm", "default"): (0.6, 0.5)}, steps=steps), means())
    assert found["C5.6 default"] == "not decided"


def test_nothing_measured_decides_nothing():
    assert set(verdicts(pd.DataFrame(), pd.DataFrame()).values()) == {"not decided"}
