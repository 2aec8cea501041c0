"""`gradlab diagnose`: a user's own model from a Python file, or a trace on disk, diagnosed; with --whatif, remedies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradlab.cli_errors import EXIT_NOT_REPRODUCED, plain_errors
from gradlab.errors import UsageError

if TYPE_CHECKING:
    from gradlab.analysis.finding import Diagnosis
    from gradlab.trace import Trace
    from gradlab.user_setup import Setup

__all__ = ["diagnose_command"]


@click.command("diagnose")
@click.argument("what", metavar="FILE.py:FUNCTION | TRACE")
@click.option("--steps", type=click.IntRange(2), default=20, show_default=True, help="Training steps to watch.")
@click.option(
    "--whatif", "try_remedies", is_flag=True, help="Try remedies on copies, with the gradient before and after."
)
@click.option("--rules", default="gradlab", show_default=True, help="Rule set to judge by.")
@click.option("--device", default=None, help="auto, cpu, cuda, cuda:<n> or mps; where the model is, if not given.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed set before FUNCTION is called.")
@click.option("--save", type=click.Path(path_type=Path), help="New folder to save the trace in.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--strict", is_flag=True, help="Exit with 3 when something is found.")
@plain_errors
def diagnose_command(
    what: str,
    steps: int,
    try_remedies: bool,
    rules: str,
    device: str | None,
    seed: int,
    save: Path | None,
    as_json: bool,
    strict: bool,
) -> None:
    """Diagnose a model of yours, or a saved trace.

    FILE.py:FUNCTION names a function without arguments that returns (model, optimizer, data, loss): data is an
    iterable of (inputs, targets), loss takes (output, targets), optimizer may be None for SGD with learning rate 0.01.
    TRACE is a folder that a trace was saved in.
    """
    from gradlab.analysis.diagnosis import check_rules, diagnose

    check_rules(rules)
    if save is not None and save.exists():
        raise UsageError(f"{save} exists already: --save takes a new folder.")
    if Path(what).is_dir():
        if try_remedies or save is not None:
            raise UsageError("--whatif and --save need a model: give FILE.py:FUNCTION, not a saved trace.")
        from gradlab.trace import Trace

        trace, tried = Trace.load(what), None
    else:
        trace, tried = _train(what, steps, try_remedies, device, seed)
    found = diagnose(trace, rules=rules)
    if save is not None:
        trace.save(save)
    _report(found, tried, as_json=as_json)
    if strict and not found.healthy:
        sys.exit(EXIT_NOT_REPRODUCED)


def _train(what: str, steps: int, try_remedies: bool, device: str | None, seed: int) -> tuple[Trace, Any]:
    from gradlab.trial import whatif
    from gradlab.user_setup import load_setup, watch_setup

    def make() -> Setup:
        return load_setup(what, seed=seed, device=device, batches=steps)

    setup = make()
    trace = watch_setup(setup, steps=steps)
    if not try_remedies:
        return trace, None
    tried = whatif(
        lambda: make().model, setup.batches, setup.loss, optimizer=setup.make_optimizer, steps=steps, seed=seed
    )
    return trace, tried


def _report(found: Diagnosis, tried: Any, *, as_json: bool) -> None:
    if as_json:
        import json

        data = found.to_dict() | ({} if tried is None else {"whatif": tried.to_dict()})
        click.echo(json.dumps(data, indent=2, ensure_ascii=False))
        return
    from gradlab.diagnosis_report import print_diagnosis, print_whatif

    print_diagnosis(found)
    if tried is not None:
        print_whatif(tried)
