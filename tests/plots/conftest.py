from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

mpl.use("agg")

PROFILED = (
    "plain, BatchNorm",
    "plain, He",
    "plain, torch default",
    "residual, BatchNorm",
    "residual, He",
    "residual, SkipInit",
)
STEPS = (0, 1, 5)


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def net_rows(net: str, depth: int, seed: int, *, rate: float, norm: bool = True) -> pd.DataFrame:
    """Rows of trace.layers of one step whose gradient norms are known: rate**(blocks left) * 1.1**seed at a block."""
    blocks = (depth - 2) // 2
    per_stage = blocks // 3
    residual = net.startswith("residual")
    layers, kinds, grads, stds = [], [], [], []

    def add(layer: str, kind: str, grad: float, std: float = 1.0) -> None:
        layers.append(layer)
        kinds.append(kind)
        grads.append(grad * 1.1**seed)
        stds.append(std)

    if norm:
        add("stem.norm", "BatchNorm2d", 1.0, 2.0 + seed)
    add("stem.relu", "ReLU", rate**blocks)
    for block in range(blocks):
        name = f"stages.{block // per_stage}.{block % per_stage}"
        into = rate ** (blocks - block)
        share = 1 / (block + 2)
        if residual:
            add(f"{name}.to_branch", "Fork", into * share**0.5)
        if norm:
            add(f"{name}.branch.norm1", "BatchNorm2d", 1.0, 1.5)
            add(f"{name}.branch.norm2", "BatchNorm2d", 1.0, 0.5 if residual else 1.0)
        if residual:
            add(f"{name}.to_skip", "Fork", into * (1 - share) ** 0.5)
        add(f"{name}.activation", "ReLU", rate ** (blocks - block - 1))
    frame = pd.DataFrame({"layer": layers, "kind": kinds, "grad_norm": grads, "act_std": stds})
    return frame.assign(step=0, order=range(len(frame)), net=net, depth=depth, seed=seed)


def make_tables(**about: Any) -> dict[tuple[str, str], pd.DataFrame]:
    """The tables of a small run, by name and part, with known numbers; made once, so the copies may be changed."""
    return {key: frame.copy() for key, frame in _tables(**about).items()}


@lru_cache
def _tables(
    *, depths: tuple[int, ...] = (8, 14), seeds: int = 3, nets: tuple[str, ...] = ("plain", "residual")
) -> dict[tuple[str, str], pd.DataFrame]:
    profile = [
        net_rows(net, depth, seed, rate=1.5, norm=False).assign(cell=f"p{depth}{seed}", status="done")
        for net, depth, seed in itertools.product(PROFILED, depths, range(seeds))
        if net.startswith(nets)
    ]
    layers, losses, gains = [], [], []
    for net, norm, depth, seed in itertools.product(nets, ("batch", "none"), depths, range(seeds)):
        about = {"net": net, "norm": norm, "depth": depth, "seed": seed, "cell": f"{net}{norm}{depth}{seed}"}
        bad = (net, norm, seed) == ("residual", "none", 0)
        about["status"] = "diverged" if bad else "done"
        for step in STEPS:
            rows = net_rows(net, depth, seed, rate=2.0 if step == 0 else 1.2, norm=norm == "batch")
            layers.append(rows.assign(**about).assign(step=step))
            if norm == "batch":
                names = rows.loc[rows["kind"] == "BatchNorm2d", "layer"]
                gains.append(pd.DataFrame({"layer": names, "grad_gain": 3.0 * 2.0**seed}).assign(step=step, **about))
        loss = np.array([2.0, 1.0, np.nan if bad else 0.5]) * 10.0**seed
        losses.append(pd.DataFrame({"step": range(3), "loss": loss}).assign(**about))

    def join(frames: list[pd.DataFrame]) -> pd.DataFrame:
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    return {
        ("layers", "profile"): join(profile),
        ("layers", "train"): join(layers),
        ("losses", "train"): join(losses),
        ("batchnorm", "train"): join(gains),
    }


def reader(tables: dict[tuple[str, str], pd.DataFrame]) -> Callable[..., pd.DataFrame]:
    return lambda name, part=None: tables.get((name, part), pd.DataFrame())


@pytest.fixture
def make() -> Callable[..., dict[tuple[str, str], pd.DataFrame]]:
    return make_tables


@pytest.fixture
def read() -> Callable[..., Callable[..., pd.DataFrame]]:
    return reader


@pytest.fixture
def rows() -> Callable[..., pd.DataFrame]:
    return net_rows
