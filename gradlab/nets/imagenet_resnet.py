"""ResNet for large images: basic blocks to depth 34, bottlenecks beyond."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import nn

from gradlab.nets.checks import check_positive
from gradlab.nets.convnet import ConvNet, conv_unit, narrowed
from gradlab.nets.imagenet_vgg import check_variant
from gradlab.nets.mlp import activation_module
from gradlab.nets.residual import ResidualBlock

__all__ = ["residual_pieces", "resnet"]

#: Blocks of each of the four stages (table 1).
STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_EXPANSION = 4  # the last 1x1 convolution of a bottleneck has four times the width of its 3x3
_STRIDE = 32


def resnet(
    depth: int = 50,
    *,
    in_channels: int = 3,
    classes: int = 1000,
    activation: str = "relu",
    norm: str = "batch",
    narrow: int = 1,
) -> ConvNet:
    """Return ResNet-18, 34, 50, 101 or 152 in its ImageNet form.

    Stem 7x7/2 and 3x3/2 max pool; four stages of residual blocks; mean over the map; linear head. Where a block
    changes the shape its shortcut is a 1x1 convolution (option B), else the identity.

    Args:
        depth: 18 or 34 (two 3x3 convolutions a block), 50, 101 or 152 (1x1, 3x3, 1x1).
        in_channels: Channels of the images.
        classes: Outputs.
        activation: One of `ACTIVATIONS`.
        norm: "batch", the paper's, or "none".
        narrow: Divisor of every hidden width; 1 is the paper's.

    Raises:
        UsageError: Another depth, a setting out of range; on a call, images of fewer than 32 pixels a side.

    Note:
        A bottleneck has its stride in the first 1x1 convolution, as in the paper; later implementations put it in the
        3x3, with the same parameters, more multiply-adds and a larger receptive field.

    Example:
        >>> import torch
        >>> from gradlab.nets import parameter_count
        >>> with torch.device("meta"):
        ...     [parameter_count(resnet(depth)) for depth in (18, 50)]
        [11689512, 25557032]

    Source:
        He et al. 2015 (arXiv 1512.03385), table 1 and sec. 3.3.
    """
    check_variant("ResNet", depth, STAGES)
    check_positive(in_channels=in_channels, classes=classes, narrow=narrow)
    width = narrowed(64, narrow)
    stem: dict[str, nn.Module] = {
        "stem": conv_unit(in_channels, width, 7, stride=2, norm=norm, activation=activation),
        "pool": nn.MaxPool2d(3, 2, padding=1),
    }
    blocks, fan_in = residual_pieces(
        width, STAGES[depth], strides=(1, 2, 2, 2), bottleneck=depth >= 50, activation=activation, norm=norm
    )
    return ConvNet(
        stem | blocks,
        mean_head(fan_in, classes),
        name=f"ResNet-{depth}",
        in_channels=in_channels,
        smallest=_STRIDE,
    )


def residual_pieces(
    width: int, counts: tuple[int, ...], *, strides: tuple[int, ...], bottleneck: bool, activation: str, norm: str
) -> tuple[dict[str, nn.Module], int]:
    """Return the residual blocks by name, and the channels of the last.

    Args:
        width: Channels that the first block reads; stages have width, 2 width, 4 width, ...
        counts: Blocks of each stage.
        strides: Of the first block of each stage.
        bottleneck: Whether a block is 1x1, 3x3, 1x1 with an expansion of 4, else two 3x3.
        activation: One of `ACTIVATIONS`.
        norm: "batch" or "none".
    """
    pieces: dict[str, nn.Module] = {}
    fan_in = width
    for stage, (count, first_stride) in enumerate(zip(counts, strides, strict=True)):
        inner = width * 2**stage
        fan_out = inner * (_EXPANSION if bottleneck else 1)
        for place in range(count):
            stride = first_stride if place == 0 else 1
            kernels, widths = (
                ((1, 3, 1), (fan_in, inner, inner, fan_out)) if bottleneck else ((3, 3), (fan_in, inner, inner))
            )
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            for index, (kernel, (a, b)) in enumerate(zip(kernels, pairwise(widths), strict=True), start=1):
                last = index == len(kernels)
                layers[f"unit{index}"] = conv_unit(
                    a, b, kernel, stride=stride if index == 1 else 1, norm=norm, activation=None if last else activation
                )
            same = (fan_in, stride) == (fan_out, 1)
            shortcut = None if same else conv_unit(fan_in, fan_out, 1, stride=stride, norm=norm, activation=None)
            block = ResidualBlock(nn.Sequential(layers), shortcut, activation=activation_module(activation))
            pieces[f"block{stage + 1}_{place + 1}"] = block
            fan_in = fan_out
    return pieces, fan_in


def mean_head(fan_in: int, classes: int) -> nn.Sequential:
    """Return the head of most later nets: the mean over the map, then a linear layer."""
    return nn.Sequential(
        OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(fan_in, classes))
    )
