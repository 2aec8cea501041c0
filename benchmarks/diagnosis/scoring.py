"""What rules make of the zoo: precision, recall, false alarms and the confusion table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final, get_args

from rich.console import Console
from rich.table import Table

from gradlab.analysis.diagnosis import OWN_RULES, diagnose
from gradlab.analysis.finding import KINDS
from gradlab.analysis.published_rules import RULES
from gradlab.benchmarks.diagnosis.case import Case, Label
from gradlab.benchmarks.diagnosis.labels import named_by
from gradlab.benchmarks.diagnosis.zoo import cases, record
from gradlab.errors import unknown

if TYPE_CHECKING:
    from gradlab.analysis.finding import Diagnosis
    from gradlab.trace import Trace

__all__ = ["Outcome", "Score", "check_rules", "print_scores", "score", "scores", "to_json"]

_LABELS: tuple[str, ...] = get_args(Label)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one rule set said of one case.

    Args:
        name: Of the case.
        family: Of the case.
        label: Of the case.
        axis: Of the case.
        said: Kind of the leading finding, or "healthy".
        said_axis: Its axis.
        named: Whether it names a place that the case asks for; True where it asks for none.
    """

    name: str
    family: str
    label: str
    axis: str
    said: str
    said_axis: str
    named: bool

    @property
    def right(self) -> bool:
        """Whether the leading finding's kind is the label, and its axis time exactly where the label's is."""
        through_time = self.said_axis == "time"
        return self.said == self.label and (self.label == "healthy" or through_time == (self.axis == "time"))


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The outcomes of one rule set over one split.

    Args:
        rules: Name of the rule set.
        split: Name of the split.
        outcomes: One a case.
    """

    rules: str
    split: str
    outcomes: tuple[Outcome, ...]

    @property
    def sick(self) -> tuple[Outcome, ...]:
        """The outcomes of the cases that are not healthy."""
        return tuple(outcome for outcome in self.outcomes if outcome.label != "healthy")

    @property
    def healthy(self) -> tuple[Outcome, ...]:
        """The outcomes of the healthy cases."""
        return tuple(outcome for outcome in self.outcomes if outcome.label == "healthy")

    @property
    def found(self) -> int:
        """How many sick cases were recognized as what they are."""
        return sum(outcome.right for outcome in self.sick)

    @property
    def recall(self) -> float:
        """Share of the sick cases recognized as what they are; NaN without any."""
        return self.found / len(self.sick) if self.sick else float("nan")

    @property
    def precision(self) -> float:
        """Share of the verdicts other than "healthy" that are right; NaN if there are none."""
        verdicts = sum(outcome.said != "healthy" for outcome in self.outcomes)
        return self.found / verdicts if verdicts else float("nan")

    @property
    def false_alarms(self) -> tuple[str, ...]:
        """Healthy cases in which something was found."""
        return tuple(outcome.name for outcome in self.healthy if outcome.said != "healthy")

    @property
    def named(self) -> float:
        """Share of the sick cases recognized whose finding names the right place; NaN if there are none."""
        right = [outcome for outcome in self.sick if outcome.right]
        return sum(outcome.named for outcome in right) / len(right) if right else float("nan")

    def confusion(self) -> dict[str, Counter[str]]:
        """Return label -> how often each kind was said; "vanishing, time" and the like stand for themselves."""
        table: dict[str, Counter[str]] = {}
        for outcome in self.outcomes:
            through_time = outcome.label != "healthy" and outcome.axis == "time"
            row = f"{outcome.label}, time" if through_time else outcome.label
            said = f"{outcome.said}, time" if outcome.said_axis == "time" else outcome.said
            table.setdefault(row, Counter())[said] += 1
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        numbers = {"precision": self.precision, "recall": self.recall, "named": self.named}
        return {
            "rules": self.rules,
            "split": self.split,
            "healthy": len(self.healthy),
            "sick": len(self.sick),
            **{name: None if value != value else value for name, value in numbers.items()},
            "false_alarms": list(self.false_alarms),
            "confusion": {label: dict(said) for label, said in self.confusion().items()},
            "wrong": [
                {"case": o.name, "label": o.label, "axis": o.axis, "said": o.said, "said_axis": o.said_axis}
                for o in self.outcomes
                if not o.right
            ],
        }


def check_rules(rules: Sequence[str] = ()) -> list[str]:
    """Return the names of rule sets, each once: all of them, gradlab's own first, if none are given.

    Raises:
        UsageError: No such rules.

    Example:
        >>> check_rules()[:2], check_rules(["olmo", "olmo"])
        (['gradlab', 'autotrainer'], ['olmo'])
    """
    known = [OWN_RULES, *RULES]
    for name in rules:
        if name not in known:
            raise unknown("rules", name, known)
    return list(dict.fromkeys(rules)) or known


def score(
    rules: str, split: str = "all", *, traces: Mapping[str, Trace] | None = None, tell: Callable[[str], object] = str
) -> Score:
    """Run the cases of a split and diagnose each by a rule set.

    Args:
        rules: "gradlab" or the name of a published rule set.
        split: "all", "tune" or "held-out".
        traces: Name of each case -> its trace, where the cases have been run already.
        tell: Called with the name of each case that is run.

    Raises:
        UsageError: No such rules or split.
    """
    return scores([rules], split, traces=traces, tell=tell)[0]


def scores(
    rules: Sequence[str],
    split: str = "all",
    *,
    traces: Mapping[str, Trace] | None = None,
    tell: Callable[[str], object] = str,
) -> list[Score]:
    """Return the score of each of several rule sets; every case is run once."""
    rules = check_rules(rules)
    outcomes: list[list[Outcome]] = [[] for _ in rules]
    for case in cases(split):
        tell(case.name)
        trace = record(case) if traces is None else traces[case.name]
        for own, name in zip(outcomes, rules, strict=True):
            own.append(_outcome(case, diagnose(trace, rules=name)))
    return [Score(rules=name, split=split, outcomes=tuple(own)) for name, own in zip(rules, outcomes, strict=True)]


def _outcome(case: Case, found: Diagnosis) -> Outcome:
    leading = found.leading
    return Outcome(
        name=case.name, family=case.family, label=case.label, axis=case.axis,
        said="healthy" if leading is None else leading.kind, said_axis="" if leading is None else leading.axis,
        named=not case.places or (leading is not None and named_by(case.places, leading.layers)),
    )  # fmt: skip


def print_scores(found: Sequence[Score], console: Console, *, confusion: Sequence[str] = ("gradlab",)) -> None:
    """Print a table of scores, and the confusion table and the wrong cases of some rule sets."""
    table = Table(title=_title(found))
    for name in ("rules", "precision", "recall", "place named", "false alarms", "right of all"):
        table.add_column(name, justify="left" if name == "rules" else "right")
    for one in found:
        right = sum(outcome.right for outcome in one.outcomes)
        table.add_row(
            one.rules, _share(one.precision), f"{_share(one.recall)} ({one.found}/{len(one.sick)})", _share(one.named),
            f"{len(one.false_alarms)}/{len(one.healthy)}", f"{right}/{len(one.outcomes)}",
        )  # fmt: skip
    console.print(table)
    for one in found:
        if one.rules in confusion:
            console.print(_confusion_table(one))
            for outcome in one.outcomes:
                if not outcome.right:
                    truth, said = (", ".join(filter(None, p)) for p in _pairs(outcome))
                    console.print(f"{outcome.name}: is {truth}; said {said}", markup=False, highlight=False)


def _pairs(outcome: Outcome) -> tuple[tuple[str, str], tuple[str, str]]:
    return (outcome.label, outcome.axis), (outcome.said, outcome.said_axis)


def _title(found: Sequence[Score]) -> str:
    if not found:
        return "no rules"
    first = found[0]
    return f"{len(first.outcomes)} nets, split '{first.split}': {len(first.sick)} sick, {len(first.healthy)} healthy"


def _share(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"


def _confusion_table(one: Score) -> Table:
    rows = one.confusion()
    said = {kind for counts in rows.values() for kind in counts}
    order = [name for kind in ("healthy", *KINDS) for name in (kind, f"{kind}, time") if name in said | rows.keys()]
    table = Table(title=f"'{one.rules}': what is (rows), what was said (columns)")
    table.add_column("")
    for name in order:
        table.add_column(name, justify="right")
    for label in order:
        if label in rows:
            table.add_row(label, *(str(rows[label][name] or "") for name in order))
    return table


def to_json(found: Sequence[Score]) -> str:
    """Return scores as JSON text."""
    return json.dumps([one.to_dict() for one in found], indent=2)
