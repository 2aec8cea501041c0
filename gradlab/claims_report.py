"""Claims as text for a terminal: a table, and under it each rule that was used, once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gradlab.analysis.claims import Claim, Verdict

__all__ = ["claims_report", "measured_text"]

_STYLES = {Verdict.REPRODUCED: "green", Verdict.NOT_REPRODUCED: "red", Verdict.NOT_DECIDED: "yellow"}


def measured_text(claim: Claim) -> str:
    """Return the measured number with unit, interval, p-value and number of samples, as far as there are any."""
    if math.isnan(claim.measured):
        return "-"
    large = 1e4 <= abs(claim.measured) < 1e9  # counts are written out; beyond, an exponent reads better
    parts = [f"{claim.measured:,.2f}".removesuffix(".00") if large else f"{claim.measured:.5g}"]
    if not (math.isnan(claim.low) or math.isnan(claim.high)) and claim.low != claim.high:
        parts.append(f"[{claim.low:.3g}, {claim.high:.3g}]")
    if claim.unit:
        parts.append(claim.unit)
    if not math.isnan(claim.p_value):
        parts.append(f"p={claim.p_value:.2g}")
    if claim.n > 1:
        parts.append(f"n={claim.n}")
    return " ".join(parts)


def claims_report(claims: Sequence[Claim]) -> RenderableType:
    """Return the claims as a table (claim, expected, measured, rule, source, verdict) with the rules written out below.

    Many claims share a rule, so the table names it by a number.
    """
    rules = list(dict.fromkeys(claim.rule for claim in claims))
    kinds = {rule: rule.partition(" ")[0] if rule.startswith("(") else "" for rule in rules}
    numbers = {rule: f"{kinds[rule]}{place}" for place, rule in enumerate(rules, 1)}
    table = Table(title="Claims", title_justify="left", show_lines=True, title_style="bold", expand=True)
    widths = {"claim": 8, "expected": 2, "measured": 3, "source": 3}
    for name in ("id", "claim", "expected", "measured", "rule", "source", "verdict"):
        table.add_column(name, overflow="fold", ratio=widths.get(name), no_wrap=name in ("rule",))
    for claim in claims:
        statement = Text(claim.statement)
        if claim.detail:
            statement.append(f"\n{claim.detail}", style="dim")
        table.add_row(
            Text(claim.id),
            statement,
            Text(claim.expected or "-"),
            Text(measured_text(claim)),
            Text(numbers[claim.rule]),
            Text(claim.source),
            Text(str(claim.verdict), style=_STYLES[claim.verdict]),
        )
    counts = {verdict: sum(claim.verdict == verdict for claim in claims) for verdict in Verdict}
    summary = Text(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + ".", style="bold")
    legend = [Text(f"{numbers[rule]} {rule.removeprefix(kinds[rule]).strip()}", style="dim") for rule in rules]
    return Group(table, summary, Text("Rules:"), *legend)
