"""Embedding nets, low-rank adapters, and mixtures of convolution and recurrence."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradlab.benchmarks.diagnosis.batches import images, sequences, tokens, vectors
from gradlab.benchmarks.diagnosis.blocks import chain, each_step, initialize, net_case
from gradlab.benchmarks.diagnosis.case import Case, Job
from gradlab.benchmarks.diagnosis.recurrents import Reader, recurrent_matrix
from gradlab.benchmarks.diagnosis.transformers import Decoder

__all__ = ["CASES"]


class _Adapter(nn.Module):
    """W x + B A x with W frozen and B zero at first, so that A gets no gradient in the first step."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y


def _adapted(model: nn.Module) -> nn.Module:
    """Put an adapter on each linear layer and freeze all else."""
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _Adapter(module))
    return model


class _Bag(nn.Module):
    """Mean of embeddings, and a classifier."""

    def __init__(self, words: int, *, sparse: bool) -> None:
        super().__init__()
        self.embedding, self.body = nn.EmbeddingBag(words, 16, sparse=sparse), chain(2, 24, inputs=16, outputs=3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.body(self.embedding(x))
        return scores


class _Factors(nn.Module):
    """Matrix factorization: the product of two embeddings' rows."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(300, 8), nn.Embedding(300, 8)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = (self.user(x[:, 0]) * self.item(x[:, 1])).sum(-1)
        return scores


def _ratings(number: int) -> tuple[tuple[Tensor], Tensor]:
    (x,), _ = tokens(32, 2, 300)(number)
    return (x,), torch.sin(x.sum(-1).float())


class _ConvThenRecurrent(nn.Module):
    """Convolutions over time, then a recurrent reader."""

    def __init__(self, reader: Reader, features: int = 4) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv1d(features, 8, 3, padding=1), nn.ReLU()
        self.reader = reader

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.reader(self.act(self.conv(x.transpose(1, 2))).transpose(1, 2))
        return scores


class _ConvThenChain(nn.Module):
    """Convolutions, then an MLP."""

    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        self.conv, self.act, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), body

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.body(self.act(self.conv(x)).mean((2, 3)))
        return scores


def _lstm(**how: Any) -> Any:
    return nn.LSTM(8, 24, batch_first=True, **how)


def _sparse_bag() -> Job:
    model = _Bag(500, sparse=True)
    return Job(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        batches=tokens(16, 6, 500, 3),
        loss=F.cross_entropy,
    )


def _scaled_head(model: Decoder) -> Decoder:
    return cast(Decoder, initialize(model, "default"))


def _loud(model: _Bag) -> _Bag:
    model.body = chain(2, 24, inputs=16, outputs=3, activation="tanh", init="xavier")
    with torch.no_grad():
        model.embedding.weight.mul_(50)
    return model


def _shifted(model: _ConvThenChain) -> _ConvThenChain:
    with torch.no_grad():
        cast(Tensor, model.conv.bias).sub_(20)
    return model


_mixed = partial(net_case, family="mixed", batches=partial(sequences, length=20), loss=F.cross_entropy)
_adapter = partial(net_case, family="adapter")
_embedding = partial(net_case, family="embedding", batches=partial(tokens, 16, 6, 500, 3), loss=F.cross_entropy)
_ADAM: dict[str, Any] = {"optimizer": "adam", "lr": 1e-3, "steps": 10}

CASES: tuple[Case, ...] = (
    _adapter(
        "adapters-on-mlp",
        "healthy",
        "B is zero: A gets no gradient in the first step",
        lambda: _adapted(chain(4)),
        loss=F.cross_entropy,
        batches=vectors,
        lr=0.1,
    ),
    _adapter(
        "adapters-on-transformer",
        "healthy",
        "B is zero: A gets no gradient in the first step",
        lambda: _adapted(_scaled_head(Decoder(2))),
        batches=partial(tokens, 8, 16, 30),
        loss=each_step,
        **_ADAM,
    ),
    Case(
        name="embedding-sparse-bag",
        family="embedding",
        label="healthy",
        build=_sparse_bag,
        why="sparse gradients: most rows get none",
    ),
    _embedding(
        "embedding-dense-bag", "healthy", "most rows get a gradient of zero", lambda: _Bag(500, sparse=False), lr=0.5
    ),
    _embedding(
        "embedding-factors",
        "healthy",
        "most rows get a gradient of zero",
        _Factors,
        loss=F.mse_loss,
        batches=lambda: _ratings,
        **_ADAM,
    ),
    _mixed(
        "mixed-conv-lstm",
        "healthy",
        "convolutions, then an LSTM whose mean is read",
        lambda: _ConvThenRecurrent(Reader(_lstm(), "mean")),
        lr=0.2,
    ),
    _mixed(
        "mixed-conv-mlp",
        "healthy",
        "convolutions, then an MLP",
        lambda: _ConvThenChain(chain(4, inputs=8)),
        lr=0.05,
        cuts=("act", "body.act4"),
        batches=images,
    ),
    _mixed(
        "mixed-conv-gru-every-step",
        "healthy",
        "convolutions, then a GRU with a loss at every step",
        lambda: _ConvThenRecurrent(Reader(nn.GRU(8, 24, batch_first=True), "every")),
        loss=each_step,
        batches=partial(sequences, length=24, every=True),
        lr=0.2,
    ),
    _mixed(
        "mixed-conv-sigmoid-8",
        "vanishing",
        "a deep sigmoid body behind a convolution",
        lambda: _ConvThenChain(chain(8, inputs=8, activation="sigmoid", init="xavier")),
        axis="depth",
        cuts=("act", "body.act8"),
        lr=0.1,
        batches=images,
    ),
    _mixed(
        "mixed-conv-lstm-120",
        "vanishing",
        "convolutions, then an LSTM over 120 steps",
        lambda: _ConvThenRecurrent(Reader(_lstm())),
        axis="time",
        places=("*recurrent*",),
        batches=partial(sequences, length=120),
        lr=0.2,
        steps=8,
    ),
    _mixed(
        "mixed-conv-rnn-explodes",
        "exploding",
        "convolutions, then an RNN of radius 1.5",
        lambda: _ConvThenRecurrent(
            Reader(recurrent_matrix(nn.RNN(8, 24, batch_first=True, nonlinearity="relu"), "identity", 1.5))
        ),
        axis="time",
        places=("*recurrent*",),
        batches=partial(sequences, length=40),
        optimizer="adam",
        lr=1e-6,
        steps=8,
    ),
    _embedding(
        "embedding-saturated-tanh",
        "saturated",
        "embeddings of fifty",
        lambda: _loud(_Bag(60, sparse=False)),
        places=("body.act1",),
        batches=partial(tokens, 16, 6, 60, 3),
        lr=1e-3,
    ),
    _mixed(
        "mixed-dead-conv",
        "dead",
        "a bias of -20 in the convolution",
        lambda: _shifted(_ConvThenChain(chain(3, inputs=8))),
        places=("act",),
        lr=1e-3,
        batches=images,
    ),
)
