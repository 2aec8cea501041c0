"""Norms of many small tensors at once: they are laid end to end, so that an operation of torch serves them all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from typing import Final, NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch

from gradlab.probes.pool import NORM, host_rows, norm_rows
from gradlab.probes.reduce import PLAIN

__all__ = ["FEW_ENTRIES", "FlatPlans", "FlatTensors"]

#: Entries of a tensor beyond which an operation of its own costs little.
FEW_ENTRIES: Final = 1 << 16
_DTYPES = (torch.float32, torch.float64)
_KEPT = 16  # plans
_dtype, _layout, _is_cpu = attrgetter("dtype"), attrgetter("layout"), attrgetter("is_cpu")


@final
class _Plan:
    """Where tensors with these numbers of entries lie: in the order of their numbers."""

    __slots__ = ("_order", "_places", "_scratch", "_sums", "_views")

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype) -> None:
        self._order = sorted(range(len(sizes)), key=sizes.__getitem__)
        self._places = np.argsort(self._order)
        self._scratch = torch.empty(sum(sizes), dtype=dtype, device="cpu")
        self._sums = torch.empty(len(sizes), dtype=dtype, device="cpu")
        self._views: list[tuple[torch.Tensor, torch.Tensor]] = []  # of squares, and where their sums go
        start = first = 0
        for n, group in groupby(sorted(sizes)):
            count = len(list(group))
            end, last = start + count * n, first + count
            self._views.append((self._scratch[start:end].view(count, n), self._sums[first:last]))
            start, first = end, last

    def lay(self, xs: Sequence[torch.Tensor]) -> torch.Tensor:
        flat: torch.Tensor = torch._C._nn.flatten_dense_tensors([xs[at] for at in self._order])
        return flat

    def rows(self, flat: torch.Tensor) -> npt.NDArray[np.float64]:
        torch.mul(flat, flat, out=self._scratch)
        for squares, sums in self._views:
            torch.sum(squares, 1, out=sums)
        rows, unsafe = norm_rows(self._sums)
        if unsafe.any():
            parts = flat.split([n for squares, _ in self._views for n in [squares.shape[1]] * len(squares)])
            for at in np.flatnonzero(unsafe).tolist():
                rows[at] = host_rows(parts[at].unsqueeze(0), NORM)[0]
        ordered: npt.NDArray[np.float64] = rows[self._places]
        return ordered


class FlatTensors(NamedTuple):
    """The entries of many tensors, end to end."""

    plan: _Plan
    entries: torch.Tensor

    def rows(self) -> npt.NDArray[np.float64]:
        """Return a row for each tensor, in the order they were given, filled as far as norms need."""
        return self.plan.rows(self.entries)

    def subtract(self, others: FlatTensors) -> bool:
        """Take as many others off, in place; return whether they are alike."""
        alike = self.plan is others.plan
        if alike:
            self.entries.sub_(others.entries)
        return alike


@final
class FlatPlans:
    """Lays tensors end to end, and keeps what it worked out for those of a step: the next step has the same."""

    def __init__(self) -> None:
        self._plans: dict[tuple[object, ...], _Plan] = {}

    def lay(self, xs: Sequence[torch.Tensor]) -> FlatTensors | None:
        """Copy tensors; None unless they are plain CPU ones of one dtype with at most `FEW_ENTRIES` each.

        Called without autograd.
        """
        if not xs or not (PLAIN.issuperset(map(type, xs)) and all(map(_is_cpu, xs))):
            return None
        dtypes, layouts = set(map(_dtype, xs)), set(map(_layout, xs))
        sizes = [x.numel() for x in xs]
        dtype = dtypes.pop()
        if dtypes or dtype not in _DTYPES or layouts != {torch.strided} or not 0 < min(sizes) <= max(sizes) <= FEW_ENTRIES:
            return None
        key = dtype, *sizes
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _KEPT:  # a model whose every step is another
                self._plans.clear()
            plan = self._plans[key] = _Plan(sizes, dtype)
        return FlatTensors(plan, plan.lay(xs))
