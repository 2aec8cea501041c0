"""What a person sees while cells run: live bars on a terminal, one line a finished cell elsewhere."""

from __future__ import annotations

import math
from types import TracebackType
from typing import final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from gradlab.live import Snapshot
from gradlab.live.drawing import draw
from gradlab.study import Cell
from gradlab.sweep.engine import Outcome

__all__ = ["SweepDisplay"]

_LEAST_LINES = 9  # that a cell wants: its name, its facts, its legend and a few layers


@final
class SweepDisplay:
    """A bar for the whole sweep and one for each running cell, with its loss and the time left.

    Args:
        console: Where to draw; without a terminal, finished cells are logged a line each.
        total: Cells to run.
        live: Draw the gradient norm by layer of running cells below the bars; on a terminal only.
    """

    def __init__(self, console: Console, total: int, *, live: bool = False) -> None:
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
        self._layers: dict[str, tuple[Cell, Snapshot]] = {}
        self._screen: Progress | Live = self._progress
        if live and console.is_terminal:
            self._screen = Live(console=console, transient=True, get_renderable=self._bars_and_layers)

    def __enter__(self) -> SweepDisplay:
        self._screen.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._screen.stop()

    def update(self, cell: Cell, done: int, total: int, loss: float | None, layers: Snapshot | None = None) -> None:
        """Show how far a cell is and, where there is a new one, its latest recorded step."""
        if layers is not None:
            self._layers[cell.key] = (cell, layers)
        if cell.key not in self._tasks:
            self._tasks[cell.key] = self._progress.add_task(f"  {cell.label}", total=total, loss="")
        text = "" if loss is None else "loss NaN" if math.isnan(loss) else f"loss {loss:.4g}"
        self._progress.update(self._tasks[cell.key], completed=done, total=total, loss=text)

    def finish(self, outcome: Outcome) -> None:
        """Take a cell off the display and say how it ended where that is worth a line."""
        self._finished += 1
        self._progress.advance(self._all)
        self._layers.pop(outcome.cell.key, None)
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

    def _bars_and_layers(self) -> Group:
        """Return the bars and, as far as the terminal is high enough, the layers of the cells that began first."""
        width, height = self._console.size
        shown = list(self._layers.values())  # a copy: this is called in the display's own thread
        free = height - len(self._progress.tasks) - 2
        count = max(1, min(len(shown), free // _LEAST_LINES))
        lines_each = free // count - 1  # below its name
        parts: list[RenderableType] = [self._progress.get_renderable()]
        for cell, snapshot in shown[:count] if lines_each >= 4 else ():
            ascii_only = not self._console.encoding.lower().startswith("utf")
            lines = draw(snapshot, width=width, height=lines_each, ascii_only=ascii_only)
            title = Text(cell.label, style="bold", no_wrap=True, overflow="ellipsis")
            parts += [title, Text("\n", no_wrap=True, overflow="crop").join(lines)]
        left = len(shown) - (count if lines_each >= 4 else 0)
        if left > 0:
            parts.append(Text(f"Layers of {left} more cells: no room.", style="dim", no_wrap=True, overflow="ellipsis"))
        return Group(*parts)

    def stopping(self) -> None:
        """Say that the sweep stops, since a long step may still have to end."""
        self._print("Stopping: running cells end at their next step; Ctrl-C again ends them now.")

    def _print(self, line: str, style: str | None = None) -> None:
        self._console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
