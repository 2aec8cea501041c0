"""The gradient through time along the memory and in total, and how open the gates are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from gradlab.plots.intervals import interval_note, need, seed_intervals
from gradlab.plots.panels import draw_band, log_axis
from gradlab.plots.style import DOUBLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "cell_path",
    "cell_path_caption",
    "cell_path_data",
    "gate_openness",
    "gate_openness_caption",
    "gate_openness_data",
]

_NAMES = {"lstm": "LSTM", "gru": "GRU"}
_ZOOM = (1e-3, 3.0)  # where the lines of nets that keep their gradient lie
_PATHS: dict[str, Any] = {"all paths": "-", "memory alone": (0, (3, 1.5))}


def _colours(inits: list[str]) -> dict[str, str]:
    """Return a colour for each initialization: dark to light as in viridis, which keeps its order in grey."""
    import matplotlib as mpl
    from matplotlib.colors import to_hex

    return {
        init: to_hex(mpl.colormaps["viridis"](0.05 + 0.85 * k / max(len(inits) - 1, 1))) for k, init in enumerate(inits)
    }


def _in_order(inits: pd.Series[str]) -> list[str]:
    """Return initializations from torch's default over the biases to chrono, each by its number."""

    def rank(init: str) -> tuple[int, float]:
        scheme, _, value = init.partition(" ")
        return ["default", "bias", "chrono"].index(scheme), float(value or 0)

    return sorted(inits.unique(), key=rank)


def cell_path_data(gradients: pd.DataFrame) -> pd.DataFrame:
    """Return the gradient norm against lag, relative to lag 0, and its interval over seeds.

    Args:
        gradients: Columns net, init, seed, lag, log_full and log_path (natural logarithms).

    Returns:
        Columns net, init, path ("all paths", "memory alone"), lag, mean, low, high, n, lost.

    Raises:
        DataError: The frame is empty or lacks a column.
    """
    need(gradients, ["net", "init", "seed", "lag", "log_full", "log_path"], "gradients through time")
    ordered = gradients.sort_values("lag")
    frames = []
    for path, column in zip(_PATHS, ("log_full", "log_path"), strict=True):
        start = ordered.groupby(["net", "init", "seed"], sort=False)[column].transform("first")
        frames.append(ordered.assign(path=path, norm=np.exp(ordered[column] - start)))
    tidy = pd.concat(frames, ignore_index=True)
    return seed_intervals(tidy, ["net", "init", "path", "lag"], "norm", log=True)


def cell_path(data: pd.DataFrame) -> Figure:
    """Draw the gradient norm against lag on a log axis, one panel a net, a line for each initialization and path.

    Args:
        data: As `cell_path_data` returns it.
    """
    import matplotlib.pyplot as plt

    nets = [net for net in _NAMES if net in set(data["net"])]
    inits = _in_order(data["init"])
    colours = _colours(inits)
    figure, axes = plt.subplots(2, len(nets), figsize=(DOUBLE, 4.6), sharex=True, sharey="row", squeeze=False)
    for column, net in enumerate(nets):
        for ax in axes[:, column]:
            for (init, path), line in data[data["net"] == net].groupby(["init", "path"], sort=False):
                draw_band(ax, line, "lag", color=colours[str(init)], linestyle=_PATHS[str(path)])
        axes[0, column].set_title(_NAMES[net])
        axes[1, column].set_xlabel("lag $T-t$ (time steps)")
    log_axis(axes[0, 0], data["mean"], decades=2.0)
    log_axis(axes[1, 0], _ZOOM, decades=2.0)
    axes[0, 0].set_ylabel("gradient norm / that at lag 0")
    axes[1, 0].set_ylabel("the same, enlarged")
    handles = [Line2D([], [], color=colours[init], label=init) for init in inits]
    handles += [Line2D([], [], color="0.3", linestyle=style, label=path) for path, style in _PATHS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 8), columnspacing=1.2)
    return figure


def cell_path_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words, with the answer to the study group's question."""
    last = int(data["lag"].max())
    lag = min(100, last)
    net = "lstm" if "lstm" in set(data["net"]) else "gru"
    at = data[(data["lag"] == lag) & (data["net"] == net)].set_index(["init", "path"])["mean"]

    def left(init: str, path: str) -> str:
        return f"{at.get((init, path), float('nan')):.2g}"

    return (
        "Gradient norm of the memory (c of an LSTM, h of a GRU) against lag, by all paths (solid) and along the memory "
        "alone, the product of the gates (dashed); enlarged below. Does the cell state keep the "
        "gradient? Only as far as "
        f"the gates are open: after {lag} steps the share left in the {_NAMES[net]} is "
        f"{left('default', 'memory alone')} along the cell and {left('default', 'all paths')} by all paths at torch's "
        "default initialization; the other paths add, they do not take away. "
        + interval_note(data, log=True)
        + " Claims C5.5 and C5.6; notes N9 and N11."
    )


def gate_openness_data(gates: pd.DataFrame) -> pd.DataFrame:
    """Return how units' memories are distributed: quantiles over units, averaged over seeds.

    A gate that keeps the share g a step remembers for about 1/(1 - g) steps.

    Args:
        gates: Columns net, init, seed, unit, gate (mean over time and samples).

    Returns:
        Columns net, init, share (of units with a shorter memory), mean (steps), low, high, n, lost.

    Raises:
        DataError: The frame is empty or lacks a column.
    """
    need(gates, ["net", "init", "seed", "unit", "gate"], "gates")
    shares = np.linspace(0, 1, 33)
    rows = [
        {"net": net, "init": init, "seed": seed, "share": share, "memory": 1 / (1 - value)}
        for (net, init, seed), group in gates.groupby(["net", "init", "seed"], sort=False)
        for share, value in zip(shares, np.quantile(group["gate"], shares), strict=True)
    ]
    return seed_intervals(pd.DataFrame(rows), ["net", "init", "share"], "memory", log=True)


def gate_openness(data: pd.DataFrame) -> Figure:
    """Draw the distribution over units of how long they remember, one panel a net.

    Args:
        data: As `gate_openness_data` returns it.
    """
    import matplotlib.pyplot as plt

    nets = [net for net in _NAMES if net in set(data["net"])]
    inits = _in_order(data["init"])
    colours = _colours(inits)
    figure, axes = plt.subplots(1, len(nets), figsize=(DOUBLE, 2.7), sharey=True, squeeze=False)
    for ax, net in zip(axes.flat, nets, strict=True):
        for init, line in data[data["net"] == net].groupby("init", sort=False):
            draw_band(ax, line, "share", color=colours[str(init)])
        ax.set_title(f"{_NAMES[net]} (gate {'f' if net == 'lstm' else 'z'})")
        ax.set_xlabel("share of units with a shorter memory")
    log_axis(axes[0, 0], data["mean"], decades=2.0)
    axes[0, 0].set_ylabel("memory of the unit, 1/(1 - gate) (steps)")
    handles = [Line2D([], [], color=colours[init], label=init) for init in inits]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 6), columnspacing=1.2)
    return figure


def gate_openness_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    return (
        "How long each unit remembers: 1/(1 - g), g the mean over time and samples of the gate that keeps "
        "memory; units sorted by it. Nearly the same for all units with a constant bias, spread over "
        "time scales with chrono "
        "initialization. "
        + interval_note(data, log=True)
        + " Claims C5.5 gate and C5.6; Jozefowicz et al. 2015; Tallec & Ollivier 2018."
    )
