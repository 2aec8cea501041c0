"""Residual and plain blocks that differ in the skip only."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from torch import nn
from torch.nn import functional

from gradlab.errors import UsageError
from gradlab.nets.checks import check_positive

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Add", "Fork", "OptionA", "PlainBlock", "ResidualBlock"]


@final
class Fork(nn.Module):
    """Pass a tensor on as a graph node of its own.

    A residual block reads its input x twice, and autograd adds both gradients before a hook on x can see them. With
    one fork in front of each path, a hook on a fork's output sees the gradient of that path alone, and their sum is
    the gradient of x:

        dL/dx = dL/d to_branch(x) + dL/d to_skip(x)

    Returning x itself would not do: both paths would then share x's node.

    Note:
        A view: no memory is copied and no value changes.

    Example:
        >>> x = torch.ones(3)
        >>> y = Fork()(x)
        >>> y is x, y.data_ptr() == x.data_ptr()
        (False, True)
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return a view of the whole of x."""
        return x.view_as(x)


@final
class Add(nn.Module):
    """The sum of a residual block, as a module so that a hook can see the block's response before its activation.

    Example:
        >>> Add()(torch.ones(2), torch.ones(2))
        tensor([2., 2.])
    """

    def forward(self, branch: Tensor, skip: Tensor) -> Tensor:
        """Return branch + skip, both of one shape."""
        return branch + skip


@final
class ResidualBlock(nn.Module):
    """A residual block, y = activation(alpha * branch(x) + shortcut(x)).

    Submodules in order: `to_branch` and `to_skip` (`Fork`), `branch`, `shortcut`, `add` (`Add`), `activation`.

    Args:
        branch: The residual function; its output has the shape of shortcut(x).
        shortcut: What the skip path does to x; None is the identity.
        skipinit: Whether `alpha`, a learnable scalar that starts at 0, scales the branch; else there is no `alpha`.
        activation: What follows the sum; None is nothing.

    Note:
        The branch holds the same parameter names and shapes as that of `PlainBlock`: with a shortcut without
        parameters and skipinit off, the state dict of one loads into the other.

    Example:
        >>> block = ResidualBlock(nn.Linear(2, 2), None, skipinit=True)
        >>> block(torch.ones(1, 2)).tolist()  # alpha = 0: the identity
        [[1.0, 1.0]]

    Source:
        He et al. 2015, Deep Residual Learning, sec. 3.2; De & Smith 2020 (arXiv 2002.10444), SkipInit.
    """

    alpha: nn.Parameter | None

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        *,
        skipinit: bool = False,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.to_branch = Fork()
        self.to_skip = Fork()
        self.branch = branch
        self.shortcut = shortcut
        self.register_parameter("alpha", nn.Parameter(torch.zeros(())) if skipinit else None)
        self.add = Add()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for the input x."""
        branch = self.branch(self.to_branch(x))
        if self.alpha is not None:
            branch = self.alpha * branch
        skip = self.to_skip(x)
        if self.shortcut is not None:
            skip = self.shortcut(skip)
        y: Tensor = self.add(branch, skip)
        if self.activation is not None:
            y = self.activation(y)
        return y


@final
class PlainBlock(nn.Module):
    """A residual block without its skip, y = activation(branch(x)).

    Args:
        branch: The function, as in `ResidualBlock`.
        activation: What follows it; None is nothing.

    Example:
        >>> PlainBlock(nn.Identity(), nn.ReLU())(torch.tensor([-1.0, 1.0]))
        tensor([0., 1.])

    Source:
        He et al. 2015, Deep Residual Learning, sec. 3.3 (plain network).
    """

    def __init__(self, branch: nn.Module, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for the input x."""
        y: Tensor = self.branch(x)
        if self.activation is not None:
            y = self.activation(y)
        return y


@final
class OptionA(nn.Module):
    """The shortcut without parameters where a stage changes shape: every stride-th pixel, new channels all zero.

    Args:
        in_channels: Channels of the input, (N, in_channels, H, W).
        out_channels: Channels of the output, at least `in_channels`; the new ones come last.
        stride: Step of the subsampling, in pixels; the output is (N, out_channels, ceil(H/stride), ceil(W/stride)).

    Raises:
        UsageError: A setting below 1, or fewer channels out than in.

    Example:
        >>> OptionA(1, 2, 2)(torch.arange(4.0).reshape(1, 1, 2, 2)).flatten().tolist()
        [0.0, 0.0]

    Source:
        He et al. 2015, Deep Residual Learning, sec. 3.3, option (A).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, out_channels=out_channels, stride=stride)
        if out_channels < in_channels:
            raise UsageError(
                f"An option-A shortcut only adds channels, but was asked to go from {in_channels} to {out_channels}: "
                f"give at least {in_channels} output channels."
            )
        self.new_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Return the subsampled and padded input."""
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))

    def extra_repr(self) -> str:
        """Return what `print` shows of the settings."""
        return f"new_channels={self.new_channels}, stride={self.stride}"
