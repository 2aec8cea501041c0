"""Small tensors reduced together: each is copied at once into a row of a slab, which is reduced when it is full.

An operation of torch costs microseconds however small its tensor is, and a row takes several. Copying cannot wait,
since a later in-place operation may change the tensor; reducing the copies can.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final, Protocol, final

import numpy as np
import numpy.typing as npt
import torch

from gradlab.probes.reduce import (
    ROW,
    SAFE_EXPONENTS,
    SAFE_SQUARES,
    SAFE_VARIANCE,
    address_of,
    exact_row,
    flat_view,
    narrow_dtype,
    spread_of,
)

__all__ = ["ALL", "NORM", "NO_MOMENTS", "HostPool", "Unit", "host_rows", "slab_rows"]

#: How much of a row is filled: all of it, all but sum and spread, or what a norm needs.
ALL: Final = 0
NO_MOMENTS: Final = 1
NORM: Final = 2
_SCALE, _SUM, _SQUARES, _SPREAD, _MIN, _MAX, _ZEROS, _NONFINITE = range(len(ROW))

_MOST_ROWS = 256  # of a slab
_FEW_ROWS = 8  # of one whose need is not known: memory is what the last step has shown to be of use
_HOST_ENTRIES = 1 << 13  # of a tensor that is pooled; with more, copying costs as much as it saves
_HOST_BYTES = 1 << 19  # of a slab, which stays in the second-level cache

_memmove = ctypes.memmove
_RAW = 5  # least, largest, zeros, sum, sum of squares

_Rows = npt.NDArray[np.float64]
_Places = npt.NDArray[np.int64]


class Unit(Protocol):
    """Keeps the largest entry so far of each channel."""

    top: torch.Tensor
    channels: int
    inner: int  # entries in a row that belong to one channel

    def settle(self) -> None:
        """Told after `top` was updated."""


def host_rows(block: torch.Tensor, how: int) -> _Rows:
    """Reduce each row of a CPU tensor to a row of `ROW`: shape (k, n), dense, float32 or float64, n > 0.

    Args:
        block: The entries; left as they are.
        how: `ALL`, `NO_MOMENTS` or `NORM`; places not asked for are NaN.
    """
    scratch = torch.empty_like(block)
    rows = np.full((len(block), len(ROW)), np.nan)
    rows[:, _SCALE], rows[:, _NONFINITE] = 1.0, 0.0
    ends = torch.stack([block.amin(1), block.amax(1), torch.eq(block, 0, out=scratch).sum(1)])
    rows[:, [_MIN, _MAX, _ZEROS]] = ends.numpy().T
    by = _powers(np.maximum(-rows[:, _MIN], rows[:, _MAX]), block.dtype)
    x = block
    if (by != 1).any():
        rows[:, _SCALE] = 1 / by
        x = torch.mul(block, torch.from_numpy(by).to(block.dtype).unsqueeze(1), out=scratch)
    if how == ALL:
        rows[:, _SUM] = x.sum(1).numpy()
    rows[:, _SQUARES] = torch.mul(x, x, out=scratch).sum(1).numpy()
    if how == ALL:
        _add_spread(rows, block, by)
    for at in np.flatnonzero(~np.isfinite(rows[:, _SQUARES])).tolist():
        rows[at] = exact_row(block[at])
    if how == NORM:
        rows[:, [_MIN, _MAX, _ZEROS]] = np.nan
    return rows


def _powers(top: _Rows, dtype: torch.dtype) -> _Rows:
    """Return the power of two that brings each largest entry to about 1, or 1 where no square leaves the range."""
    least, most, largest = SAFE_EXPONENTS[dtype]
    usable = np.isfinite(top) & (top > 0)
    exponents = np.frexp(np.where(usable, top, 1.0))[1]
    safe = (exponents > least) & (exponents < most)
    return np.ldexp(1.0, np.where(safe, 0, np.clip(-exponents, -largest, largest)))


def _add_spread(rows: _Rows, block: torch.Tensor, by: _Rows) -> None:
    """Fill in the spread, of entries about their mean where it would have lost its digits to cancellation."""
    n = block.shape[1]
    with np.errstate(invalid="ignore", over="ignore"):
        rows[:, _SPREAD] = spread = rows[:, _SQUARES] - rows[:, _SUM] ** 2 / n
        lost = (spread <= SAFE_VARIANCE[block.dtype] * rows[:, _SQUARES]) & (rows[:, _SQUARES] > 0)
    lost &= np.isfinite(rows[:, _SQUARES])
    if lost.any():
        about = block[torch.from_numpy(lost)].double().mul_(torch.from_numpy(by[lost]).unsqueeze(1))
        mean = about.mean(1)
        about.sub_(mean.unsqueeze(1))
        rest = about.sum(1)
        rows[lost, _SUM] = (mean * n + rest).numpy()
        rows[lost, _SPREAD] = spread_of(rest, about.square_().sum(1), n).numpy()


def slab_rows(wanted: int, fit: int) -> int:
    """Return the rows of a slab for a step that needs so many, of which so many fit into what a slab may take."""
    return max(1, min(_MOST_ROWS, fit, max(wanted, _FEW_ROWS)))


@final
class _HostSlab:
    """Copies of CPU tensors with one number of entries and one dtype.

    Where squares left the range in the step before (gradients that vanish), the row is multiplied by the power of two
    that was right then before it is read: tensors come in the same order each step, and a wrong one is found out.
    """

    __slots__ = (
        "_raw", "_scratch", "_views", "by", "bytes", "capacity", "copies", "how", "slab", "slots", "start", "units",
        "used",
    )  # fmt: skip

    @torch.inference_mode(mode=False)  # what is made in that mode cannot be written to outside of it
    def __init__(self, entries: int, dtype: torch.dtype, how: int, wanted: int) -> None:
        kept = narrow_dtype(dtype)
        self.bytes, self.copies, self.how = entries * kept.itemsize, kept is dtype, how
        self.capacity = slab_rows(wanted, _HOST_BYTES // self.bytes)
        self.slab = torch.empty(self.capacity, entries, dtype=kept, device="cpu")
        self._scratch = torch.empty_like(self.slab)
        self._raw = torch.full((_RAW, self.capacity), float("nan"), dtype=kept, device="cpu")
        self.start = self.slab.data_ptr()
        self._views: tuple[torch.Tensor, ...] = ()
        self.by: torch.Tensor | None = None
        self.slots: list[int] = []
        self.units: list[tuple[int, Unit]] = []  # places of rectifiers' outputs, and who keeps their largest entries
        self.used = 0  # rows reduced in this step

    @property
    def grows(self) -> bool:
        """Whether more rows at once would have been better."""
        return self.capacity < slab_rows(self.used, _HOST_BYTES // self.bytes)

    def read(self) -> torch.Tensor:
        """Return the plain reductions of what was copied, shape (`_RAW`, k): right where squares stay in range."""
        k = len(self.slots)
        if not self._views or len(self._views[0]) != k:
            with torch.inference_mode(mode=False):
                self._views = (self.slab[:k], self._scratch[:k], self._raw[:, :k], *(raw[:k] for raw in self._raw))
        block, scratch, raws, low, high, zeros, total, squares = self._views
        if self.how != NORM:
            torch.amin(block, 1, out=low)
            torch.amax(block, 1, out=high)
            torch.sum(torch.eq(block, 0, out=scratch), 1, out=zeros)
        x = block if self.by is None else torch.mul(block, self.by[:k], out=scratch)
        if self.how == ALL:
            torch.sum(x, 1, out=total)
        torch.sum(torch.mul(x, x, out=scratch), 1, out=squares)
        return raws

    def tell_units(self) -> None:
        """Tell the units that follow what was copied the largest entry of each of their channels."""
        alike: dict[tuple[int, int], list[tuple[int, Unit]]] = {}
        for at, unit in self.units:
            alike.setdefault((unit.channels, unit.inner), []).append((at, unit))
        self.units = []
        for (channels, inner), some in alike.items():
            block = self.slab[: len(self.slots)].view(len(self.slots), -1, channels, inner)
            most = (block.squeeze(3) if inner == 1 else block.amax(3)).amax(1)
            torch._foreach_maximum_([unit.top for _, unit in some], [most[at] for at, _ in some])
            for _, unit in some:
                unit.settle()

    def again(self, which: _Places) -> _Rows:
        """Reduce some of the rows with care, and remember by what the next step should multiply them."""
        block = self.slab[torch.from_numpy(which)]
        rows = host_rows(block, self.how)
        norms = rows[:, _SCALE] * np.sqrt(rows[:, _SQUARES] / block.shape[1])
        by = torch.from_numpy(_powers(norms, block.dtype)).to(block.dtype)
        if self.by is None and bool((by != 1).any()):
            with torch.inference_mode(mode=False):
                self.by = torch.ones(self.capacity, 1, dtype=block.dtype, device="cpu")
        if self.by is not None:
            self.by[torch.from_numpy(which), 0] = by
        return rows

    def scales(self) -> _Rows:
        """Return what has to be multiplied with the sums that were read."""
        k = len(self.slots)
        return np.ones(k) if self.by is None else 1 / self.by[:k, 0].double().numpy()


@final
class HostPool:
    """Reduces small CPU tensors together.

    Args:
        put: Takes slots and their rows, once these are known.
    """

    def __init__(self, put: Callable[[list[int], _Rows], None]) -> None:
        self._put = put
        self._slabs: dict[tuple[int, torch.dtype, int], _HostSlab] = {}
        self._wanted: dict[tuple[int, torch.dtype, int], int] = {}  # rows that the step before needed
        self._last: _HostSlab | None = None

    def add(self, x: torch.Tensor, slot: int, how: int) -> bool:
        """Take a real tensor for a slot; False where it is too large, or empty."""
        key = (x.numel(), x.dtype, how)
        slab = self._slabs.get(key)
        if slab is None:
            if not 0 < key[0] <= _HOST_ENTRIES:
                return False
            slab = self._slabs[key] = _HostSlab(*key, self._wanted.pop(key, 0))
        slots = slab.slots
        at = len(slots)
        slots.append(slot)
        if slab.copies and (address := address_of(x)):
            # A fraction of what an operation of torch takes, and autograd does not see it.
            _memmove(slab.start + at * slab.bytes, address, slab.bytes)
        else:
            slab.slab[at].copy_(flat_view(x.detach()))
        if at + 1 == slab.capacity:
            self._reduce([(key, slab)])
        self._last = slab
        return True

    def follow(self, slot: int, unit: Unit) -> bool:
        """Have a unit told the largest entries of the tensor taken last, if that is in this slot and still a copy."""
        slab = self._last
        there = slab is not None and bool(slab.slots) and slab.slots[-1] == slot and slab.copies
        if there and slab is not None:
            slab.units.append((len(slab.slots) - 1, unit))
        return there

    def _reduce(self, slabs: list[tuple[tuple[int, torch.dtype, int], _HostSlab]]) -> None:
        """Reduce slabs, all at once as far as the host has to look at numbers."""
        slots = [slot for _, slab in slabs for slot in slab.slots]
        counts = [len(slab.slots) for _, slab in slabs]
        rows = np.full((len(slots), len(ROW)), np.nan)
        rows[:, _SCALE] = np.concatenate([slab.scales() for _, slab in slabs])
        raw = np.concatenate([slab.read().numpy() for _, slab in slabs], axis=1, dtype=np.float64)
        rows[:, _MIN], rows[:, _MAX], rows[:, _ZEROS], total, squares = raw
        rows[:, _SUM], rows[:, _SQUARES], rows[:, _NONFINITE] = total, squares, 0.0
        limits = [
            (n, SAFE_SQUARES[narrow_dtype(dtype)], SAFE_VARIANCE[narrow_dtype(dtype)], how)
            for (n, dtype, how), _ in slabs
        ]
        n, least, share, how = np.repeat(np.array(limits), counts, axis=0).T
        with np.errstate(invalid="ignore", over="ignore"):
            rows[:, _SPREAD] = spread = squares - total * total / n
            good = (squares >= least) & (squares < np.inf) & ((how != ALL) | (spread > share * squares))
        good |= (rows[:, _MIN] == 0) & (rows[:, _MAX] == 0)
        if not good.all():
            end = 0
            for (_, slab), count in zip(slabs, counts, strict=True):
                start, end = end, end + count
                bad = np.flatnonzero(~good[start:end])
                if len(bad):
                    rows[start + bad] = slab.again(bad)
        self._put(slots, rows)
        for _, slab in slabs:
            if slab.units:
                slab.tell_units()
            slab.used += len(slab.slots)
            slab.slots = []

    def drain(self) -> None:
        """Hand over all that is left, and let go of memory that this step did not use."""
        left = [item for item in self._slabs.items() if item[1].slots]
        if left:
            self._reduce(left)
        self._wanted = {key: slab.used for key, slab in self._slabs.items() if slab.grows}
        self._slabs = {key: slab for key, slab in self._slabs.items() if slab.used and not slab.grows}
        for slab in self._slabs.values():
            slab.used = 0

    def discard(self) -> None:
        """Forget what was taken."""
        self._slabs.clear()
        self._wanted.clear()
        self._last = None
