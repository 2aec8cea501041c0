"""The gradient through time while a net trains: colour over time step and training step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from gradlab.errors import DataError
from gradlab.plots.intervals import need
from gradlab.plots.memory import MEMORY_NETS
from gradlab.plots.style import DOUBLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = ["time_heatmap", "time_heatmap_caption", "time_heatmap_data"]

_NO_VALUE = "0.75"
_DECADES = 10.0
"""Decades of colour; what is smaller has the darkest one."""
_MOST_COLUMNS = 150


def time_heatmap_data(timesteps: pd.DataFrame) -> pd.DataFrame:
    """Return log10 of |dL/dh_t| over time step and training step, one run a net: its first seed.

    Args:
        timesteps: A trace's table of time steps with the columns net, seed and length beside its own: step, state,
            level, direction, t, log10_grad_norm.

    Returns:
        Columns net, length, seed, step, t, log10_grad_norm, of the last layer's h, read forward; at most 150 steps a
        run.

    Raises:
        DataError: The frame is empty, lacks a column, or holds no gradient that is finite and above 0.
    """
    columns = ["net", "length", "seed", "step", "state", "level", "direction", "t", "log10_grad_norm"]
    need(timesteps, columns, "gradients through time")
    kept = timesteps[(timesteps["state"] == "h") & (timesteps["direction"] == "forward")]
    kept = kept[kept["level"] == kept.groupby("net")["level"].transform("max")]
    kept = kept[kept["seed"] == kept.groupby("net")["seed"].transform("min")]
    if not np.isfinite(kept["log10_grad_norm"]).any():
        raise DataError("No recorded gradient through time is finite and above 0, so there is nothing to draw.")
    rank = kept.groupby("net")["step"].rank(method="dense") - 1
    every = np.ceil((rank.groupby(kept["net"]).transform("max") + 1) / _MOST_COLUMNS)
    kept = kept[rank % every == 0]
    order = {net: place for place, net in enumerate(MEMORY_NETS)}
    kept = kept.assign(place=kept["net"].map(order)).sort_values(["place", "step", "t"], ignore_index=True)
    out: pd.DataFrame = kept[["net", "length", "seed", "step", "t", "log10_grad_norm"]]
    return out


def _edges(centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return where cells around ascending centres begin and end.

    Example:
        >>> _edges(np.array([0.0, 10.0, 20.0])).tolist()
        [-5.0, 5.0, 15.0, 25.0]
    """
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middles = (centres[:-1] + centres[1:]) / 2
    return np.concatenate([[2 * centres[0] - middles[0]], middles, [2 * centres[-1] - middles[-1]]])


def time_heatmap(data: pd.DataFrame) -> Figure:
    """Draw the gradient norm as colour over training step and time step, a panel a net, on one scale of colours.

    Args:
        data: As `time_heatmap_data` returns it.
    """
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    nets = list(dict.fromkeys(data["net"]))
    values = data["log10_grad_norm"].to_numpy(dtype=np.float64)
    finite = values[np.isfinite(values)]
    high = float(finite.max())
    low = max(float(finite.min()), high - _DECADES)
    norm = Normalize(low if low < high else high - 1.0, high)
    cmap = mpl.colormaps["viridis"].with_extremes(bad=_NO_VALUE)
    figure, axes = plt.subplots(1, len(nets), figsize=(DOUBLE, 2.5), squeeze=False, sharey=True, sharex=True)
    for ax, net in zip(axes[0], nets, strict=True):
        own = data[data["net"] == net]
        grid = own.pivot(index="t", columns="step", values="log10_grad_norm")
        numbers = grid.to_numpy(dtype=np.float64)
        # A gradient of exactly 0 is smaller than any: it gets the darkest colour, not the one of a missing number.
        shown = np.ma.masked_invalid(np.where(np.isneginf(numbers), low, numbers))
        columns, rows = (_edges(axis.to_numpy(dtype=np.float64)) for axis in (grid.columns, grid.index))
        mesh = ax.pcolormesh(columns, rows, shown, cmap=cmap, norm=norm, rasterized=True)
        ax.grid(visible=False)
        ax.set_title(MEMORY_NETS[net][0])
        ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes[0, 0].set_xlim(0, float(data["step"].max()))
    axes[0, 0].set_ylim(-0.5, float(data["t"].max()) + 0.5)
    axes[0, 0].set_ylabel("time step $t$")
    figure.supxlabel("training step", fontsize=8)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=22, extend="min" if float(finite.min()) < low else "neither")
    bar.locator = MaxNLocator(5, integer=True)
    bar.update_ticks()
    bar.set_label("log$_{10}$ $\\|\\partial L/\\partial h_t\\|$")
    bar.outline.set_linewidth(0.6)
    return figure


def time_heatmap_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    told = []
    for net in dict.fromkeys(data["net"]):
        own = data[data["net"] == net]
        first = own[own["t"] == own["t"].min()].sort_values("step")["log10_grad_norm"]
        last = own[own["t"] == own["t"].max()].sort_values("step")["log10_grad_norm"]
        reach = np.round(first.to_numpy(dtype=np.float64) - last.to_numpy(dtype=np.float64)) + 0.0  # no -0
        told.append(f"{MEMORY_NETS[net][0]} 10^{reach[0]:.0f} and 10^{reach[-1]:.0f}")
    return (
        f"Norm of the whole gradient dL/dh_t over a batch, while nets train on the adding problem (T = "
        f"{int(data['length'].iloc[0])}); one run a net (seed {int(data['seed'].iloc[0])}), so there is no interval. "
        f"White: training had ended. Colours span {_DECADES:.0f} decades at most; smaller gradients have the darkest. "
        "What an LSTM carries along its cell alone passes by h. The gradient at the first time step over that at the "
        f"last, at the first and the last recorded training step: {', '.join(told)}. Claims C5.7; note N10."
    )
