"""The gradient norm over layers and steps as a grid that a browser can draw, however deep the net."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["MOST_PLACES", "MOST_STEPS", "FlowGrid", "flow_grid", "step_texts"]

MOST_PLACES: Final = 120
"""Rows of a grid; deeper nets are drawn by bands of neighbouring layers."""

MOST_STEPS: Final = 80
"""Columns of a grid; of more recorded steps, as many are shown, evenly spread over the recorded ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowGrid:
    """log10 of a norm over places (rows, the first is nearest the input) and recorded steps (columns).

    Args:
        steps: The steps shown, shape (n,).
        recorded: How many steps were recorded.
        names: Of each place: a layer, or "first to last" of a band, length m.
        members: Number of layers in each band, shape (m,).
        middle: Median over the band of log10 of the norm, shape (m, n); NaN where nothing finite and above 0 is.
        low: The smallest in the band, shape (m, n).
        high: The largest in the band, shape (m, n).
        lost: Share of the band whose norm is 0 or not finite, shape (m, n).
        place: Layer -> row.
    """

    steps: NDArray[np.int64]
    recorded: int
    names: tuple[str, ...]
    members: NDArray[np.int64]
    middle: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    lost: NDArray[np.float64]
    place: dict[str, int]

    @property
    def layers(self) -> int:
        """Number of layers behind the rows."""
        return int(self.members.sum())


def flow_grid(layers: pd.DataFrame, *, most_places: int = MOST_PLACES, most_steps: int = MOST_STEPS) -> FlowGrid | None:
    """Return the gradient norm at layers over steps, in order of execution; None where none was recorded.

    Of a layer that ran several times in a step, and of several outputs, the largest norm is taken: these are not
    places in depth of their own.

    Args:
        layers: A trace's table `layers`, of one net.
        most_places: Largest number of rows.
        most_steps: Largest number of columns.

    Example:
        >>> rows = [(step, name, place, 10.0 ** -place) for step in (0, 5) for place, name in enumerate("ab")]
        >>> grid = flow_grid(pd.DataFrame(rows, columns=["step", "layer", "order", "grad_norm"]))
        >>> grid.names, grid.steps.tolist(), grid.middle[:, 0].tolist()
        (('a', 'b'), [0, 5], [0.0, -1.0])
    """
    if not {"step", "layer", "order", "grad_norm"} <= set(layers):
        return None
    bad = layers["grad_nonfinite"].to_numpy() > 0 if "grad_nonfinite" in layers else np.zeros(len(layers), dtype=bool)
    kept = layers[layers["grad_norm"].notna().to_numpy() | bad]
    if kept.empty:
        return None
    norms = kept["grad_norm"].to_numpy(dtype=np.float64)
    norms = np.where(np.isnan(norms), math.inf, norms)  # recorded, and not a number: a value that is lost, not missing
    step_of, steps = pd.factorize(kept["step"], sort=True)
    names = kept.groupby("layer", sort=False)["order"].median().sort_values(kind="stable").index
    place_of = pd.Index(names).get_indexer(kept["layer"])
    wide = np.full((len(names), len(steps)), -math.inf)
    np.maximum.at(wide, (place_of, step_of), norms)
    seen = np.zeros(wide.shape, dtype=bool)
    seen[place_of, step_of] = True
    columns = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), most_steps)).round().astype(int))
    wide, seen = wide[:, columns], seen[:, columns]
    good = seen & np.isfinite(wide) & (wide > 0)
    logs = np.log10(wide, out=np.full(wide.shape, math.nan), where=good)
    row = np.arange(len(names)) * min(len(names), most_places) // len(names)
    members = np.bincount(row)
    ends = np.cumsum(members)
    bands = [slice(end - count, end) for end, count in zip(ends, members, strict=True)]
    texts = [str(name) or "(the model itself)" for name in names]
    return FlowGrid(
        steps=np.asarray(steps, dtype=np.int64)[columns],
        recorded=len(steps),
        names=tuple(
            texts[band.start] if band.stop - band.start == 1 else f"{texts[band.start]} to {texts[band.stop - 1]}"
            for band in bands
        ),
        members=members,
        middle=_reduced(logs, bands, np.median),
        low=_reduced(logs, bands, np.min),
        high=_reduced(logs, bands, np.max),
        lost=np.stack([(seen[band] & ~good[band]).mean(axis=0) for band in bands]),
        place={str(name): int(at) for name, at in zip(names, row, strict=True)},
    )


def _reduced(logs: NDArray[np.float64], bands: list[slice], reduce: object) -> NDArray[np.float64]:
    """Return one row a band, NaN where it holds no number."""
    out = np.full((len(bands), logs.shape[1]), math.nan)
    for row, band in enumerate(bands):
        values = logs[band]
        for column in np.flatnonzero(~np.isnan(values).all(axis=0)):
            own = values[:, column]
            out[row, column] = reduce(own[~np.isnan(own)])  # type: ignore[operator]
    return out


def step_texts(grid: FlowGrid) -> list[str]:
    """Return for each step shown what its column says, in words: where the gradient is smallest and largest.

    Example:
        >>> frame = pd.DataFrame({"step": 0, "layer": ["a", "b"], "order": [0, 1], "grad_norm": [1e-9, 0.5]})
        >>> step_texts(flow_grid(frame))
        ['Step 0: smallest 1e-09 at a, largest 0.5 at b.']
    """
    texts = []
    for column, step in enumerate(grid.steps):
        low, high = grid.low[:, column], grid.high[:, column]
        lost = float(grid.lost[:, column] @ grid.members)
        parts = []
        if not np.isnan(low).all():
            least, most = int(np.nanargmin(low)), int(np.nanargmax(high))
            parts.append(f"smallest {10 ** low[least]:.2g} at {grid.names[least]}")
            parts.append(f"largest {10 ** high[most]:.2g} at {grid.names[most]}")
        if lost:
            count = round(lost)
            parts.append(f"{count} layer{'s'[: count != 1]} with 0, NaN or infinity")
        texts.append(f"Step {step}: {', '.join(parts) or 'no gradient recorded'}.")
    return texts
