"""The published ImageNet nets by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradlab.nets.checks import check_member
from gradlab.nets.imagenet_alexnet import alexnet
from gradlab.nets.imagenet_densenet import densenet
from gradlab.nets.imagenet_googlenet import googlenet
from gradlab.nets.imagenet_resnet import resnet
from gradlab.nets.imagenet_vgg import vgg
from gradlab.nets.names import PUBLISHED

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradlab.nets.convnet import ConvNet

__all__ = ["published_net"]


def published_net(name: str, **changes: Any) -> ConvNet:
    """Build a published net.

    Args:
        name: One of `PUBLISHED`, such as "ResNet-50" or "GoogLeNet with heads".
        **changes: Settings of the family's function that replace its defaults.

    Raises:
        UsageError: An unknown name, or as the family's function.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     published_net("VGG-11").name
        'VGG-11'
    """
    check_member("net", name, [net for nets in PUBLISHED.values() for net in nets])
    net, _, variant = name.partition(" ")
    family, _, depth = net.partition("-")
    if family == "AlexNet":
        return alexnet(**({"towers": 1 if variant else 2} | changes))
    if family == "GoogLeNet":
        return googlenet(**({"heads": bool(variant)} | changes))
    build: dict[str, Callable[..., ConvNet]] = {"VGG": vgg, "ResNet": resnet, "DenseNet": densenet}
    return build[family](int(depth), **changes)
