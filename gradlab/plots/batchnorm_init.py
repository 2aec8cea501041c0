"""BatchNorm at initialization: the gradient's explosion with depth, and growth along residual blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from gradlab.analysis.normalization_theory import batchnorm_gradient_gain, residual_variance_growth
from gradlab.plots.intervals import interval_note, need, seed_intervals
from gradlab.plots.panels import draw_band, log_axis
from gradlab.plots.style import DOUBLE, THEORY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "explosion",
    "explosion_caption",
    "explosion_data",
    "residual_growth",
    "residual_growth_caption",
    "residual_growth_data",
]

_MARKS: dict[str, dict[str, Any]] = {
    "relu": {"color": "#0072B2", "marker": "o"},
    "tanh": {"color": "#009E73", "marker": "^"},
    "linear": {"color": "#CC79A7", "marker": "D"},
    "relu, no norm": {"color": "#D55E00", "marker": "s"},
}
_TITLES = {"relu": "ReLU", "tanh": "tanh", "linear": "linear", "relu, no norm": "ReLU, no normalization"}
_KINDS: dict[str, dict[str, Any]] = {
    "no norm": {"color": "#D55E00", "linestyle": (0, (4, 1.2))},
    "BatchNorm": {"color": "#0072B2", "linestyle": "-"},
    "no norm, scaled": {"color": "#009E73", "linestyle": (0, (6, 1, 1, 1))},
}
_NAMES = {
    "no norm": "no normalization",
    "BatchNorm": "BatchNorm on the branch",
    "no norm, scaled": "no normalization, $\\alpha=1/\\sqrt{L}$",
}


def explosion_data(explosion: pd.DataFrame, gains: pd.DataFrame) -> pd.DataFrame:
    """Return the gradient norm by layer relative to the last, and the squared gain by batch size, with intervals.

    Args:
        explosion: Columns activation, norm, batch_size, seed, place, log_grad_norm.
        gains: Columns activation, norm, batch_size, seed, gain, as
            `gradlab.analysis.batchnorm_init_claims.squared_gains` returns it.

    Returns:
        Columns view ("layer", "gain"), net (activation, with "no norm" where there is none), batch_size, place (NaN
        for gains), mean, low, high, n, lost.

    Raises:
        DataError: A frame is empty or lacks a column.
    """
    keys = ["activation", "norm", "batch_size", "seed"]
    need(explosion, [*keys, "place", "log_grad_norm"], "measured gradient profiles")
    need(gains, [*keys, "gain"], "gains")

    def named(frame: pd.DataFrame) -> pd.DataFrame:
        suffix = np.where(frame["norm"] == "batch", "", ", no norm")
        return frame.assign(net=frame["activation"] + suffix)

    ordered = explosion.sort_values("place")
    last = ordered.groupby(keys)["log_grad_norm"].transform("last")
    relative = named(ordered.assign(relative=np.exp(ordered["log_grad_norm"] - last)))
    first = seed_intervals(relative, ["net", "batch_size", "place"], "relative", log=True).assign(view="layer")
    second = seed_intervals(named(gains), ["net", "batch_size"], "gain", log=False).assign(view="gain", place=np.nan)
    columns = ["view", "net", "batch_size", "place", "mean", "low", "high", "n", "lost"]
    return pd.concat([first[columns], second[columns]], ignore_index=True)


def explosion(data: pd.DataFrame) -> Figure:
    """Draw the gradient norm against layer, and the squared gain against batch size, with theory dotted.

    Args:
        data: As `explosion_data` returns it.
    """
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(DOUBLE, 3.0))
    layers, gains = data[data["view"] == "layer"], data[data["view"] == "gain"]
    sizes = sorted(layers.loc[layers["net"] == "relu", "batch_size"].unique())
    shades = {size: ("#9ecae1", "#4292c6", "#08306b")[k * 2 // max(len(sizes) - 1, 1)] for k, size in enumerate(sizes)}
    handles = []
    for net, mark in _MARKS.items():
        for size, line in layers[layers["net"] == net].groupby("batch_size"):
            colour = shades[size] if net == "relu" else mark["color"]
            draw_band(left, line, "place", color=colour)
            handles.append(Line2D([], [], color=colour, label=f"{_TITLES[net]}, batch {size}"))
    depth = layers["place"].max()
    place = np.arange(layers["place"].min(), depth + 1)
    left.plot(place, batchnorm_gradient_gain() ** (depth - place), gid="theory", zorder=5, **THEORY)
    handles.append(Line2D([], [], label="1.211 a layer", **THEORY))
    log_axis(left, [*layers["mean"], *layers["low"], *layers["high"]])
    left.set_xlabel("layer (1 is nearest the input)")
    left.set_ylabel("gradient norm / that of the last layer")
    left.legend(handles=handles, loc="upper right", fontsize=6)
    smallest, largest = gains["batch_size"].min(), gains["batch_size"].max()
    grid = np.unique(np.geomspace(max(smallest * 0.75, 4), largest * 1.35, 40).round().astype(int))
    for activation in ("relu", "tanh", "linear"):
        if (gains["net"] == activation).any():
            limit = batchnorm_gradient_gain(activation) ** 2
            right.axhline(limit, gid="theory", **THEORY)
            finite = [batchnorm_gradient_gain(activation, batch_size=int(size)) ** 2 for size in grid]
            right.plot(grid, finite, color="0.4", linewidth=0.8, gid="finite")
    for net, style in _MARKS.items():
        own = gains[gains["net"] == net]
        if len(own):
            right.errorbar(
                own["batch_size"], own["mean"], yerr=[own["mean"] - own["low"], own["high"] - own["mean"]],
                linestyle="none", markersize=4, elinewidth=1.0, label=_TITLES[net], zorder=4, **style,
            )  # fmt: skip
    log_axis(right, grid, which="x", decades=1.0)
    right.set_xticks(sorted(gains["batch_size"].unique()), [str(v) for v in sorted(gains["batch_size"].unique())])
    right.set_xlabel("batch size")
    right.set_ylabel("squared gain a layer")
    marks, names = right.get_legend_handles_labels()
    lines = [Line2D([], [], color="0.4", linewidth=0.8), Line2D([], [], **THEORY)]
    right.legend(
        [*marks, *lines],
        [*names, "theory, finite batch", "theory, infinite batch"],
        fontsize=6,
        loc="center right",
        bbox_to_anchor=(1.0, 0.6),
    )
    return figure


def explosion_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    depth = int(data["place"].max())
    return (
        f"Gradient norm at the normalized tensors of untrained plain nets of {depth} layers, relative to the last "
        "layer (left), and the factor on its square a layer (right). Dotted: theory of infinite width and batch, "
        "pi/(pi-1) = 1.467 for ReLU; grey: infinite width at a finite batch, derived in this project, which needs a "
        f"batch well below the width. Without normalization (He's weights) it stays. {interval_note(data, log=True)} "
        "Bars on the right are not of the logarithm."
    )


def residual_growth_data(growth: pd.DataFrame) -> pd.DataFrame:
    """Return the mean squares of signal and gradient by residual block, with intervals over seeds.

    Args:
        growth: Columns kind, block, seed, signal, gradient.

    Returns:
        Columns view ("signal", "gradient"), kind, block, mean, low, high, n, lost.

    Raises:
        DataError: The frame is empty or lacks a column.
    """
    need(growth, ["kind", "block", "seed", "signal", "gradient"], "measured residual nets")
    ordered = growth.sort_values("block")
    parts = [
        seed_intervals(ordered, ["kind", "block"], view, log=True).assign(view=view) for view in ("signal", "gradient")
    ]
    data = pd.concat(parts, ignore_index=True)
    return data[["view", *(name for name in data if name != "view")]]


def residual_growth(data: pd.DataFrame) -> Figure:
    """Draw the mean squares of signal and gradient against the block, on log axes, the signal's theory dotted.

    Args:
        data: As `residual_growth_data` returns it.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(DOUBLE, 2.8))
    blocks = int(data["block"].max())
    labels = {"signal": "mean square of the signal / the input's", "gradient": "mean square gradient / the output's"}
    for ax, (view, label) in zip(axes, labels.items(), strict=True):
        own = data[data["view"] == view]
        for kind, style in _KINDS.items():
            draw_band(ax, own[own["kind"] == kind], "block", **style)
        log_axis(ax, [*own["mean"], *own["low"], *own["high"]])
        ax.set_xlabel("block (0 is the input)")
        ax.set_ylabel(label)
    how: dict[str, dict[str, Any]] = {
        "no norm": {},
        "BatchNorm": {"normalized": True},
        "no norm, scaled": {"branch_scale": blocks**-0.5},
    }
    for theory in how.values():
        predicted = [residual_variance_growth(block, **theory) for block in range(blocks + 1)]
        axes[0].plot(range(blocks + 1), predicted, gid="theory", zorder=5, **THEORY)
    # Without normalization the gradient grows backward by what the signal grows by forward.
    for kind in ("no norm", "no norm, scaled"):
        back = [residual_variance_growth(blocks - block, **how[kind]) for block in range(blocks + 1)]
        axes[1].plot(range(blocks + 1), back, gid="theory", zorder=5, **THEORY)
    handles = [Line2D([], [], label=_NAMES[kind], **style) for kind, style in _KINDS.items()]
    handles.append(Line2D([], [], label="theory", **THEORY))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), columnspacing=1.2)
    return figure


def residual_growth_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    blocks = int(data["block"].max())
    return (
        f"Pre-activation residual nets of {blocks} blocks at initialization: without normalization the mean square of "
        "signal and gradient doubles with every block, with BatchNorm on the branch the signal grows by 1 a block, and "
        "with the branch scaled by 1/sqrt(L) it ends near e. Dotted: 2^l, 1 + l and (1 + 1/L)^l; for gradients the "
        "same backward where there is no normalization. " + interval_note(data, log=True)
    )
