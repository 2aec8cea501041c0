"""VGG: stacks of 3x3 convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from gradlab.errors import UsageError
from gradlab.nets.checks import check_positive
from gradlab.nets.convnet import ConvNet, conv_unit, narrowed
from gradlab.nets.imagenet_alexnet import check_dropout, linear_layers

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["vgg"]

#: Convolutions of each of the five stages (the paper's configurations A, B, D, E).
_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)
_STRIDE = 32  # five pools


def vgg(
    depth: int = 16,
    *,
    side: int = 224,
    in_channels: int = 3,
    classes: int = 1000,
    dropout: float = 0.5,
    activation: str = "relu",
    norm: str = "none",
    narrow: int = 1,
) -> ConvNet:
    """Return VGG-11, 13, 16 or 19: five stages of 3x3 convolutions, each ending in a 2x2 pool, three linear layers.

    Args:
        depth: Weight layers: 11, 13, 16 or 19.
        side: Side of the images in pixels, at least 32.
        in_channels: Channels of the images.
        classes: Outputs.
        dropout: Probability that a unit before the first and the second linear layer is dropped.
        activation: One of `ACTIVATIONS`.
        norm: "none", the paper's, or "batch".
        narrow: Divisor of every hidden width; 1 is the paper's.

    Raises:
        UsageError: Another depth, a setting out of range, or images too small.

    Example:
        >>> import torch
        >>> from gradlab.nets import parameter_count
        >>> with torch.device("meta"):
        ...     [parameter_count(vgg(depth)) for depth in (11, 13, 16, 19)]
        [132863336, 133047848, 138357544, 143667240]

    Source:
        Simonyan & Zisserman 2014 (arXiv 1409.1556), table 1.
    """
    check_variant("VGG", depth, _STAGES)
    check_positive(side=side, in_channels=in_channels, classes=classes, narrow=narrow)
    check_dropout(dropout)
    if side < _STRIDE:
        raise UsageError(f"VGG-{depth} needs images of at least {_STRIDE} pixels a side; got {side}.")
    trunk: dict[str, nn.Module] = {}
    fan_in = in_channels
    for stage, (count, width) in enumerate(zip(_STAGES[depth], WIDTHS, strict=True), start=1):
        fan_out = narrowed(width, narrow)
        for place in range(1, count + 1):
            trunk[f"conv{stage}_{place}"] = conv_unit(fan_in, fan_out, 3, norm=norm, activation=activation)
            fan_in = fan_out
        trunk[f"pool{stage}"] = nn.MaxPool2d(2)
    hidden = narrowed(4096, narrow)
    trunk |= linear_layers(fan_in * (side // _STRIDE) ** 2, hidden, dropout=dropout, activation=activation)
    return ConvNet(
        trunk, nn.Linear(hidden, classes), name=f"VGG-{depth}", in_channels=in_channels, smallest=_STRIDE, exact=side
    )


def check_variant(family: str, depth: int, variants: Collection[int]) -> None:
    """Raise a UsageError unless a family has a net of this depth."""
    if isinstance(depth, bool) or depth not in variants:
        listed = ", ".join(map(str, variants))
        raise UsageError(f"There is no {family}-{depth}: its published depths are {listed}.")
