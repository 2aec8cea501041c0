"""The gradient against lag, and its rate against the largest Lyapunov exponent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from scipy.optimize import isotonic_regression

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
    "attention": ("attention", "#333333", "X"),
}
_TIMELESS = "attention"  # reaches every time step at once: no rate, no exponent


def against_lag_data(lags: pd.DataFrame, rates: pd.DataFrame, attention: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return log10 of the gradient norm against lag, relative to lag 0, its interval over seeds, and the prediction.

    Args:
        lags: Columns net, seed, lag, log_norm (natural logarithm; values far outside float64's range are fine).
        rates: Columns net, seed, exponent (largest Lyapunov exponent, nats a step).
        attention: Columns seed, lag, log_norm of an attention layer, the contrast; relative to lag 1, since at lag 0
            the residual connection comes on top.

    Returns:
        Columns net, lag, mean, low, high, n, lost (log10) and theory: lag times the mean exponent, in decades, NaN for
        attention.

    Raises:
        DataError: A frame is empty or lacks a column.
    """
    need(lags, ["net", "seed", "lag", "log_norm"], "gradients against lag")
    need(rates, ["net", "seed", "exponent"], "Lyapunov exponents")
    if attention is not None and len(attention):
        need(attention, ["seed", "lag", "log_norm"], "gradients through attention")
        shown = attention.loc[attention["lag"] > 0, ["seed", "lag", "log_norm"]].assign(net=_TIMELESS)
        lags = pd.concat([lags[["net", "seed", "lag", "log_norm"]], shown], ignore_index=True)
    ordered = lags.sort_values("lag")
    start = ordered.groupby(["net", "seed"], sort=False)["log_norm"].transform("first")
    tidy = ordered.assign(decades=(ordered["log_norm"] - start) / np.log(10))
    data = seed_intervals(tidy, ["net", "lag"], "decades", log=False)
    exponents = rates.groupby("net")["exponent"].mean() / np.log(10)
    return data.assign(theory=data["lag"] * data["net"].map(exponents))


def _family(net: str) -> str:
    return net.partition(" ")[0]


def _apart(heights: list[float], least: float) -> list[float]:
    """Return the places nearest to ascending heights that are at least so far apart.

    Example:
        >>> _apart([0.0, 0.0, 10.0], 2.0)
        [-1.0, 1.0, 10.0]
    """
    steps = least * np.arange(len(heights))
    places: list[float] = (isotonic_regression(np.array(heights) - steps).x + steps).tolist()
    return places


def against_lag(data: pd.DataFrame) -> Figure:
    """Draw decades of gradient against lag, vanilla nets left and gated ones right, with the predicted lines.

    Args:
        data: As `against_lag_data` returns it.
    """
    import matplotlib.pyplot as plt

    gated = data["net"].map(_family).isin(["lstm", "gru", _TIMELESS])
    named = "gated and attention" if (data["net"] == _TIMELESS).any() else "gated"
    groups = [(title, data[kept]) for title, kept in (("vanilla", ~gated), (named, gated)) if kept.any()]
    figure, axes = plt.subplots(1, len(groups), figsize=(DOUBLE, 3.6), squeeze=False)
    for ax, (title, group) in zip(axes[0], groups, strict=True):
        last = group["lag"].max()
        ends = []
        for net, line in group.groupby("net", sort=False):
            colour = _FAMILIES[_family(str(net))][1]
            draw_band(ax, line, "lag", color=colour)
            if line["theory"].notna().any():
                ax.plot(line["lag"], line["theory"], gid=f"theory {net}", zorder=3, **THEORY)
            if net == _TIMELESS:  # ends early, and the legend names it
                continue
            ends.append((float(line["mean"].iloc[-1]), str(net), colour))
        span = float(group["mean"].max() - group["mean"].min()) or 1.0
        ends.sort()
        for (height, net, colour), place in zip(ends, _apart([end[0] for end in ends], span / 19), strict=True):
            ax.annotate(
                net if title == "vanilla" else net.removeprefix("lstm ").removeprefix("gru "),
                (last, height), xytext=(last * 1.1, place), fontsize=6.5, color=colour, va="center",
                annotation_clip=False,
                arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": colour, "shrinkA": 1, "shrinkB": 0},
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
    flat = data[data["net"] == _TIMELESS]
    contrast = ""
    if len(flat):
        reach, last = flat["mean"].abs().max(), int(flat["lag"].max())
        contrast = (
            f" One causal attention layer (relative to lag 1) stays within {reach:.1f} decades up to lag {last}: no "
            "time step is farther away than another."
        )
    return (
        "Norm of dh_T/dh_t against lag, in decades, at initialization; dotted: the largest Lyapunov exponent, measured "
        f"forward in time, times the lag. The smallest is 10^{lowest['mean']:.0f} ({lowest['net']}, lag "
        f"{int(lowest['lag'])}): rescaled at every step, so that nothing underflows.{contrast} "
        + interval_note(data, log=False)
        + " Claims C5.1 and C6 path; notes N8, N9, N10 and N13."
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
