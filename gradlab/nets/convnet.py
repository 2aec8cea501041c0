"""What the ImageNet families share: a trunk of pieces in a row, a head, and units of convolution, norm, activation."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, final

from torch import nn
from torch.nn.functional import cross_entropy

from gradlab.errors import UsageError
from gradlab.nets.checks import check_member, check_positive
from gradlab.nets.mlp import activation_module
from gradlab.nets.names import NORMS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["ConvNet", "conv_unit", "linear_unit", "loss_with_heads", "narrowed"]

AUXILIARY_WEIGHT = 0.3
"""Weight of each auxiliary loss (Szegedy et al. 2014, sec. 5)."""


@final
class ConvNet(nn.Module):
    """A classifier whose whole signal passes through a row of pieces: every piece's output is a cut of the net.

    `trunk` is the row, `head` maps its end to logits, and `heads` maps some pieces' outputs to logits of their own.
    `alexnet`, `vgg`, `googlenet`, `resnet`, `densenet`, `small_net` and `growth_stack` build one.

    Args:
        trunk: Pieces by name, from input to output.
        head: From the trunk's output to logits.
        name: What errors call the net.
        in_channels: Channels of the images.
        smallest: Smallest side of the images, in pixels.
        exact: The only side that fits, where a linear layer reads the flattened map; None allows any from `smallest`.
        heads: Auxiliary classifiers, by the name of the piece whose output each one reads.

    Example:
        >>> import torch
        >>> net = ConvNet({"conv": conv_unit(1, 2, 3)}, nn.Flatten(), name="toy", in_channels=1, smallest=3)
        >>> net(torch.zeros(1, 1, 4, 4)).shape
        torch.Size([1, 32])
    """

    def __init__(
        self,
        trunk: Mapping[str, nn.Module],
        head: nn.Module,
        *,
        name: str,
        in_channels: int,
        smallest: int,
        exact: int | None = None,
        heads: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.in_channels, self.smallest, self.exact = name, in_channels, smallest, exact
        self.trunk = nn.Sequential(OrderedDict(trunk))
        self.head = head
        self.heads = nn.ModuleDict(dict(heads or {}))

    def features(self, x: Tensor) -> Tensor:
        """Return the trunk's output.

        Args:
            x: Images, (N, in_channels, H, W).

        Raises:
            UsageError: The images have another number of channels, or are too small.
        """
        return self._run(x)[0]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the logits, (N, classes); in training mode with heads: the net's and then each head's."""
        features, side = self._run(x)
        logits: Tensor = self.head(features)
        return (logits, *side) if side else logits

    def _run(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        self._check(x)
        side = []
        for name, piece in self.trunk.named_children():
            x = piece(x)
            if self.training and name in self.heads:
                side.append(self.heads[name](x))
        return x, side

    def _check(self, x: Tensor) -> None:
        fits = x.ndim == 4 and x.shape[1] == self.in_channels
        if fits and self.exact is not None:
            fits = tuple(x.shape[2:]) == (self.exact, self.exact)
        elif fits:
            fits = min(x.shape[2:]) >= self.smallest
        if not fits:
            allowed = f"of at least {self.smallest} pixels"
            if self.exact is not None:
                allowed = f"of exactly {self.exact} pixels, and can be built for {self.smallest} or more"
            raise UsageError(
                f"The images have shape {tuple(x.shape)}, but {self.name} takes (N, {self.in_channels}, H, W) with "
                f"sides {allowed}: enlarge or reshape them."
            )


def conv_unit(
    fan_in: int,
    fan_out: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int | None = None,
    groups: int = 1,
    norm: str = "none",
    activation: str | None = "relu",
) -> nn.Sequential:
    """Return convolution, norm and activation, named `conv`, `norm` and `activation`.

    Args:
        fan_in: Channels of the input.
        fan_out: Channels of the output.
        kernel: Side of the kernel.
        stride: Step of the kernel.
        padding: Zeros on each side; None is kernel // 2, which keeps the map's size at stride 1.
        groups: Into how many parts the channels are split.
        norm: "batch" or "none". The convolution has a bias without a norm only: BatchNorm takes the mean off again.
        activation: One of `ACTIVATIONS`, or None for none.

    Raises:
        UsageError: An unknown norm or activation, or a count below 1.

    Example:
        >>> [name for name, _ in conv_unit(3, 8, 3, norm="batch").named_children()]
        ['conv', 'norm', 'activation']
    """
    check_member("norm", norm, NORMS)
    check_positive(fan_in=fan_in, fan_out=fan_out, kernel=kernel, stride=stride, groups=groups)
    padding = kernel // 2 if padding is None else padding
    conv = nn.Conv2d(fan_in, fan_out, kernel, stride, padding, groups=groups, bias=norm == "none")
    return _unit("conv", conv, nn.BatchNorm2d(fan_out) if norm == "batch" else None, activation)


def linear_unit(fan_in: int, fan_out: int, *, norm: str = "none", activation: str | None = "relu") -> nn.Sequential:
    """Return a linear layer, norm and activation, named `linear`, `norm` and `activation`.

    Args:
        fan_in: Entries of the input.
        fan_out: Entries of the output.
        norm: As in `conv_unit`.
        activation: As in `conv_unit`.

    Raises:
        UsageError: As `conv_unit`.

    Example:
        >>> len(linear_unit(4, 2))
        2
    """
    check_member("norm", norm, NORMS)
    check_positive(fan_in=fan_in, fan_out=fan_out)
    linear = nn.Linear(fan_in, fan_out, bias=norm == "none")
    return _unit("linear", linear, nn.BatchNorm1d(fan_out) if norm == "batch" else None, activation)


def _unit(kind: str, layer: nn.Module, norm: nn.Module | None, activation: str | None) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict({kind: layer})
    if norm is not None:
        layers["norm"] = norm
    if activation is not None:
        layers["activation"] = activation_module(activation)
    return nn.Sequential(layers)


def narrowed(channels: int, narrow: int) -> int:
    """Return channels / narrow, rounded, at least 1.

    Example:
        >>> narrowed(192, 4), narrowed(16, 64)
        (48, 1)
    """
    return max(1, round(channels / narrow))


def loss_with_heads(outputs: Tensor | tuple[Tensor, ...], labels: Tensor, weight: float = AUXILIARY_WEIGHT) -> Tensor:
    """Return the cross-entropy of the net plus `weight` times that of each auxiliary head.

    Args:
        outputs: What the net returns: logits, or the net's logits and then each head's, (N, classes) each.
        labels: Classes, (N,).
        weight: Of each head's loss. Default 0.3, the paper's.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 10)
        >>> loss = loss_with_heads((logits, logits, logits), torch.zeros(2, dtype=torch.long))
        >>> round(float(loss / torch.log(torch.tensor(10.0))), 6)
        1.6

    Source:
        Szegedy et al. 2014 (arXiv 1409.4842), sec. 5.
    """
    first, *side = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = cross_entropy(first, labels)
    for logits in side:
        loss = loss + weight * cross_entropy(logits, labels)
    return loss
