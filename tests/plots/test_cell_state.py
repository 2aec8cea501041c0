"""What is drawn of the memory of gated nets is what the tables hold."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from gradlab.errors import DataError
from gradlab.plots import cell_state as plots

mpl.use("agg")
INITS = ("default", "chrono 1000", "bias 2", "bias 1", "chrono 200")


@pytest.fixture
def gradients():
    lag = np.arange(50)
    return pd.concat(
        pd.DataFrame({
            "net": net, "init": init, "seed": seed, "lag": lag,
            "log_full": 2.0 + lag * np.log(0.9 - 0.01 * k), "log_path": 2.0 + lag * np.log(0.7 - 0.01 * k),
        })
        for net in ("gru", "lstm") for k, init in enumerate(INITS) for seed in range(3)
    )  # fmt: skip


def test_lines_are_relative_to_lag_0_and_decay_by_their_factor(gradients):
    data = plots.cell_path_data(gradients)
    line = data[(data["net"] == "lstm") & (data["init"] == "default")].set_index(["path", "lag"])["mean"]
    assert line["all paths", 0] == pytest.approx(1.0)
    assert line["all paths", 20] == pytest.approx(0.9**20)
    assert line["memory alone", 20] == pytest.approx(0.7**20)
    assert (data["n"] == 3).all()


def test_figure_has_log_axes_all_lines_and_initializations_in_order(gradients):
    data = plots.cell_path_data(gradients)
    figure = plots.cell_path(data)
    axes = figure.axes
    assert len(axes) == 4
    assert all(ax.get_yscale() == "log" for ax in axes)
    assert all(len(ax.get_lines()) == 2 * len(INITS) for ax in axes)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[:5] == ["default", "bias 1", "bias 2", "chrono 200", "chrono 1000"]
    assert axes[0].get_title() == "LSTM"
    plt.close(figure)


def test_caption_answers_for_the_lstm_with_the_drawn_numbers(gradients):
    caption = plots.cell_path_caption(plots.cell_path_data(gradients))
    assert f"after 49 steps the share left in the LSTM is {0.7**49:.2g} along the cell and {0.9**49:.2g}" in caption


def test_memory_is_one_over_one_minus_the_gate():
    gates = pd.DataFrame({"net": "gru", "init": "bias 1", "seed": 0, "unit": range(4), "gate": [0.5, 0.75, 0.9, 0.99]})
    data = plots.gate_openness_data(gates).set_index("share")
    assert data.loc[0.0, "mean"] == pytest.approx(2)
    assert data.loc[1.0, "mean"] == pytest.approx(100)
    figure = plots.gate_openness(data.reset_index())
    assert figure.axes[0].get_yscale() == "log"
    assert "GRU" in figure.axes[0].get_title()
    assert "One seed" in plots.gate_openness_caption(data.reset_index())
    plt.close(figure)


@pytest.mark.parametrize("transform", [plots.cell_path_data, plots.gate_openness_data], ids=["path", "gates"])
def test_nothing_measured_is_one_sentence(transform):
    with pytest.raises(DataError):
        transform(pd.DataFrame())
