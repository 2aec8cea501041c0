"""The tensors of an accelerator reduced with few launches: small ones together, large ones at once.

A launch costs the host microseconds however small its tensor is, which is what a small net spends its time on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch

from gradlab.probes.pool import NORM, slab_rows
from gradlab.probes.reduce import device_rows, flat_view, narrow_dtype, range_holds_squares, spread_of, wide_dtype

__all__ = ["DevicePool"]

_DEVICE_ENTRIES = 1 << 16  # of a tensor that is copied; a larger one is worth launches of its own
_DEVICE_BYTES = 1 << 23  # of a slab

_Values = list[torch.Tensor]


@final
class _DeviceSlab:
    """Copies of an accelerator's tensors with one number of entries."""

    __slots__ = ("_places", "slab", "slots", "used")

    @torch.inference_mode(mode=False)
    def __init__(self, entries: int, dtype: torch.dtype, device: torch.device, wanted: int) -> None:
        capacity = slab_rows(wanted, _DEVICE_BYTES // (entries * dtype.itemsize))
        self.slab = torch.empty(capacity, entries, dtype=dtype, device=device)
        self._places = self.slab.unbind()
        self.slots: list[int] = []
        self.used = 0  # rows taken in this step

    @property
    def grows(self) -> bool:
        """Whether more rows at once would have been better."""
        entries = self.slab.shape[1] * self.slab.dtype.itemsize
        return len(self._places) < slab_rows(self.used, _DEVICE_BYTES // entries)

    def add(self, flats: _Values, slots: list[int]) -> int:
        """Copy tensors as far as there is room, with one launch; return how many."""
        start = len(self.slots)
        count = min(len(flats), len(self._places) - start)
        if count == 1:
            self._places[start].copy_(flats[0])
        else:
            torch._foreach_copy_(self._places[start : start + count], flats[:count])
        self.slots += slots[:count]
        self.used += count
        return count

    @property
    def full(self) -> bool:
        """Whether there is room for no more."""
        return len(self.slots) == len(self._places)


@final
class DevicePool:
    """Reduces the tensors of one accelerator with few launches, without a branch on data or a transfer.

    Small ones are copied and reduced together. Of larger ones the plain reductions are made at once, and the rows put
    together from them when the step is closed.

    Args:
        put: Takes slots and their rows, a tensor on the device.
    """

    def __init__(self, put: Callable[[list[int], torch.Tensor], None]) -> None:
        self._put = put
        self._slabs: dict[tuple[int, torch.dtype], _DeviceSlab] = {}
        self._wanted: dict[tuple[int, torch.dtype], int] = {}  # rows that the step before needed
        #: By number of entries, dtype and how: slots; norms and sums; counts of what is not finite and of zeros; ends.
        self._aside: dict[tuple[int, torch.dtype, int], tuple[list[int], _Values, _Values, _Values]] = {}

    def add(self, xs: Sequence[torch.Tensor], slots: list[int], how: int) -> None:
        """Take real tensors for slots. Of those that are reduced together rows are filled whatever is asked for."""
        alike: dict[tuple[int, torch.dtype], tuple[_Values, list[int]]] = {}
        for x, slot in zip(xs, slots, strict=True):
            flat = flat_view(x.detach())
            n, dtype = flat.numel(), flat.dtype
            if 0 < n <= _DEVICE_ENTRIES:
                flats, theirs = alike.setdefault((n, narrow_dtype(dtype)), ([], []))
                flats.append(flat)
                theirs.append(slot)
            elif n and range_holds_squares(dtype, wide_dtype(flat.device)):
                self._put_aside(flat, slot, how)
            else:
                self._put([slot], device_rows(flat.unsqueeze(0)))
        for key, (flats, theirs) in alike.items():
            self._add_alike(key, flats, theirs)

    def _add_alike(self, key: tuple[int, torch.dtype], flats: _Values, slots: list[int]) -> None:
        slab = self._slabs.get(key)
        if slab is None:
            wanted = max(self._wanted.pop(key, 0), len(flats))
            slab = self._slabs[key] = _DeviceSlab(*key, flats[0].device, wanted)
        while flats:
            done = slab.add(flats, slots)
            flats, slots = flats[done:], slots[done:]
            if slab.full:
                self._reduce(slab)

    def _reduce(self, slab: _DeviceSlab) -> None:
        slots, slab.slots = slab.slots, []
        self._put(slots, device_rows(slab.slab[: len(slots)]))

    def _put_aside(self, flat: torch.Tensor, slot: int, how: int) -> None:
        slots, sums, counts, ends = self._aside.setdefault((flat.numel(), flat.dtype, how), ([], [], [], []))
        slots.append(slot)
        sums.append(torch.linalg.vector_norm(flat, dtype=torch.float64))
        counts.append((flat - flat != 0).sum())  # of NaN and Inf the difference is NaN
        if how != NORM:
            sums.append(flat.sum(dtype=torch.float64))
            counts.append((flat == 0).sum())
            ends += torch.aminmax(flat)

    def drain(self) -> None:
        """Hand over all that is left, and let go of memory that this step did not use."""
        for slab in self._slabs.values():
            if slab.slots:
                self._reduce(slab)
        self._wanted = {key: slab.used for key, slab in self._slabs.items() if slab.grows}
        self._slabs = {key: slab for key, slab in self._slabs.items() if slab.used and not slab.grows}
        for slab in self._slabs.values():
            slab.used = 0
        aside, self._aside = self._aside, {}
        for (n, _, how), (slots, *values) in aside.items():
            known = [torch.stack(some).to(torch.float64).view(len(slots), -1).unbind(1) for some in values if some]
            squares = known[0][0].square()
            one, none = torch.ones_like(squares), torch.full_like(squares, float("nan"))
            if how == NORM:
                row = [one, none, squares, none, none, none, none, known[1][0]]
            else:
                (_, total), (nonfinite, zeros), (low, high) = known
                row = [one, total, squares, spread_of(total, squares, n), low, high, zeros, nonfinite]
            self._put(slots, torch.stack(row, 1))

    def discard(self) -> None:
        """Forget what was taken."""
        self._slabs.clear()
        self._wanted.clear()
        self._aside = {}
