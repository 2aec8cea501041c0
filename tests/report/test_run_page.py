"""The page of runs: what is on it, what it says is missing, whose strings it escapes, and where it is written."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gradlab.analysis.claims import Verdict
from gradlab.errors import GradlabError, StoreError, UsageError
from gradlab.report import write_report
from gradlab.report.page import check_target
from gradlab.report.run_page import answer, reproduce_commands
from gradlab.study import Study
from gradlab.sweep.store import Run

Make = Callable[..., Run]


def test_all_parts_are_there_and_the_run_is_only_read(
    make_run: Make, study: Study, read: Any, evil: str, tmp_path: Path
) -> None:
    run = make_run()
    before = sorted(path.relative_to(run.folder) for path in run.folder.rglob("*"))
    page = read(write_report([run], tmp_path / "a.html", studies={"deep": study}))
    assert sorted(path.relative_to(run.folder) for path in run.folder.rglob("*")) == before
    for part in ("Question", "Answer", "Claims", "Explore", "Losses", "Figures", "How to do it again", "Settings",
                 "Environment", "learning rate", "4 done", "104 [", "(12 of 20 rows)"):  # fmt: skip
        assert part in page.text, part
    assert "What is missing" not in page.text
    answered = "Of 3 claims, 1 is reproduced, 1 is not reproduced and 1 is not decided. Not reproduced: C2."
    assert answered in page.text
    assert page.text.count(evil) > 30


def test_no_string_of_a_users_becomes_markup(run_page: Path, read: Any) -> None:
    page = read(run_page)
    assert not [tag for tag, _ in page.tags if tag == "img"]
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    charts = [attributes for tag, attributes in page.tags if attributes.get("class") == "chart"]
    assert len(charts) == 9  # losses; heat map and profile of four cells
    assert len(scripts) == len(charts) + 2  # their data, Vega, and the page's own
    assert all("onerror" not in attributes for _, attributes in page.tags)


def test_the_page_is_one_file(run_page: Path, read: Any) -> None:
    page = read(run_page)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form"), tag
        for name in ("src", "href", "xlink:href", "action", "srcset", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    assert "default-src 'none'" in page.source
    assert "@import" not in page.source
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))


def test_equal_runs_give_equal_pages(make_run: Make, study: Study, tmp_path: Path) -> None:
    run = make_run()
    pages = [write_report([run], tmp_path / f"{name}.html", studies={"deep": study}).read_bytes() for name in "ab"]
    assert pages[0] == pages[1]


# -- what is missing --------------------------------------------------------------------------------------------------


def test_an_unfinished_run_says_which_cells_are_missing(
    make_run: Make, study: Study, read: Any, tmp_path: Path
) -> None:
    run = make_run(finished=2)
    page = read(write_report([run], tmp_path / "a.html", studies={"deep": study}))
    assert "2 of 4 cells are not finished: depth 8" in page.text
    assert "2 planned cells are missing, so this is provisional." in page.text
    assert f"gradlab resume {run.folder}" in page.text


def test_an_empty_run(make_run: Make, study: Study, read: Any, tmp_path: Path) -> None:
    page = read(write_report([make_run(finished=0)], tmp_path / "a.html", studies={"deep": study}))
    assert "No cell of this run is finished" in page.text
    assert "No claim was decided." in page.text
    assert "vegaEmbed=" not in page.source  # without a chart there is no need of it


def test_figures_and_claims_that_fail_are_named(make_run: Make, partly: Study, read: Any, tmp_path: Path) -> None:
    def claims(results: object) -> Sequence[Any]:
        raise KeyError("column")

    study = replace(partly, claims=claims)
    page = read(write_report([make_run()], tmp_path / "a.html", studies={"deep": study}))
    assert "The figure 'never' could not be drawn: It needs a longer run." in page.text
    assert "The figure 'broken' could not be drawn from these tables, which another version may have" in page.text
    assert "The claims could not be decided from these tables" in page.text
    assert "Losses" in page.text


def test_a_run_of_a_study_that_is_not_here(make_run: Make, read: Any, tmp_path: Path) -> None:
    page = read(write_report([make_run()], tmp_path / "a.html", studies={}))
    assert "The study 'deep' is not installed here" in page.text
    assert "Gradient by layer and step" in page.text


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("trace/steps.parquet", "is damaged or not a Parquet file"), ("cell.json", "The cells could not be read")],
    ids=["table", "cell"],
)
def test_damage_is_said(make_run: Make, study: Study, read: Any, tmp_path: Path, name: str, sentence: str) -> None:
    run = make_run()
    (run.cells()[0].folder / name).write_bytes(b"PAR1 no")
    assert sentence in read(write_report([run], tmp_path / "a.html", studies={"deep": study})).text


# -- several runs -----------------------------------------------------------------------------------------------------


def test_several_runs_have_one_table_of_claims(make_run: Make, study: Study, read: Any, tmp_path: Path) -> None:
    runs = [make_run(), make_run(finished=3)]
    page = read(write_report(runs, tmp_path / "a.html", studies={"deep": study}))
    assert "Of 6 claims, 2 are reproduced, 2 are not reproduced and 2 are not decided." in page.text
    assert "All claims" in page.text
    assert [attributes["id"] for tag, attributes in page.tags if tag == "section"] == ["r0", "r1"]
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))


def test_no_run_and_one_run_twice(make_run: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one run"):
        write_report([], tmp_path / "a.html", studies={})
    run = make_run()
    with pytest.raises(UsageError, match="named twice"):
        write_report([run, Run(run.folder)], tmp_path / "a.html", studies={})


# -- words ------------------------------------------------------------------------------------------------------------


def test_the_answer_says_no_more_than_the_verdicts(make_run: Make, study: Study) -> None:
    claims = study.claims(make_run())
    undecided = [replace(claim, verdict=Verdict.NOT_DECIDED) for claim in claims]
    assert answer(undecided) == "All 3 claims are not decided. Not decided: C10, C2, C1."
    assert answer([]) == "No claim was decided."
    assert answer(claims[1:2]) == "The one claim is not reproduced."
    assert "provisional" in answer(claims[:1], unfinished=1)


def test_the_command_names_what_differs_from_the_preset(make_run: Make, study: Study) -> None:
    same = make_run(note="")
    assert reproduce_commands(same, study) == ["gradlab run deep"]
    run = make_run(note="two words", lr=0.5, depth=[3, 4])
    assert reproduce_commands(run, study) == ["gradlab run deep --set depth=3,4 --set 'note=two words' --set lr=0.5"]
    run.manifest["preset"] = "smoke"
    assert reproduce_commands(run, study) == ["gradlab run deep --preset smoke --set depth=3,4 --set 'note=two words'"]
    assert "--set lr=0.5" in reproduce_commands(run, None)[0]


# -- where it goes ----------------------------------------------------------------------------------------------------


def test_an_older_report_gives_way_and_any_other_file_stays(make_run: Make, study: Study, tmp_path: Path) -> None:
    run, path = make_run(finished=1), tmp_path / "a.html"
    write_report([run], path, studies={"deep": study})
    write_report([run], path, studies={})
    assert "not installed here" in path.read_text(encoding="utf-8")
    path.write_text("my thesis")
    with pytest.raises(StoreError, match="no report of gradlab's, so it stays"):
        write_report([run], path, studies={"deep": study})
    assert path.read_text() == "my thesis"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("a.pdf", "is an .html file"), ("none/a.html", "There is no folder"), ("folder.html", "is a folder")],
    ids=["suffix", "no folder", "folder"],
)
def test_places_a_page_cannot_go(tmp_path: Path, name: str, sentence: str) -> None:
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(GradlabError, match=re.escape(sentence)):
        check_target(tmp_path / name)


def test_a_full_disk_leaves_the_older_page(make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, path = make_run(finished=0), tmp_path / "a.html"
    before = write_report([run], path, studies={}).read_bytes()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError, match="No space left on device"):
        write_report([run], path, studies={})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.html", "runs"]


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(StoreError, match="cannot be written to"):
        check_target(tmp_path / "a.html")


@pytest.mark.parametrize(("module", "package"), [("jinja2", "Jinja2"), ("vl_convert", "vl-convert-python")], ids=str)
def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"{package}, which is not installed: pip install 'gradlab\[report\]'"):
        check_target(tmp_path / "a.html")
