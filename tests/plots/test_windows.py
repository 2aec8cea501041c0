"""What is drawn of windows is what the tables hold, and the theory is the formula."""

import math

import numpy as np
import pandas as pd
import pytest

from gradlab.errors import DataError
from gradlab.plots import windows as plots


def bayes(k):
    return math.log(2) * 0.9**k


@pytest.fixture
def outcomes():
    rows = [(f"markov {k}", seed, bayes(k) + 0.01 * seed, bayes(k), 100 * k) for k in (1, 4, 16) for seed in range(3)]
    rows += [(net, seed, 0.01 * seed, 0.0, 1000) for net in ("growing", "gru", "transformer") for seed in range(3)]
    return pd.DataFrame(rows, columns=["net", "seed", "last", "bayes", "parameters"]).assign(length=32)


@pytest.fixture
def table():
    rows = [(k, seed, bayes(k), bayes(k)) for k in (1, 4, 16) for seed in range(3)]
    return pd.DataFrame(rows, columns=["window", "seed", "loss", "bayes"])


def test_means_over_seeds_by_what_they_see(outcomes, table):
    data = plots.window_loss_data(outcomes, table)
    own = data[data["kind"] == "window"].set_index("window")["mean"]
    assert own[4] == pytest.approx(bayes(4) + 0.01)
    assert (data["n"] == 3).all()
    assert data.loc[data["net"] == "gru", "window"].tolist() == [32]
    assert set(data["kind"]) == {"window", "table", "whole"}


def test_the_dotted_line_is_the_formula_between_the_measured_windows_too(outcomes, table):
    figure = plots.window_loss(plots.window_loss_data(outcomes, table))
    left, right = figure.axes
    (line,) = [line for line in left.get_lines() if line.get_gid() == "bayes"]
    k, loss = line.get_data()
    np.testing.assert_allclose(loss, math.log(2) * 0.9 ** np.asarray(k))
    assert (left.get_xscale(), right.get_xscale()) == ("log", "log")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["MLP on the whole past", "GRU", "Transformer"]
    assert [text.get_text() for text in right.texts] == ["k = 1", "4", "16"]


def test_any_part_may_be_missing(outcomes, table):
    plots.window_loss(plots.window_loss_data(outcomes[outcomes["net"] == "gru"], pd.DataFrame()))
    data = plots.window_loss_data(outcomes[outcomes["net"] == "markov 4"], table)
    plots.window_loss(data)
    assert "3 seeds" in plots.window_loss_caption(data)
    with pytest.raises(DataError):
        plots.window_loss_data(pd.DataFrame(), table)
