"""The experiment architectures, run in this process on its smoke preset."""

from __future__ import annotations

import importlib

import matplotlib as mpl
import pandas as pd
import pytest
import torch

from gradlab.errors import UsageError
from gradlab.study import CellContext, parse_settings

mpl.use("agg")
STUDY = importlib.import_module("gradlab.experiments.architectures").STUDY


class Tables:
    """What a run would read back."""

    preset = "smoke"

    def __init__(self, frames):
        self.settings, self._frames = {}, frames

    def table(self, name, part=None):
        found = [frame for (own, key), frames in self._frames.items() for frame in frames if own == name]
        found = [frame for frame in found if part is None or (frame["part"] == part).all()]
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def run_all(*words):
    frames = {}
    context = CellContext(device=torch.device("cpu"), data_dir=None, progress=lambda *_: None)
    for number, cell in enumerate(STUDY.plan(parse_settings(STUDY, "smoke", words))):
        torch.manual_seed(cell.settings["seed"])
        result = STUDY.run(cell, context)
        tables = dict(result.tables) | ({} if result.trace is None else dict(result.trace.tables))
        for name, frame in tables.items():
            own = {key: value for key, value in cell.settings.items() if key not in frame}
            own = {key: ",".join(map(str, v)) if isinstance(v, list) else v for key, v in own.items()}
            marked = frame.assign(**own, part=cell.part, cell=number, status=result.status)
            frames.setdefault((name, cell.part), []).append(marked)
    return Tables(frames)


@pytest.fixture(scope="module")
def smoke():
    return run_all("seeds=1")


def test_every_cell_is_its_own() -> None:
    for preset in ("smoke", "default", "paper"):
        cells = STUDY.plan(parse_settings(STUDY, preset))
        assert len({cell.key for cell in cells}) == len(cells)
        assert {cell.part for cell in cells} >= {"sizes", "blocks", "growth", "profile", "heads", "train"}


def test_claims_come_out_of_the_smoke_preset(smoke: Tables) -> None:
    claims = {claim.id: str(claim.verdict) for claim in STUDY.claims(smoke)}
    assert len(claims) == 31
    assert claims["C4 AlexNet"] == claims["C4 GoogLeNet"] == claims["N1 size"] == claims["N2 two"] == "reproduced"
    assert claims["C4 arithmetic"] == claims["N2 field 5"] == claims["N2 field 7"] == "reproduced"
    assert claims["N3 size"] == "not reproduced"
    assert claims["C4 VGG"] == "not decided"  # the preset leaves the family out
    assert claims["C4 heads"] == "not decided"  # one seed


@pytest.mark.parametrize("name", list(STUDY.figures))
def test_figures_come_out_of_the_smoke_preset(smoke: Tables, name: str) -> None:
    import matplotlib.pyplot as plt

    drawing = STUDY.figures[name](smoke)
    assert len(drawing.data)
    assert drawing.caption.endswith(".")
    plt.close(drawing.figure)


def test_a_grid_of_one_norm_and_one_family_decides_and_draws() -> None:
    import matplotlib.pyplot as plt

    tables = run_all("seeds=1", "norm=batch", "family=vgg", "activation=tanh", "init=default", "growth_depth=2")
    assert len(STUDY.claims(tables)) == 31
    for name in ("sizes", "addition-and-concatenation", "auxiliary-heads", "activations"):
        plt.close(STUDY.figures[name](tables).figure)


def test_published_nets_are_followed_on_noise() -> None:
    cells = STUDY.plan(parse_settings(STUDY, "smoke", ["imagenet=ResNet-18", "imagenet_batch=2", "seeds=1"]))
    (cell,) = [cell for cell in cells if cell.part == "imagenet"]
    context = CellContext(device=torch.device("cpu"), data_dir=None, progress=lambda *_: None)
    trace = STUDY.run(cell, context).trace
    assert len(trace.layers) == 10
    assert (trace.layers["grad_norm"] > 0).all()


def test_nothing_finished_decides_nothing() -> None:
    assert {str(claim.verdict) for claim in STUDY.claims(Tables({}))} == {"not decided"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["size=16"], "'size' is 16, but task=digits has images of side 8, 4"),
        (["batch_size=2000"], "'batch_size' is 2000, but task=digits has 1,400"),
        (["profile_batch=1"], "'profile_batch' must be at least 2"),
        (["dropout=1"], "'dropout' is 1.0, but must be below 1"),
        (["narrow=0"], "'narrow' must be at least 1"),
        (["family=vggnet"], "Unknown family value 'vggnet'"),
        (["imagenet=ResNet-51"], "Unknown imagenet value 'ResNet-51'. Did you mean 'ResNet-50'"),
    ],
    ids=["size", "batch", "profile", "dropout", "narrow", "family", "imagenet"],
)
def test_bad_settings_are_one_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_settings(STUDY, "default", words)
    assert sentence in str(error.value)
