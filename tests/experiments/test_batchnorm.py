"""The experiment batchnorm, run in this process on its smoke preset."""

import dataclasses
import importlib

import pandas as pd
import pytest
import torch

from gradlab.errors import DataError, UsageError
from gradlab.study import CellContext, parse_settings
from gradlab.tasks import load_digits
from gradlab.training import train

MODULE = importlib.import_module("gradlab.experiments.batchnorm")
STUDY = MODULE.STUDY
CPU = torch.device("cpu")


class Tables:
    """What a run would read back."""

    def __init__(self, settings, frames):
        self.settings, self.preset, self._frames = dataclasses.asdict(settings), "smoke", frames

    def table(self, name, part=None):
        return pd.concat(self._frames[name], ignore_index=True) if self._frames.get(name) else pd.DataFrame()


def run_all(*words, parts=None):
    settings = parse_settings(STUDY, "smoke", words)
    frames = {}
    for cell in STUDY.plan(settings):
        if parts is not None and cell.part not in parts:
            continue
        context = CellContext(device=CPU, data_dir=None, progress=lambda *_: None)
        result = STUDY.run(cell, context)
        tables = dict(result.tables) | (dict(result.trace.tables) if result.trace is not None else {})
        plain = {key: value for key, value in cell.settings.items() if not isinstance(value, list)}
        for name, frame in tables.items():
            frames.setdefault(name, []).append(frame.assign(**plain, status=result.status))
    return Tables(settings, frames)


@pytest.fixture(scope="module")
def smoke():
    return run_all()


def test_cells_are_distinct_and_sweeps_share_what_they_can():
    settings = parse_settings(STUDY, "default")
    cells = STUDY.plan(settings)
    assert len({cell.key for cell in cells}) == len(cells)
    trained = [cell for cell in cells if cell.part == "train"]
    usual = [cell for cell in trained if cell.settings["steps"] == 300]
    assert len(usual) == 2 * settings.seeds * (5 + 7 + 4) + 17
    least = [cell.settings["seed"] for cell in usual if cell.settings["scale"] == 0.001]
    assert sorted(least) == sorted([*range(20), *range(3)])  # with BatchNorm, and without
    assert len(trained) == len(usual) + 10 + 3 * 3
    plain = STUDY.plan(parse_settings(STUDY, "default", ("scale=1",)))
    assert {cell.settings["seed"] for cell in plain if cell.part == "train"} == set(range(3))
    shared = STUDY.plan(parse_settings(STUDY, "default", ("lr=0.1",)))
    assert len([cell for cell in shared if cell.part == "train"]) == len(trained) - 2 * settings.seeds


def test_every_claim_has_a_verdict_of_its_own(smoke):
    claims = STUDY.claims(smoke)
    assert len({claim.id for claim in claims}) == len(claims)
    by_id = {claim.id: claim for claim in claims}
    assert str(by_id["C3.1"].verdict) == "reproduced"
    assert {"C2.4 relu 8", "C3.2", "C3.2 small", "N5 batch 2", "C3.3 loss range", "C3.4 signal", "N5 lag"} <= set(by_id)
    for claim in claims:
        assert claim.statement.endswith(".")
        assert claim.rule


@pytest.mark.parametrize("name", STUDY.figures)
def test_every_figure_draws(smoke, name):
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    drawing = STUDY.figures[name](smoke)
    assert len(drawing.data)
    assert drawing.caption.endswith(".")
    drawing.figure.canvas.draw()
    plt.close(drawing.figure)


def test_nothing_finished_decides_nothing_and_draws_nothing():
    empty = Tables(parse_settings(STUDY, "smoke"), {})
    assert {str(claim.verdict) for claim in STUDY.claims(empty)} == {"not decided"}
    for draw in STUDY.figures.values():
        with pytest.raises(DataError):
            draw(empty)


@pytest.mark.parametrize(
    "words",
    [("small_batch=", "scale=1"), ("rate_batch=4", "seeds=1"), ("momentum=0.1", "lr_range=0.1")],
    ids=["no-sweeps", "least-batch-one-seed", "one-momentum"],
)
def test_claims_come_out_of_any_grid(words):
    tables = run_all(*words, parts=("train", "running", "explosion", "identity"))
    claims = STUDY.claims(tables)
    assert len({claim.id for claim in claims}) == len(claims)


def test_divergence_is_a_result():
    tables = run_all("lr_range=0.1,1e30", "seeds=1", "scale=1", "small_batch=", parts=("train",))
    ends = tables.table("ends")
    assert set(ends.loc[ends["lr"] == 1e30, "loss"]) == {float("inf")}
    claims = {claim.id: claim for claim in STUDY.claims(tables)}
    assert "C3.2" in claims


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("batch_size=1", "BatchNorm takes a variance over the batch; got 1"),
        ("small_batch=1,4", "BatchNorm takes a variance over the batch; got 1"),
        ("batch_size=1401", "digits has 1,400 training images"),
        ("lr=0", "Setting 'lr' must be above 0; got 0"),
        ("lr_range=0.1,-1", "Setting 'lr_range' must be above 0; got -1"),
        ("scale=1,0", "Setting 'scale' must be above 0; got 0"),
        ("depth=1", "Setting 'depth' must be at least 2; got 1"),
        ("rate_depth=11", "Setting 'rate_depth' must be at least 12; got 11"),
        ("blocks=3", "Setting 'blocks' must be at least 20; got 3"),
        ("eps=-1", "Setting 'eps' must be at least 0; got -1"),
        ("momentum=0", "Setting 'momentum' must lie above 0"),
        ("rate_batch=3", "Setting 'rate_batch' must be at least 4; got 3"),
    ],
    ids=lambda value: value.split(",")[0] if "=" in value else "",
)
def test_values_out_of_range_are_told_in_one_sentence(words, says):
    with pytest.raises(UsageError) as told:
        parse_settings(STUDY, "smoke", (words,))
    assert says in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_training_with_probes_never_waits_for_the_device(norm):
    # On meta any .item(), bool() or copy to the host raises, and so does any tensor left on the CPU.
    own = {"depth": 3, "width": 8, "batch_size": 16, "steps": 3, "lr": 0.05, "seed": 0, "norm": norm, "scale": 0.1}
    with torch.device("meta"):
        model, how = MODULE.build(own)
    result = train(model, load_digits().to("meta"), how, device=torch.device("meta"), every=1)
    assert result.trace.steps["step"].tolist() == [0, 1, 2]
    assert len(result.trace.batchnorm) == (9 if norm == "batch" else 0)


def test_runs_repeat_by_seed():
    first, second = (run_all("seeds=1", "lr_range=0.1", parts=("train", "landscape")) for _ in range(2))
    pd.testing.assert_frame_equal(first.table("ends"), second.table("ends"))
    pd.testing.assert_frame_equal(first.table("landscape"), second.table("landscape"))
