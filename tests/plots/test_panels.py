from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from gradlab.plots.panels import draw_band, log_axis, log_ticks, pick


def band(**columns: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"low": np.nan, "high": np.nan, "lost": 0, **columns})


def test_line_and_band_are_the_frames_numbers() -> None:
    _, ax = plt.subplots()
    data = band(x=[1, 2], mean=[3.0, 4.0], low=[2.0, 3.5], high=[5.0, 6.0])
    draw_band(ax, data, "x", color="red")
    assert ax.lines[0].get_xydata().tolist() == [[1, 3], [2, 4]]
    corners = {tuple(corner) for corner in ax.collections[0].get_paths()[0].vertices.tolist()}
    assert corners == {(1, 2), (2, 3.5), (2, 6), (1, 5)}


def test_no_interval_draws_no_band() -> None:
    _, ax = plt.subplots()
    draw_band(ax, band(x=[1, 2], mean=[3.0, 4.0]), "x")
    assert not ax.collections


def test_a_single_place_gets_a_bar_for_its_interval() -> None:
    _, ax = plt.subplots()
    draw_band(ax, band(x=[1], mean=[3.0], low=[2.0], high=[5.0]), "x", marker="o")
    (segment,) = ax.collections[0].get_segments()
    assert segment.tolist() == [[1, 2], [1, 5]]


def test_lost_places_are_gaps_with_a_cross() -> None:
    _, ax = plt.subplots()
    draw_band(ax, band(x=[1, 2, 3], mean=[3.0, np.nan, 4.0], lost=[0, 2, 0]), "x")
    line, crosses = ax.lines
    assert np.isnan(line.get_ydata()[1])
    assert crosses.get_gid() == "lost"
    assert crosses.get_xdata().tolist() == [2]


@pytest.mark.parametrize(
    "values",
    [[1.0], [1e-51, 1.0], [1e-300, 1e300], [0.9, 1.3], [np.nan, 0.0, np.inf], [5e-324, 1e308], [2.0, 2.0]],
    ids=str,
)
def test_log_axis_holds_the_values_and_has_few_ticks(values: list[float]) -> None:
    figure, ax = plt.subplots()
    log_axis(ax, values, decades=0.3)
    low, high = ax.get_ylim()
    assert ax.get_yscale() == "log"
    assert all(low <= value <= high for value in values if value > 1e-305 and np.isfinite(value) and value < 1e305)
    ticks = [tick for tick in ax.get_yticks() if low <= tick <= high]
    assert 1 <= len(ticks) <= 12
    assert len(ax.get_yticks(minor=True)) == 0
    figure.canvas.draw()


def test_log_axis_shows_at_least_the_span_asked_for() -> None:
    _, ax = plt.subplots()
    log_axis(ax, [1.0, 1.5], decades=4.0)
    low, high = ax.get_ylim()
    assert np.log10(high / low) == pytest.approx(4.0)
    assert np.sqrt(low * high) == pytest.approx(np.sqrt(1.5))


@pytest.mark.parametrize("span", [0.05, 0.1, 0.3, 1, 2, 5, 12, 51, 200, 600], ids=str)
def test_log_ticks_are_round_and_between_the_limits(span: float) -> None:
    low, high = 10 ** (-span / 2) * 0.93, 10 ** (span / 2) * 0.93
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 12
    assert all(low <= tick <= high for tick in ticks)
    assert ticks == sorted(set(ticks))


def test_pick_keeps_first_and_last() -> None:
    assert pick(list(range(100)), 4) == [0, 33, 66, 99]
    assert pick([1, 2], 4) == [1, 2]
