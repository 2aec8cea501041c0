"""The local engine: cells in processes of this machine, one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import cycle, islice
from multiprocessing import connection
from typing import Any

from gradlab.errors import ResourceError
from gradlab.live import offered_snapshot
from gradlab.study import Cell
from gradlab.sweep.cell_run import Job, Outcome, Progress, Stopped, limit_message, run_cell
from gradlab.sweep.store import finished_cell

__all__ = ["Job", "Outcome", "Progress", "run_cells", "worker_count"]

_REPORT_EVERY = 0.25  # seconds between two reports of one cell
_GRACE = 5.0  # seconds past its limit after which a cell's process is killed: it hangs where no signal is handled


# -- in a worker process ----------------------------------------------------------------------------------------------

_worker: dict[str, Any] = {}


def _start_worker(reports: Any, stop: Any, places: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's: it asks cells to stop
    threading.Thread(target=_end_with_driver, daemon=True).start()
    import torch

    torch.set_num_threads(1)
    _worker.update(reports=reports, stop=stop, device=places.get())


def _end_with_driver() -> None:
    """End this worker when the driver is gone: the pool would wait for more work for ever."""
    driver = multiprocessing.parent_process()
    if driver is not None:
        connection.wait([driver.sentinel])
        os._exit(1)


def _work(job: Job, cell: Cell) -> Outcome:
    last = 0.0

    def report(done: int, total: int, loss: float | None) -> None:
        nonlocal last
        if _worker["stop"].is_set():
            raise Stopped
        now = time.monotonic()
        if now - last > _REPORT_EVERY or done == total:
            last = now
            layers = (offered_snapshot(),) if job.live else ()
            _worker["reports"].put((cell.key, os.getpid(), done, total, loss, *layers))

    if _worker["stop"].is_set():
        return Outcome(cell=cell, status="stopped")
    report(0, 1, None)
    return run_cell(replace(job, device=_worker["device"]), cell, report)


# -- in the driver ----------------------------------------------------------------------------------------------------


def run_cells(
    job: Job,
    cells: Sequence[Cell],
    *,
    workers: int,
    progress: Progress,
    stopping: Callable[[], None] = lambda: None,
) -> Iterator[Outcome]:
    """Run cells and yield their outcomes as they come.

    Longest cells start first, so that no long one is left alone at the end. Each cell computes in one thread, so that
    its numbers do not depend on the number of workers. When a worker process dies, no one can tell which cell killed
    it: the cells that were running are run again, one at a time, and a cell whose process dies a second time failed.

    Args:
        job: What they share.
        cells: What to run.
        workers: Processes; 0 runs all in this one.
        progress: Told of each running cell.
        stopping: Called once when the sweep is being stopped and running cells are still to be waited for.

    Note:
        After KeyboardInterrupt is raised into this generator, running cells are asked to stop at their next step,
        which takes at most a step; what is finished stays. A second one ends them at once.
    """
    left = sorted(cells, key=lambda cell: -cell.cost)
    if workers == 0:
        with _one_thread():
            for cell in left:
                yield run_cell(job, cell, _here(job, cell, progress))
        return
    while left:
        suspects, left, began = yield from _in_pool(job, left, workers, progress, stopping)
        for cell in suspects:
            died, unstarted, _ = yield from _in_pool(job, [cell], 1, progress, stopping)
            if died or unstarted:
                yield Outcome(cell=cell, status="failed", message=_DIED, exit_code=ResourceError.exit_code)
        if left and not began:
            yield from (Outcome(cell=cell, status="failed", message=_NO_WORKER, exit_code=1) for cell in left)
            return


def _here(job: Job, cell: Cell, progress: Progress) -> Callable[[int, int, float | None], None]:
    """Return what a cell in this process reports to: of each step, and of its layers as seldom as a worker does."""
    last = 0.0

    def report(done: int, total: int, loss: float | None) -> None:
        nonlocal last
        now = time.monotonic()
        if not job.live:
            progress(cell, done, total, loss)
        elif now - last > _REPORT_EVERY or done == total:
            last = now
            progress(cell, done, total, loss, offered_snapshot())
        else:
            progress(cell, done, total, loss, None)

    return report


_DIED = "Its worker process died, twice (killed for memory?): try fewer --workers or smaller settings."
_NO_WORKER = "The worker processes do not start; --workers 0 runs all cells in one process and shows why."


def _in_pool(
    job: Job, cells: Sequence[Cell], workers: int, progress: Progress, stopping: Callable[[], None]
) -> Generator[Outcome, None, tuple[list[Cell], list[Cell], bool]]:
    """Run cells in a pool of processes until all have ended, or a process dies: then all processes end.

    Returns:
        The cells one of which may have killed its process, those still to be run, and whether any cell began.
    """
    waiting = deque(cells)
    watch = _Watch(job.limit)
    lost: list[Cell] = []
    began = False
    with _workers(min(workers, len(cells)), job.device, stopping) as (pool, reports):
        futures: dict[Future[Outcome], Cell] = {}
        broken = False
        while futures or (waiting and not broken):
            # Few at a time: to wait for thousands of futures costs more than short cells take.
            with _interrupt_held_back():
                while waiting and not broken and len(futures) < 2 * workers + 2:
                    cell = waiting[0]
                    try:
                        futures[pool.submit(_work, job, cell)] = cell
                    except BrokenProcessPool:
                        broken = True
                    else:
                        watch.cells[cell.key] = waiting.popleft()
            finished, _ = wait(futures, timeout=0.1, return_when=FIRST_COMPLETED)
            while not reports.empty():
                watch.report(reports.get(), progress)
            watch.kill_hanging()
            for future in finished:
                cell = futures.pop(future)
                error = future.exception()
                began = began or cell.key in watch.begun
                if error is None:
                    yield future.result()
                elif not isinstance(error, BrokenProcessPool):  # what a cell is or returns cannot be sent
                    text = " ".join(f"{type(error).__name__}: {error}".split())
                    yield Outcome(cell=cell, status="failed", message=text, exit_code=1)
                elif stored := finished_cell(job.folder, cell.key):  # saved, and then the pool broke
                    yield Outcome(cell=cell, status=stored.status, message=stored.message)
                elif cell.key in watch.killed:
                    yield Outcome(cell=cell, status="failed", message=limit_message(job.limit), exit_code=1)
                    broken = True
                else:
                    lost.append(cell)
                    broken = True
                watch.end(cell)
    # Where a hanging cell was killed it is known who broke the pool; else it is one of those that were running.
    suspects = [] if watch.killed else [cell for cell in lost if cell.key in watch.begun]
    innocent = [cell for cell in lost if cell not in suspects]
    return suspects, [*innocent, *waiting], began


class _Watch:
    """Knows which process runs which cell since when, and kills the one whose cell hangs."""

    def __init__(self, limit: float) -> None:
        self.cells: dict[str, Cell] = {}
        self.begun: set[str] = set()
        self.killed: set[str] = set()
        self._limit = limit
        self._running: dict[str, tuple[int, float]] = {}

    def report(self, told: tuple[Any, ...], progress: Progress) -> None:
        key, process, done, total, loss, *layers = told
        if key in self.cells:  # a late report of a cell that has ended says nothing
            self.begun.add(key)
            self._running.setdefault(key, (process, time.monotonic()))
            progress(self.cells[key], done, total, loss, *layers)

    def kill_hanging(self) -> None:
        now = time.monotonic()
        for key, (process, since) in self._running.items():
            if self._limit and key not in self.killed and now - since > self._limit + _GRACE:
                self.killed.add(key)
                with suppress(OSError):
                    os.kill(process, getattr(signal, "SIGKILL", signal.SIGTERM))

    def end(self, cell: Cell) -> None:
        self._running.pop(cell.key, None)
        self.cells.pop(cell.key, None)


def worker_count(device: str, *, cores: int, free_bytes: float) -> tuple[int, str]:
    """Return how many workers a machine takes, and a sentence where that is fewer than its cores for want of memory.

    One a core on the CPU, one a device on accelerators ("cuda" means all of them); each loads torch, so that it wants
    about a gigabyte before its cell begins.
    """
    devices = _devices(device)
    wanted = cores if devices == [device] and device.startswith("cpu") else len(devices)
    if free_bytes >= wanted * _WORKER_BYTES:  # infinite where the system does not say
        return wanted, ""
    fits = max(1, int(free_bytes / _WORKER_BYTES))
    if fits == wanted:
        return wanted, ""
    gigabytes = free_bytes / 2**30
    return fits, f"Using {fits} of {wanted} workers: {gigabytes:.1f} GiB are free, and each takes about one."


_WORKER_BYTES = 2**30


def _devices(device: str) -> list[str]:
    """Return the devices that workers are spread over: all CUDA devices where no index is given."""
    if device == "cuda":
        import torch

        return [f"cuda:{index}" for index in range(max(1, torch.cuda.device_count()))]
    return [device]


@contextmanager
def _workers(count: int, device: str, stopping: Callable[[], None]) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    context = multiprocessing.get_context("spawn")
    # A SimpleQueue writes at once, so that a cell's first report is not lost when its process dies.
    reports, stop, places = context.SimpleQueue(), context.Event(), context.SimpleQueue()
    for place in islice(cycle(_devices(device)), 2 * count):  # twice: a process may die and be replaced
        places.put(place)
    # A worker's numeric libraries read these when they load, before any code of ours could set threads.
    threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    os.environ.update(dict.fromkeys(threads, "1"))
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker, initargs=(reports, stop, places))
    try:
        yield pool, reports
    except BaseException:
        stop.set()
        stopping()
        raise
    finally:
        stop.set()
        _end_pool(pool, set(multiprocessing.active_children()) - others)
        reports.close()
        places.close()
        for name, value in threads.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _end_pool(pool: ProcessPoolExecutor, processes: set[multiprocessing.process.BaseProcess]) -> None:
    """Wait until all worker processes have ended, each at its cell's next step; Ctrl-C meanwhile kills them."""
    # Not the pool's own join in this thread: a thread whose join is interrupted counts as ended in Python 3.11 although
    # it runs on (https://github.com/python/cpython/issues/90882), and it then meets pipes that are already closed.
    closing = threading.Thread(target=pool.shutdown, kwargs={"wait": True, "cancel_futures": True})
    with _interrupt_held_back():
        closing.start()
    try:
        alive = {process.sentinel for process in processes}
        while alive:
            alive.difference_update(connection.wait(alive, timeout=0.2))
    except KeyboardInterrupt:  # a second time: wait for no step
        for process in processes:
            process.kill()
    with _interrupt_held_back():  # nothing runs any more, so this takes a moment
        closing.join()


@contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Let neither Ctrl-C nor SIGTERM raise here, nor reach the processes that are started here.

    Until a new worker can ignore Ctrl-C, it would end with a traceback, and so it would if this process left it half
    started. A signal meanwhile is not lost: this process handles it at the end of the block.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets and sets handlers
        yield
        return
    came: list[int] = []
    # A signal goes to any thread that does not block it, and Python's handler then runs in the main thread: blocking it
    # here keeps it from new processes, which inherit that, and only another handler keeps it from this one.
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        if masked is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if came:
            signal.raise_signal(came[0])


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
