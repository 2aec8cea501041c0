"""What each BatchNorm layer does to the gradient, at initialization and after training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from gradlab.errors import DataError
from gradlab.plots.intervals import interval_note, need, seed_intervals
from gradlab.plots.panels import draw_band, log_axis
from gradlab.plots.style import DOUBLE, PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["batchnorm_gain", "batchnorm_gain_caption", "batchnorm_gain_data"]

#: A block's two BatchNorms are lines of their own: joined, a residual net's would zigzag.
_POSITIONS = {"norm1": "first of a block", "norm2": "second of a block"}
_STYLES: dict[str, Any] = {"norm1": "-", "norm2": (0, (3, 1)), "stem": "none"}


def batchnorm_gain_data(gains: pd.DataFrame) -> pd.DataFrame:
    """Return BatchNorm's gradient gain by layer and its interval over seeds, at the deepest depth.

    Args:
        gains: Columns when ("at initialization", "after training"), net, depth, seed, layer, place (1 is nearest the
            input) and grad_gain.

    Returns:
        Columns when, net, depth, position ("norm1" and "norm2" of a block, "stem"), place, mean, low, high, n, lost.

    Raises:
        DataError: The frame is empty, lacks a column, or holds no finite gain.
    """
    need(gains, ["when", "net", "depth", "seed", "layer", "place", "grad_gain"], "trained nets with BatchNorm")
    kept = gains[gains["depth"] == gains["depth"].max()].sort_values(["net", "seed", "place"])
    last = kept["layer"].str.rpartition(".")[2]
    kept = kept.assign(position=np.where(last.isin(_POSITIONS), last, "stem"))
    data = seed_intervals(kept, ["when", "net", "depth", "position", "place"], "grad_gain", log=True)
    if data["mean"].isna().all():
        raise DataError("No gradient gain of a BatchNorm layer is finite and above 0, so there is nothing to draw.")
    return data


def batchnorm_gain(data: pd.DataFrame) -> Figure:
    """Draw BatchNorm's gradient gain against its layer, one panel a moment of training.

    Args:
        data: As `batchnorm_gain_data` returns it.
    """
    import matplotlib.pyplot as plt

    moments = list(dict.fromkeys(data["when"]))
    width = DOUBLE * (0.55 if len(moments) == 1 else 1.0)
    figure, axes = plt.subplots(1, len(moments), figsize=(width, 2.7), sharey=True, squeeze=False)
    nets = sorted(data["net"].unique())
    for ax, moment in zip(axes.flat, moments, strict=True):
        now = data[data["when"] == moment]
        ax.axhline(1.0, color="0.45", linewidth=0.6, zorder=1)
        for (net, position), line in now.groupby(["net", "position"]):
            marker = "o" if position == "stem" else None
            style: dict[str, Any] = {"linestyle": _STYLES[str(position)], "marker": marker, "markersize": 3}
            draw_band(ax, line, "place", color=PALETTE[str(net)], **style)
        ax.set_title(moment)
        ax.set_xlabel("BatchNorm layer (1 is nearest the input)")
    log_axis(axes[0, 0], [*data["mean"], *data["low"], *data["high"], 1.0], decades=2.0)
    axes[0, 0].set_ylabel("gradient gain $\\|\\partial L/\\partial x\\|\\,/\\,\\|\\partial L/\\partial y\\|$")
    depth = int(data["depth"].iloc[0])
    handles = [Line2D([], [], color=PALETTE[net], label=f"{net}-{depth}") for net in nets]
    found = set(data["position"])
    handles += [
        Line2D([], [], color="0.3", linestyle=_STYLES[key], label=label)
        for key, label in _POSITIONS.items()
        if key in found
    ]
    handles.append(Line2D([], [], color="0.45", linewidth=0.6, label="1: unchanged"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), columnspacing=1.4)
    return figure


def batchnorm_gain_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    return (
        "Factor by which each BatchNorm layer multiplies the gradient norm on the way back (x its input, y its "
        f"output), nets of depth {int(data['depth'].max())}, at the first and at the last recorded step. A block's "
        "two BatchNorms are separate lines, the dot is the stem's; in residual nets the first one divides by the "
        "grown signal on the skip. " + interval_note(data, log=True)
    )
