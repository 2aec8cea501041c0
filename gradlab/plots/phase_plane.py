"""Order and chaos: the gain over the plane of weight and bias variance, and a cut through it with measurements."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.colors import TwoSlopeNorm
from matplotlib.ticker import MaxNLocator

from gradlab.analysis.correlations import correlation_fixed_point
from gradlab.analysis.decay import fit_decay
from gradlab.analysis.gain_claims import groups
from gradlab.analysis.phases import critical_line, phase_diagram
from gradlab.plots.intervals import interval_note, need, seed_intervals
from gradlab.plots.style import DOUBLE, THEORY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["phase_plane", "phase_plane_caption", "phase_plane_data"]

_GRID = 100, 60
_LINE = 15
_COLUMNS = ("kind", "weight_var", "bias_var", "mean", "low", "high", "n", "lost")


def phase_plane_data(profiles: pd.DataFrame) -> pd.DataFrame:
    """Return theory and measurements of tanh nets from order to chaos.

    Args:
        profiles: Columns weight_var, bias_var, depth, seed, layer, log_grad_norm and correlation.

    Returns:
        Columns kind, weight_var, bias_var, mean, low, high, n, lost and depth. Kinds: "surface" (gain in theory),
        "critical" (the line; mean is nan), "gain" and "correlation" (measured), "gain in theory" and "correlation in
        theory" (along the cut).

    Raises:
        DataError: The frame is empty or lacks a column.
    """
    columns = ["weight_var", "bias_var", "depth", "seed", "layer", "log_grad_norm", "correlation"]
    need(profiles, columns, "tanh nets from order to chaos")
    rows = []
    for (weight_var, bias_var, depth, seed), net in groups(profiles.sort_values(columns[:5]), columns[:4]):
        middle = net[net["layer"].between(depth / 5, 4 * depth / 5)]
        fit = fit_decay(middle["layer"].to_numpy(float), middle["log_grad_norm"].to_numpy(float), backward=True)
        last = net[net["layer"] == net["layer"].max()]["correlation"].iloc[0]
        rows.append((weight_var, bias_var, seed, fit.gain, last))
    nets = pd.DataFrame(rows, columns=["weight_var", "bias_var", "seed", "gain", "correlation"])
    keys = ["weight_var", "bias_var"]
    frames = [seed_intervals(nets, keys, name, log=False).assign(kind=name) for name in ("gain", "correlation")]
    bias_var, most = float(nets["bias_var"].iloc[0]), 1.05 * float(nets["weight_var"].max())
    weights = np.linspace(min(0.5, float(nets["weight_var"].min())), most, _GRID[0])
    biases = np.linspace(0.0, max(0.3, 2 * bias_var), _GRID[1])
    surface = phase_diagram("tanh", weights, biases)
    places = [(w, b) for w in weights for b in biases]
    frames.append(_theory("surface", places, surface.gain.ravel().tolist()))
    line = (biases[-1] * np.linspace(0.0, 1.0, _LINE) ** 3).tolist()  # closer where it bends most, near 0
    frames.append(_theory("critical", [(critical_line("tanh", b), b) for b in line], [math.nan] * _LINE))
    cut = [(float(w), bias_var) for w in weights]
    frames.append(_theory("gain in theory", cut, phase_diagram("tanh", weights, [bias_var]).gain[:, 0].tolist()))
    critical = critical_line("tanh", bias_var)
    # c* falls steeply from 1 behind the critical line, where points lie closer.
    kinks = [weights[0], critical, *(critical + rise for rise in (0.04, 0.12)), *nets["weight_var"].unique(), most]
    stations = [(float(w), bias_var) for w in sorted(kinks)]
    frames.append(
        _theory("correlation in theory", stations, [correlation_fixed_point("tanh", *pair) for pair in stations])
    )
    return pd.concat([frame[list(_COLUMNS)] for frame in frames], ignore_index=True).assign(
        depth=int(profiles["depth"].max())
    )


def _theory(kind: str, places: list[tuple[float, float]], values: list[float]) -> pd.DataFrame:
    frame = pd.DataFrame(places, columns=["weight_var", "bias_var"])
    return frame.assign(kind=kind, mean=values, low=np.nan, high=np.nan, n=0, lost=0)


def phase_plane(data: pd.DataFrame) -> Figure:
    """Draw the plane as colour with the critical line, and gain and correlation along the measured cut.

    Args:
        data: As `phase_plane_data` returns it.
    """
    import matplotlib.pyplot as plt

    def of(kind: str) -> pd.DataFrame:
        return data[data["kind"] == kind]

    figure, (plane, gain, correlation) = plt.subplots(
        1, 3, figsize=(DOUBLE, 2.7), gridspec_kw={"width_ratios": [1.4, 1, 1]}
    )
    table = of("surface").pivot(index="bias_var", columns="weight_var", values="mean")
    measured = of("gain")
    low, high = float(table.to_numpy().min()), float(table.to_numpy().max())
    norm = TwoSlopeNorm(1.0, min(low, 0.999), max(high, 1.001))
    mesh = plane.pcolormesh(
        table.columns, table.index, table.to_numpy(), cmap="PuOr_r", norm=norm, shading="gouraud", rasterized=True
    )
    line = of("critical")
    plane.plot(line["weight_var"], line["bias_var"], color="black", linewidth=1.2)
    plane.scatter(
        measured["weight_var"], measured["bias_var"], c=measured["mean"], cmap="PuOr_r", norm=norm, s=26,
        edgecolors="black", linewidths=0.8, zorder=3,
    )  # fmt: skip
    plane.set_xlim(table.columns.min(), table.columns.max())
    plane.set_ylim(table.index.min(), table.index.max())
    plane.grid(visible=False)
    for x, text in ((0.18, "order:\nvanishes"), (0.72, "chaos:\nexplodes")):
        plane.text(x, 0.78, text, ha="center", va="center", fontsize=7.5, transform=plane.transAxes)
    plane.set_ylabel("bias variance $\\sigma_b^2$")
    plane.set_xlabel("weight variance $\\sigma_w^2$")
    plane.set_title("tanh")
    bar = figure.colorbar(mesh, ax=plane, pad=0.02, aspect=18)
    bar.ax.set_title("$\\sqrt{\\chi_1}$", pad=8)  # as a label it would stand beside that of the next panel
    bar.set_ticks([tick for tick in (0.6, 0.7, 0.8, 0.9, 1.0, 1.05, 1.1, 1.15, 1.2) if low <= tick <= high])
    bar.outline.set_linewidth(0.6)
    bias_var = float(measured["bias_var"].iloc[0])
    for ax, name in ((gain, "gain"), (correlation, "correlation")):
        theory, found = of(f"{name} in theory"), of(name)
        ax.axvline(critical_line("tanh", bias_var), color="black", linewidth=0.6, zorder=1)
        ax.plot(theory["weight_var"], theory["mean"], label="theory", **THEORY)
        ax.vlines(found["weight_var"], found["low"], found["high"], color="#0072B2", linewidth=1.0)
        ax.plot(found["weight_var"], found["mean"], linestyle="none", marker="o", color="#0072B2", label="measured")
        ax.set_title(f"{name}, $\\sigma_b^2={bias_var:g}$")
        ax.set_xlabel("weight variance $\\sigma_w^2$")
    for ax in (gain, correlation):
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    gain.axhline(1.0, color="0.45", linewidth=0.6, zorder=1)
    gain.legend(loc="lower right")
    correlation.set_ylim(-0.02, 1.05)
    correlation.set_ylabel(f"correlation at layer {int(data['depth'].iloc[0])}")
    gain.set_ylabel("gain a layer")
    return figure


def phase_plane_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    measured = data[data["kind"] == "gain"]
    bias_var = float(measured["bias_var"].iloc[0])
    return (
        "Left: mean-field gain of the gradient a layer in tanh nets over weight and bias variance; the line is where "
        "it is 1 (the edge of chaos), circles are measured nets in the same colours. Middle: the cut at sigma_b^2 = "
        f"{bias_var:g}, where the line lies at sigma_w^2 = {critical_line('tanh', bias_var):.5f}. Right: correlation "
        "of the pre-activations of two independent inputs at the last layer, against the limit c* of great depth: "
        "order makes all inputs alike, chaos parts them; near the line nets of this depth have not arrived. "
        + interval_note(measured, log=False).replace("Lines are", "Points are").replace("bands", "bars")
        + " Claims C1.2; Poole et al. 2016, Fig. 1; Schoenholz et al. 2017, Fig. 1."
    )
