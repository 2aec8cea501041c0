"""One style for all figures: sizes of a printed page, colours that survive colour blindness and a grey printer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import matplotlib as mpl
import seaborn as sns
from matplotlib.colors import to_hex, to_rgb

__all__ = ["COLUMN", "DOUBLE", "LINESTYLES", "PALETTE", "THEORY", "paper_style", "shades"]

COLUMN: Final = 3.3
"""Width of one text column, in inches."""

DOUBLE: Final = 6.9
"""Width of two text columns, in inches."""

PALETTE: Final = {"plain": "#D55E00", "residual": "#0072B2"}
"""Vermilion and blue of Okabe & Ito: told apart with every common kind of colour blindness, and in grey."""

LINESTYLES: Final[dict[str, Any]] = {"plain": (0, (4, 1.2)), "residual": "-"}
"""The kind of net shows without colour too."""

THEORY: Final[dict[str, Any]] = {"color": "black", "linestyle": (0, (1, 1.5)), "linewidth": 1.0}
"""How every prediction is drawn: dotted, black, over the data."""

_SETTINGS: Final[dict[Any, Any]] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same figure on every machine
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.which": "major",
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.visible": False,
    "ytick.minor.visible": False,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # TrueType outlines: journals refuse Type 3 fonts
    "ps.fonttype": 42,
    "svg.fonttype": "none",
}


@contextmanager
def paper_style() -> Iterator[None]:
    """Draw within this context to get the house's style.

    Starts from matplotlib's defaults and seaborn's styles for paper, so that a figure does not depend on the reader's
    matplotlibrc.

    Example:
        >>> with paper_style():
        ...     mpl.rcParams["pdf.fonttype"]
        42
    """
    with mpl.rc_context():
        defaults: dict[Any, Any] = {key: value for key, value in mpl.rcParamsDefault.items() if key not in _KEPT}
        mpl.rcParams.update(defaults | sns.axes_style("ticks") | sns.plotting_context("paper"))
        mpl.rcParams.update(_SETTINGS)
        yield


#: About the window, not about the drawing.
_KEPT = frozenset({"backend", "backend_fallback", "interactive", "toolbar", "webagg.port", "webagg.address"})


def shades(kind: str, depths: Sequence[int]) -> dict[int, str]:
    """Return a colour for each depth: the kind's own for the deepest, lighter ones for shallower nets.

    Args:
        kind: "plain" or "residual".
        depths: In any order.

    Example:
        >>> shades("plain", [56, 20])
        {20: '#edbb94', 56: '#d55e00'}
    """
    red, green, blue = to_rgb(PALETTE[kind])
    ordered = sorted(set(depths))
    weights = [1.0] if len(ordered) == 1 else [0.42 + 0.58 * i / (len(ordered) - 1) for i in range(len(ordered))]
    return {
        depth: to_hex((1 - weight * (1 - red), 1 - weight * (1 - green), 1 - weight * (1 - blue)))
        for depth, weight in zip(ordered, weights, strict=True)
    }
