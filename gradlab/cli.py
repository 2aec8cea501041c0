"""The command line: parse, call, print, exit code. No science here."""

from __future__ import annotations

import io
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gradlab.cli_diagnose import diagnose_command
from gradlab.cli_errors import EXIT_NOT_REPRODUCED, fail, plain_errors
from gradlab.errors import GradlabError, UsageError, unknown

if TYPE_CHECKING:
    from rich.console import Console

    from gradlab.study import Study
    from gradlab.sweep.driver import SweepReport
    from gradlab.sweep.store import Run

__all__ = ["main"]

_OUT_HELP = "Folder that holds runs."


class _Group(click.Group):
    """A group that names the nearest command when one is misspelt, and orders commands as they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            fail(unknown("command", args[0], self.commands, "'gradlab --help' shows all."))
        return super().resolve_command(ctx, args)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gradlab")
def main() -> None:
    """Show how signal and gradient travel through depth and through time."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a letter gets "?" and no error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


# -- list -------------------------------------------------------------------------------------------------------------


@main.command("list")
@click.argument("name", required=False)
@plain_errors
def list_command(name: str | None) -> None:
    """Show all experiments, or one with its presets and settings."""
    from gradlab.catalog import find_study, studies

    if name is None:
        for study in studies().values():
            click.echo(f"{study.name:<18} {study.title}")
            click.echo(f"{'':<18} presets: {', '.join(study.presets)}")
        return
    _print_study(find_study(name))


def _print_study(study: Study) -> None:
    import dataclasses

    click.echo(f"{study.name}: {study.title}\n\n{study.question}\n\nTests notes {', '.join(study.notes)}.\n\nPresets:")
    for name, preset in study.presets.items():
        click.echo(f"  {name:<10} {preset.summary}")
    click.echo("\nSettings (change one with --set NAME=VALUE):")
    for item in dataclasses.fields(study.settings):
        default = ",".join(map(str, item.default)) if isinstance(item.default, tuple) else item.default
        choices = item.metadata.get("choices")
        allowed = f" One of: {', '.join(map(str, choices))}." if choices else ""
        click.echo(f"  {item.name + '=' + str(default):<32} {item.metadata.get('text', '')}{allowed}")


# -- run --------------------------------------------------------------------------------------------------------------


@main.command("run")
@click.argument("name")
@click.option("--preset", default=None, help="Named settings to begin from; 'default' if not given.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting; repeat for several.")
@click.option("--seeds", type=int, default=None, metavar="N", help="Number of seeds; short for --set seeds=N.")
@click.option("--device", default=None, help="auto, cpu, cuda, cuda:<n> or mps; 'auto' if not given.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where data sets lie; else GRADLAB_DATA.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help=_OUT_HELP)
@click.option("--workers", type=click.IntRange(0), default=None, metavar="N", help="Processes; 0 runs all in this one.")
@click.option("--resume", metavar="RUN", help="Go on with a run that was stopped: only its missing cells run.")
@click.option("--strict", is_flag=True, help="Exit with 3 when a claim is not reproduced.")
@plain_errors
def run_command(
    name: str,
    preset: str | None,
    overrides: tuple[str, ...],
    seeds: int | None,
    device: str | None,
    data_dir: Path | None,
    out: Path,
    workers: int | None,
    resume: str | None,
    strict: bool,
) -> None:
    """Run an experiment: its cells on all cores, then its claims and figures."""
    from gradlab.catalog import find_study
    from gradlab.study import parse_settings, settings_from
    from gradlab.sweep.store import Run, find_run

    study = find_study(name)
    words = [*overrides, *([f"seeds={seeds}"] if seeds is not None else [])]
    if resume is not None and (preset is not None or words):
        raise UsageError("--resume goes on with a run's own settings: leave out --preset, --set and --seeds.")
    settings = None if resume is not None else parse_settings(study, preset or "default", words)
    if data_dir is not None and not data_dir.expanduser().is_dir():
        raise UsageError(f"There is no folder {data_dir}: --data-dir takes the one that holds the data sets.")
    from gradlab.runtime import available_cores, resolve_device  # after the checks above: it loads torch
    from gradlab.sweep.driver import start_run, sweep

    console = _console()
    if resume is not None:
        run = Run(find_run(resume, out))
        if run.study != study.name:
            raise UsageError(f"{run.folder} is a run of '{run.study}', not of '{study.name}'.")
        settings = settings_from(study, run.settings)
        where = str(resolve_device(device or str(run.manifest.get("device", "auto"))))
        if len(run.cells()) < len(run.planned):
            study.prepare(settings, data_dir)
        _say(console, f"Going on with {run.folder}")
    else:
        where = str(resolve_device(device or "auto"))
        study.prepare(settings, data_dir)
        run = start_run(study, preset or "default", settings, out=out, device=where)
        _say(console, f"Writing to {run.folder}")
    count = workers if workers is not None else (available_cores() if where == "cpu" else 1)
    again = ["gradlab", "run", study.name, "--resume", str(run.folder)]
    again += ["--data-dir", str(data_dir)] if data_dir is not None else []
    try:
        report = sweep(study, settings, run, device=where, workers=count, data_dir=data_dir, console=console)
        if report.interrupted:
            sys.exit(_stopped(run, again, report.signal_number))
        sys.exit(_conclude(study, report, console, again, strict=strict))
    except KeyboardInterrupt:
        sys.exit(_stopped(run, again, signal.SIGINT))


def _stopped(run: Run, again: list[str], number: int) -> int:
    finished = f"{len(run.cells())} of {len(run.planned)} cells are finished and kept."
    click.echo(f"gradlab: Stopped. {finished} Go on with: {shlex.join(again)}", err=True)
    return 128 + number


def _conclude(study: Study, report: SweepReport, console: Console, again: list[str], *, strict: bool) -> int:
    """Print claims and figures of what was run, then what failed; return the exit code."""
    from gradlab.sweep.driver import draw_figures

    run, code, unmet = report.run, 0, 0
    if run.cells() and not report.fatal:
        try:
            unmet = _judge(study, run, console)
            with _status(console, "Drawing figures"):
                drawn, missing = draw_figures(study, run)
            for line in [*(f"Not drawn: {sentence}" for sentence in missing), *(f"Figure {path}" for path in drawn)]:
                _say(console, line)
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


def _judge(study: Study, run: Run, console: Console) -> int:
    """Decide and print a run's claims; return how many were not reproduced."""
    from gradlab.claims_report import claims_report
    from gradlab.sweep.driver import judge

    claims = judge(study, run)
    console.print(claims_report(claims))
    left = len(run.planned) - len(run.cells())
    if left:
        _say(console, f"Decided without {left} of {len(run.planned)} cells, which are not finished.")
    return sum(claim.verdict == "not reproduced" for claim in claims)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


# -- reading a run ----------------------------------------------------------------------------------------------------


@main.command("show")
@click.argument("run")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help=_OUT_HELP)
@plain_errors
def show_command(run: str, out: Path) -> None:
    """Show what a run did: settings, cells and how they ended. RUN is a folder, or a study's name for its latest."""
    from collections import Counter

    from gradlab.sweep.store import Run, find_run

    found = Run(find_run(run, out))
    manifest = found.manifest
    click.echo(f"{found.study} in {found.folder}")
    environment = manifest.get("environment", {})
    versions = environment.get("versions") if isinstance(environment, dict) else None
    versions = versions if isinstance(versions, dict) else {}
    for label, value in (
        ("started", manifest.get("started", "?")),
        ("preset", found.preset),
        ("device", manifest.get("device", "?")),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ):
        click.echo(f"  {label:<10} {value}")
    click.echo("  settings   " + ", ".join(f"{key}={value}" for key, value in found.settings.items()))
    cells = found.cells()
    states = Counter(cell.status for cell in cells)
    states["missing"] = len(manifest["cells"]) - len(cells)
    click.echo("  cells      " + ", ".join(f"{count} {state}" for state, count in states.items() if count))
    for cell in cells:
        if cell.message:
            click.echo(f"    {cell.label}: {cell.message}")


@main.command("claims")
@click.argument("run")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help=_OUT_HELP)
@click.option("--strict", is_flag=True, help="Exit with 3 when a claim is not reproduced.")
@plain_errors
def claims_command(run: str, out: Path, strict: bool) -> None:
    """Decide a run's claims from its tables and print them. RUN is a folder, or a study's name for its latest."""
    from gradlab.catalog import find_study
    from gradlab.sweep.store import Run, find_run

    found = Run(find_run(run, out))
    unmet = _judge(find_study(found.study), found, _console())
    if strict and unmet:
        sys.exit(EXIT_NOT_REPRODUCED)


@main.command("figures")
@click.argument("run")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help=_OUT_HELP)
@click.option("--only", multiple=True, metavar="NAME", help="Draw only this figure; repeat for several.")
@plain_errors
def figures_command(run: str, out: Path, only: tuple[str, ...]) -> None:
    """Draw a run's figures again from its tables. RUN is a folder, or a study's name for its latest."""
    from gradlab.catalog import find_study
    from gradlab.sweep.driver import draw_figures
    from gradlab.sweep.store import Run, find_run

    found = Run(find_run(run, out))
    study = find_study(found.study)
    for name in only:
        if name not in study.figures:
            raise unknown("figure", name, study.figures)
    drawn, missing = draw_figures(study, found, names=only)
    for path in drawn:
        click.echo(str(path))
    for sentence in missing:
        click.echo(f"Not drawn: {sentence}", err=True)
    if not study.figures:
        click.echo(f"'{study.name}' has no figures.", err=True)
    if missing and not drawn:
        sys.exit(1)


# -- diagnose ---------------------------------------------------------------------------------------------------------


main.add_command(diagnose_command)


# -- doctor -----------------------------------------------------------------------------------------------------------


@main.command("doctor")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where data sets lie; else GRADLAB_DATA.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help=_OUT_HELP)
@plain_errors
def doctor_command(data_dir: Path | None, out: Path) -> None:
    """Check this machine: Python, torch, devices, memory, data and writable folders."""
    from gradlab.doctor import checks

    found = list(checks(data_dir, out))
    for check in found:
        click.echo(f"{'ok  ' if check.good else 'FAIL'} {check.name:<12} {check.text}")
    if not all(check.good for check in found):
        sys.exit(1)


def _console() -> Console:
    from rich.console import Console

    plain = not sys.stdout.isatty()
    # Without a terminal rich assumes 80 columns and would cut tables that nobody's window limits.
    return Console(width=140 if plain and "COLUMNS" not in os.environ else None)


@contextmanager
def _status(console: Console, text: str) -> Iterator[None]:
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        yield
