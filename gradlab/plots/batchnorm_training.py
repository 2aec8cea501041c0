"""What BatchNorm does in training: tiny weights, learning rates and batches, the landscape, its running statistics."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from gradlab.errors import DataError
from gradlab.plots.intervals import interval_note, need, seed_intervals
from gradlab.plots.panels import draw_band, log_axis
from gradlab.plots.style import DOUBLE, THEORY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "learning_rate_range",
    "learning_rate_range_caption",
    "learning_rate_range_data",
    "loss_landscape",
    "loss_landscape_caption",
    "loss_landscape_data",
    "running_statistics",
    "running_statistics_caption",
    "running_statistics_data",
    "scale_invariance",
    "scale_invariance_caption",
    "scale_invariance_data",
]

NORMS: dict[str, dict[str, Any]] = {
    "batch": {"color": "#0072B2", "linestyle": "-", "marker": "o", "label": "BatchNorm"},
    "none": {"color": "#D55E00", "linestyle": (0, (4, 1.2)), "marker": "s", "label": "no normalization"},
}
_EPSILONS = ("#000000", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_GUESS = math.log(10)
_LEAST_RATIO = 1e-4  # below it a net's gradient is gone, and the lines of one layer would be squeezed
_DIVERGED: dict[str, Any] = {"marker": "X", "markersize": 5, "markeredgecolor": "black", "markeredgewidth": 0.5}


def _points(ax: Axes, line: pd.DataFrame, x: str, **style: Any) -> None:
    """Draw means with their intervals as bars, and a cross above where every or some seed diverged."""
    label = style.pop("label", None)
    ax.plot(line[x], line["mean"], label=label, markersize=3.5, **style)
    ax.vlines(line[x], line["low"], line["high"], color=style["color"], linewidth=1.0)


def _diverged(ax: Axes, line: pd.DataFrame, x: str, color: str, height: float) -> None:
    """Mark places where seeds diverged at the top, with their number of all."""
    for _, row in line[line["lost"] > 0].iterrows():
        ax.plot([row[x]], [height], linestyle="none", color=color, gid="diverged", zorder=5, **_DIVERGED)
        if row["n"] > 0:
            ax.annotate(
                f"{row['lost']:.0f}/{row['lost'] + row['n']:.0f}", (row[x], height), xytext=(4, -2),
                textcoords="offset points", fontsize=6, color=color, va="top",
            )  # fmt: skip


def _norm_handles(*, diverged: bool = False) -> list[Line2D]:
    handles = [Line2D([], [], markersize=3.5, **style) for style in NORMS.values()]
    if diverged:
        handles.append(Line2D([], [], linestyle="none", color="0.6", label="diverged", **_DIVERGED))
    return handles


# -- scale ------------------------------------------------------------------------------------------------------------


def scale_invariance_data(identity: pd.DataFrame, ends: pd.DataFrame) -> pd.DataFrame:
    """Return what scaling the weights does to gradients by eps, and to the final loss, with intervals over seeds.

    Args:
        identity: Columns net, epsilon, factor, seed, gradient_ratio.
        ends: Columns norm, scale, seed, loss, of one learning rate and batch size.

    Returns:
        Columns view ("gradient", "training"), line (net or norm), epsilon (NaN in training), scale, mean, low, high, n,
        lost.

    Raises:
        DataError: A frame is empty or lacks a column.
    """
    need(identity, ["net", "epsilon", "factor", "seed", "gradient_ratio"], "measured scale invariance")
    need(ends, ["norm", "scale", "seed", "loss"], "training runs")
    first = seed_intervals(identity.sort_values("factor"), ["net", "epsilon", "factor"], "gradient_ratio", log=True)
    second = seed_intervals(ends.sort_values("scale"), ["norm", "scale"], "loss", log=True)
    first = first.rename(columns={"net": "line", "factor": "scale"}).assign(view="gradient")
    second = second.rename(columns={"norm": "line"}).assign(view="training", epsilon=math.nan)
    columns = ["view", "line", "epsilon", "scale", "mean", "low", "high", "n", "lost"]
    return pd.concat([first[columns], second[columns]], ignore_index=True)


def scale_invariance(data: pd.DataFrame) -> Figure:
    """Draw the gradient's departure from 1/a by eps, and the final loss against the scale of the first weights.

    Args:
        data: As `scale_invariance_data` returns it.
    """
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(DOUBLE, 2.9))
    gradient, training = data[data["view"] == "gradient"], data[data["view"] == "training"]
    epsilons = sorted(gradient["epsilon"].unique())
    colours = {eps: _EPSILONS[k % len(_EPSILONS)] for k, eps in enumerate(epsilons)}
    for (net, eps), line in gradient.groupby(["line", "epsilon"], sort=False):
        draw_band(left, line, "scale", color=colours[eps], linestyle="-" if net == "net" else (0, (3, 1.2)))
    grid = np.geomspace(gradient["scale"].min(), gradient["scale"].max(), 200)
    for eps in epsilons:
        if eps > 0:
            left.plot(grid, grid / np.sqrt(grid**2 + eps), zorder=5, gid="theory", **THEORY)
    log_axis(left, gradient["scale"], which="x")
    log_axis(left, [_LEAST_RATIO, 1.5])
    left.set_xlabel("factor $a$ on the weights")
    left.set_ylabel("$a\\,\\|\\partial L/\\partial(aW)\\|\\,/\\,\\|\\partial L/\\partial W\\|$")
    left.set_title("the identity and its limit")
    handles = [Line2D([], [], color=colour, label=f"eps = {eps:g}") for eps, colour in colours.items()]
    handles += [
        Line2D([], [], color="0.3", label="whole net"),
        Line2D([], [], color="0.3", linestyle=(0, (3, 1.2)), label="one layer"),
        Line2D([], [], label="$a/\\sqrt{a^2+\\mathrm{eps}}$", **THEORY),
    ]
    left.legend(handles=handles, loc="lower right", fontsize=6)
    right.axhline(_GUESS, color="0.45", linewidth=0.6, zorder=1)
    for norm, style in NORMS.items():
        _points(right, training[training["line"] == norm], "scale", **style)
    log_axis(right, training["scale"], which="x")
    log_axis(right, [*training["mean"], *training["low"], *training["high"], _GUESS])
    right.set_xlabel("scale of the hidden weights at the start (1 is He's)")
    right.set_ylabel("final training loss (nats)")
    right.set_title("training from tiny weights")
    right.legend(handles=_norm_handles(), loc="lower left")
    return figure


def scale_invariance_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    return (
        "Left: gradient with respect to weights scaled by a, times a, over that at a = 1 and eps = 0 (float64, at "
        "initialization): 1 is exact invariance, and eps ends it for small weights; solid for a whole net with all "
        "hidden weights scaled, dashed for one layer of unit variance, dotted its theory; ratios below 1e-4 lie "
        "outside. Right: mean training loss over the last steps from hidden weights scaled at the start; the grey line "
        "is the loss of guessing. " + interval_note(data, log=True)
    )


# -- learning rate and batch ------------------------------------------------------------------------------------------


def learning_rate_range_data(ends: pd.DataFrame, *, lr: float, batch_size: int) -> pd.DataFrame:
    """Return the final loss against learning rate and against batch size, with intervals over seeds.

    Args:
        ends: Columns norm, lr, scale, batch_size, seed, loss (inf where it diverged).
        lr: Of the sweep over batch sizes.
        batch_size: Of the sweep over learning rates.

    Returns:
        Columns view ("lr", "batch_size"), norm, place, mean, low, high, n, lost (diverged).

    Raises:
        DataError: The frame is empty, lacks a column, or no run ended with a finite loss.
    """
    need(ends, ["norm", "lr", "scale", "batch_size", "seed", "loss"], "training runs")
    whole = ends[ends["scale"] == 1.0]
    views = {"lr": whole[whole["batch_size"] == batch_size], "batch_size": whole[whole["lr"] == lr]}
    parts = [
        seed_intervals(frame.sort_values(view), ["norm", view], "loss", log=True)
        .rename(columns={view: "place"})
        .assign(view=view)
        for view, frame in views.items()
        if len(frame)
    ]
    data = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"mean": []})
    if data["mean"].isna().all():
        raise DataError("No training run at the full scale ended with a finite loss, so there is nothing to draw.")
    return data[["view", "norm", "place", "mean", "low", "high", "n", "lost"]]


def learning_rate_range(data: pd.DataFrame) -> Figure:
    """Draw the final loss against learning rate and against batch size, on log axes, diverged runs marked at the top.

    Args:
        data: As `learning_rate_range_data` returns it.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(DOUBLE, 2.9), sharey=True)
    top = 3 * max(_GUESS, data["mean"].max(), data["high"].max())
    labels = {"lr": "learning rate", "batch_size": "batch size"}
    for ax, (view, label) in zip(axes, labels.items(), strict=True):
        own = data[data["view"] == view]
        ax.axhline(_GUESS, color="0.45", linewidth=0.6, zorder=1)
        for norm, style in NORMS.items():
            line = own[own["norm"] == norm]
            # A little apart, so that bars do not hide each other.
            line = line.assign(place=line["place"] * (1.02 if norm == "none" else 1 / 1.02))
            _points(ax, line, "place", **style)
            _diverged(ax, line, "place", style["color"], top)
        log_axis(ax, own["place"], which="x", decades=1.0)
        ax.set_xlabel(label)
        if view == "batch_size":
            sizes = sorted(own["place"].unique())
            ax.set_xticks(sizes, [f"{size:g}" for size in sizes])
    log_axis(axes[0], [*data["mean"], *data["low"], *data["high"], _GUESS, top])
    axes[0].set_ylabel("final training loss (nats)")
    handles = _norm_handles(diverged=bool((data["lost"] > 0).any()))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def learning_rate_range_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    worse = []
    for view, word in (("lr", "learning rate"), ("batch_size", "batch size")):
        means = data[data["view"] == view].pivot_table(index="place", columns="norm", values="mean")
        if {"batch", "none"} <= set(means):
            places = [f"{place:g}" for place in means.index[means["batch"] > means["none"]]]
            if places:
                worse.append(f"{word} {', '.join(places)}")
    text = (
        "Mean training loss over the last steps against learning rate (left) and against batch size at equal numbers "
        "of steps (right), with and without BatchNorm; the grey line is the loss of guessing, a cross at the top marks "
        "runs that diverged, with their share where some did not. "
    )
    if worse:
        text += f"BatchNorm has the higher mean at {' and at '.join(worse)}. "
    return text + interval_note(data, log=True).replace("bands", "bars")


# -- landscape --------------------------------------------------------------------------------------------------------

_MEASURES = {
    "loss_range": "range of the loss (nats)",
    "grad_change": "largest $\\|g'-g\\|$",
    "relative_change": "largest $\\|g'-g\\|\\,/\\,\\|g\\|$",
}


def loss_landscape_data(measures: pd.DataFrame) -> pd.DataFrame:
    """Return how loss and gradient vary along a step, against updates, with intervals over seeds.

    Args:
        measures: Columns norm, seed, updates, loss_range, grad_change, relative_change, as
            `gradlab.analysis.batchnorm_claims.landscape_measures` returns it.

    Returns:
        Columns measure, norm, updates, mean, low, high, n, lost.

    Raises:
        DataError: The frame is empty or lacks a column.
    """
    need(measures, ["norm", "seed", "updates", *_MEASURES], "measured landscapes")
    ordered = measures.sort_values("updates")
    parts = [seed_intervals(ordered, ["norm", "updates"], name, log=True).assign(measure=name) for name in _MEASURES]
    data = pd.concat(parts, ignore_index=True)
    return data[["measure", *(name for name in data if name != "measure")]]


def loss_landscape(data: pd.DataFrame) -> Figure:
    """Draw the variation of loss and gradient along a step against updates, one panel a measure.

    Args:
        data: As `loss_landscape_data` returns it.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(_MEASURES), figsize=(DOUBLE, 2.6))
    for ax, (name, label) in zip(axes, _MEASURES.items(), strict=True):
        own = data[data["measure"] == name]
        for norm, style in NORMS.items():
            line = own[own["norm"] == norm]
            draw_band(ax, line, "updates", color=style["color"], linestyle=style["linestyle"])
        shown = own[["mean", "low", "high"]].to_numpy().ravel()
        log_axis(ax, shown, decades=1.0)
        ax.set_ylabel(label)
        ax.set_xlabel("updates")
    handles = [
        Line2D([], [], color=style["color"], linestyle=style["linestyle"], label=style["label"])
        for style in NORMS.values()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def loss_landscape_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    return (
        "How far the loss ranges (left) and the gradient changes (middle; right: relative to its own norm; g at "
        "the net, g' along the step) along the gradient of a batch, from half a step to four steps of the learning "
        "rate, during training. "
        + interval_note(data, log=True)
        + (" Crosses at the foot: a seed whose value is zero or not finite." if (data["lost"] > 0).any() else "")
    )


# -- running statistics -----------------------------------------------------------------------------------------------

_GAPS = {"in_training": "training mode", "in_evaluation": "evaluation mode"}


def running_statistics_data(modes: pd.DataFrame, batchnorm: pd.DataFrame) -> pd.DataFrame:
    """Return the loss in both modes and the gap of the running statistics against steps, with intervals over seeds.

    Args:
        modes: Columns momentum, seed, step, in_training, in_evaluation.
        batchnorm: `trace.batchnorm` of the same runs: columns momentum, seed, step, layer, mean_gap, var_gap.

    Returns:
        Columns view ("loss", "mean_gap", "var_gap"), mode (of the loss), momentum, step, mean, low, high, n, lost.

    Raises:
        DataError: A frame is empty or lacks a column.
    """
    need(modes, ["momentum", "seed", "step", *_GAPS], "runs with running statistics")
    need(batchnorm, ["momentum", "seed", "step", "mean_gap", "var_gap"], "recorded BatchNorm layers")
    ordered = modes.sort_values("step")
    parts = [
        seed_intervals(ordered, ["momentum", "step"], mode, log=True).assign(view="loss", mode=label)
        for mode, label in _GAPS.items()
    ]
    by_seed = batchnorm.groupby(["momentum", "seed", "step"])[["mean_gap", "var_gap"]].mean().reset_index()
    parts += [
        seed_intervals(by_seed.sort_values("step"), ["momentum", "step"], gap, log=True).assign(view=gap, mode="")
        for gap in ("mean_gap", "var_gap")
    ]
    data = pd.concat(parts, ignore_index=True)
    return data[["view", "mode", *(name for name in data if name not in ("view", "mode"))]]


def running_statistics(data: pd.DataFrame) -> Figure:
    """Draw the loss in training and evaluation mode, and the gaps of mean and variance, against steps.

    Args:
        data: As `running_statistics_data` returns it.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(DOUBLE, 2.7))
    momenta = sorted(data["momentum"].unique(), reverse=True)
    colours = {momentum: ("#0072B2", "#E69F00", "#009E73", "#CC79A7")[k % 4] for k, momentum in enumerate(momenta)}
    labels = {
        "loss": "loss on the training set (nats)",
        "mean_gap": "gap of the mean (std)",
        "var_gap": "gap of ln variance",
    }
    data = data.assign(step=data["step"] + 1)
    for ax, (view, label) in zip(axes, labels.items(), strict=True):
        own = data[data["view"] == view]
        for (momentum, mode), line in own.groupby(["momentum", "mode"], sort=False):
            if mode != _GAPS["in_training"]:
                draw_band(ax, line, "step", color=colours[momentum])
            elif momentum == momenta[0]:  # training does not read the running statistics: all momenta share this line
                draw_band(ax, line, "step", color="0.3", linestyle=(0, (3, 1.2)))
        log_axis(ax, own["step"], which="x", decades=1.0)
        log_axis(ax, own[["mean", "low", "high"]].to_numpy().ravel(), decades=1.0)
        ax.set_xlabel("updates")
        ax.set_ylabel(label)
    handles = [
        Line2D([], [], color=colour, label=f"evaluation mode, momentum {momentum:g}")
        for momentum, colour in colours.items()
    ]
    handles += [
        Line2D([], [], color="0.3", linestyle=(0, (3, 1.2)), label="training mode, any momentum"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def running_statistics_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    momenta = ", ".join(f"{value:g}" for value in sorted(data["momentum"].unique(), reverse=True))
    return (
        f"Left: loss on the training set with the same weights, in evaluation mode (running statistics, solid) and in "
        f"training mode (each batch's own, dashed, one for all), for momentum {momenta}. Middle and right: how far "
        "the running mean and variance stood from the batch's when it came (root mean square over channels, mean over "
        "layers), from the probe's table trace.batchnorm. " + interval_note(data, log=True)
    )
