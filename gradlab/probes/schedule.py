"""Which steps are recorded."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import SupportsIndex

from gradlab.errors import UsageError

__all__ = ["Schedule", "as_schedule", "log_spaced"]

#: Says whether a step, counted from 0, is recorded.
Schedule = Callable[[int], bool]


def log_spaced(steps: int, count: int) -> Schedule:
    """Record about `count` of `steps` steps, dense early and sparse late; the first and the last always.

    The steps are 0 and the rounded points of a geometric series from 1 to `steps` - 1. Initialization shows at
    step 0 and the fastest change happens right after it, so that is where the points are.

    Args:
        steps: Steps of the whole run, at least 1.
        count: Steps to record, at least 2; fewer come out where rounding makes points fall together.

    Raises:
        UsageError: `steps` or `count` is too small.

    Example:
        >>> schedule = log_spaced(100, 5)
        >>> [step for step in range(100) if schedule(step)]
        [0, 1, 5, 21, 99]
    """
    whole = isinstance(steps, SupportsIndex) and isinstance(count, SupportsIndex)
    if not whole or steps < 1 or count < 2:
        raise UsageError(
            f"log_spaced needs whole numbers steps >= 1 and count >= 2; got steps={steps!r} and count={count!r}."
        )
    last = steps - 1
    if last < 1:
        return frozenset({0}).__contains__
    points = {round(last ** (k / max(count - 2, 1))) for k in range(count - 1)}
    return frozenset({0, last, *points}).__contains__


def as_schedule(every: int | Schedule) -> Schedule:
    """Return `every` as a schedule; an int k records steps 0, k, 2k, ...

    Raises:
        UsageError: `every` is neither a positive int nor callable.
    """
    if callable(every):
        return every
    k = operator.index(every) if isinstance(every, SupportsIndex) and not isinstance(every, bool) else 0
    if k < 1:
        raise UsageError(f"every={every!r} is not a positive whole number of steps or a schedule such as log_spaced.")
    return lambda step: step % k == 0
