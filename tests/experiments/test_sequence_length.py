"""The experiment sequence-length, run in this process on its smoke preset, and its figures."""

import importlib

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch

from gradlab.errors import UsageError
from gradlab.study import CellContext, parse_settings

mpl.use("agg")
STUDY = importlib.import_module("gradlab.experiments.sequence_length").STUDY


class Tables:
    """What a run would read back."""

    preset = "smoke"

    def __init__(self, *words):
        settings = parse_settings(STUDY, "smoke", words)
        self.settings = {"hidden": settings.hidden, "input_std": settings.input_std}
        context = CellContext(device=torch.device("cpu"), data_dir=None, progress=lambda *_: None)
        self._frames = {}
        for cell in STUDY.plan(settings):
            for name, frame in STUDY.run(cell, context).tables.items():
                self._frames.setdefault((name, cell.part), []).append(frame.assign(**cell.settings))

    def table(self, name, part):
        frames = self._frames.get((name, part))
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


@pytest.mark.parametrize(
    "words", [(), ("net=lstm default", "seeds=1"), ("net=tanh 1,tanh 2",)], ids=["smoke", "gated-only", "vanilla-only"]
)
def test_claims_and_figures_come_out_of_any_grid(words):
    import matplotlib.pyplot as plt

    tables = Tables(*words)
    claims = STUDY.claims(tables)
    assert len({claim.id for claim in claims}) == len(claims)
    for name, draw in STUDY.figures.items():
        drawing = draw(tables)
        if name == "gradient-against-lag":
            nets = tables.table("lags", "net")["net"].unique()
            theory = [line for ax in drawing.figure.axes for line in ax.get_lines() if "theory" in str(line.get_gid())]
            assert len(theory) == len(nets)
            slopes = tables.table("rates", "net").groupby("net")["exponent"].mean() / np.log(10)
            for line in theory:
                x, y = line.get_data()
                assert y[-1] / x[-1] == pytest.approx(slopes[line.get_gid().removeprefix("theory ")])
            attention = tables.table("attention", "attention")
            wide = attention.pivot_table(index="lag", columns="seed", values="log_norm")
            drawn = drawing.data[drawing.data["net"] == "attention"].set_index("lag")["mean"]
            expected = ((wide - wide.loc[1]) / np.log(10)).mean(axis=1).drop(0)
            pd.testing.assert_series_equal(drawn, expected, check_names=False)
            assert "attention layer (relative to lag 1)" in drawing.caption
        plt.close(drawing.figure)


@pytest.mark.parametrize("net", ["elu 1", "tanh", "tanh -1", "lstm peephole", "gpt"], ids=str)
def test_unknown_nets_are_one_sentence_before_anything_runs(net):
    with pytest.raises(UsageError, match="Unknown net"):
        parse_settings(STUDY, "smoke", [f"net={net}"])


def test_every_cell_is_its_own():
    cells = STUDY.plan(parse_settings(STUDY, "default"))
    assert len({cell.key for cell in cells}) == len(cells)
