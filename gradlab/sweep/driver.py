"""A study from settings to a finished run: cells, claims, figures."""

from __future__ import annotations

import dataclasses
import io
import logging
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradlab.errors import GradlabError, StoreError, UsageError
from gradlab.storage import replace_file
from gradlab.study import Cell, Drawing, Study
from gradlab.sweep.cell_run import Job, Outcome, checkpoint_folder
from gradlab.sweep.engine import run_cells
from gradlab.sweep.groups import CellGroup, group_by_seed
from gradlab.sweep.lock import hold_run
from gradlab.sweep.progress import SweepDisplay
from gradlab.sweep.store import Run, create_run, finished_cell, set_damaged_aside

if TYPE_CHECKING:
    from rich.console import Console

    from gradlab.analysis.claims import Claim

Engine = Callable[..., Iterator[Outcome]]

__all__ = ["Engine", "SweepReport", "decide", "draw_figures", "drawn", "judge", "start_run", "sweep"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepReport:
    """How a sweep went."""

    run: Run
    outcomes: Sequence[Outcome]
    interrupted: bool
    signal_number: int = signal.SIGINT  # which signal, where interrupted

    @property
    def failed(self) -> list[Outcome]:
        """Cells that failed."""
        return [outcome for outcome in self.outcomes if outcome.status == "failed"]

    @property
    def fatal(self) -> list[Outcome]:
        """Cells that could not be stored, which ended the sweep."""
        return [outcome for outcome in self.outcomes if outcome.fatal]


def start_run(
    study: Study, preset: str, settings: Any, *, out: Path, device: str, facts: Mapping[str, Any] | None = None
) -> Run:
    """Plan a study's cells and make the folder of a new run.

    Args:
        study: What to run.
        preset: Name of the preset the settings began from.
        settings: An instance of the study's settings.
        out: Folder that holds runs.
        device: Name of the device, already resolved.
        facts: Further entries of the manifest.

    Raises:
        StoreError: The folder cannot be written.
    """
    from gradlab.runtime import environment

    manifest = {
        "preset": preset,
        "settings": dataclasses.asdict(settings),
        "device": device,
        "command": sys.argv,
        "environment": environment(),
        **(facts or {}),
    }
    return create_run(out, study.name, manifest, study.plan(settings))


def sweep(
    study: Study,
    settings: Any,
    run: Run,
    *,
    device: str,
    workers: int,
    data_dir: Path | None,
    console: Console,
    limit: float = 0.0,
    checkpoint_every: float = 60.0,
    engine: Engine | None = None,
    live: bool = False,
    seeds_at_once: bool = False,
) -> SweepReport:
    """Run the cells of a run that are not finished yet.

    Ctrl-C, and the SIGTERM of a batch system, stop the sweep: running cells end at their next step, finished ones stay.
    So it does when a cell cannot be stored: the next ones would be computed for nothing.

    Args:
        study: What to run.
        settings: Its settings.
        run: The run to fill.
        device: Name of the device, already resolved.
        workers: Processes of the local engine; 0 runs all cells in this one.
        data_dir: Where data sets lie, if the user said.
        console: Where progress is shown.
        limit: Seconds that a cell may take; 0 for no limit.
        checkpoint_every: Seconds between two states that a training cell keeps, to go on from; 0 keeps none.
        engine: Runs the cells: called as `run_cells` is. Default: the local one.
        live: Show the gradient norm by layer of running cells too, where the console is a terminal.
        seeds_at_once: Run cells that differ in their seed alone together, in the parts where the study can; a group
            that fails is run again cell by cell.

    Raises:
        UsageError: The run was planned by another version of the study, so that its cells are not this plan's; or
            another driver works on it.
        StoreError: The run's folder cannot be written.
    """
    with hold_run(run.folder):
        live = live and console.is_terminal and not console.is_dumb_terminal
        job = Job(
            run=study.run, folder=run.folder, device=device, data_dir=data_dir, limit=limit,
            checkpoint_every=checkpoint_every, live=live, run_seeds=study.run_seeds if seeds_at_once else {},
        )  # fmt: skip
        return _sweep(study, settings, run, job, workers, console, engine or run_cells)


def _sweep(
    study: Study,
    settings: Any,
    run: Run,
    job: Job,
    workers: int,
    console: Console,
    engine: Engine,
) -> SweepReport:
    cells = study.plan(settings)
    if {cell.key for cell in cells} != run.planned:
        raise UsageError(
            f"{run.folder} was planned by another version of '{study.name}', with other cells: it can be read but not "
            f"gone on with; 'gradlab run {study.name}' starts a new run."
        )
    for sentence in set_damaged_aside(run):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    finished = {cell.key for cell in run.cells()}
    todo = [cell for cell in cells if cell.key not in finished]
    for key in finished:  # stored, and then the process died
        shutil.rmtree(checkpoint_folder(run.folder, key), ignore_errors=True)
    units = group_by_seed(todo, job.run_seeds)
    outcomes, stopped_by = _run_units(job, units, workers, console, engine)
    apart = [cell for outcome in outcomes if outcome.status == "failed" for cell in _members(outcome.cell)]
    if apart and stopped_by is None and not any(outcome.fatal for outcome in outcomes):
        missing = [cell for cell in apart if finished_cell(run.folder, cell.key) is None]
        more, stopped_by = _run_units(job, missing, workers, console, engine)
        kept = [outcome for outcome in outcomes if outcome.status != "failed" or not _members(outcome.cell)]
        outcomes = kept + more
    return SweepReport(
        run=Run(run.folder),
        outcomes=outcomes,
        interrupted=stopped_by is not None,
        signal_number=stopped_by or signal.SIGINT,
    )


def _members(cell: Cell) -> Sequence[Cell]:
    return cell.cells if isinstance(cell, CellGroup) else ()


def _run_units(
    job: Job, units: Sequence[Cell], workers: int, console: Console, engine: Engine
) -> tuple[list[Outcome], int | None]:
    """Run cells and groups; return how they ended, and the signal that stopped them if one did."""
    outcomes: list[Outcome] = []
    if not units:
        return outcomes, None
    with SweepDisplay(console, len(units), live=job.live) as display, _termination_interrupts():
        stream = engine(job, units, workers=workers, progress=display.update, stopping=display.stopping)
        with closing(stream):  # type: ignore[type-var]
            try:
                for outcome in stream:
                    outcomes.append(outcome)
                    display.finish(outcome)
                    if outcome.fatal:
                        break
            except KeyboardInterrupt as interrupt:
                return outcomes, signal.SIGTERM if isinstance(interrupt, _Terminated) else signal.SIGINT
    return outcomes, None


class _Terminated(KeyboardInterrupt):
    """SIGTERM."""


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def decide(study: Study, run: Run) -> list[Claim]:
    """Decide a study's claims from a run's tables, and write nothing.

    Raises:
        StoreError: The run has no finished cell, or lacks cells that the claims need.
    """
    _check_not_empty(run)
    try:
        return list(study.claims(run))
    except StoreError:  # a damaged table; going on with the run would not mend it
        raise
    except Exception as error:
        if gaps := _gaps(run, error):
            raise StoreError(f"The claims cannot be decided: {gaps}") from error
        raise


def judge(study: Study, run: Run) -> list[Claim]:
    """Decide a study's claims from a run's tables and write claims.json.

    Raises:
        StoreError: The run has no finished cell, or lacks cells that the claims need; claims.json cannot be written.
    """
    from gradlab.analysis.claims import claims_to_json

    claims = decide(study, run)
    replace_file(run.folder / "claims.json", claims_to_json(claims).encode())
    return claims


@contextmanager
def drawn(study: Study, run: Run, name: str) -> Iterator[Drawing | str]:
    """Draw one of a study's figures in the house's style, open while the block runs.

    Yields:
        The drawing, or a sentence that says why it cannot be drawn from what the run holds.

    Raises:
        StoreError: The run has no finished cell, or a table is damaged.
    """
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    from gradlab.plots.style import paper_style

    _check_not_empty(run)
    with paper_style():
        try:
            drawing: Drawing | str = study.figures[name](run)
        except StoreError:
            plt.close("all")
            raise
        except Exception as error:
            plt.close("all")
            drawing = str(error) if isinstance(error, GradlabError) else _gaps(run, error)
            if not drawing:
                raise
        try:
            yield drawing
        finally:
            plt.close("all")


def draw_figures(study: Study, run: Run, *, names: Sequence[str] = ()) -> tuple[list[Path], list[str]]:
    """Draw a study's figures from a run's tables into its folder `figures`: PNG, PDF, and the CSV drawn.

    Args:
        study: The study.
        run: One of its runs.
        names: Only these figures; all of them by default.

    Returns:
        The PNG files, and a sentence for each figure that could not be drawn from what the run holds.

    Raises:
        StoreError: The run has no finished cell, or a file cannot be written.
    """
    # It wonders, on the terminal, about the dates inside the fonts that matplotlib brings.
    logging.getLogger("fontTools").setLevel(logging.ERROR)
    _check_not_empty(run)
    paths, missing, captions = [], [], []
    folder = run.folder / "figures"
    for name in study.figures:
        if names and name not in names:
            continue
        with drawn(study, run, name) as drawing:
            if isinstance(drawing, str):
                missing.append(f"{name}: {drawing}")
                continue
            for suffix in ("png", "pdf"):
                buffer = io.BytesIO()
                # No date in the file: redrawing the same tables gives the same bytes.
                metadata = {"CreationDate": None} if suffix == "pdf" else {"Software": None}
                drawing.figure.savefig(buffer, format=suffix, metadata=metadata)
                drawing.figure.set_layout_engine("none")  # laid out once; a second time would take as long
                replace_file(folder / f"{name}.{suffix}", buffer.getvalue())
            replace_file(folder / f"{name}.csv", drawing.data.to_csv(index=False).encode())
            captions.append(f"## {name}\n\n![{name}]({name}.png)\n\n{drawing.caption}\n")
            paths.append(folder / f"{name}.png")
    if captions and not names:
        command = f"gradlab figures {run.study}/{run.folder.name}"
        title = f"# {study.title}\n\nDrawn by `{command}` from the tables of this run.\n\n"
        replace_file(folder / "README.md", (title + "\n".join(captions)).encode())
    return paths, missing


def _check_not_empty(run: Run) -> None:
    if not run.cells():
        raise StoreError(
            f"The run {run.folder} is empty: none of its {len(run.manifest['cells'])} cells is finished; "
            f"'gradlab resume {run.folder}' goes on with it."
        )


def _gaps(run: Run, error: Exception) -> str:
    """Return a sentence on the cells a run lacks where that explains `error`; "" where the run is whole."""
    left = len(run.planned) - len(run.cells())
    if not left:
        return ""
    told = f" ({' '.join(f'{type(error).__name__}: {error}'.split())})" if not isinstance(error, GradlabError) else ""
    return (
        f"{left} of {len(run.planned)} cells of {run.folder} are not finished{told}; "
        f"'gradlab resume {run.folder}' goes on with it."
    )
