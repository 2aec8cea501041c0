"""Claims as text for a terminal: a table, and under it each rule that was used, once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gradlab.analysis.claims import Claim, Verdict

__all__ = ["claims_report", "measured_text", "verdict_counts"]

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


def verdict_counts(claims: Iterable[Claim]) -> str:
    """Return how many claims there are of each verdict: "3 reproduced, 1 not reproduced, 0 not decided."."""
    found = Counter(claim.verdict for claim in claims)
    return ", ".join(f"{found[verdict]} {verdict}" for verdict in Verdict) + "."


def claims_report(claims: Sequence[Claim], experiments: Sequence[str] = ()) -> RenderableType:
    """Return the claims as a table (claim, expected, measured, rule, source, verdict) with the rules written out below.

    Many claims share a rule, so the table names it by a number.

    Args:
        claims: The claims, in the order of the table.
        experiments: The experiment of each claim, for a first column that names it where it changes; none by default.
    """
    rules = list(dict.fromkeys(claim.rule for claim in claims))
    kinds = {rule: rule.partition(" ")[0] if rule.startswith("(") else "" for rule in rules}
    numbers = {rule: f"{kinds[rule]}{place}" for place, rule in enumerate(rules, 1)}
    table = Table(title="Claims", title_justify="left", show_lines=True, title_style="bold", expand=True)
    widths = {"claim": 8, "expected": 2, "measured": 3, "source": 3}
    if experiments:
        table.add_column("experiment", overflow="fold", ratio=2)
    for name in ("id", "claim", "expected", "measured", "rule", "source", "verdict"):
        table.add_column(name, overflow="fold", ratio=widths.get(name), no_wrap=name in ("rule",))
    for place, claim in enumerate(claims):
        named = [experiments[place] if experiments[place] not in experiments[:place] else ""] if experiments else []
        statement = Text(claim.statement)
        if claim.detail:
            statement.append(f"\n{claim.detail}", style="dim")
        table.add_row(
            *named,
            Text(claim.id),
            statement,
            Text(claim.expected or "-"),
            Text(measured_text(claim)),
            Text(numbers[claim.rule]),
            Text(claim.source),
            Text(str(claim.verdict), style=_STYLES[claim.verdict]),
        )
    summary = Text(verdict_counts(claims), style="bold")
    legend = [Text(f"{numbers[rule]} {rule.removeprefix(kinds[rule]).strip()}", style="dim") for rule in rules]
    return Group(table, summary, Text("Rules:"), *legend)
