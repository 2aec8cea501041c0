"""What adding x means: how much of the gradient flows through the skip and how much through the branch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gradlab.analysis.block_theory import block_theory
from gradlab.errors import DataError
from gradlab.plots.intervals import interval_note, need, seed_intervals
from gradlab.plots.panels import draw_band, log_axis, pick
from gradlab.plots.style import DOUBLE, PALETTE, THEORY, shades

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["skip_and_branch", "skip_and_branch_caption", "skip_and_branch_data"]

_MOST_DEPTHS = 3
INITIAL = "at initialization"


def skip_and_branch_data(paths: pd.DataFrame) -> pd.DataFrame:
    """Return the branch's share of the squared gradient at each residual block, and the prediction for it.

    Args:
        paths: Columns when ("at initialization", "first step", "last step"), depth, seed, block, skip, branch and
            branch_share, as `gradlab.analysis.profiles.path_gradients` returns it for each moment.

    Returns:
        Columns when, depth, block, mean, low, high, n, lost, theory (at initialization), and total: the mean over
        seeds of skip^2 + branch^2 relative to the squared gradient; 1 where both are orthogonal.

    Raises:
        DataError: The frame is empty, lacks a column, or holds no finite share.
    """
    need(paths, ["when", "depth", "seed", "block", "skip", "branch", "branch_share"], "residual nets with BatchNorm")
    parts = []
    for when, moment in paths.groupby("when", sort=False):
        depths: list[int] = pick(sorted(moment["depth"].unique()), _MOST_DEPTHS)
        kept = moment[moment["depth"].isin(depths)].sort_values(["depth", "block", "seed"])
        shares = seed_intervals(kept, ["when", "depth", "block"], "branch_share", log=True)
        total = (kept["skip"] ** 2 + kept["branch"] ** 2).replace([np.inf, -np.inf], np.nan)
        shares["total"] = total.groupby([kept["depth"], kept["block"]], sort=False).mean().to_numpy()
        shares["theory"] = [
            _predict(depth, block) if when == INITIAL else math.nan
            for depth, block in shares[["depth", "block"]].itertuples(index=False)
        ]
        parts.append(shares)
    data = pd.concat(parts, ignore_index=True)
    if data["mean"].isna().all():
        raise DataError("No residual block passed back a finite gradient, so there is nothing to draw.")
    return data


def _predict(depth: int, block: int) -> float:
    found = block_theory("residual, BatchNorm", int(depth))
    return math.nan if found is None or block > len(found.branch_share) else float(found.branch_share[block - 1])


def skip_and_branch(data: pd.DataFrame) -> Figure:
    """Draw the shares: stacked for the deepest untrained net, by depth with theory, and before and after training.

    Args:
        data: As `skip_and_branch_data` returns it.
    """
    import matplotlib.pyplot as plt

    initial, trained = data[data["when"] == INITIAL], data[data["when"] != INITIAL]
    panels = (2 if len(initial) else 0) + (1 if len(trained) else 0)
    figure, axes = plt.subplots(1, panels, figsize=(DOUBLE * (0.2 + 0.8 * panels / 3), 2.6), squeeze=False)
    places = list(axes.flat)
    if len(initial):
        _stack(places.pop(0), initial[initial["depth"] == initial["depth"].max()])
        ax = places.pop(0)
        colors = shades("residual", initial["depth"].tolist())
        for depth, color in colors.items():
            line = initial[initial["depth"] == depth]
            draw_band(ax, line, "block", label=f"depth {depth}", color=color)
            ax.plot(line["block"], line["theory"], **THEORY)
        ax.plot([], [], label="theory, wide net", **THEORY)
        ax.set_title("at initialization, by depth")
        _finish(ax, initial)
    if len(trained):
        ax = places.pop(0)
        deep = trained[trained["depth"] == trained["depth"].max()]
        moments = list(dict.fromkeys(deep["when"]))
        for style, moment in zip(("-", (0, (4, 1.2))), moments, strict=False):
            line = deep[deep["when"] == moment]
            draw_band(ax, line, "block", label=moment, color=PALETTE["residual"], linestyle=style)
        ax.set_title(f"in training, depth {int(deep['depth'].iloc[0])}")
        _finish(ax, deep)
    return figure


def _stack(ax: Axes, net: pd.DataFrame) -> None:
    ax.fill_between(net["block"], 0, 1 - net["mean"], color=PALETTE["residual"], linewidth=0, alpha=0.9)
    ax.fill_between(net["block"], 1 - net["mean"], 1, color="#E69F00", linewidth=0, alpha=0.9)
    # An interval of the share is one of the border between the two areas.
    ax.vlines(net["block"], 1 - net["high"], 1 - net["low"], color="black", linewidth=0.5)
    ax.set_xlim(net["block"].min(), net["block"].max() if len(net) > 1 else net["block"].min() + 1)
    ax.set_ylim(0, 1)
    ax.annotate("skip", (0.7, 0.08), xycoords="axes fraction", ha="center", color="white", fontweight="bold")
    ax.annotate("branch", (0.24, 0.93), xycoords="axes fraction", ha="center", va="center", fontweight="bold")
    ax.set_title(f"at initialization, depth {int(net['depth'].iloc[0])}")
    ax.set_ylabel("share of the squared gradient")
    ax.set_xlabel("block (1 is nearest the input)")
    ax.grid(visible=False)


def _finish(ax: Axes, drawn: pd.DataFrame) -> None:
    log_axis(ax, drawn["block"], decades=0.5, which="x")
    log_axis(ax, [*drawn["mean"], *drawn["low"], *drawn["high"], *drawn["theory"], 1.0], decades=1.5)
    ax.set_ylim(top=1.15)  # a share ends at 1
    ax.set_ylabel("branch's share")
    ax.set_xlabel("block (1 is nearest the input)")
    ax.legend(loc="lower left", handlelength=1.8)


def skip_and_branch_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words and in its own numbers."""
    text = (
        "What adding x means: share of the squared gradient at each residual block's input that came through the "
        "branch, the rest through the skip (residual nets with BatchNorm). "
    )
    initial = data[data["when"] == INITIAL]
    if len(initial):
        net = initial[(initial["depth"] == initial["depth"].max()) & initial["mean"].notna()]
        blocks = pick(net["block"].tolist(), 3)
        shares = ", ".join(f"{100 * float(net.loc[net['block'] == b, 'mean'].iloc[0]):.0f} %" for b in blocks)
        text += (
            f"At initialization, depth {int(net['depth'].iloc[0])}, the branch carries {shares} at block "
            f"{', '.join(map(str, blocks))}: an identity with a perturbation that fades as the signal on the skip "
            "grows, until a new stage begins. Skip and branch are close to orthogonal: their squares add up to "
            f"{net['total'].min():.2f} to {net['total'].max():.2f} of the whole. Dotted: mean-field theory, "
            "branch over skip is pi / (pi - 1) / Var(x), about 4 / l at block l of the first stage. "
        )
    last = data[data["when"] == "last step"]
    if len(last):
        deep = last[(last["depth"] == last["depth"].max()) & last["mean"].notna()]
        if len(deep):
            text += (
                f"After training (depth {int(deep['depth'].iloc[0])}) the median block's branch carries "
                f"{100 * deep['mean'].median():.1f} %. "
            )
    return text + interval_note(data, log=True)
