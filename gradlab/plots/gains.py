"""Measured gain of the gradient a layer against mean-field theory: activation by colour, initialization by marker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from gradlab.analysis.gain_claims import activation_title, fitted_gains, steepest_slope
from gradlab.errors import DataError
from gradlab.plots.intervals import interval_note, need, seed_intervals
from gradlab.plots.panels import log_axis
from gradlab.plots.style import DOUBLE, THEORY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "gain_against_theory", "gain_against_theory_caption", "gain_against_theory_data"]

COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, in the order in which they are handed out."""

_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
_INITS: Final = {
    "default": "torch default ($\\sigma_w^2=1/3$)",
    "lecun_normal": "LeCun (1)",
    "glorot_normal": "Xavier (1)",
    "glorot_uniform": "Xavier, uniform (1)",
    "he_normal": "He (2)",
    "orthogonal": "orthogonal (1)",
}
_TOLERANCE = 1.0  # per cent
_ASIDE = 1.008  # small enough that no point crosses the gain of 1


def gain_against_theory_data(profiles: pd.DataFrame) -> pd.DataFrame:
    """Return measured and predicted gain a layer for each cell, with its interval over seeds.

    Args:
        profiles: Columns activation, init, depth, width, seed, layer and log_grad_norm.

    Returns:
        Columns activation, init, depth, critical, theory, mean, low, high, n, lost, and deviation, deviation_low,
        deviation_high in per cent of the theory.

    Raises:
        DataError: The frame is empty or lacks a column, or no gain is finite.
    """
    columns = ["activation", "init", "depth", "width", "seed", "layer", "log_grad_norm"]
    need(profiles, columns, "nets whose gain was measured")
    fits = fitted_gains(profiles)
    if not np.isfinite(fits["gain"]).any():
        raise DataError("No net has a gain that is finite: nets of 10 layers and more have one.")
    data = seed_intervals(fits, ["activation", "init", "depth", "critical", "theory"], "gain", log=False)
    for name in ("mean", "low", "high"):
        column = "deviation" if name == "mean" else f"deviation_{name}"
        data[column] = 100 * (data[name] / data["theory"] - 1)
    return data


def gain_against_theory(data: pd.DataFrame) -> Figure:
    """Draw measured against predicted gain with the identity, and the deviation in per cent below.

    Args:
        data: As `gain_against_theory_data` returns it.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(DOUBLE, 3.6))
    colours = dict(zip(dict.fromkeys(data["activation"]), np.resize(COLOURS, len(data)).tolist(), strict=False))
    markers = dict(zip(dict.fromkeys(data["init"]), np.resize(_MARKERS, len(data)).tolist(), strict=False))
    left, right = axes
    ends = [0.9 * data["theory"].min(), 1.1 * data["theory"].max()]
    left.plot(ends, ends, **THEORY, zorder=1)
    right.axhspan(-_TOLERANCE, _TOLERANCE, color="0.93", linewidth=0, zorder=0)
    right.axhline(0.0, **THEORY, zorder=1)
    for ax in axes:
        ax.axvline(1.0, color="0.45", linewidth=0.6, zorder=1)
    left.axhline(1.0, color="0.45", linewidth=0.6, zorder=1)
    for row in data.to_dict("records"):
        style = {
            "color": colours[row["activation"]],
            "marker": markers[row["init"]],
            "markerfacecolor": "white" if row["critical"] else colours[row["activation"]],
        }
        _point(left, row["theory"], row["mean"], row["low"], row["high"], style)
        # Cells of equal theory side by side, not one over the other.
        aside = row["theory"] * _ASIDE ** (list(colours).index(row["activation"]) - (len(colours) - 1) / 2)
        _point(right, aside, row["deviation"], row["deviation_low"], row["deviation_high"], style)
    log_axis(left, [*ends, *data["mean"]], decades=0.5)
    for ax in axes:
        log_axis(ax, ends, decades=0.5, which="x")
        ax.set_xlabel("gain a layer in theory, $\\sqrt{\\chi_1}$")
    left.set_ylabel("measured gain a layer")
    right.set_ylabel("deviation from theory (%)")
    reach = 1.15 * max(_TOLERANCE, np.nanmax(np.abs(data[["deviation_low", "deviation_high", "deviation"]].to_numpy())))
    right.set_ylim(-reach, reach)
    for x, text, align in ((0.97, "vanishes", "right"), (1.03, "explodes", "left")):
        left.text(x, ends[0] * 0.97, text, ha=align, va="bottom", fontsize=7, color="0.35")
    handles = [
        Line2D([], [], linestyle="none", marker="o", color=colour, label=activation_title(name))
        for name, colour in colours.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), columnspacing=1.2, handletextpad=0.2)
    handles = [
        Line2D([], [], linestyle="none", marker=marker, color="0.35", label=_INITS.get(name, f"$\\sigma_w^2={name}$"))
        for name, marker in markers.items()
    ]
    if data["critical"].any():
        handles.append(
            Line2D([], [], linestyle="none", marker="o", color="0.35", markerfacecolor="white", label="critical")
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), columnspacing=1.2, handletextpad=0.2)
    return figure


def _point(ax: Axes, x: float, y: float, low: float, high: float, style: dict[str, str]) -> None:
    ax.plot([x], [y], linestyle="none", markersize=4.5, zorder=3, **style)  # type: ignore[arg-type]
    ax.vlines([x], [low], [high], color=style["color"], linewidth=1.0, zorder=2)


def _spoken(init: str) -> str:
    return _INITS[init].partition(" (")[0] if init in _INITS else f"sigma_w^2 = {init}"


def gain_against_theory_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words and in its own numbers."""
    off = data[~data["critical"].astype(bool)]
    text = (
        "Measured factor a layer on the gradient norm, going backward, against mean-field theory, "
        f"{len(data)} cells of activation and initialization (left; dotted: equal), and by how many per cent it "
        f"deviates (right, activations set side by side; grey: within {_TOLERANCE:g} %). "
    )
    odd = [
        f"{activation_title(row['activation'])} at {_spoken(row['init'])}"
        for row in data.to_dict("records")
        if row["low"] > 1 and steepest_slope(row["activation"]) <= 1
    ]
    if odd:
        text += f"Explode although their slopes never exceed 1: {', '.join(odd)}. "
    if len(off):
        text += f"Largest deviation off criticality: {off['deviation'].abs().max():.2f} %. "
    if data["critical"].any():
        text += (
            "White: tanh at criticality, where the gradient changes as a power of depth and there is no rate; the same "
            "layers of the theory's own profile are fitted. "
        )
    return (
        text
        + interval_note(data, log=False).replace("Lines are", "Points are").replace("bands", "bars")
        + " Claims C1.1, N1 and N12; Poole et al. 2016; Schoenholz et al. 2017."
    )
