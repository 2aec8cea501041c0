"""Losses of two runs side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import seaborn as sns
from matplotlib.figure import Figure

from gradlab.plots.intervals import seed_intervals
from gradlab.plots.panels import draw_band, log_axis, pick
from gradlab.plots.style import DOUBLE

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["loss_comparison"]

_MOST_CURVES = 9


def loss_comparison(curves: pd.DataFrame, names: tuple[str, str]) -> Figure:
    """Draw the loss against the step, a panel a run, one colour a setting in both.

    Lines are geometric means over seeds, bands their 95 % Student intervals (smallest to largest of two seeds).

    Args:
        curves: Columns run (0 or 1), curve, step, loss; one row a seed.
        names: What the runs are called.
    """
    figure = Figure(figsize=(DOUBLE, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    known = list(dict.fromkeys(curves["curve"]))
    shown = pick(known, _MOST_CURVES)
    colours = dict(zip(shown, sns.color_palette("colorblind", len(shown)), strict=True))
    bands = seed_intervals(curves[curves["curve"].isin(shown)], ["run", "curve", "step"], "loss", log=True)
    for run, ax in enumerate(axes):
        for name, own in bands[bands["run"] == run].groupby("curve", sort=False):
            draw_band(ax, own.sort_values("step"), "step", color=colours[str(name)], label=str(name))
        ax.set(xlabel="step", title=names[run][-60:])
    axes[0].set_ylabel("training loss")
    log_axis(axes[0], bands[["mean", "low", "high"]].to_numpy().ravel(), decades=1.0)
    handles, labels = axes[0].get_legend_handles_labels()
    left_out = f" ({len(shown)} of {len(known)})" if len(shown) < len(known) else ""
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=2,
        title=f"setting{left_out}; bands: 95 % interval over seeds",
        fontsize=6,
    )
    return figure
