"""Delayed recall: name the first token at the last step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from gradlab.tasks.sequence_draws import check_draw, check_whole

__all__ = ["RecallTask", "recall_baseline"]


def recall_baseline(symbols: int) -> float:
    """Return the cross-entropy of the best predictor without memory, ln S: S symbols are equally likely.

    Args:
        symbols: Different symbols, S, at least 2.

    Returns:
        The loss, in nats.

    Raises:
        UsageError: Fewer than 2 symbols.

    Example:
        >>> round(recall_baseline(2), 4)
        0.6931
    """
    check_whole(2, symbols=symbols)
    return math.log(symbols)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallTask:
    """Delayed last-step recall: the first token is a symbol, the others say nothing; at the last step, name it.

    The whole gradient must pass from the last step to the first, length - 1 steps, and there are no short gaps to
    learn from.

    Args:
        length: Steps, at least 2. Default 100.
        symbols: Different symbols S, at least 2. Default 2.
        distractors: Whether later tokens are drawn uniformly from S distractors (the default) or are all one blank.
            Symbols are tokens 0 to S - 1, distractors S to 2 S - 1, the blank S.
        device: Where batches are drawn and live. Default: the CPU.

    Raises:
        UsageError: The length or the number of symbols is below 2.

    Example:
        >>> x, y = RecallTask(length=5, symbols=3).batch(2, torch.Generator().manual_seed(0))
        >>> torch.equal(x[:, 0], y), bool((x[:, 1:] >= 3).all())
        (True, True)

    Source:
        The latch problem of Bengio, Simard & Frasconi 1994, sec. 2, with discrete tokens.
    """

    length: int = 100
    symbols: int = 2
    distractors: bool = True
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        check_whole(2, length=self.length, symbols=self.symbols)

    @property
    def input_size(self) -> int:
        """Different tokens."""
        return 2 * self.symbols if self.distractors else self.symbols + 1

    @property
    def outputs(self) -> int:
        """Classes: the symbols."""
        return self.symbols

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
        """`recall_baseline` of these settings."""
        return recall_baseline(self.symbols)

    def to(self, device: torch.device | str) -> RecallTask:
        """Return the task on another device."""
        return replace(self, device=device)

    def batch(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw n fresh sequences on the task's device, without waiting for the host.

        Args:
            n: Sequences, at least 1.
            generator: Source of randomness, on the task's device; without it torch's global one is used.

        Returns:
            Tokens, int64, (n, length), and the first symbols, int64, (n,).

        Raises:
            UsageError: n is below 1, or the generator is on another device.
        """
        generator = check_draw(n, generator, self.device)
        y = torch.randint(self.symbols, (n,), generator=generator, device=self.device)
        kinds = self.symbols if self.distractors else 1
        rest = torch.randint(kinds, (n, self.length - 1), generator=generator, device=self.device)
        return torch.cat([y[:, None], self.symbols + rest], dim=1), y

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats of logits (n, symbols) and classes (n,)."""
        return functional.cross_entropy(outputs, targets)
