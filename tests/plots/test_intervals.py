from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from gradlab.errors import DataError
from gradlab.plots.intervals import interval_note, seed_intervals


def frame(values: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"layer": 1, "value": values})


@pytest.mark.parametrize("log", [False, True], ids=["plain", "log"])
def test_interval_is_scipys_student_interval(log: bool) -> None:
    values = np.array([0.5, 2.0, 3.0, 11.0])
    got = seed_intervals(frame(values.tolist()), ["layer"], "value", log=log).iloc[0]
    samples = np.log10(values) if log else values
    low, high = stats.t.interval(0.95, 3, samples.mean(), stats.sem(samples))
    expected = np.array([samples.mean(), low, high])
    np.testing.assert_allclose(got[["mean", "low", "high"]].astype(float), 10**expected if log else expected)
    assert (got["n"], got["lost"]) == (4, 0)


def test_two_seeds_give_smallest_and_largest() -> None:
    got = seed_intervals(frame([1.0, 4.0]), ["layer"], "value", log=True).iloc[0]
    assert got[["mean", "low", "high"]].tolist() == pytest.approx([2.0, 1.0, 4.0])


def test_one_seed_has_no_interval() -> None:
    got = seed_intervals(frame([3.0]), ["layer"], "value", log=False).iloc[0]
    assert got["mean"] == 3.0
    assert np.isnan(got["low"])
    assert np.isnan(got["high"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.0, -1.0], ids=str)
def test_values_without_a_logarithm_are_counted_and_left_out(bad: float) -> None:
    got = seed_intervals(frame([1.0, bad, 100.0]), ["layer"], "value", log=True).iloc[0]
    assert got["mean"] == pytest.approx(10.0)
    assert (got["n"], got["lost"]) == (2, 1)


def test_zero_is_a_value_without_log() -> None:
    got = seed_intervals(frame([0.0, 2.0]), ["layer"], "value", log=False).iloc[0]
    assert (got["mean"], got["lost"]) == (1.0, 0)


def test_no_value_at_all_is_a_gap() -> None:
    got = seed_intervals(frame([np.nan, np.inf]), ["layer"], "value", log=True).iloc[0]
    assert np.isnan(got["mean"])
    assert (got["n"], got["lost"]) == (0, 2)


def test_extreme_norms_stay_finite() -> None:
    got = seed_intervals(frame([1e-300, 1e-51, 1e-290]), ["layer"], "value", log=True).iloc[0]
    assert np.isfinite(got[["mean", "low", "high"]].astype(float)).all()
    assert got["mean"] == pytest.approx(10 ** (-(300 + 51 + 290) / 3), rel=1e-6)


@pytest.mark.parametrize("given", [pd.DataFrame(), pd.DataFrame({"layer": [1]})], ids=["empty", "lacks a column"])
def test_what_is_missing_is_a_data_error(given: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="measurements"):
        seed_intervals(given, ["layer"], "value", log=False)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([5, 5], "95 % Student intervals over 5 seeds"),
        ([3, 5], "over 3 to 5 seeds"),
        ([0, 2, 5], "smallest to largest where there are fewer than 3"),
        ([2, 2], "from the smallest to the largest of 2 seeds"),
        ([1, 1], "One seed: no interval"),
        ([0], "no interval"),
    ],
    ids=str,
)
def test_note_says_what_the_band_is(counts: list[int], words: str) -> None:
    assert words in interval_note(pd.DataFrame({"n": counts}), log=True)
