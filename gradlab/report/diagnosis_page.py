"""The page of a diagnosis: the findings of a user's own trace, and the gradient by depth and by time behind them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from gradlab.analysis.diagnosis import OWN_RULES, check_rules, diagnose
from gradlab.report.page import check_target, write_page

if TYPE_CHECKING:
    from gradlab.analysis.finding import Diagnosis, Finding
    from gradlab.report.charts import Curves, Mark
    from gradlab.report.flow_grid import FlowGrid
    from gradlab.trace import Trace

__all__ = ["finding_marks", "write_diagnosis"]

_CURVES: Final = 6
_SHOWN_LAYERS: Final = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class _FindingView:
    """One finding as the template shows it."""

    title: str
    severity: float
    level: str
    where: str
    layers: list[str]
    more: int
    marked: bool
    evidence: list[str]
    cause: str
    advice: str
    source: str


def write_diagnosis(
    trace: Trace, out: str | os.PathLike[str], *, rules: str = OWN_RULES, name: str = "", found: Diagnosis | None = None
) -> Path:
    """Write one self-contained HTML page with the diagnosis of a trace and the gradient flow behind it.

    Args:
        trace: What `gl.watch` recorded.
        out: The .html file. An older report gives way, any other file stays.
        rules: As of `gl.diagnose`.
        name: What the page calls the trace. Default: the name of the model's class.
        found: The diagnosis, where it is known already. Default: made here.

    Returns:
        The file.

    Raises:
        UsageError: No trace, no such rules; `out` is no .html file; the extra `report` is not installed.
        DataError: The trace holds no step, or several merged runs.
        StoreError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> from gradlab.trace import Trace
        >>> rows = [(step, f"{n}", n, 10.0 ** (n - 9)) for step in (0, 1) for n in range(10)]
        >>> trace = Trace({"layers": pd.DataFrame(rows, columns=["step", "layer", "order", "grad_norm"])})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = write_diagnosis(trace, f"{folder}/net.html").read_text(encoding="utf-8")
        >>> "vanishing through depth" in page
        True
    """
    from gradlab.report.explorer import flow
    from gradlab.report.flow_grid import flow_grid

    check_rules(rules)
    path = check_target(out)
    found = found or diagnose(trace, rules=rules)
    grid = flow_grid(trace.layers)
    title = name or str(trace.info.get("model", "")) or "a model"
    marks = finding_marks(found.findings, grid) if grid is not None else {}
    framed = [mark for own in marks.values() for mark in own]
    seen = flow(grid, "d-flow", title, marks=framed) if grid is not None else None
    curves = list(_curves(trace, grid))
    charts = [*([seen.heat, seen.profile] if seen else []), *(item.chart for _, _, item in curves)]
    return write_page(
        "diagnosis.html",
        path,
        charts=charts,
        title=f"Diagnosis of {title}",
        answer=_answer(found),
        found=found,
        findings=[_view(finding, place in marks) for place, finding in enumerate(found.findings)],
        flow=seen,
        curves_shown=curves,
        facts=_facts(trace),
    )


def finding_marks(findings: tuple[Finding, ...], grid: FlowGrid) -> dict[int, list[Mark]]:
    """Return where on a heat map each finding is, by its place; findings about no layer of it are left out.

    Layers that lie side by side share a frame; a parameter stands for the layer it belongs to. A finding without
    training steps holds at all of them.
    """
    from gradlab.report.charts import Mark

    marks = {}
    for place, finding in enumerate(findings):
        rows = sorted({row for layer in finding.layers if (row := _row(layer, grid.place)) is not None})
        if not rows:
            continue
        first, last = finding.steps or (int(grid.steps[0]), int(grid.steps[-1]))
        inside = np.flatnonzero((grid.steps >= first) & (grid.steps <= last))
        if not len(inside):  # between two steps that are drawn
            inside = np.array([np.abs(grid.steps - first).argmin()])
        columns = (int(inside[0]), int(inside[-1]))
        edges = [0, *(at for at in range(1, len(rows)) if rows[at] > rows[at - 1] + 1), len(rows)]
        groups = [rows[begin:end] for begin, end in pairwise(edges)]
        marks[place] = [Mark(rows=(own[0], own[-1]), columns=columns, what=finding.title) for own in groups]
    return marks


def _row(name: str, place: dict[str, int]) -> int | None:
    while name not in place:
        name, dot, _ = name.rpartition(".")
        if not dot:
            return None
    return place[name]


def _view(finding: Finding, marked: bool) -> _FindingView:
    severity = finding.severity
    return _FindingView(
        title=finding.title,
        severity=severity,
        level="severe" if severity >= 2 / 3 else "moderate" if severity >= 1 / 3 else "mild",
        where=finding.where,
        layers=[layer or "(the model itself)" for layer in finding.layers[:_SHOWN_LAYERS]],
        more=max(0, len(finding.layers) - _SHOWN_LAYERS),
        marked=marked,
        evidence=[str(item) for item in finding.evidence],
        cause=finding.cause,
        advice=finding.advice,
        source=finding.source,
    )


def _answer(found: Diagnosis) -> str:
    if found.leading is None:
        return f"Nothing is wrong by the rules '{found.rules}'."
    rest = len(found.findings) - 1
    more = f"; {rest} more finding{'s' if rest > 1 else ''} below" if rest else ""
    place = f", at {found.leading.where}" if found.leading.where else ""
    return f"The gradient is {found.leading.title}{place}{more}." if found.leading.axis else (
        f"Found: {found.leading.title}{place}{more}."
    )  # fmt: skip


def _curves(trace: Trace, grid: FlowGrid | None) -> Iterator[tuple[str, str, Curves]]:
    """Yield heading, explanation and chart of what there is: gradient over steps, through time, loss."""
    from gradlab.report.charts import curve_chart

    if grid is not None and len(grid.steps) > 1:
        rows = np.unique(np.linspace(0, len(grid.names) - 1, min(_CURVES, len(grid.names))).round().astype(int))
        frames = [
            pd.DataFrame({"curve": grid.names[row], "step": grid.steps, "norm": 10.0 ** grid.middle[row]})
            for row in rows
        ]
        found = curve_chart(pd.concat(frames), "d-steps", x="step", y="norm", title="gradient norm", log=True)
        if found is not None:
            yield "Gradient over training", "Some layers, evenly spread from input to output.", found
    through = _through_time(trace)
    if through is not None:
        found = curve_chart(through, "d-time", x="time step", y="log10", title="log10 of gradient norm")
        if found is not None:
            text = "The total gradient that reaches each state, at the first and the last recorded training step."
            yield "Gradient through time", text, found
    losses = trace.steps[["step", "loss"]].dropna()
    if len(losses):
        positive = bool((losses["loss"] > 0).all())
        found = curve_chart(losses.assign(curve="loss"), "d-loss", x="step", y="loss", title="loss", log=positive)
        if found is not None:
            yield "Loss", "As the training loop logged it.", found


def _through_time(trace: Trace) -> pd.DataFrame | None:
    rows = trace.timesteps
    if rows.empty:
        return None
    rows = rows[(rows["call"] == 0) & rows["step"].isin([rows["step"].min(), rows["step"].max()])]
    many = rows["level"].max() > 0
    marks = (rows[column].tolist() for column in ("layer", "level", "direction", "state", "step"))
    names = [
        f"{layer or '(the model itself)'}{f' level {level}' if many else ''}"
        f"{' backward' if direction == 'backward' else ''}, {state}, step {step}"
        for layer, level, direction, state, step in zip(*marks, strict=True)
    ]
    return pd.DataFrame(
        {"curve": names, "time step": rows["t"].to_numpy(), "log10": rows["log10_grad_norm"].to_numpy()}
    )


def _facts(trace: Trace) -> list[tuple[str, Any]]:
    steps = np.unique(np.concatenate([trace.steps["step"].to_numpy(), trace.layers["step"].to_numpy()]))
    rows = [("model", trace.info.get("model", ""))]
    if len(steps):
        rows.append(("recorded steps", f"{len(steps)}, from {steps[0]} to {steps[-1]}"))
    rows += [("layers", trace.layers["layer"].nunique()), ("parameters", trace.params["param"].nunique())]
    return [(name, value) for name, value in rows if value]
