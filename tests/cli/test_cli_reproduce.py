"""`gradlab reproduce` and `gradlab figures --check`, with the toy study and one that cannot begin."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from click.testing import Result

from gradlab import catalog
from gradlab.analysis.claims import claims_from_json
from gradlab.errors import DataError
from gradlab.reproduction import counts_table, run_of_preset
from gradlab.study import Preset, Study, parse_settings
from gradlab.sweep.store import Run, all_runs

Cli = Callable[..., Result]
TOY = ("reproduce", "--only", "toy", "--workers", "0")


@pytest.fixture
def known(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> dict[str, Study]:
    """Return the only studies there are, to be changed: the toy."""
    found = {"toy": catalog._registered()["toy"]}
    monkeypatch.setattr(catalog, "studies", lambda: found)
    return found


def with_preset(study: Study, **settings: object) -> Study:
    return dataclasses.replace(study, presets={"default": Preset(summary="", settings=settings)})


def test_a_second_call_runs_nothing_again_and_gives_the_same_files(cli: Cli, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOY_LOG", str(log))
        first = cli(*TOY)
        ran = log.read_text()
        files = {path.name: path.read_bytes() for path in (tmp_path / "runs" / "reproduce-default").iterdir()}
        second = cli(*TOY)
        assert log.read_text() == ran
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert "Finished already: runs" in second.stdout
    assert {path.name: path.read_bytes() for path in (tmp_path / "runs" / "reproduce-default").iterdir()} == files
    assert len(all_runs(tmp_path / "runs")) == 1


def test_the_csv_holds_every_claim_as_it_was_decided(cli: Cli, tmp_path: Path) -> None:
    cli(*TOY)
    (run,) = all_runs(tmp_path / "runs")
    claims = claims_from_json((run / "claims.json").read_text())
    table = pd.read_csv(tmp_path / "runs" / "reproduce-default" / "claims.csv")
    assert list(table["id"]) == [claim.id for claim in claims]
    assert list(table["verdict"]) == [str(claim.verdict) for claim in claims]
    for name in ("measured", "low", "high"):
        expected = pd.Series([getattr(claim, name) for claim in claims], name=name)
        pd.testing.assert_series_equal(table[name], expected, check_dtype=False, rtol=0, atol=0)
    text = (tmp_path / "runs" / "reproduce-default" / "claims.md").read_text()
    for claim in claims:
        statement = claim.statement.replace("|", "\\|")  # a bar would end the cell of the table
        assert f"| {claim.id} | {statement}" in text
    row = counts_table(table).iloc[0]
    assert row.tolist() == ["toy", *(sum(c.verdict == v for c in claims) for v in row.index[1:])]


def test_missing_cells_run_and_finished_ones_do_not(cli: Cli, tmp_path: Path) -> None:
    cli(*TOY)
    (run,) = all_runs(tmp_path / "runs")
    lost = sorted((run / "cells").iterdir())[0]
    for path in sorted(lost.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    lost.rmdir()
    result = cli(*TOY)
    assert result.exit_code == 0
    assert "Going on with runs" in result.stdout
    assert not Run(run).unfinished()
    assert len(all_runs(tmp_path / "runs")) == 1


def test_a_run_with_a_changed_setting_is_not_taken_for_the_preset(cli: Cli, tmp_path: Path) -> None:
    cli("run", "toy", "--workers", "0", "--seeds", "3")
    toy = catalog.find_study("toy")
    assert run_of_preset(toy, "default", parse_settings(toy), tmp_path / "runs") is None
    cli("run", "toy", "--workers", "0")
    found = run_of_preset(toy, "default", parse_settings(toy), tmp_path / "runs")
    assert found is not None
    assert found.settings["seeds"] == 2


def test_one_that_fails_does_not_stop_the_others(cli: Cli, known: dict[str, Study], tmp_path: Path) -> None:
    def no_data(_settings: object, _data_dir: object) -> None:
        raise DataError("The data are not there.")

    toy = known["toy"]
    known["toy"] = with_preset(toy, trouble=("raise",))
    known["absent"] = dataclasses.replace(toy, name="absent", prepare=no_data)
    known["broken"] = dataclasses.replace(toy, name="broken", claims=lambda _results: 1 / 0)
    known["good"] = dataclasses.replace(toy, name="good")
    result = cli("reproduce", "--workers", "0")
    assert result.exit_code == 1
    table = pd.read_csv(tmp_path / "runs" / "reproduce-default" / "claims.csv")
    assert set(table["experiment"]) == {"toy", "good"}
    (run,) = (path for path in all_runs(tmp_path / "runs") if path.parent.name == "toy")
    assert f"toy failed in part; retry with: gradlab resume {run.relative_to(tmp_path)}" in result.stderr
    assert "absent: The data are not there." in result.stderr
    assert "broken: ZeroDivisionError: division by zero This is a bug" in result.stderr
    assert "to run what is missing: gradlab reproduce --preset default --out runs" in result.stderr
    text = (tmp_path / "runs" / "reproduce-default" / "claims.md").read_text()
    assert "- absent: The data are not there." in text
    assert "of 7 cells are not finished" in text


def test_ctrl_c_keeps_all_and_begins_nothing_more(cli: Cli, known: dict[str, Study], tmp_path: Path) -> None:
    def stop(_settings: object, _data_dir: object) -> None:
        raise KeyboardInterrupt

    toy = known.pop("toy")
    known["a"] = dataclasses.replace(toy, name="a")
    known["b"] = dataclasses.replace(toy, name="b", prepare=stop)
    known["c"] = dataclasses.replace(toy, name="c")
    result = cli("reproduce", "--workers", "0")
    assert result.exit_code == 130
    assert "Stopped in b; go on with: gradlab reproduce --preset default --out runs" in result.stderr
    assert "[3/3]" not in result.stdout
    assert set(pd.read_csv(tmp_path / "runs" / "reproduce-default" / "claims.csv")["experiment"]) == {"a"}


def test_strict_tells_of_claims_that_are_not_reproduced(cli: Cli) -> None:
    assert (cli(*TOY).exit_code, cli(*TOY, "--strict").exit_code) == (0, 3)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--only", "tyo"), "Unknown experiment 'tyo'."),
        (("--preset", "defualt"), "Unknown preset 'defualt'. Did you mean 'default'?"),
        (("--data-dir", "nowhere"), "There is no folder nowhere"),
    ],
    ids=["experiment", "preset", "data"],
)
def test_what_does_not_exist_is_told_before_anything_runs(cli: Cli, words: tuple[str, ...], sentence: str) -> None:
    result = cli("reproduce", *words)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert sentence in result.stderr


# -- the gallery ------------------------------------------------------------------------------------------------------


def test_a_published_gallery_agrees_until_a_number_is_changed(cli: Cli, tmp_path: Path) -> None:
    assert cli(*TOY, "--publish", "gallery").exit_code == 0
    check = ("figures", "--check", "--gallery", "gallery")
    assert cli(*check).exit_code == 0
    (path, *_) = sorted((tmp_path / "gallery" / "toy").glob("*.csv"))
    data = pd.read_csv(path)
    number = next(name for name in data if pd.api.types.is_float_dtype(data[name]) or data[name].dtype.kind == "i")
    data[number] = data[number].astype(float)
    data.loc[0, number] += 1e-6 * max(1.0, abs(data.loc[0, number]))
    data.to_csv(path, index=False)
    result = cli(*check)
    assert result.exit_code == 1
    assert f"column '{number}' differs from the CSV" in result.stderr
    readme = tmp_path / "gallery" / "README.md"
    readme.write_text(readme.read_text() + "x")
    assert "is not what the captions give" in cli(*check).stderr


def test_a_folder_that_keeps_no_tables_on_purpose_is_said_and_no_failure(cli: Cli, tmp_path: Path) -> None:
    assert cli(*TOY, "--publish", "gallery").exit_code == 0
    about = tmp_path / "gallery" / "toy" / "about.json"
    shutil.rmtree(about.parent / "tables")
    about.write_text(json.dumps(json.loads(about.read_text()) | {"tables_kept": False}))
    result = cli("figures", "--check", "--gallery", "gallery")
    assert "not checked, its tables are not kept here" in result.stdout
    assert result.exit_code == 0, result.stderr


def test_check_of_no_gallery_and_figures_of_no_run(cli: Cli) -> None:
    result = cli("figures", "--check")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "There is no gallery in figures" in result.stderr
    assert "Say which run" in cli("figures").stderr
    assert "leave out RUN" in cli("figures", "toy", "--check").stderr


def test_reading_a_gallery_needs_no_torch() -> None:
    import subprocess

    code = "import sys, gradlab.gallery, gradlab.reproduction; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
