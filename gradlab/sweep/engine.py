"""The local engine: cells in processes of this machine, one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from gradlab.errors import GradlabError, ResourceError, StoreError
from gradlab.study import Cell, CellContext, CellResult
from gradlab.sweep.store import finished_cell, save_cell

__all__ = ["Outcome", "Progress", "run_cells"]

#: Called in the driver with (cell, steps done, steps in all, loss or None).
Progress = Callable[[Cell, int, int, float | None], None]
_REPORT_EVERY = 0.25  # seconds between two reports of one cell


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a cell ended: "done", "diverged", "failed" or "stopped", with one sentence where there is one."""

    cell: Cell
    status: str
    message: str = ""
    seconds: float = 0.0
    exit_code: int = 0
    fatal: bool = False  # it could not be stored, and so it will go with the cells to come


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What every cell of a run shares: plain data and an importable function, so that it can be sent anywhere."""

    run: Callable[[Cell, CellContext], CellResult]
    folder: Path
    device: str
    data_dir: Path | None


class _Stopped(BaseException):  # no error: it passes through "except Exception" in a cell
    """The sweep is being stopped."""


def run_cell(job: Job, cell: Cell, report: Callable[[int, int, float | None], None]) -> Outcome:
    """Run one cell in this process and store what it measured; failures come back as an outcome, never raised."""
    from gradlab.runtime import explain_memory, resolve_device, seed_everything

    wall, cpu = time.perf_counter(), time.process_time()
    device = None
    try:
        device = resolve_device(job.device)
        seed_everything(int(cell.settings.get("seed", 0)))
        result = job.run(cell, CellContext(device=device, data_dir=job.data_dir, progress=report))
        seconds = time.perf_counter() - wall
        facts = {"seconds": seconds, "cpu_seconds": time.process_time() - cpu, "device": job.device}
        try:
            save_cell(job.folder, cell, result, facts)
        except StoreError as error:
            return Outcome(cell=cell, status="failed", message=str(error), exit_code=error.exit_code, fatal=True)
        return Outcome(cell=cell, status=result.status, message=result.message, seconds=seconds)
    except _Stopped:
        return Outcome(cell=cell, status="stopped")
    except GradlabError as error:
        return Outcome(cell=cell, status="failed", message=str(error), exit_code=error.exit_code)
    except Exception as error:
        told = device and explain_memory(
            error, doing=f"cell {cell.label}", lower="batch_size, width or depth", device=device
        )
        if told:
            return Outcome(cell=cell, status="failed", message=str(told), exit_code=told.exit_code)
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}: {error}"
        with suppress(OSError):  # the full story stays with the run; the table shows one line
            log = job.folder / "errors" / f"{cell.key}.txt"
            log.parent.mkdir(exist_ok=True)
            log.write_text(traceback.format_exc(), encoding="utf-8")
            text = f"{text.rstrip('.')}. The whole error is in {log}."
        return Outcome(cell=cell, status="failed", message=" ".join(text.split()), exit_code=1)


# -- in a worker process ----------------------------------------------------------------------------------------------

_worker: dict[str, Any] = {}


def _start_worker(reports: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's: it asks cells to stop
    threading.Thread(target=_end_with_driver, daemon=True).start()
    import torch

    torch.set_num_threads(1)
    _worker.update(reports=reports, stop=stop)


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
            raise _Stopped
        now = time.monotonic()
        if now - last > _REPORT_EVERY or done == total:
            last = now
            _worker["reports"].put((cell.key, done, total, loss))

    if _worker["stop"].is_set():
        return Outcome(cell=cell, status="stopped")
    report(0, 1, None)
    return run_cell(job, cell, report)


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
                yield run_cell(job, cell, lambda done, total, loss, cell=cell: progress(cell, done, total, loss))  # type: ignore[misc]
        return
    while left:
        suspects, left = yield from _in_pool(job, left, workers, progress, stopping)
        for cell in suspects:
            died, unstarted = yield from _in_pool(job, [cell], 1, progress, stopping)
            if died or unstarted:
                yield Outcome(cell=cell, status="failed", message=_DIED, exit_code=ResourceError.exit_code)
        if left and not suspects:
            yield from (Outcome(cell=cell, status="failed", message=_NO_WORKER, exit_code=1) for cell in left)
            return


_DIED = "Its worker process died, twice (killed for memory?): try fewer --workers or smaller settings."
_NO_WORKER = "The worker processes do not start; --workers 0 runs all cells in one process and shows why."


def _in_pool(
    job: Job, cells: Sequence[Cell], workers: int, progress: Progress, stopping: Callable[[], None]
) -> Generator[Outcome, None, tuple[list[Cell], list[Cell]]]:
    """Run cells in a pool of processes until all have ended, or a process dies: then all processes end.

    Returns:
        The cells that were running when a process died, and those that had not begun.
    """
    by_key = {cell.key: cell for cell in cells}
    begun: set[str] = set()
    lost: list[Cell] = []
    with _workers(min(workers, len(cells)), stopping) as (pool, reports):
        futures: dict[Future[Outcome], Cell] = {}
        with _interrupt_held_back():
            for cell in cells:
                try:
                    futures[pool.submit(_work, job, cell)] = cell
                except BrokenProcessPool:
                    lost.append(cell)
        pending = set(futures)
        while pending:
            finished, pending = wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
            while not reports.empty():
                key, done, total, loss = reports.get()
                begun.add(key)
                progress(by_key[key], done, total, loss)
            for future in finished:
                cell = futures[future]
                error = future.exception()
                if error is None:
                    yield future.result()
                elif not isinstance(error, BrokenProcessPool):  # what a cell is or returns cannot be sent
                    text = " ".join(f"{type(error).__name__}: {error}".split())
                    yield Outcome(cell=cell, status="failed", message=text, exit_code=1)
                elif stored := finished_cell(job.folder, cell.key):  # saved, and then the pool broke
                    yield Outcome(cell=cell, status=stored.status, message=stored.message)
                else:
                    lost.append(cell)
    return [cell for cell in lost if cell.key in begun], [cell for cell in lost if cell.key not in begun]


@contextmanager
def _workers(count: int, stopping: Callable[[], None]) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    context = multiprocessing.get_context("spawn")
    # A SimpleQueue writes at once, so that a cell's first report is not lost when its process dies.
    reports, stop = context.SimpleQueue(), context.Event()
    # A worker's numeric libraries read these when they load, before any code of ours could set threads.
    threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    os.environ.update(dict.fromkeys(threads, "1"))
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker, initargs=(reports, stop))
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
