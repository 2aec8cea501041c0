"""Scores by hand: precision, recall, confusion; and the whole way from the command line."""

from __future__ import annotations

import io
import json
import math

import pytest
from click.testing import CliRunner
from rich.console import Console

from gradlab.analysis.finding import Diagnosis, Finding
from gradlab.benchmarks.diagnosis import scoring
from gradlab.benchmarks.diagnosis.scoring import Outcome, Score, check_rules, print_scores, score, scores
from gradlab.benchmarks.diagnosis.zoo import cases, find_case, record
from gradlab.cli import main
from gradlab.errors import UsageError


def outcome(label: str, said: str, *, axis: str = "", said_axis: str = "", named: bool = True) -> Outcome:
    name = f"{label}-{axis}-{said}-{said_axis}"
    return Outcome(name=name, family="toy", label=label, axis=axis, said=said, said_axis=said_axis, named=named)


TOY = Score(
    rules="toy",
    split="all",
    outcomes=(
        outcome("healthy", "healthy"),
        outcome("healthy", "dead"),
        outcome("vanishing", "vanishing", axis="depth", said_axis="depth"),
        outcome("vanishing", "vanishing", axis="time", said_axis="depth"),
        outcome("vanishing", "vanishing", axis="time", said_axis="time", named=False),
        outcome("exploding", "healthy", axis="training"),
        outcome("exploding", "exploding", axis="training"),
        outcome("dead", "frozen"),
    ),
)


def test_precision_recall_and_places_by_hand() -> None:
    assert TOY.found == 3
    assert TOY.recall == 3 / 6
    assert TOY.precision == 3 / 6  # of eight verdicts two say healthy
    assert TOY.named == 2 / 3
    assert TOY.false_alarms == ("healthy--dead-",)


def test_a_finding_through_time_is_wrong_where_the_label_is_about_depth() -> None:
    assert not outcome("vanishing", "vanishing", axis="depth", said_axis="time").right
    assert outcome("exploding", "exploding", axis="training", said_axis="depth").right


def test_scores_without_verdicts_are_not_numbers_and_null_in_json() -> None:
    silent = Score(rules="silent", split="all", outcomes=(outcome("healthy", "healthy"),))
    assert math.isnan(silent.precision)
    assert math.isnan(silent.recall)
    assert json.loads(scoring.to_json([silent]))[0]["precision"] is None


def test_confusion_table_has_time_by_itself() -> None:
    table = TOY.confusion()
    assert table["vanishing, time"] == {"vanishing": 1, "vanishing, time": 1}
    assert table["healthy"] == {"healthy": 1, "dead": 1}


def test_printed_tables_say_what_the_score_says() -> None:
    text = io.StringIO()
    print_scores([TOY], Console(file=text, width=140), confusion=["toy"])
    lines = text.getvalue()
    assert "8 nets, split 'all': 6 sick, 2 healthy" in lines
    assert "0.500 (3/6)" in lines
    assert "1/2" in lines
    assert "dead--frozen-: is dead; said frozen" in lines


def test_place_of_a_finding_is_compared_with_what_the_case_asks_for() -> None:
    case = find_case("mlp-dead-bias-one-layer")
    for layers, named in ((("act3",), True), (("act1",), False)):
        found = Diagnosis(findings=(Finding(kind="dead", layers=layers),))
        assert scoring._outcome(case, found).named is named


def test_each_case_is_run_once_for_all_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    few = tuple(case for case in cases("tune") if case.name in ("mlp-he-relu-8", "mlp-default-relu-20", "mlp-clipped"))
    few = few or cases("tune")[:2]
    runs: list[str] = []
    monkeypatch.setattr(scoring, "cases", lambda _: few)
    monkeypatch.setattr(scoring, "record", lambda case: runs.append(case.name) or record(case))
    found = scores(["torchlens", "olmo"], "tune")
    assert runs == [case.name for case in few]
    assert [one.rules for one in found] == ["torchlens", "olmo"]
    traces = {case.name: record(case) for case in few}
    assert score("torchlens", "tune", traces=traces) == found[0]


def test_unknown_rules_are_refused_before_anything_runs() -> None:
    with pytest.raises(UsageError, match=r"Unknown rules 'autotrain'. Did you mean 'autotrainer'"):
        check_rules(["autotrain"])


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "cases", lambda split: (find_case("mlp-sigmoid-1"), find_case("nonfinite-exp")))


@pytest.mark.usefixtures("tiny_zoo")
def test_command_prints_scores_of_the_rules_asked_for() -> None:
    done = CliRunner().invoke(main, ["bench", "diagnosis", "--rules", "torchlens", "--rules", "olmo", "--split", "all"])
    assert done.exit_code == 0, done.output
    assert "torchlens" in done.output
    assert "olmo" in done.output
    assert "gradlab" not in done.output
    assert "nonfinite-exp: is nonfinite; said exploding" in done.output


@pytest.mark.usefixtures("tiny_zoo")
def test_command_prints_json_for_all_rules_by_default() -> None:
    done = CliRunner().invoke(main, ["bench", "diagnosis", "--json"])
    assert done.exit_code == 0, done.output
    assert [one["rules"] for one in json.loads(done.output)] == check_rules()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rules", "gradlib"], "Unknown rules 'gradlib'. Did you mean 'gradlab'?"),
        (["--split", "xyz"], "Unknown split 'xyz'. Allowed: all, tune, held-out."),
    ],
    ids=["rules", "split"],
)
def test_command_refuses_unknown_names_in_one_sentence(words: list[str], sentence: str) -> None:
    done = CliRunner().invoke(main, ["bench", "diagnosis", *words])
    assert done.exit_code == 2
    assert done.output == f"gradlab: {sentence}\n"
