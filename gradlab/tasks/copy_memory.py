"""Copy memory: repeat ten symbols after a long pause."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from gradlab.tasks.sequence_draws import check_draw, check_whole

__all__ = ["CopyTask", "copy_baseline"]


def copy_baseline(T: int, *, remember: int = 10, symbols: int = 8) -> float:
    """Return the cross-entropy of the best predictor without memory: K ln S / (T + 2 K), in nats a step.

    The sequence has T + 2 K steps, K = `remember`. For the first T + K of them the target is the blank, which is
    predicted with certainty (loss 0), as the delimiter tells when the recall begins. The K symbols are independent
    and uniform on S = `symbols` values: without memory the best guess is 1/S each, which costs ln S. The mean over
    the steps is K ln S / (T + 2 K); for 8 symbols and 10 to remember, 10 ln 8 / (T + 20).

    Args:
        T: Length of the pause, in steps, at least 1: the recall begins T + K steps after the first symbol.
        remember: Symbols to remember, K. Default 10, the papers'.
        symbols: Different symbols, S, at least 2. Default 8, the papers'.

    Raises:
        UsageError: A number is too small.

    Example:
        >>> round(copy_baseline(100), 4)
        0.1733

    Source:
        Arjovsky, Shah & Bengio 2016 (arXiv 1511.06464), sec. 4.1.
    """
    check_whole(1, T=T, remember=remember)
    check_whole(2, symbols=symbols)
    return remember * math.log(symbols) / (T + 2 * remember)


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyTask:
    """Copy memory: read K symbols, wait, and at a delimiter repeat them in order.

        step            1 .. K     K+1 .. K+T-1   K+T         K+T+1 .. 2K+T
        input token     symbols    blanks         delimiter   blanks
        target          blanks     blanks         blank       symbols

    Tokens: 0 the blank, 1 to S the symbols, S + 1 the delimiter (input only).

    Args:
        T: Length of the pause, at least 1 (the delimiter is its last step). Default 100.
        remember: Symbols to remember, K, at least 1. Default 10, the papers'.
        symbols: Different symbols, S, at least 2. Default 8, the papers'.
        device: Where batches are drawn and live. Default: the CPU.

    Raises:
        UsageError: A number is too small.

    Example:
        >>> x, y = CopyTask(T=3, remember=2).batch(1, torch.Generator().manual_seed(0))
        >>> x.tolist(), y.tolist()
        ([[5, 8, 0, 0, 9, 0, 0]], [[0, 0, 0, 0, 0, 5, 8]])

    Source:
        Hochreiter & Schmidhuber 1997; in this form Arjovsky, Shah & Bengio 2016 (arXiv 1511.06464), sec. 4.1.
    """

    T: int = 100
    remember: int = 10
    symbols: int = 8
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        copy_baseline(self.T, remember=self.remember, symbols=self.symbols)  # checks all three

    @property
    def input_size(self) -> int:
        """Different tokens: blank, symbols and delimiter."""
        return self.symbols + 2

    @property
    def outputs(self) -> int:
        """Classes of a target: blank and symbols."""
        return self.symbols + 1

    @property
    def head(self) -> str:
        """Where the targets stand."""
        return "every"

    @property
    def steps(self) -> int:
        """Steps of the input, T + 2 K."""
        return self.T + 2 * self.remember

    @property
    def baseline(self) -> float:
        """`copy_baseline` of these settings."""
        return copy_baseline(self.T, remember=self.remember, symbols=self.symbols)

    def to(self, device: torch.device | str) -> CopyTask:
        """Return the task on another device."""
        return replace(self, device=device)

    def batch(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw n fresh sequences on the task's device, without waiting for the host.

        Args:
            n: Sequences, at least 1.
            generator: Source of randomness, on the task's device; without it torch's global one is used.

        Returns:
            Input tokens and target classes, int64, both (n, T + 2 K).

        Raises:
            UsageError: n is below 1, or the generator is on another device.
        """
        generator = check_draw(n, generator, self.device)
        shape, device = (n, self.remember), self.device
        letters = 1 + torch.randint(self.symbols, shape, generator=generator, device=device)
        blanks = torch.zeros(n, self.T + self.remember, dtype=torch.int64, device=device)
        x = torch.cat([letters, blanks], dim=1)
        x[:, self.remember + self.T - 1] = self.symbols + 1
        return x, torch.cat([blanks, letters], dim=1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy in nats, the mean over all steps, of logits (n, steps, outputs)."""
        return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())
