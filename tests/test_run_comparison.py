"""Two runs side by side: a difference that is there is found, one that is not is not, and p-values are Welch's."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_ind

from gradlab.analysis.claims import Claim, Verdict
from gradlab.run_comparison import _claim_table, final_loss_tests


def losses(means: dict[str, float], *, seeds: int = 5, steps: int = 20, noise: int = 0) -> pd.DataFrame:
    """Runs whose loss falls from 9 to a mean of its net's, with its own noise for each seed over the last steps."""
    dice = np.random.default_rng(noise)
    rows = []
    for net, mean in means.items():
        for seed in range(seeds):
            end = mean + 0.01 * dice.standard_normal()
            rows += [
                {"cell": f"{net}{seed}", "net": net, "width": 8, "seed": seed, "step": step,
                 "loss": end if step >= 17 else 9.0, "status": "done", "part": "train"}
                for step in range(steps)
            ]  # fmt: skip
    return pd.DataFrame(rows)


def test_the_net_that_differs_is_named_by_its_setting_and_the_other_is_not():
    table = final_loss_tests(losses({"plain": 1.0, "residual": 0.5}), losses({"plain": 1.2, "residual": 0.5}, noise=1))
    assert table["setting"].tolist() == ["net=plain", "net=residual"]
    assert table["p_holm"][0] < 1e-4
    assert table["p_holm"][1] > 0.05
    assert table["first"].tolist() == pytest.approx([1.0, 0.5], abs=0.02)  # the last tenth of steps, not the mean


def test_p_values_are_welchs_and_holms():
    first, second = losses({"a": 1.0, "b": 1.0}), losses({"a": 1.01, "b": 1.0}, noise=2)
    table = final_loss_tests(first, second)
    for row in table.itertuples():
        ends = [own[(own["net"] == row.setting[4:]) & (own["step"] == 19)]["loss"] for own in (first, second)]
        assert row.p_value == pytest.approx(ttest_ind(*ends, equal_var=False).pvalue)
    small, large = sorted(table["p_value"])
    assert sorted(table["p_holm"]) == pytest.approx([min(1, 2 * small), max(min(1, 2 * small), large)])


@pytest.mark.parametrize("seeds", [1, 2], ids=["one seed", "two seeds"])
def test_one_seed_decides_nothing(seeds: int):
    table = final_loss_tests(losses({"a": 1.0}, seeds=seeds), losses({"a": 5.0}, seeds=seeds, noise=1))
    assert math.isnan(table["p_value"][0]) == (seeds == 1)


def test_a_diverged_run_decides_nothing():
    bad = losses({"a": 1.0})
    bad.loc[bad["step"] == 19, "loss"] = math.inf
    assert math.isnan(final_loss_tests(bad, losses({"a": 1.0}))["p_value"][0])


def claim(values: list[float] | None, name: str = "C1", rule: str = "(S) t-test") -> Claim:
    from gradlab.analysis.samples import mean_interval

    text = {"statement": "s", "source": "s", "expected": "1", "unit": "", "detail": ""}
    low, high = (math.nan, math.nan)
    mean = math.nan
    if values is not None:
        mean, low, high = mean_interval(values)
    return Claim(
        id=name, rule=rule, measured=mean, low=low, high=high, p_value=math.nan, n=len(values or []),
        verdict=Verdict.REPRODUCED if values else Verdict.NOT_DECIDED, **text,
    )  # fmt: skip


def test_claims_are_compared_by_welch_from_their_intervals():
    a, b = [1.0, 1.1, 0.9, 1.05], [1.4, 1.5, 1.3]
    table = _claim_table([claim(a)], [claim(b)])
    assert table["p_value"][0] == pytest.approx(ttest_ind(a, b, equal_var=False).pvalue)
    assert not table["differs"][0]


def test_a_range_of_seeds_is_no_interval_of_a_mean():
    a, b = [1.0, 1.1, 0.9], [1.4, 1.5, 1.3]
    table = _claim_table([claim(a, rule="(R) all seeds")], [claim(b)])
    assert math.isnan(table["p_value"][0])


def test_a_claim_of_one_run_alone_stands_with_a_dash():
    table = _claim_table([claim([1.0, 1.1])], [claim([1.0, 1.1], name="C2"), claim(None)])
    assert table[["id", "verdict_first", "verdict_second"]].to_numpy().tolist() == [
        ["C1", "reproduced", "not decided"], ["C2", "-", "reproduced"],
    ]  # fmt: skip
    assert table["differs"].tolist() == [True, True]
