"""What a reader can explore of recorded layers: heat map, profile and a slider over steps; and curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pandas as pd

from gradlab.report.charts import Chart, Curves, Mark, curve_chart, heat_chart, profile_chart
from gradlab.report.flow_grid import FlowGrid, flow_grid, step_texts
from gradlab.run_comparison import loss_curves

if TYPE_CHECKING:
    from gradlab.sweep.store import Run

__all__ = ["Flow", "cell_flows", "flow", "run_losses"]

_MOST_CELLS: Final = 4
_MOST_VALUES: Final = 16_000  # cells of all heat maps of one run


@dataclass(frozen=True, kw_only=True, slots=True)
class Flow:
    """The gradient over layers and steps of one net.

    Args:
        name: Id of its part of the page.
        title: Which net.
        grid: The numbers.
        texts: One sentence a step, read out when the slider moves.
        heat: The heat map.
        profile: The profile at one step.
    """

    name: str
    title: str
    grid: FlowGrid
    texts: list[str]
    heat: Chart
    profile: Chart


def flow(grid: FlowGrid, name: str, title: str, *, marks: Sequence[Mark] = ()) -> Flow:
    """Return a heat map and a profile that share a slider."""
    return Flow(
        name=name, title=title, grid=grid, texts=step_texts(grid),
        heat=heat_chart(grid, f"{name}-heat", marks=marks), profile=profile_chart(grid, f"{name}-profile"),
    )  # fmt: skip


def cell_flows(run: Run, name: str) -> tuple[list[Flow], int]:
    """Return the gradient over layers and steps of a few of a run's cells, and of how many it was recorded.

    Cells are taken evenly from those whose layers were recorded at more than one step, in the order of the plan.
    """
    layers = run.table("layers")
    if layers.empty:
        return [], 0
    steps = layers.groupby("cell")["step"].nunique()
    labels = {cell.key: cell.label for cell in run.cells()}
    planned = [cell["key"] for cell in run.manifest["cells"]]
    able = [key for key in planned if steps.get(key, 0) > 1]
    some = [able[place * (len(able) - 1) // max(1, _MOST_CELLS - 1)] for place in range(_MOST_CELLS)] if able else []
    chosen = list(dict.fromkeys(some))
    found = []
    for place, key in enumerate(chosen):
        own = layers[layers["cell"] == key]
        if own.duplicated(["step", "order"]).any():
            continue  # several nets in one cell have no common depth
        rows = min(80, _MOST_VALUES // (len(chosen) * 40))
        grid = flow_grid(own, most_places=rows, most_steps=40)
        if grid is not None:
            found.append(flow(grid, f"{name}-flow{place}", labels.get(key, key)))
    return found, len(able)


def run_losses(run: Run, name: str) -> Curves | None:
    """Return the losses of what a run trained; None if it trained nothing."""
    for table in ("losses", "steps"):
        frame = run.table(table)
        if len(frame) and {"step", "loss", "cell"} <= set(frame) and frame["loss"].notna().any():
            curves: pd.DataFrame = loss_curves([frame.dropna(subset=["loss"])])
            positive = bool((curves["loss"].dropna() > 0).all())
            return curve_chart(curves, f"{name}-losses", x="step", y="loss", title="training loss", log=positive)
    return None
