"""The five families for small images, and stacks that differ in how a layer's output joins its input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from gradlab.errors import UsageError
from gradlab.nets.checks import check_member, check_positive
from gradlab.nets.convnet import ConvNet, conv_unit, narrowed
from gradlab.nets.imagenet_alexnet import check_dropout, linear_layers
from gradlab.nets.imagenet_densenet import DenseLayer, dense_pieces, preactivated
from gradlab.nets.imagenet_googlenet import auxiliary_head, block_width, inception_pieces
from gradlab.nets.imagenet_resnet import mean_head, residual_pieces
from gradlab.nets.imagenet_vgg import WIDTHS
from gradlab.nets.names import FAMILIES, GROWTHS
from gradlab.nets.residual import PlainBlock, ResidualBlock

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["growth_stack", "small_net"]

_STRIDE = 4  # two halvings, in every family


def small_net(
    family: str,
    *,
    side: int = 8,
    in_channels: int = 1,
    classes: int = 10,
    norm: str = "none",
    activation: str = "relu",
    dropout: float = 0.0,
    heads: bool = False,
    narrow: int = 4,
) -> ConvNet:
    """Return a member of a family for small images: its blocks and ratios of widths, with a total stride of 4.

    alexnet: 5x5, 5x5, 3x3, 3x3, 3x3, three linear layers (8 weight layers). vgg: the 13 convolutions of VGG-16 and
    three linear layers (16). googlenet: the nine inception blocks after one 3x3 convolution (20). resnet: the eight
    basic blocks of ResNet-18 after a 3x3 stem (18). densenet: DenseNet-BC of depth 40, three blocks of six layers.

    Args:
        family: One of `FAMILIES`.
        side: Side of the images in pixels, at least 4.
        in_channels: Channels of the images.
        classes: Outputs.
        norm: "batch" after every hidden weight layer (before it in densenet), or "none".
        activation: One of `ACTIVATIONS`.
        dropout: Probability that a unit before a hidden linear layer is dropped; alexnet and vgg have such layers.
        heads: Whether auxiliary heads are there; googlenet has them.
        narrow: Divisor of every hidden width of the family's ImageNet form.

    Raises:
        UsageError: An unknown family, norm or activation, heads or dropout where a family has none, or a setting out
            of range.

    Example:
        >>> import torch
        >>> small_net("densenet")(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])

    Source:
        As `alexnet`, `vgg`, `googlenet`, `resnet` and `densenet`; DenseNet-BC-40: Huang et al. 2016, sec. 4.2. The
        other small forms are this project's.
    """
    check_member("family", family, FAMILIES)
    check_positive(side=side, in_channels=in_channels, classes=classes, narrow=narrow)
    check_dropout(dropout)
    if side < _STRIDE:
        raise UsageError(f"A small {family} needs images of at least {_STRIDE} pixels a side; got {side}.")
    if heads and family != "googlenet":
        raise UsageError(f"Auxiliary heads belong to googlenet, but the family is '{family}': leave heads out.")
    if dropout and family not in ("alexnet", "vgg"):
        raise UsageError(f"Dropout stands before hidden linear layers, but '{family}' has none: leave dropout out.")
    how: dict[str, Any] = {"norm": norm, "activation": activation}
    last = side // _STRIDE
    side_heads = {}
    head: nn.Module
    if family in ("alexnet", "vgg"):
        make = _alexnet if family == "alexnet" else _vgg
        trunk, width = make(in_channels, narrow, how)
        hidden = narrowed(4096, 8 * narrow)  # on small maps an eighth of the ImageNet form's
        trunk |= linear_layers(width * last**2, hidden, dropout=dropout, **how)
        head = nn.Linear(hidden, classes)
    elif family == "googlenet":
        stem = conv_unit(in_channels, narrowed(192, narrow), 3, **how)
        blocks, width = inception_pieces(narrowed(192, narrow), narrow=narrow, **how)
        trunk = {"conv2": stem} | blocks
        head = mean_head(width, classes)
        for place in ("4a", "4d") if heads else ():
            pool = nn.AdaptiveAvgPool2d(4)
            side_heads[f"inception{place}"] = auxiliary_head(
                block_width(place, narrow), classes, pool, activation=activation, narrow=narrow, dropout=dropout
            )
    elif family == "resnet":
        width = narrowed(64, narrow)
        blocks, end = residual_pieces(width, (2, 2, 2, 2), strides=(1, 2, 2, 1), bottleneck=False, **how)
        trunk = {"stem": conv_unit(in_channels, width, 3, **how)} | blocks
        head = mean_head(end, classes)
    else:
        growth = narrowed(32, narrow)
        pieces, end = dense_pieces(2 * growth, growth, (6, 6, 6), **how)
        trunk = {"stem": nn.Conv2d(in_channels, 2 * growth, 3, padding=1, bias=norm == "none")} | pieces
        head = mean_head(end, classes)
    exact = side if family in ("alexnet", "vgg") else None
    return ConvNet(
        trunk, head, name=f"a small {family}", in_channels=in_channels, smallest=_STRIDE, exact=exact, heads=side_heads
    )


def _alexnet(in_channels: int, narrow: int, how: dict[str, Any]) -> tuple[dict[str, nn.Module], int]:
    w1, w2, w3, w4, w5 = (narrowed(width, narrow) for width in (96, 256, 384, 384, 256))
    return {
        "conv1": conv_unit(in_channels, w1, 5, **how),
        "pool1": nn.MaxPool2d(2),
        "conv2": conv_unit(w1, w2, 5, **how),
        "pool2": nn.MaxPool2d(2),
        "conv3": conv_unit(w2, w3, 3, **how),
        "conv4": conv_unit(w3, w4, 3, **how),
        "conv5": conv_unit(w4, w5, 3, **how),
    }, w5


def _vgg(in_channels: int, narrow: int, how: dict[str, Any]) -> tuple[dict[str, nn.Module], int]:
    trunk: dict[str, nn.Module] = {}
    fan_in = in_channels
    for stage, (count, width) in enumerate(zip((2, 2, 3, 3, 3), WIDTHS, strict=True), start=1):
        for place in range(1, count + 1):
            trunk[f"conv{stage}_{place}"] = conv_unit(fan_in, narrowed(width, narrow), 3, **how)
            fan_in = narrowed(width, narrow)
        if stage <= 2:  # five pools would leave nothing of a small image
            trunk[f"pool{stage}"] = nn.MaxPool2d(2)
    return trunk, fan_in


def growth_stack(
    growth: str,
    depth: int,
    *,
    width: int = 16,
    added: int = 8,
    in_channels: int = 1,
    classes: int = 10,
    norm: str = "none",
    activation: str = "relu",
) -> ConvNet:
    """Return a stack of 3x3 convolutions that differ only in how a layer's output f(h) joins its input h.

    "plain": f(h). "residual": h + f(h), addition. "dense": [h, f(h)], concatenation. f is norm, activation,
    convolution, as in DenseNet; a convolution (the stem) makes h_0; norm, activation, the mean over the map and a
    linear layer follow the last h.

    Args:
        growth: One of `GROWTHS`.
        depth: Layers after the stem.
        width: Channels of h_0, and of every h in "plain" and "residual".
        added: Channels that each layer of "dense" adds.
        in_channels: Channels of the images.
        classes: Outputs.
        norm: "batch" or "none".
        activation: One of `ACTIVATIONS`.

    Raises:
        UsageError: An unknown name, or a count below 1.

    Example:
        >>> [name for name, _ in growth_stack("dense", 2).trunk.named_children()]
        ['stem', 'layer1', 'layer2', 'end']

    Source:
        He et al. 2015 (addition) and Huang et al. 2016, eq. 1 and 2 (addition against concatenation).
    """
    check_member("growth", growth, GROWTHS)
    check_positive(depth=depth, width=width, added=added, in_channels=in_channels, classes=classes)
    how: dict[str, Any] = {"norm": norm, "activation": activation}
    joins: dict[str, Callable[[nn.Module], nn.Module]] = {
        "plain": PlainBlock,
        "residual": ResidualBlock,
        "dense": DenseLayer,
    }
    trunk: dict[str, nn.Module] = {"stem": nn.Conv2d(in_channels, width, 3, padding=1, bias=norm == "none")}
    channels = width
    for place in range(1, depth + 1):
        branch = preactivated(channels, added if growth == "dense" else width, 3, **how)
        trunk[f"layer{place}"] = joins[growth](branch)
        channels += added if growth == "dense" else 0
    trunk["end"] = preactivated(channels, None, **how)
    return ConvNet(trunk, mean_head(channels, classes), name=f"a {growth} stack", in_channels=in_channels, smallest=1)
