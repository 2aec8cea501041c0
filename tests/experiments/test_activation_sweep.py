"""The experiment activation-sweep, run in this process on its smoke preset."""

import importlib

import matplotlib as mpl
import pandas as pd
import pytest
import torch

from gradlab.errors import DataError, UsageError
from gradlab.study import CellContext, parse_settings

MODULE = importlib.import_module("gradlab.experiments.activation_sweep")
STUDY = MODULE.STUDY
mpl.use("agg")


class Tables:
    """What a run would read back."""

    def __init__(self, settings, frames):
        self.settings, self.preset, self._frames = settings, "smoke", frames

    def table(self, name, part=None):
        frames = self._frames.get((name, part), [])
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def run_all(*words):
    import dataclasses

    settings = parse_settings(STUDY, "smoke", words)
    frames = {}
    for cell in STUDY.plan(settings):
        torch.manual_seed(cell.settings["seed"])
        reports = []
        context = CellContext(
            device=torch.device("cpu"), data_dir=None, progress=lambda *report, kept=reports: kept.append(report)
        )
        result = STUDY.run(cell, context)
        assert reports, cell.label
        tables = dict(result.tables) | ({"layers": result.trace.layers} if result.trace is not None else {})
        for name, frame in tables.items():
            about = {key: value for key, value in cell.settings.items() if key not in frame}
            frames.setdefault((name, cell.part), []).append(frame.assign(**about))
    return Tables(dataclasses.asdict(settings), frames)


@pytest.fixture(scope="module")
def smoke():
    return run_all()


def test_every_cell_is_its_own():
    cells = STUDY.plan(parse_settings(STUDY, "default"))
    assert len({cell.key for cell in cells}) == len(cells)
    assert sum(cell.part == "gain" for cell in cells) == 25 * 5
    assert sum(cell.part == "chaos" for cell in cells) == 8 * 12


def test_claims_come_out_of_the_smoke_preset(smoke):
    claims = STUDY.claims(smoke)
    assert len({claim.id for claim in claims}) == len(claims)
    by_id = {claim.id: claim for claim in claims}
    assert str(by_id["C1.5"].verdict) == "reproduced"
    assert str(by_id["isometry linear"].verdict) == "reproduced"
    assert {"C1.1 relu", "C1.2 gain", "C1.3 variance", "C1.4 standard", "C1.6 He", "N12 as noted"} <= set(by_id)


@pytest.mark.parametrize("name", MODULE.FIGURES)
def test_every_figure_is_drawn_and_captioned(smoke, name):
    import matplotlib.pyplot as plt

    drawing = STUDY.figures[name](smoke)
    assert len(drawing.data)
    assert drawing.caption.endswith(".")
    assert "Claims" in drawing.caption
    plt.close(drawing.figure)


def test_small_grids_have_claims_and_figures_too():
    import matplotlib.pyplot as plt

    tables = run_all(
        "activation=gelu,0.2:1.5", "init=1.7,glorot_uniform", "seeds=1", "chaos_seeds=1", "weight_var=2",
        "train_init=orthogonal", "train_seeds=1", "depth=10,12",
    )  # fmt: skip
    assert STUDY.claims(tables)
    for draw in STUDY.figures.values():
        plt.close(draw(tables).figure)


def test_nothing_finished_decides_nothing_and_draws_nothing():
    settings = {"train_depth": 30, "window": 20}
    assert {str(claim.verdict) for claim in STUDY.claims(Tables(settings, {}))} == {"not decided"}
    for draw in STUDY.figures.values():
        with pytest.raises(DataError):
            draw(Tables(settings, {}))


def test_gains_are_measured_on_the_meta_device_without_waiting_for_it():
    cells = STUDY.plan(parse_settings(STUDY, "smoke"))
    context = CellContext(device=torch.device("meta"), data_dir=None, progress=lambda *_: None)
    for part in ("gain", "chaos", "law", "train"):
        cell = next(cell for cell in cells if cell.part == part)
        STUDY.run(cell, context)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("activation=tahn", "Unknown activation value 'tahn'. Did you mean 'tanh'? Two slopes are written 0.2:1.5."),
        ("activation=0.2:x", "Unknown activation value '0.2:x'."),
        ("init=he_norml", "Unknown init value 'he_norml'. Did you mean 'he_normal'?"),
        ("init=-1", "Unknown init value '-1'."),
        ("width=1", "Setting 'width' must be at least 2; got 1."),
        ("depth=5", "Setting 'depth' must be at least 10; got 5."),
        ("batch_size=1", "Setting 'batch_size' must be at least 2; got 1."),
        ("chaos_depth=9", "Setting 'chaos_depth' must be at least 10; got 9."),
        ("weight_var=0", "Setting 'weight_var' must be above 0; got 0."),
        ("bias_var=-1", "Setting 'bias_var' must be at least 0; got -1.0."),
        ("law_size=50", "Setting 'law_size' takes WIDTHxDEPTH, such as 50x20; got '50'."),
        ("law_size=0x5", "Setting 'law_size' takes WIDTHxDEPTH, such as 50x20; got '0x5'."),
        ("train_batch=2000", "there are 1,400 training digits"),
        ("train_init=he", "Unknown train_init value 'he'."),
    ],
    ids=lambda value: value if "=" in value else "",
)
def test_settings_that_cannot_work_are_one_sentence(words, says):
    with pytest.raises(UsageError) as told:
        parse_settings(STUDY, "smoke", [words])
    assert says in str(told.value)
