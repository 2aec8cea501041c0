"""GoogLeNet: inception blocks whose 1x1 convolutions shrink channels, and auxiliary heads."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, final

import torch
from torch import nn

from gradlab.nets.checks import check_positive
from gradlab.nets.convnet import ConvNet, conv_unit, linear_unit, narrowed

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["INCEPTIONS", "Inception", "auxiliary_head", "googlenet", "inception_pieces"]

INCEPTIONS: dict[str, tuple[int, int, int, int, int, int]] = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
"""Widths of each block (table 1): 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection."""

_STRIDE = 32
_SIDE_WITH_HEADS = 224  # the heads' linear layers read 4x4 maps, which their pool makes of 14x14


@final
class Inception(nn.Module):
    """Four branches side by side, concatenated: 1x1; 1x1 then 3x3; 1x1 then 5x5; 3x3 max pool then 1x1.

    Args:
        fan_in: Channels of the input.
        widths: The six widths, in the order of `INCEPTIONS`.
        norm: "batch" after every convolution, or "none".
        activation: One of `ACTIVATIONS`.

    Note:
        The 5x5 branch has a 5x5 kernel, as in the paper; some implementations have 3x3 there and fewer parameters.

    Example:
        >>> Inception(192, INCEPTIONS["3a"])(torch.zeros(1, 192, 4, 4)).shape
        torch.Size([1, 256, 4, 4])

    Source:
        Szegedy et al. 2014 (arXiv 1409.4842), fig. 2(b) and table 1.
    """

    def __init__(
        self, fan_in: int, widths: tuple[int, int, int, int, int, int], *, norm: str = "none", activation: str = "relu"
    ) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, project = widths

        def conv(inner: int, outer: int, kernel: int) -> nn.Sequential:
            return conv_unit(inner, outer, kernel, norm=norm, activation=activation)

        self.one = conv(fan_in, one, 1)
        self.three = nn.Sequential(OrderedDict(reduce=conv(fan_in, reduce3, 1), conv=conv(reduce3, three, 3)))
        self.five = nn.Sequential(OrderedDict(reduce=conv(fan_in, reduce5, 1), conv=conv(reduce5, five, 5)))
        self.pool = nn.Sequential(OrderedDict(pool=nn.MaxPool2d(3, 1, 1), project=conv(fan_in, project, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the branches' outputs, one after another in the channels."""
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], dim=1)


def googlenet(
    *,
    heads: bool = False,
    in_channels: int = 3,
    classes: int = 1000,
    dropout: float = 0.4,
    activation: str = "relu",
    norm: str = "none",
    narrow: int = 1,
) -> ConvNet:
    """Return GoogLeNet: nine inception blocks, 22 weight layers deep.

    Args:
        heads: Whether auxiliary heads read the outputs of blocks 4a and 4d while training; see `loss_with_heads`.
        in_channels: Channels of the images.
        classes: Outputs.
        dropout: Probability that a unit before the last linear layer is dropped.
        activation: One of `ACTIVATIONS`.
        norm: "none", the paper's, or "batch" (then without response normalization).
        narrow: Divisor of every hidden width; 1 is the paper's.

    Raises:
        UsageError: A setting out of range; on a call, images of fewer than 32 pixels a side, 224 with heads.

    Example:
        >>> from gradlab.nets import parameter_count
        >>> with torch.device("meta"):
        ...     parameter_count(googlenet()), parameter_count(googlenet(heads=True))
        (6998552, 13378280)

    Source:
        Szegedy et al. 2014 (arXiv 1409.4842), table 1 and sec. 5.
    """
    check_positive(in_channels=in_channels, classes=classes, narrow=narrow)
    w64, w192 = narrowed(64, narrow), narrowed(192, narrow)

    def conv(inner: int, outer: int, kernel: int, stride: int = 1) -> nn.Sequential:
        return conv_unit(inner, outer, kernel, stride=stride, norm=norm, activation=activation)

    stem: dict[str, nn.Module] = {
        "conv1": conv(in_channels, w64, 7, 2),
        "pool1": _pool(),
        "response1": _response_norm(),
        "conv2_reduce": conv(w64, w64, 1),
        "conv2": conv(w64, w192, 3),
        "response2": _response_norm(),
        "pool2": _pool(),
    }
    if norm == "batch":
        stem = {name: piece for name, piece in stem.items() if not name.startswith("response")}
    blocks, width = inception_pieces(w192, norm=norm, activation=activation, narrow=narrow)
    head = nn.Sequential(OrderedDict(
        pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), dropout=nn.Dropout(dropout),
        linear=nn.Linear(width, classes),
    ))  # fmt: skip
    side = {}
    if heads:
        for place in ("4a", "4d"):
            fan_in = block_width(place, narrow)
            pool = nn.AvgPool2d(5, 3)
            side[f"inception{place}"] = auxiliary_head(fan_in, classes, pool, activation=activation, narrow=narrow)
    return ConvNet(
        stem | blocks,
        head,
        name="GoogLeNet with heads" if heads else "GoogLeNet",
        in_channels=in_channels,
        smallest=_SIDE_WITH_HEADS if heads else _STRIDE,
        exact=_SIDE_WITH_HEADS if heads else None,
        heads=side,
    )


def inception_pieces(
    fan_in: int, *, norm: str, activation: str, narrow: int, pool: int = 3
) -> tuple[dict[str, nn.Module], int]:
    """Return the nine blocks with the pools between the stages, and the width of the last.

    Args:
        fan_in: Channels of the first block's input.
        norm: As in `googlenet`.
        activation: As in `googlenet`.
        narrow: As in `googlenet`.
        pool: Side of the pools.
    """
    pieces: dict[str, nn.Module] = {}
    for name, (a, b, c, d, e, f) in INCEPTIONS.items():
        if name in ("4a", "5a"):
            pieces[f"pool{int(name[0]) - 1}"] = _pool(pool)
        widths = tuple(narrowed(width, narrow) for width in (a, b, c, d, e, f))
        assert len(widths) == 6
        pieces[f"inception{name}"] = Inception(fan_in, widths, norm=norm, activation=activation)
        fan_in = block_width(name, narrow)
    return pieces, fan_in


def block_width(name: str, narrow: int) -> int:
    """Return the channels of a block's output."""
    one, _, three, _, five, project = INCEPTIONS[name]
    return sum(narrowed(width, narrow) for width in (one, three, five, project))


def auxiliary_head(
    fan_in: int, classes: int, pool: nn.Module, *, activation: str = "relu", narrow: int = 1, dropout: float = 0.7
) -> nn.Sequential:
    """Return an auxiliary classifier: pool to 4x4, 1x1 convolution to 128, linear to 1024, dropout, linear.

    Args:
        fan_in: Channels of the map it reads.
        classes: Outputs.
        pool: Makes 4x4 maps; the paper's is a 5x5/3 mean on 14x14.
        activation: One of `ACTIVATIONS`.
        narrow: Divisor of the hidden widths.
        dropout: Probability that a hidden unit is dropped. Default 0.7, the paper's.

    Source:
        Szegedy et al. 2014, sec. 5.
    """
    channels, hidden = narrowed(128, narrow), narrowed(1024, narrow)
    return nn.Sequential(OrderedDict(
        pool=pool,
        conv=conv_unit(fan_in, channels, 1, activation=activation),
        flatten=nn.Flatten(),
        linear1=linear_unit(16 * channels, hidden, activation=activation),
        dropout=nn.Dropout(dropout),
        linear2=nn.Linear(hidden, classes),
    ))  # fmt: skip


def _pool(side: int = 3) -> nn.Module:
    return nn.MaxPool2d(side, 2, padding=side // 2 if side % 2 else 0)


def _response_norm() -> nn.Module:
    return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)  # AlexNet's; the paper names no values
