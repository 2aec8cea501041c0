"""The page of finished runs: what was asked, the answer, claims, figures, and how to do it again."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gradlab.analysis.claims import Claim, Verdict
from gradlab.claims_report import measured_text
from gradlab.errors import GradlabError, UsageError
from gradlab.report.page import check_target, write_page
from gradlab.study import parse_settings
from gradlab.sweep.driver import decide, drawn

if TYPE_CHECKING:
    import pandas as pd

    from gradlab.report.charts import Curves
    from gradlab.report.explorer import Flow
    from gradlab.study import Study
    from gradlab.sweep.store import Run

__all__ = ["answer", "reproduce_commands", "write_report"]

_MOST_ROWS: Final = 12
_MOST_MISSING: Final = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class _Figure:
    name: str
    svg: str
    caption: str
    columns: list[str]
    rows: list[list[str]]
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _RunView:
    """What the template shows of one run."""

    name: str
    title: str
    question: str
    answer: str
    folder: str
    study: str
    preset: str
    claims: list[dict[str, Any]]
    figures: list[_Figure]
    losses: Curves | None
    flows: list[Flow]
    recorded: int
    settings: list[tuple[str, str, str]]
    environment: list[tuple[str, str]]
    commands: list[str]
    cells: str
    messages: list[str]
    problems: list[str]


def write_report(runs: Sequence[Run], out: str | os.PathLike[str], *, studies: Mapping[str, Study]) -> Path:
    """Write one self-contained HTML page about one run or several.

    A run that is unfinished, damaged in part, or of a study not among `studies` is on the page with what there is of
    it and a sentence on each thing that is missing. The folders of the runs are only read.

    Args:
        runs: The runs, in the order of the page. With more than one, a table of all claims comes first.
        out: The .html file. An older report gives way, any other file stays.
        studies: Study by name, as `gradlab.catalog.studies` returns them.

    Returns:
        The file.

    Raises:
        UsageError: No run, or one twice; `out` is no .html file; the extra `report` is not installed.
        StoreError: The file cannot be written.
    """
    if not runs:
        raise UsageError("A report needs at least one run.")
    folders = [run.folder.resolve() for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if folders.count(folder) > 1:
            raise UsageError(f"The run {run.folder} is named twice: name it once.")
    path = check_target(out)
    views = [_view(run, studies.get(run.study), f"r{place}") for place, run in enumerate(runs)]
    claims = [claim for view in views for claim in view.claims]
    title = views[0].title if len(views) == 1 else f"{len(views)} runs of gradlab"
    charts = [chart for view in views for chart in _charts(view)]
    overall = views[0].answer if len(views) == 1 else _tally([claim["verdict"] for claim in claims])
    return write_page("run.html", path, charts=charts, title=title, views=views, claims=claims, overall=overall)


def _charts(view: _RunView) -> Iterator[Any]:
    for flow in view.flows:
        yield flow.heat
        yield flow.profile
    if view.losses is not None:
        yield view.losses.chart


def _view(run: Run, study: Study | None, name: str) -> _RunView:
    from gradlab.report.explorer import cell_flows, run_losses

    problems: list[str] = []
    claims: list[Claim] = []
    figures: list[_Figure] = []
    losses: Curves | None = None
    flows: list[Flow] = []
    recorded = 0
    cells, messages = _cells(run, problems)
    if study is None:
        problems.append(
            f"The study '{run.study}' is not installed here: its claims cannot be decided nor its figures drawn."
        )
    if not cells:
        problems.append("No cell of this run is finished, so there is nothing to judge or to draw.")
    elif study is not None:
        with _told(problems, "The claims could not be decided", of=Exception):
            claims = decide(study, run)
        for place, figure in enumerate(study.figures):
            with _told(problems, f"The figure '{figure}' could not be drawn", of=Exception):
                _draw(study, run, figure, f"{name}f{place}", figures, problems)
    if cells:
        with _told(problems, "The losses could not be shown"):
            losses = run_losses(run, name)
        with _told(problems, "The recorded layers could not be shown"):
            flows, recorded = cell_flows(run, name)
    return _RunView(
        name=name,
        title=study.title if study else run.study,
        question=study.question if study else "",
        answer=answer(claims, unfinished=len(run.unfinished())) if study else "",
        folder=str(run.folder),
        study=run.study,
        preset=run.preset,
        claims=[_row(claim, run, name) for claim in claims],
        figures=figures,
        losses=losses,
        flows=flows,
        recorded=recorded,
        settings=_settings(run, study),
        environment=_environment(run),
        commands=reproduce_commands(run, study),
        cells=cells,
        messages=messages,
        problems=list(dict.fromkeys(problems)),
    )


@contextmanager
def _told(problems: list[str], what: str, *, of: type[Exception] = GradlabError) -> Iterator[None]:
    """Turn an error of a kind into a sentence on the page; what a study does with old tables may raise anything."""
    try:
        yield
    except GradlabError as error:
        problems.append(f"{what}: {error}")
    except of as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        problems.append(f"{what} from these tables, which another version may have written ({reason:.200}).")


def _draw(study: Study, run: Run, figure: str, name: str, figures: list[_Figure], problems: list[str]) -> None:
    from gradlab.report.figure_svg import figure_svg

    with drawn(study, run, figure) as drawing:
        if isinstance(drawing, str):
            problems.append(f"The figure '{figure}' could not be drawn: {drawing}")
            return
        data = drawing.data
        figures.append(
            _Figure(
                name=figure,
                svg=figure_svg(drawing.figure, name),
                caption=drawing.caption,
                columns=[str(column) for column in data],
                rows=_some_rows(data),
                length=len(data),
            )
        )


def _some_rows(data: pd.DataFrame) -> list[list[str]]:
    """Return a few rows, evenly spread from the first to the last, as text."""
    most = min(len(data), _MOST_ROWS)
    places = [place * (len(data) - 1) // max(1, most - 1) for place in range(most)]
    return [[_short(value) for value in data.iloc[place]] for place in places]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value!s:.60}"


def answer(claims: Sequence[Claim], *, unfinished: int = 0) -> str:
    """Return what a run answers, in words that say no more than the verdicts do.

    Args:
        claims: The claims, decided.
        unfinished: Cells that were planned and are missing.

    Example:
        >>> from gradlab.analysis.claims import decide_exact
        >>> print(answer([decide_exact(1.0, 1.0, id="C1", statement="All is 1.", source="counted")]))
        The one claim is reproduced.
    """
    text = _tally([str(claim.verdict) for claim in claims])
    for verdict, words in ((Verdict.NOT_REPRODUCED, "Not reproduced"), (Verdict.NOT_DECIDED, "Not decided")):
        own = [claim.id for claim in claims if claim.verdict is verdict]
        if own and len(claims) > 1:
            more = f" and {len(own) - 6} more" if len(own) > 6 else ""
            text += f" {words}: {', '.join(own[:6])}{more}."
    if unfinished:
        text += f" {unfinished} planned cell{'s are' if unfinished > 1 else ' is'} missing, so this is provisional."
    return text


def _tally(verdicts: Sequence[str]) -> str:
    if not verdicts:
        return "No claim was decided."
    if len(verdicts) == 1:
        return f"The one claim is {verdicts[0]}."
    counts = Counter(verdicts)
    if len(counts) == 1:
        return f"All {len(verdicts)} claims are {verdicts[0]}."
    parts = [
        f"{counts[verdict]} {'are' if counts[verdict] > 1 else 'is'} {verdict}"
        for verdict in Verdict
        if counts[verdict]
    ]
    return f"Of {len(verdicts)} claims, {', '.join(parts[:-1])} and {parts[-1]}."


def _row(claim: Claim, run: Run, name: str) -> dict[str, Any]:
    return {
        "run": name,
        "study": run.study,
        "id": claim.id,
        "statement": claim.statement,
        "detail": claim.detail,
        "source": claim.source,
        "expected": claim.expected or "-",
        "measured": measured_text(claim),
        "number": ""
        if claim.measured != claim.measured
        else repr(float(claim.measured)),  # NaN is no number to sort by
        "rule": claim.rule,
        "verdict": str(claim.verdict),
        "rank": list(Verdict).index(claim.verdict),
    }


def _cells(run: Run, problems: list[str]) -> tuple[str, list[str]]:
    """Return how many cells ended how ("" if none did), what they said, and add a problem for what is missing."""
    planned = run.manifest["cells"]
    states: Counter[str] = Counter()
    messages = []
    with _told(problems, "The cells could not be read"):
        for cell in run.cells():
            states[cell.status] += 1
            if cell.message:
                messages.append(f"{cell.label}: {cell.message}")
    left = run.unfinished()
    if left:
        labels = [str(cell.get("label", cell["key"])) for cell in planned if cell["key"] in left]
        more = f" and {len(labels) - _MOST_MISSING} more" if len(labels) > _MOST_MISSING else ""
        named = f"{', '.join(labels[:_MOST_MISSING])}{more}"
        problems.append(f"{len(left)} of {len(planned)} cells are not finished: {named}.")
    return ", ".join(f"{count} {state}" for state, count in states.items()), messages


def _settings(run: Run, study: Study | None) -> list[tuple[str, str, str]]:
    texts = (
        {item.name: str(item.metadata.get("text", "")) for item in dataclasses.fields(study.settings)} if study else {}
    )
    return [(str(name), _value(value), texts.get(name, "")) for name, value in run.settings.items()]


def _value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _environment(run: Run) -> list[tuple[str, str]]:
    manifest = run.manifest
    given = manifest.get("environment")
    facts = given if isinstance(given, dict) else {}
    rows = [("started", manifest.get("started")), ("device", manifest.get("device"))]
    rows += [(name, facts.get(key)) for name, key in (("Python", "python"), ("platform", "platform"),
             ("processor", "processor"), ("cores", "cores"), ("commit", "git_commit"))]  # fmt: skip
    versions = facts.get("versions")
    if isinstance(versions, dict):
        rows.append(("packages", ", ".join(f"{name} {number}" for name, number in versions.items())))
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def reproduce_commands(run: Run, study: Study | None) -> list[str]:
    """Return the commands that make this run again, and that go on with it where it is unfinished.

    The first names the preset and every setting in which the run differs from it; without the study, all settings.
    """
    import shlex

    same: Callable[[str, object], bool] = lambda _name, _value: False  # noqa: E731
    if study is not None and run.preset in study.presets:
        own = dataclasses.asdict(parse_settings(study, run.preset))
        same = lambda name, value: name in own and _option(own[name]) == _option(value)  # noqa: E731
    words = ["gradlab", "run", run.study, *(["--preset", run.preset] if run.preset != "default" else [])]
    for name, value in run.settings.items():
        if not same(name, value):
            words += ["--set", f"{name}={_option(value)}"]
    commands = [shlex.join(words)]
    if run.unfinished():
        commands.insert(0, shlex.join(["gradlab", "resume", str(run.folder)]))
    return commands


def _option(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
