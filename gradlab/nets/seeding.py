"""Weights as a function of a seed, whatever the device and without a trace in the global random state."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["weights_from"]


@contextmanager
def weights_from(seed: int | None, model: nn.Module) -> Iterator[None]:
    """Build what the block adds to `model` from a seed: on the CPU, then moved to the default device.

    Args:
        seed: Seed of everything that is drawn in the block; torch's global CPU state is put back after it. None
            draws from the global state, on the default device, as torch's modules do.
        model: The module under construction.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential()
        >>> with weights_from(0, model):
        ...     model.append(nn.Linear(1, 1)).training
        True
    """
    if seed is None:
        yield
        return
    device = torch.get_default_device()
    # torch's modules draw from the global generator only, so it is lent to them; no other device's is touched.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield
    model.to(device)
