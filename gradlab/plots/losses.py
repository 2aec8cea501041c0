"""Training loss against step: deeper plain nets train worse (after He et al. 2015, Fig. 6)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from gradlab.errors import DataError
from gradlab.plots.intervals import interval_note, need, seed_intervals
from gradlab.plots.panels import draw_band, log_axis
from gradlab.plots.style import DOUBLE, shades

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["training_loss", "training_loss_caption", "training_loss_data"]

_NORMS = {"batch": "BatchNorm", "none": "no normalization"}
_DIVERGED: dict[str, Any] = {"marker": "X", "markersize": 5, "markeredgecolor": "black", "markeredgewidth": 0.5}
_MOST_POINTS = 200


def training_loss_data(losses: pd.DataFrame) -> pd.DataFrame:
    """Return the training loss of the shallowest and the deepest nets, ready to draw.

    Nets with BatchNorm are averaged over seeds. Without, each run is a row of its own: some diverge, and a mean over
    those that are left would flatter. Runs of more than 200 steps are averaged over equal stretches of steps first.

    Args:
        losses: Columns step, loss, net, norm, depth, seed and status.

    Returns:
        Columns norm, net, depth, seed (-1 for a mean over seeds), step, mean, low, high, n, lost and diverged (the
        row marks where a run diverged: its last finite loss, at the step after it).

    Raises:
        DataError: The frame is empty, lacks a column, or holds no loss that is finite and above 0.
    """
    need(losses, ["step", "loss", "net", "norm", "depth", "seed", "status"], "training runs")
    kept = losses[losses["depth"].isin([losses["depth"].min(), losses["depth"].max()])]
    run = ["norm", "net", "depth", "seed"]
    stretch = max(1, -(-int(kept["step"].max() + 1) // _MOST_POINTS))
    kept = kept.assign(
        step=kept["step"] // stretch * stretch + (stretch - 1) / 2,
        loss=kept["loss"].where(np.isfinite(kept["loss"]) & (kept["loss"] > 0)),  # what a log axis can show
        ended=kept["status"] == "diverged",
    )
    binned: pd.DataFrame = kept.groupby([*run, "step", "ended"])["loss"].mean().reset_index()
    if binned["loss"].notna().sum() == 0:
        raise DataError("No training run has a loss that is finite and above 0, so there is nothing to draw.")
    binned = binned.rename(columns={"loss": "mean"}).assign(low=np.nan, high=np.nan, n=1, lost=0, diverged=False)
    normed = binned[binned["norm"] == "batch"]
    parts = [binned[binned["norm"] != "batch"], _last_losses(binned, run, stretch)]
    if len(normed):
        parts.append(seed_intervals(normed, [*run[:3], "step"], "mean", log=True).assign(seed=-1, diverged=False))
    columns = [*run, "step", "mean", "low", "high", "n", "lost", "diverged"]
    data = pd.concat([part[columns] for part in parts if len(part)], ignore_index=True)
    return data.sort_values([*run, "diverged", "step"], ignore_index=True)


def _last_losses(binned: pd.DataFrame, run: list[str], stretch: int) -> pd.DataFrame:
    """Return each diverged run's last finite loss, at the step after it: there it was not finite any more."""
    finite = binned[binned["ended"] & binned["mean"].notna()]
    last: pd.DataFrame = finite[finite["step"] == finite.groupby(run)["step"].transform("max")]
    return last.assign(step=last["step"] + stretch, diverged=True)


def training_loss(data: pd.DataFrame, *, guess: float | None = math.log(10)) -> Figure:
    """Draw training loss against step: plain left, residual right; with BatchNorm above, without below.

    Args:
        data: As `training_loss_data` returns it.
        guess: Loss of a net that guesses, drawn as a grey line; None draws none. Default: ten classes.
    """
    import matplotlib.pyplot as plt

    norms = [norm for norm in _NORMS if (data["norm"] == norm).any()]
    nets = [net for net in ("plain", "residual") if (data["net"] == net).any()]
    size = (DOUBLE * (0.55 if len(nets) == 1 else 1.0), 0.45 + 1.9 * len(norms))
    figure, axes = plt.subplots(len(norms), len(nets), figsize=size, sharex=True, squeeze=False)
    for row, norm in enumerate(norms):
        of_norm = data[data["norm"] == norm]
        for ax, net in zip(axes[row], nets, strict=True):
            own = of_norm[of_norm["net"] == net]
            if guess is not None:
                ax.axhline(guess, color="0.45", linewidth=0.6, zorder=1)
            _draw_runs(ax, own, net)
            ax.set_title(f"{net}, {_NORMS[norm]}")
            # With BatchNorm both panels share a scale; without, one run that explodes would flatten all others.
            shown = of_norm if norm == "batch" else own
            log_axis(ax, [*shown["mean"], *shown["low"], *shown["high"]], decades=0.6)
        axes[row, 0].set_ylabel("training loss (nats)")
    for ax in axes[-1]:
        ax.set_xlabel("step")
    steps = data["step"].max() - data["step"].min()
    axes[0, 0].set_xlim(data["step"].min() - 0.02 * max(steps, 1), data["step"].max() + 0.02 * max(steps, 1))
    return figure


def _draw_runs(ax: Axes, own: pd.DataFrame, net: str) -> None:
    colors = shades(net, own["depth"].tolist()) if len(own) else {}
    for depth, color in colors.items():
        runs = own[(own["depth"] == depth) & ~own["diverged"]]
        if (runs["seed"] < 0).any():
            draw_band(ax, runs[runs["seed"] < 0], "step", color=color)
        for _, run in runs[runs["seed"] >= 0].groupby("seed"):
            ax.plot(run["step"], run["mean"], color=color, linewidth=0.6)
        ends = own[(own["depth"] == depth) & own["diverged"]]
        if len(ends):
            ax.plot(ends["step"], ends["mean"], linestyle="none", color=color, gid="diverged", zorder=4, **_DIVERGED)
    handles = [Line2D([], [], color=color, label=f"{net}-{depth}") for depth, color in colors.items()]
    if own["diverged"].any():
        count = int(own["diverged"].sum())
        label = f"diverged ({count} run{'s' if count > 1 else ''})"
        handles.append(Line2D([], [], linestyle="none", color="0.6", label=label, **_DIVERGED))
    ax.legend(handles=handles, loc="best")


def training_loss_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    shallow, deep = int(data["depth"].min()), int(data["depth"].max())
    depths = f"depths {shallow} and {deep}" if shallow != deep else f"depth {deep}"
    text = (
        f"Training loss against step for nets of {depths}, plain left and residual right, on a log scale; the "
        "grey line is the loss of guessing."
    )
    means = data[data["seed"] < 0]
    if len(means):
        text += f" With BatchNorm: {interval_note(means, log=True)[0].lower()}{interval_note(means, log=True)[1:]}"
    if (data["norm"] == "none").any():
        text += " Without normalization every run is one thin line."
    if data["diverged"].any():
        text += " A cross marks where a run diverged: its last finite loss."
    return text
