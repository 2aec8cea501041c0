"""What commands print on: the console, a line, a status, the claims of a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.console import Console

    from gradlab.study import Study
    from gradlab.sweep.store import Run

__all__ = ["OUT_HELP", "console", "judge_and_print", "say", "status"]

OUT_HELP: Final = "Folder that holds runs."


def console() -> Console:
    """Return the console to print on."""
    from rich.console import Console

    plain = not sys.stdout.isatty()
    # Without a terminal rich assumes 80 columns and would cut tables that nobody's window limits.
    return Console(width=140 if plain and "COLUMNS" not in os.environ else None)


@contextmanager
def status(console: Console, text: str) -> Iterator[None]:
    """Show a text while the block runs, on a terminal."""
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        yield


def judge_and_print(study: Study, run: Run, console: Console, *, brief: bool = False) -> int:
    """Decide and print a run's claims, or with `brief` only their counts; return how many were not reproduced."""
    from gradlab.claims_report import claims_report, verdict_counts
    from gradlab.sweep.driver import judge

    claims = judge(study, run)
    console.print(verdict_counts(claims) if brief else claims_report(claims))
    left = len(run.planned) - len(run.cells())
    if left:
        say(console, f"Decided without {left} of {len(run.planned)} cells, which are not finished.")
    return sum(claim.verdict == "not reproduced" for claim in claims)


def say(console: Console, line: str) -> None:
    """Print a line as it is, however long."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
