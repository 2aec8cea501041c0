"""What is drawn of BatchNorm is what the tables hold."""

import math

import numpy as np
import pandas as pd
import pytest

from gradlab.errors import DataError, UsageError
from gradlab.plots import batchnorm_init, batchnorm_training
from gradlab.plots.batchnorm_figures import draw_batchnorm_figure


@pytest.fixture
def ends():
    rows = [
        (norm, lr, scale, size, seed, math.inf if norm == "none" and lr == 1.0 else 0.1 * 10.0**seed)
        for norm in ("batch", "none") for seed in range(3)
        for lr, scale, size in ((0.1, 1.0, 8), (1.0, 1.0, 8), (0.1, 0.01, 8), (0.1, 1.0, 2))
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["norm", "lr", "scale", "batch_size", "seed", "loss"])


def test_rates_mark_diverged_runs_and_average_the_rest(ends):
    data = batchnorm_training.learning_rate_range_data(ends, lr=0.1, batch_size=8)
    by = data.set_index(["view", "norm", "place"])
    assert by.loc[("lr", "batch", 0.1), "mean"] == pytest.approx(1.0)  # geometric over .1, 1, 10
    assert by.loc[("lr", "none", 1.0), "lost"] == 3
    assert set(data.loc[data["view"] == "batch_size", "place"]) == {2, 8}
    figure = batchnorm_training.learning_rate_range(data)
    left, right = figure.axes
    assert left.get_xscale() == left.get_yscale() == right.get_xscale() == "log"
    crosses = [line for line in left.get_lines() if line.get_gid() == "diverged"]
    assert len(crosses) == 1
    assert not [line for line in right.get_lines() if line.get_gid() == "diverged"]
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == "diverged"


def test_caption_names_where_batchnorm_is_worse(ends):
    worse = ends.assign(loss=ends["loss"] * np.where((ends["norm"] == "batch") & (ends["batch_size"] == 2), 2, 1))
    data = batchnorm_training.learning_rate_range_data(worse, lr=0.1, batch_size=8)
    caption = batchnorm_training.learning_rate_range_caption(data)
    assert "BatchNorm has the higher mean at batch size 2." in caption


def test_all_diverged_is_one_sentence(ends):
    with pytest.raises(DataError, match="nothing to draw"):
        batchnorm_training.learning_rate_range_data(ends.assign(loss=math.inf), lr=0.1, batch_size=8)


def test_scale_draws_theory_for_every_eps_above_0(ends):
    rows = [
        (net, eps, factor, seed, factor / math.sqrt(factor**2 + eps))
        for net in ("net", "one layer") for eps in (0.0, 1e-5) for factor in (1e-3, 1.0) for seed in range(3)
    ]  # fmt: skip
    identity = pd.DataFrame(rows, columns=["net", "epsilon", "factor", "seed", "gradient_ratio"])
    data = batchnorm_training.scale_invariance_data(identity, ends[(ends["lr"] == 0.1) & (ends["batch_size"] == 8)])
    left, right = batchnorm_training.scale_invariance(data).axes
    (theory,) = [line for line in left.get_lines() if line.get_gid() == "theory"]
    assert theory.get_ydata()[0] == pytest.approx(1e-3 / math.sqrt(1e-6 + 1e-5))
    training = data[data["view"] == "training"]
    assert set(training["scale"]) == {0.01, 1.0}
    assert right.get_yscale() == "log"


def test_landscape_has_a_panel_for_each_measure():
    rows = [
        (norm, seed, updates, size, 2 * size, 3 * size)
        for norm, size in (("batch", 0.1), ("none", 1.0)) for seed in range(3) for updates in (0, 50)
    ]  # fmt: skip
    names = ["norm", "seed", "updates", "loss_range", "grad_change", "relative_change"]
    data = batchnorm_training.loss_landscape_data(pd.DataFrame(rows, columns=names))
    axes = batchnorm_training.loss_landscape(data).axes
    assert len(axes) == 3
    assert [sorted(float(line.get_ydata()[0]) for line in ax.get_lines()) for ax in axes] == [
        pytest.approx(values) for values in ([0.1, 1.0], [0.2, 2.0], [0.3, 3.0])
    ]


def test_running_statistics_average_layers_and_share_the_training_line():
    modes = pd.DataFrame([
        (momentum, seed, step, 1.0, 2.0) for momentum in (0.1, 0.01) for seed in range(3) for step in (0, 9)
    ], columns=["momentum", "seed", "step", "in_training", "in_evaluation"])  # fmt: skip
    gaps = pd.concat(
        modes[["momentum", "seed", "step"]].assign(layer=layer, mean_gap=gap, var_gap=2 * gap)
        for layer, gap in (("a", 1.0), ("b", 3.0))
    )
    data = batchnorm_training.running_statistics_data(modes, gaps)
    assert set(data.loc[data["view"] == "mean_gap", "mean"].round(9)) == {2.0}
    assert set(data.loc[data["view"] == "var_gap", "mean"].round(9)) == {4.0}
    axes = batchnorm_training.running_statistics(data).axes
    assert [len(ax.get_lines()) for ax in axes] == [3, 2, 2]
    assert axes[0].get_lines()[0].get_xdata().tolist() == [1, 10]


def test_explosion_is_relative_to_the_last_layer():
    rows = [
        (activation, norm, size, seed, place, 5.0 - 0.2 * place)
        for activation, norm, size in (("relu", "batch", 32), ("relu", "batch", 128), ("relu", "none", 128))
        for seed in range(3) for place in (1, 2, 3)
    ]  # fmt: skip
    names = ["activation", "norm", "batch_size", "seed", "place", "log_grad_norm"]
    profiles = pd.DataFrame(rows, columns=names)
    gains = profiles[names[:4]].drop_duplicates().assign(gain=1.49)
    data = batchnorm_init.explosion_data(profiles, gains)
    by = data[data["view"] == "layer"].set_index(["net", "batch_size", "place"])["mean"]
    assert by["relu", 32, 1] == pytest.approx(math.exp(0.4))
    assert by["relu, no norm", 128, 3] == pytest.approx(1.0)
    left, right = batchnorm_init.explosion(data).axes
    assert left.get_yscale() == "log"
    assert [line for line in left.get_lines() if line.get_gid() == "theory"]
    (finite,) = [line for line in right.get_lines() if line.get_gid() == "finite"]
    assert finite.get_ydata()[0] > finite.get_ydata()[-1] > math.pi / (math.pi - 1)


def test_growth_draws_its_theory():
    rows = [
        (kind, block, seed, 2.0**block, 2.0 ** (4 - block))
        for kind in ("no norm", "BatchNorm", "no norm, scaled") for block in range(5) for seed in range(3)
    ]  # fmt: skip
    data = batchnorm_init.residual_growth_data(
        pd.DataFrame(rows, columns=["kind", "block", "seed", "signal", "gradient"])
    )
    left, right = batchnorm_init.residual_growth(data).axes
    theory = [line.get_ydata()[-1] for line in left.get_lines() if line.get_gid() == "theory"]
    assert theory == pytest.approx([16.0, 5.0, 1.25**4])
    assert [line.get_ydata()[0] for line in right.get_lines() if line.get_gid() == "theory"] == pytest.approx(
        [16.0, 1.25**4]
    )


def test_an_unknown_figure_and_nothing_measured_are_one_sentence():
    with pytest.raises(UsageError, match="Did you mean 'explosion'"):
        draw_batchnorm_figure("explosions", lambda *_: pd.DataFrame(), {})
    for name in ("scale-invariance", "learning-rate-range", "loss-landscape", "explosion", "running-statistics"):
        with pytest.raises(DataError):
            draw_batchnorm_figure(name, lambda *_: pd.DataFrame(), {"lr": 0.1, "batch_size": 8, "landscape_lr": 0.1})
