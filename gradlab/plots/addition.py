"""Addition against concatenation by depth, and what auxiliary heads do for the gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from gradlab.plots.intervals import interval_note, need, seed_intervals
from gradlab.plots.panels import draw_band, log_axis
from gradlab.plots.style import DOUBLE, LINESTYLES, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "addition",
    "addition_caption",
    "addition_data",
    "auxiliary_heads",
    "auxiliary_heads_caption",
    "auxiliary_heads_data",
]

#: Kind of stack -> its name, colour and line.
_GROWTHS: Final[dict[str, tuple[str, str, Any]]] = {
    "plain": ("plain: f(h)", PALETTE["plain"], LINESTYLES["plain"]),
    "residual": ("addition: h + f(h)", PALETTE["residual"], LINESTYLES["residual"]),
    "dense": ("concatenation: [h, f(h)]", "#009E73", (0, (1.2, 1))),
}
_NORMS: Final = {"none": "no norm", "batch": "BatchNorm"}
_INITS: Final = {"default": "torch's default init", "he_normal": "He's init"}
_HEADS: Final[dict[bool, tuple[str, str, Any]]] = {
    False: ("without heads", "#D55E00", (0, (4, 1.2))),
    True: ("with heads", "#0072B2", "-"),
}
_LOSS: Final = "loss"


def addition_data(start: pd.DataFrame, places: pd.DataFrame) -> pd.DataFrame:
    """Return the gradient at h_0 against depth, and by layer in the deepest stack without norm.

    Args:
        start: Columns growth, norm, depth, seed, grad_norm: at the output of the stem.
        places: Columns growth, norm, depth, seed, place, log10_ratio, as `piece_gradients` returns it.

    Returns:
        Columns panel ("none", "batch" or "by layer"), growth, x (depth, or the layer from 0), mean, low, high, n,
        lost and depth (of the deepest stack).

    Raises:
        DataError: A frame is empty or lacks a column.
    """
    need(start, ["growth", "norm", "depth", "seed", "grad_norm"], "stacks")
    need(places, ["growth", "norm", "depth", "seed", "place", "log10_ratio"], "stacks")
    by = ["panel", "growth", "x"]
    against_depth = start.assign(panel=start["norm"], x=start["depth"])
    frames = [seed_intervals(against_depth, by, "grad_norm", log=True)]
    norm = "none" if (places["norm"] == "none").any() else str(places["norm"].iloc[0])
    deep = places[(places["norm"] == norm) & (places["depth"] == places["depth"].max())]
    deep = deep.assign(panel="by layer", x=deep["place"] - 1, ratio=10.0 ** deep["log10_ratio"].clip(-300, 300))
    frames.append(seed_intervals(deep[deep["x"] <= deep["depth"]], by, "ratio", log=True))
    return pd.concat(frames, ignore_index=True).assign(depth=int(places["depth"].max()))


def addition(data: pd.DataFrame) -> Figure:
    """Draw the gradient at the start against depth, without and with norm, and by layer.

    Args:
        data: As `addition_data` returns it.
    """
    import matplotlib.pyplot as plt

    panels = [panel for panel in (*_NORMS, "by layer") if (data["panel"] == panel).any()]
    figure, axes = plt.subplots(1, len(panels), figsize=(DOUBLE * len(panels) / 3, 2.35), squeeze=False)
    for ax, panel in zip(axes[0], panels, strict=True):
        own = data[data["panel"] == panel]
        for growth, (_, colour, style) in _GROWTHS.items():
            line = own[own["growth"] == growth].sort_values("x")
            marks: dict[str, Any] = {} if panel == "by layer" else {"marker": "o", "markersize": 3}
            draw_band(ax, line, "x", color=colour, linestyle=style, **marks)
        log_axis(ax, own[["mean", "low", "high"]].to_numpy().ravel(), decades=3.0)
        if panel == "by layer":
            ax.set_title(f"by layer, depth {int(data['depth'].iloc[0])}, no norm")
            ax.set_xlabel("layer l (0 is the stem)")
            ax.set_ylabel("gradient norm at $h_l$ / at end")
        else:
            ax.set_title(_NORMS[panel])
            ax.set_xlabel("layers of the stack")
            ax.set_ylabel("gradient norm at $h_0$")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    handles = [Line2D([], [], color=colour, linestyle=style, label=name) for name, colour, style in _GROWTHS.values()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def addition_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    own = data[data["panel"] == "none"]
    deepest = own[own["x"] == own["x"].max()].set_index("growth")["mean"].to_dict() if len(own) else {}
    listed = ", ".join(f"{growth} {value:.2g}" for growth, value in deepest.items())
    return (
        "Norm of the gradient of the cross-entropy at the start of stacks of 3x3 convolutions that differ only in how "
        "a layer's output joins its input, at torch's default initialization, and by layer in the deepest stack"
        + (f" (without norm at {int(own['x'].max())} layers: {listed})" if listed else "")
        + f". {interval_note(data, log=True)} Claims C4 plain, C4 dense, N6 flat; He et al. 2015; Huang et al. 2016."
    )


def auxiliary_heads_data(places: pd.DataFrame, ends: pd.DataFrame) -> pd.DataFrame:
    """Return the gradient by piece with and without auxiliary losses, and the loss after training.

    Args:
        places: Columns norm, init, heads, seed, layer, place, grad_norm.
        ends: Columns family, norm, init, heads, seed, train_loss; may be empty.

    Returns:
        Columns panel, heads, layer, place, mean, low, high, n, lost; in the panel "loss" a row is one init, as layer.

    Raises:
        DataError: `places` is empty or lacks a column.
    """
    need(places, ["norm", "init", "heads", "seed", "layer", "place", "grad_norm"], "nets with auxiliary heads")
    names = places["init"].map(_INITS).fillna(places["init"]) + ", " + places["norm"].map(_NORMS)
    by = ["panel", "heads", "layer", "place"]
    tidy = places.assign(panel=names, heads=places["heads"].astype(bool))
    tidy = tidy.sort_values(["norm", "init", "place"], ascending=[False, True, True])  # without norm above
    frames = [seed_intervals(tidy, by, "grad_norm", log=True)]
    if len(ends):
        kept = ends[(ends["family"] == "googlenet") & (ends["norm"] == "none") & (ends["activation"] == "relu")]
        both = kept.groupby("init")["heads"].transform("nunique") > 1
        loss = kept[both]
        if len(loss):
            loss = loss.assign(panel=_LOSS, heads=loss["heads"].astype(bool), layer=loss["init"], place=0)
            frames.append(seed_intervals(loss, by, "train_loss", log=False))
    return pd.concat(frames, ignore_index=True)


def auxiliary_heads(data: pd.DataFrame) -> Figure:
    """Draw the gradient by piece with and without the heads' losses.

    Args:
        data: As `auxiliary_heads_data` returns it.
    """
    import matplotlib.pyplot as plt

    panels = [panel for panel in dict.fromkeys(data["panel"]) if panel != _LOSS]
    columns = len(panels) if len(panels) <= 3 else 2
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(DOUBLE if columns > 1 else DOUBLE / 2, 0.7 + 1.8 * rows), sharex=True, squeeze=False
    )
    for ax, panel in zip(axes.flat, panels, strict=False):
        own = data[data["panel"] == panel]
        for heads, (_, colour, style) in reversed(_HEADS.items()):  # dashes over the line they may lie on
            draw_band(ax, own[own["heads"] == heads].sort_values("place"), "place", color=colour, linestyle=style)
        _mark_heads(ax, own)
        log_axis(ax, own[["mean", "low", "high"]].to_numpy().ravel(), decades=2.0)
        ax.set_title(panel)
        layers = own.drop_duplicates("place").sort_values("place")
        names = layers["layer"].str.removeprefix("trunk.").str.removeprefix("inception").replace("conv2", "conv")
        ax.set_xticks(layers["place"], names, rotation=90 if columns == 3 else 0)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    figure.supxlabel("piece (a convolution, then inception blocks)", fontsize=8)
    figure.supylabel("gradient norm at its output", fontsize=8)
    handles = [Line2D([], [], color=colour, linestyle=style, label=name) for name, colour, style in _HEADS.values()]
    handles.append(Line2D([], [], color="0.5", linewidth=0.8, linestyle=":", label="a head reads here"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def _mark_heads(ax: Axes, own: pd.DataFrame) -> None:
    for place in own.loc[own["layer"].isin(["trunk.inception4a", "trunk.inception4d"]), "place"].unique():
        ax.axvline(place, color="0.5", linewidth=0.8, linestyle=":", zorder=1)


def auxiliary_heads_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    first = data[(data["place"] == 1) & (data["panel"] != _LOSS)]
    parts = []
    for panel, own in first.groupby("panel", sort=False):
        pair = own.set_index("heads")["mean"].to_dict()
        if len(pair) == 2 and pair[False] > 0:
            parts.append(f"{panel} x{pair[True] / pair[False]:.3g}")
    text = (
        "Gradient norm of the loss at the output of each piece of one and the same small GoogLeNet at initialization, "
        "with and without 0.3 times the losses of two auxiliary heads. At the first piece the heads change it by: "
        f"{'; '.join(parts)}."
    )
    loss = data[data["panel"] == _LOSS]
    if len(loss):
        for init, own in loss.groupby("layer", sort=False):
            pair = own.set_index("heads")["mean"].to_dict()
            spread = np.nanmax([own["high"] - own["mean"]]) if own["high"].notna().any() else float("nan")
            text += (
                f" Training loss of the net alone after training from {_INITS.get(str(init), init)}, without norm: "
                f"{pair[True]:.3g} with and {pair[False]:.3g} without heads (+- at most {spread:.2g})."
            )
    return (
        f"{text} {interval_note(data[data['panel'] != _LOSS], log=True)} Claim C4 heads; Szegedy et al. 2014, sec. 5."
    )
