"""`gradlab run` and `gradlab resume`: an experiment from settings to claims and figures."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradlab.cli_errors import EXIT_NOT_REPRODUCED, plain_errors
from gradlab.cli_screen import OUT_HELP, judge_and_print, say, status
from gradlab.cli_screen import console as make_console
from gradlab.errors import GradlabError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from gradlab.study import Study
    from gradlab.sweep.driver import Engine, SweepReport
    from gradlab.sweep.store import Run

__all__ = ["How", "how_to_run", "resume_command", "run_command", "run_to_end"]


def how_to_run(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a run that are not about what is measured."""
    options = (
        click.option("--device", default=None, help="auto, cpu, cuda, cuda:<n> or mps; 'auto' if not given."),
        click.option("--data-dir", type=click.Path(path_type=Path), help="Where data sets lie; else GRADLAB_DATA."),
        click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help=OUT_HELP),
        click.option(
            "--workers", type=click.IntRange(0), default=None, metavar="N", help="Processes; 0 runs all in this one."
        ),
        click.option(
            "--limit", type=click.FloatRange(0), default=0.0, metavar="SECONDS", help="Longest time of a cell; 0: none."
        ),
        click.option(
            "--checkpoint-every",
            type=click.FloatRange(0),
            default=60.0,
            show_default=True,
            metavar="SECONDS",
            help="How often a training cell keeps its state, to go on from there; 0: never.",
        ),
        click.option(
            "--seeds-at-once", is_flag=True, help="Train the seeds of small nets together, where the experiment can."
        ),
        click.option(
            "--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="What runs cells."
        ),
        click.option("--address", default=None, metavar="ADDRESS", help="Ray cluster; without it Ray starts here."),
        click.option("--live", is_flag=True, help="Show gradients by layer of the running cells, in a terminal."),
        click.option("--strict", is_flag=True, help="Exit with 3 when a claim is not reproduced."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@dataclass(frozen=True, kw_only=True, slots=True)
class How:
    """Options of a run that are not about what is measured."""

    device: str | None
    data_dir: Path | None
    out: Path
    workers: int | None
    limit: float
    checkpoint_every: float
    seeds_at_once: bool
    engine: str
    address: str | None
    strict: bool
    live: bool

    def __post_init__(self) -> None:
        if self.data_dir is not None and not self.data_dir.expanduser().is_dir():
            raise UsageError(f"There is no folder {self.data_dir}: --data-dir takes the one that holds the data sets.")
        if self.seeds_at_once and self.engine != "local":
            raise UsageError("--seeds-at-once runs with the local engine: leave out --engine ray.")
        if self.address is not None and self.engine != "ray":
            raise UsageError("--address names a Ray cluster: add --engine ray.")


@click.command("run")
@click.argument("name")
@click.option("--preset", default=None, help="Named settings to begin from; 'default' if not given.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting; repeat for several.")
@click.option("--seeds", type=int, default=None, metavar="N", help="Number of seeds; short for --set seeds=N.")
@click.option("--resume", metavar="RUN", help="Go on with a run that was stopped: only its missing cells run.")
@how_to_run
@plain_errors
def run_command(
    name: str, preset: str | None, overrides: tuple[str, ...], seeds: int | None, resume: str | None, **options: Any
) -> None:
    """Run an experiment: its cells on all cores, then its claims and figures."""
    from gradlab.catalog import find_study
    from gradlab.study import parse_settings

    study = find_study(name)
    words = [*overrides, *([f"seeds={seeds}"] if seeds is not None else [])]
    if resume is not None:
        if preset is not None or words:
            raise UsageError("--resume goes on with a run's own settings: leave out --preset, --set and --seeds.")
        _go_on(resume, How(**options), study)
        return
    settings = parse_settings(study, preset or "default", words)
    how = How(**options)
    _check_seeds(study, how)
    from gradlab.runtime import resolve_device  # after the checks above: it loads torch
    from gradlab.sweep.driver import start_run

    where = str(resolve_device(how.device or "auto"))
    study.prepare(settings, how.data_dir)
    run = start_run(study, preset or "default", settings, out=how.out, device=where)
    console = make_console()
    say(console, f"Writing to {run.folder}")
    sys.exit(run_to_end(study, settings, run, where, how, console))


@click.command("resume")
@click.argument("run", required=False)
@how_to_run
@plain_errors
def resume_command(run: str | None, **options: Any) -> None:
    """Go on with a run that was stopped. RUN is a folder, or a study's name for its latest; without it, the latest."""
    from gradlab.sweep.store import latest_run

    how = How(**options)
    _go_on(run if run is not None else str(latest_run(how.out)), how)


def _go_on(text: str, how: How, study: Study | None = None) -> None:
    """Go on with the run that `text` means, which must be one of `study` if that is given."""
    from gradlab.catalog import find_study
    from gradlab.study import settings_from
    from gradlab.sweep.store import Run, find_run

    run = Run(find_run(text, how.out))
    if study is not None and run.study != study.name:
        raise UsageError(f"{run.folder} is a run of '{run.study}', not of '{study.name}'.")
    study = study or find_study(run.study)
    _check_seeds(study, how)
    settings = settings_from(study, run.settings)
    from gradlab.runtime import resolve_device

    where = str(resolve_device(how.device or str(run.manifest.get("device", "auto"))))
    if run.unfinished():
        study.prepare(settings, how.data_dir)
    console = make_console()
    say(console, f"Going on with {run.folder}")
    sys.exit(run_to_end(study, settings, run, where, how, console))


def _check_seeds(study: Study, how: How) -> None:
    if how.seeds_at_once and not study.run_seeds:
        raise UsageError(f"'{study.name}' has no part whose seeds can be trained at once: leave out --seeds-at-once.")


def run_to_end(
    study: Study, settings: Any, run: Run, where: str, how: How, console: Console, *, brief: bool = False
) -> int:
    """Run the missing cells, judge, draw, and say what failed and how to go on.

    Args:
        study: The run's study.
        settings: Its settings.
        run: The run.
        where: Name of the device, already resolved.
        how: Options of the command.
        console: Where progress and claims are shown.
        brief: Neither print the claims nor name the figures: the caller does so for several runs.

    Returns:
        The exit code; 128 plus the signal's number where the run was stopped.
    """
    from gradlab.sweep.driver import sweep

    again = ["gradlab", "resume", str(run.folder)]
    again += ["--data-dir", str(how.data_dir)] if how.data_dir is not None else []
    again += ["--seeds-at-once"] if how.seeds_at_once else []
    again += ["--engine", how.engine] if how.engine != "local" else []
    again += ["--address", how.address] if how.address is not None else []
    try:
        report = sweep(
            study, settings, run, device=where, workers=_workers(how, where, console), data_dir=how.data_dir,
            console=console, limit=how.limit, checkpoint_every=how.checkpoint_every, engine=_engine(how),
            live=_live(how, console), seeds_at_once=how.seeds_at_once,
        )  # fmt: skip
        if report.interrupted:
            return _stopped(run, again, report.signal_number)
        return _conclude(study, report, console, again, strict=how.strict, brief=brief)
    except KeyboardInterrupt:
        return _stopped(run, again, signal.SIGINT)


def _workers(how: How, where: str, console: Console) -> int:
    if how.workers is not None or how.engine != "local":
        return how.workers or 0
    from gradlab.runtime import available_cores, free_bytes
    from gradlab.sweep.engine import worker_count

    count, told = worker_count(where, cores=available_cores(), free_bytes=free_bytes())
    if told:
        say(console, told)
    return count


def _live(how: How, console: Console) -> bool:
    """Return whether layers are shown; where they cannot be, say why."""
    reason = ""
    if how.live and how.engine != "local":
        reason = "cells on a Ray cluster report their progress only"
    elif how.live and (not console.is_terminal or console.is_dumb_terminal):
        reason = "there is no terminal to draw in"
    if reason:
        click.echo(f"gradlab: --live shows nothing here: {reason}.", err=True)
    return how.live and not reason


def _engine(how: How) -> Engine | None:
    if how.engine == "local":
        return None
    from gradlab.sweep.ray_engine import RayEngine

    return RayEngine(address=how.address)


def _stopped(run: Run, again: list[str], number: int) -> int:
    finished = f"{len(run.cells())} of {len(run.planned)} cells are finished and kept."
    click.echo(f"gradlab: Stopped. {finished} Go on with: {shlex.join(again)}", err=True)
    return 128 + number


def _conclude(
    study: Study, report: SweepReport, console: Console, again: list[str], *, strict: bool, brief: bool
) -> int:
    """Print claims and figures of what was run, then what failed; return the exit code."""
    from gradlab.sweep.driver import draw_figures

    run, code, unmet = report.run, 0, 0
    if run.cells() and not report.fatal:
        try:
            unmet = judge_and_print(study, run, console, brief=brief)
            with status(console, "Drawing figures"):
                drawn, missing = draw_figures(study, run)
            named = [] if brief else [f"Figure {path}" for path in drawn]
            for line in [*(f"Not drawn: {sentence}" for sentence in missing), *named]:
                say(console, line)
        except GradlabError as error:
            click.echo(f"gradlab: {error}", err=True)
            code = error.exit_code
    if report.failed:
        first, kept = (report.fatal or report.failed)[0], len(run.cells())
        finished = f"{kept or 'None'} {'are' if kept > 1 else 'is'}"
        click.echo(
            f"gradlab: {len(report.failed)} of {len(run.planned)} cells failed, first {first.cell.label}: "
            f"{first.message} {finished} finished and kept; to run the others: {shlex.join(again)}",
            err=True,
        )
        return max(outcome.exit_code for outcome in report.failed)
    return code or (EXIT_NOT_REPRODUCED if strict and unmet else 0)
