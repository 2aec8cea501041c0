"""The charts a reader can work with, as Vega-Lite: a heat map with its profile at one step, and curves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

    from gradlab.report.flow_grid import FlowGrid

__all__ = ["MOST_CURVES", "Chart", "Curves", "Mark", "curve_chart", "heat_chart", "profile_chart"]

MOST_CURVES: Final = 10
_MOST_POINTS: Final = 150
_LABEL: Final = 20  # letters
_DASHES: Final = ([1, 0], [6, 3], [2, 2])
#: Told apart with every common kind of colour blindness (Okabe & Ito), dashes after the sixth.
_COLORS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B07D00", "#56B4E9")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A chart of the page.

    Args:
        name: Its id.
        spec: Vega-Lite, with its data.
        alt: What it shows, in words.
        renderer: "svg", or "canvas" where there are thousands of marks.
    """

    name: str
    spec: dict[str, Any]
    alt: str
    renderer: str = "svg"


@dataclass(frozen=True, kw_only=True, slots=True)
class Curves:
    """A chart of curves, and what a reader switches on and off.

    Args:
        chart: The chart.
        names: Of the curves, as the boxes are labelled.
        colors: Of each.
        dashes: Of each, for an SVG line.
    """

    chart: Chart
    names: tuple[str, ...]
    colors: tuple[str, ...]
    dashes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A part of a heat map that is framed.

    Args:
        rows: First and last row.
        columns: First and last column.
        what: What is there.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    what: str


def heat_chart(grid: FlowGrid, name: str, *, marks: Sequence[Mark] = ()) -> Chart:
    """Return the gradient norm as colour over layer and recorded step; its signal `k` is the column looked at.

    Args:
        grid: The numbers.
        name: Id of the chart.
        marks: What to frame.
    """
    import altair as alt

    tall = len(grid.names)
    k = alt.param(name="k", value=len(grid.steps) - 1)
    x = alt.X(
        "s:O", title="recorded step", axis=alt.Axis(labelExpr=_lookup(grid.steps.tolist()), labelAngle=0,
        labelOverlap=True, ticks=False, values=_spread(len(grid.steps), 8)),
    )  # fmt: skip
    labels = _labels(grid.names)
    y = alt.Y(
        "label:N", title=None, sort=None, scale=alt.Scale(domain=labels),
        axis=alt.Axis(ticks=False, labelLimit=130, labelFontSize=10,
        values=[labels[at] for at in _spread(tall, _height(grid) // 14)]),
    )  # fmt: skip
    color = alt.Color("v:Q", title="log10 of norm", scale=alt.Scale(scheme="viridis"), legend=_legend())
    base = alt.Chart(alt.NamedData("cells"), width="container", height=_height(grid))
    known = base.mark_rect().encode(
        x=x, y=y, color=color,
        tooltip=[
            alt.Tooltip("layer:N"), alt.Tooltip("step:Q"), alt.Tooltip("norm:N", title="gradient norm"),
            alt.Tooltip("band:N", title="in the band"), alt.Tooltip("lost:N", title="0, NaN or infinite"),
        ],
    )  # fmt: skip
    known = known.transform_lookup(lookup="l", from_=_names(grid)).transform_calculate(
        step=_lookup(grid.steps.tolist(), "datum.s"),
        norm="isValid(datum.v) ? format(pow(10, datum.v), '.3~g') : 'none'",
        band="isValid(datum.lo) ? format(pow(10, datum.lo), '.2~g') + ' to ' + format(pow(10, datum.hi), '.2~g') : ''",
        lost="datum.x ? format(datum.x, '.0%') : ''",
    )
    line = base.mark_rule(color="white", strokeWidth=3).encode(x="s:O").transform_filter("datum.s === k && !datum.l")
    core = base.mark_rule(color="black", strokeWidth=1).encode(x="s:O").transform_filter("datum.s === k && !datum.l")
    layers: list[Any] = [known, line, core]
    if marks:
        layers.append(_frames(grid, marks))
    title = alt.Title("layer, the input at the top", anchor="start", frame="bounds", fontSize=12, fontWeight="normal")
    chart = alt.layer(*layers, title=title).add_params(k)
    summary = (
        f"Heat map of the gradient norm: {grid.layers} layers over {grid.recorded} recorded steps, "
        f"from {grid.names[0]} nearest the input to {grid.names[-1]}."
    )
    return Chart(name=name, spec=_finished(chart, cells=_cells(grid)), alt=summary, renderer="canvas")


def _frames(grid: FlowGrid, marks: Sequence[Mark]) -> alt.Chart:
    import altair as alt

    labels = _labels(grid.names)
    values = [
        {"label": labels[mark.rows[0]], "last": labels[mark.rows[1]], "s": mark.columns[0],
         "end": mark.columns[1], "what": mark.what}
        for mark in marks
    ]  # fmt: skip
    chart: alt.Chart = (
        alt.Chart(alt.InlineData(values=values, name="marks"))
        .mark_rect(fill=None, stroke="#e00000", strokeWidth=2.5, strokeDash=[7, 3])
        .encode(
            x=alt.X("s:O", bandPosition=0),
            x2=alt.X2("end", bandPosition=1),
            y=alt.Y("label:N", bandPosition=0),
            y2=alt.Y2("last", bandPosition=1),
        )
    )
    return chart


def profile_chart(grid: FlowGrid, name: str) -> Chart:
    """Return the gradient norm by layer at the step that the signal `k` points at, over the range of all steps."""
    import altair as alt

    k = alt.param(name="k", value=len(grid.steps) - 1)
    base = alt.Chart(alt.NamedData("cells"), width="container", height=_height(grid))
    low, high = _range(grid.low, grid.high)
    x = alt.X("l:Q", title="layer, in order of execution", scale=alt.Scale(domain=[0, max(1, len(grid.names) - 1)]),
              axis=alt.Axis(tickMinStep=1, format="d"))  # fmt: skip
    y = alt.Y("p:Q", title="gradient norm", scale=alt.Scale(domain=[low, high]), axis=_log_axis())
    band = base.mark_area(opacity=0.18, color=_COLORS[0]).encode(x=x, y=alt.Y("lo:Q"), y2="hi:Q")
    band = band.transform_filter("datum.s === k && isValid(datum.lo)")
    line = base.mark_line(point=len(grid.names) <= 60, color=_COLORS[0]).encode(
        x=x, y=y, tooltip=[alt.Tooltip("layer:N"), alt.Tooltip("norm:N", title="gradient norm")]
    )
    line = line.transform_filter("datum.s === k").transform_lookup(lookup="l", from_=_names(grid))
    line = line.transform_calculate(p="datum.v", norm="isValid(datum.v) ? format(pow(10, datum.v), '.3~g') : 'none'")
    shown = [band, line] if len(grid.names) < grid.layers else [line]
    text = "Gradient norm by layer at the step chosen with the slider, log axis; its lowest and highest are said above."
    return Chart(name=name, spec=_finished(alt.layer(*shown).add_params(k), cells=_cells(grid)), alt=text)


def curve_chart(frame: pd.DataFrame, name: str, *, x: str, y: str, title: str, log: bool = False) -> Curves | None:
    """Return curves that can be switched on and off; None where there is no number to draw.

    Args:
        frame: Columns x, y and curve; rows of one curve and x become their mean (of logs, on a log axis), with the
            range of them as a band.
        name: Id of the chart.
        x: Column of the horizontal axis, and its title.
        y: Column of the vertical axis.
        title: Of the vertical axis.
        log: The axis is logarithmic: numbers that are not above 0 are left out.
    """
    import altair as alt

    numbers = frame[y].to_numpy(dtype=np.float64)
    good = np.isfinite(numbers) & ((numbers > 0) if log else True)
    kept = frame[good].assign(p=np.log10(numbers[good]) if log else numbers[good])
    if kept.empty:
        return None
    names = [str(value) for value in dict.fromkeys(frame["curve"])][:MOST_CURVES]
    values = []
    for place, curve in enumerate(names):
        own = kept[kept["curve"].astype(str) == curve].groupby(x)["p"].agg(["mean", "min", "max"])
        own = own.iloc[_spread(len(own), _MOST_POINTS)]
        for at, mean, low, high in own.itertuples():
            row = {"c": place, "x": _short(at), "p": _short(mean)}
            values.append(row | ({"lo": _short(low), "hi": _short(high)} if high > low else {}))
    colors = [_COLORS[place % len(_COLORS)] for place in range(len(names))]
    dashes = [_DASHES[place // len(_COLORS) % len(_DASHES)] for place in range(len(names))]
    hidden = alt.param(name="hidden", value=[])
    base = alt.Chart(alt.NamedData("curves"), width="container", height=240)
    base = base.transform_filter("indexof(hidden, datum.c) < 0")
    scale = alt.Scale(domain=list(range(len(names))), range=colors)
    color = alt.Color("c:N", scale=scale, legend=None)
    low, high = _range(
        np.array([row.get("lo", row["p"]) for row in values]), np.array([row.get("hi", row["p"]) for row in values])
    )
    ends = [min(row["x"] for row in values), max(row["x"] for row in values)]
    span = alt.Scale(domain=ends if ends[1] > ends[0] else [ends[0] - 1, ends[0] + 1], nice=False)
    at = alt.X("x:Q", title=x, scale=span, axis=alt.Axis(tickMinStep=1, format="~s" if ends[1] >= 1e4 else "d"))
    up = alt.Y("p:Q", title=title, scale=alt.Scale(domain=[low, high], nice=not log, zero=False),
               axis=_log_axis() if log else alt.Axis())  # fmt: skip
    band = base.mark_area(opacity=0.15).encode(x=at, y=alt.Y("lo:Q"), y2="hi:Q", color=color)
    band = band.transform_filter("isValid(datum.lo)")
    value = "format(pow(10, datum.p), '.3~g')" if log else "format(datum.p, '.4~g')"
    line = base.mark_line(point=alt.OverlayMarkDef(size=12)).encode(
        x=at, y=up, color=color,
        strokeDash=alt.StrokeDash("c:N", scale=alt.Scale(domain=list(range(len(names))), range=dashes), legend=None),
        tooltip=[
            alt.Tooltip("name:N", title="curve"), alt.Tooltip("x:Q", title=x), alt.Tooltip("value:N", title=title),
        ],
    )  # fmt: skip
    line = line.transform_lookup(
        lookup="c",
        from_=alt.LookupData(
            data=alt.InlineData(values=[{"c": place, "name": text} for place, text in enumerate(names)], name="names"),
            key="c",
            fields=["name"],
        ),
    ).transform_calculate(value=value)
    more = frame["curve"].nunique() - len(names)
    text = (
        f"Curves of {title} against {x}: {', '.join(names)}{f', and {more} more that are not shown' if more else ''}."
    )
    chart = Chart(name=name, spec=_finished(alt.layer(band, line).add_params(hidden), curves=values), alt=text)
    return Curves(
        chart=chart,
        names=tuple(names),
        colors=tuple(colors),
        dashes=tuple(" ".join(map(str, dash)) if dash[1] else "" for dash in dashes),
    )


def _cells(grid: FlowGrid) -> list[dict[str, Any]]:
    """Return the grid as records, with nothing in them that can be left out: there are thousands."""
    banded = len(grid.names) < grid.layers
    values = []
    for row, column in np.ndindex(grid.middle.shape):
        record: dict[str, Any] = {"l": row, "s": column}
        if not math.isnan(grid.middle[row, column]):
            record["v"] = round(float(grid.middle[row, column]), 2)
            if banded:
                record |= {"lo": round(float(grid.low[row, column]), 2), "hi": round(float(grid.high[row, column]), 2)}
        if grid.lost[row, column]:
            record["x"] = round(float(grid.lost[row, column]), 2)
        values.append(record)
    return values


def _names(grid: FlowGrid) -> alt.LookupData:
    import altair as alt

    pairs = zip(grid.names, _labels(grid.names), strict=True)
    values = [{"l": row, "layer": name, "label": label} for row, (name, label) in enumerate(pairs)]
    return alt.LookupData(data=alt.InlineData(values=values, name="names"), key="l", fields=["layer", "label"])


def _labels(names: Sequence[str]) -> list[str]:
    """Return names that fit beside an axis, and are still all different: the end of a dotted path tells most."""
    short = [name if len(name) <= _LABEL else f"…{name[1 - _LABEL :]}" for name in names]
    counts = Counter(short)
    return [name if counts[label] > 1 else label for name, label in zip(names, short, strict=True)]


def _height(grid: FlowGrid) -> int:
    return max(160, min(420, 10 * len(grid.names)))


def _lookup(values: Sequence[int], at: str = "datum.value") -> str:
    """Return a Vega expression that turns a place into its value; whole numbers only, never a user's string."""
    return f"[{','.join(str(int(value)) for value in values)}][{at}]"


def _spread(count: int, most: int) -> list[int]:
    return (
        [int(place) for place in np.unique(np.linspace(0, max(count - 1, 0), min(count, most)).round())]
        if count
        else []
    )


def _range(low: np.ndarray, high: np.ndarray) -> tuple[float, float]:
    bottom, top = (float(np.nanmin(low)), float(np.nanmax(high))) if np.isfinite(low).any() else (0.0, 1.0)
    margin = 0.05 * (top - bottom) or 0.5
    return round(bottom - margin, 4), round(top + margin, 4)


def _short(value: Any) -> float:
    return float(f"{float(value):.5g}")


def _log_axis() -> alt.Axis:
    import altair as alt

    return alt.Axis(labelExpr="format(pow(10, datum.value), '.2~g')", tickCount=6)


def _legend() -> alt.Legend:
    import altair as alt

    return alt.Legend(
        orient="bottom", direction="horizontal", gradientLength=180, labelExpr="format(pow(10, datum.value), '.1~g')",
        title="gradient norm", titleOrient="left",
    )  # fmt: skip


def _finished(chart: Any, **data: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the specification, drawn on white: the page keeps its charts on paper, by day and by night.

    Args:
        chart: The chart.
        **data: Its large data by name, put in here since Altair would validate each of thousands of records.
    """
    shown = chart.configure(
        background="white",
        font="system-ui, sans-serif",
        autosize={"type": "fit-x", "contains": "padding"},
        view={"stroke": "#ccc"},
        axis={
            "labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal", "gridColor": "#eee",
            "labelColor": "#222", "titleColor": "#222",
        },
    )  # fmt: skip
    spec: dict[str, Any] = shown.to_dict()
    spec["datasets"] = {**spec.get("datasets", {}), **data}
    spec.pop("$schema", None)  # an address; nothing reads it, and the page asks nobody
    return spec
