"""Two runs side by side: their claims, and the final losses of what they trained, with a test of each difference."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gradlab.analysis.claims import claims_from_json
from gradlab.errors import StoreError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from gradlab.analysis.claims import Claim
    from gradlab.sweep.store import Run

__all__ = ["Comparison", "compare_runs", "draw_losses", "final_loss_tests", "loss_curves", "print_comparison"]

_MARKS = {"cell", "status", "part", "label", "seed"}
_MOST_STEPS = 300  # of a curve that is drawn
_LAST = 0.1  # share of a run's steps, at its end, over which its loss is averaged


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What two runs found.

    Args:
        names: Folders of the runs.
        settings: Settings that differ: name, value in the first, value in the second.
        claims: Columns id, statement, first, second (measured, with interval), verdict_first, verdict_second, p_value
            (Welch's test from the two intervals; NaN where they are no intervals of a mean), differs.
        losses: As `final_loss_tests` returns them; empty where the runs trained nothing.
        curves: Columns run, curve, step, loss: one row a seed, at a few hundred steps at most.
    """

    names: tuple[str, str]
    settings: tuple[tuple[str, str, str], ...]
    claims: pd.DataFrame
    losses: pd.DataFrame
    curves: pd.DataFrame


def compare_runs(first: Run, second: Run) -> Comparison:
    """Compare two runs of one study.

    Raises:
        UsageError: They are runs of different studies.
        StoreError: A run is damaged, or neither has been judged nor trained anything.
    """
    if first.study != second.study:
        raise UsageError(f"{first.folder} is a run of '{first.study}' and {second.folder} of '{second.study}'.")
    pairs = [(name, *(str(run.settings.get(name, "-")) for run in (first, second)))
             for name in dict.fromkeys([*first.settings, *second.settings])]  # fmt: skip
    tables = [run.table("losses") if len(run.table("losses")) else run.table("steps") for run in (first, second)]
    claims = _claim_table(_claims(first), _claims(second))
    whole = all(len(table) and {"step", "loss"} <= set(table) for table in tables)
    losses = final_loss_tests(*tables) if whole else pd.DataFrame()
    if claims.empty and losses.empty:
        raise StoreError("There is nothing to compare: no run was judged ('gradlab claims RUN'), and none has losses.")
    return Comparison(
        names=(str(first.folder), str(second.folder)),
        settings=tuple((name, a, b) for name, a, b in pairs if a != b),
        claims=claims,
        losses=losses,
        curves=loss_curves(tables) if whole else pd.DataFrame(),
    )


def _claims(run: Run) -> list[Claim]:
    path = run.folder / "claims.json"
    try:
        return list(claims_from_json(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(f"Cannot read {path}: {error.strerror}.") from error


def _claim_table(first: list[Claim], second: list[Claim]) -> pd.DataFrame:
    ones, others = ({claim.id: claim for claim in claims} for claims in (first, second))
    rows = []
    for name in dict.fromkeys([*ones, *others]):
        a, b = ones.get(name), others.get(name)
        statement = (a or b).statement if (a or b) else ""  # type: ignore[union-attr]
        verdicts = [str(claim.verdict) if claim else "-" for claim in (a, b)]
        p_value = _welch_from_intervals(a, b) if a and b else math.nan
        rows.append((name, statement, _measured(a), _measured(b), *verdicts, p_value, verdicts[0] != verdicts[1]))
    columns = ["id", "statement", "first", "second", "verdict_first", "verdict_second", "p_value", "differs"]
    return pd.DataFrame(rows, columns=columns)


def _measured(claim: Claim | None) -> str:
    if claim is None or math.isnan(claim.measured):
        return "-"
    interval = "" if math.isnan(claim.low) else f" [{claim.low:.4g}, {claim.high:.4g}]"
    return f"{claim.measured:.4g}{interval}"


def _welch_from_intervals(a: Claim, b: Claim) -> float:
    """Return Welch's two-sided p for two means known by their 95 % Student intervals."""
    from scipy.stats import t

    errors = []
    for claim in (a, b):
        half = (claim.high - claim.low) / 2
        middle = abs((claim.high + claim.low) / 2 - claim.measured) <= 1e-6 * max(half, 1e-300)
        # A range of seeds about a median is no interval of a mean.
        if claim.n < 2 or not half > 0 or not middle or claim.rule.startswith("(R)"):
            return math.nan
        errors.append((half / t.ppf(0.975, claim.n - 1)) ** 2)
    total = sum(errors)
    freedom = total**2 / sum(error**2 / (claim.n - 1) for error, claim in zip(errors, (a, b), strict=True))
    return float(2 * t.sf(abs(a.measured - b.measured) / math.sqrt(total), freedom))


def final_loss_tests(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Test whether what two runs trained ends at different losses, one row a setting that both have.

    A run's final loss is its mean over the last tenth of its steps. Welch's t-test over seeds; the p-values of all
    rows are corrected together (Holm 1979).

    Args:
        first: A run's table of losses: step, loss, cell, seed and the settings of the cells.
        second: The same of the other run.

    Returns:
        Columns setting, first, second (means over seeds), n_first, n_second, p_value, p_holm; NaN with fewer than two
        seeds on a side.

    Note:
        Runs of the same seeds share initializations and data order; the test takes them as independent, which makes it
        cautious where they agree.
    """
    ends = [_ends(table) for table in (first, second)]
    varied = _varied(*ends)
    sides = [{key: own["loss"].to_numpy() for key, own in _named(end, varied).groupby("curve")} for end in ends]
    rows = []
    for name in dict.fromkeys(sides[0]):
        if name in sides[1]:
            a, b = sides[0][name], sides[1][name]
            rows.append((name, a.mean(), b.mean(), len(a), len(b), _welch(a, b)))
    table = pd.DataFrame(rows, columns=["setting", "first", "second", "n_first", "n_second", "p_value"])
    return table.assign(p_holm=_holm(table["p_value"].to_numpy(dtype=float)))


def _ends(table: pd.DataFrame) -> pd.DataFrame:
    last = table.groupby("cell")["step"].transform("max")
    kept = table[table["step"] >= last - _LAST * (last + 1)]
    settings = [name for name in _settings(table) if name not in ("step", "loss")]
    about = table.groupby("cell")[[*settings, *({"seed"} & set(table))]].first()
    return about.assign(loss=kept.groupby("cell")["loss"].mean())


def _settings(table: pd.DataFrame) -> list[str]:
    plain = [name for name in table if name not in _MARKS and table[name].groupby(table["cell"]).nunique().max() <= 1]
    return [str(name) for name in plain]


def _varied(*ends: pd.DataFrame) -> list[str]:
    names = [name for name in ends[0] if all(name in end for end in ends) and name not in ("loss", "seed")]
    return [str(name) for name in names if any(end[name].nunique() > 1 for end in ends)]


def _named(end: pd.DataFrame, varied: list[str]) -> pd.DataFrame:
    words = (end[varied].to_dict("records")) if varied else [{} for _ in range(len(end))]
    curve = [", ".join(f"{name}={value}" for name, value in row.items()) or "all" for row in words]
    return end.assign(curve=curve)


def _welch(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import ttest_ind

    if min(len(a), len(b)) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.nan
    if np.ptp(a) == 0 == np.ptp(b):
        return 1.0 if a[0] == b[0] else math.nan
    return float(ttest_ind(a, b, equal_var=False).pvalue)


def _holm(p_values: np.ndarray) -> np.ndarray:
    out = np.full(len(p_values), math.nan)
    known = np.flatnonzero(~np.isnan(p_values))
    order = known[np.argsort(p_values[known])]
    highest = 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - place) * p_values[index]))
        out[index] = highest
    return out


def loss_curves(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the losses of what was trained, at a few hundred steps at most.

    Args:
        tables: One a run, columns cell, step, loss and the cells' settings, as `Run.table` returns "steps".

    Returns:
        Columns step, loss, curve (the settings that differ, in words) and run (its place): one row a cell and step.
    """
    ends = [_ends(table) for table in tables]
    varied = _varied(*ends)
    frames = []
    for run, (table, end) in enumerate(zip(tables, ends, strict=True)):
        last = int(table["step"].max())
        shown = table[table["step"].isin(np.linspace(0, last, _MOST_STEPS).round().astype(int))]
        curve = shown["cell"].map(_named(end, varied)["curve"])
        frames.append(shown[["step", "loss"]].assign(curve=curve, run=run))
    return pd.concat(frames, ignore_index=True)


def print_comparison(found: Comparison, console: Console) -> None:
    """Print a comparison as tables."""
    from rich.table import Table

    for place, name in zip(("first", "second"), found.names, strict=True):
        console.print(f"{place}: {name}", markup=False, highlight=False, soft_wrap=True)
    for name, a, b in found.settings:
        console.print(f"  {name}: {a} | {b}", markup=False, highlight=False, soft_wrap=True)
    if len(found.claims):
        table = Table("claim", "first", "second", "p of a difference", "verdict", title="Claims", title_justify="left")
        for row in found.claims.itertuples():
            same = row.verdict_first if not row.differs else f"{row.verdict_first} | {row.verdict_second}"
            table.add_row(str(row.id), str(row.first), str(row.second), _p(row.p_value), str(same),
                          style="bold" if row.differs else "")  # fmt: skip
        console.print(table)
    if len(found.losses):
        table = Table(
            "what was trained", "first", "second", "n", "p (Holm)", title="Final losses", title_justify="left"
        )
        for row in found.losses.itertuples():
            table.add_row(str(row.setting), f"{row.first:.4g}", f"{row.second:.4g}",
                          f"{row.n_first}, {row.n_second}", _p(row.p_holm))  # fmt: skip
        console.print(table)
    changed = int(found.claims["differs"].sum()) if len(found.claims) else 0
    apart = int((found.losses["p_holm"] < 0.05).sum()) if len(found.losses) else 0
    console.print(f"{changed} verdicts differ; {apart} of {len(found.losses)} final losses differ (p < 0.05, Holm).")


def _p(value: object) -> str:
    number = float(value) if isinstance(value, float) else math.nan
    return "-" if math.isnan(number) else f"{number:.2g}"


def draw_losses(found: Comparison, suffix: str) -> bytes:
    """Draw the mean losses of both runs against the step and return the file's bytes.

    Args:
        found: The comparison.
        suffix: Of the file: ".png", ".pdf" or ".svg".

    Raises:
        UsageError: No such kind of file, or the runs trained nothing.
    """
    if suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UsageError(f"A figure is .png, .pdf or .svg; got '{suffix}'.")
    if found.curves.empty:
        raise UsageError("These runs hold no losses to draw.")
    import matplotlib as mpl

    mpl.use("agg")
    from gradlab.plots.comparison import loss_comparison
    from gradlab.plots.style import paper_style

    with paper_style():
        figure = loss_comparison(found.curves, found.names)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix[1:].lower())
    return buffer.getvalue()
