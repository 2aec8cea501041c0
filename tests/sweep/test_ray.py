"""The Ray engine on two nodes of a local cluster: the same tables, and the same when workers and nodes are killed."""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
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
# Two to five minutes, most of it waiting until Ray notices a dead node: run by GRADLAB_TEST_RAY=1.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(os.environ.get("GRADLAB_TEST_RAY") != "1", reason="set GRADLAB_TEST_RAY=1 to run it"),
]

Start = Callable[..., Run]
Go = Callable[..., SweepReport]
TOY = Path(__file__).parent / "toy"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one core each, on this machine; the first holds the cluster's state."""
    from ray.cluster_utils import Cluster

    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "RAY_USAGE_STATS_ENABLED")}
    os.environ.update(PYTHONPATH=str(TOY), RAY_USAGE_STATS_ENABLED="0")
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=node)
    made.add_node(**node)
    yield made
    ray.shutdown()
    made.shutdown()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def on_ray(toy: Any, run: Run, words: tuple[str, ...], cluster: Any, **options: Any) -> SweepReport:
    settings = parse_settings(toy.STUDY, "default", words)
    engine = RayEngine(address=cluster.address, **options)
    return sweep(
        toy.STUDY, settings, run, device="cpu", workers=0, data_dir=None, console=Console(file=io.StringIO()),
        engine=engine,
    )  # fmt: skip


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
    job = Job(run=toy.run, folder=start("value=1", "seeds=1").folder, device="cpu", data_dir=None, limit=1.0)
    seen: list[str] = []
    engine = RayEngine(address=cluster.address)
    ended = engine(job, cells, workers=2, progress=lambda cell, *_: seen.append(cell.label))
    messages = {outcome.cell.label: outcome.message for outcome in ended}
    assert "past its limit of 1 s" in messages.pop("hang")
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


def test_killed_workers_and_nodes_change_nothing(start: Start, go: Go, toy: Any, cluster: Any) -> None:
    """Kill worker processes and whole nodes while cells run; another node comes; the tables stay the same."""
    words = ("value=1,2,3,4", "seeds=4", "steps=8", "pace=0.05")
    calm, shaken = start(*words), start(*words)
    go(calm, *words)
    dice = random.Random(3)
    reports: list[SweepReport] = []
    deeds: list[str] = []
    while not reports or reports[-1].failed or len(deeds) < 2:
        if reports and not reports[-1].failed:  # too fast for all the trouble: some of it again
            for cell in shaken.cells()[::2]:
                shutil.rmtree(cell.folder)
        thread = threading.Thread(target=lambda: reports.append(on_ray(toy, shaken, words, cluster)))
        thread.start()  # Ray starts nodes in the main thread only
        while thread.is_alive():
            thread.join(0.8 + dice.random())
            if not thread.is_alive() or not (workers := _workers_of_ray()):
                continue
            if len(deeds) % 2:
                nodes = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]
                cluster.remove_node(nodes[0], allow_graceful=False)
                cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
                deeds.append("node")
            else:
                os.kill(dice.choice(workers), signal.SIGKILL)
                deeds.append("worker")
        assert len(reports) < 12
    assert set(deeds) == {"node", "worker"}
    same_tables(calm, shaken)


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
    import sys

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
    cluster.shutdown()
    with pytest.raises(UsageError, match="No Ray cluster at auto"):
        cluster_facts("auto")
