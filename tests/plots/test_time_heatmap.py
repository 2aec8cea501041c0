"""The map of the gradient over time and training holds what was recorded, on one scale."""

import numpy as np
import pandas as pd
import pytest

from gradlab.errors import DataError
from gradlab.plots import time_heatmap as plots


def rows(net, seed, steps, *, rate, level=0, state="h", direction="forward"):
    step, t = (axis.ravel() for axis in np.meshgrid(np.arange(0, steps, 10), [0, 5, 10, 12], indexing="ij"))
    frame = pd.DataFrame({"step": step, "t": t, "log10_grad_norm": -2.0 + rate * (12 - t) + 0.001 * step})
    return frame.assign(net=net, seed=seed, length=13, level=level, state=state, direction=direction)


@pytest.fixture
def recorded():
    return pd.concat(
        [
            rows("lstm", 0, 100, rate=-0.2),
            rows("tanh", 0, 200, rate=-2.0),
            rows("tanh", 1, 200, rate=-9.0),
            rows("lstm", 0, 100, rate=-7.0, state="c"),
        ]
    )


def test_one_seed_and_h_are_drawn_in_the_order_of_nets(recorded):
    data = plots.time_heatmap_data(recorded)
    assert list(dict.fromkeys(data["net"])) == ["tanh", "lstm"]
    assert set(data["seed"]) == {0}
    first = data[(data["net"] == "lstm") & (data["step"] == 0)].set_index("t")["log10_grad_norm"]
    assert first[0] == pytest.approx(-2 - 0.2 * 12)


def test_panels_share_the_scale_and_its_least_is_ten_decades_below(recorded):
    data = plots.time_heatmap_data(recorded)
    figure = plots.time_heatmap(data)
    tanh, lstm = (ax for ax in figure.axes if ax.get_title())
    for ax, net in ((tanh, "tanh"), (lstm, "lstm")):
        mesh = ax.collections[0]
        own = data[data["net"] == net]
        assert mesh.get_array().shape == (4, own["step"].nunique())
        assert mesh.get_array().max() == own["log10_grad_norm"].max()
        high = data["log10_grad_norm"].max()
        assert mesh.get_clim() == (pytest.approx(high - 10), high)
    assert tanh.get_xlim() == lstm.get_xlim() == (0, 190)


def test_zero_is_the_smallest_and_nan_is_missing(recorded):
    recorded = recorded.reset_index(drop=True)
    recorded.loc[0, "log10_grad_norm"] = -np.inf
    recorded.loc[1, "log10_grad_norm"] = np.nan
    figure = plots.time_heatmap(plots.time_heatmap_data(recorded))
    lstm = next(ax for ax in figure.axes if ax.get_title() == "LSTM").collections[0].get_array()
    assert lstm.mask.sum() == 1
    assert lstm[0, 0] == lstm.min()


def test_many_recorded_steps_are_thinned(recorded):
    data = plots.time_heatmap_data(rows("gru", 0, 10_000, rate=-0.1))
    assert 100 <= data["step"].nunique() <= 150


def test_the_caption_says_how_far_the_gradient_reaches(recorded):
    caption = plots.time_heatmap_caption(plots.time_heatmap_data(recorded))
    assert "tanh RNN 10^-24 and 10^-24" in caption
    assert "LSTM 10^-2 and 10^-2" in caption
    assert "T = 13" in caption


@pytest.mark.parametrize("bad", ["empty", "column", "zeros"])
def test_nothing_to_draw_is_one_sentence(recorded, bad):
    frame = {
        "empty": recorded.iloc[:0],
        "column": recorded.drop(columns="t"),
        "zeros": recorded.assign(log10_grad_norm=-np.inf),
    }[bad]
    with pytest.raises(DataError):
        plots.time_heatmap_data(frame)
