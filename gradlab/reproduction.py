"""The claims of several runs in one table, as CSV and as Markdown, and which run of a folder a preset's results are in.

Needs no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from gradlab.analysis.claims import Claim, Verdict, claims_from_json
from gradlab.claims_report import measured_text, verdict_counts
from gradlab.errors import StoreError
from gradlab.storage import read_json
from gradlab.sweep.store import Run, all_runs

if TYPE_CHECKING:
    from gradlab.study import Study

__all__ = [
    "Judged",
    "claims_from_table",
    "claims_table",
    "claims_to_markdown",
    "counts_table",
    "judged",
    "run_of_preset",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """An experiment's claims, decided from one of its runs.

    Args:
        study: Name of the experiment.
        title: Its title.
        run: The run.
        claims: What was decided, in the experiment's order; none where nothing could be.
        unfinished: Number of the run's cells that are missing.
        cpu_seconds: Processor time of the finished cells, summed.
    """

    study: str
    title: str
    run: Run
    claims: tuple[Claim, ...]
    unfinished: int
    cpu_seconds: float


def judged(study: Study, run: Run) -> Judged:
    """Return what was decided from a run, from its claims.json.

    Raises:
        StoreError: A cell or the claims are damaged.
    """
    path = run.folder / "claims.json"
    try:
        text = path.read_text(encoding="utf-8") if path.exists() and run.cells() else ""
    except OSError as error:
        raise StoreError(f"Cannot read {path}: {error.strerror}.") from error
    times = [read_json(cell.folder / "cell.json", what="cell").get("cpu_seconds", math.nan) for cell in run.cells()]
    return Judged(
        study=study.name,
        title=study.title,
        run=run,
        claims=claims_from_json(text) if text else (),
        unfinished=len(run.unfinished()),
        cpu_seconds=float(sum(time for time in times if isinstance(time, int | float))),
    )


def run_of_preset(study: Study, preset: str, settings: Any, out: Path) -> Run | None:
    """Return the latest run of a study under a folder with exactly these settings and cells, or None.

    A run of the same preset with a setting changed, or planned by another version of the study, is none.

    Args:
        study: The study.
        preset: The preset that the run was begun with.
        settings: An instance of the study's settings.
        out: Folder that holds runs.
    """
    cells = {cell.key for cell in study.plan(settings)}
    wanted = _plain(dataclasses.asdict(settings))
    for folder in reversed([path for path in all_runs(out) if path.parent.name == study.name]):
        try:
            run = Run(folder)
        except StoreError:  # a damaged manifest: a new run takes its place
            continue
        if run.preset == preset and _plain(run.settings) == wanted and run.planned == cells:
            return run
    return None


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON has them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def claims_table(parts: Iterable[Judged]) -> pd.DataFrame:
    """Return one row a claim: experiment, preset, and the fields of `Claim`; numbers are as they were measured."""
    columns = ["experiment", "preset", *(field.name for field in dataclasses.fields(Claim))]
    rows = [
        {
            "experiment": part.study,
            "preset": part.run.preset,
            **dataclasses.asdict(claim),
            "verdict": str(claim.verdict),
        }
        for part in parts
        for claim in part.claims
    ]
    return pd.DataFrame(rows, columns=columns)


def counts_table(claims: pd.DataFrame) -> pd.DataFrame:
    """Return how many claims of each experiment have each verdict.

    Args:
        claims: As `claims_table` returns it, or as it is read back from claims.csv.

    Returns:
        Columns experiment, reproduced, not reproduced, not decided; one row an experiment, in the order of `claims`.

    Example:
        >>> counts_table(pd.DataFrame({"experiment": ["a", "a"], "verdict": ["reproduced", "not decided"]}))
          experiment  reproduced  not reproduced  not decided
        0          a           1               0            1
    """
    rows = []
    for name in dict.fromkeys(claims["experiment"]):
        verdicts = claims.loc[claims["experiment"] == name, "verdict"]
        rows.append({"experiment": name, **{str(v): int((verdicts == str(v)).sum()) for v in Verdict}})
    return pd.DataFrame(rows, columns=["experiment", *map(str, Verdict)])


def claims_to_markdown(parts: Sequence[Judged], troubles: Sequence[str] = (), *, command: str) -> str:
    """Return all claims as Markdown: counts, what is missing, and a table for each experiment.

    Args:
        parts: The experiments.
        troubles: A sentence for each experiment that did not end well.
        command: The command that made them.
    """
    claims = [claim for part in parts for claim in part.claims]
    lines = ["# Claims", "", f"{verdict_counts(claims)} Made by `{command}`{_where(parts)}.", ""]
    lines += [
        "A claim is reproduced, not reproduced or not decided by a rule that was fixed before the measurement. The "
        "rules are of four kinds: (E) exact identity, (T) value from theory, (S) statistical test over seeds, (R) rank "
        "or threshold. Brackets hold intervals: 95 % Student intervals over n seeds, where the rule says nothing else.",
        "",
    ]
    lines += [f"- {sentence}" for sentence in troubles] + [""] * bool(troubles)
    lines += ["| experiment | reproduced | not reproduced | not decided |", "|---|---|---|---|"]
    counts = counts_table(claims_table(parts))
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in counts.itertuples(index=False)]
    for part in parts:
        missing = f" {part.unfinished} of {len(part.run.planned)} cells are not finished." if part.unfinished else ""
        lines += ["", f"## {part.study}", "", f"{part.title}. {verdict_counts(part.claims)}{missing}", ""]
        lines += ["| id | claim | source | expected | measured | rule | verdict |", "|---|---|---|---|---|---|---|"]
        lines += [_row(claim) for claim in part.claims]
    return "\n".join(lines) + "\n"


def _row(claim: Claim) -> str:
    statement = f"{claim.statement} {claim.detail}".strip()
    words = (claim.id, statement, claim.source, claim.expected or "-", measured_text(claim), claim.rule)
    verdict = str(claim.verdict)
    cells = [*words, f"**{verdict}**" if claim.verdict != Verdict.REPRODUCED else verdict]
    return "| " + " | ".join(" ".join(word.split()).replace("|", "\\|") for word in cells) + " |"


def _where(parts: Sequence[Judged]) -> str:
    """Return on what and when the runs were made, as far as all agree."""
    versions, devices, days = set(), set(), set()
    for part in parts:
        environment = part.run.manifest.get("environment")
        found = environment.get("versions") if isinstance(environment, dict) else None
        versions.add(str(found.get("torch", "?")) if isinstance(found, dict) else "?")
        devices.add(str(part.run.manifest.get("device", "?")))
        days.add(str(part.run.manifest.get("started", "?"))[:10])
    minutes = sum(part.cpu_seconds for part in parts) / 60
    return (
        f" with torch {', '.join(sorted(versions))} on {', '.join(sorted(devices))}, {', '.join(sorted(days))}; "
        f"{minutes:.0f} minutes of processor time"
    )


def claims_from_table(table: pd.DataFrame) -> tuple[Claim, ...]:
    """Return the claims of a table as `claims_table` makes it."""
    names = [field.name for field in dataclasses.fields(Claim)]
    return tuple(Claim(**{name: row[name] for name in names}) for row in table.to_dict("records"))
