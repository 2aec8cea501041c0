"""The gradient cliff as a map, with the paths of gradient descent on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm

from gradlab.analysis.cliff_claims import SOLVED
from gradlab.plots.intervals import need
from gradlab.plots.style import DOUBLE, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["cliff", "cliff_caption", "cliff_data"]

_DRAWN = 5  # paths a panel; more would hide the map


def cliff_data(surface: pd.DataFrame, descent: pd.DataFrame) -> pd.DataFrame:
    """Return the map and the paths in one frame.

    Args:
        surface: Columns weight_at, bias_at, grad_norm, loss.
        descent: Columns clip, start, update, weight_at, bias_at, loss, step_length.

    Returns:
        Columns what ("surface", "path" of the first starts, or "end" of every start), weight_at, bias_at, grad_norm,
        loss, clip, start, update, longest (update of that start, at its end).

    Raises:
        DataError: One of the frames is empty or lacks a column.
    """
    need(surface, ["weight_at", "bias_at", "grad_norm", "loss"], "loss surface")
    need(descent, ["clip", "start", "update", "weight_at", "bias_at", "loss", "step_length"], "gradient descent")
    names = ["what", "weight_at", "bias_at", "grad_norm", "loss", "clip", "start", "update", "longest"]
    last = descent[descent["update"] == descent["update"].max()]
    longest = descent.groupby(["clip", "start"], as_index=False).agg(longest=("step_length", "max"))
    parts = [
        surface.assign(what="surface"),
        descent[descent["start"] < _DRAWN].assign(what="path"),
        last.merge(longest, on=["clip", "start"]).assign(what="end"),
    ]
    joined: pd.DataFrame = pd.concat(parts, ignore_index=True)
    return joined[names]


def cliff(data: pd.DataFrame) -> Figure:
    """Draw the gradient norm over weight and bias with paths of descent, one panel a clipping threshold, and outcomes.

    Args:
        data: As `cliff_data` returns it.
    """
    import matplotlib.pyplot as plt

    paths = data[data["what"] == "path"]
    clips = sorted(paths["clip"].unique())
    shown = [clips[0], clips[-1]] if len(clips) > 1 else clips
    widths = [1.0] * len(shown) + [0.62]
    figure, axes = plt.subplots(1, len(shown) + 1, figsize=(DOUBLE, 2.7), width_ratios=widths, squeeze=False)
    table = data[data["what"] == "surface"].pivot_table(index="bias_at", columns="weight_at", values="grad_norm")
    low = max(float(np.nanquantile(table.to_numpy(), 0.02)), 1e-12)
    norm = LogNorm(low, float(np.nanmax(table.to_numpy())))
    for ax, clip in zip(axes[0], shown, strict=False):
        values = np.clip(table.to_numpy(), low, None)
        mesh = ax.pcolormesh(table.columns, table.index, values, norm=norm, cmap="Greys", rasterized=True)
        _draw_paths(ax, paths[paths["clip"] == clip])
        ax.set_xlim(table.columns.min(), table.columns.max())
        ax.set_ylim(table.index.min(), table.index.max())
        ax.set_title("no clipping" if clip == 0 else f"clipped at {clip:g}")
        ax.set_xlabel("weight $w$")
        ax.grid(visible=False)
    axes[0, 0].set_ylabel("bias $b$")
    figure.colorbar(mesh, ax=axes[0, : len(shown)].tolist(), label="gradient norm", pad=0.02, aspect=30)
    _draw_outcomes(axes[0, -1], data[data["what"] == "end"])
    return figure


def _draw_paths(ax: Axes, paths: pd.DataFrame) -> None:
    for start, path in paths.groupby("start"):
        ordered = path.sort_values("update")
        ax.plot(ordered["weight_at"], ordered["bias_at"], color=PALETTE["residual"], linewidth=0.5, gid=f"path {start}")
        ax.plot(*ordered[["weight_at", "bias_at"]].iloc[0], marker="o", markersize=2.5, color=PALETTE["residual"])
        solved = ordered["loss"].iloc[-1] < SOLVED
        colour = PALETTE["residual"] if solved else PALETTE["plain"]
        ax.plot(*ordered[["weight_at", "bias_at"]].iloc[-1], marker="*" if solved else "x", markersize=6, color=colour)


def _draw_outcomes(ax: Axes, last: pd.DataFrame) -> None:
    from scipy.stats import binomtest

    for place, (_, group) in enumerate(last.groupby("clip")):
        won, tried = int((group["loss"] < SOLVED).sum()), len(group)
        interval = binomtest(won, tried).proportion_ci(method="wilson")
        share = won / tried
        errors = [[max(share - interval.low, 0)], [max(interval.high - share, 0)]]
        ax.errorbar([place], [share], yerr=errors, fmt="o", color="0.15", markersize=4, capsize=2, linewidth=1)
        ax.annotate(
            f"{won}/{tried}", (place, share), textcoords="offset points", xytext=(6, 0), va="center", fontsize=7
        )
    clips = sorted(last["clip"].unique())
    ax.set_xticks(range(len(clips)), ["none" if clip == 0 else f"{clip:g}" for clip in clips])
    ax.set_xlim(-0.5, len(clips) - 0.2)
    ax.set_ylim(-0.04, 1.04)
    ax.set_xlabel("clipped at")
    ax.set_ylabel(f"share of starts ending below {SOLVED:g}")


def cliff_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    last = data[data["what"] == "end"]
    starts = last["start"].nunique()
    longest = last.groupby("clip")["longest"].max()
    told = ", ".join(f"{'none' if clip == 0 else f'{clip:g}'} {length:.3g}" for clip, length in longest.items())
    return (
        "Gradient norm of a one-unit recurrent net over its weight and bias (grey, log scale): a thin cliff where the "
        f"net's two stable states meet. Blue: {min(_DRAWN, starts)} paths of gradient descent from "
        "the cliff (dot), to where the loss ends below 0.001 (star) or not (cross; off the map where missing). "
        f"Longest update by clipping threshold: {told}. Right: share of {starts} starts that "
        "succeed, 95 % Wilson intervals. Claims C5.3; after Pascanu et al. 2013, Fig. 6."
    )
