"""The Ray engine on two nodes of a local cluster: the same tables, and the same when workers and nodes are killed."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from gradlab.errors import UsageError
from gradlab.study import parse_settings
from gradlab.sweep.cell_run import Job, Outcome
from gradlab.sweep.driver import SweepReport, sweep
from gradlab.sweep.ray_engine import RayEngine, cluster_facts
from gradlab.sweep.store import Run

ray = pytest.importorskip("ray")
# Two minutes on two cores, most of it waiting.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # what Ray leaves open is not ours to close
]

Start = Callable[..., Run]
Go = Callable[..., SweepReport]
TOY = Path(__file__).parent / "toy"
PATIENCE = 240.0  # seconds after which something hangs
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False, "include_log_monitor": False}
#: A dead node is noticed after 6 s and not 20; a busy one must not be taken for dead.
CHECKS = {"health_check_initial_delay_ms": 2000, "health_check_period_ms": 2000, "health_check_failure_threshold": 3}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one core each, on this machine; the first holds the cluster's state."""
    from ray.cluster_utils import Cluster

    # Ray's workers are nice to others: beside another test process, to load torch would take them a minute.
    ours = {"PYTHONPATH": str(TOY), "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    made = Cluster(initialize_head=True, head_node_args=NODE | {"_system_config": CHECKS})
    made.add_node(**NODE)
    # One connection for all tests: with each new one Ray starts new workers, and each of those loads torch.
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


class OnRay(threading.Thread):
    """A sweep on the cluster in a thread of its own, so that a hang fails a test instead of stopping all of them."""

    def __init__(self, toy: Any, run: Run, words: tuple[str, ...], cluster: Any, **options: Any) -> None:
        super().__init__(daemon=True)
        self._settings, self._run, self._toy = parse_settings(toy.STUDY, "default", words), run, toy
        self._engine = RayEngine(address=cluster.address, **options)
        self._reports: list[SweepReport] = []
        self.start()

    def run(self) -> None:
        console = Console(file=io.StringIO())
        how: dict[str, Any] = {"device": "cpu", "workers": 0, "data_dir": None, "console": console}
        self._reports.append(sweep(self._toy.STUDY, self._settings, self._run, engine=self._engine, **how))

    def report(self) -> SweepReport:
        self.join(PATIENCE)
        where = traceback.format_stack(sys._current_frames()[self.ident]) if self.is_alive() else []  # type: ignore[index]
        assert not self.is_alive(), "the sweep hangs:\n" + "".join(where)
        return self._reports[0]


def on_ray(toy: Any, run: Run, words: tuple[str, ...], cluster: Any, **options: Any) -> SweepReport:
    return OnRay(toy, run, words, cluster, **options).report()


def same_tables(first: Run, second: Run, names: tuple[str, ...] = ("numbers", "steps", "timesteps")) -> None:
    for name in names:
        pd.testing.assert_frame_equal(Run(first.folder).table(name), Run(second.folder).table(name), check_exact=True)


@pytest.mark.parametrize("send_back", [False, True], ids=["shared folder", "sent back"])
def test_ray_gives_what_one_process_gives(start: Start, go: Go, toy: Any, cluster: Any, send_back: bool) -> None:
    words = ("value=1,2,3", "seeds=2", "trouble=raise,data,diverge,table")
    here, there = start(*words), start(*words)
    reports = [go(here, *words), on_ray(toy, there, words, cluster, send_back=send_back)]
    told = [
        {o.cell.label: (o.status, o.message.partition(" The whole")[0]) for o in report.outcomes} for report in reports
    ]
    assert told[0] == told[1]
    same_tables(here, there, ("numbers", "steps", "timesteps", "bad"))
    failed = next(outcome for outcome in reports[1].failed if outcome.cell.label == "raise")
    assert "ValueError: two\nlines" in (there.folder / "errors" / f"{failed.cell.key}.txt").read_text()
    assert str(there.folder) in failed.message
    assert not list(there.folder.glob(".shared-*"))


def test_a_task_whose_process_dies_runs_again_and_then_fails_alone(
    start: Start, toy: Any, cluster: Any, ran: Callable[[], list[str]]
) -> None:
    words = ("value=1,2", "seeds=1", "trouble=kill")
    run = start(*words)
    report = on_ray(toy, run, words, cluster)
    failed = {outcome.cell.label: outcome.message for outcome in report.failed}
    assert list(failed) == ["kill"]
    assert failed["kill"].startswith("Its worker process died, twice (killed for memory?)")
    assert len(run.cells()) == 2


def test_a_cell_past_its_limit_fails_alone(start: Start, toy: Any, cluster: Any) -> None:
    cells = toy.plan(toy.Settings(value=(1,), seeds=1, trouble=("hang",)))
    job = Job(run=toy.run, folder=start("value=1", "seeds=1").folder, device="cpu", data_dir=None, limit=8.0)
    seen: list[str] = []
    engine = RayEngine(address=cluster.address)
    ended = engine(job, cells, workers=2, progress=lambda cell, *_: seen.append(cell.label))
    messages = {outcome.cell.label: outcome.message for outcome in ended}
    assert "past its limit of 8 s" in messages.pop("hang")
    assert messages == {"work 1 seed 0": ""}
    assert "hang" in seen


def test_ctrl_c_stops_running_cells_and_keeps_what_is_finished(start: Start, toy: Any, cluster: Any) -> None:
    words = ("value=1,2,3,4", "seeds=1", "steps=60", "pace=0.05")
    cells = toy.plan(parse_settings(toy.STUDY, "default", words))
    run = start(*words)
    job = Job(run=toy.run, folder=run.folder, device="cpu", data_dir=None)
    told: list[int] = []
    stream = RayEngine(address=cluster.address)(
        job, cells, workers=2, progress=lambda *_: None, stopping=lambda: told.append(1)
    )
    assert next(iter(stream)).status == "done"
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert told == [1]
    finished = len(run.cells())
    assert 1 <= finished < 4
    assert on_ray(toy, run, words, cluster).failed == []
    assert len(run.cells()) == 4


def test_killed_drivers_workers_and_nodes_change_nothing(
    start: Start, go: Go, toy: Any, cluster: Any, tmp_path: Path
) -> None:
    """Kill the driver, then workers and a node while cells run; another node comes; the tables stay the same."""
    words = ("value=1,2,3,4", "seeds=4", "steps=8", "pace=0.05")
    calm, shaken = start(*words), start(*words)
    go(calm, *words)

    file = tmp_path / "driver.py"
    file.write_text(
        "import io, sys\nfrom pathlib import Path\nfrom rich.console import Console\nimport toy_study as toy\n"
        "from gradlab.study import parse_settings\nfrom gradlab.sweep.driver import sweep\n"
        "from gradlab.sweep.ray_engine import RayEngine\nfrom gradlab.sweep.store import Run\n"
        f"settings = parse_settings(toy.STUDY, 'default', {words!r})\n"
        f"sweep(toy.STUDY, settings, Run(Path({str(shaken.folder)!r})), device='cpu', workers=0, data_dir=None,\n"
        f"      console=Console(file=io.StringIO()), engine=RayEngine(address={cluster.address!r}))\n"
    )
    driver = subprocess.Popen([sys.executable, str(file)])
    wait_until(lambda: len(shaken.cells()) >= 2)
    driver.kill()
    driver.wait()
    kept = {cell.key for cell in shaken.cells()}
    assert len(kept) < len(shaken.planned)

    dice = random.Random(3)
    sweeping = OnRay(toy, shaken, words, cluster)
    for deed in ("worker", "node", "worker"):
        wait_until(lambda: bool(_workers_of_ray()) or not sweeping.is_alive())
        time.sleep(dice.random())
        if deed == "node":
            (node,) = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(**NODE)
        elif workers := _workers_of_ray():
            with suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(dice.choice(workers), signal.SIGKILL)
    report = sweeping.report()
    assert kept <= {cell.key for cell in shaken.cells()}
    for outcome in report.failed:  # the same cell was hit twice
        assert "died, twice" in outcome.message
    assert go(shaken, *words).failed == []  # what is left runs here: engines can follow each other
    same_tables(calm, shaken)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.05)


def _workers_of_ray() -> list[int]:
    """Return processes of Ray that run a cell."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::_task"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_a_full_disk_ends_the_sweep(start: Start, toy: Any, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradlab.errors import StoreError
    from gradlab.sweep import ray_engine

    def full(*_: Any) -> None:
        raise StoreError("Cannot write x: No space left on device. Free some space or choose another folder.")

    monkeypatch.setattr(ray_engine, "atomic_folder", full)
    words = ("value=1,2,3", "seeds=1")
    report = on_ray(toy, start(*words), words, cluster, send_back=True)
    assert len(report.fatal) == 1
    assert "No space left" in report.fatal[0].message


def test_the_doctor_knows_the_cluster(cluster: Any) -> None:
    deadline = time.monotonic() + 20
    while "2 nodes, 2 cores" not in (facts := cluster_facts(cluster.address)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert "2 nodes, 2 cores" in facts


def test_without_ray_the_extra_is_named(start: Start, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    job = Job(run=toy.run, folder=start("value=1", "seeds=1").folder, device="cpu", data_dir=None)
    with pytest.raises(UsageError, match=r"pip install 'gradlab\[ray\]'"):
        list(RayEngine()(job, [], workers=0, progress=lambda *_: None))


def test_what_a_node_sends_back_stays_inside_the_cells_folder(start: Start, toy: Any) -> None:
    from gradlab.sweep.ray_engine import _stored

    run = start("value=1", "seeds=1")
    cell = toy.plan(toy.Settings(value=(1,), seeds=1))[0]
    outcome = Outcome(cell=cell, status="done")
    for name in ("../../../evil", "/tmp/evil", "a/../../evil"):
        ended = _stored(run.folder, outcome, {"cell.json": b"{}", name: b"x"})
        assert ended.status == "failed", name
        assert not (run.folder / "evil").exists()


def test_no_cluster_at_an_address_is_one_sentence(cluster: Any) -> None:
    ray.shutdown()
    cluster.shutdown()
    with pytest.raises(UsageError, match="No Ray cluster at auto"):
        cluster_facts("auto")
