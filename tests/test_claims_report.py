"""Claims as text."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from gradlab.analysis.claims import Claim, Verdict
from gradlab.claims_report import claims_report, measured_text


def make(**changes: Any) -> Claim:
    nan = math.nan
    fields: dict[str, Any] = {
        "id": "C1", "statement": "All is 1.", "source": "counted", "rule": "(E) Equal.", "expected": "1",
        "measured": 1.0, "low": nan, "high": nan, "unit": "", "p_value": nan, "n": 0, "verdict": "reproduced",
        "detail": "",
    }  # fmt: skip
    return Claim(**(fields | changes))


def text(*claims: Claim, width: int = 140) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(claims_report(claims))
    return out.getvalue()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "1"),
        ({"measured": math.nan, "unit": "x", "n": 5}, "-"),
        ({"measured": 0.000123456789}, "0.00012346"),
        ({"measured": -3.14159265}, "-3.1416"),
        ({"measured": 1_727_962.0}, "1,727,962"),
        ({"measured": 12_345.678}, "12,345.68"),
        ({"measured": 1.5e40}, "1.5e+40"),
        ({"measured": -1e300}, "-1e+300"),
        ({"measured": math.inf}, "inf"),
        ({"measured": -math.inf}, "-inf"),
        ({"low": 0.9, "high": 1.1}, "1 [0.9, 1.1]"),
        ({"low": 1.0, "high": 1.0}, "1"),
        ({"low": 0.9}, "1"),
        ({"unit": "x a block"}, "1 x a block"),
        ({"p_value": 0.03125, "n": 5}, "1 p=0.031 n=5"),
        ({"p_value": 0.0}, "1 p=0"),
        ({"n": 1}, "1"),
        ({"low": 0.5, "high": 2.0, "unit": "nats", "p_value": 0.01, "n": 8}, "1 [0.5, 2] nats p=0.01 n=8"),
    ],
    ids=str,
)
def test_what_was_measured_is_said_as_far_as_it_is_known(changes: dict[str, Any], expected: str) -> None:
    assert measured_text(make(**changes)) == expected


def test_claims_are_counted_by_verdict() -> None:
    claims = [make(verdict=verdict) for verdict in ("reproduced", "not reproduced", "not decided", "not decided")]
    assert "1 reproduced, 1 not reproduced, 2 not decided." in text(*claims)
    assert "0 reproduced, 0 not reproduced, 0 not decided." in text()


def test_a_rule_that_claims_share_is_written_once_and_numbered() -> None:
    out = text(make(id="A"), make(id="B", rule="(S) Wilcoxon."), make(id="C"), make(id="D", rule="Not tested."))
    lines = [line.rstrip() for line in out.splitlines()]
    assert lines[lines.index("Rules:") + 1 :] == ["(E)1 Equal.", "(S)2 Wilcoxon.", "3 Not tested."]
    rows = {line.split()[1]: line for line in lines if line.startswith("│")}
    assert ["(E)1" in rows["A"], "(S)2" in rows["B"], "(E)1" in rows["C"]] == [True, True, True]


def test_text_of_a_claim_is_no_markup() -> None:
    out = text(make(statement="[red]x[/red]", detail="[/]", source="[link]", expected="[1]", unit="[y]"))
    for part in ("[red]x[/red]", "[/]", "[link]", "[1]", "1 [y]"):
        assert part in out


@pytest.mark.parametrize("width", [40, 80, 200])
def test_nothing_is_cut_off_in_a_narrow_window(width: int) -> None:
    out = text(make(statement="zzzz " * 40), width=width)
    assert out.count("z") == 160
    assert max(map(len, out.splitlines())) <= width


def test_each_verdict_has_its_colour() -> None:
    out = io.StringIO()
    console = Console(file=out, width=140, force_terminal=True, color_system="standard")
    console.print(claims_report([make(verdict=verdict) for verdict in Verdict]))
    for code, verdict in ((32, "reproduced"), (31, "not reproduced"), (33, "not decided")):
        assert f"\x1b[{code}m{verdict}" in out.getvalue()
