"""What is drawn of activations and initializations is what the tables hold."""

from __future__ import annotations

import math

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from gradlab.analysis.phases import critical_line
from gradlab.analysis.theory import gradient_gain
from gradlab.errors import DataError, UsageError
from gradlab.plots import gains, phase_plane, ridges, spectra, stalls
from gradlab.plots.activation_figures import draw_activation_figure

mpl.use("agg")


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def profiles(off=1.01):
    layers = np.arange(1, 51)
    frames = []
    for activation, init, weight_var in (("relu", "he_normal", 2.0), ("relu", "4", 4.0), ("tanh", "4", 4.0)):
        for seed in range(3):
            rate = gradient_gain(activation, weight_var) * off * (1 + 1e-4 * (seed - 1))
            frames.append(
                pd.DataFrame({
                    "activation": activation, "init": init, "depth": 50, "width": 256, "seed": seed, "layer": layers,
                    "log_grad_norm": -layers * math.log(rate),
                })
            )  # fmt: skip
    return pd.concat(frames)


def test_gains_are_drawn_at_their_theory_with_their_deviation():
    data = gains.gain_against_theory_data(profiles()).set_index(["activation", "init"])
    assert data.loc[("relu", "4"), "theory"] == pytest.approx(math.sqrt(2))
    assert data.loc[("relu", "4"), "deviation"] == pytest.approx(1.0, abs=1e-6)
    assert data.loc[("tanh", "4"), "deviation_low"] < 1.0 < data.loc[("tanh", "4"), "deviation_high"]
    figure = gains.gain_against_theory(data.reset_index())
    left, right = figure.axes
    assert left.get_xscale() == left.get_yscale() == right.get_xscale() == "log"
    drawn = {(round(float(line.get_xdata()[0]), 6), round(float(line.get_ydata()[0]), 6))
             for line in left.get_lines() if len(line.get_xdata()) == 1}  # fmt: skip
    assert (round(math.sqrt(2), 6), round(1.01 * math.sqrt(2), 6)) in drawn
    texts = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert {"relu", "tanh", "He (2)", "$\\sigma_w^2=4$"} <= set(texts)
    assert "Largest deviation off criticality: 1.00 %" in gains.gain_against_theory_caption(data.reset_index())


def chaos():
    rows = []
    for weight_var in (1.0, 3.0):
        for seed in range(3):
            rate = gradient_gain("tanh", weight_var, 0.05)
            rows.append(
                pd.DataFrame({
                    "weight_var": weight_var, "bias_var": 0.05, "depth": 20, "seed": seed, "layer": np.arange(1, 21),
                    "log_grad_norm": -np.arange(20) * math.log(rate), "correlation": 0.3 + 0.1 * seed,
                })
            )  # fmt: skip
    return pd.concat(rows)


def test_the_plane_holds_theory_line_and_measurements():
    data = phase_plane.phase_plane_data(chaos())
    kinds = data.groupby("kind").size()
    assert kinds["surface"] == 100 * 60
    measured = data[data["kind"] == "gain"].set_index("weight_var")
    assert measured.loc[3.0, "mean"] == pytest.approx(gradient_gain("tanh", 3.0, 0.05))
    correlation = data[data["kind"] == "correlation"].set_index("weight_var")
    assert correlation.loc[1.0, "mean"] == pytest.approx(0.4)
    line = data[data["kind"] == "critical"]
    assert line["weight_var"].iloc[-1] == pytest.approx(critical_line("tanh", line["bias_var"].iloc[-1]))
    figure = phase_plane.phase_plane(data)
    assert "bias variance" in figure.axes[0].get_ylabel()
    assert figure.axes[2].get_ylabel() == "correlation at layer 20"
    assert "1.76095" in phase_plane.phase_plane_caption(data)


def histograms(seeds=3):
    value = np.linspace(-1, 1, 9)
    return pd.concat(
        pd.DataFrame({
            "scheme": scheme, "seed": seed, "what": what, "layer": layer, "value": value,
            "density": np.exp(-(value**2) * layer), "std": 0.5 / layer + 0.01 * seed,
        })
        for scheme in ("standard", "normalized") for seed in range(seeds)
        for what in ("activation", "gradient") for layer in (1, 2, 3)
    )  # fmt: skip


def test_a_ridge_for_each_layer_rises_from_its_own_line():
    data = ridges.layer_distributions_data(histograms())
    figure = ridges.layer_distributions(data)
    assert len(figure.axes) == 4
    ax = figure.axes[0]
    assert [float(line.get_ydata().max()) <= layer for layer, line in zip((1, 2, 3), ax.get_lines(), strict=True)]
    heights = [layer - line.get_ydata().min() for layer, line in zip((1, 2, 3), ax.get_lines(), strict=True)]
    assert heights == pytest.approx([heights[0]] * 3)  # the same peak density
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # layer 1 on top
    assert "sd 0.510" in ax.texts[0].get_text()
    assert "0.51 (standard)" in ridges.layer_distributions_caption(data)
    one = ridges.layer_distributions_data(histograms(seeds=1))
    assert one["std_reach"].isna().all()
    assert "pm" not in ridges.layer_distributions(one).axes[0].texts[0].get_text()


def runs():
    losses = pd.concat(
        pd.DataFrame({"init": init, "seed": seed, "step": range(40), "loss": level, "train_depth": 30})
        for init, level in (("he_normal", 0.5), ("default", 2.3)) for seed in range(3)
    )  # fmt: skip
    layers = pd.concat(
        pd.DataFrame({
            "init": init, "seed": seed, "step": step, "order": range(5),
            "grad_norm": 3.0 * rate ** np.arange(4, -1, -1),
        })
        for init, rate in (("he_normal", 1.0), ("default", 0.4)) for seed in range(3) for step in (0, 9)
    )  # fmt: skip
    return losses, layers


def test_losses_and_relative_gradients():
    data = stalls.deep_training_data(*runs())
    gradient = data[(data["what"] == "gradient") & (data["init"] == "default")].set_index("x")["mean"]
    assert gradient[1] == pytest.approx(0.4**4)
    assert gradient[5] == pytest.approx(1.0)
    loss = data[(data["what"] == "loss") & (data["init"] == "he_normal")]
    assert len(loss) == 20
    figure = stalls.deep_training(data)
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["He", "torch default"]
    caption = stalls.deep_training_caption(data)
    assert "at the end He 0.5, torch default 2.3" in caption
    assert "torch default 0.026" in caption


def test_singular_values_against_rank_without_the_rounding():
    spectrum = pd.DataFrame([
        {"activation": name, "weights": weights, "seed": seed, "rank": rank, "value": 2.0 * fall ** (rank - 1),
         "spectrum_depth": 7, "spectrum_width": 4}
        for name in ("relu", "linear") for weights, fall in (("orthogonal", 1.0), ("Gaussian", 1e-4))
        for seed in range(3) for rank in range(1, 5)
    ])  # fmt: skip
    data = spectra.singular_values_data(spectrum)
    table = data.set_index(["activation", "weights", "rank"])["mean"]
    assert table["linear", "Gaussian", 3] == pytest.approx(2e-8)
    assert math.isnan(table["linear", "Gaussian", 4])
    figure = spectra.singular_values(data)
    assert [ax.get_title() for ax in figure.axes] == ["linear", "relu"]
    assert "depth 7 and width 4" in spectra.singular_values_caption(data)


@pytest.mark.parametrize(
    "transform",
    [
        gains.gain_against_theory_data, phase_plane.phase_plane_data, ridges.layer_distributions_data,
        spectra.singular_values_data, lambda frame: stalls.deep_training_data(frame, frame),
    ],
    ids=["gains", "plane", "ridges", "spectra", "stalls"],
)  # fmt: skip
def test_nothing_measured_is_one_sentence(transform):
    with pytest.raises(DataError):
        transform(pd.DataFrame())


def test_an_unknown_figure_is_one_sentence():
    with pytest.raises(UsageError, match="Did you mean 'phase-diagram'"):
        draw_activation_figure("phase-diagramm", lambda *_: pd.DataFrame())
