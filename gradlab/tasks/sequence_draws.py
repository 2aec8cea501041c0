"""What the sequence tasks share: checks of their settings, and evaluation sets drawn from a seed."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Protocol, Self

import torch

from gradlab.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EVALUATION_SEQUENCES", "SequenceTask", "evaluation_set"]

EVALUATION_SEQUENCES = 20_000
"""Sequences in an evaluation set, unless asked otherwise; see `evaluation_set` for why."""


class SequenceTask(Protocol):
    """What every sequence task can do: the one interface of adding, copy, write/query, recall and pixel digits.

    `input_size` is the number of features of a step, or of different tokens; `outputs` the number of outputs a net
    needs at one step; `head` says whether the targets stand at the "last" step or at "every" step; `baseline` is the
    loss of the best predictor that has no memory, in the unit of `loss`.
    """

    @property
    def device(self) -> torch.device | str: ...
    @property
    def input_size(self) -> int: ...
    @property
    def outputs(self) -> int: ...
    @property
    def head(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def baseline(self) -> float: ...
    def batch(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]: ...
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor: ...
    def to(self, device: torch.device | str) -> Self: ...


def evaluation_set(task: SequenceTask, n: int = EVALUATION_SEQUENCES, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw a set of sequences to evaluate on: the same for one seed on every device, and no training batch's twin.

    How many are enough is a matter of the standard error of the loss. For the adding problem the constant predictor
    1 has squared error d^2, d = u + v - 1 triangular on [-1, 1], with E d^2 = 1/6 and E d^4 = 1/15, so that one
    sequence's error varies with standard deviation sqrt(1/15 - 1/36) = sqrt(7/180) = 0.197. A set of 1,000 thus moves
    the baseline of .1667 by .0062, and "above" or "below" it is decided by the set; at 20,000 the standard error is
    .0014, under 1 % of the baseline. Hence the default.

    Args:
        task: A task whose sequences are generated: adding, copy, write/query or recall.
        n: Sequences. Default 20,000.
        seed: Seed of a CPU generator of its own. It is mixed before use, so a training generator with the same seed
            draws other sequences.

    Returns:
        Inputs and targets, on the task's device.

    Raises:
        UsageError: n is below 1, or the task has a test set of its own (pixel digits).

    Example:
        >>> from gradlab.tasks import AddingTask
        >>> x, y = evaluation_set(AddingTask(length=10))
        >>> x.shape, abs(float(y.var()) - 1 / 6) < 0.006
        (torch.Size([20000, 10, 2]), True)
    """
    if hasattr(task, "test_set"):
        raise UsageError(
            f"{type(task).__name__} draws its batches from training images: evaluate on its test_set() instead."
        )
    # 32 bits, because torch's CPU generator uses no more of a seed.
    mixed = int.from_bytes(hashlib.sha256(f"evaluation {seed}".encode()).digest()[:4], "big")
    x, y = task.to("cpu").batch(n, torch.Generator().manual_seed(mixed))
    return x.to(task.device), y.to(task.device)


def check_whole(least: int, **settings: int) -> None:
    """Raise unless every setting is a whole number of at least `least`."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(f"The setting '{name}' is {value!r}, but must be a whole number of at least {least}.")


def check_probability(**settings: float) -> None:
    """Raise unless every setting lies strictly between 0 and 1."""
    for name, value in settings.items():
        if not (isinstance(value, float | int) and math.isfinite(value) and 0 < value < 1):
            raise UsageError(f"The probability '{name}' is {value!r}, but must lie strictly between 0 and 1.")


def check_draw(n: int, generator: torch.Generator | None, device: torch.device | str) -> torch.Generator | None:
    """Return the generator to draw a batch of n with on a device; None on the meta device, which draws nothing.

    Raises:
        UsageError: n is below 1, or the generator lives on another device.
    """
    check_whole(1, n=n)
    device = torch.device(device)
    if generator is None or device.type == "meta":
        return None
    if generator.device.type != device.type:
        raise UsageError(
            f"The generator is on {generator.device}, but the task on {device}: make it with "
            f"torch.Generator('{device}') or move the task with .to()."
        )
    return generator
