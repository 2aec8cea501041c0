"""The experiment clipping, run in this process on its smoke preset, and its figure."""

import importlib

import matplotlib as mpl
import pandas as pd
import pytest
import torch

from gradlab.errors import DataError
from gradlab.study import CellContext, parse_settings

mpl.use("agg")
STUDY = importlib.import_module("gradlab.experiments.clipping").STUDY


class Tables:
    """What a run would read back."""

    settings, preset = {}, "smoke"

    def __init__(self, *words, parts=("surface", "descent")):
        context = CellContext(device=torch.device("cpu"), data_dir=None, progress=lambda *_: None)
        self._frames = {}
        for cell in STUDY.plan(parse_settings(STUDY, "smoke", words)):
            if cell.part in parts:
                (name, frame), *_ = STUDY.run(cell, context).tables.items()
                self._frames.setdefault(name, []).append(frame.assign(**cell.settings))

    def table(self, name, part=None):
        return pd.concat(self._frames[name], ignore_index=True) if name in self._frames else pd.DataFrame()


@pytest.mark.parametrize(
    ("words", "panels"),
    [((), 2), (("clip=0",), 1), (("clip=0.5,2", "starts=3"), 2)],
    ids=["smoke", "free-only", "clipped-only"],
)
def test_claims_and_the_figure_come_out_of_any_grid(words, panels):
    import matplotlib.pyplot as plt

    tables = Tables(*words)
    assert len({claim.id for claim in STUDY.claims(tables)}) == 4
    drawing = STUDY.figures["cliff"](tables)
    titles = [ax.get_title() for ax in drawing.figure.axes if ax.get_title()]
    assert len(titles) == panels
    paths = [line for line in drawing.figure.axes[0].get_lines() if str(line.get_gid()).startswith("path")]
    starts = tables.table("descent")["start"].nunique()
    assert len(paths) == min(5, starts)
    assert f"{starts} starts" in drawing.caption
    plt.close(drawing.figure)


def test_a_missing_part_is_one_sentence_and_not_decided():
    tables = Tables(parts=("surface",))
    with pytest.raises(DataError, match="gradient descent"):
        STUDY.figures["cliff"](tables)
    assert [str(claim.verdict) for claim in STUDY.claims(tables)][1:] == ["not decided"] * 3
