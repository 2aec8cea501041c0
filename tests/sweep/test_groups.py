"""Cells that differ in their seed alone, run together: stored each on its own, as if each had been alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from rich.console import Console

from gradlab.catalog import find_study
from gradlab.cli import main
from gradlab.study import Cell, CellContext, CellResult, Study, parse_settings
from gradlab.sweep.driver import SweepReport, judge, start_run, sweep
from gradlab.sweep.groups import CellGroup, group_by_seed
from gradlab.sweep.store import Run

WORDS = ("value=1,2", "seeds=3", "trouble=raise")


def cell(part: str = "train", **settings: Any) -> Cell:
    return Cell(part=part, label=f"{part} {settings}", settings=settings, cost=2.0)


def test_only_cells_equal_but_for_their_seed_come_together() -> None:
    cells = [
        cell(depth=8, seed=0), cell(depth=14, seed=0), cell(depth=8, seed=1), cell("other", depth=8, seed=0),
        cell("other", depth=8, seed=1), cell(depth=8), cell(depth=[8], seed=0),
    ]  # fmt: skip
    units = group_by_seed(cells, ["train"])
    (group,) = [unit for unit in units if isinstance(unit, CellGroup)]
    assert group.cells == (cells[0], cells[2])
    assert group.settings == {"depth": 8}
    assert group.cost == 4.0
    assert [unit for unit in units if unit is not group] == [cells[1], *cells[3:]]
    assert group_by_seed(cells, []) == cells
    assert group_by_seed(cells, ["train"])[0].key == group.key != cells[0].key


def together(toy: Any, run_seeds: Callable[..., Any] | None = None) -> Study:
    def each(cells: Sequence[Cell], context: CellContext) -> list[CellResult]:
        from gradlab.runtime import seed_everything

        results = []
        for own in cells:
            seed_everything(own.settings["seed"])
            results.append(toy.run(own, context))
        return results

    return replace(toy.STUDY, run_seeds={"work": run_seeds or each})


def go(study: Study, run: Run, *, workers: int = 0) -> SweepReport:
    settings = parse_settings(study, "default", WORDS)
    return sweep(
        study, settings, run, device="cpu", workers=workers, data_dir=None, console=Console(file=io.StringIO()),
        seeds_at_once=True,
    )  # fmt: skip


def test_each_cell_is_stored_on_its_own(start: Callable[..., Run], toy: Any) -> None:
    apart, at_once = start(*WORDS), start(*WORDS)
    quiet = Console(file=io.StringIO())
    how: dict[str, Any] = {"device": "cpu", "workers": 0, "data_dir": None, "console": quiet}
    sweep(toy.STUDY, parse_settings(toy.STUDY, "default", WORDS), apart, **how)
    report = go(together(toy), at_once)
    assert len(report.outcomes) == 3  # two groups, and what is in no part that can
    assert [outcome.cell.label for outcome in report.failed] == ["raise"]
    for name in ("numbers", "steps"):
        pd.testing.assert_frame_equal(at_once.table(name), apart.table(name), check_exact=True)
    assert at_once.unfinished() == apart.unfinished()


def test_a_group_that_fails_runs_cell_by_cell(
    start: Callable[..., Run], toy: Any, ran: Callable[[], list[str]]
) -> None:
    def fails(cells: Sequence[Cell], _: CellContext) -> list[CellResult]:
        if cells[0].settings["value"] == 2:
            raise RuntimeError("too many at once")
        return [toy.work(own.settings, _) for own in cells]

    run = start(*WORDS)
    report = go(together(toy, fails), run)
    assert [outcome.cell.label for outcome in report.failed] == ["raise"]
    assert len(run.cells()) == 6
    assert len(report.outcomes) == 5  # the group that was run, what is in none, and the three of the other group
    assert sorted(ran()) == ["raise", "work 2 seed 0", "work 2 seed 1", "work 2 seed 2"]


def test_what_a_group_had_stored_is_not_run_again(start: Callable[..., Run], toy: Any) -> None:
    run = start(*WORDS)
    go(together(toy), run)
    assert not [outcome for outcome in go(together(toy), run).outcomes if outcome.status == "done"]


@pytest.mark.parametrize("workers", [0, 1], ids=["in this process", "in a worker"])
def test_depth_sweep_gives_the_same_claims(workers: int, tmp_path: Path) -> None:
    study = find_study("depth-sweep")
    words = ["depth=8", "profile_depth=8", "net=residual", "steps=8", "record=3"]
    settings = parse_settings(study, "smoke", words)
    runs = []
    for at_once in (False, True):
        run = start_run(study, "smoke", settings, out=tmp_path / str(at_once), device="cpu")
        quiet = Console(file=io.StringIO())
        how: dict[str, Any] = {"device": "cpu", "workers": workers, "data_dir": None, "console": quiet}
        assert sweep(study, settings, run, seeds_at_once=at_once, **how).failed == []
        runs.append(run)
    apart, together = runs
    for name in ("losses", "layers", "params", "batchnorm"):
        a, b = apart.table(name, "train"), together.table(name, "train")
        numbers = a.select_dtypes("number").columns
        pd.testing.assert_frame_equal(b.drop(columns=numbers), a.drop(columns=numbers))
        np.testing.assert_allclose(b[numbers], a[numbers], rtol=5e-3, atol=1e-4, err_msg=name)
    verdicts = [{claim.id: claim.verdict for claim in judge(study, run)} for run in runs]
    assert verdicts[0] == verdicts[1]


def test_where_seeds_cannot_be_trained_at_once_it_is_one_sentence(tmp_path: Path) -> None:
    command = ["run", "clipping", "--preset", "smoke", "--seeds-at-once", "--out", str(tmp_path)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2
    assert "'clipping' has no part whose seeds can be trained at once: leave out --seeds-at-once." in done.output
    done = CliRunner().invoke(main, [*command, "--engine", "ray"])
    assert "--seeds-at-once runs with the local engine" in done.output
    assert not list(tmp_path.iterdir())
