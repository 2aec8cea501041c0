"""The grid of a heat map against closed forms and a naive reduction."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from gradlab.report.flow_grid import flow_grid, step_texts

Net = Callable[..., pd.DataFrame]


def test_a_deep_linear_net_has_its_closed_form(linear_net: Net) -> None:
    grid = flow_grid(linear_net(10, 3, gain=0.5))
    assert grid is not None
    assert grid.names == tuple(f"layers.{k}" for k in range(10))
    expected = np.tile((9 - np.arange(10))[:, None] * math.log10(0.5), 3)
    np.testing.assert_allclose(grid.middle, expected, atol=1e-12)
    np.testing.assert_array_equal(grid.low, grid.high)
    assert grid.lost.max() == 0


@pytest.mark.parametrize("depth", [121, 500, 1009], ids=str)
def test_bands_are_medians_and_ranges_of_their_layers(linear_net: Net, depth: int) -> None:
    random = np.random.default_rng(0)
    table = linear_net(depth, 100).assign(grad_norm=10 ** random.normal(size=100 * depth))
    grid = flow_grid(table, most_places=50, most_steps=20)
    assert grid is not None
    assert (len(grid.names), len(grid.steps), grid.recorded, grid.layers) == (50, 20, 100, depth)
    assert grid.steps[[0, -1]].tolist() == [0, 99]
    logs = np.log10(table.pivot(index="order", columns="step", values="grad_norm").to_numpy())
    begin = 0
    for row, count in enumerate(grid.members):
        band = logs[begin : begin + count][:, grid.steps]
        np.testing.assert_allclose(grid.middle[row], np.median(band, axis=0))
        np.testing.assert_allclose(grid.low[row], band.min(axis=0))
        np.testing.assert_allclose(grid.high[row], band.max(axis=0))
        assert {grid.place[f"layers.{k}"] for k in range(begin, begin + count)} == {row}
        begin += count
    assert begin == depth
    assert grid.members.max() - grid.members.min() <= 1


def test_what_a_log_axis_cannot_show_is_counted_and_what_is_missing_is_not() -> None:
    table = pd.DataFrame({
        "step": 0, "layer": list("abcde"), "order": range(5), "grad_norm": [0.0, math.nan, math.inf, math.nan, 1.0],
        "grad_nonfinite": [0.0, 3.0, 1.0, 0.0, 0.0],
    })  # fmt: skip
    grid = flow_grid(table)
    assert grid is not None
    assert grid.names == ("a", "b", "c", "e")  # no gradient reached d
    assert grid.lost[:, 0].tolist() == [1, 1, 1, 0]
    assert np.isnan(grid.middle[:3]).all()
    assert step_texts(grid) == ["Step 0: smallest 1 at e, largest 1 at e, 3 layers with 0, NaN or infinity."]


def test_order_of_execution_decides_not_order_of_rows_and_calls_share_a_place() -> None:
    table = pd.DataFrame({"step": 0, "layer": ["z", "a", "z"], "order": [1, 5, 2], "grad_norm": [1e-3, 1.0, 1e-2]})
    grid = flow_grid(table)
    assert grid is not None
    assert grid.names == ("z", "a")
    assert grid.middle[:, 0].tolist() == [-2, 0]


@pytest.mark.parametrize(
    "table",
    [pd.DataFrame(), pd.DataFrame({"step": [0], "layer": ["a"]})],
    ids=["empty", "an older schema"],
)
def test_nothing_to_show(table: pd.DataFrame) -> None:
    assert flow_grid(table) is None


def test_no_gradient_is_nothing_to_show(linear_net: Net) -> None:
    assert flow_grid(linear_net(3, 2).assign(grad_norm=math.nan)) is None
