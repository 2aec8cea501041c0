"""A series in which letters are written now and then: say the last one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from gradlab.tasks.sequence_draws import check_draw, check_probability, check_whole

__all__ = ["WriteQueryTask", "write_query_bayes_loss"]

_BLANK, _A, _B, _QUERY = range(4)


def write_query_bayes_loss(k: int, p_write: float) -> float:
    """Return the least cross-entropy that a predictor of the last letter can have from the last k tokens.

        ln 2 (1 - p_write)^k

    The answer is the last letter written. If any of the k tokens before the query is a letter, the last of them is
    the answer and the loss 0. Each token is blank with probability 1 - p_write independently, so none of them is a
    letter with probability (1 - p_write)^k; the answer was then written earlier, both letters are equally likely
    given what is seen, and no prediction does better than ln 2. (The window must lie within the series: one that
    reaches its first token, always a letter, has loss 0. `WriteQueryTask.bayes_loss` knows.)

    Args:
        k: Tokens before the query that the predictor sees, at least 1.
        p_write: Probability that a token is a letter, strictly between 0 and 1.

    Returns:
        The loss, in nats.

    Raises:
        UsageError: k is below 1 or p_write not strictly between 0 and 1.

    Example:
        >>> [round(write_query_bayes_loss(k, 0.05), 4) for k in (1, 2, 4, 8)]
        [0.6585, 0.6256, 0.5646, 0.4598]
    """
    check_whole(1, k=k)
    check_probability(p_write=p_write)
    return math.log(2) * (1 - p_write) ** k


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteQueryTask:
    """The write/query series: each token is a letter, A or B, with probability p_write; what was the last one?

    Tokens: 0 blank, 1 A, 2 B, 3 query; classes: 0 A, 1 B. The first token is always a letter, so that the answer
    exists; each later one is A or B with probability p_write / 2 each.

    Args:
        length: Tokens of the series, at least 2. Default 64.
        p_write: Probability of a letter, strictly between 0 and 1. Default 0.05: the memory must last 20 tokens on
            average.
        query: Whether the query token is appended. The question always comes at the end, so it tells a net nothing
            and takes a place in the window of `MarkovNet`: without it (the default) `MarkovNet(k)` sees k tokens of
            the series and has the Bayes loss `write_query_bayes_loss(k, p_write)`; with it, k - 1.
        device: Where batches are drawn and live. Default: the CPU.

    Raises:
        UsageError: The length is below 2, or p_write not strictly between 0 and 1.

    Note:
        A tanh net solves this task, by latching and through the many short gaps: it shows what a window forgets, not
        that gradients vanish.

    Example:
        >>> x, y = WriteQueryTask(length=5, p_write=0.4).batch(2, torch.Generator().manual_seed(0))
        >>> x.shape, y.shape
        (torch.Size([2, 5]), torch.Size([2]))
    """

    length: int = 64
    p_write: float = 0.05
    query: bool = False
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        check_whole(2, length=self.length)
        check_probability(p_write=self.p_write)

    @property
    def input_size(self) -> int:
        """Different tokens: blank, A, B and query."""
        return 4

    @property
    def outputs(self) -> int:
        """Classes: A and B."""
        return 2

    @property
    def head(self) -> str:
        """Where the target stands."""
        return "last"

    @property
    def steps(self) -> int:
        """Steps of the input."""
        return self.length + self.query

    @property
    def baseline(self) -> float:
        """Loss of a guess: ln 2."""
        return math.log(2)

    def to(self, device: torch.device | str) -> WriteQueryTask:
        """Return the task on another device."""
        return replace(self, device=device)

    def batch(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw n fresh series on the task's device, without waiting for the host.

        Args:
            n: Sequences, at least 1.
            generator: Source of randomness, on the task's device; without it torch's global one is used.

        Returns:
            Tokens, int64, (n, steps), and the classes of the last letters, int64, (n,).

        Raises:
            UsageError: n is below 1, or the generator is on another device.
        """
        generator = check_draw(n, generator, self.device)
        shape, device = (n, self.length), self.device
        written = torch.rand(shape, generator=generator, device=device) < self.p_write
        written[:, 0] = True
        letters = torch.randint(_A, _B + 1, shape, generator=generator, device=device)
        x = letters * written
        times = torch.arange(self.length, device=device)
        last = (times * written).amax(1, keepdim=True)
        y = letters.gather(1, last).squeeze(1) - _A
        if self.query:
            x = torch.cat([x, torch.full((n, 1), _QUERY, dtype=torch.int64, device=device)], dim=1)
        return x, y

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats of logits (n, 2) and classes (n,)."""
        return functional.cross_entropy(outputs, targets)

    def bayes_loss(self, window: int) -> float:
        """Return the least loss of a predictor that sees the last `window` steps of the input.

        As `write_query_bayes_loss`, less the query's own place, and 0 where the window reaches the first token.

        Args:
            window: Steps, at least 1.

        Returns:
            The loss, in nats.

        Raises:
            UsageError: The window is below 1.
        """
        check_whole(1, window=window)
        k = window - self.query
        if k >= self.length:
            return 0.0
        return self.baseline if k == 0 else write_query_bayes_loss(k, self.p_write)

    def look_up(self, x: Tensor, window: int) -> Tensor:
        """Return the best prediction from the last `window` steps: what the exact table of all contexts says.

        Args:
            x: Inputs of this task, int64, (n, steps).
            window: Steps, at least 1.

        Returns:
            Probabilities of A and B, float32, (n, 2): 1 for the last letter in the window, 1/2 each if there is none.

        Raises:
            UsageError: The window is below 1.
        """
        check_whole(1, window=window)
        seen = x[:, -window:]
        is_letter = (seen == _A) | (seen == _B)
        times = torch.arange(1, seen.shape[1] + 1, device=x.device)
        last = (times * is_letter).amax(1, keepdim=True)  # 0 where the window holds no letter
        letter = seen.gather(1, (last - 1).clamp(min=0))
        certain = letter == torch.arange(_A, _B + 1, device=x.device)
        return torch.where(last > 0, certain.float(), 0.5)
