"""`gradlab bench`: what gradlab's verdicts are worth and what watching costs, measured on this machine."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import click

from gradlab.cli_errors import plain_errors
from gradlab.cli_screen import console, status

if TYPE_CHECKING:
    from gradlab.benchmarks.diagnosis.scoring import Score

__all__ = ["bench_group"]


@click.group("bench")
def bench_group() -> None:
    """Measure how good gradlab's verdicts are, and what watching costs."""


@bench_group.command("diagnosis")
@click.option(
    "--rules", multiple=True, metavar="NAME", help="Only this rule set; repeat for several. All if not given."
)
@click.option(
    "--split",
    default="held-out",
    show_default=True,
    help="Half of the zoo: held-out, tune (the one that rules were tuned on), or all.",
)
@click.option("--confusion", is_flag=True, help="Show the confusion table of each rule set, not only of gradlab's own.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@plain_errors
def diagnosis_command(rules: tuple[str, ...], split: str, confusion: bool, as_json: bool) -> None:
    """Diagnose a zoo of labelled nets by gradlab's rules and by published ones: precision, recall, confusion.

    Each label is confirmed by plain autograd, independent of any rule. About a minute on one core.
    """
    from gradlab.benchmarks.diagnosis.scoring import check_rules, print_scores, to_json

    names = check_rules(rules)
    found = _run(names, split, as_json=as_json)
    if as_json:
        click.echo(to_json(found))
    else:
        print_scores(found, console(), confusion=names if confusion else [names[0]])


@bench_group.command("overhead")
@click.option("--workload", multiple=True, metavar="NAME", help="Only this net (W1 to W6); repeat for several.")
@click.option("--rounds", default=5, show_default=True, help="Timings of each way to watch.")
@click.option("--device", default="cpu", show_default=True, help="Where the nets train: cpu or cuda.")
@click.option("--peers", is_flag=True, help="Time other tools too, as far as they are installed.")
@plain_errors
def overhead_command(workload: tuple[str, ...], rounds: int, device: str, peers: bool) -> None:
    """Time a watched training step against a bare one: the table of benchmarks/README.md on this machine.

    A few minutes on one core for all nets; the medians of ratios of CPU time, with their ranges.
    """
    import subprocess
    import sys

    from gradlab.benchmarks.workloads import WORKLOADS
    from gradlab.errors import UsageError
    from gradlab.runtime import resolve_device

    unknown = [name for name in workload if name not in WORKLOADS]
    if unknown or rounds < 1:
        known = f"There is no net '{unknown[0]}': its names are {', '.join(WORKLOADS)}." if unknown else ""
        raise UsageError(known or f"--rounds must be at least 1; got {rounds}.")
    resolve_device(device)  # says what is wrong before minutes of timing
    # A process of its own: how memory is given back is settled when a process begins.
    command = [sys.executable, "-m", "gradlab.benchmarks.overhead", "--rounds", str(rounds), "--device", device]
    command += ["--workloads", ",".join(workload or WORKLOADS), *(["--peers"] if peers else [])]
    raise SystemExit(subprocess.run(command, check=False).returncode)  # noqa: S603


def _run(names: list[str], split: str, *, as_json: bool) -> list[Score]:
    from gradlab.benchmarks.diagnosis.scoring import scores

    with nullcontext() if as_json else status(console(), "Running the zoo"):
        found: list[Score] = scores(names, split)
    return found
