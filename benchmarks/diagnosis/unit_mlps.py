"""MLPs whose units are dead or saturated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradlab.benchmarks.diagnosis.batches import regression, vectors
from gradlab.benchmarks.diagnosis.blocks import chain, job
from gradlab.benchmarks.diagnosis.case import Case, Job, train_step
from gradlab.benchmarks.diagnosis.mlps import chain_case

__all__ = ["CASES"]


def _shift_bias(shifts: dict[str, float], share: float = 1.0) -> Callable[[nn.Sequential], None]:
    """Return a change that adds a constant to the first `share` of some layers' biases."""

    def change(net: nn.Sequential) -> None:
        for name, shift in shifts.items():
            bias = cast(nn.Linear, net.get_submodule(name)).bias
            with torch.no_grad():
                bias[: round(share * len(bias))] += shift

    return change


def _scale(factors: dict[str, float]) -> Callable[[nn.Sequential], None]:
    def change(net: nn.Sequential) -> None:
        for name, factor in factors.items():
            with torch.no_grad():
                cast(nn.Linear, net.get_submodule(name)).weight.mul_(factor)

    return change


def _one_huge_step(recorded: bool) -> Job:
    """Take one step with a huge learning rate, before the recording or as its second: the outputs, ReLUs, all die."""
    model = chain(3, outputs=3)
    model.add_module("end", nn.ReLU())
    nn.init.constant_(cast(nn.Linear, model.get_submodule("head")).bias, 4.0)

    def draw(number: int) -> tuple[tuple[Tensor, ...], Tensor]:
        inputs, target = regression()(number)
        return inputs, target.abs()

    run = job(model, draw, F.mse_loss, steps=20)
    rate = run.optimizer.param_groups[0]

    def before(step: int) -> None:
        rate["lr"] = 5.0 if recorded and step == 1 else 0.01

    if not recorded:
        rate["lr"] = 5.0
        train_step(run, 0)
    return dataclasses.replace(run, before_step=before)


CASES: tuple[Case, ...] = (
    # dead
    chain_case(
        "mlp-dead-bias-one-layer",
        "dead",
        "a bias of -12 in the third layer",
        5,
        change=_shift_bias({"linear3": -12}),
        places=("act3",),
        cuts=False,
    ),
    chain_case(
        "mlp-dead-bias-most-units",
        "dead",
        "nine in ten units have a bias of -12",
        5,
        {"width": 60},
        change=_shift_bias({"linear2": -12}, 0.9),
        places=("act2",),
        cuts=False,
        lr=3e-3,
    ),
    chain_case(
        "mlp-dead-bias-all-layers",
        "dead",
        "a bias of -8 in nine of ten units everywhere",
        4,
        {"width": 60},
        change=_shift_bias({f"linear{k}": -15 for k in (1, 2, 3, 4)}, 0.9),
        places=("act*",),
        cuts=False,
        lr=3e-3,
    ),
    chain_case(
        "mlp-dead-first-layer",
        "dead",
        "a bias of -15 in the first layer",
        4,
        change=_shift_bias({"linear1": -15}, 0.95),
        places=("act1",),
        cuts=False,
        lr=3e-3,
    ),
    chain_case(
        "mlp-dead-batchnorm",
        "dead",
        "BatchNorm's beta is -8",
        4,
        {"norm": "batch"},
        change=_shift_bias({"norm2": -8}, 0.95),
        places=("act2",),
        cuts=False,
        family="norm",
        lr=3e-3,
    ),
    Case(
        name="mlp-dead-huge-step-before",
        family="mlp",
        label="dead",
        build=partial(_one_huge_step, False),
        why="one step with a huge learning rate, before the recording",
        places=("end",),
    ),
    Case(
        name="mlp-dead-huge-step",
        family="mlp",
        label="dead",
        build=partial(_one_huge_step, True),
        why="one step with a huge learning rate: from then on no output is active",
        places=("end",),
    ),
    # saturated
    chain_case(
        "mlp-saturated-tanh",
        "saturated",
        "weights thirty times Xavier's",
        3,
        {"activation": "tanh", "init": "xavier"},
        change=_scale({"linear1": 30, "linear2": 30, "linear3": 30}),
        places=("act*",),
        cuts=False,
        lr=1e-3,
    ),
    chain_case(
        "mlp-saturated-tanh-inputs",
        "saturated",
        "inputs of a thousand, never scaled",
        2,
        {"activation": "tanh", "init": "xavier"},
        batches=partial(vectors, scale=1000.0),
        places=("act1",),
        cuts=False,
        lr=1e-3,
    ),
    chain_case(
        "mlp-saturated-sigmoid",
        "saturated",
        "weights a hundred times Xavier's",
        2,
        {"activation": "sigmoid", "init": "xavier"},
        change=_scale({"linear1": 100, "linear2": 100}),
        places=("act*",),
        cuts=False,
        lr=1e-3,
    ),
    chain_case(
        "mlp-saturated-sigmoid-bias",
        "saturated",
        "a bias of 12",
        2,
        {"activation": "sigmoid", "init": "xavier"},
        change=_shift_bias({"linear2": 12}),
        places=("act2",),
        cuts=False,
    ),
    chain_case(
        "mlp-saturated-hardtanh",
        "saturated",
        "weights thirty times Xavier's",
        3,
        {"activation": "hardtanh", "init": "xavier"},
        change=_scale({"linear1": 30, "linear2": 30, "linear3": 30}),
        places=("act*",),
        cuts=False,
        lr=1e-3,
    ),
    chain_case(
        "mlp-saturated-middle",
        "saturated",
        "one layer of large weights among healthy ones",
        4,
        {"activation": "tanh", "init": "xavier"},
        change=_scale({"linear3": 40}),
        places=("act3",),
        cuts=False,
        lr=1e-3,
    ),
)
