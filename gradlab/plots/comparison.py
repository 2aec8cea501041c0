"""Losses of two runs side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from gradlab.plots.panels import log_axis, pick
from gradlab.plots.style import DOUBLE

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["loss_comparison"]

_MOST_CURVES = 9


def loss_comparison(curves: pd.DataFrame, names: tuple[str, str]) -> Figure:
    """Draw the mean loss against the step, a panel a run, one colour a setting in both.

    Args:
        curves: Columns run (0 or 1), curve, step, loss.
        names: What the runs are called.
    """
    figure = Figure(figsize=(DOUBLE, 2.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    known = list(dict.fromkeys(curves["curve"]))
    shown = pick(known, _MOST_CURVES)
    colours = dict(zip(shown, sns.color_palette("colorblind", len(shown)), strict=True))
    for run, ax in enumerate(axes):
        for name, own in curves[curves["run"] == run].groupby("curve", sort=False):
            if name in colours:
                ax.plot(own["step"], own["loss"].where(np.isfinite(own["loss"])), color=colours[name], label=name)
        ax.set(xlabel="step", title=names[run][-60:])
    finite = curves.loc[np.isfinite(curves["loss"]) & (curves["loss"] > 0), "loss"]
    axes[0].set_ylabel("training loss, mean over seeds")
    if len(finite):
        log_axis(axes[0], finite)
    handles, labels = axes[0].get_legend_handles_labels()
    left_out = f" ({len(shown)} of {len(known)})" if len(shown) < len(known) else ""
    figure.legend(handles, labels, loc="outside lower center", ncols=2, title=f"setting{left_out}", fontsize=6)
    return figure
