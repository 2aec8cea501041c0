"""The six figures of depth-sweep, drawn from the tables of a small run with known numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from gradlab.analysis import profiles
from gradlab.errors import DataError, UsageError
from gradlab.plots.depth_figures import draw_depth_figure
from gradlab.plots.style import PALETTE, paper_style

FIGURES = (
    "gradient-by-layer",
    "training-loss",
    "layer-responses",
    "gradient-heatmap",
    "batchnorm-gain",
    "skip-and-branch",
)
Tables = dict[tuple[str, str], pd.DataFrame]


@pytest.fixture
def draw(make: Callable[..., Tables], read: Any) -> Callable[..., tuple[Figure, pd.DataFrame, str]]:
    def drawn(
        name: str, *, change: Callable[[Tables], None] = lambda tables: None, render: bool = False, **about: Any
    ) -> tuple[Figure, pd.DataFrame, str]:
        tables = make(**about)
        change(tables)
        with paper_style():
            figure, data, caption = draw_depth_figure(name, read(tables), size=8)
            if render:  # slow, and layout and ticks are where drawing may warn
                figure.canvas.draw()
        return figure, data, caption

    return drawn


def line_of(ax: Any, data: pd.DataFrame, x: str) -> Any:
    """The line of the axes whose points are the frame's, or an assertion error."""
    for line in ax.lines:
        points = np.asarray(line.get_xydata(), dtype=float)
        if points.shape == (len(data), 2) and np.array_equal(points, data[[x, "mean"]].to_numpy(float), equal_nan=True):
            return line
    raise AssertionError(f"no line of {len(data)} points draws the frame")


# -- what is drawn ----------------------------------------------------------------------------------------------------


def test_gradient_by_layer_draws_the_means_and_theory_with_the_right_slope(draw: Any) -> None:
    figure, data, caption = draw("gradient-by-layer")
    axes = {ax.get_title(): ax for ax in figure.axes}
    assert list(axes) == list(dict.fromkeys(data["net"]))
    for (net, _), own in data.groupby(["net", "depth"]):
        assert axes[net].get_yscale() == "log"
        line_of(axes[net], own, "layer")
    deep = data[(data["net"] == "plain, BatchNorm") & (data["depth"] == 14)]
    # Made to fall by 1.5 a block, whatever the seed.
    np.testing.assert_allclose(deep["mean"], 1.5 ** (6.0 - deep["block"]))
    dotted = [line for line in axes["plain, BatchNorm"].lines if np.array_equal(line.get_ydata(), deep["theory"])]
    x, y = dotted[0].get_data()
    np.testing.assert_allclose(np.diff(np.log(y)) / np.diff(x), -math.log(1.2112), atol=1e-4)
    assert deep["layer"].tolist() == [1, 3, 5, 7, 9, 11, 13]
    assert "3 seeds" in caption
    assert "C2.3" in caption


def test_bands_are_the_intervals(draw: Any) -> None:
    figure, data, _ = draw("batchnorm-gain")
    own = data[(data["when"] == "at initialization") & (data["net"] == "plain") & (data["position"] == "norm1")]
    assert own["place"].tolist() == [2, 4, 6, 8, 10, 12]  # depth 14, not 8
    # Gains 3, 6, 12: in log2 1 apart, so the Student interval over 3 is +- 4.303 / sqrt(3) of that.
    reach = 2 ** (4.302653 / math.sqrt(3))
    np.testing.assert_allclose(own["mean"], 6.0)
    np.testing.assert_allclose(own["high"], 6.0 * reach, rtol=1e-5)
    corners = {tuple(np.round(c, 6)) for band in figure.axes[0].collections for c in band.get_paths()[0].vertices}
    for place, low, high in own[["place", "low", "high"]].itertuples(index=False):
        assert {(place, round(low, 6)), (place, round(high, 6))} <= corners


def test_training_loss_marks_divergence_and_averages_only_nets_with_batchnorm(draw: Any) -> None:
    figure, data, caption = draw("training-loss")
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == [
        "plain, BatchNorm",
        "residual, BatchNorm",
        "plain, no normalization",
        "residual, no normalization",
    ]
    means = data[(data["norm"] == "batch") & (data["net"] == "plain") & (data["depth"] == 14)]
    np.testing.assert_allclose(means["mean"], [20.0, 10.0, 5.0])  # geometric, over seeds a decade apart
    line_of(figure.axes[0], means, "step")
    crosses = [line for line in figure.axes[3].lines if line.get_gid() == "diverged"]
    # Its loss was 2, 1, NaN: last finite 1, not finite any more at step 2; one such run a depth.
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in crosses] == [([2], [1.0])] * 2
    assert set(data.loc[data["norm"] == "none", "seed"]) == {0, 1, 2}
    assert "cross" in caption
    assert all(ax.get_yscale() == "log" for ax in figure.axes)


def test_long_training_is_averaged_over_stretches_of_steps() -> None:
    from gradlab.plots import training_loss_data

    steps = np.arange(1000)
    losses = pd.DataFrame({"step": steps, "loss": 1.0 + steps % 5, "net": "plain", "norm": "batch", "depth": 8})
    data = training_loss_data(losses.assign(seed=0, status="done"))
    assert len(data) == 200
    np.testing.assert_allclose(data["mean"], 3.0)
    assert data["step"].tolist()[:2] == [2.0, 7.0]


def test_layer_responses_are_shown_in_order_and_sorted(draw: Any) -> None:
    figure, data, _ = draw("layer-responses")
    own = data[(data["depth"] == 8) & (data["net"] == "residual")]
    order, ranked = (own[own["view"] == view]["mean"].to_numpy() for view in ("layer", "rank"))
    stem = (2 * 3 * 4) ** (1 / 3)  # seeds 0, 1, 2 have 2, 3, 4
    np.testing.assert_allclose(order, [stem, 1.5, 0.5, 1.5, 0.5, 1.5, 0.5])
    np.testing.assert_allclose(ranked, [stem, 1.5, 1.5, 1.5, 0.5, 0.5, 0.5])
    assert [ax.get_title() for ax in figure.axes[:2]] == ["depth 8", "depth 14"]
    line = line_of(figure.axes[2], own[own["view"] == "rank"], "place")
    assert line.get_color() == PALETTE["residual"]


def test_heatmap_shows_log10_of_the_norms_under_the_right_steps(draw: Any) -> None:
    figure, data, caption = draw("gradient-heatmap")
    plain, residual, bar = figure.axes
    own = data[(data["net"] == "plain") & (data["step"] == 0)]
    np.testing.assert_allclose(own["log10_grad_norm"], np.log10(2.0) * np.arange(6, -1, -1), atol=1e-12)
    mesh = plain.collections[0]
    grid = mesh.get_array().reshape(7, 3)
    np.testing.assert_allclose(grid[:, 0], own["log10_grad_norm"])
    assert [label.get_text() for label in plain.get_xticklabels()] == ["0", "1", "5"]
    assert mesh.get_clim() == residual.collections[0].get_clim() == (0.0, pytest.approx(6 * math.log10(2.0)))
    assert "gradient norm" in bar.get_ylabel()
    # The ticks' names are the values at which they stand.
    for tick, label in zip(bar.get_yticks(), bar.get_yticklabels(), strict=True):
        assert float(label.get_text()) == pytest.approx(10**tick)
    assert "no interval" in caption


def test_skip_and_branch_shares_and_caption_are_the_known_ones(draw: Any) -> None:
    figure, data, caption = draw("skip-and-branch")
    for _, own in data.groupby(["when", "depth"]):
        np.testing.assert_allclose(own["mean"], 1 / (own["block"] + 1))
        np.testing.assert_allclose(own["total"], 1.0)
    stack, by_depth, trained = figure.axes
    border = stack.collections[0].get_paths()[0].vertices
    assert {(2.0, round(2 / 3, 9)), (6.0, round(6 / 7, 9))} <= {tuple(np.round(corner, 9)) for corner in border}
    initial = data[(data["when"] == "at initialization") & (data["depth"] == 14)]
    line_of(by_depth, initial, "block")
    line_of(trained, data[(data["when"] == "last step") & (data["depth"] == 14)], "block")
    assert initial["theory"].between(0.5, 0.9).all()
    assert "50 %, 25 %, 14 % at block 1, 3, 6" in caption


@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_is_named_and_the_caption_is_whole(draw: Any, name: str) -> None:
    figure, data, caption = draw(name)
    shared = bool(figure.get_supxlabel() and figure.get_supylabel())
    left = figure.axes[0]
    assert shared or (left.get_ylabel() and figure.axes[-1].get_ylabel() + figure.axes[-1].get_xlabel())
    assert caption.endswith(".")
    assert "Claim" in caption
    assert len(data)


# -- what may be missing ----------------------------------------------------------------------------------------------


def _set(table: tuple[str, str], column: str, value: float) -> Callable[[Tables], None]:
    def change(tables: Tables) -> None:
        tables[table] = tables[table].assign(**{column: value})

    return change


def _all_diverged(tables: Tables) -> None:
    for key in (("layers", "train"), ("losses", "train"), ("batchnorm", "train")):
        tables[key] = tables[key].assign(status="diverged")


@pytest.mark.parametrize(
    "about",
    [{"seeds": 1}, {"seeds": 2, "depths": (8,)}, {"nets": ("residual",), "depths": (8,), "seeds": 1}],
    ids=["one seed", "one depth, two seeds", "residual only"],
)
@pytest.mark.parametrize("name", FIGURES)
def test_small_runs_are_drawn(draw: Any, name: str, about: dict[str, Any]) -> None:
    figure, data, caption = draw(name, render=about["seeds"] == 1, **about)
    assert figure.axes
    if about["seeds"] == 1:
        assert "o interval" in caption or name == "training-loss"
        assert "low" not in data or data["low"].isna().all()


def test_plain_only_runs_say_that_residual_nets_are_missing(draw: Any) -> None:
    for name in FIGURES[:-1]:
        draw(name, nets=("plain",), seeds=1, depths=(8,))
    with pytest.raises(DataError, match="residual"):
        draw("skip-and-branch", nets=("plain",))


@pytest.mark.parametrize("name", FIGURES)
def test_an_empty_run_is_one_sentence(read: Any, name: str) -> None:
    with pytest.raises(DataError) as caught:
        draw_depth_figure(name, read({}))
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("name", ["layer-responses", "gradient-heatmap", "batchnorm-gain"])
def test_all_diverged_is_a_data_error(draw: Any, name: str) -> None:
    with pytest.raises(DataError, match="diverging"):
        draw(name, change=_all_diverged)


def test_skip_and_branch_needs_no_training(draw: Any) -> None:
    figure, data, _ = draw("skip-and-branch", change=_all_diverged)
    assert len(figure.axes) == 2
    assert set(data["when"]) == {"at initialization"}


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0], ids=["NaN", "Inf", "zero"])
@pytest.mark.parametrize(
    ("name", "table", "column"),
    [
        ("gradient-by-layer", ("layers", "profile"), "grad_norm"),
        ("training-loss", ("losses", "train"), "loss"),
        ("layer-responses", ("layers", "train"), "act_std"),
        ("gradient-heatmap", ("layers", "train"), "grad_norm"),
        ("batchnorm-gain", ("batchnorm", "train"), "grad_gain"),
    ],
    ids=FIGURES[:-1],
)
def test_nothing_to_draw_at_all_is_a_data_error(
    draw: Any, name: str, table: tuple[str, str], column: str, value: float
) -> None:
    with pytest.raises(DataError):
        draw(name, change=_set(table, column, value), depths=(8,), seeds=1)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0], ids=["NaN", "Inf", "zero"])
@pytest.mark.parametrize("name", FIGURES)
def test_some_values_that_cannot_be_drawn_leave_the_rest(draw: Any, name: str, value: float) -> None:
    def change(tables: Tables) -> None:
        for frame in tables.values():
            spoilt = frame["seed"] == 0
            for column in ("grad_norm", "act_std", "loss", "grad_gain"):
                if column in frame:
                    # Some places of all seeds, and one seed in whole but for the heatmap, which shows that one.
                    places = (frame.index % 7 == 3) | (spoilt & (name != "gradient-heatmap"))
                    frame.loc[places, column] = value

    figure, data, _ = draw(name, change=change, render=value == 0)
    assert figure.axes
    if "lost" in data and name != "training-loss":
        assert (data["lost"] > 0).any()


def test_heatmap_leaves_gaps_grey_and_says_so(draw: Any) -> None:
    def change(tables: Tables) -> None:
        frame = tables["layers", "train"]
        frame.loc[(frame["layer"] == "stem.relu") & (frame["step"] == 1), "grad_norm"] = 0.0

    figure, data, _ = draw("gradient-heatmap", change=change)
    assert np.isneginf(data.loc[(data["layer"] == 1) & (data["step"] == 1), "log10_grad_norm"]).all()
    mask = np.ma.getmaskarray(figure.axes[0].collections[0].get_array()).reshape(7, 3)
    assert mask.sum() == 1
    assert mask[0, 1]
    assert any("grey" in text.get_text() for text in figure.axes[0].texts)


def test_norms_of_1e_minus_51_are_drawn(draw: Any) -> None:
    def change(tables: Tables) -> None:
        frame = tables["layers", "profile"]
        frame.loc[frame["layer"] == "stem.relu", "grad_norm"] *= 1e-51

    figure, data, _ = draw("gradient-by-layer", change=change, render=True)
    assert data["mean"].min() < 1e-49
    low, high = figure.axes[0].get_ylim()
    assert low < data["mean"].min() < high


def test_unknown_figure_names_the_nearest(read: Any) -> None:
    with pytest.raises(UsageError, match="gradient-heatmap"):
        draw_depth_figure("gradient-heatmp", read({}))


# -- the transforms before --------------------------------------------------------------------------------------------


def test_blocks_past_the_tenth_keep_their_order(rows: Any) -> None:
    # A pivot had put stages.0.10 before stages.0.2.
    layers = rows("residual", 74, 0, rate=1.1)
    paths = profiles.path_gradients(layers, ["net", "depth", "seed"])
    np.testing.assert_allclose(paths["branch_share"], 1 / (paths["block"] + 1))
    assert paths["block"].tolist() == list(range(1, 37))


def test_a_block_without_a_finite_gradient_stays_in_its_place(rows: Any) -> None:
    layers = rows("residual", 20, 0, rate=1.1)
    layers.loc[layers["layer"] == "stages.0.1.to_skip", "grad_norm"] = np.nan
    paths = profiles.path_gradients(layers, ["net", "depth", "seed"])
    assert paths["block"].tolist() == list(range(1, 10))
    assert paths["branch_share"].isna().tolist() == [False, True, *[False] * 7]


def test_shares_of_tiny_norms_do_not_underflow(rows: Any) -> None:
    layers = rows("residual", 20, 0, rate=1.1)
    layers["grad_norm"] *= 1e-200
    paths = profiles.path_gradients(layers, ["net", "depth", "seed"])
    np.testing.assert_allclose(paths["branch_share"], 1 / (paths["block"] + 1))
