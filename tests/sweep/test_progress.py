"""What a person sees while cells run."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console
from rich.live import Live

from gradlab.live import LayerGroup, Snapshot
from gradlab.study import Cell
from gradlab.sweep.engine import Outcome
from gradlab.sweep.progress import SweepDisplay


def make(label: str) -> Cell:
    return Cell(part="p", label=label, settings={"label": label})


def shown(*, terminal: bool) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=60, color_system=None)
    with SweepDisplay(console, 3) as display:
        display.update(make("one [1]"), 1, 4, 0.5)
        display.update(make("two"), 2, 4, float("nan"))
        display.update(make("three"), 0, 1, None)
        display.finish(Outcome(cell=make("one [1]"), status="done", seconds=1.25))
        display.finish(Outcome(cell=make("two"), status="diverged", message="the loss was not finite"))
        display.finish(Outcome(cell=make("never begun"), status="failed", message="x" * 100))
        display.stopping()
    return text.getvalue()


def test_bars_show_cells_with_their_loss_on_a_terminal() -> None:
    text = shown(terminal=True)
    for part in ("all cells", "one [1]", "loss 0.5", "loss NaN", "three", "1/4", "0/3"):
        assert part in text
    assert "two: diverged (the loss was not finite)" in text
    assert f"never begun: failed ({'x' * 100})" in text
    assert "one [1]: done" not in text  # its bar said so


def test_lines_show_finished_cells_elsewhere() -> None:
    assert shown(terminal=False).splitlines() == [
        "[1/3] one [1]: done, 1.2 s",
        "[2/3] two: diverged (the loss was not finite), 0.0 s",
        f"never begun: failed ({'x' * 100})",
        "Stopping: running cells end at their next step; Ctrl-C again ends them now.",
    ]


def test_layers_of_running_cells_are_drawn_as_far_as_there_is_room() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=70, height=30, color_system=None)
    group = LayerGroup(first="a", last="a", layers=1, smallest=0.5, largest=0.5, nonfinite=0)
    with SweepDisplay(console, 5, live=True) as display:
        for number in range(5):
            groups = tuple(replace(group, first=f"{number}.{k}", last=f"{number}.{k}") for k in range(40))
            display.update(make(f"cell {number}"), 1, 4, 0.5, Snapshot(step=number, groups=groups))
        display.update(make("cell 0"), 2, 4, 0.25)  # nothing new: what is known stays
        assert isinstance(display._screen, Live)
        display._screen.refresh()
        lines = text.getvalue().rpartition("all cells")[2].splitlines()
        assert len(lines) < 30
        assert [line for line in lines if line.startswith("step ")] == ["step 0 · all finite", "step 1 · all finite"]
        assert "Layers of 3 more cells: no room." in [line.strip() for line in lines]
        display.finish(Outcome(cell=make("cell 0"), status="done"))
        display._screen.refresh()
        assert "step 0" not in text.getvalue().rpartition("all cells")[2]
