"""Runs and traces whose pages the tests look at, with markup in every string that a user can choose."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gradlab.analysis.claims import Claim, Verdict
from gradlab.errors import DataError
from gradlab.report import write_diagnosis, write_report
from gradlab.study import Cell, CellContext, CellResult, Drawing, Preset, Results, Study, setting
from gradlab.sweep.store import Run, create_run, save_cell
from gradlab.trace import Trace

EVIL = "</script><script>window.evil=1</script><img src=x onerror='window.evil=1'>&amp;"


class Page(HTMLParser):
    """Start tags with their attributes, headings with their text, and all text outside scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.source = "", path.read_text(encoding="utf-8")
        self._open: list[str] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if not self._open:
            self.text += data


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    depth: tuple[int, ...] = setting((4, 8), "layers", least=1)
    note: str = setting("", "any <b>text</b>")
    lr: float = setting(0.1, "learning rate", least=0)


def plan(settings: Settings) -> list[Cell]:
    return [
        Cell(part="train", label=f"depth {depth} {EVIL}", settings={"depth": depth, "seed": seed})
        for depth in settings.depth
        for seed in (0, 1)
    ]


def run_cell(cell: Cell, context: CellContext) -> CellResult:
    raise NotImplementedError


def make_claim(name: str, verdict: Verdict, measured: float) -> Claim:
    return Claim(
        id=name, statement=f"Claim {name} {EVIL}", source=EVIL, rule=f"(E) {EVIL}", expected=EVIL, measured=measured,
        low=measured - 1, high=measured + 1, unit=EVIL, p_value=math.nan, n=2, verdict=verdict, detail=EVIL,
    )  # fmt: skip


def claims(results: Results) -> list[Claim]:
    losses = results.table("steps", "train")["loss"]
    return [
        make_claim("C10", Verdict.REPRODUCED, 9.0),
        make_claim("C2", Verdict.NOT_REPRODUCED, float(losses.max()) + 100),
        make_claim("C1", Verdict.NOT_DECIDED, math.nan),
    ]


def losses(results: Results) -> Drawing:
    import matplotlib.pyplot as plt

    data = results.table("steps", "train")[["step", "loss"]].assign(name=EVIL)
    figure, axes = plt.subplots()
    axes.plot(data["step"], data["loss"], label=EVIL)
    axes.set_title(EVIL)
    return Drawing(figure=figure, data=data, caption=f"Losses {EVIL}")


def never(results: Results) -> Drawing:
    raise DataError("It needs a longer run.")


STUDY = Study(
    name="deep", title=f"A title {EVIL}", question=f"What is asked {EVIL}?", notes=(), settings=Settings,
    presets={"smoke": Preset(summary="", settings={"lr": 0.5}), "default": Preset(summary="")}, plan=plan,
    run=run_cell, claims=claims, figures={"losses": losses},
)  # fmt: skip


def layer_table(depth: int, steps: int, gain: float = 0.5) -> pd.DataFrame:
    """Gradient norms of a deep linear net with weights gain times orthogonal: gain^(depth - 1 - layer)."""
    layer, step = (part.ravel() for part in np.meshgrid(np.arange(depth), np.arange(steps), indexing="ij"))
    return pd.DataFrame({
        "step": step, "layer": [f"layers.{k}" for k in layer], "order": layer, "kind": "Linear", "entries": 1,
        "grad_norm": gain ** (depth - 1.0 - layer),
    })  # fmt: skip


def stored_run(out: Path, *, finished: int = 4, **changes: Any) -> Run:
    settings: dict[str, Any] = {"depth": [4, 8], "note": EVIL, "lr": 0.1} | changes
    cells = plan(Settings())
    manifest = {"preset": "default", "settings": settings, "device": "cpu", "environment": {"python": EVIL}}
    run = create_run(out, "deep", manifest, cells)
    for cell in cells[:finished]:
        depth, seed = cell.settings["depth"], cell.settings["seed"]
        steps = pd.DataFrame({"step": range(5), "loss": [3.0 / (k + 1) + seed for k in range(5)]})
        trace = Trace({"steps": steps, "layers": layer_table(depth, 5)})
        save_cell(run.folder, cell, CellResult(trace=trace, message=EVIL), {})
    return Run(run.folder)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    return partial(stored_run, tmp_path / "runs")


@pytest.fixture(scope="session")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return write_report([stored_run(folder)], folder / "run.html", studies={"deep": STUDY})


@pytest.fixture(scope="session")
def diagnosis(tmp_path_factory: pytest.TempPathFactory, sick_trace: Trace) -> Path:
    return write_diagnosis(sick_trace, tmp_path_factory.mktemp("diagnosis") / "diagnosis.html")


@pytest.fixture
def study() -> Study:
    return STUDY


@pytest.fixture
def evil() -> str:
    return EVIL


@pytest.fixture
def read() -> type[Page]:
    return Page


@pytest.fixture
def linear_net() -> Callable[..., pd.DataFrame]:
    return layer_table


@pytest.fixture(scope="session")
def sick_trace() -> Trace:
    """Return a net of 20 layers in which the gradient halves four times a layer, every name with markup."""
    layers = layer_table(20, 6, gain=0.06)
    named = layers.assign(layer=[f"{name}.{EVIL}" for name in layers["layer"]])
    steps = pd.DataFrame({"step": range(6), "loss": np.linspace(2, 1, 6)})
    times = pd.DataFrame({
        "step": np.repeat([0, 5], 10), "layer": EVIL, "direction": "forward", "state": "h", "t": [*range(10)] * 2,
        "grad_norm": 1.0, "log10_grad_norm": 0.0,
    })  # fmt: skip
    info = {"model": EVIL, "notes": [EVIL], "not_seen": {EVIL: EVIL}}
    return Trace({"layers": named, "steps": steps, "timesteps": times}, info)


@pytest.fixture
def partly(study: Study) -> Study:
    """Return the study with a figure that lacks data and one that breaks on these tables."""

    def broken(results: Results) -> Drawing:
        raise KeyError("column")

    return replace(study, figures={"losses": losses, "never": never, "broken": broken})
