"""Numbers that are not finite, and parameters that never learn, in nets of several families."""

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
from gradlab.benchmarks.diagnosis.blocks import chain, each_step, job
from gradlab.benchmarks.diagnosis.case import Batches, Case, Job
from gradlab.benchmarks.diagnosis.convnets import ResidualConv, conv_chain
from gradlab.benchmarks.diagnosis.recurrents import Reader
from gradlab.benchmarks.diagnosis.transformers import Attention, Decoder

__all__ = ["CASES"]


# -- not finite --------------------------------------------------------------------------------------------------------


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


# -- frozen ------------------------------------------------------------------------------------------------------------


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


def _case(name: str, family: str, label: Any, why: str, build: Callable[[], Job], *places: str) -> Case:
    return Case(name=name, family=family, label=label, build=build, why=why, places=places)


_SERIES = partial(sequences, length=12)

CASES: tuple[Case, ...] = (
    _case("nonfinite-log-of-zero", "mlp", "nonfinite", "log(0) in the loss", partial(_log_of_zero, 0)),
    _case("nonfinite-log-of-zero-later", "mlp", "nonfinite", "log(0) in the loss from the seventh step on", partial(_log_of_zero, 6)),
    _case("nonfinite-input", "mlp", "nonfinite", "NaN in the first batch", lambda: job(chain(5), _spoilt(vectors(), 0, math.nan)), "linear1"),
    _case("nonfinite-input-later", "norm", "nonfinite", "Inf in the fifth batch", lambda: job(chain(4, norm="batch"), _spoilt(vectors(), 4, math.inf)), "linear1"),
    _case("nonfinite-image-later", "residual", "nonfinite", "NaN in the fourth batch", lambda: job(ResidualConv(3), _spoilt(images(), 3, math.nan), steps=8), "stem"),
    _case("nonfinite-sequence", "recurrent", "nonfinite", "NaN in the third batch", lambda: job(Reader(nn.LSTM(4, 24, batch_first=True)), _spoilt(_SERIES(), 2, math.nan), steps=6), "recurrent*"),
    _case("nonfinite-fp16-overflow", "mlp", "nonfinite", "activations beyond 65504", _overflow),
    _case("nonfinite-all-steps-skipped", "mlp", "nonfinite", "activations beyond 65504 under AMP: the scaler skips every step", _all_skipped),
    _case("nonfinite-sqrt-backward", "mlp", "nonfinite", "the square root's derivative at 0: only the backward pass", lambda: job(_Distance(), vectors(), lambda d, _: d.mean()), "body*"),
    _case("nonfinite-where-backward", "mlp", "nonfinite", "0 times Inf from the branch of where() not taken", lambda: job(_Guarded(), vectors()), "body*"),
    _case("nonfinite-constant-feature", "mlp", "nonfinite", "0/0 of a feature without spread", lambda: job(_Standardized(), vectors()), "body.linear1"),
    _case("nonfinite-exp", "mlp", "nonfinite", "exp overflows", lambda: job(_Exponential(), regression(), F.mse_loss)),
    _case("nonfinite-all-masked", "transformer", "nonfinite", "a row of attention masked whole", lambda: job(_AllMasked(), tokens(8, 12, 30, 3)), "attention*"),
    _case("nonfinite-weight", "conv", "nonfinite", "a weight is NaN", _nan_weight, "conv3"),
    _case("nonfinite-gradient-alone", "mlp", "nonfinite", "one gradient becomes NaN after the backward pass", partial(_nan_update, 5)),
    _case("frozen-left-out-layer", "mlp", "frozen", "a layer is left out of the optimizer", lambda: _left_out(chain(5), vectors(), "linear3."), "linear3*"),
    _case("frozen-left-out-head", "conv", "frozen", "the head is left out of the optimizer", lambda: _left_out(conv_chain(4), images(), "head."), "head*"),
    _case("frozen-left-out-recurrent", "recurrent", "frozen", "the recurrent module is left out of the optimizer", lambda: _left_out(Reader(nn.GRU(4, 24, batch_first=True), "every"), sequences(length=12, every=True), "recurrent.", loss=each_step), "recurrent*"),
    _case("frozen-left-out-embedding", "transformer", "frozen", "the embedding is left out of the optimizer", lambda: _left_out(Decoder(2), tokens(), "embedding.", loss=each_step), "embedding*"),
    _case("frozen-detached", "mlp", "frozen", "the encoder's output is detached", lambda: job(_Detached(no_grad=False), vectors(), lr=0.02), "encoder*"),
    _case("frozen-no-grad", "mlp", "frozen", "the encoder runs without autograd", lambda: job(_Detached(no_grad=True), vectors(), lr=0.02), "encoder*"),
    _case("frozen-unused-layer", "mlp", "frozen", "a layer is never called", lambda: job(_Unused(runs=False), vectors(), lr=0.02), "branch*"),
    _case("frozen-unused-output", "mlp", "frozen", "a layer's output is never used", lambda: job(_Unused(runs=True), vectors(), lr=0.02), "branch*"),
    _case("frozen-argmax", "embedding", "frozen", "argmax lets no gradient through", lambda: job(_Rounded(), vectors(), lr=0.05), "encoder*"),
    _case("frozen-rate-0", "mlp", "frozen", "the learning rate is 0", lambda: job(chain(5), vectors(), lr=0.0)),
    _case("frozen-group-rate-0", "conv", "frozen", "one group's learning rate is 0", _group_without_rate, "conv1*"),
    _case("frozen-bf16-rounding", "mlp", "frozen", "bfloat16 rounds every update away", _bf16_lost),
    _case("frozen-zeroed-before-step", "mlp", "frozen", "gradients are zeroed before the update", _zeroed_late),
    _case("frozen-head-after-optimizer", "mlp", "frozen", "a head put on after the optimizer was made", _grown_later, "head*"),
)  # fmt: skip
