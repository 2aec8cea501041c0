"""What is drawn of the five families is what the tables hold."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from gradlab.errors import DataError, UsageError
from gradlab.plots import addition as stacks
from gradlab.plots import family_flow as flow
from gradlab.plots import family_sizes as sizes
from gradlab.plots.architecture_figures import draw_architecture_figure

mpl.use("agg")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_sizes_show_counts_fields_and_what_the_notes_say() -> None:
    nets = pd.DataFrame({
        "family": ["vgg", "alexnet"], "net": ["VGG-11", "AlexNet"], "parameters": [132_863_336, 60_965_224],
        "linear_parameters": [123_642_856, 58_631_144], "heads_parameters": [0, 0], "multiply_adds": [7.6e9, 7e8],
    })  # fmt: skip
    fields = pd.DataFrame({"net": ["AlexNet"] * 2, "place": ["conv5", "pool5"], "measured": [163, 195]})
    data = sizes.family_sizes_data(nets, fields)
    assert data["net"].tolist() == ["AlexNet", "VGG-11"]
    assert data["receptive_field"].tolist()[0] == 195
    assert np.isnan(data["receptive_field"].tolist()[1])
    figure = sizes.family_sizes(data)
    widths = [bar.get_x() + bar.get_width() for bar in figure.axes[0].patches]
    assert max(widths) == pytest.approx(132.863336)
    assert "96.2 % of AlexNet" in sizes.family_sizes_caption(data)
    assert "VGG-11 110M (counted 132.86M)" in sizes.family_sizes_caption(data)


def test_flow_is_a_mean_of_logarithms_in_one_panel_a_net() -> None:
    rows = [
        (net, norm, when, seed, place, (place - 3) * (1 + 0.1 * seed))
        for net in ("densenet", "alexnet", "ResNet-50")
        for norm in ("none", "batch")
        for when in ("at initialization", "after training")
        for seed in range(3)
        for place in (1, 2, 3)
    ]
    places = pd.DataFrame(rows, columns=["net", "norm", "when", "seed", "place", "log10_ratio"])
    data = flow.family_flow_data(places)
    assert data.loc[data["place"] == 1, "mean"].to_numpy() == pytest.approx(10**-2.2)
    figure = flow.family_flow(data)
    assert [ax.get_title() for ax in figure.axes] == ["AlexNet", "DenseNet", "ResNet-50"]
    assert all(len([line for line in ax.get_lines() if len(line.get_xdata()) == 3]) == 4 for ax in figure.axes)
    assert "AlexNet 0.0063" in flow.family_flow_caption(data)


def test_activations_come_in_order_and_the_loss_last() -> None:
    rows = [
        (family, norm, activation, init, 0.0, seed, -1.0 * seed)
        for family in ("vgg", "resnet")
        for norm, init in (("batch", "he_normal"), ("none", "he_normal"), ("none", "default"))
        for activation in ("sigmoid", "tanh", "relu")
        for seed in range(3)
    ]
    names = ["family", "norm", "activation", "init", "dropout", "seed", "log10_ratio"]
    ratios = pd.DataFrame(rows, columns=names)
    ends = ratios.assign(heads=False, train_loss=2.0)
    data = flow.activations_data(ratios, ends)
    panels = list(dict.fromkeys(data["panel"]))
    assert panels[-1] == "training loss, no norm"
    assert panels[2] == "He's init, BatchNorm"
    assert list(dict.fromkeys(data["activation"])) == ["relu", "tanh", "sigmoid"]
    assert data.loc[data["panel"] == panels[0], "mean"].to_numpy() == pytest.approx(0.1)
    assert data.loc[data["panel"] == panels[-1], "mean"].to_numpy() == pytest.approx(2.0)
    figure = flow.activations(data)
    assert len(figure.axes) == 4
    assert len(flow.activations_data(ratios, pd.DataFrame())["panel"].unique()) == 3


def test_addition_shows_each_norm_and_the_deepest_stack() -> None:
    rows = [
        (growth, norm, depth, seed, place, -0.5 * (depth + 1 - place))
        for growth in ("plain", "residual", "dense")
        for norm in ("none", "batch")
        for depth in (2, 4)
        for seed in range(3)
        for place in range(1, depth + 2)
    ]
    places = pd.DataFrame(rows, columns=["growth", "norm", "depth", "seed", "place", "log10_ratio"])
    start = places[places["place"] == 1].assign(grad_norm=lambda f: 10.0 ** f["log10_ratio"])
    data = stacks.addition_data(start, places)
    assert set(data["panel"]) == {"none", "batch", "by layer"}
    deep = data[(data["panel"] == "by layer") & (data["growth"] == "dense")].set_index("x")["mean"]
    assert deep.to_dict() == pytest.approx({x: 10 ** (-0.5 * (4 - x)) for x in range(5)})
    figure = stacks.addition(data)
    assert [len(ax.get_lines()) for ax in figure.axes] == [3, 3, 3]
    assert "at 4 layers: plain 0.01" in stacks.addition_caption(data)


def test_heads_are_marked_and_their_benefit_is_in_the_caption() -> None:
    rows = [
        (norm, init, heads, seed, f"trunk.{name}", place, (100.0 if heads else 1.0))
        for norm in ("none", "batch")
        for init in ("default", "he_normal")
        for heads in (False, True)
        for seed in range(3)
        for place, name in enumerate(("conv2", "inception3a", "inception4a", "inception4d"), start=1)
    ]
    places = pd.DataFrame(rows, columns=["norm", "init", "heads", "seed", "layer", "place", "grad_norm"])
    ends = pd.DataFrame({
        "family": "googlenet", "norm": "none", "activation": "relu", "init": "default", "heads": [False, True] * 3,
        "seed": [0, 0, 1, 1, 2, 2], "train_loss": [2.0, 1.0] * 3,
    })  # fmt: skip
    data = stacks.auxiliary_heads_data(places, ends)
    figure = stacks.auxiliary_heads(data)
    assert figure.axes[0].get_title() == "torch's default init, no norm"
    assert len(figure.axes) == 4
    assert sum(line.get_linestyle() == ":" for line in figure.axes[0].get_lines()) == 2
    caption = stacks.auxiliary_heads_caption(data)
    assert "torch's default init, no norm x100" in caption
    assert "1 with and 2 without heads" in caption


@pytest.mark.parametrize(
    "name", ["sizes", "family-flow", "addition-and-concatenation", "auxiliary-heads", "activations"]
)
def test_nothing_measured_is_one_sentence(name: str) -> None:
    with pytest.raises(DataError):
        draw_architecture_figure(name, lambda *_: pd.DataFrame())


def test_an_unknown_figure_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"Unknown figure 'size'\. Did you mean 'sizes'"):
        draw_architecture_figure("size", lambda *_: pd.DataFrame())
