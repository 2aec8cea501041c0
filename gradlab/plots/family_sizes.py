"""Parameters, multiply-adds and receptive fields of the published nets, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from gradlab.plots.intervals import need
from gradlab.plots.panels import log_axis
from gradlab.plots.style import DOUBLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FAMILY_COLOURS", "FAMILY_NAMES", "family_sizes", "family_sizes_caption", "family_sizes_data"]

FAMILY_COLOURS: Final = {
    "alexnet": "#E69F00",
    "vgg": "#D55E00",
    "googlenet": "#009E73",
    "resnet": "#0072B2",
    "densenet": "#CC79A7",
}
"""Colours of Okabe & Ito, which the common kinds of colour blindness keep apart."""

FAMILY_NAMES: Final = {
    "alexnet": "AlexNet",
    "vgg": "VGG",
    "googlenet": "GoogLeNet",
    "resnet": "ResNet",
    "densenet": "DenseNet",
}
"""As the papers spell them."""

#: What the study notes say, in parameters, at the net that comes nearest.
_NOTED: Final = {"AlexNet": 60e6, "VGG-11": 110e6, "GoogLeNet": 4e6}


def family_sizes_data(nets: pd.DataFrame, fields: pd.DataFrame) -> pd.DataFrame:
    """Return what is drawn of each net.

    Args:
        nets: Columns family, net, parameters, linear_parameters, heads_parameters, multiply_adds.
        fields: Columns net, place, measured; the largest place of a net is its last map.

    Returns:
        One row a net: family, net, parameters, linear_parameters, heads_parameters, multiply_adds, receptive_field
        (NaN where it was not measured) and noted (NaN where the notes say nothing).

    Raises:
        DataError: A frame is empty or lacks a column.
    """
    columns = ["family", "net", "parameters", "linear_parameters", "heads_parameters", "multiply_adds"]
    need(nets, columns, "counted nets")
    need(fields, ["net", "place", "measured"], "receptive fields")
    order = {family: place for place, family in enumerate(FAMILY_COLOURS)}
    data = nets[columns].sort_values("family", key=lambda names: names.map(order), kind="stable")
    largest = fields.groupby("net")["measured"].max()
    own = data["net"].str.partition(" ")[0]
    return data.assign(receptive_field=own.map(largest), noted=data["net"].map(_NOTED)).reset_index(drop=True)


def family_sizes(data: pd.DataFrame) -> Figure:
    """Draw parameters, multiply-adds and receptive field, one row a net.

    Args:
        data: As `family_sizes_data` returns it.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(DOUBLE, 0.95 + 0.2 * len(data)), sharey=True)
    rows = np.arange(len(data))
    colours = [FAMILY_COLOURS[family] for family in data["family"]]
    _draw_parameters(axes[0], data, rows, colours)
    adds = data["multiply_adds"] / 1e9
    axes[1].barh(rows, adds, color=colours, height=0.7)
    for row, value in zip(rows, adds, strict=True):
        axes[1].text(value + 0.2, row, f"{value:.2f}", va="center", fontsize=6)
    axes[1].set_xlim(0, 1.16 * float(adds.max()))
    axes[1].set_xlabel("multiply-adds ($10^9$)")
    field = data["receptive_field"]
    axes[2].scatter(field, rows, color=colours, s=16, zorder=3)
    for row, value in zip(rows, field, strict=True):
        if np.isfinite(value):
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # the dashed line passes behind it
            axes[2].text(value * 1.2, row, f"{value:.0f}", va="center", fontsize=6, bbox=box, zorder=2.5)
    log_axis(axes[2], [100.0, *field, 8000.0], which="x")
    axes[2].axvline(224, color="0.4", linewidth=0.8, linestyle=(0, (4, 2)))
    axes[2].set_xlabel("receptive field (pixels)")
    for ax in axes:
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(
        rows, [name.replace(" with heads", " + heads").replace(" one tower", ", 1 tower") for name in data["net"]]
    )
    axes[0].invert_yaxis()
    handles: list[Any] = [
        Patch(facecolor="0.6", label="convolutions and norms"),
        Patch(facecolor="0.6", edgecolor="white", hatch="//////", label="linear layers"),
        Patch(facecolor="0.85", label="auxiliary heads"),
        Line2D([], [], color="black", marker="D", markersize=4, linestyle="none", label="study notes"),
        Line2D([], [], color="0.4", linewidth=0.8, linestyle=(0, (4, 2)), label="224 pixels"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), columnspacing=1.2)
    return figure


def _draw_parameters(ax: Axes, data: pd.DataFrame, rows: np.ndarray[Any, Any], colours: list[str]) -> None:
    total, linear, heads = (
        data[name].to_numpy(dtype=np.float64) / 1e6 for name in ("parameters", "linear_parameters", "heads_parameters")
    )
    rest = total - linear - heads
    ax.barh(rows, rest, color=colours, height=0.7)
    ax.barh(rows, linear, left=rest, color=colours, height=0.7, hatch="//////", edgecolor="white", linewidth=0)
    ax.barh(rows, heads, left=rest + linear, color="0.85", height=0.7)
    for row, value in zip(rows, total, strict=True):
        ax.text(value + 2, row, f"{value:.1f}", va="center", fontsize=6)
    ax.scatter(data["noted"] / 1e6, rows, marker="D", s=16, color="black", edgecolor="white", linewidth=0.5, zorder=4)
    ax.set_xlim(0, 1.18 * float(total.max()))
    ax.set_xlabel("parameters ($10^6$)")


def family_sizes_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    named = data.set_index("net")
    text = (
        "Exact parameters, multiply-adds (convolutions and linear layers, one image of 224x224, without auxiliary "
        "heads) and receptive field at the last map, measured through the gradient; dashed: the image."
    )
    if "AlexNet" in named.index:
        row = named.loc["AlexNet"]
        text += f" {100 * row['linear_parameters'] / row['parameters']:.1f} % of AlexNet's parameters lie in its linear"
        text += " layers."
    noted = data.dropna(subset=["noted"])
    if len(noted):
        listed = ", ".join(
            f"{net} {said / 1e6:.0f}M (counted {count / 1e6:.2f}M)"
            for net, said, count in noted[["net", "noted", "parameters"]].itertuples(index=False)
        )
        text += f" Diamonds: what the study notes say: {listed}."
    return text + " There are no intervals: nothing here is random. Claims C4 and N1 to N3 (size, fields)."
