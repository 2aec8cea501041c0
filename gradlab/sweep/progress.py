"""What a person sees while cells run: live bars on a terminal, one line a finished cell elsewhere."""

from __future__ import annotations

import math
from types import TracebackType
from typing import final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from gradlab.study import Cell
from gradlab.sweep.engine import Outcome

__all__ = ["SweepDisplay"]


@final
class SweepDisplay:
    """A bar for the whole sweep and one for each running cell, with its loss and the time left.

    Args:
        console: Where to draw; without a terminal, finished cells are logged a line each.
        total: Cells to run.
    """

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total, self._finished = console, total, 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._all = self._progress.add_task("all cells", total=total, loss="")
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> SweepDisplay:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()

    def update(self, cell: Cell, done: int, total: int, loss: float | None) -> None:
        """Show how far a cell is."""
        if cell.key not in self._tasks:
            self._tasks[cell.key] = self._progress.add_task(f"  {cell.label}", total=total, loss="")
        text = "" if loss is None else "loss NaN" if math.isnan(loss) else f"loss {loss:.4g}"
        self._progress.update(self._tasks[cell.key], completed=done, total=total, loss=text)

    def finish(self, outcome: Outcome) -> None:
        """Take a cell off the display and say how it ended where that is worth a line."""
        self._finished += 1
        self._progress.advance(self._all)
        task = self._tasks.pop(outcome.cell.key, None)
        if task is not None:
            self._progress.remove_task(task)
        line = f"{outcome.cell.label}: {outcome.status}"
        if outcome.message:
            line += f" ({outcome.message})"
        if outcome.status == "failed":
            self._print(line, style="red")
        elif not self._console.is_terminal and outcome.status != "stopped":
            self._print(f"[{self._finished}/{self._total}] {line}, {outcome.seconds:.1f} s")
        elif outcome.status == "diverged":
            self._print(line)

    def stopping(self) -> None:
        """Say that the sweep stops, since a long step may still have to end."""
        self._print("Stopping: running cells end at their next step; Ctrl-C again ends them now.")

    def _print(self, line: str, style: str | None = None) -> None:
        self._console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
