"""One cell run to its end in whatever process: what every engine shares."""

from __future__ import annotations

import inspect
import signal
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from gradlab.errors import GradlabError, StoreError
from gradlab.study import Cell, CellContext, CellResult
from gradlab.sweep.groups import CellGroup
from gradlab.sweep.store import finished_cell, save_cell

if TYPE_CHECKING:
    from gradlab.checkpoint import Checkpoint

__all__ = ["Job", "Outcome", "Progress", "Stopped", "checkpoint_folder", "limit_message", "run_cell"]

#: Called in the driver with (cell, steps done, steps in all, loss or None) and, of a `live` job, the latest recorded
#: step of the training in it as a `gradlab.live.Snapshot`, or None where there is none new.
Progress = Callable[..., None]


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
    """What every cell of a run shares: plain data and an importable function, so that it can be sent anywhere.

    Args:
        run: Runs one cell.
        folder: The run's folder.
        device: Name of the device.
        data_dir: Where data sets lie, if the user said.
        limit: Seconds that a cell may take; 0 for no limit.
        checkpoint_every: Seconds between two states that a training cell keeps; 0 keeps none.
        run_seeds: Part -> function that runs a group of its cells; see `Study`.
        live: Somebody looks on: progress comes with the gradient norms of the layers.
    """

    run: Callable[[Cell, CellContext], CellResult]
    folder: Path
    device: str
    data_dir: Path | None
    limit: float = 0.0
    checkpoint_every: float = 60.0
    run_seeds: Mapping[str, Callable[[Sequence[Cell], CellContext], Sequence[CellResult]]] = field(default_factory=dict)
    live: bool = False


class Stopped(BaseException):  # no error: it passes through "except Exception" in a cell
    """The sweep is being stopped."""


class _TimedOut(BaseException):
    """The cell has run past its limit."""


def limit_message(limit: float) -> str:
    """Return the sentence for a cell that ran past its limit."""
    return f"It ran past its limit of {limit:g} s: raise --limit, or look for a hang in it."


def run_cell(job: Job, cell: Cell, report: Callable[[int, int, float | None], None]) -> Outcome:
    """Run one cell, or a group, in this process and store what it measured.

    Failures come back as an outcome, never raised. The outcome of a group is that of all its cells: "done" where each
    is stored.
    """
    from gradlab.runtime import explain_memory, resolve_device, seed_everything

    wall, cpu = time.perf_counter(), time.process_time()
    device = None
    kept = _checkpoint(job, cell)
    try:
        device = resolve_device(job.device)
        seed_everything(int(cell.settings.get("seed", 0)))
        with _alarm(job.limit):
            context = CellContext(device=device, data_dir=job.data_dir, progress=report, checkpoint=kept)
            measured = _measure(job, cell, context)
        seconds = time.perf_counter() - wall
        share = len(measured)
        facts = {"seconds": seconds / share, "cpu_seconds": (time.process_time() - cpu) / share, "device": job.device}
        for own, result in measured:
            try:
                save_cell(job.folder, own, result, facts | ({"together": share} if share > 1 else {}))
            except StoreError as error:
                return _not_stored(job, own, error)
        if isinstance(cell, CellGroup):
            return Outcome(cell=cell, status="done", seconds=seconds)
        if kept is not None:
            kept.clear()
        said = " ".join([*(kept.notes if kept is not None else ()), result.message]).strip()
        return Outcome(cell=cell, status=result.status, message=said, seconds=seconds)
    except Stopped:
        return Outcome(cell=cell, status="stopped")
    except _TimedOut:
        return Outcome(cell=cell, status="failed", message=limit_message(job.limit), exit_code=1)
    except GradlabError as error:
        return Outcome(cell=cell, status="failed", message=str(error), exit_code=error.exit_code)
    except Exception as error:
        told = device and explain_memory(
            error, doing=f"cell {cell.label}", lower="batch_size, width or depth", device=device
        )
        if told:
            return Outcome(cell=cell, status="failed", message=str(told), exit_code=told.exit_code)
        return _bug(job, cell, error)


def _measure(job: Job, cell: Cell, context: CellContext) -> list[tuple[Cell, CellResult]]:
    if not isinstance(cell, CellGroup):
        return [(cell, job.run(cell, context))]
    return list(zip(cell.cells, job.run_seeds[cell.part](cell.cells, context), strict=True))


def checkpoint_folder(run: Path, key: str) -> Path:
    """Return where a cell of a run keeps its state until it is stored."""
    return run / "checkpoints" / key


def _checkpoint(job: Job, cell: Cell) -> Checkpoint | None:
    from gradlab.checkpoint import Checkpoint  # here, for it loads torch

    if not job.checkpoint_every or isinstance(cell, CellGroup):
        return None
    # A state of other code is not gone on with: the two halves of the run would be of different experiments.
    identity = f"{cell.key} {metadata.version('gradlab')} {_code(job.run):08x}"
    return Checkpoint(checkpoint_folder(job.folder, cell.key), every=job.checkpoint_every, identity=identity)


def _code(run: Callable[..., object]) -> int:
    """Return the CRC-32 of the file that a function was written in; 0 where there is none."""
    try:
        return zlib.crc32(Path(inspect.getfile(inspect.unwrap(run))).read_bytes())
    except (OSError, TypeError):
        return 0


def _not_stored(job: Job, cell: Cell, error: StoreError) -> Outcome:
    """Say that a cell could not be stored, unless another process stored the same one a moment before."""
    with suppress(StoreError):
        if (stored := finished_cell(job.folder, cell.key)) is not None:
            return Outcome(cell=cell, status=stored.status, message=stored.message)
    return Outcome(cell=cell, status="failed", message=str(error), exit_code=error.exit_code, fatal=True)


def _bug(job: Job, cell: Cell, error: Exception) -> Outcome:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}: {error}"
    with suppress(OSError):  # the full story stays with the run; the table shows one line
        log = job.folder / "errors" / f"{cell.key}.txt"
        log.parent.mkdir(exist_ok=True)
        log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        text = f"{text.rstrip('.')}. The whole error is in {log}."
    return Outcome(cell=cell, status="failed", message=" ".join(text.split()), exit_code=1)


@contextmanager
def _alarm(limit: float) -> Iterator[None]:
    """Raise in this thread when the limit has passed; the engine ends what hangs where no signal is handled."""
    main = threading.current_thread() is threading.main_thread()
    if not limit or not main or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: object) -> None:
        raise _TimedOut

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before if before is not None else signal.SIG_DFL)
