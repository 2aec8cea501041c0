"""Cells in this process and in others: how each ending comes back."""

from __future__ import annotations

import errno
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch

from gradlab.storage import write_table
from gradlab.sweep import engine, store
from gradlab.sweep.driver import SweepReport
from gradlab.sweep.engine import Job, run_cells
from gradlab.sweep.store import Run

Start = Callable[..., Run]
Go = Callable[..., SweepReport]

ENDINGS = {
    "raise": ("failed", "ValueError in toy_study.py:"),
    "data": ("failed", "The data are damaged."),
    "resource": ("failed", "Out of memory on cpu."),
    "library": ("failed", "Out of memory on cpu in cell library: it asked for 2.00 GiB and "),
    "memory": ("failed", "Out of memory on cpu in cell memory: it asked for 2.00 GiB and "),
    "diverge": ("diverged", "the loss was not finite at step 1"),
    "table": ("failed", "A cell's table cannot be called 'layers'"),
}


def status(report: SweepReport) -> dict[str, str]:
    return {outcome.cell.label: outcome.status for outcome in report.outcomes}


@pytest.mark.parametrize("how", ENDINGS)
def test_a_cell_that_ends_badly_is_an_outcome_and_the_others_are_kept(start: Start, go: Go, how: str) -> None:
    words = ("value=1,2", "seeds=1", f"trouble={how}")
    run = start(*words)
    report = go(run, *words)
    expected, message = ENDINGS[how]
    assert status(report) == {how: expected, "work 1 seed 0": "done", "work 2 seed 0": "done"}
    outcome = report.outcomes[0]  # it has the highest cost
    assert message in outcome.message
    assert "\n" not in outcome.message
    assert {cell.label for cell in run.cells()} == {
        label for label, state in status(report).items() if state != "failed"
    }
    assert outcome.exit_code == {"table": 2, "diverge": 0}.get(how, 1)


def test_a_bug_leaves_its_traceback_with_the_run(start: Start, go: Go) -> None:
    words = ("value=1", "seeds=1", "trouble=raise")
    run = start(*words)
    failed = go(run, *words).failed[0]
    log = run.folder / "errors" / f"{failed.cell.key}.txt"
    assert str(log) in failed.message
    assert "ValueError: two\nlines" in log.read_text()


def test_a_diverged_cell_is_a_result(start: Start, go: Go) -> None:
    words = ("value=1", "seeds=1", "trouble=diverge")
    run = start(*words)
    go(run, *words)
    bad = run.table("bad", "trouble")
    assert bad["loss"].isna().tolist() == [True, False]
    assert set(bad["status"]) == {"diverged"}


def test_resume_runs_only_what_is_missing(start: Start, go: Go, ran: Callable[[], list[str]]) -> None:
    words = ("value=1", "seeds=2", "trouble=raise,diverge")
    run = start(*words)
    go(run, *words)
    assert sorted(ran()) == ["diverge", "raise", "work 1 seed 0", "work 1 seed 1"]
    kept = {cell.key: (cell.folder / "cell.json").stat().st_mtime_ns for cell in run.cells()}
    report = go(run, *words)
    assert ran() == ["raise"]
    assert [outcome.status for outcome in report.outcomes] == ["failed"]
    assert kept == {cell.key: (cell.folder / "cell.json").stat().st_mtime_ns for cell in run.cells()}


def test_a_complete_run_has_nothing_to_resume(start: Start, go: Go, ran: Callable[[], list[str]]) -> None:
    words = ("value=1", "seeds=1")
    run = start(*words)
    go(run, *words)
    ran()
    report = go(run, *words, workers=2)
    assert (list(report.outcomes), report.failed, report.interrupted, ran()) == ([], [], False, [])


def test_a_full_disk_ends_the_sweep(start: Start, go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("value=1,2,3", "seeds=2")
    run = start(*words)
    left = [2]

    def full(frame: pd.DataFrame, path: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_table(frame, path)

    monkeypatch.setattr(store, "write_table", full)
    report = go(run, *words)
    assert [outcome.status for outcome in report.outcomes] == ["done", "done", "failed"]
    assert report.fatal[0].message.endswith("No space left on device. Free some space or choose another folder.")
    assert len(run.cells()) == 2
    monkeypatch.undo()
    assert len(list((run.folder / "cells").iterdir())) == 2


def test_progress_is_told_of_each_step(start: Start, toy: Any) -> None:
    run = start("value=1", "seeds=1")
    cells = toy.plan(toy.Settings(value=(1,), seeds=1))
    seen: list[tuple[str, int, int, float | None]] = []
    job = Job(run=toy.run, folder=run.folder, device="cpu", data_dir=None)
    list(run_cells(job, cells, workers=0, progress=lambda cell, *told: seen.append((cell.label, *told))))
    assert seen == [("work 1 seed 0", done, 3, done - 1.0) for done in (1, 2, 3)]


def test_progress_of_a_live_job_brings_the_layers_of_the_training_in_it(start: Start, toy: Any) -> None:
    words = toy.Settings(value=(1,), seeds=1, train=4)
    run = start("value=1", "seeds=1", "train=4")
    told: list[tuple[Any, ...]] = []
    job = Job(run=toy.run, folder=run.folder, device="cpu", data_dir=None, live=True)
    outcomes = list(run_cells(job, toy.plan(words), workers=0, progress=lambda cell, *rest: told.append(rest)))
    assert [outcome.status for outcome in outcomes] == ["done", "done"]
    last = [snapshot for done, total, _, snapshot in told if done == total]
    assert last[1] is None  # nothing is watched in the other cell
    layers = run.table("layers", "train").query("step == 3")
    assert (last[0].step, [group.first for group in last[0].groups]) == (3, layers.layer.tolist())
    assert [group.smallest for group in last[0].groups] == pytest.approx(layers.grad_norm.tolist(), rel=0, nan_ok=True)


def test_long_cells_start_first(start: Start, go: Go, ran: Callable[[], list[str]]) -> None:
    words = ("value=1", "seeds=1", "trouble=diverge")
    go(start(*words), *words)
    assert ran() == ["diverge", "work 1 seed 0"]


def test_threads_are_given_back(start: Start, go: Go) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    go(start("value=1", "seeds=1"), "value=1", "seeds=1")
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_a_seed_makes_a_cell_repeat(start: Start, go: Go) -> None:
    words = ("value=1,2", "seeds=2")
    runs = [start(*words), start(*words)]
    torch.set_num_threads(2)
    go(runs[0], *words)
    torch.manual_seed(99)
    torch.set_num_threads(1)
    go(runs[1], *words)
    first, second = (run.table("numbers") for run in runs)
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    assert first.groupby("seed")["product"].nunique().tolist() == [1, 1]  # the seed, not the order, decides


# -- other processes --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_give_what_one_process_gives(start: Start, go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    words = ("value=1,2,3", "seeds=2", "trouble=raise,data,diverge")
    runs = [start(*words), start(*words)]
    reports = [go(runs[0], *words, workers=0), go(runs[1], *words, workers=2)]
    assert status(reports[0]) == status(reports[1])
    assert len({outcome.message for report in reports for outcome in report.outcomes if outcome.status != "done"}) == 4
    for name in ("numbers", "steps", "bad"):
        pd.testing.assert_frame_equal(runs[0].table(name), runs[1].table(name), check_exact=True)
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_cells_that_kill_their_process_fail_alone(start: Start, go: Go, ran: Callable[[], list[str]]) -> None:
    words = ("value=1,2", "seeds=2", "trouble=exit,kill once")
    run = start(*words)
    report = go(run, *words, workers=2)
    failed = {outcome.cell.label: outcome.message for outcome in report.failed}
    assert failed == {
        "exit": "Its worker process died, twice (killed for memory?): try fewer --workers or smaller settings."
    }
    assert len(run.cells()) == 5  # "kill once" too: the second time it did not
    assert len(report.outcomes) == 6
    assert ran().count("exit") == 2
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_workers_that_cannot_start_are_one_failure(
    start: Start, toy: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = start("value=1", "seeds=2")
    cells = toy.plan(toy.Settings(value=(1,), seeds=2))
    job = Job(run=toy.run, folder=run.folder, device="cpu", data_dir=None)
    monkeypatch.setattr(engine, "_start_worker", os._exit)  # takes one argument and gets three
    outcomes = list(run_cells(job, cells, workers=2, progress=lambda *_: None))
    capfd.readouterr()  # what the processes said
    assert [outcome.status for outcome in outcomes] == ["failed", "failed"]
    assert {outcome.message for outcome in outcomes} == {
        "The worker processes do not start; --workers 0 runs all cells in one process and shows why."
    }


@pytest.mark.slow
def test_a_function_that_cannot_be_sent_is_a_failure(start: Start, toy: Any) -> None:
    run = start("value=1", "seeds=1")
    cells = toy.plan(toy.Settings(value=(1,), seeds=1))
    job = Job(run=lambda *_: None, folder=run.folder, device="cpu", data_dir=None)  # type: ignore[arg-type]
    (outcome,) = run_cells(job, cells, workers=1, progress=lambda *_: None)
    assert outcome.status == "failed"
    assert "pickle" in outcome.message.lower()


# -- how many, and where ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "free", "expected"),
    [("cpu", 64.0, (8, "")), ("cpu", 3.5, (3, "3.5 GiB")), ("cpu", 0.2, (1, "0.2 GiB")), ("mps", 64.0, (1, "")),
     ("cuda:1", 64.0, (1, "")), ("cuda", 64.0, (4, "")), ("cpu", float("inf"), (8, ""))],
    ids=["cores", "memory", "little memory", "mps", "one device", "all devices", "unknown memory"],
)  # fmt: skip
def test_workers_fit_cores_devices_and_memory(
    monkeypatch: pytest.MonkeyPatch, device: str, free: float, expected: tuple[int, str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    count, told = engine.worker_count(device, cores=8, free_bytes=free * 2**30)
    assert count == expected[0]
    assert (expected[1] in told) if expected[1] else told == ""


def test_workers_are_spread_over_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with engine._workers(4, "cuda", lambda: None) as (pool, _):
        places = pool._initargs[2]  # type: ignore[attr-defined]  # what each worker takes its device from
        assert [places.get() for _ in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
