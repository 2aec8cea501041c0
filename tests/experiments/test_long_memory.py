"""The experiment long-memory, run in this process on its smoke preset, and its figures."""

import importlib
import json

import matplotlib as mpl
import pandas as pd
import pytest
import torch

from gradlab.errors import UsageError
from gradlab.measure.learning import memory_net
from gradlab.study import CellContext, parse_settings
from gradlab.tasks import AddingTask, WriteQueryTask

mpl.use("agg")
MODULE = importlib.import_module("gradlab.experiments.long_memory")
STUDY = MODULE.STUDY


class Tables:
    """What a run would read back."""

    preset = "smoke"

    def __init__(self, *words):
        self.settings = {}
        self.told = []
        context = CellContext(device=torch.device("cpu"), data_dir=None, progress=lambda *a: self.told.append(a))
        self._frames = {}
        for cell in STUDY.plan(parse_settings(STUDY, "smoke", words)):
            result = STUDY.run(cell, context)
            tables = dict(result.tables) | (dict(result.trace.tables) if result.trace else {})
            for name, frame in tables.items():
                own = {key: value for key, value in cell.settings.items() if key not in frame}
                own = {key: str(value) if isinstance(value, list) else value for key, value in own.items()}
                self._frames.setdefault((name, cell.part), []).append(frame.assign(**own, cell=cell.key))

    def table(self, name, part):
        frames = [frame for frame in self._frames.get((name, part), []) if len(frame)]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


@pytest.mark.parametrize(
    "words", [(), ("net=gru", "copy_net=gru", "other_seeds=1", "seeds=1", "context=gru")], ids=["smoke", "one-net"]
)
def test_claims_and_figures_come_out_of_any_grid(words):
    import matplotlib.pyplot as plt

    tables = Tables(*words)
    claims = STUDY.claims(tables)
    assert len({claim.id for claim in claims}) == len(claims)
    assert not any(claim.verdict == "reproduced" for claim in claims if claim.id.startswith("C5"))  # far too small
    for draw in STUDY.figures.values():
        drawing = draw(tables)
        assert len(drawing.data)
        assert drawing.caption.endswith(".")
        plt.close(drawing.figure)
    assert any(loss is not None for _, _, loss in tables.told)
    adding = tables.table("outcome", "adding")
    assert (adding["last"] > 0).all()
    recorded = tables.table("timesteps", "adding")
    assert set(recorded["length"]) == {8}
    assert set(recorded["seed"]) == {0}


def test_cells_are_plain_json_and_each_is_its_own():
    for preset in STUDY.presets:
        cells = STUDY.plan(parse_settings(STUDY, preset))
        assert len({cell.key for cell in cells}) == len(cells)
        for cell in cells:
            json.dumps(dict(cell.settings), allow_nan=False)


def test_seeds_go_where_the_settings_say():
    cells = STUDY.plan(parse_settings(STUDY, "default", ["seeds=4", "other_seeds=2"]))
    count = {}
    for cell in cells:
        key = (cell.part, cell.settings.get("length"), cell.settings.get("net"))
        count[key] = count.get(key, 0) + 1
    assert count["adding", 100, "gru"] == 4
    assert count["adding", 25, "gru"] == count["copy", 100, "tanh"] == count["query", 64, "markov 8"] == 2
    assert sum(bool(cell.settings.get("record")) for cell in cells) == 5  # one run a net


def test_runs_draw_their_own_weights_and_batches():
    tables = Tables("net=tanh,lstm", "length=8", "copy_net=tanh", "window=1", "context=gru")
    curves = tables.table("curve", "adding")
    assert curves.groupby(["net", "seed"])["loss"].first().nunique() == 4


def test_every_offered_net_can_be_built():
    for net in MODULE.NETS:
        memory_net(net, AddingTask(length=4), hidden=2, horizon=4, seed=0)
    for net in MODULE.CONTEXTS:
        memory_net(net, WriteQueryTask(length=4), hidden=2, horizon=4, seed=0)


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("net=elman", "Unknown net value 'elman'"),
        ("net=lstm chron", "Did you mean 'lstm chrono'"),
        ("length=3", "Setting 'length' must be at least 4; got 3"),
        ("copy_length=0", "Setting 'copy_length' must be at least 4; got 0"),
        ("window=0", "Setting 'window' must be at least 1; got 0"),
        ("window=64", "Setting 'window' has 64, but the write/query series has 8 tokens"),
        ("context=markov 2", "Unknown context value 'markov 2'"),
        ("steps=0", "Setting 'steps' must be at least 1; got 0"),
    ],
    ids=str,
)
def test_bad_settings_are_one_sentence_before_anything_runs(word, text):
    with pytest.raises(UsageError, match=text):
        parse_settings(STUDY, "smoke", [word])
