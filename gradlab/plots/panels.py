"""What all figures draw with: a line with its band, decades on a log axis, marks where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, LogFormatterSciNotation, MaxNLocator, NullLocator

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

__all__ = ["LOST", "draw_band", "log_axis", "log_ticks", "mark_lost", "pick", "spaced"]

LOST = "zero or not finite"
"""Label of the marks at places without a value."""

_MOST_TICKS, _FEWEST_TICKS = 6, 3
_MANTISSAS = (
    (1,),
    (1, 3),
    (1, 2, 5),
    (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8),
)


def draw_band(ax: Axes, data: pd.DataFrame, x: str, *, label: str | None = None, **style: Any) -> None:
    """Draw mean against x and fill low to high; places without a value are gaps, marked at the axis.

    Args:
        ax: Where.
        data: Columns x, mean, low, high, lost; in the order of x.
        x: Column on the horizontal axis.
        label: For the legend.
        style: Of the line.
    """
    (line,) = ax.plot(data[x], data["mean"], label=label, **style)
    if len(data) == 1:  # a band has no width there
        ax.vlines(data[x], data["low"], data["high"], color=line.get_color(), linewidth=1.0)
    elif data["low"].notna().any():
        ax.fill_between(data[x], data["low"], data["high"], color=line.get_color(), alpha=0.22, linewidth=0)
    mark_lost(ax, data.loc[data["lost"] > 0, x], color=line.get_color())


def mark_lost(ax: Axes, places: Iterable[float], **style: Any) -> None:
    """Put a cross at the foot of the axes wherever a seed has no value to draw."""
    places = list(places)
    if places:
        ax.plot(
            places,
            np.full(len(places), 0.02),
            linestyle="none",
            marker="x",
            markersize=3,
            markeredgewidth=0.7,
            transform=ax.get_xaxis_transform(),
            clip_on=False,
            gid="lost",
            **style,
        )


def log_axis(ax: Axes, values: Iterable[float], *, decades: float = 2.0, which: str = "y") -> None:
    """Make an axis logarithmic: all values within, at least `decades` shown, ticks at a few powers of ten.

    A least span keeps a flat profile looking flat.

    Args:
        ax: The axes.
        values: What must be within; NaN, infinite and non-positive ones are passed over.
        decades: Least span.
        which: "x" or "y".
    """
    array = np.asarray([value for value in values if value > 0 and math.isfinite(value)], dtype=np.float64)
    low, high = (math.log10(array.min()), math.log10(array.max())) if array.size else (-1.0, 1.0)
    margin = 0.04 * max(high - low, decades)
    low, high = low - margin, high + margin
    missing = max(0.0, decades - (high - low)) / 2
    low, high = low - missing, high + missing
    # Beyond 10**305 a float ends.
    limits = 10.0 ** max(low, -305.0), 10.0 ** min(high, 305.0)
    ticks = log_ticks(*limits)
    if which == "y":
        ax.set_yscale("log")
        ax.set_ylim(*limits)
        axis: Axis = ax.yaxis
    else:
        ax.set_xscale("log")
        ax.set_xlim(*limits)
        axis = ax.xaxis
    plain = ticks[0] > 1e-3 and ticks[-1] < 1e4 and limits[1] < 1e3 * limits[0]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}") if plain else LogFormatterSciNotation())
    axis.set_minor_locator(NullLocator())


def log_ticks(low: float, high: float) -> list[float]:
    """Return the ticks of a log axis from `low` to `high`: every few decades on a long one, finer on a short one.

    Example:
        >>> log_ticks(0.5, 30), log_ticks(1e-50, 1)
        ([1.0, 3.0, 10.0, 30.0], [1e-50, 1e-40, 1e-30, 1e-20, 1e-10, 1.0])
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first > _MOST_TICKS:
        step = next(step for step in (2, 3, 5, 10, 20, 25, 50, 100, 200) if (last - first) / step <= _MOST_TICKS)
        exponents = range(math.ceil(first / step) * step, last + 1, step)
        return [10.0**exponent for exponent in exponents if low <= 10.0 ** min(exponent, 307) <= high]
    for mantissas in _MANTISSAS:
        places = (m * 10.0**exponent for exponent in range(first, last + 1) for m in mantissas)
        ticks = [round(place, 12) if place > 1e-6 else place for place in places if low <= place <= high]
        if len(ticks) >= _FEWEST_TICKS:
            return ticks
    # Less than a factor of about 1.5: there a log axis is as good as linear.
    return [float(tick) for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]


def pick(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most `most` items, evenly spaced, with the first and the last.

    Example:
        >>> pick([20, 32, 44, 56, 110], 3)
        [20, 44, 110]
    """
    if len(items) <= most:
        return list(items)
    return [items[place] for place in sorted({round(i * (len(items) - 1) / (most - 1)) for i in range(most)})]


def spaced(places: Sequence[object], most: int) -> list[int]:
    """Return which of some places on an axis to label: at most `most` of them, the first and the last included.

    Example:
        >>> spaced(range(16), 6)
        [0, 3, 6, 9, 12, 15]
    """
    return [int(place) for place in pick(range(len(places)), most)]
