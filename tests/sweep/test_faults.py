"""What may happen to a run on one machine: two drivers, damage on the disk, hanging cells, kill -9 at any moment."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from gradlab.errors import StoreError, UsageError
from gradlab.sweep import engine, store
from gradlab.sweep.driver import SweepReport
from gradlab.sweep.lock import hold_run
from gradlab.sweep.store import Run

Start = Callable[..., Run]
Go = Callable[..., SweepReport]
SMALL = ("value=1,2", "seeds=1")


# -- two drivers ------------------------------------------------------------------------------------------------------


def test_a_second_driver_is_told_who_works_on_the_run(start: Start, go: Go) -> None:
    run = start(*SMALL)
    with (
        hold_run(run.folder),
        pytest.raises(UsageError, match=rf"Another gradlab works on .* \(process {os.getpid()} on"),
    ):
        go(run, *SMALL)
    assert go(run, *SMALL).failed == []
    assert not (run.folder / ".owner.json").exists()


@pytest.mark.parametrize("left", ["", "[1]", '{"process": "x"}', None], ids=["empty", "list", "no number", "no file"])
def test_an_owner_that_cannot_be_read_is_no_error(start: Start, left: str | None) -> None:
    folder = start(*SMALL).folder
    with hold_run(folder):
        if left is None:
            (folder / ".owner.json").unlink()
        else:
            (folder / ".owner.json").write_text(left)
        with pytest.raises(UsageError, match="which left no name"), hold_run(folder):
            pass


def test_the_lock_goes_with_its_process(start: Start, go: Go) -> None:
    run = start(*SMALL)
    code = "from gradlab.sweep.lock import hold_run\nfrom pathlib import Path\nimport time\n"
    code += f"with hold_run(Path({str(run.folder)!r})):\n    print('held', flush=True)\n    time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UsageError, match=f"process {other.pid} on"):
        go(run, *SMALL)
    other.kill()
    other.wait()
    other.stdout.close()
    assert go(run, *SMALL).failed == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_run_is_one_sentence(start: Start, go: Go) -> None:
    run = start(*SMALL)
    run.folder.chmod(0o500)
    try:
        with pytest.raises(StoreError, match="Cannot write"):
            go(run, *SMALL)
    finally:
        run.folder.chmod(0o700)


def test_a_folder_that_cannot_be_written_is_one_sentence(start: Start, go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(StoreError, match=r"Permission denied\. Choose another --out"):
        go(start(*SMALL), *SMALL)


def test_ctrl_c_while_the_lock_was_imported_ended_the_process_by_its_signal() -> None:
    """What a sweep locks with is there before a run is announced, and Ctrl-C is likely."""
    code = "import sys, gradlab.sweep.driver\nprint('filelock' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


# -- damage -----------------------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "a bit": _flip,
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("file", ["tables/numbers.parquet", "trace/header.json", "cell.json"])
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_cell_runs_again_and_the_others_stay(
    start: Start, go: Go, ran: Callable[[], list[str]], how: str, file: str
) -> None:
    if (how, file) == ("a bit", "cell.json"):
        pytest.skip("what its JSON says may still be whole")
    run = start(*SMALL)
    go(run, *SMALL)
    whole = run.table("numbers")
    cell = run.cells()[0]
    ran()
    DAMAGE[how](cell.folder / file)
    report = go(run, *SMALL)
    assert ran() == [cell.label]
    assert [outcome.status for outcome in report.outcomes] == ["done"]
    pd.testing.assert_frame_equal(Run(run.folder).table("numbers"), whole, check_exact=True)
    (aside,) = (run.folder / "damaged").iterdir()
    assert aside.name.startswith(cell.key)


def test_a_run_of_an_earlier_version_without_checksums_is_gone_on_with(
    start: Start, go: Go, ran: Callable[[], list[str]]
) -> None:
    run = start(*SMALL)
    go(run, *SMALL)
    ran()
    for cell in run.cells():
        about = json.loads((cell.folder / "cell.json").read_text())
        del about["files"]
        (cell.folder / "cell.json").write_text(json.dumps(about))
    go(run, *SMALL)
    assert ran() == []


def test_what_a_crash_left_half_written_is_no_cell(start: Start, go: Go, ran: Callable[[], list[str]]) -> None:
    run = start(*SMALL)
    left = run.folder / "cells" / ".0123456789abcdef.aaaaaaaa.part"
    left.mkdir()
    (left / "cell.json").write_text("{")
    assert go(run, *SMALL).failed == []
    assert len(run.cells()) == 2


# -- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2], ids=["here", "pool"])
def test_a_cell_that_hangs_past_its_limit_fails_alone(start: Start, toy: Any, workers: int) -> None:
    from gradlab.sweep.cell_run import Job

    cells = toy.plan(toy.Settings(value=(1, 2), seeds=1, trouble=("hang",)))
    job = Job(run=toy.run, folder=start(*SMALL).folder, device="cpu", data_dir=None, limit=1.0)
    ended = {o.cell.label: o for o in engine.run_cells(job, cells, workers=workers, progress=lambda *_: None)}
    assert [ended[f"work {value} seed 0"].status for value in (1, 2)] == ["done", "done"]
    assert ended["hang"].status == "failed"
    assert ended["hang"].message == "It ran past its limit of 1 s: raise --limit, or look for a hang in it."


@pytest.mark.slow
def test_a_cell_that_hangs_where_no_signal_is_handled_is_killed(
    start: Start, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradlab.sweep.cell_run import Job

    monkeypatch.setattr(engine, "_GRACE", 0.5)
    cells = toy.plan(toy.Settings(value=(1, 2), seeds=2, trouble=("hang hard",)))
    job = Job(run=toy.run, folder=start(*SMALL).folder, device="cpu", data_dir=None, limit=1.0)
    begun = time.monotonic()
    ended = {o.cell.label: o.message for o in engine.run_cells(job, cells, workers=2, progress=lambda *_: None)}
    assert time.monotonic() - begun < 60
    assert "past its limit" in ended.pop("hang hard")
    assert set(ended.values()) == {""}
    assert len(ended) == 4


def test_a_clock_moved_back_neither_hides_nor_overwrites_a_run(
    start: Start, go: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour that the clock repeats: the second run begins at the very second of the first one."""
    from datetime import datetime

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2026, 10, 25, 2, 30, tzinfo=tz)

    monkeypatch.setattr(store, "datetime", Stopped)
    first = start(*SMALL)
    go(first, *SMALL)
    before = first.table("numbers")
    second = start(*SMALL)
    assert (first.folder.name, second.folder.name) == ("2026-10-25T02-30-00", "2026-10-25T02-30-00-2")
    assert store.latest_run(second.folder.parents[1]) == second.folder
    go(second, *SMALL)
    pd.testing.assert_frame_equal(Run(first.folder).table("numbers"), before, check_exact=True)
    assert second.unfinished() == frozenset()


# -- kill -9 ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_twenty_kills_at_random_lose_nothing_and_change_nothing(
    start: Start, go: Go, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill the driver, or one of its workers, again and again; the tables end as those of an undisturbed run."""
    words = ("value=1,2,3,4,5,6", "seeds=5", "pace=0.01")
    calm, shaken = start(*words), start(*words)
    go(calm, *words)
    monkeypatch.setenv("PYTHONPATH", str(Path(toy.__file__).parent))
    script = (
        "import io, sys\nfrom pathlib import Path\nfrom rich.console import Console\nimport toy_study as toy\n"
        "from gradlab.study import parse_settings\nfrom gradlab.sweep.driver import sweep\n"
        "from gradlab.sweep.store import Run\n"
        "if __name__ == '__main__':\n"
        f"    settings = parse_settings(toy.STUDY, 'default', {words!r})\n"
        f"    sweep(toy.STUDY, settings, Run(Path({str(shaken.folder)!r})), device='cpu', workers=2, data_dir=None,\n"
        "          console=Console(file=io.StringIO()))\n"
    )
    file = tmp_path / "driver.py"
    file.write_text(script)
    dice = random.Random(7)
    kept: set[str] = set()
    kills = 0
    while kills < 20:
        driver = subprocess.Popen([sys.executable, str(file)], start_new_session=True)
        # While it starts, while its workers start, and while cells run and are written.
        time.sleep(dice.choice([0.3, 1.0, 2.2, 2.6, 3.0]) + dice.random() * 0.4)
        workers = _children(driver.pid)
        if workers and dice.random() < 0.4:
            os.kill(dice.choice(workers), signal.SIGKILL)
            kills += 1
            time.sleep(dice.random())
        driver.kill()
        kills += 1
        driver.wait()
        now = {cell.key for cell in shaken.cells()}
        assert kept <= now
        kept = now
        for path in (shaken.folder / "cells").iterdir():  # as a full run would have to start from
            if dice.random() < 0.35 and path.name in kept:
                _remove(path)
                kept.discard(path.name)
    report = go(shaken, *words)
    assert report.failed == []
    for name in ("numbers", "steps", "timesteps"):
        pd.testing.assert_frame_equal(Run(shaken.folder).table(name), calm.table(name), check_exact=True)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)


def _children(process: int) -> list[int]:
    try:
        told = Path(f"/proc/{process}/task/{process}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in told.split()]
