"""What a window costs: loss against the number of tokens seen, and against parameters beside nets with a state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from gradlab.plots.intervals import interval_note, need, seed_intervals
from gradlab.plots.panels import draw_band, log_axis
from gradlab.plots.style import DOUBLE, THEORY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["window_loss", "window_loss_caption", "window_loss_data"]

_WHOLE: Final = {
    "growing": ("MLP on the whole past", "#009E73", "s"),
    "tanh": ("tanh RNN", "#0072B2", "o"),
    "lstm": ("LSTM", "#CC79A7", "v"),
    "gru": ("GRU", "#E69F00", "P"),
    "transformer": ("Transformer", "black", "D"),
}
_MLP = "#D55E00"


def window_loss_data(outcomes: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Return the loss of each predictor of the write/query series, and its interval over seeds.

    Args:
        outcomes: A row a run: net ("markov <k>", "growing", or a recurrent net), seed, last (its final loss), bayes,
            parameters, length (tokens of the series).
        table: A row a window and seed of the exact look-up: window, seed, loss, bayes; may be empty.

    Returns:
        Columns kind ("window", "table" or "whole"), net, window (tokens seen), parameters (0 for the table), bayes,
        mean, low, high, n, lost.

    Raises:
        DataError: No run, or a column is missing.
    """
    need(outcomes, ["net", "seed", "last", "bayes", "parameters", "length"], "runs on the write/query series")
    on_window = outcomes["net"].str.startswith("markov ")
    window = outcomes["net"].str.removeprefix("markov ").where(on_window, outcomes["length"]).astype(int)
    runs = outcomes.assign(window=window, kind=np.where(on_window, "window", "whole"))
    by = ["kind", "net", "window", "parameters", "bayes"]
    parts = [seed_intervals(runs, by, "last", log=False)]
    if len(table):
        looked = table.assign(kind="table", net="look-up table", parameters=0)
        parts.append(seed_intervals(looked, by, "loss", log=False))
    return pd.concat(parts, ignore_index=True).sort_values(["kind", "window", "net"], ignore_index=True)


def window_loss(data: pd.DataFrame) -> Figure:
    """Draw loss against the window with the Bayes curve, and loss against parameters.

    Args:
        data: As `window_loss_data` returns it.
    """
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(DOUBLE, 3.0), sharey=True)
    windows, table = (data[data["kind"] == kind] for kind in ("window", "table"))
    limited = pd.concat([windows, table]).drop_duplicates("window").sort_values("window")
    if len(limited):
        # ln of the Bayes loss is linear in k, so that interpolating it is exact.
        ks = np.geomspace(limited["window"].min(), limited["window"].max(), 200)
        bayes = np.exp(np.interp(ks, limited["window"], np.log(limited["bayes"])))
        left.plot(ks, bayes, label="Bayes: ln 2 (1 − p)$^k$", gid="bayes", zorder=4, **THEORY)
    if len(table):
        left.plot(
            table["window"], table["mean"], linestyle="none", marker="s", fillstyle="none", markersize=6,
            color="0.4", markeredgewidth=0.8, label="exact look-up table", gid="table",
        )  # fmt: skip
    if len(windows):
        draw_band(left, windows, "window", label="trained MLP", color=_MLP, marker="o", markersize=3.2)
        right.plot(windows["parameters"], windows["mean"], color=_MLP, marker="o", markersize=3.2, linewidth=0.9)
        for point in windows.to_dict("records"):
            label = f"k = {point['window']}" if point["window"] == windows["window"].min() else f"{point['window']}"
            place = (point["parameters"], point["mean"])
            right.annotate(label, place, xytext=(4, 4), textcoords="offset points", fontsize=6.5, color=_MLP)
    for net, (name, colour, marker) in _WHOLE.items():
        row = data[(data["kind"] == "whole") & (data["net"] == net)]
        if len(row):
            bars = np.nan_to_num([row["mean"] - row["low"], row["high"] - row["mean"]])
            right.errorbar(
                row["parameters"], row["mean"], yerr=bars, label=name, color=colour, marker=marker, markersize=4.5,
                linestyle="none", linewidth=0.9,
            )  # fmt: skip
    if len(limited):
        left.set_xscale("log", base=2)
        left.xaxis.set_major_locator(FixedLocator(sorted(limited["window"])))
        left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        left.xaxis.set_minor_locator(NullLocator())
        left.legend(loc="lower left")
    log_axis(right, data.loc[data["kind"] != "table", "parameters"], decades=1.0, which="x")
    left.set_ylim(-0.03, max(0.75, float(np.nanmax(data["mean"])) * 1.05))
    left.set_xlabel("tokens seen, k")
    left.set_ylabel("loss (nats)")
    right.set_xlabel("parameters")
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    handles, labels = right.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), columnspacing=1.2)
    return figure


def window_loss_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    runs = data[data["kind"] != "table"]
    return (
        "Loss of predictors of the last letter of a write/query series. Left: from the last k tokens only; the answer "
        "is then lost as often as no letter is among them, and no predictor does better than the dotted line. Where "
        "the trained net lies above it, it could do better and has not learned to. Right: the same nets against their "
        "number of parameters (labels: k), which grows with k, beside those that see the whole past: as a window that "
        "grows with it, or summed up in a state of fixed size. "
        + interval_note(runs, log=False).replace("Lines are means and bands", "Points are means and bands or bars")
        + " The tanh RNN solves this too, by latching and through many short gaps: it is a matter of memory, not of "
        "vanishing gradients. Claims C6; notes N7, N10 and N13; the theory is derived here."
    )
