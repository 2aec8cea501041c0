"""What the commands print and return where all is well."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import Result

from gradlab.analysis.claims import claims_from_json
from gradlab.catalog import studies
from gradlab.cli import main

Cli = Callable[..., Result]
Shell = Callable[..., subprocess.CompletedProcess[str]]
TOY = ("run", "toy", "--preset", "smoke", "--workers", "0")
ROOT = Path(__file__).parents[2]


# -- help and list ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", *main.commands])
def test_every_command_has_help(cli: Cli, name: str) -> None:
    for flag in ("--help", "-h"):
        result = cli(*([name] if name else []), flag)
        assert result.exit_code == 0
        assert result.stdout.startswith(f"Usage: gradlab {name}".rstrip())
    command = main.commands[name] if name else main
    for option in command.params:
        assert not isinstance(option, click.Option) or option.help, f"{name} {option.name} says nothing"


def test_help_names_the_commands_in_the_order_of_their_use(cli: Cli) -> None:
    lines = [line.split()[0] for line in cli("--help").stdout.partition("Commands:")[2].splitlines() if line.strip()]
    assert lines == [
        "list", "run", "resume", "reproduce", "ls", "show", "claims", "figures", "compare", "report", "rm", "diagnose",
        "bench", "doctor",
    ]  # fmt: skip


def test_the_version_is_that_of_the_package(cli: Cli) -> None:
    assert cli("--version").stdout == "gradlab, version 0.1.0\n"


def test_list_shows_all_experiments(cli: Cli) -> None:
    lines = cli("list").stdout.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == sorted(studies())
    assert lines[lines.index(f"{'toy':<18} Nothing at all") + 1].strip() == "presets: smoke, default"


def test_list_of_one_shows_its_settings_with_defaults_and_choices(cli: Cli) -> None:
    text = cli("list", "toy").stdout
    for part in (
        "value=1,2,3",
        "steps=3",
        "limit=None",
        "norm=batch",
        "One of: batch, none.",
        "smoke",
        "Tests notes N0",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        (["list"], "torch pandas matplotlib scipy numpy"),
        (["list", "depth-sweep"], "torch pandas matplotlib scipy numpy"),
        (["--help"], "torch pandas matplotlib scipy numpy"),
        (["run", "depth-sweep", "--preset", "smok"], "torch matplotlib"),
        (["show", "toy"], "torch matplotlib"),
        (["claims", "toy"], "torch matplotlib"),
    ],
    ids=" ".join,
)
def test_a_command_loads_no_more_than_it_needs(words: list[str], heavy: str, tmp_path: Path) -> None:
    code = f"""
import sys
from gradlab.cli import main
try:
    main({words!r}, prog_name="gradlab")
except SystemExit:
    pass
print(sorted(set({heavy.split()!r}) & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "command", [["-m", "gradlab"], [str(ROOT / "cli.py")]], ids=["python -m gradlab", "python cli.py"]
)
def test_the_command_has_two_more_names(command: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, *command, "list"], capture_output=True, text=True, cwd=tmp_path, check=True, timeout=60
    )
    assert "depth-sweep  " in done.stdout


def test_a_terminal_that_cannot_show_a_letter_is_no_error(cli: Cli, shell: Shell) -> None:
    cli(*TOY)
    done = shell("claims", "toy", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "|x| ? 1" in done.stdout


# -- run, show, claims, figures ---------------------------------------------------------------------------------------


def test_a_run_goes_from_cells_to_claims_and_figures(cli: Cli, tmp_path: Path) -> None:
    result = cli(*TOY, "--set", "note=a=b", "--seeds", "2")
    (folder,) = (tmp_path / "runs" / "toy").iterdir()
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0] == f"Writing to {folder.relative_to(tmp_path)}"
    assert lines[1].startswith("[1/2] work 1 seed 0: done, ")
    assert "1 reproduced, 1 not reproduced, 0 not decided." in lines
    assert "Not drawn: needs-more: the preset smoke measures too little for it." in lines
    assert lines[-1] == f"Figure {folder.relative_to(tmp_path) / 'figures' / 'line.png'}"
    assert json.loads((folder / "manifest.json").read_text())["settings"]["note"] == "a=b"
    assert len(claims_from_json((folder / "claims.json").read_text())) == 2


@pytest.mark.parametrize(
    ("words", "code"),
    [((), 0), (("--strict",), 3), (("--strict", "--set", "flag=yes"), 0)],
    ids=["not strict", "strict", "strict and all reproduced"],
)
def test_strict_asks_for_all_claims(cli: Cli, words: tuple[str, ...], code: int) -> None:
    assert cli(*TOY, *words).exit_code == code
    assert cli("claims", "toy", *words[:1]).exit_code == code


def test_a_failure_outranks_strict(cli: Cli) -> None:
    assert cli(*TOY, "--strict", "--set", "trouble=raise").exit_code == 1


def test_show_tells_what_a_run_did(cli: Cli) -> None:
    cli(*TOY, "--set", "trouble=diverge,data")
    result = cli("show", "toy")
    assert result.exit_code == 0
    for part in ("preset     smoke", "device     cpu", "steps=3", "torch ", "1 missing"):
        assert part in result.stdout
    assert "1 diverged" in result.stdout
    assert "    diverge: the loss was not finite at step 1" in result.stdout


def test_claims_and_figures_come_again_from_the_tables_alone(cli: Cli, tmp_path: Path) -> None:
    cli(*TOY)
    (folder,) = (tmp_path / "runs" / "toy").iterdir()
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in ("claims.json", "figures/line.png", "figures/line.pdf", "figures/line.csv", "figures/README.md"):
        (folder / name).unlink()
    claims = cli("claims", "toy")
    figures = cli("figures", "toy")
    assert (claims.exit_code, figures.exit_code) == (0, 0)
    assert "see [bold]x[/bold]" in claims.stdout  # text is no markup
    assert figures.stdout.splitlines() == [str(folder.relative_to(tmp_path) / "figures" / "line.png")]
    assert len(figures.stderr.splitlines()) == 2
    assert before == {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_draws_the_figures_named(cli: Cli, tmp_path: Path) -> None:
    cli(*TOY)
    assert cli("figures", "toy", "--only", "line").stderr == ""
    result = cli("figures", "toy", "--only", "needs-more")
    assert result.exit_code == 1
    assert result.stderr == "Not drawn: needs-more: the preset smoke measures too little for it.\n"


def test_resume_of_a_complete_run_draws_its_conclusions_again(cli: Cli, tmp_path: Path) -> None:
    cli(*TOY)
    (folder,) = (tmp_path / "runs" / "toy").iterdir()
    result = cli("run", "toy", "--resume", "toy")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Going on with {folder.relative_to(tmp_path)}")
    assert "seed 0: done" not in result.stdout
    assert "1 reproduced, 1 not reproduced, 0 not decided." in result.stdout
    assert list((tmp_path / "runs" / "toy").iterdir()) == [folder]


def test_resume_takes_the_settings_of_the_run(cli: Cli, tmp_path: Path) -> None:
    cli(*TOY, "--set", "rows=7", "--set", "trouble=data")
    result = cli("run", "toy", "--resume", "toy", "--workers", "0")
    assert "1 of 2 cells failed, first data" in result.stderr
    assert "work" not in result.stdout.partition("Claims")[0]


def test_ctrl_c_while_drawing_says_that_all_is_kept(cli: Cli, tmp_path: Path) -> None:
    result = cli(*TOY, "--set", "note=interrupt", "--data-dir", ".")
    (folder,) = (tmp_path / "runs" / "toy").iterdir()
    assert result.exit_code == 130
    assert result.stderr == (
        "gradlab: Stopped. 1 of 1 cells are finished and kept. "
        f"Go on with: gradlab resume {folder.relative_to(tmp_path)} --data-dir .\n"
    )
    assert sorted(path.name for path in (folder / "figures").iterdir()) == ["line.csv", "line.pdf", "line.png"]
    assert cli("figures", "toy").exit_code == 130


def test_a_folder_with_a_space_is_quoted_in_what_to_type(cli: Cli) -> None:
    result = cli(*TOY, "--set", "trouble=data", "--out", "my runs")
    assert "gradlab resume 'my runs/toy/" in result.stderr


# -- doctor -----------------------------------------------------------------------------------------------------------


def test_doctor_finds_nothing_wrong_here(cli: Cli) -> None:
    result = cli("doctor")
    assert result.exit_code == 0, result.stdout
    names = [line.split()[1] for line in result.stdout.splitlines()]
    assert {"python", "torch", "devices", "memory", "data", "out", "temporary"} <= set(names)
    assert {line[:4] for line in result.stdout.splitlines()} == {"ok  "}


def test_doctor_fails_where_something_will_not_work(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = cli("doctor", "--out", "file/runs", "--data-dir", "nowhere")
    failed = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert failed == ["data", "out"]
    assert result.exit_code == 1


def test_run_live_without_a_terminal_is_one_sentence(cli: Callable[..., Result]) -> None:
    result = cli("run", "toy", "--preset", "smoke", "--workers", "0", "--live")
    assert result.exit_code == 0
    assert result.stderr.splitlines()[0] == "gradlab: --live shows nothing here: there is no terminal to draw in."
