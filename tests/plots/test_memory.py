"""What is drawn of learning runs is what the tables hold."""

import math

import numpy as np
import pandas as pd
import pytest

from gradlab.errors import DataError
from gradlab.plots import memory as plots

NAN = float("nan")
TIMES = {"tanh": [NAN, NAN, NAN], "lstm": [300, NAN, 350], "gru": [100, 150, 200]}


@pytest.fixture
def curves():
    rows = [
        (net, length, seed, step, 0.16 if math.isnan(at) or step < at else 0.008)
        for length in (25, 100)
        for net, times in TIMES.items()
        for seed, at in enumerate(times)
        for step in range(50, int(400 if math.isnan(at) else at) + 1, 50)
    ]
    return pd.DataFrame(rows, columns=["net", "length", "seed", "step", "loss"]).assign(baseline=1 / 6)


@pytest.fixture
def copying():
    rows = [(net, 100, seed, step, 0.2) for net in ("tanh", "lstm") for seed in range(2) for step in (50, 100)]
    return pd.DataFrame(rows, columns=["net", "length", "seed", "step", "loss"]).assign(baseline=0.1733)


@pytest.fixture
def outcomes():
    rows = [
        (net, length, seed, 400, at * length / 100)
        for length in (100, 25)
        for net, times in TIMES.items()
        for seed, at in enumerate(times)
    ]
    return pd.DataFrame(rows, columns=["net", "length", "seed", "steps", "solved_at"])


def test_every_run_at_the_longest_t_is_a_line_and_successes_are_stars(curves, copying):
    data = plots.learning_curves_data(curves, copying)
    assert set(data.loc[data["task"] == "adding", "length"]) == {100}
    figure = plots.learning_curves(data)
    panels = figure.axes[:4]
    titles = [ax.get_title() for ax in panels]
    assert titles == ["tanh RNN: 0 of 3 solved", "LSTM: 2 of 3 solved", "GRU: 3 of 3 solved", "copy memory, T = 100"]
    for ax, times in zip(panels, TIMES.values(), strict=False):
        lines = [line for line in ax.get_lines() if str(line.get_gid()).startswith("run")]
        stars = [line for line in ax.get_lines() if line.get_gid() == "solved"]
        assert len(lines) == 3
        assert sorted(line.get_xdata()[0] for line in stars) == sorted(t for t in times if not math.isnan(t))
        assert ax.get_yscale() == "log"
    assert len([line for line in panels[3].get_lines() if str(line.get_gid()).startswith("run")]) == 4
    assert panels[3].get_ylabel() == "cross-entropy (nats a step)"


def test_long_runs_are_thinned_and_keep_their_end(curves, copying):
    long = pd.DataFrame({"net": "gru", "length": 9, "seed": 0, "step": np.arange(1, 1001), "loss": 0.1, "baseline": 1})
    long.loc[999, "loss"] = 0.001
    data = plots.learning_curves_data(long, pd.DataFrame())
    assert len(data) <= 202
    assert data["step"].iloc[-1] == 1000
    assert data["solved"].all()
    assert (data["task"] == "adding").all()


def test_the_caption_has_the_numbers(curves, copying):
    caption = plots.learning_curves_caption(plots.learning_curves_data(curves, copying))
    assert "T = 100: each thin line is one run, of 3 seeds" in caption
    assert "0.1733" in caption
    assert "tanh RNN 0.2000, LSTM 0.2000" in caption
    assert "copy memory" not in plots.learning_curves_caption(plots.learning_curves_data(curves, pd.DataFrame()))


def test_success_marks_are_filled_where_solved_and_open_at_the_cap(outcomes):
    data = plots.success_by_length_data(outcomes)
    assert data.loc[~data["solved"], "steps"].eq(400).all()
    assert list(dict.fromkeys(data["net"])) == ["tanh", "lstm", "gru"]
    figure = plots.success_by_length(data)
    lines = {line.get_gid(): line for line in figure.axes[0].get_lines() if line.get_gid()}
    assert sorted(lines["solved gru"].get_ydata()) == [25, 37.5, 50, 100, 150, 200]
    assert len(lines["solved tanh"].get_ydata()) == 0
    assert lines["censored tanh"].get_ydata() == pytest.approx([420] * 6)
    assert lines["censored lstm"].get_fillstyle() == "none"
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["25", "100"]


def test_the_success_caption_is_the_table(outcomes):
    caption = plots.success_by_length_caption(plots.success_by_length_data(outcomes))
    assert "tanh RNN 0/3, >400; 0/3, >400" in caption
    assert "LSTM 2/3, 88; 2/3, 350" in caption
    assert "GRU 3/3, 38; 3/3, 150" in caption
    assert "after 400 steps" in caption


@pytest.mark.parametrize(
    "call",
    [
        lambda: plots.learning_curves_data(pd.DataFrame(), pd.DataFrame()),
        lambda: plots.success_by_length_data(pd.DataFrame()),
        lambda: plots.success_by_length_data(
            pd.DataFrame({"net": ["elman"], "length": 4, "seed": 0, "steps": 9, "solved_at": 3.0})
        ),
    ],
    ids=["curves", "success", "unknown net"],
)
def test_nothing_to_draw_is_one_sentence(call):
    with pytest.raises(DataError):
        call()
