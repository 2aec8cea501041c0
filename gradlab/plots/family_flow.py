"""Gradient norm along five families, before and after training, with and without BatchNorm; and by activation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from gradlab.errors import DataError
from gradlab.plots.family_sizes import FAMILY_NAMES
from gradlab.plots.intervals import interval_note, need, seed_intervals
from gradlab.plots.panels import LOST, draw_band, log_axis
from gradlab.plots.style import DOUBLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "activations",
    "activations_caption",
    "activations_data",
    "family_flow",
    "family_flow_caption",
    "family_flow_data",
]

_NORMS: Final = {"none": ("no norm", "#D55E00"), "batch": ("BatchNorm", "#0072B2")}
_WHEN: Final[dict[str, Any]] = {"at initialization": (0, (3, 1.2)), "after training": "-"}
_MARKS: Final = {"relu": ("#0072B2", "o"), "tanh": ("#D55E00", "s"), "sigmoid": ("#009E73", "^")}
_OTHERS: Final = (("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"), ("0.4", "X"))


def family_flow_data(places: pd.DataFrame) -> pd.DataFrame:
    """Return the relative gradient norm by place and its interval over seeds.

    Args:
        places: Columns net (a family, or a published net), norm, when ("at initialization", "after training"), seed,
            place and log10_ratio.

    Returns:
        Columns net, norm, when, place, mean, low, high, n, lost.

    Raises:
        DataError: The frame is empty, lacks a column, or holds no finite value.
    """
    need(places, ["net", "norm", "when", "seed", "place", "log10_ratio"], "gradients of the families")
    if not np.isfinite(places["log10_ratio"]).any():
        raise DataError("No gradient of the families is finite, so there is nothing to draw.")
    data = seed_intervals(places, ["net", "norm", "when", "place"], "log10_ratio", log=False)
    for name in ("mean", "low", "high"):
        data[name] = 10.0 ** data[name].clip(-300, 300)
    return data


def family_flow(data: pd.DataFrame) -> Figure:
    """Draw gradient norm against place, one panel a net.

    Args:
        data: As `family_flow_data` returns it.
    """
    import matplotlib.pyplot as plt

    order = {name: place for place, name in enumerate(FAMILY_NAMES)}
    nets = sorted(dict.fromkeys(data["net"]), key=lambda net: order.get(net, len(order)))
    rows = -(-len(nets) // 5)
    columns = min(5, len(nets))
    size = (DOUBLE * max(columns, 2) / 5, 0.55 + 1.75 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharey="row", squeeze=False)
    for row in range(rows):
        own_nets = nets[5 * row : 5 * row + 5]
        shown = data[data["net"].isin(own_nets)]
        for ax, net in zip(axes[row], own_nets, strict=False):
            own = data[data["net"] == net]
            for (norm, when), line in own.groupby(["norm", "when"], sort=False):
                draw_band(ax, line.sort_values("place"), "place", color=_NORMS[norm][1], linestyle=_WHEN[when])
            ax.set_title(FAMILY_NAMES.get(net, net))
            last = int(own["place"].max())
            ax.set_xticks(sorted({1, (last + 1) // 2, last}))
            ax.axhline(1, color="0.6", linewidth=0.5, zorder=1)
            log_axis(ax, shown[["mean", "low", "high"]].to_numpy().ravel(), decades=3.0)
        for ax in axes[row][len(own_nets) :]:
            ax.remove()
    figure.supxlabel("piece of the net (1 is nearest the input)", fontsize=8)
    figure.supylabel("gradient norm / at the last", fontsize=8)
    handles = [
        Line2D([], [], color=colour, label=name)
        for key, (name, colour) in _NORMS.items()
        if (data["norm"] == key).any()
    ]
    handles += [
        Line2D([], [], color="0.3", linestyle=style, label=when)
        for when, style in _WHEN.items()
        if (data["when"] == when).any()
    ]
    if (data["lost"] > 0).any():
        handles.append(Line2D([], [], color="0.3", marker="x", markersize=3, linestyle="none", label=LOST))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), columnspacing=1.4)
    return figure


def family_flow_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    first = data[data["place"] == 1]
    parts = []
    for norm, (name, _) in _NORMS.items():
        own = first[(first["norm"] == norm) & (first["when"] == "at initialization")]
        means = dict(zip(own["net"], own["mean"], strict=True))
        ordered = sorted(means, key=lambda net: [*FAMILY_NAMES, net].index(net))
        listed = ", ".join(f"{FAMILY_NAMES.get(net, net)} {means[net]:.2g}" for net in ordered)
        if listed:
            parts.append(f"{name}: {listed}")
    return (
        "Gradient norm of the training loss at the output of each piece with weights (a convolution, a block, a dense "
        "layer, a hidden linear layer), over the batch, relative to the last one: small members of the five families "
        "with ReLU and He's initialization, at the first and the last training step. First over last before training: "
        f"{'; '.join(parts)}. {interval_note(data, log=True)} Notes N1 to N4 and N6."
    )


def activations_data(ratios: pd.DataFrame, ends: pd.DataFrame) -> pd.DataFrame:
    """Return, for each family and activation, the gradient ratio at initialization and the loss after training.

    Args:
        ratios: Columns family, norm, activation, init, dropout, seed, log10_ratio.
        ends: Columns family, norm, activation, dropout, heads, init, seed, train_loss; may be empty.

    Returns:
        Columns panel, family, activation, mean, low, high, n, lost.

    Raises:
        DataError: `ratios` is empty or lacks a column.
    """
    need(ratios, ["family", "norm", "activation", "init", "dropout", "seed", "log10_ratio"], "gradients at the start")
    own = ratios[ratios["dropout"] == 0]
    panels = own.apply(lambda row: _panel(row["norm"], row["init"]), axis=1)
    tidy = own.assign(panel=panels, value=10.0 ** own["log10_ratio"].clip(-300, 300))
    frames = [tidy[["panel", "family", "activation", "seed", "value"]]]
    if len(ends):
        kept = ends[(ends["norm"] == "none") & (ends["dropout"] == 0) & ~ends["heads"].astype(bool)]
        kept = kept[kept["init"] == kept["init"].iloc[0]] if len(kept) else kept
        if len(kept):
            loss = kept.assign(panel=_LOSS, value=kept["train_loss"])
            frames.append(loss[["panel", "family", "activation", "seed", "value"]])
    tidy = pd.concat(frames, ignore_index=True)
    data = seed_intervals(tidy, ["panel", "family", "activation"], "value", log=True)
    # Without norm first, the loss last; activations as in the legend.
    order = sorted(data["panel"].unique(), key=lambda panel: (panel == _LOSS, _NORMS["batch"][0] in panel))
    kinds = dict.fromkeys([*_MARKS, *data["activation"]])
    parts = [data[(data["panel"] == panel) & (data["activation"] == kind)] for panel in order for kind in kinds]
    found: pd.DataFrame = pd.concat([part for part in parts if len(part)], ignore_index=True)
    return found


_LOSS = "training loss, no norm"


def _panel(norm: str, init: str) -> str:
    name = {"he_normal": "He's init", "default": "torch's default init"}.get(init, init)
    return f"{name}, {_NORMS[norm][0]}"


def activations(data: pd.DataFrame) -> Figure:
    """Draw one point a family and activation in panels for each initialization, and one for the loss.

    Args:
        data: As `activations_data` returns it.
    """
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys(data["panel"]))
    kinds = list(dict.fromkeys(data["activation"]))
    spare = iter(_OTHERS)
    marks = {kind: _MARKS[kind] if kind in _MARKS else next(spare, ("0.6", ".")) for kind in kinds}
    families = [family for family in FAMILY_NAMES if (data["family"] == family).any()]
    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(rows, min(2, len(panels)), figsize=(DOUBLE, 0.45 + 1.85 * rows), squeeze=False)
    for ax, panel in zip(axes.flat, panels, strict=False):
        own = data[data["panel"] == panel]
        for place, kind in enumerate(kinds):
            shift = 0.2 * (place - (len(kinds) - 1) / 2)
            _draw_points(ax, own[own["activation"] == kind], families, shift, *marks[kind])
        ax.set_xticks(range(len(families)), [FAMILY_NAMES[family] for family in families])
        ax.set_xlim(-0.5, len(families) - 0.5)
        ax.set_title(panel)
        shown = own[["mean", "low", "high"]].to_numpy().ravel()
        log_axis(ax, shown if panel == _LOSS else [1.0, *shown], decades=1.0 if panel == _LOSS else 3.0)
        if panel == _LOSS:
            ax.set_ylabel("loss (nats)")
        else:
            ax.axhline(1, color="0.6", linewidth=0.5, zorder=1)
            ax.set_ylabel("gradient, first / last")
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    names = {"relu": "ReLU"}
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", label=names.get(kind, kind))
        for kind, (colour, marker) in marks.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def _draw_points(ax: Axes, own: pd.DataFrame, families: list[str], shift: float, colour: str, marker: str) -> None:
    places = [families.index(family) + shift for family in own["family"]]
    ends = np.nan_to_num([own["mean"] - own["low"], own["high"] - own["mean"]], nan=0.0)
    ax.errorbar(
        places, own["mean"], yerr=ends, linestyle="none", color=colour, marker=marker, markersize=4, linewidth=0.9,
        capsize=0,
    )  # fmt: skip


def activations_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    text = (
        "Gradient norm at the first piece over that at the last, at initialization, by family and activation; on the "
        "grey line it neither falls nor grows. "
    )
    if (data["panel"] == _LOSS).any():
        text += (
            "Last panel: loss over the training set after training without norm from the first initialization, of the "
            "families that were trained with the activation. "
        )
    note = interval_note(data, log=True).replace("Lines are", "Points are").replace(" bands", " bars")
    return text + note + " Claims N1 (tanh, sigmoid); note N1."
