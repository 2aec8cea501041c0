"""Synthetic batches with something to learn in them: each is drawn from its number alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from gradlab.benchmarks.diagnosis.case import Batches

__all__ = ["images", "one_hot_vectors", "regression", "reproduction", "sequences", "tokens", "vectors"]

_SEED = 20_240_501


def _generator(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(_SEED + number)


def _normal(number: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator(number))


def _teacher(features: int, outputs: int) -> Tensor:
    scale: float = features**0.5
    return _normal(-1, features, outputs) / scale


def vectors(
    batch: int = 64, features: int = 20, classes: int = 5, *, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> Batches:
    """Draw Gaussian vectors, (batch, features), whose class a linear teacher decides."""
    teacher = _teacher(features, classes)

    def draw(number: int) -> tuple[tuple[Tensor], Tensor]:
        x = _normal(number, batch, features)
        return ((x * scale).to(dtype),), (x @ teacher).argmax(-1)

    return draw


def one_hot_vectors(batch: int = 32, features: int = 200, classes: int = 5) -> Batches:
    """Draw vectors with three ones each, all else zero."""
    teacher = _teacher(features, classes)

    def draw(number: int) -> tuple[tuple[Tensor], Tensor]:
        places = torch.randint(features, (batch, 3), generator=_generator(number))
        x = F.one_hot(places, features).sum(1).float()
        return (x,), (x @ teacher).argmax(-1)

    return draw


def regression(batch: int = 64, features: int = 20, outputs: int = 3, *, scale: float = 1.0) -> Batches:
    """Draw Gaussian vectors with targets tanh(x W) times `scale`, (batch, outputs)."""
    teacher = 2 * _teacher(features, outputs)

    def draw(number: int) -> tuple[tuple[Tensor], Tensor]:
        x = _normal(number, batch, features)
        return (x,), scale * torch.tanh(x @ teacher)

    return draw


def reproduction(batch: int = 64, features: int = 32, *, factors: int = 4, binary: bool = False) -> Batches:
    """Draw vectors made of a few factors, (batch, features), that are their own targets."""
    loading = _teacher(factors, features)

    def draw(number: int) -> tuple[tuple[Tensor], Tensor]:
        x = 2 * _normal(number, batch, factors) @ loading
        x = (x > 0).float() if binary else x
        return (x,), x

    return draw


def images(batch: int = 16, channels: int = 3, side: int = 8, classes: int = 5) -> Batches:
    """Draw Gaussian images, (batch, channels, side, side), whose class the channel means decide."""
    teacher = _teacher(channels, classes)

    def draw(number: int) -> tuple[tuple[Tensor], Tensor]:
        x = _normal(number, batch, channels, side, side)
        return (x,), (x.mean((2, 3)) @ teacher).argmax(-1)

    return draw


def sequences(
    batch: int = 8, length: int = 100, features: int = 4, classes: int = 3, *, every: bool = False, scale: float = 1.0
) -> Batches:
    """Draw Gaussian sequences, (batch, length, features); the class of the first step, or of each step if `every`."""
    teacher = _teacher(features, classes)

    def draw(number: int) -> tuple[tuple[Tensor], Tensor]:
        x = _normal(number, batch, length, features)
        steps = (x @ teacher).argmax(-1)
        return (x * scale,), steps if every else steps[:, 0]

    return draw


def tokens(
    batch: int = 8, length: int = 16, vocabulary: int = 30, classes: int | None = None, *, zipf: bool = False
) -> Batches:
    """Draw words, (batch, length): the next word at each place, or one of `classes` for the whole.

    Args:
        batch: Sequences.
        length: Words of each.
        vocabulary: Different words.
        classes: Classes of a sequence; None for the next word at each place.
        zipf: Whether a few words make up most of the text, so that many rows of an embedding get no gradient.
    """
    weight = 1 / torch.arange(1, vocabulary + 1).float() ** (1.5 if zipf else 0.0)

    def draw(number: int) -> tuple[tuple[Tensor], Tensor]:
        drawn = torch.multinomial(weight, batch * (length + 1), replacement=True, generator=_generator(number))
        text = drawn.view(batch, length + 1)
        x = text[:, :-1].contiguous()
        return (x,), (text[:, :-1] + 1) % vocabulary if classes is None else x[:, 0] % classes

    return draw
