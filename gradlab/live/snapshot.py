"""The latest recorded step in a few numbers: what is drawn, and what a worker sends to the driver."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Final, final

__all__ = ["LayerGroup", "Snapshot", "fold", "offered", "offered_snapshot"]

#: Most groups that a worker sends: more rows than most terminals have, and a flat size for a net of any depth.
SENT_GROUPS: Final = 64
_SENT_NAME = 48  # characters of a layer's path that are sent: its end


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class LayerGroup:
    """Neighbouring layers in execution order, with the range of their gradient norms.

    Args:
        first: Dotted path of the layer nearest the input.
        last: Dotted path of the one nearest the loss; `first` where it is a single layer.
        layers: How many.
        smallest: Smallest finite L2 norm of dL/d(output) among them; NaN where none is known.
        largest: Largest finite one; NaN where none is known.
        nonfinite: Entries of their outputs and output gradients that are NaN or Inf.
    """

    first: str
    last: str
    layers: int
    smallest: float
    largest: float
    nonfinite: int

    def __add__(self, other: LayerGroup) -> LayerGroup:
        """Join with the group that follows."""
        return LayerGroup(
            first=self.first,
            last=other.last,
            layers=self.layers + other.layers,
            smallest=_known(min, self.smallest, other.smallest),
            largest=_known(max, self.largest, other.largest),
            nonfinite=self.nonfinite + other.nonfinite,
        )


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """One recorded step.

    Args:
        step: Its number, from 0.
        groups: The layers in execution order, nearest the input first.
        loss: Its loss; NaN with `has_loss` False where nobody told it.
        has_loss: Whether the loss was told.
        dead_fraction: Share of the units of rectifiers that no sample has switched on so far; NaN where there are none
            or their state lies on an accelerator, for which a look would have to wait.
    """

    step: int
    groups: tuple[LayerGroup, ...]
    loss: float = math.nan
    has_loss: bool = False
    dead_fraction: float = math.nan

    @property
    def layers(self) -> int:
        """Number of layers."""
        return sum(group.layers for group in self.groups)

    @property
    def nonfinite(self) -> int:
        """Entries that are NaN or Inf, in all layers."""
        return sum(group.nonfinite for group in self.groups)

    def compact(self) -> Snapshot:
        """Return it in a size that does not depend on the net: at most 64 groups, and the ends of long paths."""
        groups = [
            replace(group, first=group.first[-_SENT_NAME:], last=group.last[-_SENT_NAME:])
            for group in fold(self.groups, SENT_GROUPS)
        ]
        return replace(self, groups=tuple(groups))


def fold(groups: Sequence[LayerGroup], most: int) -> list[LayerGroup]:
    """Join neighbours until at most `most` groups are left, of sizes as equal as they can be.

    Example:
        >>> one = LayerGroup(first="a", last="a", layers=1, smallest=1.0, largest=1.0, nonfinite=0)
        >>> [group.layers for group in fold([one] * 10, 4)]
        [2, 3, 2, 3]
    """
    count, most = len(groups), max(1, most)
    if count <= most:
        return list(groups)
    folded = []
    for place in range(most):
        joined, *others = groups[place * count // most : (place + 1) * count // most]
        for group in others:
            joined += group
        folded.append(joined)
    return folded


def _known(choose: Callable[[float, float], float], a: float, b: float) -> float:
    return b if math.isnan(a) else a if math.isnan(b) else choose(a, b)


# -- from the training loop to whoever runs it ------------------------------------------------------------------------

_offer: ContextVar[Callable[[], Snapshot | None] | None] = ContextVar("gradlab_live", default=None)


@contextmanager
def offered(latest: Callable[[], Snapshot | None]) -> Iterator[None]:
    """Let `offered_snapshot` ask `latest` while the block runs: nobody in between has to hand it on."""
    token = _offer.set(latest)
    try:
        yield
    finally:
        _offer.reset(token)


def offered_snapshot() -> Snapshot | None:
    """Return the latest recorded step of the training that runs in this context, in a flat size; None without one."""
    latest = _offer.get()
    snapshot = None if latest is None else latest()
    return None if snapshot is None else snapshot.compact()
