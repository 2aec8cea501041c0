"""The page of a diagnosis: findings with all they say, framed where they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import gradlab as gl
from gradlab.analysis.finding import Finding
from gradlab.errors import DataError, UsageError
from gradlab.report import write_diagnosis
from gradlab.report.diagnosis_page import finding_marks
from gradlab.report.flow_grid import flow_grid
from gradlab.trace import Trace

Net = Callable[..., pd.DataFrame]


def test_a_finding_is_shown_whole_and_escaped(sick_trace: Trace, read: Any, evil: str, tmp_path: Path) -> None:
    found = gl.diagnose(sick_trace)
    page = read(write_diagnosis(sick_trace, tmp_path / "a.html"))
    text = " ".join(page.text.split())
    assert found.leading is not None
    assert found.leading.title == "vanishing through depth"
    said = (found.leading.title, found.leading.cause, found.leading.advice, found.leading.source, found.leading.where)
    for part in (*said, *map(str, found.leading.evidence), *found.notes):
        assert part
        assert part in text
    assert "(framed in the heat map)" in text
    for heading in ("Gradient by layer and step", "Gradient over training", "Gradient through time", "Loss"):
        assert heading in text
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert f"Diagnosis of {evil}" in text


def test_a_healthy_net(linear_net: Net, read: Any, tmp_path: Path) -> None:
    trace = Trace({"layers": linear_net(10, 3, gain=1.0)})
    page = read(write_diagnosis(trace, tmp_path / "a.html", name="my net"))
    assert "Nothing is wrong by the rules 'gradlab'." in page.text
    assert "Diagnosis of my net" in page.text
    assert "Findings" not in page.text


def test_nothing_finite_is_shown_as_what_it_is(linear_net: Net, read: Any, tmp_path: Path) -> None:
    layers = linear_net(5, 3).assign(grad_norm=math.nan, grad_nonfinite=7.0)
    page = read(write_diagnosis(Trace({"layers": layers}), tmp_path / "a.html"))
    assert "nonfinite" in page.text
    assert "Step 2: 5 layers with 0, NaN or infinity." in page.text


def test_a_trace_without_layers_has_no_heat_map(read: Any, tmp_path: Path) -> None:
    steps = pd.DataFrame({"step": [0, 1], "loss": [1.0, 0.5]})
    page = read(write_diagnosis(Trace({"steps": steps}), tmp_path / "a.html"))
    assert "Gradient by layer" not in page.text
    assert "No gradient was recorded" in page.text


def test_marks_lie_where_the_finding_says(linear_net: Net) -> None:
    grid = flow_grid(linear_net(10, 20))
    assert grid is not None
    layers = tuple(f"layers.{k}" for k in (1, 2, 3, 7))
    findings = (
        Finding(kind="dead", layers=layers, steps=(5, 9)),
        Finding(kind="frozen", layers=("layers.4.weight",)),
        Finding(kind="frozen", layers=("elsewhere",)),
    )
    marks = finding_marks(findings, grid)
    assert sorted(marks) == [0, 1]
    assert [(mark.rows, mark.columns) for mark in marks[0]] == [((1, 3), (5, 9)), ((7, 7), (5, 9))]
    assert [(mark.rows, mark.columns) for mark in marks[1]] == [((4, 4), (0, 19))]


def test_a_mark_between_two_steps_that_are_drawn(linear_net: Net) -> None:
    grid = flow_grid(linear_net(3, 100), most_steps=5)
    assert grid is not None
    (mark,) = finding_marks((Finding(kind="dead", layers=("layers.1",), steps=(30, 31)),), grid)[0]
    assert grid.steps[mark.columns[0]] in (25, 24)
    assert mark.columns[0] == mark.columns[1]


def test_other_rules(sick_trace: Trace, read: Any, tmp_path: Path) -> None:
    from gradlab.analysis.published_rules import RULES

    name = next(iter(RULES))
    assert name in read(write_diagnosis(sick_trace, tmp_path / "a.html", rules=name)).text
    with pytest.raises(UsageError, match="Unknown rules 'gradlba'"):
        write_diagnosis(sick_trace, tmp_path / "a.html", rules="gradlba")


def test_what_cannot_be_diagnosed(sick_trace: Trace, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        write_diagnosis(Trace(), tmp_path / "a.html")
    with pytest.raises(DataError, match="merges several runs"):
        write_diagnosis(Trace.merge([sick_trace], [{"seed": 0}]), tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()
