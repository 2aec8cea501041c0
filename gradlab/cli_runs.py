"""Commands that read runs: ls, show, claims, figures, compare, rm."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from gradlab.cli_errors import EXIT_NOT_REPRODUCED, plain_errors
from gradlab.cli_screen import OUT_HELP, judge_and_print
from gradlab.cli_screen import console as make_console
from gradlab.errors import StoreError, UsageError, unknown

__all__ = ["claims_command", "compare_command", "figures_command", "ls_command", "rm_command", "show_command"]

_OUT = click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help=OUT_HELP)


@click.command("ls")
@click.argument("study", required=False)
@_OUT
@plain_errors
def ls_command(study: str | None, out: Path) -> None:
    """List runs: which are finished, and of which cells are missing. STUDY lists only its runs."""
    from gradlab.sweep.store import Run, all_runs

    found = all_runs(out)
    kept = [folder for folder in found if study is None or folder.parent.name == study]
    if study is not None and found and not kept:
        raise unknown("study with runs", study, sorted({folder.parent.name for folder in found}))
    if not kept:
        raise StoreError(f"There is no run under {out}: 'gradlab run depth-sweep' makes one.")
    width = max(len(str(folder)) for folder in kept)
    for folder in kept:
        try:
            run = Run(folder)
            done, planned = len(run.planned) - len(run.unfinished()), len(run.planned)
            state = "finished" if done == planned else f"{done} of {planned} cells"
            click.echo(f"{folder!s:<{width}}  {run.preset:<10} {state}")
        except StoreError as error:
            click.echo(f"{folder!s:<{width}}  damaged: {error}")


@click.command("compare")
@click.argument("first")
@click.argument("second")
@click.option(
    "--figure", type=click.Path(path_type=Path, dir_okay=False), help="Draw losses side by side to this file."
)
@_OUT
@plain_errors
def compare_command(first: str, second: str, figure: Path | None, out: Path) -> None:
    """Compare two runs of one study: claims and final losses side by side, with a test of each difference."""
    from gradlab.run_comparison import compare_runs, draw_losses, print_comparison
    from gradlab.storage import replace_file
    from gradlab.sweep.store import Run, find_run

    runs = [Run(find_run(text, out)) for text in (first, second)]
    found = compare_runs(*runs)
    print_comparison(found, make_console())
    if figure is not None:
        replace_file(figure, draw_losses(found, figure.suffix))
        click.echo(f"Figure {figure}")


@click.command("rm")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_OUT
@plain_errors
def rm_command(runs: tuple[str, ...], yes: bool, out: Path) -> None:
    """Delete runs, after asking. RUN is a run's folder, or <study>/<time> under --out."""
    import shutil

    from gradlab.sweep.lock import hold_run
    from gradlab.sweep.store import Run, find_run

    found = [Run(find_run(text, out, latest=False)) for text in runs]
    for run in found:
        done = len(run.planned) - len(run.unfinished())
        click.echo(f"{run.folder}: {done} of {len(run.planned)} cells finished")
    if not yes and not click.confirm(f"Delete {len(found)} run{'s'[: len(found) != 1]} for ever?"):
        click.echo("Nothing was deleted.")
        return
    for run in found:
        with hold_run(run.folder):  # not under the hands of one that works on it
            gone = run.folder.with_name(f".{run.folder.name}.deleted")
            run.folder.rename(gone)
        shutil.rmtree(gone)
        click.echo(f"Deleted {run.folder}")


@click.command("show")
@click.argument("run")
@_OUT
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


@click.command("claims")
@click.argument("run")
@_OUT
@click.option("--strict", is_flag=True, help="Exit with 3 when a claim is not reproduced.")
@plain_errors
def claims_command(run: str, out: Path, strict: bool) -> None:
    """Decide a run's claims from its tables and print them. RUN is a folder, or a study's name for its latest."""
    from gradlab.catalog import find_study
    from gradlab.sweep.store import Run, find_run

    found = Run(find_run(run, out))
    unmet = judge_and_print(find_study(found.study), found, make_console())
    if strict and unmet:
        sys.exit(EXIT_NOT_REPRODUCED)


@click.command("figures")
@click.argument("run", required=False)
@_OUT
@click.option("--only", multiple=True, metavar="NAME", help="Draw only this figure; repeat for several.")
@click.option("--check", is_flag=True, help="Compare the gallery's CSVs with what its tables give; draw nothing.")
@click.option(
    "--gallery", type=click.Path(path_type=Path), default=Path("figures"), show_default=True, help="For --check."
)
@plain_errors
def figures_command(run: str | None, out: Path, only: tuple[str, ...], check: bool, gallery: Path) -> None:
    """Draw a run's figures again from its tables. RUN is a folder, or a study's name for its latest.

    With --check and no RUN: draw the published gallery's figures again from the tables stored with it, in memory, and
    compare the data with the stored CSVs, number by number, within a relative difference of 1e-9.
    """
    from gradlab.catalog import find_study
    from gradlab.sweep.driver import draw_figures
    from gradlab.sweep.store import Run, find_run

    if check:
        if run is not None or only:
            raise UsageError("--check looks at the whole gallery: leave out RUN and --only.")
        sys.exit(_check_gallery(gallery))
    if run is None:
        raise UsageError("Say which run: 'gradlab ls' lists them. --check needs none.")
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


def _check_gallery(gallery: Path) -> int:
    """Print what of a gallery agrees with its tables and what does not; return the exit code."""
    from gradlab.catalog import find_study
    from gradlab.gallery import StoredResults, check_folder, gallery_folders, gallery_readme

    wrong = []
    for folder in gallery_folders(gallery):
        good, bad = check_folder(find_study(StoredResults(folder).about["study"]), folder)
        told = f"{len(good)} figures agree" if good or bad else "not checked, its tables are not kept here"
        click.echo(f"{folder}: {told}")
        wrong += bad
    readme = gallery / "README.md"
    if not readme.exists() or readme.read_text(encoding="utf-8") != gallery_readme(gallery):
        wrong.append(f"{readme} is not what the captions give: 'gradlab reproduce --publish {gallery}' writes it.")
    for sentence in wrong:
        click.echo(f"gradlab: {sentence}", err=True)
    return 1 if wrong else 0
