"""`gradlab reproduce`: every experiment, and all claims in one table."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradlab.cli_errors import EXIT_NOT_REPRODUCED, plain_errors
from gradlab.cli_run import How, how_to_run, run_to_end
from gradlab.cli_screen import console as make_console
from gradlab.cli_screen import say
from gradlab.errors import GradlabError, StoreError, unknown

if TYPE_CHECKING:
    from rich.console import Console

    from gradlab.reproduction import Judged
    from gradlab.study import Study
    from gradlab.sweep.store import Run

__all__ = ["reproduce_command"]


@click.command("reproduce")
@click.option("--preset", default="default", show_default=True, help="Preset of every experiment.")
@click.option("--only", multiple=True, metavar="NAME", help="Only this experiment; repeat for several.")
@click.option(
    "--publish", type=click.Path(path_type=Path, file_okay=False), help="Put claims and figures into this gallery too."
)
@how_to_run
@plain_errors
def reproduce_command(preset: str, only: tuple[str, ...], publish: Path | None, **options: Any) -> None:
    """Run every experiment and show all claims in one table: expected, measured, by which rule, and the verdict.

    Called again it goes on where it stopped: runs under --out with the preset's own settings are used, and only their
    missing cells run. The table is written to <out>/reproduce-<preset>/ as claims.md and claims.csv.
    """
    from gradlab.catalog import studies

    how, known = How(**options), studies()
    for name in only:
        if name not in known:
            raise unknown("experiment", name, known, "'gradlab list' shows all.")
    chosen = {name: study for name, study in known.items() if not only or name in only}
    if not any(preset in study.presets for study in chosen.values()):
        raise unknown("preset", preset, dict.fromkeys(name for study in chosen.values() for name in study.presets))
    again = ["gradlab", "reproduce", "--preset", preset, "--out", str(how.out)]
    again += [word for name in only for word in ("--only", name)]
    again += ["--data-dir", str(how.data_dir)] if how.data_dir is not None else []
    console = make_console()
    parts: list[tuple[Study, Run]] = []
    troubles: list[str] = []
    began, code = time.monotonic(), 0
    for place, (name, study) in enumerate(chosen.items(), 1):
        minutes = (time.monotonic() - began) / 60
        say(console, f"\n[{place}/{len(chosen)}] {name}: {study.title} ({minutes:.0f} min so far)")
        ended = _one(study, preset, how, console, parts)
        if isinstance(ended, str):
            click.echo(f"gradlab: {ended}", err=True)
            troubles.append(f"{name}: {ended}")
            code = max(code, 1)
        elif ended > 128:  # stopped: nothing more is begun, and what there is is shown
            troubles.append(f"Stopped in {name}; go on with: {shlex.join(again)}")
            code = ended
            break
        elif ended:
            retry = shlex.join(["gradlab", "resume", str(parts[-1][1].folder)])
            troubles.append(f"{name} failed in part; retry with: {retry}")
            code = max(code, ended)
    made = ["gradlab", "reproduce", "--preset", preset, *(word for name in only for word in ("--only", name))]
    unmet = _show(parts, troubles, preset, shlex.join(made), how, publish, console)
    if code:
        click.echo("\n".join(f"gradlab: {sentence}" for sentence in troubles), err=True)
        if code < 128:
            click.echo(f"gradlab: Finished cells are kept; to run what is missing: {shlex.join(again)}", err=True)
    sys.exit(code or (EXIT_NOT_REPRODUCED if how.strict and unmet else 0))


def _one(study: Study, preset: str, how: How, console: Console, parts: list[tuple[Study, Run]]) -> int | str:
    """Run one experiment to its end; return its exit code, or a sentence where it could not begin."""
    from gradlab.reproduction import run_of_preset
    from gradlab.runtime import resolve_device
    from gradlab.study import parse_settings
    from gradlab.sweep.driver import start_run

    try:
        settings = parse_settings(study, preset)
        run = run_of_preset(study, preset, settings, how.out)
        where = str(resolve_device(how.device or (str(run.manifest.get("device", "auto")) if run else "auto")))
        if run is None or run.unfinished():
            study.prepare(settings, how.data_dir)
        if run is None:
            run = start_run(study, preset, settings, out=how.out, device=where)
            say(console, f"Writing to {run.folder}")
        else:
            say(console, f"{'Going on with' if run.unfinished() else 'Finished already:'} {run.folder}")
        parts.append((study, run))
        here = replace(how, seeds_at_once=how.seeds_at_once and study.run_seeds is not None)
        # --strict counts the claims of all experiments, at the end.
        return run_to_end(study, settings, run, where, replace(here, strict=False), console, brief=True)
    except GradlabError as error:
        return str(error)
    except KeyboardInterrupt:  # before cells ran, or after
        return 130
    except Exception as error:  # a bug in one experiment: the others are run all the same
        see = (
            f"'gradlab claims {parts[-1][1].folder}'"
            if parts and parts[-1][0] is study
            else f"'gradlab run {study.name}'"
        )
        return f"{type(error).__name__}: {' '.join(str(error).split())} This is a bug; {see} shows where."


def _show(
    runs: list[tuple[Study, Run]],
    troubles: list[str],
    preset: str,
    command: str,
    how: How,
    publish: Path | None,
    console: Console,
) -> int:
    """Print and write what was decided; return how many claims were not reproduced."""
    from gradlab.claims_report import claims_report
    from gradlab.reproduction import claims_table, claims_to_markdown, judged
    from gradlab.storage import replace_file

    parts: list[Judged] = []
    for study, run in runs:
        try:
            parts.append(judged(study, run))
        except StoreError as error:
            troubles.append(f"{study.name}: {error}")
    claims = [claim for part in parts for claim in part.claims]
    if claims:
        console.print(claims_report(claims, [part.study for part in parts for _ in part.claims]))
    for sentence in (f"{part.study}: {left}" for part in parts if (left := _left(part))):
        say(console, sentence)
    files = {
        "claims.md": claims_to_markdown(parts, troubles, command=command),
        "claims.csv": claims_table(parts).to_csv(index=False),
    }
    for folder in (how.out / f"reproduce-{preset}", *([publish] if publish is not None else [])):
        for name, text in files.items():
            replace_file(folder / name, text.encode())
            say(console, f"Wrote {folder / name}")
    if runs:
        say(console, _report([run for _, run in runs], {study.name: study for study, _ in runs}, how.out, preset))
    if publish is not None:
        _publish(runs, publish, console)
    return sum(claim.verdict == "not reproduced" for claim in claims)


def _left(part: Judged) -> str:
    """Return what a run lacks, as a sentence; "" where nothing."""
    if not part.claims:
        return "no claim was decided."
    return f"decided without {part.unfinished} of {len(part.run.planned)} cells." if part.unfinished else ""


def _publish(runs: list[tuple[Study, Run]], gallery: Path, console: Console) -> None:
    from gradlab.gallery import gallery_readme, publish
    from gradlab.storage import replace_file

    for study, run in runs:
        if run.unfinished():
            say(console, f"Not published: {study.name}, whose run is not finished.")
        else:
            folder, missing = publish(study, run, gallery)
            say(console, f"Published {folder}")
            for sentence in missing:
                say(console, f"Not published: {study.name}, {sentence}")
    replace_file(gallery / "README.md", gallery_readme(gallery).encode())


def _report(runs: list[Run], studies: dict[str, Study], out: Path, preset: str) -> str:
    """Write one page about all runs; return where it is, or why there is none."""
    from gradlab.report import write_report

    try:
        return f"Wrote {write_report(runs, out / f'reproduce-{preset}' / 'report.html', studies=studies)}"
    except GradlabError as error:
        return f"No report: {error}"
