"""A table that outgrows memory: on the disk, and the same to the bit."""

import numpy as np
import pandas as pd
import pytest

from gradlab.probes.log import TableLog


def fill(log, steps=30, rows=50):
    generator = np.random.default_rng(0)
    for step in range(steps):
        keys = [(f"layer{row}", step % 2) for row in range(rows)]
        values = generator.standard_normal((rows, 2))
        values[0, 0], values[1, 1] = np.nan, np.inf
        log.append(step, keys, values)


def test_parts_on_the_disk_are_the_same_table(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    whole, parted = (TableLog(("layer", "call"), ("a", "b")) for _ in range(2))
    parted._limit = 3000
    fill(whole)
    fill(parted)
    assert len(list(tmp_path.rglob("*.parquet"))) == 7  # 800 bytes a step: every fourth
    assert len(list(parted.frames())) == 8
    want, got = whole.frame(), parted.frame()
    pd.testing.assert_frame_equal(got, want, check_exact=True)
    assert list(got.dtypes.astype(str)) == list(want.dtypes.astype(str))
    del parted
    assert not list(tmp_path.iterdir())


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    log = TableLog(("layer", "call"), ("a", "b"))
    log._limit = 3000

    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        fill(log)
    assert len(log.frame()) == 1500


def test_rows_that_are_derived_later():
    log = TableLog(("layer",), ("sum", "fact"), lambda rows, facts: {"sum": rows[:, :, 0].sum(1), "fact": facts[:, 0]})
    rows = np.arange(24.0).reshape(3, 8)
    keys = [("a",), ("b",)]
    log.append_rows(0, keys, rows, np.array([[0, 1], [2, -1]]), (np.array([5.0, 6.0]),))
    log.append_rows(1, keys[:1], rows[:2] + 100, np.array([[1, 0]]), (7.0,))
    log.append_rows(2, [], rows, np.zeros((0, 2), int), (8.0,))
    frame = log.frame()
    assert frame["step"].tolist() == [0, 0, 1]
    assert frame["layer"].tolist() == ["a", "b", "a"]
    assert frame["sum"].fillna(-1).tolist() == [8, -1, 208]
    assert frame["fact"].tolist() == [5, 6, 7]
