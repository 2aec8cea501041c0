"""Diagnoses and what-ifs on a terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from gradlab.analysis.finding import Diagnosis, Finding
    from gradlab.trial import WhatIf

__all__ = ["diagnosis_report", "print_diagnosis", "print_whatif", "whatif_report"]


def diagnosis_report(found: Diagnosis) -> RenderableType:
    """Return a diagnosis as a rich renderable; names from the user's model are shown as they are, not as markup."""
    parts: list[RenderableType] = []
    if found.healthy:
        parts.append(Text(f"Healthy by the rules '{found.rules}'.", style="bold green"))
    parts += [_panel(place, finding) for place, finding in enumerate(found.findings, 1)]
    parts += [Text(f"Note: {note}", style="yellow") for note in found.notes]
    return Group(*parts)


def _panel(place: int, finding: Finding) -> Panel:
    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    numbers = [("evidence" if place == 0 else " ", str(item)) for place, item in enumerate(finding.evidence)]
    rows = [("where", finding.where), *numbers]
    source = f" ({finding.source})" if finding.source else ""
    rows += [("cause", finding.cause), ("try", f"{finding.advice}{source}" if finding.advice else "")]
    for name, text in rows:
        if text:
            table.add_row(name, Text(text))
    return Panel(table, title=Text(f"{place}. {finding.title}", style="bold red"), title_align="left")


def whatif_report(tried: WhatIf) -> RenderableType:
    """Return the trials as a table, and the advice."""
    table = Table(title="What if: gradient at the first over the last, before training", title_justify="left")
    for name, right in (("remedy", False), ("verdict", False), ("through depth", True), ("through time", True),
                        ("loss", True), ("what was changed", False)):  # fmt: skip
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for trial in tried.trials:
        leading = trial.diagnosis.leading
        verdict = Text("healthy", style="green") if leading is None else Text(leading.title, style="red")
        table.add_row(
            Text(trial.name, style="bold" if trial is tried.best else ""), verdict, _ratio(trial.depth_ratio),
            _ratio(trial.time_ratio), f"{trial.loss_first:.3g} to {trial.loss_last:.3g}", Text(trial.text),
        )  # fmt: skip
    parts: list[RenderableType] = [table]
    parts += [Text(f"Not tried: {name}: {why}", style="dim") for name, why in tried.skipped]
    best = tried.best
    if best is not None:
        parts.append(Text(f"Try {best.name}: {best.text} ({best.source}).", style="bold green"))
    elif not tried.before.diagnosis.healthy:
        parts.append(Text("No single remedy heals it.", style="bold yellow"))
    return Group(*parts)


def _ratio(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2g}"


def _console() -> Console:
    console = Console()
    # Without a terminal rich assumes 80 columns and would cut tables that nobody's window limits.
    return console if console.is_terminal else Console(width=140)


def print_diagnosis(found: Diagnosis) -> None:
    """Print a diagnosis."""
    _console().print(diagnosis_report(found))


def print_whatif(tried: WhatIf) -> None:
    """Print the trials."""
    _console().print(whatif_report(tried))
