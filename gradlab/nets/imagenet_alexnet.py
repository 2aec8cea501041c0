"""AlexNet: five convolutions, three linear layers, ReLU, dropout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from gradlab.errors import UsageError
from gradlab.nets.checks import check_positive
from gradlab.nets.convnet import ConvNet, conv_unit, linear_unit, narrowed

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["alexnet"]

_SMALLEST = 63  # pixels a side: what is left of them after pool5 is one pixel


def alexnet(
    *,
    towers: int = 2,
    side: int = 224,
    in_channels: int = 3,
    classes: int = 1000,
    dropout: float = 0.5,
    activation: str = "relu",
    narrow: int = 1,
) -> ConvNet:
    """Return AlexNet, as two towers on two GPUs were wired, or as one.

    conv1 11x11/4, pool, conv2 5x5, pool, conv3, conv4, conv5 3x3, pool, then three linear layers. With two towers
    conv2, conv4 and conv5 read the channels of their own tower only (two groups); conv3 and the linear layers read
    both. Response normalization follows conv1 and conv2; pools are 3x3/2, overlapping.

    Args:
        towers: 2, the paper's (60,965,224 parameters), or 1 (62,378,344).
        side: Side of the images in pixels, at least 63; the first linear layer reads the flattened last map.
        in_channels: Channels of the images.
        classes: Outputs.
        dropout: Probability that a unit before the first and the second linear layer is dropped.
        activation: One of `ACTIVATIONS`; the paper's point is "relu".
        narrow: Divisor of every hidden width; 1 is the paper's.

    Raises:
        UsageError: A setting out of range, or images too small.

    Note:
        Weights are torch's default; the paper draws them with std 0.01 and some biases as 1.

    Example:
        >>> import torch
        >>> from gradlab.nets import parameter_count
        >>> with torch.device("meta"):
        ...     parameter_count(alexnet()), parameter_count(alexnet(towers=1))
        (60965224, 62378344)

    Source:
        Krizhevsky, Sutskever & Hinton 2012, ImageNet Classification with Deep Convolutional Neural Networks, sec. 3.
    """
    if towers not in (1, 2):
        raise UsageError(f"The setting 'towers' is {towers!r}, but AlexNet has 1 or 2: choose one of them.")
    check_positive(side=side, in_channels=in_channels, classes=classes, narrow=narrow)
    check_dropout(dropout)
    if side < _SMALLEST:
        raise UsageError(f"AlexNet needs images of at least {_SMALLEST} pixels a side; got {side}.")
    # Both towers need as many channels, so widths come in multiples of their number.
    w1, w2, w3, w4, w5 = (towers * narrowed(width // towers, narrow) for width in (96, 256, 384, 384, 256))
    hidden = narrowed(4096, narrow)
    trunk = {
        "conv1": conv_unit(in_channels, w1, 11, stride=4, padding=2, activation=activation),
        "response1": _response_norm(),
        "pool1": nn.MaxPool2d(3, 2),
        "conv2": conv_unit(w1, w2, 5, groups=towers, activation=activation),
        "response2": _response_norm(),
        "pool2": nn.MaxPool2d(3, 2),
        "conv3": conv_unit(w2, w3, 3, activation=activation),
        "conv4": conv_unit(w3, w4, 3, groups=towers, activation=activation),
        "conv5": conv_unit(w4, w5, 3, groups=towers, activation=activation),
        "pool5": nn.MaxPool2d(3, 2),
        **linear_layers(w5 * _last_side(side) ** 2, hidden, dropout=dropout, activation=activation),
    }
    return ConvNet(
        trunk, nn.Linear(hidden, classes), name="AlexNet", in_channels=in_channels, smallest=_SMALLEST, exact=side
    )


def linear_layers(
    fan_in: int, hidden: int, *, dropout: float, activation: str, norm: str = "none"
) -> Mapping[str, nn.Module]:
    """Return the pieces between the last map and the head: flatten, then twice dropout and a linear layer.

    The paper drops the outputs of its first two linear layers; dropping what they read, as here, leaves the last
    hidden layer whole and is how later implementations do it.
    """
    return {
        "flatten": nn.Flatten(),
        "dropout1": nn.Dropout(dropout),
        "linear1": linear_unit(fan_in, hidden, activation=activation, norm=norm),
        "dropout2": nn.Dropout(dropout),
        "linear2": linear_unit(hidden, hidden, activation=activation, norm=norm),
    }


def check_dropout(dropout: float) -> None:
    """Raise a UsageError unless `dropout` is a probability below 1."""
    if not 0 <= dropout < 1:
        raise UsageError(f"The setting 'dropout' is {dropout!r}, but must be at least 0 and below 1.")


def _response_norm() -> nn.Module:
    # The paper's alpha = 1e-4 multiplies a sum over 5 channels; torch's multiplies their mean.
    return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)


def _last_side(side: int) -> int:
    side = (side + 4 - 11) // 4 + 1
    for _ in range(3):  # the other convolutions keep the side
        side = (side - 3) // 2 + 1
    return side
