"""Commands about runs: going on with the latest, listing, comparing and deleting them; limits and engines of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gradlab.cli import main
from gradlab.sweep.lock import hold_run
from gradlab.sweep.store import Run, all_runs

Cli = Callable[..., Result]
TOY = ("run", "toy", "--workers", "0", "--set", "value=1,2", "--seeds", "2")


def runs(tmp_path: Path) -> list[Path]:
    return all_runs(tmp_path / "runs")


# -- resume -----------------------------------------------------------------------------------------------------------


def test_resume_alone_goes_on_with_the_run_begun_last(cli: Cli, tmp_path: Path) -> None:
    assert cli(*TOY, "--set", "trouble=raise").exit_code == 1
    assert cli(*TOY, "--set", "trouble=data").exit_code == 1
    result = cli("resume", "--workers", "0")
    first, second = runs(tmp_path)
    assert f"Going on with {second.relative_to(tmp_path)}" in result.stdout
    assert "The data are damaged." in result.stderr  # its one cell that is missing
    assert "gradlab resume" in result.stderr
    again = cli("resume", str(first), "--workers", "0")
    assert "ValueError" in again.stderr


def test_resume_where_there_is_nothing(cli: Cli) -> None:
    result = cli("resume")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "There is no run under runs" in result.stderr


# -- ls ---------------------------------------------------------------------------------------------------------------


def test_ls_says_what_is_finished(cli: Cli, tmp_path: Path) -> None:
    cli(*TOY)
    cli(*TOY, "--set", "trouble=raise")
    whole, half = runs(tmp_path)
    lines = cli("ls").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [str(path.relative_to(tmp_path)) for path in (whole, half)]
    assert lines[0].endswith("finished")
    assert lines[1].endswith("4 of 5 cells")
    (half / "manifest.json").write_text("{")
    assert "damaged: " in cli("ls", "toy").stdout.splitlines()[1]


def test_ls_of_nothing_and_of_a_misspelt_study(cli: Cli) -> None:
    assert "There is no run under runs" in cli("ls").stderr
    cli(*TOY)
    result = cli("ls", "tyo")
    assert (result.exit_code, result.stderr) == (2, "gradlab: Unknown study with runs 'tyo'. Did you mean 'toy'?\n")


# -- compare ----------------------------------------------------------------------------------------------------------


def test_compare_shows_settings_claims_and_losses_side_by_side(cli: Cli, tmp_path: Path) -> None:
    cli(*TOY)
    cli(*TOY, "--set", "steps=5", "--set", "flag=true")
    first, second = (str(path) for path in runs(tmp_path))
    result = cli("compare", first, second, "--figure", "both.png")
    assert result.exit_code == 0
    assert "steps: 3 | 5" in result.stdout
    assert "not reproduced | -" in result.stdout  # the second run has no claim T2
    assert "1 verdicts differ" in result.stdout
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("nowhere", "toy"), "Unknown run 'nowhere'"),
        (("toy", "toy", "--figure", "a.gif"), "A figure is .png, .pdf or .svg; got '.gif'."),
    ],
    ids=["no run", "kind of file"],
)
def test_compare_wrong_words(cli: Cli, words: tuple[str, ...], sentence: str) -> None:
    cli(*TOY)
    result = cli("compare", *words)
    assert result.exit_code in (1, 2)
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


# -- rm ---------------------------------------------------------------------------------------------------------------


def ask(*words: str, answer: str) -> Result:
    return CliRunner().invoke(main, ["rm", *words], input=answer, prog_name="gradlab")


def test_rm_asks_first(cli: Cli, tmp_path: Path) -> None:
    cli(*TOY)
    (folder,) = runs(tmp_path)
    kept = ask(str(folder), answer="n\n")
    assert "4 of 4 cells finished" in kept.stdout
    assert "Nothing was deleted." in kept.stdout
    assert folder.exists()
    assert f"Deleted {folder}" in ask(str(folder), answer="y\n").stdout
    assert list(folder.parent.iterdir()) == []


def test_rm_never_takes_a_studys_name_for_its_latest_run(cli: Cli, tmp_path: Path) -> None:
    cli(*TOY)
    result = cli("rm", "toy", "--yes")
    assert result.exit_code == 1
    assert "Unknown run 'toy'" in result.stderr
    assert len(runs(tmp_path)) == 1
    assert cli("rm", f"toy/{runs(tmp_path)[0].name}", "--yes").exit_code == 0
    assert runs(tmp_path) == []


def test_rm_leaves_a_run_that_is_being_worked_on(cli: Cli, tmp_path: Path) -> None:
    cli(*TOY)
    (folder,) = runs(tmp_path)
    with hold_run(folder):
        result = cli("rm", str(folder), "--yes")
    assert result.exit_code == 2
    assert "Another gradlab works on" in result.stderr
    assert len(Run(folder).cells()) == 4


# -- limits and engines -----------------------------------------------------------------------------------------------


def test_a_limit_ends_a_cell_that_hangs(cli: Cli) -> None:
    result = cli(*TOY, "--set", "trouble=hang", "--limit", "1")
    assert result.exit_code == 1
    assert "hang: It ran past its limit of 1 s" in result.stderr
    assert "4 are finished and kept" in result.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--address", "auto"), "--address names a Ray cluster: add --engine ray."),
        (("--limit", "-1"), "Invalid value for '--limit'"),
        (("--engine", "slurm"), "Invalid value for '--engine'"),
    ],
    ids=["address alone", "limit", "engine"],
)
def test_wrong_options_of_a_run(cli: Cli, tmp_path: Path, words: tuple[str, ...], sentence: str) -> None:
    result = cli(*TOY, *words)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert not (tmp_path / "runs").exists()
