"""Half-lives of the gradient through time against closed forms."""

import math

import numpy as np
import pandas as pd
import pytest

from gradlab.analysis import gradient_half_life
from gradlab.errors import DataError


def table(log10_norms, **keys):
    rows = {"step": 0, "layer": "rnn", "call": 0, "level": 0, "direction": "forward", "state": "h"} | keys
    return pd.DataFrame(rows | {"t": range(len(log10_norms)), "norm": 1.0, "log10_grad_norm": log10_norms})


@pytest.mark.parametrize("rho", [0.5, 0.9, 0.999], ids=str)
def test_half_life_of_a_pure_decay(rho):
    steps = 4000 if rho > 0.99 else 50
    found = gradient_half_life(table([(steps - 1 - t) * math.log10(rho) for t in range(steps)]))
    (row,) = found.to_dict("records")
    assert row["gain"] == pytest.approx(rho, rel=1e-9)
    assert row["half_life"] == pytest.approx(math.log(2) / -math.log(rho), rel=1e-9)
    assert row["half_life_low"] == pytest.approx(row["half_life_high"], rel=1e-6)
    assert (row["shape"], row["points"], row["dropped"]) == ("exponential", steps, 0)


def test_norms_far_below_the_range_of_float64_count():
    (row,) = gradient_half_life(table([-2.0 * (999 - t) for t in range(1000)])).to_dict("records")
    assert row["half_life"] == pytest.approx(math.log10(2) / 2)


def test_a_backward_sweep_is_read_the_other_way_round():
    falling = [t * math.log10(0.8) for t in range(30)]
    both = pd.concat([table(falling, direction="backward"), table(falling[::-1])])
    assert gradient_half_life(both)["half_life"].tolist() == pytest.approx([math.log(2) / -math.log(0.8)] * 2)


def test_growing_gradients_never_halve():
    (row,) = gradient_half_life(table([(29 - t) * 0.1 for t in range(30)])).to_dict("records")
    assert row["half_life"] == row["half_life_high"] == math.inf
    assert row["gain"] == pytest.approx(10**0.1)


def test_zero_and_nan_norms_are_dropped_and_counted():
    norms = [(29 - t) * math.log10(0.5) for t in range(30)]
    norms[3], norms[4], norms[5] = -math.inf, math.nan, math.inf
    (row,) = gradient_half_life(table(norms)).to_dict("records")
    assert row["half_life"] == pytest.approx(1.0)
    assert row["dropped"] == 3


def test_skip_leaves_out_the_short_lags():
    norms = [-0.1 * (39 - t) - (0.0 if t > 34 else 3.0) for t in range(40)]
    (row,) = gradient_half_life(table(norms), skip=5).to_dict("records")
    assert row["gain"] == pytest.approx(10**-0.1)


def test_merged_traces_are_kept_apart():
    frames = [table([(19 - t) * math.log10(rho) for t in range(20)], seed=seed) for seed, rho in enumerate((0.5, 0.25))]
    found = gradient_half_life(pd.concat(frames))
    assert found["seed"].tolist() == [0, 1]
    np.testing.assert_allclose(found["half_life"], [1.0, 0.5])
    assert list(found)[:3] == ["seed", "step", "layer"]


def test_too_few_time_steps_give_no_half_life():
    (row,) = gradient_half_life(table([0.0, 1.0])).to_dict("records")
    assert math.isnan(row["half_life"])
    assert row["shape"] == "unclear"


@pytest.mark.parametrize("frame", [pd.DataFrame(), pd.DataFrame({"t": [0]})], ids=["empty", "no norms"])
def test_a_table_without_time_steps_is_one_sentence(frame):
    with pytest.raises(DataError, match=r"record one with watch\(model, timesteps=True\)"):
        gradient_half_life(frame)
