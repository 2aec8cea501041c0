"""Transformers, embedding nets, low-rank adapters and mixtures of families."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradlab.benchmarks.diagnosis.batches import images, sequences, tokens, vectors
from gradlab.benchmarks.diagnosis.blocks import chain, each_step, initialize, job
from gradlab.benchmarks.diagnosis.case import Case, Job
from gradlab.benchmarks.diagnosis.recurrents import Reader, recurrent_matrix

__all__ = ["CASES", "Attention", "Decoder"]


class Attention(nn.Module):
    """Causal self-attention; scores of places `ahead` or more steps later are -inf."""

    def __init__(self, width: int, heads: int = 2, *, ahead: int = 1) -> None:
        super().__init__()
        self.ahead = ahead
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.softmax = nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(width / self.heads)
        mask = torch.full((length, length), -math.inf).triu(self.ahead)
        mixed = self.softmax(scores + mask) @ v
        joined: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return joined


class Decoder(nn.Module):
    """Words to scores of the next word.

    Args:
        depth: Blocks.
        width: Features.
        order: "pre" or "post" for where LayerNorm stands, "none" for neither skips nor norms.
        words: Size of the vocabulary.
        tied: Whether the head's matrix is the embedding's.
        activation: Of the feed-forward layers.
    """

    def __init__(
        self,
        depth: int,
        width: int = 24,
        *,
        order: str = "pre",
        words: int = 30,
        tied: bool = False,
        activation: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.order = order
        self.embedding, self.position = nn.Embedding(words, width), nn.Parameter(0.1 * torch.randn(64, width))
        self.attention = nn.ModuleList([Attention(width) for _ in range(depth)])
        self.feedforward = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(width, 2 * width), activation(), nn.Linear(2 * width, width))
                for _ in range(depth)
            ]
        )
        count = 0 if order == "none" else 2 * depth + 1
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(count)])
        self.head = nn.Linear(width, words, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
            nn.init.normal_(self.head.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x) + self.position[: x.shape[1]]
        for place, (attend, feed) in enumerate(zip(self.attention, self.feedforward, strict=True)):
            for part, number in ((attend, 2 * place), (feed, 2 * place + 1)):
                if self.order == "none":
                    h = part(h)
                elif self.order == "pre":
                    h = h + part(self.norms[number](h))
                else:
                    h = self.norms[number](h + part(h))
        scores: Tensor = self.head(h if self.order == "none" else self.norms[-1](h))
        return scores


class _Stock(nn.Module):
    """torch's own encoder, whose attention never calls its out_proj as a module; padding is masked."""

    def __init__(self, depth: int, *, norm_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 24)
        layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.1, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.arange(x.shape[1]).expand(len(x), -1) >= 10
        scores: Tensor = self.head(self.encoder(self.embedding(x), src_key_padding_mask=padding)[:, 0])
        return scores


class _Patches(nn.Module):
    """A vision transformer: patches, a class token, blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 24, 2, stride=2), nn.Parameter(0.02 * torch.randn(1, 1, 24))
        layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(x).flatten(2).transpose(1, 2)
        h = self.encoder(torch.cat([self.token.expand(len(x), -1, -1), patches], 1))
        scores: Tensor = self.head(h[:, 0])
        return scores


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


def _scaled(model: nn.Module, pattern: str, factor: float, shift: float = 0.0) -> nn.Module:
    """Multiply the weights of all linear layers whose path holds `pattern`, and shift their biases."""
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and pattern in path:
                module.weight.mul_(factor)
                module.bias.add_(shift)
    return model


def _sparse_bag() -> Job:
    model = _Bag(500, sparse=True)
    return Job(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5), batches=tokens(16, 6, 500, 3),
        loss=F.cross_entropy,
    )  # fmt: skip


def _case(name: str, family: str, label: Any, why: str, model: Callable[[], nn.Module], **how: Any) -> Case:
    facts = {key: how.pop(key) for key in ("axis", "places", "cuts") if key in how}
    batches, loss = how.pop("batches", partial(tokens, 8, 16, 30)), how.pop("loss", each_step)
    return Case(
        name=name, family=family, label=label, why=why, build=lambda: job(model(), batches(), loss, **how), **facts
    )


_ADAM: dict[str, Any] = {"optimizer": "adam", "lr": 1e-3, "steps": 10}
_TINY: dict[str, Any] = {"optimizer": "adam", "lr": 1e-6, "steps": 8}
_CLASSES: dict[str, Any] = {"loss": F.cross_entropy, "batches": partial(tokens, 8, 16, 30, 3)}
_IMAGES: dict[str, Any] = {"loss": F.cross_entropy, "batches": images}
_SERIES: dict[str, Any] = {"loss": F.cross_entropy, "batches": partial(sequences, length=20)}

CASES: tuple[Case, ...] = (
    _case("transformer-pre-norm-6", "transformer", "healthy", "scores masked by -inf", partial(Decoder, 6), cuts=("attention.0.out", "feedforward.5.2"), **_ADAM),
    _case("transformer-pre-norm-16", "transformer", "healthy", "deep, LayerNorm before the branches", partial(Decoder, 16), cuts=("attention.0.out", "feedforward.15.2"), optimizer="adam", lr=3e-4, steps=8),
    _case("transformer-post-norm-3", "transformer", "healthy", "LayerNorm after the sums", partial(Decoder, 3, order="post"), cuts=("norms.0", "norms.5"), **_ADAM),
    _case("transformer-tied-relu", "transformer", "healthy", "one matrix for embedding and head", partial(Decoder, 3, tied=True, activation=nn.ReLU), **_ADAM),
    _case("transformer-stock-post", "transformer", "healthy", "torch's encoder, whose out_proj is never called", partial(_Stock, 2, norm_first=False), **_ADAM, **_CLASSES),
    _case("transformer-stock-pre", "transformer", "healthy", "torch's encoder, whose out_proj is never called", partial(_Stock, 4, norm_first=True), **_ADAM, **_CLASSES),
    _case("transformer-patches", "transformer", "healthy", "images cut into patches", _Patches, **_ADAM, **_IMAGES),
    _case("transformer-clipped-bf16", "transformer", "healthy", "activations in bfloat16, clipped", partial(Decoder, 3), autocast=torch.bfloat16, clip=1.0, **_ADAM),
    _case("adapters-on-mlp", "adapter", "healthy", "B is zero: A gets no gradient in the first step", lambda: _adapted(chain(4)), loss=F.cross_entropy, batches=vectors, lr=0.1),
    _case("adapters-on-transformer", "adapter", "healthy", "B is zero: A gets no gradient in the first step", lambda: _adapted(_scaled_head(Decoder(2))), **_ADAM),
    Case(name="embedding-sparse-bag", family="embedding", label="healthy", build=_sparse_bag, why="sparse gradients: most rows get none"),
    _case("embedding-dense-bag", "embedding", "healthy", "most rows get a gradient of zero", lambda: _Bag(500, sparse=False), loss=F.cross_entropy, batches=partial(tokens, 16, 6, 500, 3), lr=0.5),
    _case("embedding-factors", "embedding", "healthy", "most rows get a gradient of zero", _Factors, loss=F.mse_loss, batches=lambda: _ratings, **_ADAM),
    _case("mixed-conv-lstm", "mixed", "healthy", "convolutions, then an LSTM whose mean is read", lambda: _ConvThenRecurrent(Reader(_lstm(), "mean")), lr=0.2, **_SERIES),
    _case("mixed-conv-mlp", "mixed", "healthy", "convolutions, then an MLP", lambda: _ConvThenChain(chain(4, inputs=8)), lr=0.05, cuts=("act", "body.act4"), **_IMAGES),
    _case("mixed-conv-gru-every-step", "mixed", "healthy", "convolutions, then a GRU with a loss at every step", lambda: _ConvThenRecurrent(Reader(nn.GRU(8, 24, batch_first=True), "every")), loss=each_step, batches=partial(sequences, length=24, every=True), lr=0.2),
    # sick
    _case("transformer-plain-8", "transformer", "vanishing", "neither skips nor norms", partial(Decoder, 8, order="none"), axis="depth", cuts=("attention.0.out", "feedforward.7.2"), lr=0.05, steps=10),
    _case("transformer-plain-12-words-summed", "transformer", "vanishing", "neither skips nor norms; the loss is summed", partial(Decoder, 12, order="none"), axis="depth", cuts=("attention.0.out", "feedforward.11.2"), loss=lambda s, y: 1e3 * each_step(s, y), lr=1e-4, steps=8),
    _case("mixed-conv-sigmoid-8", "mixed", "vanishing", "a deep sigmoid body behind a convolution", lambda: _ConvThenChain(chain(8, inputs=8, activation="sigmoid", init="xavier")), axis="depth", cuts=("act", "body.act8"), lr=0.1, **_IMAGES),
    _case("mixed-conv-lstm-120", "mixed", "vanishing", "convolutions, then an LSTM over 120 steps", lambda: _ConvThenRecurrent(Reader(_lstm())), axis="time", places=("*recurrent*",), loss=F.cross_entropy, batches=partial(sequences, length=120), lr=0.2, steps=8),
    _case("mixed-conv-rnn-explodes", "mixed", "exploding", "convolutions, then an RNN of radius 1.5", lambda: _ConvThenRecurrent(Reader(recurrent_matrix(nn.RNN(8, 24, batch_first=True, nonlinearity="relu"), "identity", 1.5))), axis="time", places=("*recurrent*",), loss=F.cross_entropy, batches=partial(sequences, length=40), **_TINY),
    _case("transformer-plain-explodes", "transformer", "exploding", "neither skips nor norms, large weights", lambda: _scaled(Decoder(10, order="none", activation=nn.ReLU), "feedforward", 9.0), axis="depth", cuts=("attention.0.out", "feedforward.9.2"), **_TINY),
    _case("transformer-skips-no-norm-explodes", "transformer", "exploding", "skips without a normalization, large weights", lambda: _scaled(_no_norms(Decoder(12, activation=nn.ReLU)), "feedforward", 4.0), axis="depth", cuts=("attention.0.out", "feedforward.11.2"), **_TINY),
    _case("transformer-dead-feedforward", "transformer", "dead", "a bias of -20 in every feed-forward layer", lambda: _scaled(Decoder(3, activation=nn.ReLU), "feedforward.1.0", 1.0, -20.0), places=("feedforward.1.1",), optimizer="adam", lr=1e-3, steps=10),
    _case("embedding-saturated-tanh", "embedding", "saturated", "embeddings of fifty", lambda: _loud(_Bag(60, sparse=False)), places=("body.act1",), loss=F.cross_entropy, batches=partial(tokens, 16, 6, 60, 3), lr=1e-3),
    _case("mixed-dead-conv", "mixed", "dead", "a bias of -20 in the convolution", lambda: _shifted(_ConvThenChain(chain(3, inputs=8))), places=("act",), lr=1e-3, **_IMAGES),
)  # fmt: skip


def _scaled_head(model: Decoder) -> Decoder:
    return cast(Decoder, initialize(model, "default"))


def _no_norms(model: Decoder) -> Decoder:
    model.norms = nn.ModuleList([nn.Identity() for _ in model.norms])
    return model


def _loud(model: _Bag) -> _Bag:
    model.body = chain(2, 24, inputs=16, outputs=3, activation="tanh", init="xavier")
    with torch.no_grad():
        model.embedding.weight.mul_(50)
    return model


def _shifted(model: _ConvThenChain) -> _ConvThenChain:
    with torch.no_grad():
        cast(Tensor, model.conv.bias).sub_(20)
    return model
