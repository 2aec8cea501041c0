"""How activations and gradients are distributed in each layer of an untrained net (after Glorot & Bengio 2010)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.ticker import MaxNLocator

from gradlab.plots.intervals import need, seed_intervals
from gradlab.plots.style import DOUBLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["layer_distributions", "layer_distributions_caption", "layer_distributions_data"]

_WHAT = {"activation": "activation $h$", "gradient": "gradient $\\partial L/\\partial h$ / sd in the last layer"}
_SCHEMES = {"standard": "standard: $U(\\pm 1/\\sqrt{n})$", "normalized": "normalized: $U(\\pm\\sqrt{6/(n+n')})$"}
_COLOURS = {"activation": "#0072B2", "gradient": "#D55E00"}
_RISE = 2.4  # layers that the highest ridge of a panel rises over


def layer_distributions_data(histograms: pd.DataFrame) -> pd.DataFrame:
    """Return mean densities over seeds with their intervals, and the standard deviations.

    Args:
        histograms: Columns scheme, seed, what ("activation" or "gradient"), layer, value, density and std.

    Returns:
        Columns what, scheme, layer, value, mean, low, high, n, lost, std and std_reach (half its 95 % interval; NaN for
        fewer than 3 seeds).

    Raises:
        DataError: The frame is empty or lacks a column.
    """
    need(histograms, ["scheme", "seed", "what", "layer", "value", "density", "std"], "layer histograms")
    keys = ["what", "scheme", "layer"]
    data = seed_intervals(histograms, [*keys, "value"], "density", log=False)
    spreads = seed_intervals(histograms.drop_duplicates([*keys, "seed"]), keys, "std", log=False)
    spreads = spreads.assign(std=spreads["mean"], std_reach=(spreads["high"] - spreads["low"]) / 2)
    spreads.loc[spreads["n"] < 3, "std_reach"] = math.nan
    return data.merge(spreads[[*keys, "std", "std_reach"]], on=keys, how="left", sort=False)


def layer_distributions(data: pd.DataFrame) -> Figure:
    """Draw a ridge for each layer: activations above, gradients below, one column an initialization.

    Args:
        data: As `layer_distributions_data` returns it.
    """
    import matplotlib.pyplot as plt

    schemes = [scheme for scheme in _SCHEMES if (data["scheme"] == scheme).any()]
    layers = sorted(data["layer"].unique())
    size = (DOUBLE * (0.55 if len(schemes) == 1 else 1.0), 0.9 + 0.62 * len(layers))
    figure, axes = plt.subplots(2, len(schemes), figsize=size, squeeze=False, sharex="row", sharey="row")
    for row, (what, label) in enumerate(_WHAT.items()):
        shown = data[data["what"] == what]
        scale = _RISE / shown["mean"].max()
        for column, scheme in enumerate(schemes):
            ax = axes[row, column]
            _ridges(ax, shown[shown["scheme"] == scheme], scale, _COLOURS[what])
            ax.set_xlabel(label)
            # Room at the right for the standard deviations.
            low, high = float(shown["value"].min()), float(shown["value"].max())
            ax.set_xlim(low - 0.02 * (high - low), high + 0.26 * (high - low))
            ax.set_xticks([tick for tick in MaxNLocator(6).tick_values(low, high) if abs(tick) <= 1.05 * high])
            if row == 0:
                ax.set_title(_SCHEMES[scheme])
            if column == 0:
                ax.set_ylabel("layer")
        # Layer 1 at the top, so that a ridge rises over the layer before it.
        axes[row, 0].set_ylim(len(layers) + 0.15, min(0.3, (shown["layer"] - scale * shown["mean"]).min() - 0.1))
        axes[row, 0].set_yticks(layers)
    return figure


def _ridges(ax: Axes, own: pd.DataFrame, scale: float, colour: str) -> None:
    for layer, ridge in own.groupby("layer"):
        base, order = float(layer), 2 + float(layer)  # type: ignore[arg-type]
        heights = base - scale * ridge["mean"]
        ax.fill_between(ridge["value"], base, heights, color=colour, alpha=0.65, linewidth=0, zorder=order)
        ax.plot(ridge["value"], heights, color="black", linewidth=0.6, zorder=order + 0.2)
        reach = ridge["std_reach"].iloc[0]
        spread = f"sd {ridge['std'].iloc[0]:.3f}" + (f" $\\pm$ {reach:.3f}" if math.isfinite(reach) else "")
        ax.text(
            0.995, base - 0.08, spread, transform=ax.get_yaxis_transform(), ha="right", va="bottom", fontsize=6.5,
            zorder=20,
        )  # fmt: skip
    ax.grid(visible=False)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)


def layer_distributions_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words and in its own numbers."""
    first, last = int(data["layer"].min()), int(data["layer"].max())
    spreads = data.drop_duplicates(["what", "scheme", "layer"]).set_index(["what", "scheme", "layer"])["std"]

    def at(what: str, layer: int) -> str:
        return " and ".join(
            f"{spreads[what, scheme, layer]:.2f} ({scheme})" for scheme in _SCHEMES if (what, scheme, layer) in spreads
        )

    seeds = int(data["n"].max())
    counted = f"{seeds} seed{'s' if seeds > 1 else ''}"
    return (
        "Distribution over units and 300 digits of the activations and of the gradients (of the cross-entropy) that "
        f"reach them in the {last} layers of an untrained tanh net. With the standard initialization activations "
        "shrink towards the output and gradients towards the input: the gradient's standard deviation at layer "
        f"{first}, relative to layer {last}, is {at('gradient', first)}; the activations' at layer {last} "
        f"{at('activation', last)}. Densities are means over {counted}, heights comparable within a row; standard "
        "deviations with 95 % Student intervals over seeds. Claims C1.4; after Glorot & Bengio 2010, Fig. 6 and 7."
    )
