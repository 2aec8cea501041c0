"""The command line: parse, call, print, exit code. No science here."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gradlab.cli_bench import bench_group
from gradlab.cli_diagnose import diagnose_command
from gradlab.cli_errors import fail, plain_errors
from gradlab.cli_report import report_command
from gradlab.cli_reproduce import reproduce_command
from gradlab.cli_run import resume_command, run_command
from gradlab.cli_runs import (
    claims_command,
    compare_command,
    figures_command,
    ls_command,
    rm_command,
    show_command,
)
from gradlab.cli_screen import OUT_HELP
from gradlab.errors import unknown

if TYPE_CHECKING:
    from gradlab.study import Study

__all__ = ["main"]


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


for command in (
    run_command,
    resume_command,
    reproduce_command,
    ls_command,
    show_command,
    claims_command,
    figures_command,
    compare_command,
    report_command,
    rm_command,
    diagnose_command,
    bench_group,
):
    main.add_command(command)


# -- doctor -----------------------------------------------------------------------------------------------------------


@main.command("doctor")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where data sets lie; else GRADLAB_DATA.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help=OUT_HELP)
@click.option("--address", default=None, metavar="ADDRESS", help="Ray cluster to look at, such as auto.")
@plain_errors
def doctor_command(data_dir: Path | None, out: Path, address: str | None) -> None:
    """Check this machine: Python, torch, devices, memory, data and writable folders; and a Ray cluster."""
    from gradlab.doctor import checks

    found = list(checks(data_dir, out, address))
    for check in found:
        click.echo(f"{'ok  ' if check.good else 'FAIL'} {check.name:<12} {check.text}")
    if not all(check.good for check in found):
        sys.exit(1)
