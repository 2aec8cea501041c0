"""How strongly layers respond after training (after He et al. 2015, Fig. 7)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.ticker import MaxNLocator

from gradlab.errors import DataError
from gradlab.plots.intervals import interval_note, need, seed_intervals
from gradlab.plots.panels import draw_band, log_axis, pick
from gradlab.plots.style import DOUBLE, LINESTYLES, PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["layer_responses", "layer_responses_caption", "layer_responses_data"]

_MOST_DEPTHS = 3
_VIEWS = {"layer": "layer (1 is nearest the input)", "rank": "layer, sorted by response"}


def layer_responses_data(responses: pd.DataFrame) -> pd.DataFrame:
    """Return the std of layer responses in order of layers and sorted by size, with intervals over seeds.

    Sorted means: each seed's layers from the largest response to the smallest, then averaged by rank.

    Args:
        responses: Columns net, depth, seed, place and std, as `gradlab.analysis.profiles.layer_responses` returns it.

    Returns:
        Columns view ("layer", "rank"), depth, net, place, mean, low, high, n, lost.

    Raises:
        DataError: The frame is empty, lacks a column, or holds no finite std above 0.
    """
    need(responses, ["net", "depth", "seed", "place", "std"], "trained nets with BatchNorm")
    depths: list[int] = pick(sorted(responses["depth"].unique()), _MOST_DEPTHS)
    kept = responses[responses["depth"].isin(depths)].sort_values(["depth", "net", "seed", "place"])
    ranked = kept.sort_values(["depth", "net", "seed", "std"], ascending=[True, True, True, False])
    ranked = ranked.assign(place=ranked.groupby(["depth", "net", "seed"], sort=False).cumcount() + 1)
    parts = [
        seed_intervals(frame, ["depth", "net", "place"], "std", log=True).assign(view=view)
        for view, frame in (("layer", kept), ("rank", ranked))
    ]
    data = pd.concat(parts, ignore_index=True)
    if data["mean"].isna().all():
        raise DataError("No layer's response has a standard deviation above 0, so there is nothing to draw.")
    return data[["view", *(name for name in data if name != "view")]]


def layer_responses(data: pd.DataFrame) -> Figure:
    """Draw the std of responses: a column a depth, in order of layers above, sorted below.

    Args:
        data: As `layer_responses_data` returns it.
    """
    import matplotlib.pyplot as plt

    depths = sorted(data["depth"].unique())
    width = DOUBLE * (0.55 if len(depths) == 1 else 1.0)
    figure, axes = plt.subplots(2, len(depths), figsize=(width, 4.0), sharey="col", sharex="col", squeeze=False)
    for row, (view, label) in enumerate(_VIEWS.items()):
        for ax, depth in zip(axes[row], depths, strict=True):
            own = data[(data["view"] == view) & (data["depth"] == depth)]
            for net, line in own.groupby("net"):
                kind = str(net)
                draw_band(ax, line, "place", label=kind, color=PALETTE[kind], linestyle=LINESTYLES[kind])
            ax.set_xlabel(label)
            ax.tick_params(labelbottom=True)
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            if row == 0:
                ax.set_title(f"depth {depth}")
        axes[row, 0].set_ylabel("std of responses")
    for ax, depth in zip(axes[0], depths, strict=True):
        own = data[data["depth"] == depth]
        log_axis(ax, [*own["mean"], *own["low"], *own["high"]], decades=0.3)
    named = {name: line for ax in axes[0] for line, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(list(named.values()), list(named), loc="outside upper center", ncols=len(named))
    return figure


def layer_responses_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    return (
        "Standard deviation of each layer's response (after BatchNorm, before the ReLU or the sum) at the last "
        "recorded step, in order of layers (top) and sorted from large to small within each seed (bottom). At "
        "initialization all are 1. " + interval_note(data, log=True)
    )
