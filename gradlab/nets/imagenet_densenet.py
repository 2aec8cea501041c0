"""DenseNet: layers that add their features to those before by concatenation."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, final

import torch
from torch import nn

from gradlab.nets.checks import check_member, check_positive
from gradlab.nets.convnet import ConvNet, conv_unit, narrowed
from gradlab.nets.imagenet_resnet import mean_head
from gradlab.nets.imagenet_vgg import check_variant
from gradlab.nets.mlp import activation_module
from gradlab.nets.names import NORMS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DenseLayer", "dense_pieces", "densenet", "preactivated"]

#: Dense layers of each of the four blocks (table 1).
BLOCKS = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32)}
_GROWTH = 32
_STRIDE = 32


@final
class DenseLayer(nn.Module):
    """A layer that keeps what it reads: y = [x, branch(x)], concatenated in the channels.

    Args:
        branch: Its output has the batch and map sizes of x.

    Example:
        >>> DenseLayer(nn.Conv2d(4, 2, 1))(torch.zeros(1, 4, 3, 3)).shape
        torch.Size([1, 6, 3, 3])

    Source:
        Huang et al. 2016 (arXiv 1608.06993), eq. 2.
    """

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        """Return x with the branch's features after it."""
        return torch.cat([x, self.branch(x)], dim=1)


def densenet(
    depth: int = 121,
    *,
    in_channels: int = 3,
    classes: int = 1000,
    activation: str = "relu",
    norm: str = "batch",
    narrow: int = 1,
) -> ConvNet:
    """Return DenseNet-121, 169 or 201 (BC: bottlenecks, and transitions that halve the channels).

    Args:
        depth: Weight layers: 121, 169 or 201.
        in_channels: Channels of the images.
        classes: Outputs.
        activation: One of `ACTIVATIONS`.
        norm: "batch", the paper's, or "none".
        narrow: Divisor of the growth rate 32, and so of every hidden width; 1 is the paper's.

    Raises:
        UsageError: Another depth, a setting out of range; on a call, images of fewer than 32 pixels a side.

    Example:
        >>> from gradlab.nets import parameter_count
        >>> with torch.device("meta"):
        ...     [parameter_count(densenet(depth)) for depth in (121, 169, 201)]
        [7978856, 14149480, 20013928]

    Source:
        Huang et al. 2016 (arXiv 1608.06993), table 1 and sec. 3.
    """
    check_variant("DenseNet", depth, BLOCKS)
    check_positive(in_channels=in_channels, classes=classes, narrow=narrow)
    growth = narrowed(_GROWTH, narrow)
    stem: dict[str, nn.Module] = {
        "stem": conv_unit(in_channels, 2 * growth, 7, stride=2, norm=norm, activation=activation),
        "pool": nn.MaxPool2d(3, 2, padding=1),
    }
    pieces, width = dense_pieces(2 * growth, growth, BLOCKS[depth], activation=activation, norm=norm)
    return ConvNet(
        stem | pieces,
        mean_head(width, classes),
        name=f"DenseNet-{depth}",
        in_channels=in_channels,
        smallest=_STRIDE,
    )


def dense_pieces(
    width: int, growth: int, counts: tuple[int, ...], *, activation: str, norm: str
) -> tuple[dict[str, nn.Module], int]:
    """Return dense layers and transitions by name, the last norm and activation, and the channels at the end.

    Args:
        width: Channels that the first layer reads.
        growth: Channels that each layer adds; its 1x1 bottleneck has four times as many.
        counts: Layers of each dense block.
        activation: One of `ACTIVATIONS`.
        norm: "batch" or "none".
    """
    pieces: dict[str, nn.Module] = {}
    for block, count in enumerate(counts, start=1):
        for place in range(1, count + 1):
            bottleneck = preactivated(width, 4 * growth, 1, activation=activation, norm=norm)
            conv = preactivated(4 * growth, growth, 3, activation=activation, norm=norm)
            pieces[f"dense{block}_{place}"] = DenseLayer(nn.Sequential(OrderedDict(bottleneck=bottleneck, conv=conv)))
            width += growth
        if block < len(counts):
            shrink = preactivated(width, width // 2, 1, activation=activation, norm=norm)
            pieces[f"transition{block}"] = nn.Sequential(OrderedDict(shrink=shrink, pool=nn.AvgPool2d(2)))
            width //= 2
    pieces["end"] = preactivated(width, None, activation=activation, norm=norm)
    return pieces, width


def preactivated(fan_in: int, fan_out: int | None, kernel: int = 1, *, activation: str, norm: str) -> nn.Sequential:
    """Return norm, activation and convolution, in this order; the convolution has a bias without norm only.

    Args:
        fan_in: Channels of the input.
        fan_out: Channels of the output; None leaves the convolution out.
        kernel: Side of the kernel.
        activation: One of `ACTIVATIONS`.
        norm: "batch" or "none".
    """
    check_member("norm", norm, NORMS)
    layers: OrderedDict[str, nn.Module] = OrderedDict(norm=nn.BatchNorm2d(fan_in)) if norm == "batch" else OrderedDict()
    layers["activation"] = activation_module(activation)
    if fan_out is not None:
        layers["conv"] = nn.Conv2d(fan_in, fan_out, kernel, padding=kernel // 2, bias=norm == "none")
    return nn.Sequential(layers)
