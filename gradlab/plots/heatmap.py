"""Gradient norm over layer and training step, plain and residual side by side."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator, NullLocator

from gradlab.errors import DataError
from gradlab.plots.intervals import need
from gradlab.plots.panels import log_ticks, spaced
from gradlab.plots.style import DOUBLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["gradient_heatmap", "gradient_heatmap_caption", "gradient_heatmap_data"]

_NO_VALUE = "0.75"
_MOST_STEP_LABELS = 8


def gradient_heatmap_data(blocks: pd.DataFrame) -> pd.DataFrame:
    """Return log10 of the gradient norm at block outputs over recorded steps, deepest nets, first seed.

    Args:
        blocks: Columns net, depth, seed, step, block (0 is the stem) and grad_norm, as
            `gradlab.analysis.profiles.block_gradients` returns it by net, depth, seed and step.

    Returns:
        Columns net, depth, seed, step, layer and log10_grad_norm; -Inf where the gradient is exactly 0.

    Raises:
        DataError: The frame is empty, lacks a column, or holds no gradient that is finite and above 0.
    """
    need(blocks, ["net", "depth", "seed", "step", "block", "grad_norm"], "trained nets with recorded gradients")
    kept = blocks[blocks["depth"] == blocks.groupby("net")["depth"].transform("max")]
    kept = kept[kept["seed"] == kept.groupby("net")["seed"].transform("min")]
    with np.errstate(divide="ignore", invalid="ignore"):
        log_norm = np.log10(kept["grad_norm"].to_numpy(dtype=np.float64))
    if not np.isfinite(log_norm).any():
        raise DataError("No recorded gradient is finite and above 0, so there is nothing to draw.")
    data = kept.assign(layer=2 * kept["block"] + 1, log10_grad_norm=log_norm)
    columns = ["net", "depth", "seed", "step", "layer", "log10_grad_norm"]
    return data.sort_values(["net", "step", "layer"], ignore_index=True)[columns]


def gradient_heatmap(data: pd.DataFrame) -> Figure:
    """Draw the gradient norm as colour over recorded step (a column each, equally wide) and layer.

    Args:
        data: As `gradient_heatmap_data` returns it.
    """
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    nets = list(dict.fromkeys(data["net"]))
    values = data["log10_grad_norm"].to_numpy()
    values = values[np.isfinite(values)]
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    norm = Normalize(low, high)
    cmap = mpl.colormaps["viridis"].with_extremes(bad=_NO_VALUE)
    width = DOUBLE * (0.55 if len(nets) == 1 else 1.0)
    figure, axes = plt.subplots(1, len(nets), figsize=(width, 2.6), squeeze=False)
    for ax, net in zip(axes.flat, nets, strict=True):
        own = data[data["net"] == net]
        table = own.pivot(index="layer", columns="step", values="log10_grad_norm")
        steps, layers = table.columns.to_numpy(), table.index.to_numpy()
        grid = np.ma.masked_invalid(table.to_numpy(dtype=np.float64))
        edges = np.concatenate([layers - 1.0, [layers[-1] + 1.0]])
        mesh = ax.pcolormesh(np.arange(len(steps) + 1) - 0.5, edges, grid, cmap=cmap, norm=norm, rasterized=True)
        labelled = spaced(steps, _MOST_STEP_LABELS)
        ax.set_xticks(labelled, [f"{steps[place]:g}" for place in labelled])
        ax.xaxis.set_minor_locator(NullLocator())
        rows = MaxNLocator(6, integer=True).tick_values(1, layers[-1])
        ax.set_yticks(layers if len(layers) < 9 else [1, *(row for row in rows if 1 < row <= layers[-1])])
        ax.grid(visible=False)
        ax.set_title(f"{net}-{int(own['depth'].iloc[0])}, BatchNorm")
        ax.set_xlabel("recorded step (log-spaced)")
        if np.ma.getmaskarray(grid).any():
            ax.text(1.0, 1.01, "grey: zero or not finite", transform=ax.transAxes, ha="right", va="bottom", fontsize=6)
            ax.set_title(ax.get_title(), loc="left")
            ax.set_title("")
    axes[0, 0].set_ylabel("layer (1 is nearest the input)")
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=22)
    ticks = [math.log10(tick) for tick in log_ticks(10.0 ** max(low, -305.0), 10.0 ** min(high, 305.0))]
    names = [f"$10^{{{round(tick)}}}$" if high - low > 2 else f"{10.0**tick:.3g}" for tick in ticks]
    bar.set_ticks(ticks, labels=names)
    bar.set_label("gradient norm $\\|\\partial L/\\partial h\\|$")
    bar.outline.set_linewidth(0.6)
    return figure


def gradient_heatmap_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    return (
        "Norm of the gradient at the output of the stem and of each block, over the batch, at each recorded step of "
        f"training; one run a net (seed {int(data['seed'].iloc[0])}), so there is no interval; steps are log-spaced "
        "and drawn equally wide, both panels share one colour scale."
    )
