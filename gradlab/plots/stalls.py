"""Deep ReLU nets that train or stall, and the gradient that tells which, before the first step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pandas as pd

from gradlab.errors import DataError
from gradlab.plots.intervals import interval_note, need, seed_intervals
from gradlab.plots.panels import draw_band, log_axis
from gradlab.plots.style import DOUBLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["deep_training", "deep_training_caption", "deep_training_data"]

_NAMES = {"he_normal": "He", "glorot_normal": "Xavier", "default": "torch default", "lecun_normal": "LeCun",
          "glorot_uniform": "Xavier, uniform", "orthogonal": "orthogonal"}  # fmt: skip
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("-", (0, (4, 1.2)), (0, (1, 1)), (0, (4, 1, 1, 1)), "-", (0, (4, 1.2)))
_MOST_POINTS = 20  # stretches of steps: the loss of single steps is too spiky for an interval over few seeds


def deep_training_data(losses: pd.DataFrame, layers: pd.DataFrame) -> pd.DataFrame:
    """Return training loss against step, and the gradient by layer at the first step, by initialization.

    Args:
        losses: Columns init, seed, step, loss and train_depth.
        layers: The trace's layers of the same runs: columns init, seed, step, order and grad_norm.

    Returns:
        Columns what ("loss" or "gradient"), init, x (step, or layer from 1 at the input), mean, low, high, n, lost and
        train_depth. Gradients are relative to the last layer's.

    Raises:
        DataError: A frame is empty or lacks a column.
    """
    need(losses, ["init", "seed", "step", "loss", "train_depth"], "trained nets")
    need(layers, ["init", "seed", "step", "order", "grad_norm"], "gradients of trained nets")
    stretch = max(1, -(-int(losses["step"].max() + 1) // _MOST_POINTS))
    binned = losses.assign(x=losses["step"] // stretch * stretch + (stretch - 1) / 2)
    binned = binned.groupby(["init", "seed", "x"], sort=False)["loss"].mean().reset_index()
    frames = [seed_intervals(binned, ["init", "x"], "loss", log=True).assign(what="loss")]
    first = layers[layers["step"] == layers["step"].min()].sort_values("order")
    runs = first.groupby(["init", "seed"], sort=False)
    relative = first["grad_norm"] / runs["grad_norm"].transform("last")
    shown = first.assign(x=runs.cumcount() + 1, relative=relative)
    if not (relative > 0).any():
        raise DataError("No gradient at the first step is above 0, so there is nothing to draw.")
    frames.append(seed_intervals(shown, ["init", "x"], "relative", log=True).assign(what="gradient"))
    data = pd.concat(frames, ignore_index=True).assign(train_depth=int(losses["train_depth"].max()))
    return data[["what", "init", "x", "mean", "low", "high", "n", "lost", "train_depth"]]


def deep_training(data: pd.DataFrame) -> Figure:
    """Draw the loss against step and the gradient against layer.

    Args:
        data: As `deep_training_data` returns it.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(DOUBLE, 2.6))
    inits = list(dict.fromkeys(data["init"]))
    for ax, what in zip(axes, ("loss", "gradient"), strict=True):
        own = data[data["what"] == what]
        for place, init in enumerate(inits):
            style = {"color": _COLOURS[place % len(_COLOURS)], "linestyle": _STYLES[place % len(_STYLES)]}
            draw_band(ax, own[own["init"] == init], "x", label=_NAMES.get(init, init), **style)
        log_axis(ax, own[["mean", "low", "high"]].to_numpy().ravel(), decades=0.5)
    loss, gradient = axes
    loss.axhline(math.log(10), color="0.45", linewidth=0.6, zorder=1)
    loss.set_xlabel("step")
    loss.set_ylabel("training loss (nats)")
    gradient.set_xlabel("weight layer (1 is nearest the input)")
    gradient.set_ylabel("gradient norm / last layer's")
    gradient.set_title("before the first step")
    loss.set_title(f"{int(data['train_depth'].iloc[0])} hidden layers, digits")
    gradient.legend(loc="lower right")
    return figure


def deep_training_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words and in its own numbers."""
    losses, gradients = data[data["what"] == "loss"], data[data["what"] == "gradient"]
    ends = losses[losses["x"] == losses["x"].max()].set_index("init")["mean"]
    firsts = gradients[gradients["x"] == 1].set_index("init")["mean"]

    def listed(values: pd.Series[float]) -> str:
        return ", ".join(f"{_NAMES.get(str(init), init)} {value:.2g}" for init, value in values.items())

    return (
        f"ReLU nets of {int(data['train_depth'].iloc[0])} hidden layers on the digits, plain SGD. Left: training loss "
        "against step, averaged over twentieths of the run (grey: guessing; nets that stall lie on it); at the end "
        f"{listed(ends)}. Right: gradient norm at each weight layer's output before the first step, relative to the "
        f"last layer; at the first layer {listed(firsts)}. What reaches the input decides what can be learned. "
        f"{interval_note(data, log=True)} Claims C1.6; after He et al. 2015b, Fig. 3."
    )
