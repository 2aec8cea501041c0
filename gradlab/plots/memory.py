"""Who learns what: loss against training step, and steps to success against the distance to bridge."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from gradlab.analysis.memory_claims import ADDING_SOLVED
from gradlab.errors import DataError
from gradlab.plots.intervals import need
from gradlab.plots.panels import log_axis
from gradlab.plots.style import COLUMN, DOUBLE, THEORY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "MEMORY_NETS",
    "learning_curves",
    "learning_curves_caption",
    "learning_curves_data",
    "success_by_length",
    "success_by_length_caption",
    "success_by_length_data",
]

MEMORY_NETS: Final = {
    "tanh": ("tanh RNN", "#0072B2", "o"),
    "orthogonal": ("orthogonal RNN", "#56B4E9", "D"),
    "irnn": ("IRNN", "#009E73", "s"),
    "lstm": ("LSTM", "#CC79A7", "v"),
    "lstm bias 1": ("LSTM, bias 1", "#D55E00", "^"),
    "lstm chrono": ("LSTM, chrono", "#661144", "X"),
    "gru": ("GRU", "#E69F00", "P"),
}
"""Name, colour and marker of each net: told apart with every common kind of colour blindness."""

_MOST_POINTS = 200
_GREY: Final[dict[str, Any]] = {"color": "0.45", "linewidth": 0.7, "zorder": 1}


def _named(frame: pd.DataFrame) -> list[str]:
    """Return the nets of a frame in the order of the legend."""
    return [net for net in MEMORY_NETS if (frame["net"] == net).any()]


def learning_curves_data(adding: pd.DataFrame, copying: pd.DataFrame) -> pd.DataFrame:
    """Return the evaluation loss against training step of every run at the longest T, at most 200 points a run.

    Args:
        adding: Columns net, length, seed, step, loss, baseline; runs of the adding problem.
        copying: The same of copy memory; may be empty.

    Returns:
        Columns task ("adding" or "copy"), net, length, seed, step, loss, baseline and solved (the run's last loss is
        below the adding problem's mark).

    Raises:
        DataError: No run of the adding problem, or a column is missing.
    """
    columns = ["net", "length", "seed", "step", "loss", "baseline"]
    need(adding, columns, "runs of the adding problem")
    parts = [adding[adding["length"] == adding["length"].max()].assign(task="adding")]
    if len(copying):
        need(copying, columns, "runs of copy memory")
        parts.append(copying.assign(task="copy"))
    joined = pd.concat(parts, ignore_index=True).sort_values(["task", "net", "seed", "step"], ignore_index=True)
    run = joined.groupby(["task", "net", "seed"])
    place, last = run.cumcount(), run["step"].transform("size") - 1
    kept = joined[(place % (last // _MOST_POINTS + 1) == 0) | (place == last)].copy()
    ends = run["loss"].transform("last")
    kept["solved"] = (kept["task"] == "adding") & (ends[kept.index] < ADDING_SOLVED)
    out: pd.DataFrame = kept[["task", *columns, "solved"]].reset_index(drop=True)
    return out


def learning_curves(data: pd.DataFrame) -> Figure:
    """Draw one panel a net on the adding problem, a line a run, and one of copy memory.

    Args:
        data: As `learning_curves_data` returns it.
    """
    import matplotlib.pyplot as plt

    adding, copying = (data[data["task"] == task] for task in ("adding", "copy"))
    nets = _named(adding)
    panels = len(nets) + (len(copying) > 0)
    columns = min(panels, 3 if panels <= 6 else 4)
    rows = math.ceil(panels / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(DOUBLE, 0.5 + 1.75 * rows), squeeze=False)
    flat = list(axes.flat)
    for ax, net in zip(flat, nets, strict=False):
        name, colour, _ = MEMORY_NETS[net]
        own = adding[adding["net"] == net]
        _draw_runs(ax, own, colour, marks=True)
        ax.axhline(float(own["baseline"].iloc[0]), **_GREY)
        ax.axhline(ADDING_SOLVED, **THEORY)
        log_axis(ax, [*adding["loss"], ADDING_SOLVED / 2, 0.3], decades=1.0)
        ax.set_xlim(0, float(adding["step"].max()) * 1.03)
        if ax is flat[0]:
            for height, text in (
                (float(own["baseline"].iloc[0]) * 0.87, "best constant"),
                (ADDING_SOLVED * 0.87, "solved"),
            ):
                ax.text(0.03, height, text, transform=ax.get_yaxis_transform(), va="top", fontsize=6.5, color="0.3")
        solved = own[own["solved"]]["seed"].nunique()
        ax.set_title(f"{name}: {solved} of {own['seed'].nunique()} solved")
    if len(copying):
        ax = flat[len(nets)]
        for net in _named(copying):
            name, colour, _ = MEMORY_NETS[net]
            _draw_runs(ax, copying[copying["net"] == net], colour, marks=False)
        ax.axhline(float(copying["baseline"].iloc[0]), label="without memory", **THEORY)
        names = [Line2D([], [], color=MEMORY_NETS[net][1], label=MEMORY_NETS[net][0]) for net in _named(copying)]
        ax.legend(handles=[*names, Line2D([], [], label="without memory", **THEORY)], loc="upper right")
        room = 1.6 * float(copying["loss"].max())  # for the legend
        log_axis(ax, [*copying["loss"], *copying["baseline"], room], decades=0.5)
        ax.set_xlim(0, float(copying["step"].max()) * 1.03)
        ax.set_title(f"copy memory, T = {int(copying['length'].iloc[0])}")
        ax.set_ylabel("cross-entropy (nats a step)")
    for ax in flat[panels:]:
        ax.set_visible(False)
    for place, ax in enumerate(flat[:panels]):
        if place % columns == 0 and place < len(nets):
            ax.set_ylabel("mean squared error")
        if place + columns >= panels:
            ax.set_xlabel("training step")
    return figure


def _draw_runs(ax: Axes, runs: pd.DataFrame, colour: str, *, marks: bool) -> None:
    for seed, run in runs.groupby("seed"):
        ax.plot(run["step"], run["loss"], color=colour, linewidth=0.8, alpha=0.85, gid=f"run {seed}")
        if marks and run["solved"].iloc[-1]:
            ax.plot(run["step"].iloc[-1:], run["loss"].iloc[-1:], color=colour, marker="*", markersize=5, gid="solved")


def learning_curves_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words."""
    adding, copying = (data[data["task"] == task] for task in ("adding", "copy"))
    text = (
        f"Loss on an evaluation set against training step, the adding problem at T = {int(adding['length'].iloc[0])}: "
        f"each thin line is one run, of {adding['seed'].nunique()} seeds; a star is where its mean squared error fell "
        f"below {ADDING_SOLVED} (dotted) and training ended. The grey line is the best constant, 1/6; losses are "
        "relative to that of the same evaluation set."
    )
    if len(copying):
        ends = copying.sort_values("step").groupby(["net", "seed"])["loss"].last().groupby("net").mean()
        told = ", ".join(f"{MEMORY_NETS[net][0]} {ends[net]:.4f}" for net in _named(copying))
        text += (
            f" Last: copy memory, {copying['seed'].nunique()} seeds; dotted is 10 ln 8 / (T + 20) = "
            f"{float(copying['baseline'].iloc[0]):.4f}, what guessing costs; they end at {told}."
        )
    return text + " Claims C5.7 and C5.8; after Arjovsky et al. 2016, Figs. 1 and 2."


def success_by_length_data(outcomes: pd.DataFrame) -> pd.DataFrame:
    """Return when each run of the adding problem succeeded.

    Args:
        outcomes: A row a run: net, length, seed, steps (the cap), solved_at (NaN if not).

    Returns:
        Columns net, length, seed, steps (to success; the cap where there was none), solved, cap.

    Raises:
        DataError: The frame is empty or lacks a column.
    """
    need(outcomes, ["net", "length", "seed", "steps", "solved_at"], "runs of the adding problem")
    solved = outcomes["solved_at"].notna()
    data = outcomes.assign(solved=solved, cap=outcomes["steps"], steps=outcomes["solved_at"].fillna(outcomes["steps"]))
    order = {net: place for place, net in enumerate(MEMORY_NETS)}
    if not data["net"].isin(list(order)).all():
        raise DataError("A net of the adding problem has no name and colour here: give runs of the known nets.")
    data = data.sort_values(
        ["net", "length", "seed"], key=lambda column: column.map(order) if column.name == "net" else column
    )
    return data[["net", "length", "seed", "steps", "solved", "cap"]].reset_index(drop=True)


def success_by_length(data: pd.DataFrame) -> Figure:
    """Draw steps to success against T: a mark a run, open at the cap where there was none, a line through medians.

    Args:
        data: As `success_by_length_data` returns it.
    """
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(COLUMN * 1.45, 2.9))
    nets, lengths = _named(data), sorted(data["length"].unique())
    cap = float(data["cap"].max())
    for place, net in enumerate(nets):
        _, colour, marker = MEMORY_NETS[net]
        own = data[data["net"] == net]
        shift = 0.13 * (place - (len(nets) - 1) / 2)
        ranks = own["length"].map(lengths.index).to_numpy(dtype=np.float64) + shift
        spread = own.groupby("length").cumcount() - (own.groupby("length")["seed"].transform("size") - 1) / 2
        x = ranks + 0.018 * spread.to_numpy(dtype=np.float64)
        won = own["solved"].to_numpy(dtype=bool)
        style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 3.6}
        steps = own["steps"].to_numpy(dtype=np.float64)
        ax.plot(x[won], steps[won], gid=f"solved {net}", **style)
        ax.plot(x[~won], steps[~won] * 1.05, gid=f"censored {net}", fillstyle="none", markeredgewidth=0.8, **style)
        median = own.groupby("length")["steps"].median()
        median = median[median < cap]
        ax.plot([lengths.index(T) + shift for T in median.index], median, color=colour, linewidth=0.9, alpha=0.7)
    ax.axhline(cap, **_GREY)
    ax.text(0.01, cap * 0.985, f"given up at {cap:,.0f}", transform=ax.get_yaxis_transform(), va="top", fontsize=6.5)
    for border in range(1, len(lengths)):
        ax.axvline(border - 0.5, color="0.9", linewidth=0.8, zorder=0)
    log_axis(ax, [*data["steps"], cap * 1.1], decades=0.7)
    ax.set_xticks(range(len(lengths)), [f"{T:g}" for T in lengths])
    ax.set_xlim(-0.5, len(lengths) - 0.5)
    ax.grid(visible=False, axis="x")
    ax.set_xlabel("length $T$ of the adding problem (time steps)")
    ax.set_ylabel("training steps to success")
    handles = [
        Line2D([], [], color=MEMORY_NETS[net][1], marker=MEMORY_NETS[net][2], markersize=3.6, label=MEMORY_NETS[net][0])
        for net in nets
    ]
    handles.append(
        Line2D([], [], linestyle="none", marker="o", fillstyle="none", color="0.3", markersize=3.6, label="not solved")
    )
    figure.legend(handles=handles, loc="outside right center")
    return figure


def success_by_length_caption(data: pd.DataFrame) -> str:
    """Return what the figure shows, in words: with the table of successes."""
    lengths = sorted(data["length"].unique())
    rows = []
    for net in _named(data):
        own = data[data["net"] == net]
        cells = []
        for length in lengths:
            runs = own[own["length"] == length]
            won, median = int(runs["solved"].sum()), runs["steps"].median()
            mark = ">" if 2 * won <= len(runs) else ""
            cells.append(f"{won}/{len(runs)}, {mark}{median:.0f}" if len(runs) else "none")
        rows.append(f"{MEMORY_NETS[net][0]} {'; '.join(cells)}")
    at = ", ".join(f"{T:g}" for T in lengths)
    return (
        f"Training steps until the mean squared error of the adding problem falls below {ADDING_SOLVED}, against its "
        "length T: a mark a run, lines through the medians; open marks on the grey line were given up there, after "
        f"{int(data['cap'].max()):,} steps. Runs solved and median steps at T = {at}: "
        + ". ".join(rows)
        + ". Claims C5.7; after Tallec & Ollivier 2018."
    )
