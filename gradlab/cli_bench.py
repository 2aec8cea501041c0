"""`gradlab bench`: what gradlab's own verdicts are worth, measured."""

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
    """Measure how good gradlab's verdicts are."""


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


def _run(names: list[str], split: str, *, as_json: bool) -> list[Score]:
    from gradlab.benchmarks.diagnosis.scoring import scores

    with nullcontext() if as_json else status(console(), "Running the zoo"):
        found: list[Score] = scores(names, split)
    return found
