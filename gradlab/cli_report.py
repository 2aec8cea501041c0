"""`gradlab report`: one HTML page of runs, or of the diagnosis of a saved trace."""

from __future__ import annotations

from pathlib import Path

import click

from gradlab.cli_errors import plain_errors
from gradlab.cli_screen import OUT_HELP
from gradlab.errors import UsageError

__all__ = ["report_command"]


@click.command("report")
@click.argument("what", nargs=-1, required=True, metavar="RUN... | TRACE")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The .html file to write.")
@click.option("--rules", default=None, help="Of a trace: rule set to judge by.  [default: gradlab]")
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help=OUT_HELP)
@plain_errors
def report_command(what: tuple[str, ...], out: Path, rules: str | None, runs: Path) -> None:
    """Write one HTML page that needs no network: of runs, or of the diagnosis of a saved trace.

    RUN is a run's folder, or a study's name for its latest run. TRACE is a folder that a trace was saved in. Needs the
    extra gradlab[report].
    """
    from gradlab.report import write_diagnosis, write_report
    from gradlab.report.page import check_target

    check_target(out)
    traces = [text for text in what if (Path(text) / "header.json").is_file()]
    if traces and len(what) > 1:
        raise UsageError(
            f"A page is about runs or about one trace; got the trace {traces[0]} with others: name it alone."
        )
    if traces:
        from gradlab.analysis.diagnosis import OWN_RULES
        from gradlab.trace import Trace

        trace = Trace.load(traces[0])
        path = write_diagnosis(trace, out, name=Path(traces[0]).name, rules=rules or OWN_RULES)
    else:
        if rules is not None:
            raise UsageError("--rules judges a saved trace: the claims of a run have rules of their own.")
        from gradlab.catalog import studies
        from gradlab.sweep.store import Run, find_run

        found = [Run(find_run(text, runs)) for text in what]
        path = write_report(found, out, studies=studies())
    click.echo(f"Report {path}")
