"""Counting what a net holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["parameter_count"]


def parameter_count(model: nn.Module) -> int:
    """Return the number of scalar parameters of a model.

    Args:
        model: Any module, on any device (the meta device too, where nothing is allocated).

    Returns:
        Entries of all parameters, frozen ones included and shared ones counted once. Buffers (running statistics of
        BatchNorm) are no parameters.

    Example:
        >>> from torch import nn
        >>> parameter_count(nn.Linear(4, 3))
        15
    """
    return sum(parameter.numel() for parameter in model.parameters())
