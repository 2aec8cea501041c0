"""Singular values of the input-output Jacobian of deep nets: orthogonal against Gaussian weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gradlab.plots.intervals import interval_note, need, seed_intervals
from gradlab.plots.panels import draw_band, log_axis
from gradlab.plots.style import DOUBLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["singular_values", "singular_values_caption", "singular_values_data"]

_STYLES: dict[str, dict[str, Any]] = {
    "orthogonal": {"color": "#0072B2", "linestyle": "-"},
    "Gaussian": {"color": "#D55E00", "linestyle": (0, (4, 1.2))},
}
_ORDER = ["linear", "tanh", "relu"]
_SMALLEST = 1e-9  # drawn, relative to the largest of a panel; below lie the zeros of units that are off, as rounding


def singular_values_data(spectra: pd.DataFrame) -> pd.DataFrame:
    """Return singular values against rank with their intervals over seeds.

    Args:
        spectra: Columns activation, weights, seed, rank, value, spectrum_depth and spectrum_width.

    Returns:
        Columns activation, weights, rank, share (of values that are larger or equal), mean, low, high, n, lost, depth
        and width. Values below 1e-9 of the largest of their activation are lost: they are zeros with rounding.

    Raises:
        DataError: The frame is empty or lacks a column.
    """
    columns = ["activation", "weights", "seed", "rank", "value", "spectrum_depth", "spectrum_width"]
    need(spectra, columns, "singular values")
    largest = spectra.groupby("activation")["value"].transform("max")
    kept = spectra.assign(value=spectra["value"].where(spectra["value"] > _SMALLEST * largest, np.nan))
    data = seed_intervals(kept, ["activation", "weights", "rank"], "value", log=True)
    # A mean over the seeds that happen to have one more value than the others would bend the end of a line.
    data.loc[data["lost"] > 0, ["mean", "low", "high"]] = np.nan
    width = int(spectra["spectrum_width"].iloc[0])
    return data.assign(share=data["rank"] / width, depth=int(spectra["spectrum_depth"].iloc[0]), width=width)


def singular_values(data: pd.DataFrame) -> Figure:
    """Draw the sorted singular values, one panel an activation.

    Args:
        data: As `singular_values_data` returns it.
    """
    import matplotlib.pyplot as plt

    names = sorted(data["activation"].unique(), key=lambda name: (_ORDER.index(name) if name in _ORDER else 9, name))
    figure, axes = plt.subplots(1, len(names), figsize=(DOUBLE, 2.6), squeeze=False, sharey=True, sharex=True)
    for ax, name in zip(axes.flat, names, strict=True):
        own = data[data["activation"] == name]
        ax.axhline(1.0, color="0.45", linewidth=0.6, zorder=1)
        for weights, style in _STYLES.items():
            line = own[own["weights"] == weights]
            if len(line):
                # The zeros need no cross each: the line ends where they begin.
                draw_band(ax, line.assign(lost=0), "share", label=weights, **style)
        ax.set_title(name)
        ax.set_xlabel("rank / width")
    log_axis(axes[0, 0], data[["mean", "low", "high"]].to_numpy().ravel(), decades=2.0)
    axes[0, 0].set_ylabel("singular value of $\\partial h_L/\\partial x$")
    axes[0, 0].legend(loc="lower left")
    return figure


def singular_values_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words and in its own numbers."""
    depth, width = int(data["depth"].iloc[0]), int(data["width"].iloc[0])
    tops = data[data["rank"] == 1].set_index(["activation", "weights"])["mean"]

    def top(name: str) -> str:
        pairs = [(weights, tops.get((name, weights))) for weights in _STYLES]
        return ", ".join(f"{weights} {value:.2g}" for weights, value in pairs if value is not None)

    said = "; ".join(f"{name}: {top(name)}" for name in sorted(set(data["activation"])))
    return (
        f"Singular values, in order, of the Jacobian from input to output of untrained nets of depth {depth} and width "
        f"{width}, at sigma_w^2 = 1 (2 for ReLU). Orthogonal weights make a linear net an exact isometry and hold the "
        "values of tanh nets together; those of ReLU nets they do not. Lines end where values fall below 1e-9 of the "
        "largest. "
        f"Largest values: {said}. {interval_note(data, log=True)} Claims isometry linear and tanh; Saxe et al. 2014; "
        "Pennington et al. 2017."
    )
