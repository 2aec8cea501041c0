"""The experiment cell-state, run in this process on its smoke preset."""

import importlib

import pandas as pd
import pytest
import torch

from gradlab.study import CellContext, parse_settings

STUDY = importlib.import_module("gradlab.experiments.cell_state").STUDY


class Tables:
    """What a run would read back."""

    def __init__(self, settings, frames):
        self.settings, self.preset, self._frames = settings, "smoke", frames

    def table(self, name, part=None):
        return pd.concat(self._frames[name], ignore_index=True) if self._frames.get(name) else pd.DataFrame()


def run_all(*words):
    settings = parse_settings(STUDY, "smoke", words)
    frames = {}
    for cell in STUDY.plan(settings):
        torch.manual_seed(cell.settings["seed"])
        context = CellContext(device=torch.device("cpu"), data_dir=None, progress=lambda *_: None)
        for name, frame in STUDY.run(cell, context).tables.items():
            frames.setdefault(name, []).append(frame.assign(**cell.settings))
    return Tables({}, frames)


def test_every_cell_is_its_own():
    cells = STUDY.plan(parse_settings(STUDY, "default"))
    assert len({cell.key for cell in cells}) == len(cells) == 2 * 6 * 5


@pytest.mark.parametrize(
    "words",
    [(), ("net=gru",), ("bias=", "chrono="), ("seeds=1",), ("steps=120",)],
    ids=["smoke", "gru-only", "default-init-only", "one-seed", "120-steps"],
)
def test_claims_and_figures_come_out_of_any_grid(words):
    import matplotlib.pyplot as plt

    tables = run_all(*words)
    claims = STUDY.claims(tables)
    assert len({claim.id for claim in claims}) == len(claims) == 11
    for draw in STUDY.figures.values():
        drawing = draw(tables)
        assert len(drawing.data)
        plt.close(drawing.figure)


def test_nothing_finished_decides_nothing():
    assert {str(claim.verdict) for claim in STUDY.claims(Tables({}, {}))} == {"not decided"}
