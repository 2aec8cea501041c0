"""Gradient norm against the layer at initialization: it vanishes, explodes, grows as a power of depth, or is flat."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from gradlab.analysis.block_theory import block_theory
from gradlab.errors import DataError
from gradlab.plots.intervals import interval_note, need, seed_intervals
from gradlab.plots.panels import LOST, draw_band, log_axis, pick
from gradlab.plots.style import DOUBLE, PALETTE, THEORY, shades

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["gradient_by_layer", "gradient_by_layer_caption", "gradient_by_layer_data"]

_MOST_DEPTHS = 4


def gradient_by_layer_data(profile: pd.DataFrame, *, size: int | None = None) -> pd.DataFrame:
    """Return the relative gradient norm by layer, its interval over seeds, and two predictions.

    Args:
        profile: Columns net ("plain, BatchNorm" and so on), depth, seed, block (0 is the stem) and log10_ratio, as
            `gradlab.analysis.profiles.block_gradients` returns it.
        size: Side of the images in pixels, for the prediction that counts what zero padding loses.

    Returns:
        Columns net, depth, block, layer, mean, low, high, n, lost, theory (circular padding) and theory_padded.

    Raises:
        DataError: The frame is empty, lacks a column, or holds no finite value.
    """
    need(profile, ["net", "depth", "seed", "block", "log10_ratio"], "gradient profiles at initialization")
    keep: list[int] = pick(sorted(profile["depth"].unique()), _MOST_DEPTHS)
    profile = profile[profile["depth"].isin(keep)]
    if not np.isfinite(profile["log10_ratio"]).any():
        raise DataError("No gradient profile at initialization is finite, so there is nothing to draw.")
    data = seed_intervals(profile, ["net", "depth", "block"], "log10_ratio", log=False)
    for name in ("mean", "low", "high"):
        data[name] = 10.0 ** data[name].clip(-300, 300)
    data.insert(3, "layer", 2 * data["block"] + 1)
    for name, side in (("theory", None), ("theory_padded", size)):
        data[name] = [
            _predict(net, depth, block, side)
            for net, depth, block in data[["net", "depth", "block"]].itertuples(index=False)
        ]
    return data


def _predict(net: str, depth: int, block: int, size: int | None) -> float:
    found = block_theory(net, depth, size)
    if found is None or block >= len(found.log10_ratio):
        return math.nan
    return float(10.0 ** found.log10_ratio[block])


def gradient_by_layer(data: pd.DataFrame) -> Figure:
    """Draw gradient norm against layer, one panel a kind of net.

    Args:
        data: As `gradient_by_layer_data` returns it.
    """
    import matplotlib.pyplot as plt

    nets = list(dict.fromkeys(data["net"]))
    columns = min(3, len(nets))
    rows = math.ceil(len(nets) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(DOUBLE, 0.5 + 1.85 * rows), sharex=True, squeeze=False)
    padded = False
    for ax, net in zip(axes.flat, nets, strict=False):
        own = data[data["net"] == net]
        kind = net.partition(",")[0]
        colors = shades(kind if kind in PALETTE else "plain", own["depth"].tolist())
        for depth, color in colors.items():
            line = own[own["depth"] == depth]
            draw_band(ax, line, "layer", label=f"{depth}", color=color)
            ax.plot(line["layer"], line["theory"], **THEORY)
            if _differs(line):
                padded = True
                ax.plot(line["layer"], line["theory_padded"], **THEORY | {"linestyle": "-", "linewidth": 0.6})
        drawn = own[["mean", "low", "high", "theory", "theory_padded"]].to_numpy().ravel()
        log_axis(ax, drawn, decades=4.0)
        ax.set_title(net)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _say_ratio(ax, own)
    for ax in axes.flat[len(nets) :]:
        ax.remove()
    figure.supxlabel("layer (1 is nearest the input)", fontsize=8)
    figure.supylabel("gradient norm / that at the last block", fontsize=8)
    depths = sorted(data["depth"].unique())
    greys = {depth: str(0.72 * (1 - i / max(len(depths) - 1, 1))) for i, depth in enumerate(depths)}
    handles = [Line2D([], [], color=greys[depth], label=f"depth {depth}") for depth in depths]
    handles.append(Line2D([], [], **THEORY, label="theory, circular padding"))
    if padded:
        handles.append(Line2D([], [], color="black", linewidth=0.6, label="theory, zero padding"))
    if (data["lost"] > 0).any():
        handles.append(Line2D([], [], color="0.3", marker="x", markersize=3, linestyle="none", label=LOST))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), columnspacing=1.4)
    return figure


def _differs(line: pd.DataFrame) -> bool:
    return not np.allclose(line["theory"], line["theory_padded"], rtol=1e-3, atol=0, equal_nan=True)


def _say_ratio(ax: Axes, own: pd.DataFrame) -> None:
    """Write the whole way's ratio into the panel: what the claims are decided by."""
    depth = int(own["depth"].max())
    first = own[(own["depth"] == depth) & (own["block"] == 1)]["mean"]
    if len(first) and math.isfinite(first.iloc[0]) and first.iloc[0] > 0:
        # The line runs from the input at the left down (or up) to 1 at the right: the other corner is free.
        ratio = float(first.iloc[0])
        ax.text(
            0.97,
            0.95 if ratio >= 1 else 0.06,
            f"first/last: {_power(ratio)}",
            transform=ax.transAxes,
            ha="right",
            va="top" if ratio >= 1 else "bottom",
            fontsize=7,
        )


def _power(value: float) -> str:
    exponent = math.floor(math.log10(value))
    if -2 <= exponent <= 2:
        return f"{value:.2g}"
    return f"${value / 10.0**exponent:.1f}\\times10^{{{exponent}}}$"


def gradient_by_layer_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    deep = int(data["depth"].max())
    return (
        "Gradient norm at the output of each block at initialization, relative to the last block; the number in a "
        f"panel is the first block's at depth {deep}. Dotted: mean-field theory of wide nets with circular padding (a "
        "factor 1.211 a layer with BatchNorm, 1 for He, 0.408 for torch's default; for residual nets the recursion of "
        "gradlab.analysis.block_theory); thin, for plain nets without BatchNorm: the same with zero padding. "
        + interval_note(data, log=True)
    )
