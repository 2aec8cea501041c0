"""The adding problem: add two marked numbers of a long sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from gradlab.errors import UsageError
from gradlab.tasks.sequence_draws import check_draw, check_whole

__all__ = ["AddingTask", "adding_baseline"]


def adding_baseline() -> float:
    """Return the mean squared error of the best predictor that does not remember: exactly 1/6.

    The target is u + v, u and v independent and uniform on [0, 1]. Without memory of either the best prediction is
    the mean, 1, and its error the variance:

        Var(u + v) = Var(u) + Var(v) = 1/12 + 1/12 = 1/6

    A net that remembers one of both reaches 1/12. (At the last step v itself may be seen if its mark stands there,
    which happens with probability 2/T or less and is neglected here.)

    Example:
        >>> round(adding_baseline(), 4)
        0.1667

    Source:
        Hochreiter & Schmidhuber 1997, sec. 5.4; Le, Jaitly & Hinton 2015 (arXiv 1504.00941), sec. 4.1 (.167).
    """
    return 1 / 6


@dataclass(frozen=True, kw_only=True, slots=True)
class AddingTask:
    """The adding problem: at the last step, say the sum of the two numbers that were marked.

        x_t = (u_t, m_t),  u_t ~ U(0, 1),  m_t in {0, 1};   y = sum_t m_t u_t

    One mark stands uniformly in each half: the first among the first T // 2 steps, the second among the others.

    Args:
        length: Steps T, at least 2. Default 100.
        device: Where batches are drawn and live. Default: the CPU.
        dtype: Floating-point type of inputs and targets. Default float32.

    Raises:
        UsageError: The length is below 2, which leaves a half without a step, or dtype is no floating-point type.

    Example:
        >>> x, y = AddingTask(length=6).batch(4, torch.Generator().manual_seed(0))
        >>> x.shape, y.shape, torch.allclose(y[:, 0], (x[..., 0] * x[..., 1]).sum(1))
        (torch.Size([4, 6, 2]), torch.Size([4, 1]), True)

    Source:
        Hochreiter & Schmidhuber 1997, sec. 5.4; marks one in each half as in Arjovsky, Shah & Bengio 2016 (arXiv
        1511.06464), sec. 4.
    """

    length: int = 100
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_whole(2, length=self.length)
        if not self.dtype.is_floating_point:
            raise UsageError(f"Numbers to add cannot be {self.dtype}; give a floating-point dtype.")

    @property
    def input_size(self) -> int:
        """Features of a step: the number and its mark."""
        return 2

    @property
    def outputs(self) -> int:
        """Outputs: the sum."""
        return 1

    @property
    def head(self) -> str:
        """Where the target stands."""
        return "last"

    @property
    def steps(self) -> int:
        """Steps of the input."""
        return self.length

    @property
    def baseline(self) -> float:
        """`adding_baseline`."""
        return adding_baseline()

    def to(self, device: torch.device | str) -> AddingTask:
        """Return the task on another device."""
        return replace(self, device=device)

    def batch(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw n fresh sequences on the task's device, without waiting for the host.

        Args:
            n: Sequences, at least 1.
            generator: Source of randomness, on the task's device; without it torch's global one is used.

        Returns:
            Inputs, (n, length, 2), and sums, (n, 1).

        Raises:
            UsageError: n is below 1, or the generator is on another device.
        """
        generator = check_draw(n, generator, self.device)
        device, half = self.device, self.length // 2
        numbers = torch.rand(n, self.length, generator=generator, device=device, dtype=self.dtype)
        first = torch.randint(half, (n, 1), generator=generator, device=device)
        second = half + torch.randint(self.length - half, (n, 1), generator=generator, device=device)
        times = torch.arange(self.length, device=device)
        marked = (times == first) | (times == second)
        x = torch.stack([numbers, marked.to(self.dtype)], dim=2)
        return x, numbers.gather(1, first) + numbers.gather(1, second)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error, a scalar, of outputs and targets, both (n, 1)."""
        return functional.mse_loss(outputs, targets)
