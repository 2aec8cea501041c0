"""From cells to claims and figures."""

from __future__ import annotations

import io
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from rich.console import Console

from gradlab.analysis.claims import claims_from_json
from gradlab.errors import StoreError, UsageError
from gradlab.study import parse_settings
from gradlab.sweep.driver import SweepReport, draw_figures, judge, start_run, sweep
from gradlab.sweep.store import Run

Start = Callable[..., Run]
Go = Callable[..., SweepReport]
SMALL = ("value=1,2", "seeds=1")


@pytest.fixture
def done(start: Start, go: Go) -> Run:
    run = start(*SMALL)
    go(run, *SMALL)
    return run


# -- the sweep --------------------------------------------------------------------------------------------------------


def test_the_manifest_says_how_to_repeat_the_run(start: Start) -> None:
    run = start("value=5,6", "seeds=1", "limit=none")
    manifest = run.manifest
    assert manifest["settings"]["value"] == [5, 6]
    assert manifest["settings"]["limit"] is None
    assert (manifest["preset"], manifest["device"], manifest["run_version"]) == ("default", "cpu", 1)
    assert isinstance(manifest["command"], list)
    assert {"python", "platform", "cores", "versions", "git_commit"} <= set(manifest["environment"])
    assert {"gradlab", "torch", "numpy"} <= set(manifest["environment"]["versions"])
    assert [cell["label"] for cell in manifest["cells"]] == ["work 5 seed 0", "work 6 seed 0"]


def test_a_run_planned_otherwise_is_not_gone_on_with(start: Start, go: Go) -> None:
    run = start(*SMALL)
    with pytest.raises(UsageError, match="was planned by another version of 'toy', with other cells"):
        go(run, "value=1,2", "seeds=1", "steps=9")
    assert run.cells() == []


def test_a_finished_cell_is_a_line_where_there_is_no_terminal(start: Start, go: Go) -> None:
    words = (*SMALL, "trouble=raise,diverge")
    text = io.StringIO()
    go(start(*words), *words, console=Console(file=text, width=40))
    lines = text.getvalue().splitlines()
    assert len(lines) == 4  # long ones are not broken
    assert lines[0].startswith("raise: failed (ValueError in toy_study.py:")
    assert lines[1].startswith("[2/4] diverge: diverged (the loss was not finite at step 1), ")
    assert lines[3].startswith("[4/4] work 2 seed 0: done, ")
    assert "\x1b" not in text.getvalue()


def test_interrupting_one_process_keeps_what_is_finished(start: Start, toy: Any) -> None:
    run = start("value=1,2,3", "seeds=1")
    settings = parse_settings(toy.STUDY, "default", ["value=1,2,3", "seeds=1"])

    def interrupted(cell: Any, context: Any) -> Any:
        if cell.settings["value"] == 2:
            raise KeyboardInterrupt
        return toy.run(cell, context)

    study = replace(toy.STUDY, run=interrupted)
    quiet = Console(file=io.StringIO())
    report = sweep(study, settings, run, device="cpu", workers=0, data_dir=None, console=quiet)
    assert (report.interrupted, report.signal_number, report.failed) == (True, signal.SIGINT, [])
    assert [cell.label for cell in run.cells()] == ["work 1 seed 0"]
    assert len(list((run.folder / "cells").iterdir())) == 1


def test_sigterm_stops_a_sweep_as_ctrl_c_does(start: Start, toy: Any) -> None:
    run = start(*SMALL)
    before = signal.getsignal(signal.SIGTERM)

    def terminated(cell: Any, context: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return toy.run(cell, context)

    settings = parse_settings(toy.STUDY, "default", SMALL)
    quiet = Console(file=io.StringIO())
    study = replace(toy.STUDY, run=terminated)
    report = sweep(study, settings, run, device="cpu", workers=0, data_dir=None, console=quiet)
    assert (report.interrupted, report.signal_number) == (True, signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_sweep_runs_outside_the_main_thread(start: Start, go: Go) -> None:
    run = start(*SMALL)
    thread = threading.Thread(target=go, args=(run, *SMALL))
    thread.start()
    thread.join()
    assert len(run.cells()) == 2


# -- claims -----------------------------------------------------------------------------------------------------------


def test_claims_are_written_as_they_are_returned(done: Run, toy: Any) -> None:
    claims = judge(toy.STUDY, done)
    written = claims_from_json((done.folder / "claims.json").read_text(encoding="utf-8"))
    assert [claim.to_dict() for claim in written] == [claim.to_dict() for claim in claims]
    assert [str(claim.verdict) for claim in claims] == ["reproduced", "not reproduced"]
    assert claims[0].n == 8


def test_claims_of_an_empty_run_are_refused(start: Start, toy: Any) -> None:
    run = start(*SMALL)
    with pytest.raises(StoreError, match=r"is empty: none of its 2 cells is finished; 'gradlab resume "):
        judge(toy.STUDY, run)
    assert not (run.folder / "claims.json").exists()


def test_damage_was_blamed_on_cells_not_finished(done: Run, toy: Any) -> None:
    """Of a run with both, the sentence named the missing cells, and going on with it mended nothing."""
    shutil.rmtree(done.cells()[0].folder)
    (table,) = (done.cells()[0].folder / "tables").iterdir()
    table.write_bytes(b"x")
    with pytest.raises(StoreError, match=rf"{table.name} is damaged"):
        judge(toy.STUDY, Run(done.folder))


def test_claims_that_need_missing_cells_say_so(start: Start, toy: Any) -> None:
    """The cells of the part "work" are missing, so that its table is empty and has no column "random"."""
    words = (*SMALL, "trouble=diverge")
    run = start(*words)
    study = replace(toy.STUDY, run=lambda cell, _: toy.trouble("raise" if cell.part == "work" else "diverge"))
    settings = parse_settings(toy.STUDY, "default", words)
    sweep(study, settings, run, device="cpu", workers=0, data_dir=None, console=Console(file=io.StringIO()))
    with pytest.raises(StoreError, match=r"cannot be decided: 2 of 3 cells of .* not finished \(KeyError: 'random'\)"):
        judge(toy.STUDY, Run(run.folder))
    drawn, missing = draw_figures(toy.STUDY, Run(run.folder), names=["line"])
    assert drawn == []
    assert missing[0].startswith("line: 2 of 3 cells of ")


def test_a_bug_in_claims_of_a_whole_run_is_not_hidden(done: Run, toy: Any) -> None:
    def broken(_: Any) -> Any:
        raise KeyError("typo")

    with pytest.raises(KeyError, match="typo"):
        judge(replace(toy.STUDY, claims=broken), done)
    with pytest.raises(KeyError, match="typo"):
        draw_figures(replace(toy.STUDY, figures={"a": broken}), done)


# -- figures ----------------------------------------------------------------------------------------------------------


def test_a_figure_is_png_pdf_csv_and_a_caption(done: Run, toy: Any) -> None:
    drawn, missing = draw_figures(toy.STUDY, done)
    folder = done.folder / "figures"
    assert drawn == [folder / "line.png"]
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "line.csv", "line.pdf", "line.png"]
    assert (folder / "line.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "line.pdf").read_bytes().startswith(b"%PDF")
    data = pd.read_csv(folder / "line.csv", dtype={"random": str}).astype({"random": float})
    pd.testing.assert_frame_equal(data, done.table("numbers", "work")[["random", "value"]], check_exact=True)
    readme = (folder / "README.md").read_text()
    assert "![line](line.png)" in readme
    assert "Random numbers." in readme
    assert f"gradlab figures toy/{done.folder.name}" in readme
    assert missing == [
        "needs-more: the preset default measures too little for it.",
        "stopped: only drawn with note=interrupt.",
    ]
    assert plt.get_fignums() == []


def test_drawing_again_gives_the_same_bytes(done: Run, toy: Any) -> None:
    def files() -> dict[str, bytes]:
        draw_figures(toy.STUDY, done)
        return {path.name: path.read_bytes() for path in (done.folder / "figures").iterdir()}

    assert files() == files()


def test_one_figure_alone_leaves_the_readme_of_all(done: Run, toy: Any) -> None:
    draw_figures(toy.STUDY, done)
    before = (done.folder / "figures" / "README.md").read_bytes()
    drawn, missing = draw_figures(toy.STUDY, done, names=["needs-more"])
    assert (drawn, len(missing)) == ([], 1)
    assert (done.folder / "figures" / "README.md").read_bytes() == before


def test_figures_that_cannot_be_written_are_one_sentence(done: Run, toy: Any) -> None:
    (done.folder / "figures").write_text("a file in the way")
    with pytest.raises(StoreError, match=r"Cannot write .*line.png"):
        draw_figures(toy.STUDY, done)
    assert plt.get_fignums() == []


def test_figures_of_an_empty_run_are_refused(start: Start, toy: Any) -> None:
    with pytest.raises(StoreError, match="is empty"):
        draw_figures(toy.STUDY, start(*SMALL))


def test_a_run_is_not_started_in_a_file(toy: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = parse_settings(toy.STUDY)
    with pytest.raises(StoreError, match="Cannot write"):
        start_run(toy.STUDY, "default", settings, out=tmp_path / "file", device="cpu")
