"""The Ray engine: the same cells as tasks on a Ray cluster, one core each; nodes may come and go meanwhile."""

from __future__ import annotations

import logging
import os
import tempfile
import time
import uuid
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, final

from gradlab.errors import ResourceError, StoreError, UsageError
from gradlab.storage import atomic_folder
from gradlab.study import Cell
from gradlab.sweep.cell_run import Job, Outcome, Progress, Stopped, limit_message, run_cell
from gradlab.sweep.store import finished_cell

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["RayEngine", "cluster_facts"]

_REPORT_EVERY = 0.5  # seconds between two reports of one cell
_GRACE = 10.0  # seconds past its limit after which a task is killed
_PATIENCE = 2.0  # seconds that a cell waits at its beginning for the desk, which is for progress and the word to stop
_ASK_AGAIN = 10.0  # seconds after which no answer is expected any more
_FETCH = 60.0  # seconds to fetch what a finished task returned: its node may be gone since
_NODE_LOSSES = 20  # of one cell's nodes, after which something else must be wrong
_STORE_BYTES = 128 * 2**20  # of shared memory: what a cell returns is small


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class RayEngine:
    """Runs cells on Ray; called as `run_cells` is.

    Where the nodes see the run's folder (shared storage), each task stores its cell there itself; where they do not,
    it sends the cell's files back and the driver stores them. A task whose process dies is run once more, one whose
    node dies as often as it takes.

    Args:
        address: Of a running cluster ("auto", "ray://host:10001", "host:6379"); None starts Ray on this machine.
        cpus: Cores a cell takes.
        gpus: GPUs a cell takes; below 1 several cells share one. None: 1 where the device is CUDA, else 0.
        send_back: Send files back though the folder is shared.

    Raises:
        UsageError: Ray is not installed, or no cluster answers at the address.
    """

    address: str | None = None
    cpus: float = 1.0
    gpus: float | None = None
    send_back: bool = False

    def __call__(
        self,
        job: Job,
        cells: Sequence[Cell],
        *,
        workers: int,
        progress: Progress,
        stopping: Callable[[], None] = lambda: None,
    ) -> Iterator[Outcome]:
        """Run cells and yield their outcomes as they come.

        Args:
            job: What they share.
            cells: What to run.
            workers: Most tasks at once; 0 for as many as the cluster has cores.
            progress: Told of each running cell.
            stopping: Called once when the sweep is being stopped and running cells are still to be waited for.
        """
        with _connected(self.address) as ray, _marked(job.folder) as mark:
            gpus = self.gpus if self.gpus is not None else float(job.device.startswith("cuda"))
            options = {"num_cpus": self.cpus, "num_gpus": gpus, "max_retries": 0}
            # No core of its own, so that it waits for none; made anew elsewhere where its node is lost.
            desk = ray.remote(num_cpus=0, max_restarts=-1)(_Desk).remote()
            task = ray.remote(_task).options(**options)
            sent = replace(job, folder=job.folder.absolute())
            tasks = _Tasks(ray, desk, lambda cell: task.remote(sent, cell, desk, mark, self.send_back), job)
            try:
                yield from tasks.run(sorted(cells, key=lambda cell: -cell.cost), workers, self.cpus, progress)
            except BaseException:
                stopping()
                tasks.stop()
                raise


class _Desk:
    """An actor that keeps the last report of each cell, and the word to stop."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[int, int, float | None]] = {}
        self._stop = False

    def tell(self, key: str, done: int, total: int, loss: float | None) -> bool:
        self._told[key] = (done, total, loss)
        return self._stop

    def read(self) -> dict[str, tuple[int, int, float | None]]:
        told, self._told = self._told, {}
        return told

    def stop(self) -> None:
        self._stop = True


class _Answer:
    """What the desk answers, whenever it does: its node may be gone, and nobody waits until it is on another."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._asked: Any = None
        self._since = 0.0

    def ask(self, question: Callable[[], Any]) -> None:
        """Ask, unless an answer is still to come."""
        now = time.monotonic()
        if self._asked is None or now - self._since > _ASK_AGAIN:
            with suppress(self._ray.exceptions.RayError):
                self._asked, self._since = question(), now

    def come(self, patience: float = 0.0) -> Any:
        """Return the answer, or None where there is none yet, or none at all."""
        if self._asked is None or not self._ray.wait([self._asked], timeout=patience)[0]:
            return None
        asked, self._asked = self._asked, None
        with suppress(self._ray.exceptions.RayError):
            return self._ray.get(asked, timeout=_PATIENCE)
        return None


def _task(job: Job, cell: Cell, desk: Any, mark: str, send_back: bool) -> tuple[Outcome, dict[str, bytes]]:
    """Run one cell on a node; return its outcome and, where the driver has to store it, its files."""
    import ray
    import torch

    torch.set_num_threads(1)
    last, answer = 0.0, _Answer(ray)

    def report(done: int, total: int, loss: float | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > _REPORT_EVERY or done == total:
            last = now
            if answer.come() is True:
                raise Stopped
            answer.ask(lambda: desk.tell.remote(cell.key, done, total, loss))

    report(0, 1, None)
    if answer.come(_PATIENCE) is True:
        return Outcome(cell=cell, status="stopped"), {}
    if not send_back and (job.folder / mark).exists():
        return run_cell(job, cell, report), {}
    with tempfile.TemporaryDirectory(prefix="gradlab-") as folder:
        outcome = run_cell(replace(job, folder=Path(folder)), cell, report)
        root = Path(folder) / "cells" / cell.key
        files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        logs = sorted((Path(folder) / "errors").glob("*.txt"))
        if logs:
            files = {"error.txt": logs[0].read_bytes()}
        return outcome, files


@final
class _Tasks:
    """The tasks of a sweep: submitted a few at a time, again where their node was lost."""

    def __init__(self, ray: ModuleType, desk: Any, submit: Callable[[Cell], Any], job: Job) -> None:
        self._ray: Any = ray
        self._desk, self._submit, self._job = desk, submit, job
        self._running: dict[Any, Cell] = {}
        self._since: dict[str, float] = {}
        self._cells: dict[str, Cell] = {}
        self._deaths: Counter[str] = Counter()
        self._losses: Counter[str] = Counter()
        self._killed: set[str] = set()
        self._answer = _Answer(ray)

    def run(self, cells: Sequence[Cell], workers: int, cpus: float, progress: Progress) -> Iterator[Outcome]:
        waiting = deque(cells)
        looked = 0.0
        while waiting or self._running:
            most = workers or max(1, int(self._ray.cluster_resources().get("CPU", 1.0) / cpus))
            while waiting and len(self._running) < (most if workers else 2 * most + 2):
                cell = waiting.popleft()
                self._cells[cell.key] = cell
                self._running[self._submit(cell)] = cell
            ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=_REPORT_EVERY)
            if time.monotonic() - looked > _REPORT_EVERY:
                looked = time.monotonic()
                self._look(progress)
            for reference in ready:
                cell = self._running.pop(reference)
                outcome = self._end(reference, cell)
                if outcome is None:
                    waiting.append(cell)
                else:
                    yield outcome
                self._since.pop(cell.key, None)

    def _look(self, progress: Progress) -> None:
        """Show what the tasks told, and kill those that hang past their limit."""
        now = time.monotonic()
        told: dict[str, tuple[int, int, float | None]] = self._answer.come() or {}
        self._answer.ask(lambda: self._desk.read.remote())
        for key, (done, total, loss) in told.items():
            self._since.setdefault(key, now)
            progress(self._cells[key], done, total, loss)
        for reference, cell in self._running.items():
            since = self._since.get(cell.key, now)
            if self._job.limit and cell.key not in self._killed and now - since > self._job.limit + _GRACE:
                self._killed.add(cell.key)
                self._ray.cancel(reference, force=True)

    def _end(self, reference: Any, cell: Cell) -> Outcome | None:
        """Return how a task ended, or None if it is to run again."""
        errors = self._ray.exceptions
        try:
            outcome, files = self._ray.get(reference, timeout=_FETCH)
        except (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.TaskCancelledError) as error:
            if (stored := finished_cell(self._job.folder, cell.key)) is not None:
                return Outcome(cell=cell, status=stored.status, message=stored.message)
            if cell.key in self._killed:
                return Outcome(cell=cell, status="failed", message=limit_message(self._job.limit), exit_code=1)
            self._deaths[cell.key] += 1
            if self._deaths[cell.key] < 2:
                return None
            memory = ", for memory" if isinstance(error, errors.OutOfMemoryError) else " (killed for memory?)"
            return Outcome(
                cell=cell, status="failed", exit_code=ResourceError.exit_code,
                message=f"Its worker process died, twice{memory}: try more --cpus a cell or smaller settings.",
            )  # fmt: skip
        except errors.RayError as error:  # its node is gone, or what it had is lost with one
            if (stored := finished_cell(self._job.folder, cell.key)) is not None:
                return Outcome(cell=cell, status=stored.status, message=stored.message)
            self._losses[cell.key] += 1
            if self._losses[cell.key] < _NODE_LOSSES:
                return None
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return Outcome(cell=cell, status="failed", message=text, exit_code=1)
        except Exception as error:  # what a cell is or returns cannot be sent
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return Outcome(cell=cell, status="failed", message=text, exit_code=1)
        return _stored(self._job.folder, outcome, files)

    def stop(self) -> None:
        """Ask running cells to stop at their next step and wait for them; Ctrl-C meanwhile kills them."""
        try:
            while self._running:
                self._desk.stop.remote()  # again and again: the desk may be made anew meanwhile
                ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=1.0)
                for reference in ready:
                    cell = self._running.pop(reference)
                    with suppress(Exception):  # what ended is kept; how the others ended no longer matters
                        _stored(self._job.folder, *self._ray.get(reference))
                    self._since.pop(cell.key, None)
        except KeyboardInterrupt:
            for reference in self._running:
                self._ray.cancel(reference, force=True)


def _stored(run: Path, outcome: Outcome, files: dict[str, bytes]) -> Outcome:
    """Store the files that a task sent back and return its outcome."""
    if not files:
        return outcome
    key = outcome.cell.key
    try:
        if "cell.json" not in files:
            log = run / "errors" / f"{key}.txt"
            log.parent.mkdir(exist_ok=True)
            log.write_bytes(files["error.txt"])
            told = outcome.message.partition(" The whole error is in ")[0]
            return replace(outcome, message=f"{told} The whole error is in {log}.")
        with atomic_folder(run / "cells" / key) as folder:
            for name, content in files.items():
                inside = PurePosixPath(name)
                if inside.is_absolute() or ".." in inside.parts:
                    raise StoreError(f"A node sent a file called '{name}', which lies outside its cell's folder.")
                path = folder / inside
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    except StoreError as error:
        return replace(outcome, status="failed", message=str(error), exit_code=error.exit_code, fatal=True)
    except OSError:
        return outcome  # only the log of an error that is told anyway
    return outcome


@contextmanager
def _marked(run: Path) -> Iterator[str]:
    """Leave a file with a new name in the run's folder: a node that sees it shares the folder."""
    mark = f".shared-{uuid.uuid4().hex}"
    try:
        (run / mark).touch()
    except OSError as error:
        raise StoreError(f"Cannot write {run}: {error.strerror}. Choose another --out.") from error
    try:
        yield mark
    finally:
        with suppress(OSError):
            (run / mark).unlink()


def _import_ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise UsageError("The Ray engine needs Ray, which is not installed: pip install 'gradlab[ray]'.") from error
    return ray


@contextmanager
def _connected(address: str | None) -> Iterator[ModuleType]:
    """Connect to a cluster, or start Ray on this machine; a connection that was there before is used and left."""
    ray: Any = _import_ray()
    if ray.is_initialized():
        yield ray
        return
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}
    options: dict[str, Any] = {"runtime_env": {"env_vars": threads | path}, "log_to_driver": False}
    options |= {"logging_level": logging.ERROR, "configure_logging": False}
    if address is None:
        options |= {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
    else:
        options |= {"address": address}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
        told = (str(error).strip().splitlines() or [""])[0]
        where = "on this machine" if address is None else f"at {address}"
        raise UsageError(f"No Ray cluster {where}: {told} 'ray status' on a node shows what is wrong.") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def cluster_facts(address: str) -> str:
    """Return what a cluster has, in words.

    Raises:
        UsageError: Ray is not installed, or no cluster answers.
    """
    with _connected(address) as connected:
        ray: Any = connected
        nodes = [node for node in ray.nodes() if node.get("Alive")]
        have = ray.cluster_resources()
        gpus = f", {have['GPU']:g} GPUs" if have.get("GPU") else ""
        memory = f", {have.get('memory', 0) / 2**30:.1f} GiB"
        return f"Ray {ray.__version__}, {len(nodes)} nodes, {have.get('CPU', 0):g} cores{gpus}{memory}"
