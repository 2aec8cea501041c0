"""Nets with parameters that should learn and never do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradlab.benchmarks.diagnosis.batches import images, sequences, tokens, vectors
from gradlab.benchmarks.diagnosis.blocks import chain, each_step, job
from gradlab.benchmarks.diagnosis.case import Batches, Case, Job
from gradlab.benchmarks.diagnosis.convnets import conv_chain
from gradlab.benchmarks.diagnosis.recurrents import Reader
from gradlab.benchmarks.diagnosis.transformers import Decoder

__all__ = ["CASES"]


def _left_out(model: nn.Module, batches: Batches, *prefixes: str, loss: Any = F.cross_entropy, lr: float = 0.02) -> Job:
    """Leave the parameters under some paths out of the optimizer."""
    params = [param for name, param in model.named_parameters() if not name.startswith(prefixes)]
    return Job(model=model, optimizer=torch.optim.SGD(params, lr=lr), batches=batches, loss=loss)


class _Detached(nn.Module):
    """The encoder's output is detached, or computed without autograd, though the encoder should learn."""

    def __init__(self, *, no_grad: bool) -> None:
        super().__init__()
        self.encoder, self.act, self.head = chain(3, outputs=24), nn.ReLU(), chain(2, inputs=24)
        self.no_grad = no_grad

    def forward(self, x: Tensor) -> Tensor:
        if self.no_grad:
            with torch.no_grad():
                code = self.encoder(x)
        else:
            code = self.encoder(x).detach()
        scores: Tensor = self.head(self.act(code))
        return scores


class _Unused(nn.Module):
    """A branch that the forward pass forgets, or computes and forgets to add."""

    def __init__(self, *, runs: bool) -> None:
        super().__init__()
        self.body, self.branch, self.runs = chain(4), nn.Linear(20, 5), runs

    def forward(self, x: Tensor) -> Tensor:
        if self.runs:
            self.branch(x)
        scores: Tensor = self.body(x)
        return scores


class _Rounded(nn.Module):
    """A code chosen by argmax: the encoder before it gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.codes, self.head = chain(2, outputs=8), nn.Embedding(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.codes(self.encoder(x).argmax(-1)))
        return scores


def _bf16_lost() -> Job:
    """Make updates of less than half a unit in the last place of every weight: rounding takes them all back."""
    model = chain(4)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.where(param.abs() < 0.02, 0.02, param))
    return job(model.to(torch.bfloat16), vectors(dtype=torch.bfloat16), lr=2e-6, optimizer="sgd")


def _group_without_rate() -> Job:
    model = conv_chain(5)
    early = [p for name, p in model.named_parameters() if name.startswith("conv1.")]
    late = [p for name, p in model.named_parameters() if not name.startswith("conv1.")]
    groups = [{"params": late, "lr": 0.02}, {"params": early, "lr": 0.0}]
    return Job(model=model, optimizer=torch.optim.SGD(groups, lr=0.02), batches=images(), loss=F.cross_entropy)


def _zeroed_late() -> Job:
    """Zero the gradients between the backward pass and the update."""
    run = job(chain(4), vectors(), optimizer="adam")
    return dataclasses.replace(run, before_update=lambda _: run.optimizer.zero_grad())


def _grown_later() -> Job:
    """Put a new head on after the optimizer was made."""
    run = job(chain(4), vectors(), lr=0.02)
    run.model.add_module("head", nn.Linear(48, 5))
    return run


def _case(name: str, family: str, why: str, build: Callable[[], Job], *places: str) -> Case:
    return Case(name=name, family=family, label="frozen", build=build, why=why, places=places)


CASES: tuple[Case, ...] = (
    _case(
        "frozen-left-out-layer",
        "mlp",
        "a layer is left out of the optimizer",
        lambda: _left_out(chain(5), vectors(), "linear3."),
        "linear3*",
    ),
    _case(
        "frozen-left-out-head",
        "conv",
        "the head is left out of the optimizer",
        lambda: _left_out(conv_chain(4), images(), "head."),
        "head*",
    ),
    _case(
        "frozen-left-out-recurrent",
        "recurrent",
        "the recurrent module is left out of the optimizer",
        lambda: _left_out(
            Reader(nn.GRU(4, 24, batch_first=True), "every"),
            sequences(length=12, every=True),
            "recurrent.",
            loss=each_step,
        ),
        "recurrent*",
    ),
    _case(
        "frozen-left-out-embedding",
        "transformer",
        "the embedding is left out of the optimizer",
        lambda: _left_out(Decoder(2), tokens(), "embedding.", loss=each_step),
        "embedding*",
    ),
    _case(
        "frozen-detached",
        "mlp",
        "the encoder's output is detached",
        lambda: job(_Detached(no_grad=False), vectors(), lr=0.02),
        "encoder*",
    ),
    _case(
        "frozen-no-grad",
        "mlp",
        "the encoder runs without autograd",
        lambda: job(_Detached(no_grad=True), vectors(), lr=0.02),
        "encoder*",
    ),
    _case(
        "frozen-unused-layer",
        "mlp",
        "a layer is never called",
        lambda: job(_Unused(runs=False), vectors(), lr=0.02),
        "branch*",
    ),
    _case(
        "frozen-unused-output",
        "mlp",
        "a layer's output is never used",
        lambda: job(_Unused(runs=True), vectors(), lr=0.02),
        "branch*",
    ),
    _case(
        "frozen-argmax",
        "embedding",
        "argmax lets no gradient through",
        lambda: job(_Rounded(), vectors(), lr=0.05),
        "encoder*",
    ),
    _case("frozen-rate-0", "mlp", "the learning rate is 0", lambda: job(chain(5), vectors(), lr=0.0)),
    _case("frozen-group-rate-0", "conv", "one group's learning rate is 0", _group_without_rate, "conv1*"),
    _case("frozen-bf16-rounding", "mlp", "bfloat16 rounds every update away", _bf16_lost),
    _case("frozen-zeroed-before-step", "mlp", "gradients are zeroed before the update", _zeroed_late),
    _case("frozen-head-after-optimizer", "mlp", "a head put on after the optimizer was made", _grown_later, "head*"),
)
