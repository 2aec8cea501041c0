"""Nets in which NaN or Inf appears, forward or backward, at once or later."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradlab.benchmarks.diagnosis.batches import images, regression, sequences, tokens, vectors
from gradlab.benchmarks.diagnosis.blocks import chain, job
from gradlab.benchmarks.diagnosis.case import Batches, Case, Job
from gradlab.benchmarks.diagnosis.convnets import ResidualConv, conv_chain
from gradlab.benchmarks.diagnosis.recurrents import Reader
from gradlab.benchmarks.diagnosis.transformers import Attention

__all__ = ["CASES"]


def _spoilt(batches: Batches, step: int, value: float) -> Batches:
    """Put one value that is not finite into the batch of a step."""

    def draw(number: int) -> tuple[tuple[Any, ...], Tensor]:
        (x,), target = batches(number)
        if number == step:
            x = x.clone()
            x.view(-1)[3] = value
        return (x,), target

    return draw


def _log_of_zero(from_step: int) -> Job:
    """Take the logarithm of a probability that was clamped to zero, from some step on."""
    now = -1

    def loss(scores: Tensor, target: Tensor) -> Tensor:
        share = scores.softmax(-1).gather(1, target[:, None])
        if now >= from_step:
            share = torch.where(share < share.max(), torch.zeros_like(share), share)
        return -share.log().mean()

    def before(step: int) -> None:
        nonlocal now
        now = step

    return dataclasses.replace(job(chain(4), vectors(), loss), before_step=before)


class _Distance(nn.Module):
    """The distance of an embedding to itself for one sample: the derivative of the square root at 0 is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain(3, outputs=8)

    def forward(self, x: Tensor) -> Tensor:
        code = self.body(x)
        distance: Tensor = (code - code[:1]).square().sum(-1).sqrt()
        return distance


class _Guarded(nn.Module):
    """log(x) where x > 0, else 0: the branch that is not taken puts 0 times infinity into the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = chain(3, outputs=16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        code = self.body(x).abs() * (torch.arange(16) % 4 > 0)
        scores: Tensor = self.head(torch.where(code > 0, code.log(), torch.zeros_like(code)))
        return scores


class _Standardized(nn.Module):
    """Features divided by their standard deviation over the batch, one of which is constant."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain(3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :-1], torch.ones_like(x[:, -1:])], 1)
        scores: Tensor = self.body((x - x.mean(0)) / x.std(0))
        return scores


class _Exponential(nn.Module):
    """A variance given as exp of a layer that is far too large."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain(3, outputs=3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = torch.exp(200 * self.body(x))
        return scores


class _AllMasked(nn.Module):
    """Attention whose first place may look at nothing: the softmax of -inf everywhere is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.attention, self.head = nn.Embedding(30, 16), Attention(16, ahead=0), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.attention(self.embedding(x)).mean(1))
        return scores


def _overflow() -> Job:
    return job(chain(4).half(), vectors(scale=2e4, dtype=torch.float16), lr=1e-3)


def _all_skipped() -> Job:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return job(chain(4), vectors(scale=1e5), lr=1e-3, scaler=scaler, autocast=torch.float16)


def _nan_weight() -> Job:
    model = conv_chain(4)
    with torch.no_grad():
        cast(Tensor, model.get_submodule("conv3").weight).view(-1)[0] = math.nan
    return job(model, images())


def _nan_update(step: int) -> Job:
    """Let one gradient become NaN after the backward pass: a faulty gradient hook or collective."""
    model = chain(4)

    def before(now: int) -> None:
        if now == step:
            cast(Tensor, cast(nn.Linear, model.get_submodule("linear3")).weight.grad)[0, 0] = math.nan

    return dataclasses.replace(job(model, vectors()), before_update=before)


def _case(name: str, family: str, why: str, build: Callable[[], Job], *places: str) -> Case:
    return Case(name=name, family=family, label="nonfinite", build=build, why=why, places=places)


_SERIES = partial(sequences, length=12)

CASES: tuple[Case, ...] = (
    _case("nonfinite-log-of-zero", "mlp", "log(0) in the loss", partial(_log_of_zero, 0)),
    _case(
        "nonfinite-log-of-zero-later", "mlp", "log(0) in the loss from the seventh step on", partial(_log_of_zero, 6)
    ),
    _case(
        "nonfinite-input",
        "mlp",
        "NaN in the first batch",
        lambda: job(chain(5), _spoilt(vectors(), 0, math.nan)),
        "linear1",
    ),
    _case(
        "nonfinite-input-later",
        "norm",
        "Inf in the fifth batch",
        lambda: job(chain(4, norm="batch"), _spoilt(vectors(), 4, math.inf)),
        "linear1",
    ),
    _case(
        "nonfinite-image-later",
        "residual",
        "NaN in the fourth batch",
        lambda: job(ResidualConv(3), _spoilt(images(), 3, math.nan), steps=8),
        "stem",
    ),
    _case(
        "nonfinite-sequence",
        "recurrent",
        "NaN in the third batch",
        lambda: job(Reader(nn.LSTM(4, 24, batch_first=True)), _spoilt(_SERIES(), 2, math.nan), steps=6),
        "recurrent*",
    ),
    _case("nonfinite-fp16-overflow", "mlp", "activations beyond 65504", _overflow),
    _case(
        "nonfinite-all-steps-skipped",
        "mlp",
        "activations beyond 65504 under AMP: the scaler skips every step",
        _all_skipped,
    ),
    _case(
        "nonfinite-sqrt-backward",
        "mlp",
        "the square root's derivative at 0: only the backward pass",
        lambda: job(_Distance(), vectors(), lambda d, _: d.mean()),
        "body*",
    ),
    _case(
        "nonfinite-where-backward",
        "mlp",
        "0 times Inf from the branch of where() not taken",
        lambda: job(_Guarded(), vectors()),
        "body*",
    ),
    _case(
        "nonfinite-constant-feature",
        "mlp",
        "0/0 of a feature without spread",
        lambda: job(_Standardized(), vectors()),
        "body.linear1",
    ),
    _case("nonfinite-exp", "mlp", "exp overflows", lambda: job(_Exponential(), regression(), F.mse_loss)),
    _case(
        "nonfinite-all-masked",
        "transformer",
        "a row of attention masked whole",
        lambda: job(_AllMasked(), tokens(8, 12, 30, 3)),
        "attention*",
    ),
    _case("nonfinite-weight", "conv", "a weight is NaN", _nan_weight, "conv3"),
    _case(
        "nonfinite-gradient-alone", "mlp", "one gradient becomes NaN after the backward pass", partial(_nan_update, 5)
    ),
)
