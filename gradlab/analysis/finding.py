"""What a diagnosis says: findings with evidence, cause and remedy; as text, JSON and a notebook's HTML."""

from __future__ import annotations

import html
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, get_args

from gradlab.errors import StoreError, UsageError, unknown

__all__ = ["KINDS", "Axis", "Diagnosis", "Evidence", "Finding", "Kind"]

Kind = Literal["vanishing", "exploding", "dead", "saturated", "nonfinite", "frozen"]
Axis = Literal["depth", "time", "training", ""]
"""Along what a gradient or signal shrinks or grows; "" where a finding is about single layers or parameters."""

KINDS: Final[tuple[str, ...]] = get_args(Kind)
_SCHEMA = 1
_SHOWN_LAYERS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """One measured number behind a finding.

    Args:
        what: What was measured, a few words.
        value: The number.
        low: Lower end of its interval; NaN where there is none.
        high: Upper end of its interval; NaN where there is none.
        unit: Its unit; "" for a pure number.
        threshold: The rule's bound on it, in words such as "< -3"; "" where the number only explains.
    """

    what: str
    value: float
    low: float = math.nan
    high: float = math.nan
    unit: str = ""
    threshold: str = ""

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        interval = "" if math.isnan(self.low) else f" [{self.low:.3g}, {self.high:.3g}]"
        rule = f" (rule: {self.threshold})" if self.threshold else ""
        return f"{self.what}: {self.value:.3g}{interval}{unit}{rule}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is wrong, where, when, how badly, why it is thought so, and what helps.

    Args:
        kind: One of `KINDS`.
        axis: "depth", "time" (through a sequence), "training" (over steps) or "".
        layers: The layers (dotted paths) or parameters it is about, from input to output.
        steps: First and last recorded training step at which it holds; None where that is not known.
        timesteps: First and last time step of the sequence it is about; None for a finding that is not about time.
        severity: From 0 (just over the rule's bound) to 1 (as bad as can be).
        evidence: Measured numbers; the first one decided.
        cause: The likely cause, one sentence; "" where none is known.
        advice: What to try, one sentence; "" where none is known.
        source: Of the advice or of the rule (author, year).

    Raises:
        UsageError: The kind is unknown.
    """

    kind: Kind
    axis: Axis = ""
    layers: tuple[str, ...] = ()
    steps: tuple[int, int] | None = None
    timesteps: tuple[int, int] | None = None
    severity: float = 1.0
    evidence: tuple[Evidence, ...] = ()
    cause: str = ""
    advice: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of finding", self.kind, KINDS)

    @property
    def where(self) -> str:
        """The place in words: layers, time steps and training steps."""
        parts = []
        if self.layers:
            shown = [name or "(the model itself)" for name in self.layers]
            middle = [*shown[: _SHOWN_LAYERS // 2], "...", *shown[-_SHOWN_LAYERS // 2 :]]
            names = ", ".join(middle if len(shown) > _SHOWN_LAYERS else shown)
            parts.append(f"{names} ({len(shown)} in all)" if len(shown) > _SHOWN_LAYERS else names)
        if self.timesteps is not None:
            parts.append(f"time steps {self.timesteps[0]} to {self.timesteps[1]}")
        if self.steps is not None:
            first, last = self.steps
            parts.append(f"training step {first}" if first == last else f"training steps {first} to {last}")
        return "; ".join(parts)

    @property
    def title(self) -> str:
        """Kind and axis in words."""
        through = {"depth": " through depth", "time": " through time", "training": " over training", "": ""}
        return f"{self.kind}{through[self.axis]}"

    def __str__(self) -> str:
        lines = [f"{self.title}: {self.where}" if self.where else self.title]
        lines += [f"  {item}" for item in self.evidence]
        lines += [f"  cause: {self.cause}"] if self.cause else []
        source = f" ({self.source})" if self.source else ""
        lines += [f"  try: {self.advice}{source}"] if self.advice else [f"  source:{source}"] if source else []
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What `gl.diagnose` found in a trace.

    Args:
        findings: Leading first; one sick cause gives one finding.
        notes: What the trace could not show (time not watched, layers not seen), one sentence each.
        rules: Name of the rule set.

    Example:
        >>> print(Diagnosis(findings=(), rules="gradlab"))
        healthy by the rules 'gradlab'
    """

    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    rules: str = field(default="gradlab")

    @property
    def healthy(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def leading(self) -> Finding | None:
        """The finding to act on first; None if there is none."""
        return self.findings[0] if self.findings else None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds found, leading first, each once."""
        return tuple(dict.fromkeys(finding.kind for finding in self.findings))

    def __str__(self) -> str:
        head = "healthy" if self.healthy else f"{len(self.findings)} finding{'s'[: len(self.findings) != 1]}"
        blocks = [f"{head} by the rules '{self.rules}'"]
        blocks += [f"{place}. {finding}" for place, finding in enumerate(self.findings, 1)]
        blocks += [f"note: {note}" for note in self.notes]
        return "\n".join(blocks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data; a number that JSON lacks is null or the text "inf" or "-inf"."""
        findings = [asdict(finding) | {"where": finding.where} for finding in self.findings]
        data = {"format": "gradlab diagnosis", "schema_version": _SCHEMA, "rules": self.rules}
        found: dict[str, Any] = _plain(data | {"healthy": self.healthy, "findings": findings, "notes": self.notes})
        return found

    def to_json(self) -> str:
        """Return the diagnosis as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Diagnosis:
        """Read what `to_json` wrote.

        Raises:
            StoreError: The text is no diagnosis.
        """
        try:
            data = json.loads(text)
            if data["format"] != "gradlab diagnosis" or data["schema_version"] != _SCHEMA:
                raise StoreError("This JSON is no diagnosis that this version of gradlab reads.")
            findings = tuple(_finding(item) for item in data["findings"])
            return cls(findings=findings, notes=tuple(map(str, data["notes"])), rules=str(data["rules"]))
        except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
            raise StoreError("This JSON is no diagnosis, or damaged.") from error

    def _repr_html_(self) -> str:
        """Return a short HTML table for notebooks, all texts escaped."""
        escape = html.escape
        if self.healthy:
            body = "<p><b>healthy</b></p>"
        else:
            rows = "".join(
                f"<tr><td><b>{escape(f.title)}</b></td><td>{escape(f.where)}</td>"
                f"<td>{'<br>'.join(escape(str(item)) for item in f.evidence)}</td>"
                f"<td>{escape(f.cause)}</td><td>{escape(f.advice)} <i>{escape(f.source)}</i></td></tr>"
                for f in self.findings
            )
            heads = "".join(f"<th>{name}</th>" for name in ("finding", "where", "evidence", "likely cause", "try"))
            body = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        return f"<div><p>gradlab diagnosis, rules '{escape(self.rules)}'</p>{body}<ul>{notes}</ul></div>"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else f"{value:+}".replace("+", "")
    return value


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _pair(value: Any) -> tuple[int, int] | None:
    return None if value is None else (int(value[0]), int(value[1]))


def _finding(data: dict[str, Any]) -> Finding:
    evidence = tuple(
        Evidence(
            what=str(item["what"]),
            unit=str(item["unit"]),
            threshold=str(item["threshold"]),
            **{name: _number(item[name]) for name in ("value", "low", "high")},
        )
        for item in data["evidence"]
    )
    texts: dict[str, Any] = {name: str(data[name]) for name in ("kind", "axis", "cause", "advice", "source")}
    return Finding(
        layers=tuple(map(str, data["layers"])),
        steps=_pair(data["steps"]),
        timesteps=_pair(data["timesteps"]),
        severity=_number(data["severity"]),
        evidence=evidence,
        **texts,
    )
