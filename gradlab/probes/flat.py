"""Norms of many small tensors at once: they are laid end to end, so that an operation of torch serves them all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from typing import Final, NamedTuple, TypeGuard, final

import numpy as np
import numpy.typing as npt
import torch

from gradlab.probes.reduce import PLAIN, ROW, SAFE_SQUARES, cpu_row

__all__ = ["FEW_ENTRIES", "FlatPlans", "FlatTensors"]

#: Entries of a tensor beyond which an operation of its own costs little.
FEW_ENTRIES: Final = 1 << 14
_DTYPES = (torch.float32, torch.float64)
_NORM_ROW = [1.0, np.nan, np.nan, np.nan, np.nan, np.nan, np.nan, 0.0]
_SQUARES = ROW.index("squares")
_KEPT = 16  # plans
_dtype, _layout, _is_cpu = attrgetter("dtype"), attrgetter("layout"), attrgetter("is_cpu")


@final
class _Plan:
    """Where tensors with these numbers of entries lie: in the order of their numbers."""

    __slots__ = ("_order", "_scratch", "_sums_there", "_views", "places", "sizes")

    @torch.inference_mode(mode=False)
    def __init__(self, sizes: Sequence[int], dtype: torch.dtype) -> None:
        self._order = sorted(range(len(sizes)), key=sizes.__getitem__)
        self.places, self.sizes = np.argsort(self._order), sorted(sizes)
        self._scratch = torch.empty(sum(sizes), dtype=dtype, device="cpu")
        sums = torch.empty(len(sizes), dtype=dtype, device="cpu")
        self._sums_there = sums.numpy()
        self._views: list[tuple[torch.Tensor, torch.Tensor]] = []  # of squares, and where their sums go
        start = first = 0
        for n, group in groupby(self.sizes):
            count = len(list(group))
            end, last = start + count * n, first + count
            self._views.append((self._scratch[start:end].view(count, n), sums[first:last]))
            start, first = end, last

    def lay(self, xs: Sequence[torch.Tensor]) -> torch.Tensor:
        if len(xs) == 1:  # of one tensor alone, torch's own way hands its very memory on
            return xs[0].detach().reshape(-1).clone()
        flat: torch.Tensor = torch._C._nn.flatten_dense_tensors([xs[at] for at in self._order])
        return flat

    def norms(self, flat: torch.Tensor, rows: npt.NDArray[np.float64]) -> None:
        """Fill rows, in the order of their numbers of entries, as far as norms need."""
        torch.mul(flat, flat, out=self._scratch)
        for squares, sums in self._views:
            torch.sum(squares, 1, out=sums)
        rows[:] = _NORM_ROW
        rows[:, _SQUARES] = self._sums_there
        safe = (self._sums_there >= SAFE_SQUARES[flat.dtype]) & (self._sums_there < np.inf)
        if not safe.all():
            parts = flat.split(self.sizes)
            for at in np.flatnonzero(~safe).tolist():
                rows[at] = cpu_row(parts[at], norm_only=True)


class FlatTensors(NamedTuple):
    """The entries of many tensors, end to end."""

    plan: _Plan
    entries: torch.Tensor

    def norms(self, rows: npt.NDArray[np.float64]) -> None:
        """Fill as many rows as far as norms need; `plan.places` tells which is whose."""
        self.plan.norms(self.entries, rows)

    def subtract(self, others: FlatTensors) -> bool:
        """Take as many others off, in place; return whether they are alike."""
        alike = self.plan is others.plan
        if alike:
            self.entries.sub_(others.entries)
        return alike

    def parts(self) -> list[torch.Tensor]:
        """Return the entries of each tensor, in the order they were given."""
        parts = self.entries.split(self.plan.sizes)
        return [parts[place] for place in self.plan.places.tolist()]


def _all_plain(xs: Sequence[torch.Tensor | None]) -> TypeGuard[Sequence[torch.Tensor]]:
    return PLAIN.issuperset(map(type, xs))


@final
class FlatPlans:
    """Lays tensors end to end, and keeps what it worked out for those of a step: the next step has the same."""

    def __init__(self) -> None:
        self._plans: dict[tuple[object, ...], _Plan] = {}

    def lay(self, xs: Sequence[torch.Tensor | None]) -> FlatTensors | None:
        """Copy tensors; None unless they are plain CPU ones of one dtype with at most `FEW_ENTRIES` each.

        Called without autograd.
        """
        if not xs or not _all_plain(xs) or not all(map(_is_cpu, xs)):
            return None
        dtypes, layouts = set(map(_dtype, xs)), set(map(_layout, xs))
        sizes = [x.numel() for x in xs]
        dtype = dtypes.pop()
        if (
            dtypes
            or dtype not in _DTYPES
            or layouts != {torch.strided}
            or not 0 < min(sizes) <= max(sizes) <= FEW_ENTRIES
        ):
            return None
        key = dtype, *sizes
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _KEPT:  # a model whose every step is another
                self._plans.clear()
            plan = self._plans[key] = _Plan(sizes, dtype)
        return FlatTensors(plan, plan.lay(xs))
