"""Transformers."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradlab.benchmarks.diagnosis.batches import images, tokens
from gradlab.benchmarks.diagnosis.blocks import each_step, net_case
from gradlab.benchmarks.diagnosis.case import Case

__all__ = ["CASES", "Attention", "Decoder", "scale_linear"]


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


def scale_linear(model: nn.Module, pattern: str, factor: float, shift: float = 0.0) -> nn.Module:
    """Multiply the weights of all linear layers whose path holds `pattern`, and shift their biases."""
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and pattern in path:
                module.weight.mul_(factor)
                module.bias.add_(shift)
    return model


def _no_norms(model: Decoder) -> Decoder:
    model.norms = nn.ModuleList([nn.Identity() for _ in model.norms])
    return model


_words = partial(net_case, family="transformer", batches=partial(tokens, 8, 16, 30), loss=each_step)
_classes = partial(net_case, family="transformer", batches=partial(tokens, 8, 16, 30, 3), loss=F.cross_entropy)
_ADAM: dict[str, Any] = {"optimizer": "adam", "lr": 1e-3, "steps": 10}
_TINY: dict[str, Any] = {"optimizer": "adam", "lr": 1e-6, "steps": 8}

CASES: tuple[Case, ...] = (
    _words(
        "transformer-pre-norm-6",
        "healthy",
        "scores masked by -inf",
        partial(Decoder, 6),
        cuts=("attention.0.out", "feedforward.5.2"),
        **_ADAM,
    ),
    _words(
        "transformer-pre-norm-16",
        "healthy",
        "deep, LayerNorm before the branches",
        partial(Decoder, 16),
        cuts=("attention.0.out", "feedforward.15.2"),
        optimizer="adam",
        lr=3e-4,
        steps=8,
    ),
    _words(
        "transformer-post-norm-3",
        "healthy",
        "LayerNorm after the sums",
        partial(Decoder, 3, order="post"),
        cuts=("norms.0", "norms.5"),
        **_ADAM,
    ),
    _words(
        "transformer-tied-relu",
        "healthy",
        "one matrix for embedding and head",
        partial(Decoder, 3, tied=True, activation=nn.ReLU),
        **_ADAM,
    ),
    _classes(
        "transformer-stock-post",
        "healthy",
        "torch's encoder, whose out_proj is never called",
        partial(_Stock, 2, norm_first=False),
        **_ADAM,
    ),
    _classes(
        "transformer-stock-pre",
        "healthy",
        "torch's encoder, whose out_proj is never called",
        partial(_Stock, 4, norm_first=True),
        **_ADAM,
    ),
    _classes("transformer-patches", "healthy", "images cut into patches", _Patches, **_ADAM, batches=images),
    _words(
        "transformer-clipped-bf16",
        "healthy",
        "activations in bfloat16, clipped",
        partial(Decoder, 3),
        autocast=torch.bfloat16,
        clip=1.0,
        **_ADAM,
    ),
    _words(
        "transformer-plain-8",
        "vanishing",
        "neither skips nor norms",
        partial(Decoder, 8, order="none"),
        axis="depth",
        cuts=("attention.0.out", "feedforward.7.2"),
        lr=0.05,
        steps=10,
    ),
    _words(
        "transformer-plain-12-words-summed",
        "vanishing",
        "neither skips nor norms; the loss is summed",
        partial(Decoder, 12, order="none"),
        axis="depth",
        cuts=("attention.0.out", "feedforward.11.2"),
        loss=lambda s, y: 1e3 * each_step(s, y),
        lr=1e-4,
        steps=8,
    ),
    _words(
        "transformer-plain-explodes",
        "exploding",
        "neither skips nor norms, large weights",
        lambda: scale_linear(Decoder(10, order="none", activation=nn.ReLU), "feedforward", 9.0),
        axis="depth",
        cuts=("attention.0.out", "feedforward.9.2"),
        **_TINY,
    ),
    _words(
        "transformer-skips-no-norm-explodes",
        "exploding",
        "skips without a normalization, large weights",
        lambda: scale_linear(_no_norms(Decoder(12, activation=nn.ReLU)), "feedforward", 4.0),
        axis="depth",
        cuts=("attention.0.out", "feedforward.11.2"),
        **_TINY,
    ),
    _words(
        "transformer-dead-feedforward",
        "dead",
        "a bias of -20 in every feed-forward layer",
        lambda: scale_linear(Decoder(3, activation=nn.ReLU), "feedforward.1.0", 1.0, -20.0),
        places=("feedforward.1.1",),
        optimizer="adam",
        lr=1e-3,
        steps=10,
    ),
)
