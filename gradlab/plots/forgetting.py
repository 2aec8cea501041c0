"""The gradient against lag, and its rate against the largest Lyapunov exponent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from gradlab.analysis.forgetting_claims import rates_a_step
from gradlab.plots.intervals import interval_note, need, seed_intervals
from gradlab.plots.panels import draw_band
from gradlab.plots.style import DOUBLE, THEORY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["against_lag", "against_lag_caption", "against_lag_data", "rates", "rates_caption", "rates_data"]

_FAMILIES = {
    "tanh": ("tanh", "#0072B2", "o"),
    "orthogonal": ("tanh, orthogonal", "#56B4E9", "D"),
    "sigmoid": ("sigmoid", "#D55E00", "s"),
    "relu": ("ReLU", "#009E73", "^"),
    "lstm": ("LSTM", "#CC79A7", "v"),
    "gru": ("GRU", "#E69F00", "P"),
}


def against_lag_data(lags: pd.DataFrame, rates: pd.DataFrame) -> pd.DataFrame:
    """Return log10 of the gradient norm against lag, relative to lag 0, its interval over seeds, and the prediction.

    Args:
        lags: Columns net, seed, lag, log_norm (natural logarithm; values far outside float64's range are fine).
        rates: Columns net, seed, exponent (largest Lyapunov exponent, nats a step).

    Returns:
        Columns net, lag, mean, low, high, n, lost (log10) and theory: lag times the mean exponent, in decades.

    Raises:
        DataError: A frame is empty or lacks a column.
    """
    need(lags, ["net", "seed", "lag", "log_norm"], "gradients against lag")
    need(rates, ["net", "seed", "exponent"], "Lyapunov exponents")
    ordered = lags.sort_values("lag")
    start = ordered.groupby(["net", "seed"], sort=False)["log_norm"].transform("first")
    tidy = ordered.assign(decades=(ordered["log_norm"] - start) / np.log(10))
    data = seed_intervals(tidy, ["net", "lag"], "decades", log=False)
    exponents = rates.groupby("net")["exponent"].mean() / np.log(10)
    return data.assign(theory=data["lag"] * data["net"].map(exponents))


def _family(net: str) -> str:
    return net.partition(" ")[0]


def _apart(heights: list[float], least: float) -> list[float]:
    """Return places for labels near ascending heights, at least so far apart, and on average where the heights are.

    Example:
        >>> _apart([0.0, 0.0, 10.0], 2.0)
        [-0.6666666666666666, 1.3333333333333335, 9.333333333333334]
    """
    places: list[float] = []
    for height in heights:
        places.append(max(height, places[-1] + least) if places else height)
    shift = float(np.mean(np.subtract(places, heights)))
    return [place - shift for place in places]


def against_lag(data: pd.DataFrame) -> Figure:
    """Draw decades of gradient against lag, vanilla nets left and gated ones right, with the predicted lines.

    Args:
        data: As `against_lag_data` returns it.
    """
    import matplotlib.pyplot as plt

    gated = data["net"].map(_family).isin(["lstm", "gru"])
    groups = [(title, data[kept]) for title, kept in (("vanilla", ~gated), ("gated", gated)) if kept.any()]
    figure, axes = plt.subplots(1, len(groups), figsize=(DOUBLE, 3.3), squeeze=False)
    for ax, (title, group) in zip(axes[0], groups, strict=True):
        last = group["lag"].max()
        ends = []
        for net, line in group.groupby("net", sort=False):
            colour = _FAMILIES[_family(str(net))][1]
            draw_band(ax, line, "lag", color=colour)
            ax.plot(line["lag"], line["theory"], gid=f"theory {net}", zorder=3, **THEORY)
            ends.append((float(line["mean"].iloc[-1]), str(net), colour))
        span = float(group["mean"].max() - group["mean"].min()) or 1.0
        ends.sort()
        for (height, net, colour), place in zip(ends, _apart([end[0] for end in ends], span / 17), strict=True):
            ax.annotate(
                net.removeprefix("lstm ").removeprefix("gru ") if title == "gated" else net,
                (last, height), xytext=(last * 1.06, place), fontsize=6.5, color=colour, va="center",
                annotation_clip=False, arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": colour},
            )  # fmt: skip
        ax.set_title(title)
        ax.set_xlim(0, last)
        ax.set_xlabel("lag $T-t$ (time steps)")
    axes[0, 0].set_ylabel("log$_{10}$ of gradient norm / that at lag 0")
    found = [key for key in _FAMILIES if (data["net"].map(_family) == key).any()]
    handles = [Line2D([], [], color=_FAMILIES[key][1], label=_FAMILIES[key][0]) for key in found]
    handles.append(Line2D([], [], label="exp(Lyapunov exponent) a step", **THEORY))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), columnspacing=1.2)
    return figure


def against_lag_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    lowest = data.sort_values("mean").iloc[:1].to_dict("records")[0]
    return (
        "Norm of dh_T/dh_t against lag, in decades, at initialization; dotted: the largest Lyapunov exponent, measured "
        f"forward in time, times the lag. The smallest is 10^{lowest['mean']:.0f} ({lowest['net']}, lag "
        f"{int(lowest['lag'])}): rescaled at every step, so that nothing underflows. "
        + interval_note(data, log=False)
        + " Claims C5.1; notes N8 and N9."
    )


def rates_data(lags: pd.DataFrame, rates: pd.DataFrame) -> pd.DataFrame:
    """Return each net's gain a step, backward and by the Lyapunov exponent, and their intervals over seeds.

    Args:
        lags: Columns net, seed, lag, log_norm.
        rates: Columns net, seed, exponent.

    Returns:
        Columns net, what ("gain", "exp(exponent)"), mean, low, high, n, lost.

    Raises:
        DataError: A frame is empty or lacks a column.
    """
    need(lags, ["net", "seed", "lag", "log_norm"], "gradients against lag")
    need(rates, ["net", "seed", "exponent"], "Lyapunov exponents")
    gains = rates_a_step(lags).assign(what="gain")
    predicted = rates.assign(what="exp(exponent)", gain=np.exp(rates["exponent"]))
    both = pd.concat([gains, predicted[["net", "seed", "what", "gain"]]], ignore_index=True)
    return seed_intervals(both, ["net", "what"], "gain", log=False)


def rates(data: pd.DataFrame) -> Figure:
    """Draw the gain a step backward in time against exp(Lyapunov exponent), with the line of equality.

    Args:
        data: As `rates_data` returns it.
    """
    import matplotlib.pyplot as plt

    figure, (ax, rest) = plt.subplots(1, 2, figsize=(DOUBLE, 3.0))
    gain, predicted = (
        data[data["what"] == what].set_index("net")[["mean", "low", "high"]].to_dict("index")
        for what in ("gain", "exp(exponent)")
    )
    ends = [0.0, float(data["mean"].max()) * 1.06]
    ax.plot(ends, ends, label="equal", gid="equal", **THEORY)
    seen = set()
    for net in map(str, gain):
        family = _family(net)
        name, colour, marker = _FAMILIES[family]
        x, y = predicted[net], gain[net]
        style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 0.9}
        label = None if family in seen else name
        seen.add(family)
        bars = {"xerr": _bars(x), "yerr": _bars(y)}
        ax.errorbar([x["mean"]], [y["mean"]], **bars, label=label, capsize=0, **style)
        rest.errorbar([x["mean"]], [100 * (y["mean"] / x["mean"] - 1)], capsize=0, **style)
    for limit in (-2, 2):
        rest.axhline(limit, color="0.5", linewidth=0.7)
    rest.axhline(0, **THEORY)
    rest.set_ylim(-4, 4)
    ax.axhline(1, color="0.6", linewidth=0.6)
    ax.set_xlabel("exp(largest Lyapunov exponent)")
    ax.set_ylabel("gain of the gradient a step")
    ax.legend(loc="upper left")
    rest.set_xlabel("exp(largest Lyapunov exponent)")
    rest.set_ylabel("difference (%); lines: the rule's 2 %")
    return figure


def _bars(row: dict[Any, float]) -> list[list[float]]:
    ends = [row["mean"] - row["low"], row["high"] - row["mean"]]
    return [[float(np.nan_to_num(end, nan=0.0))] for end in ends]


def rates_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    return (
        "Factor a step by which the gradient falls or grows back in time, fitted against lag, and exp of the largest "
        "Lyapunov exponent, measured forward. Above the grey line at 1 it explodes. "
        + interval_note(data, log=False).replace("Lines are means and bands", "Points are means and bars")
        + " Claims C5.1."
    )
