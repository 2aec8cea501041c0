"""Bad input: one sentence on stderr that names the nearest valid name, and the exit code; never a traceback."""

from __future__ import annotations

import errno
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from click.testing import Result

from gradlab.storage import write_table

Cli = Callable[..., Result]
TOY = ("run", "toy", "--preset", "smoke", "--workers", "0")


def one_sentence(result: Result) -> str:
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("gradlab: ")
    assert "Traceback" not in result.output
    return lines[0].removeprefix("gradlab: ")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["runn", "toy"], "Unknown command 'runn'. Did you mean 'run'? 'gradlab --help' shows all."),
        (["run", "depth-sweeep"], "Unknown experiment 'depth-sweeep'. Did you mean 'depth-sweep'? 'gradlab list' "),
        (["list", "tooy"], "Unknown experiment 'tooy'. Did you mean 'toy'?"),
        (["run", "toy", "--preset", "smok"], "Unknown preset 'smok'. Did you mean 'smoke'?"),
        ([*TOY, "--set", "step=3"], "Unknown setting 'step'. Did you mean 'steps'? 'gradlab list toy' shows all."),
        ([*TOY, "--set", "steps"], "--set takes KEY=VALUE; got 'steps'."),
        ([*TOY, "--set", "steps=many"], "Setting 'steps' takes a whole number; got 'many'."),
        ([*TOY, "--set", "norm=bach"], "Unknown norm value 'bach'. Did you mean 'batch'?"),
        ([*TOY, "--set", "shift=inf"], "Setting 'shift' takes a finite number; got 'inf'."),
        ([*TOY, "--seeds", "0"], "Setting 'seeds' must be at least 1; got 0."),
        ([*TOY, "--seeds", "2", "--set", "seeds=3"], "Setting 'seeds' is given twice"),
        ([*TOY, "--device", "gpu"], "Unknown device 'gpu'."),
        ([*TOY, "--device", "cuda:77"], "Device 'cuda:77' is not available: torch sees "),
        ([*TOY, "--data-dir", "nowhere"], "There is no folder nowhere: --data-dir takes the one that holds"),
        ([*TOY, "--resume", "x"], "--resume goes on with a run's own settings: leave out --preset, --set and --seeds."),
        (["run", "depth-sweep", "--set", "task=cifar11"], "Unknown task value 'cifar11'. Did you mean 'cifar10'?"),
        (["run", "depth-sweep", "--set", "depth=8,9"], "Setting 'depth' takes depths 6k+2; got 9"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_makes_no_sense_is_said_and_nothing_is_written(
    cli: Cli, tmp_path: Path, words: list[str], sentence: str
) -> None:
    result = cli(*words)
    assert one_sentence(result).startswith(sentence)
    assert result.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["run"], "Missing argument 'NAME'"),
        (["show"], "Missing argument 'RUN'"),
        (["run", "toy", "--sed", "3"], "Did you mean one of: '--preset', '--seeds', '--set'?"),
        (["run", "toy", "--workers", "-1"], "Invalid value for '--workers'"),
        (["run", "toy", "--workers", "two"], "Invalid value for '--workers'"),
        (["run", "toy", "--seeds", "x"], "Invalid value for '--seeds'"),
        (["run", "toy", "extra"], "unexpected extra argument"),
        (["--nonsense"], "No such option"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_click_refuses_has_its_exit_code_too(cli: Cli, words: list[str], part: str) -> None:
    result = cli(*words)
    assert result.exit_code == 2
    assert part.lower() in result.stderr.lower()
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["show", "claims", "figures"])
def test_reading_nothing_is_one_sentence(cli: Cli, command: str) -> None:
    result = cli(command, "toy")
    assert one_sentence(result) == "There is no run at toy: 'gradlab run depth-sweep' makes one under runs."
    assert result.exit_code == 1


@pytest.mark.parametrize("command", ["show", "claims", "figures", "run"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", "{"),
        ("manifest.json", "[]"),
        ("manifest.json", '{"format": "gradlab run", "run_version": 99}'),
        ("cell.json", "{}"),
        ("cell.json", ""),
    ],
    ids=["no JSON", "no object", "newer", "cell without entries", "empty cell"],
)
def test_a_corrupt_run_is_one_sentence(cli: Cli, tmp_path: Path, command: str, name: str, content: str) -> None:
    assert cli(*TOY).exit_code == 0
    next((tmp_path / "runs").rglob(name)).write_text(content)
    result = cli("run", "toy", "--resume", "toy", "--workers", "0") if command == "run" else cli(command, "toy")
    if command == "run" and name == "cell.json":  # a damaged cell runs again
        assert result.exit_code == 0
        assert "was damaged: it runs again, and what was left of it is in runs/toy/" in result.stdout
        return
    one_sentence(result)
    assert result.exit_code == 1


@pytest.mark.parametrize("command", ["claims", "figures"])
def test_a_corrupt_table_is_one_sentence(cli: Cli, tmp_path: Path, command: str) -> None:
    assert cli(*TOY).exit_code == 0
    next((tmp_path / "runs").rglob("numbers.parquet")).write_bytes(b"PAR1 no")
    result = cli(command, "toy")
    assert one_sentence(result).endswith("is damaged or not a Parquet file.")
    assert result.exit_code == 1


def test_a_manifest_with_odd_entries_is_still_shown(cli: Cli, tmp_path: Path) -> None:
    assert cli(*TOY).exit_code == 0
    path = next((tmp_path / "runs").rglob("manifest.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"environment": {"versions": 3}}))
    assert cli("show", "toy").exit_code == 0


def test_settings_damaged_in_the_manifest_stop_a_resume(cli: Cli, tmp_path: Path) -> None:
    assert cli(*TOY).exit_code == 0
    path = next((tmp_path / "runs").rglob("manifest.json"))
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"settings": content["settings"] | {"steps": "x"}}))
    result = cli("run", "toy", "--resume", "toy")
    assert one_sentence(result) == "The run's manifest is damaged: setting 'steps' cannot be 'x'."
    assert result.exit_code == 1


def test_a_run_of_another_study_is_not_gone_on_with(cli: Cli) -> None:
    assert cli(*TOY).exit_code == 0
    result = cli("run", "depth-sweep", "--resume", "toy")
    assert one_sentence(result).endswith("is a run of 'toy', not of 'depth-sweep'.")
    assert result.exit_code == 2


def test_a_misspelt_run_names_the_nearest(cli: Cli) -> None:
    assert cli(*TOY).exit_code == 0
    assert one_sentence(cli("show", "tooy")) == "Unknown run 'tooy'. Did you mean 'toy'?"


def test_an_unknown_figure_names_the_nearest(cli: Cli) -> None:
    assert cli(*TOY).exit_code == 0
    result = cli("figures", "toy", "--only", "lines")
    assert one_sentence(result) == "Unknown figure 'lines'. Did you mean 'line'?"
    assert result.exit_code == 2


def test_a_run_of_an_experiment_that_is_gone_can_be_shown(cli: Cli, tmp_path: Path) -> None:
    assert cli(*TOY).exit_code == 0
    path = next((tmp_path / "runs").rglob("manifest.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"study": "toi"}))
    assert cli("show", "toy").exit_code == 0
    result = cli("claims", "toy")
    assert one_sentence(result).startswith("Unknown experiment 'toi'. Did you mean 'toy'?")
    assert result.exit_code == 2


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/nothing"])
def test_a_folder_that_cannot_be_written_is_one_sentence(cli: Cli, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("in the place of a folder")
    result = cli(*TOY, "--out", out)
    assert one_sentence(result).startswith(f"Cannot write {out}")
    assert result.exit_code == 1
    assert (tmp_path / "file").read_text() == "in the place of a folder"


def test_failed_cells_are_told_with_how_to_go_on(cli: Cli, tmp_path: Path) -> None:
    result = cli(*TOY, "--set", "trouble=data,resource")
    sentence = one_sentence(result)
    folder = next((tmp_path / "runs" / "toy").iterdir()).relative_to(tmp_path)
    assert sentence == (
        "2 of 3 cells failed, first data: The data are damaged. 1 is finished and kept; to run the others: "
        f"gradlab resume {folder}"
    )
    assert result.exit_code == 1
    assert "Decided without 2 of 3 cells" in result.stdout


def test_a_failure_is_told_even_where_nothing_can_be_concluded(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the KeyError of the claims, which need the part that failed, came instead of what had failed."""
    toy_study = importlib.import_module("toy_study")
    monkeypatch.setattr(toy_study, "work", lambda *_: toy_study.trouble("data"))
    result = cli(*TOY, "--set", "trouble=diverge")
    first, second = result.stderr.splitlines()
    assert first.startswith("gradlab: The claims cannot be decided: 1 of 2 cells of ")
    assert second.startswith("gradlab: 1 of 2 cells failed, first work 1 seed 0: The data are damaged. 1 is ")
    assert result.exit_code == 1


def test_a_full_disk_says_so_and_draws_no_conclusion(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradlab.sweep import store

    def full(frame: pd.DataFrame, path: Path) -> None:
        if len(list(path.parents[2].iterdir())) > 1:  # the second cell
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_table(frame, path)

    monkeypatch.setattr(store, "write_table", full)
    result = cli("run", "toy", "--workers", "0")
    sentence = one_sentence(result)
    assert "No space left on device. Free some space or choose another folder. 1 is finished" in sentence
    assert result.exit_code == 1
    assert "Claims" not in result.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_output_is_one_sentence() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "gradlab", "list"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "gradlab: The system says: No space left on device.\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m gradlab list depth-sweep | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""
