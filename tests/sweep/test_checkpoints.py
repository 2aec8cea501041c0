"""A cell that trains goes on where it was broken off, whatever broke it off, and its tables do not show it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from gradlab.sweep.driver import SweepReport
from gradlab.sweep.store import Run

Start = Callable[..., Run]
Go = Callable[..., SweepReport]
WORDS = ("value=1", "seeds=1", "train=30")
TABLES = ("losses", "numbers", "layers", "units", "params", "batchnorm")


@pytest.fixture
def calm(start: Start, go: Go) -> Run:
    """A run that nothing disturbed."""
    run = start(*WORDS)
    go(run, *WORDS)
    return run


def assert_same(run: Run, calm: Run) -> None:
    for name in TABLES:
        one, other = Run(run.folder).table(name), Run(calm.folder).table(name)
        assert len(one), name
        told_apart = ["pace", "cell"]  # the one that was broken off took its time, which is a setting
        pd.testing.assert_frame_equal(one.drop(columns=told_apart), other.drop(columns=told_apart), check_exact=True)


def message(report: SweepReport) -> str:
    return next(outcome.message for outcome in report.outcomes if outcome.cell.part == "train")


def kept_states(run: Run) -> list[Path]:
    return sorted((run.folder / "checkpoints").rglob("*.pt"))


def broken_off(start: Start, toy: Any, tmp_path: Path, *, after: float = 0.6) -> Run:
    """Return a run whose driver was killed while its long cell trained."""
    words = (*WORDS, "pace=0.05")
    run = start(*words)
    script = (
        "import io, sys\nfrom pathlib import Path\nfrom rich.console import Console\n"
        f"sys.path.insert(0, {str(Path(toy.__file__).parent)!r})\nimport toy_study as toy\n"
        "from gradlab.study import parse_settings\nfrom gradlab.sweep.driver import sweep\n"
        "from gradlab.sweep.store import Run\n"
        f"settings = parse_settings(toy.STUDY, 'default', {words!r})\n"
        f"sweep(toy.STUDY, settings, Run(Path({str(run.folder)!r})), device='cpu', workers=0, data_dir=None,\n"
        "      console=Console(file=io.StringIO()), checkpoint_every=0.2)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while not kept_states(run) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(after)
    driver.kill()
    driver.wait()
    assert kept_states(run)
    assert not run.cells()
    return run


def test_a_killed_cell_goes_on_bit_for_bit(start: Start, go: Go, toy: Any, calm: Run, tmp_path: Path) -> None:
    run = broken_off(start, toy, tmp_path)
    report = go(run, *WORDS, "pace=0.05")
    assert report.failed == []
    assert message(report).startswith("Went on from step ")
    assert int(message(report).removeprefix("Went on from step ").rstrip(".")) >= 3
    assert_same(run, calm)
    assert not kept_states(run)


def test_a_damaged_checkpoint_costs_its_cell_only(start: Start, go: Go, toy: Any, calm: Run, tmp_path: Path) -> None:
    run = broken_off(start, toy, tmp_path, after=0.0)
    (path,) = kept_states(run)
    path.write_bytes(path.read_bytes()[:-7])
    report = go(run, *WORDS, "pace=0.05")
    assert message(report) == f"The checkpoint {path} is damaged: training began anew."
    assert_same(run, calm)


def test_a_cell_past_its_limit_gets_on_with_each_attempt(start: Start, go: Go, calm: Run) -> None:
    words = (*WORDS, "pace=0.04")
    run = start(*words)
    how = {"limit": 0.9, "checkpoint_every": 0.1}
    attempts, said = 0, ""
    while attempts < 12:
        report = go(run, *words, **how)
        attempts += 1
        if not report.failed:
            said = message(report)
            break
        assert "past its limit" in report.failed[0].message
    assert attempts > 1
    assert said.startswith("Went on from step ")
    assert_same(run, calm)


def test_what_is_left_of_a_cell_that_was_stored_goes(start: Start, go: Go, calm: Run) -> None:
    (key,) = [cell.key for cell in calm.cells() if cell.part == "train"]
    left = calm.folder / "checkpoints" / key / "0.pt"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of a process that died between storing and tidying")
    go(calm, *WORDS)
    assert not left.exists()


def test_no_checkpoint_is_kept_where_none_is_wanted(start: Start, go: Go, calm: Run, tmp_path: Path) -> None:
    run = start(*WORDS)
    go(run, *WORDS, checkpoint_every=0)
    assert not (run.folder / "checkpoints").exists()
    assert_same(run, calm)


def test_checkpoints_of_other_code_are_not_gone_on_with(
    start: Start, go: Go, toy: Any, calm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = broken_off(start, toy, tmp_path, after=0.0)
    monkeypatch.setattr("gradlab.sweep.cell_run._code", lambda _: 1)
    report = go(run, *WORDS, "pace=0.05")
    assert "is of another run (identity is not the same): training began anew." in message(report)
    assert_same(run, calm)
