"""A run on disk: made, read back, damaged."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pyarrow import parquet

import gradlab as gl
from gradlab.errors import GradlabError, StoreError, UsageError
from gradlab.storage import replace_file
from gradlab.study import Cell, CellResult
from gradlab.sweep import store
from gradlab.sweep.store import Run, create_run, find_run, save_cell
from gradlab.trace import Trace

MANIFEST = {"preset": "default", "settings": {"seeds": 2}, "device": "cpu"}


def make_cell(part: str = "train", **settings: Any) -> Cell:
    return Cell(part=part, label=f"{part} {settings}", settings=settings)


def make_run(out: Path, *cells: Cell, study: str = "toy") -> Run:
    return create_run(out, study, MANIFEST, cells)


def result(*values: float, **tables: pd.DataFrame) -> CellResult:
    frame = pd.DataFrame({"step": range(len(values)), "loss": values})
    return CellResult(trace=Trace({"steps": frame}), tables=tables)


def filled(out: Path) -> Run:
    """Return a run of two finished cells and one that is not."""
    cells = [make_cell(net="plain", seed=0), make_cell(net="residual", seed=1), make_cell("rate", seed=2)]
    run = make_run(out, *cells)
    save_cell(run.folder, cells[0], result(1.0, 0.5, ends=pd.DataFrame({"error": [0.1]})), {})
    save_cell(run.folder, cells[1], result(2.0, ends=pd.DataFrame({"error": [0.2], "extra": ["x"]})), {})
    return run


# -- making -----------------------------------------------------------------------------------------------------------


def test_a_run_reads_back_what_it_was_made_with(tmp_path: Path) -> None:
    cells = [make_cell(seed=0), make_cell(seed=1)]
    made = make_run(tmp_path, *cells)
    run = Run(made.folder)
    assert (run.study, run.preset, run.settings) == ("toy", "default", {"seeds": 2})
    assert run.planned == {cell.key for cell in cells}
    assert run.cells() == []
    assert run.folder.parent == tmp_path / "toy"
    assert sorted(path.name for path in run.folder.iterdir()) == ["cells", "manifest.json"]


def test_runs_made_in_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    folders = [make_run(tmp_path).folder for _ in range(12)]
    assert len(set(folders)) == 12
    assert sorted(folders) == sorted(path for path in (tmp_path / "toy").iterdir())
    assert find_run("toy", tmp_path) == folders[-1]  # "-12" comes after "-2"


def test_a_name_taken_since_we_looked_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_run(tmp_path)
    before = (first.folder / "manifest.json").read_bytes()
    monkeypatch.setattr(Path, "exists", lambda *_, **__: False)  # the race: it looks free, and is not
    second = make_run(tmp_path)
    assert second.folder != first.folder
    assert (first.folder / "manifest.json").read_bytes() == before


def test_a_run_is_not_made_where_a_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StoreError, match=r"Cannot write .*: Not a directory. Free some space or choose another"):
        make_run(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a file"


def test_a_cell_is_never_stored_twice(tmp_path: Path) -> None:
    run, cell = make_run(tmp_path, make_cell(seed=0)), make_cell(seed=0)
    save_cell(run.folder, cell, result(1.0), {})
    with pytest.raises(StoreError, match="exists already and nothing is overwritten"):
        save_cell(run.folder, cell, result(9.0), {})
    assert run.table("steps")["loss"].tolist() == [1.0]


def test_a_table_must_not_be_called_like_one_of_the_trace(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(UsageError, match="A cell's table cannot be called 'layers'"):
        save_cell(run.folder, make_cell(), result(layers=pd.DataFrame({"a": [1]})), {})
    assert list((run.folder / "cells").iterdir()) == []


@pytest.mark.parametrize("fails", ["write_table", "write_json", "fsync", "rename"])
def test_a_full_disk_leaves_no_half_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    run = make_run(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = {"fsync": (os, "fsync"), "rename": (Path, "rename")}.get(fails, (store, fails))
    monkeypatch.setattr(*target, full)
    with pytest.raises(StoreError, match=r"Cannot write .*: No space left on device. Free some space"):
        save_cell(run.folder, make_cell(), result(1.0, extra=pd.DataFrame({"a": [1]})), {})
    assert list((run.folder / "cells").iterdir()) == []
    assert run.cells() == []


# -- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_joins_all_cells_and_says_whose_each_row_is(tmp_path: Path) -> None:
    run = filled(tmp_path)
    ends = run.table("ends", "train").sort_values("error")
    assert ends["net"].tolist() == ["plain", "residual"]
    assert ends["seed"].tolist() == [0, 1]
    assert set(ends["part"]) == {"train"}
    assert set(ends["status"]) == {"done"}
    assert set(ends["cell"]) < run.planned
    assert ends["extra"].isna().tolist() == [True, False]  # a column that one cell has
    assert run.table("steps").groupby("net")["loss"].apply(list).to_dict() == {"plain": [1.0, 0.5], "residual": [2.0]}


def test_a_table_nobody_wrote_is_empty(tmp_path: Path) -> None:
    run = filled(tmp_path)
    assert run.table("ends", "rate").empty
    assert run.table("nothing").empty
    assert run.table("layers").empty


def test_columns_of_a_table_win_over_settings_of_the_same_name(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    named = {"net": "setting", "loss": "setting", "part": "setting", "cell": "setting", "sizes": [8, 16], "none": None}
    cell = Cell(part="train", label="", settings=named)
    save_cell(run.folder, cell, result(1.0, ends=pd.DataFrame({"net": ["measured"]})), {})
    ends = run.table("ends").iloc[0]
    assert ends["net"] == "measured"
    assert (ends["part"], ends["cell"], ends["sizes"]) == ("train", cell.key, "8,16")
    assert pd.isna(ends["none"])
    assert run.table("steps")["loss"].tolist() == [1.0]


def test_non_finite_numbers_come_back_as_they_are(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    save_cell(run.folder, make_cell(), result(np.nan, np.inf, -np.inf, 1e-320), {})
    np.testing.assert_array_equal(run.table("steps")["loss"], [np.nan, np.inf, -np.inf, 1e-320])


def test_load_merges_the_traces_of_a_run(tmp_path: Path) -> None:
    run = filled(tmp_path)
    trace = gl.load(run.folder)
    assert trace.steps.groupby(["net", "seed", "part"])["loss"].apply(list).to_dict() == {
        ("plain", 0, "train"): [1.0, 0.5],
        ("residual", 1, "train"): [2.0],
    }
    assert set(trace.steps["cell"]) < run.planned
    assert len(trace.info["merged"]) == 2


def test_load_keeps_a_setting_that_is_a_column_of_another_table(tmp_path: Path) -> None:
    """`norm` is a column of timesteps and a setting of depth-sweep: once it was dropped from all tables."""
    run = make_run(tmp_path)
    states = pd.DataFrame({"step": [0], "layer": ["rnn"], "state": ["h"], "t": [0], "norm": [1.5]})
    for norm in ("batch", "none"):
        trace = Trace({"steps": pd.DataFrame({"step": [0], "loss": [1.0]}), "timesteps": states})
        save_cell(run.folder, make_cell(norm=norm), CellResult(trace=trace), {})
    merged = gl.load(run.folder)
    assert sorted(merged.steps["norm"]) == ["batch", "none"]
    assert merged.timesteps["norm"].tolist() == [1.5, 1.5]


def test_load_reads_a_single_trace_too(tmp_path: Path) -> None:
    trace = Trace({"steps": pd.DataFrame({"step": [0], "loss": [1.0]})})
    assert gl.load(trace.save(tmp_path / "one.trace")) == trace


def test_load_of_an_empty_run_is_an_empty_trace(tmp_path: Path) -> None:
    assert len(gl.load(make_run(tmp_path).folder).steps) == 0


# -- damage -----------------------------------------------------------------------------------------------------------


def change(path: Path, **entries: object) -> None:
    content = json.loads(path.read_text())
    content.update(entries)
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"run_version": 2}, "has version 2 and this gradlab reads up to 1: update gradlab to read it."),
        ({"run_version": "1"}, "is not a gradlab run"),
        ({"format": "other"}, "is not a gradlab run"),
        ({"study": "absent"}, "is damaged: 'study' is missing or of the wrong type."),
        ({"settings": []}, "is damaged: 'settings' is missing or of the wrong type."),
        ({"cells": {}}, "is damaged: 'cells' is missing or of the wrong type."),
        ({"cells": [1]}, "is damaged: one of its cells has no key."),
        ({"cells": [{"key": 1}]}, "is damaged: one of its cells has no key."),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_damaged_manifest_is_one_sentence(tmp_path: Path, entries: dict[str, object], sentence: str) -> None:
    run = filled(tmp_path)
    change(run.folder / "manifest.json", **entries)
    with pytest.raises(StoreError) as caught:
        Run(run.folder)
    assert str(caught.value).endswith(sentence) or sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Change the last byte of the first column's values."""
    column = parquet.ParquetFile(path).metadata.row_group(0).column(0)
    begin = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[begin + column.total_compressed_size - 1] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b""), Path.unlink], ids=["cut", "empty", "gone"])
@pytest.mark.parametrize("name", ["manifest.json", "cell.json", "steps.parquet", "header.json"])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    run = filled(tmp_path)
    damage(next(run.folder.rglob(name)))
    with pytest.raises(StoreError) as caught:
        gl.load(run.folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["ends.parquet", "steps.parquet"])
def test_a_flipped_byte_in_a_table_is_found(tmp_path: Path, name: str) -> None:
    run = filled(tmp_path)
    flip(next(run.folder.rglob(name)))
    with pytest.raises(StoreError, match="is damaged or not a Parquet file"):
        run.table(name.removesuffix(".parquet"))


@pytest.mark.parametrize(
    "entries",
    [{"part": "absent"}, {"status": "absent"}, {"settings": 3}, {"settings": "absent"}],
    ids=str,
)
def test_a_cell_that_says_too_little_is_one_sentence(tmp_path: Path, entries: dict[str, object]) -> None:
    run = filled(tmp_path)
    change(next(run.folder.rglob("cell.json")), **entries)
    with pytest.raises(StoreError, match=r"cell.json is damaged"):
        run.cells()


def test_part_written_folders_are_not_finished_cells(tmp_path: Path) -> None:
    run = filled(tmp_path)
    (run.folder / "cells" / f".{'a' * 16}.12345678.part").mkdir()
    (run.folder / "cells" / "notes").mkdir()
    assert len(run.cells()) == 2


# -- finding ----------------------------------------------------------------------------------------------------------


def test_a_run_is_found_by_folder_study_or_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = make_run(tmp_path / "runs"), make_run(tmp_path / "runs")
    out = tmp_path / "runs"
    assert find_run(str(old.folder), Path("elsewhere")) == old.folder
    assert find_run("toy", out) == new.folder
    assert find_run(f"toy/{old.folder.name}", out) == old.folder
    monkeypatch.chdir(old.folder)
    assert Run(find_run(".", out)).settings == old.settings


def test_a_run_never_written_to_its_end_is_not_found(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.folder.rename(run.folder.with_name(f".{run.folder.name}.12345678.part"))
    with pytest.raises(StoreError, match=r"There is no run at toy: 'gradlab run depth-sweep' makes one under"):
        find_run("toy", tmp_path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("tooy", "Unknown run 'tooy'. Did you mean 'toy'?"),
        ("x" * 300, "Unknown run 'xxx"),
        ("nul\0byte", "Unknown run 'nul"),
        ("", "Unknown run ''"),
    ],
    ids=["misspelt", "too long", "nul", "empty"],
)
def test_a_run_that_is_not_there_names_those_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, sentence: str
) -> None:
    make_run(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(StoreError) as caught:
        find_run(text, tmp_path / "runs")
    assert str(caught.value).startswith(sentence)
    assert "toy" in str(caught.value)


def test_a_file_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="There is no run at"):
        find_run(str(tmp_path / "file"), tmp_path / "runs")
    with pytest.raises(GradlabError, match="There is no trace"):
        gl.load(tmp_path / "file")


# -- derived files ----------------------------------------------------------------------------------------------------


def test_a_derived_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "claims.json"
    replace_file(path, b"one")
    replace_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert [item.name for item in path.parent.iterdir()] == ["claims.json"]


def test_a_derived_file_that_cannot_be_written_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "claims.json"
    replace_file(path, b"old")

    def full(self: Path, content: bytes) -> None:
        os.close(os.open(self, os.O_CREAT))  # begun, then the disk was full
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError, match=r"claims.json: No space left on device"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["claims.json"]


def test_a_derived_file_below_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("")
    with pytest.raises(StoreError, match="Cannot write"):
        replace_file(tmp_path / "figures" / "a.png", b"x")
