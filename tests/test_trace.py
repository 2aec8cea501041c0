"""Trace and its form on disk: whole or not at all, equal when read again, and clear about damage."""

import contextlib
import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import gradlab.storage
import gradlab.trace
from gradlab.errors import StoreError, UsageError
from gradlab.storage import atomic_folder
from gradlab.trace import SCHEMA, SCHEMA_VERSION, Trace


def example():
    rng = np.random.default_rng(4)
    layers = pd.DataFrame({
        "step": np.repeat([0, 10], 50),
        "layer": [f"stages.{k}.relu ü" for k in range(50)] * 2,
        "call": 0,
        "order": np.tile(np.arange(50), 2),
        "kind": "ReLU",
        "entries": 128,
        "act_norm": rng.normal(size=100),
        "grad_norm": np.where(np.arange(100) % 7 == 0, math.nan, rng.normal(size=100)),
        "grad_abs_max": math.inf,
        "my_extra": rng.normal(size=100).astype("float32"),
        "my_text": "x",
    })  # fmt: skip
    steps = pd.DataFrame({"step": [0, 10], "loss": [2.5, math.nan], "skipped": [False, True]})
    info = {"never_ran": ["head"], "not_seen": {"odd": "why"}, "params": [["a", [2, 3]]], "none": None}
    return Trace({"layers": layers, "steps": steps}, info)


def assert_nothing_in(folder):
    assert list(folder.iterdir()) == []


# -- the object -----------------------------------------------------------------------------------------------------


def test_schema_columns_come_first_in_their_types():
    trace = example()
    for name, columns in SCHEMA.items():
        frame = trace.tables[name]
        assert list(frame.columns)[: len(columns)] == list(columns)
        for column, (kind, _, _) in columns.items():
            assert frame[column].dtype == pd.Series(dtype=kind).dtype, (name, column)
    assert list(trace.layers.columns)[-2:] == ["my_extra", "my_text"]
    assert trace.layers["act_mean"].isna().all()  # missing is NaN, never 0
    assert trace.never_ran == ("head",)


def test_empty():
    trace = Trace()
    assert all(len(frame) == 0 for frame in trace.tables.values())
    assert trace.to_pandas() == {}
    assert trace.never_ran == ()
    assert repr(trace) == "Trace(empty)"
    assert trace == Trace()


def test_unknown_table():
    with pytest.raises(UsageError, match=r"'layer'.*layers"):
        Trace({"layer": pd.DataFrame()})


def test_equality_sees_every_difference():
    one = example()
    assert one == example()
    other = example()
    other.layers.loc[3, "act_norm"] += 1
    assert one != other
    other = example()
    other.layers.loc[0, "grad_norm"] = 0.0  # was NaN
    assert one != other
    assert one != Trace(one.tables, {})
    assert one != "trace"


def test_trace_and_source_frame_are_apart():
    source = pd.DataFrame({"step": [0, 1], "loss": [1.0, 2.0]})
    trace = Trace({"steps": source})
    source.loc[0, "loss"] = 99.0
    assert trace.steps["loss"].tolist() == [1.0, 2.0]
    copied = trace.to_pandas()["steps"]
    copied.loc[0, "loss"] = 99.0
    assert trace.steps["loss"].tolist() == [1.0, 2.0]
    with pytest.raises(TypeError):
        trace.tables["steps"] = source
    with pytest.raises(TypeError):
        trace.info["a"] = 1


def test_index_of_the_source_does_not_matter():
    source = pd.DataFrame({"step": [0, 1], "loss": [1.0, 2.0]}, index=[5, 9])
    assert Trace({"steps": source}) == Trace({"steps": source.reset_index(drop=True)})


def test_merge():
    one, two = example(), Trace({"steps": pd.DataFrame({"step": [0], "loss": [1.0]})}, {"model": "MLP"})
    merged = Trace.merge([one, two], [{"depth": 20, "net": "plain"}, {"depth": 56, "net": "residual"}])
    assert merged.steps[["step", "depth", "net"]].values.tolist() == [
        [0, 20, "plain"],
        [10, 20, "plain"],
        [0, 56, "residual"],
    ]
    assert merged.layers["depth"].eq(20).all()
    assert len(merged.layers) == 100
    assert merged.info["merged"] == [dict(one.info), {"model": "MLP"}]
    assert merged.steps["skipped"].dtype == bool
    assert len(Trace.merge([], []).steps) == 0


def test_merge_mistakes():
    with pytest.raises(UsageError, match="2 traces and 1"):
        Trace.merge([example(), example()], [{}])
    with pytest.raises(UsageError, match=r"'loss'.*steps"):  # would overwrite what was recorded
        Trace.merge([example()], [{"loss": "mse"}])


# -- the disk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trace", [example(), Trace()], ids=["full", "empty"])
def test_saved_and_loaded_is_equal(trace, tmp_path):
    assert trace.save(tmp_path / "run.trace") == tmp_path / "run.trace"
    again = Trace.load(tmp_path / "run.trace")
    assert again == trace
    for name in SCHEMA:
        pd.testing.assert_frame_equal(again.tables[name], trace.tables[name])
    assert sorted(p.name for p in (tmp_path / "run.trace").iterdir()) == sorted(
        ["header.json", *(f"{name}.parquet" for name in SCHEMA if len(trace.tables[name]))]
    )
    again.save(str(tmp_path / "deeper" / "folder" / "run"))
    assert Trace.load(tmp_path / "deeper" / "folder" / "run") == trace


def test_columns_of_ones_own_in_an_empty_table_are_saved_too(tmp_path):
    trace = Trace({"units": pd.DataFrame({"mine": pd.Series(dtype="float64")})})
    trace.save(tmp_path / "run")
    assert Trace.load(tmp_path / "run") == trace
    assert "mine" in Trace.load(tmp_path / "run").units


def test_an_empty_trace_is_not_shared(tmp_path):
    frame = Trace().steps
    frame["mine"] = frame["loss"]
    assert "mine" not in Trace().steps


def test_merged_trace_is_saved_too(tmp_path):
    merged = Trace.merge([example(), example()], [{"seed": 0}, {"seed": 1}])
    merged.save(tmp_path / "merged")
    assert Trace.load(tmp_path / "merged") == merged


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_is_overwritten(kind, tmp_path):
    target = tmp_path / "run"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
    with pytest.raises(StoreError, match="exists already"):
        example().save(target)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert kind == "folder" or target.read_text() == "mine"


@pytest.fixture
def saved(tmp_path):
    return example().save(tmp_path / "run")


def edit_header(folder, **changes):
    path = folder / "header.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 99], ids=str)
def test_newer_schema(saved, version):
    edit_header(saved, schema_version=version)
    with pytest.raises(StoreError, match=f"schema version {version}.*update"):
        Trace.load(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "something"},
        {"schema_version": None},
        {"schema_version": "1"},
        {"schema_version": 0},
        {"rows": []},
        {"rows": {}},
        {"info": [1]},
    ],
    ids=str,
)
def test_header_of_something_else(saved, changes):
    edit_header(saved, **changes)
    with pytest.raises(StoreError):
        Trace.load(saved)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"format": "gradlab tr', "\x00\x01"], ids=repr)
def test_damaged_header(saved, text):
    (saved / "header.json").write_text(text)
    with pytest.raises(StoreError, match="damaged"):
        Trace.load(saved)


def test_header_that_is_not_text(saved):
    (saved / "header.json").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(StoreError, match="damaged"):
        Trace.load(saved)


def test_no_trace_there(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name in ("nothing", "file", "folder"):
        with pytest.raises(StoreError, match="no trace"):
            Trace.load(tmp_path / name)


@pytest.mark.parametrize("table", [name for name in SCHEMA if len(example().tables[name])])
def test_missing_table(saved, table):
    (saved / f"{table}.parquet").unlink()
    with pytest.raises(StoreError, match=f"{table}.parquet is missing"):
        Trace.load(saved)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_table(saved, share):
    path = saved / "layers.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(StoreError, match="damaged"):
        Trace.load(saved)


def test_flipped_bytes_are_noticed(saved):
    path = saved / "layers.parquet"
    content = path.read_bytes()
    want = example()
    for place in range(4, 1600, 97):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        with contextlib.suppress(StoreError):
            assert Trace.load(saved) == want, f"byte {place} changed the numbers unnoticed"


def test_table_of_another_kind(saved):
    example().params.to_parquet(saved / "units.parquet")  # both have no rows
    with pytest.raises(StoreError, match="units"):
        Trace.load(saved)


def test_table_with_fewer_rows(saved):
    (saved / "layers.parquet").write_bytes((saved / "steps.parquet").read_bytes())
    with pytest.raises(StoreError, match="layers"):
        Trace.load(saved)


def test_table_with_values_of_a_wrong_type(saved):
    frame = pd.read_parquet(saved / "steps.parquet")
    frame.assign(loss=["much", "little"]).to_parquet(saved / "steps.parquet")
    with pytest.raises(StoreError, match="damaged"):
        Trace.load(saved)


@pytest.mark.parametrize("victim", ["write_table", "write_json", "_fsync"])
def test_disk_full(victim, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gradlab.storage if victim == "_fsync" else gradlab.trace, victim, full)
    with pytest.raises(StoreError, match=r"No space left.*Free some space"):
        example().save(tmp_path / "run")
    assert_nothing_in(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_disk_really_full(tmp_path):
    def save():
        with atomic_folder(tmp_path / "run") as folder:
            (folder / "header.json").symlink_to("/dev/full")
            gradlab.trace.write_json(folder / "header.json", {"a": "b"})

    with pytest.raises(StoreError, match="No space left"):
        save()
    assert_nothing_in(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StoreError, match="Permission denied"):
            example().save(tmp_path / "run")
    finally:
        tmp_path.chmod(0o700)
    assert_nothing_in(tmp_path)


def test_parent_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="Cannot write"):
        example().save(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    "info", [{"a": math.nan}, {"a": {1, 2}}, {"a": np.float32(1)}], ids=["nan", "set", "numpy_scalar"]
)
def test_info_that_is_not_json(info, tmp_path):
    with pytest.raises(UsageError, match="plain JSON"):
        Trace(info=info).save(tmp_path / "run")
    assert_nothing_in(tmp_path)


def test_extra_column_that_cannot_be_stored(tmp_path):
    trace = Trace({"steps": pd.DataFrame({"step": [0, 1], "odd": [1, "two"]})})
    with pytest.raises(UsageError, match="steps cannot be stored"):
        trace.save(tmp_path / "run")
    assert_nothing_in(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError], ids=lambda error: error.__name__)
def test_interrupted_save_leaves_nothing(error, tmp_path, monkeypatch):
    def interrupt(*args):
        raise error

    monkeypatch.setattr(gradlab.trace, "write_json", interrupt)
    with pytest.raises(error):
        example().save(tmp_path / "run")
    assert_nothing_in(tmp_path)


def test_target_made_by_somebody_else_meanwhile(tmp_path):
    def save():
        with atomic_folder(tmp_path / "run") as folder:
            (folder / "mine").write_text("x")
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "theirs").write_text("y")

    with pytest.raises(StoreError, match="Cannot write"):
        save()
    assert [p.name for p in tmp_path.rglob("*")] == ["run", "theirs"]


def test_reading_needs_no_torch(saved):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from gradlab.trace import Trace\n"
        f"trace = Trace.load({str(saved)!r})\n"
        "print(len(trace.layers), trace.never_ran)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "100 ('head',)", done.stderr
