"""Views of a trace that a diagnosis reads: profiles over depth and over time, as medians over the recorded steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from gradlab.trace import Trace

__all__ = [
    "CELL_CALLS",
    "RECURRENT",
    "Profile",
    "Trend",
    "depth_profile",
    "normalizes",
    "time_profiles",
    "trend",
    "usable_steps",
]

RECURRENT = ("RNN", "LSTM", "GRU")
CELL_CALLS = 8  # calls of one module in a pass from which on it is taken for a cell that walks through time
_MOST_POINTS = 400  # of a fit: the slopes of all pairs are taken


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """log10 of a norm at consecutive places, from input to output or from the first time step to the last.

    Args:
        places: Names: layers, or the one recurrent layer.
        x: Place numbers, shape (n,): ranks in depth, time steps in time.
        y: Median over steps of log10 of the norm, shape (n,); -inf where it is 0.
        first: The same at the first usable step alone, shape (n,).
        layer: The recurrent layer of a profile over time; "" for one over depth.
        state: "h", "c" or "" likewise.
        kind: Class of that layer; "" for depth.
        backward: The sweep runs from the last time step to the first.
        steps: First and last training step used.
    """

    places: tuple[str, ...]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    first: NDArray[np.float64]
    layer: str = ""
    state: str = ""
    kind: str = ""
    backward: bool = False
    steps: tuple[int, int] = (0, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trend:
    """How a profile changes from its first place to its last.

    Args:
        slope: Median slope of all pairs of places (Theil-Sen), decades a place.
        low: Lower end of its 95 % interval.
        high: Upper end of its 95 % interval.
        decades: slope times the distance of the ends.
        ends: Median of the last tenth of places less that of the first tenth, decades.
        zeros: Share of places at the beginning whose norm is exactly 0.
        points: Places used.
    """

    slope: float
    low: float
    high: float
    decades: float
    ends: float
    zeros: float
    points: int


def usable_steps(trace: Trace) -> NDArray[np.int64]:
    """Return the recorded steps whose update the gradient scaler did not skip."""
    steps = trace.steps
    if steps.empty:
        return np.unique(trace.layers["step"].to_numpy())
    kept: NDArray[np.int64] = steps.loc[~steps["skipped"], "step"].to_numpy()
    return kept


def depth_profile(
    trace: Trace, steps: NDArray[np.int64], value: str = "grad_norm", *, rms: bool = False
) -> Profile | None:
    """Return the profile of a column of `trace.layers` over depth; None if no layer has it.

    Args:
        trace: The trace.
        steps: Steps to take medians over.
        value: "grad_norm" or "act_norm".
        rms: Divide by the root of the number of entries.

    Note:
        Recurrent layers and cells are left out: their outputs' gradients are about time. Of several passes in a step
        (gradient accumulation) the first is taken.
    """
    rows = _one_pass(trace, steps)
    rows = rows[np.isfinite(rows[value].to_numpy())] if len(rows) else rows
    if rows.empty:
        return None
    size = np.sqrt(np.maximum(rows["entries"].to_numpy(), 1)) if rms else 1.0
    with np.errstate(divide="ignore"):
        logs = np.log10(rows[value].to_numpy() / size)
    wide = _pivot(rows["step"].to_numpy(), rows["key"].to_numpy(), logs)
    order = rows.groupby("key", sort=True)["order"].median().to_numpy()
    names = rows.groupby("key", sort=True)["layer"].first().to_numpy()
    in_order = np.argsort(order, kind="stable")
    found = np.unique(rows["step"].to_numpy())
    return Profile(
        places=tuple(map(str, names[in_order])),
        x=np.arange(len(names), dtype=np.float64),
        y=_median(wide)[in_order],
        first=wide[0][in_order],
        steps=(int(found[0]), int(found[-1])),
    )


def _one_pass(trace: Trace, steps: NDArray[np.int64]) -> pd.DataFrame:
    """Return the rows of `trace.layers` of the first pass of each step, with a number for each place ("key")."""
    import pandas as pd

    rows = trace.layers
    rows = rows[np.isin(rows["step"].to_numpy(), steps)]
    if rows.empty:
        return rows.assign(key=0)
    layer, names = pd.factorize(rows["layer"])
    call = rows["call"].to_numpy()
    calls = np.zeros(len(names), dtype=np.int64)
    np.maximum.at(calls, layer, call + 1)
    kinds = rows["kind"].to_numpy()
    passes = int(calls.min())
    per_pass = np.maximum(calls // passes, 1)
    keep = (call < per_pass[layer]) & (per_pass[layer] < CELL_CALLS) & ~np.isin(kinds, RECURRENT)
    output, _ = pd.factorize(rows["output"])
    key = (layer * (per_pass.max() + 1) + call) * (output.max() + 1) + output
    return rows.assign(key=key)[keep]


def _pivot(step: NDArray[np.int64], key: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    rows, row = np.unique(step, return_inverse=True)
    columns, column = np.unique(key, return_inverse=True)
    wide = np.full((len(rows), len(columns)), math.nan)
    wide[row, column] = values
    return wide


def _median(wide: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the lower median over rows, columnwise: averaging -inf and a number would give -inf for both halves."""
    ordered = np.sort(wide, axis=0)  # NaN goes last
    count = np.count_nonzero(~np.isnan(wide), axis=0)
    at = np.maximum(count - 1, 0) // 2
    middle: NDArray[np.float64] = np.take_along_axis(ordered, at[None, :], axis=0)[0]
    return middle


def time_profiles(trace: Trace, steps: NDArray[np.int64]) -> list[Profile]:
    """Return the profiles over time: of every recurrent layer that was followed, and of cells called step by step."""
    return [*_followed(trace, steps), *_cells(trace, steps)]


def _followed(trace: Trace, steps: NDArray[np.int64]) -> list[Profile]:
    rows = trace.timesteps
    rows = rows[np.isin(rows["step"].to_numpy(), steps) & (rows["call"].to_numpy() == 0)] if len(rows) else rows
    kinds = dict(zip(trace.layers["layer"], trace.layers["kind"], strict=True)) if len(rows) else {}
    found = []
    for (layer, level, direction, state), own in rows.groupby(["layer", "level", "direction", "state"], sort=False):
        wide = _pivot(own["step"].to_numpy(), own["t"].to_numpy(), own["log10_grad_norm"].to_numpy())
        times = np.unique(own["t"].to_numpy()).astype(np.float64)
        name = f"{layer} (level {level})" if rows["level"].max() > 0 else str(layer)
        found.append(_over_time(name, str(state), str(kinds.get(layer, "")), direction == "backward", times, wide, own))
    return found


def _cells(trace: Trace, steps: NDArray[np.int64]) -> list[Profile]:
    rows = trace.layers
    rows = rows[rows["call"].to_numpy() >= 0]
    if rows.empty or int(rows["call"].max()) < CELL_CALLS:
        return []
    most = {str(layer): int(call) + 1 for layer, call in rows.groupby("layer", sort=False)["call"].max().items()}
    passes = min(most.values())
    cells = [layer for layer, calls in most.items() if calls // passes >= CELL_CALLS]
    rows = rows[np.isin(rows["step"].to_numpy(), steps) & rows["layer"].isin(cells)]
    found = []
    for (layer, output), own in rows.groupby(["layer", "output"], sort=False):
        own = own[own["call"] < most[str(layer)] // passes]
        with np.errstate(divide="ignore"):
            logs = np.log10(own["grad_norm"].to_numpy())
        wide = _pivot(own["step"].to_numpy(), own["call"].to_numpy(), logs)
        times = np.unique(own["call"].to_numpy()).astype(np.float64)
        found.append(_over_time(str(layer), str(output), str(own["kind"].iloc[0]), False, times, wide, own))
    return found


def _over_time(
    layer: str,
    state: str,
    kind: str,
    backward: bool,
    times: NDArray[np.float64],
    wide: NDArray[np.float64],
    own: pd.DataFrame,
) -> Profile:
    steps = own["step"]
    return Profile(
        places=(layer,), x=times, y=_median(wide), first=wide[0], layer=layer, state=state, kind=kind,
        backward=backward, steps=(int(steps.min()), int(steps.max())),
    )  # fmt: skip


def trend(x: NDArray[np.float64], y: NDArray[np.float64]) -> Trend:
    """Fit how y changes from the first place to the last, robustly (Theil 1950, Sen 1968)."""
    from scipy.stats import theilslopes

    finite = np.isfinite(y)
    # Zeros at the beginning are a gradient that never got there; elsewhere they are places off the path to the loss.
    leading_zeros = int(np.argmax(y > -math.inf)) if (y > -math.inf).any() else len(y)
    xs, ys = x[finite], y[finite]
    zeros = leading_zeros / len(y) if len(y) else 0.0
    if len(xs) < 3:
        nan = math.nan
        return Trend(slope=nan, low=nan, high=nan, decades=nan, ends=nan, zeros=zeros, points=len(xs))
    tenth = max(1, round(len(xs) / 10))
    ends = float(np.median(ys[-tenth:]) - np.median(ys[:tenth]))
    if len(xs) > _MOST_POINTS:
        few = np.linspace(0, len(xs) - 1, _MOST_POINTS).round().astype(int)
        xs, ys = xs[few], ys[few]
    slope, _, low, high = theilslopes(ys, xs)
    distance = float(xs[-1] - xs[0])
    return Trend(
        slope=float(slope), low=float(low), high=float(high), decades=float(slope) * distance, ends=ends,
        zeros=zeros, points=int(finite.sum()),
    )  # fmt: skip


def normalizes(kind: str) -> bool:
    """Return whether a class of modules normalizes its input."""
    return "Norm" in kind
