"""Small tensors reduced together: each is copied at once into a row of a slab, and slabs are reduced when they are full.

An operation of torch costs microseconds however small its tensor is, and a row takes several. Copying cannot wait,
since a later in-place operation may change the tensor; reducing the copies can.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final, final

import numpy as np
import numpy.typing as npt
import torch

from gradlab.probes.reduce import (
    ROW,
    SAFE_EXPONENTS,
    SAFE_VARIANCE,
    device_rows,
    exact_row,
    flat_view,
    has_memory,
    is_dense,
    narrow_dtype,
    range_holds_squares,
    spread_of,
    wide_dtype,
)

__all__ = ["ALL", "NORM", "NO_MOMENTS", "DevicePool", "HostPool", "host_rows", "norm_rows"]

#: How much of a row is filled: all of it, all but sum and spread, or what a norm needs.
ALL: Final = 0
NO_MOMENTS: Final = 1
NORM: Final = 2
_SCALE, _SUM, _SQUARES, _SPREAD, _MIN, _MAX, _ZEROS, _NONFINITE = range(len(ROW))

_MOST_ROWS = 256
_HOST_ENTRIES = 1 << 15  # of a tensor that is pooled; with more, copying costs as much as it saves
_HOST_BYTES = 1 << 20  # of a slab, which stays in the second-level cache
_DEVICE_ENTRIES = 1 << 16
_DEVICE_BYTES = 1 << 23
# Below, squares lost to underflow could matter to a norm.
_SAFE_SQUARES = {torch.float32: 1e-25, torch.float64: 1e-290}

_Rows = npt.NDArray[np.float64]
_Values = list[torch.Tensor]


def host_rows(block: torch.Tensor, how: int = ALL, scratch: torch.Tensor | None = None) -> _Rows:
    """Reduce each row of a CPU tensor to a row of `ROW`: shape (k, n), dense, float32 or float64, n > 0.

    Args:
        block: The entries; left as they are.
        how: `ALL`, `NO_MOMENTS` or `NORM`; places not asked for are NaN.
        scratch: Takes intermediate results, shaped like `block`.
    """
    scratch = torch.empty_like(block) if scratch is None else scratch
    if how == NORM:
        rows, unsafe = norm_rows(torch.mul(block, block, out=scratch).sum(1))
        if unsafe.any():
            again = host_rows(block[torch.from_numpy(unsafe)], NO_MOMENTS)
            for place in (_SCALE, _SQUARES, _NONFINITE):
                rows[unsafe, place] = again[:, place]
        return rows
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
    return rows


def norm_rows(squares: torch.Tensor) -> tuple[_Rows, npt.NDArray[np.bool_]]:
    """Return rows with these sums of squares, filled as far as norms need, and which of them left the safe range."""
    rows = np.full((len(squares), len(ROW)), np.nan)
    rows[:, _SCALE], rows[:, _SQUARES], rows[:, _NONFINITE] = 1.0, squares.numpy(), 0.0
    return rows, ~(np.isfinite(rows[:, _SQUARES]) & (rows[:, _SQUARES] >= _SAFE_SQUARES[squares.dtype]))


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


@final
class _HostSlab:
    """Copies of CPU tensors with one number of entries and one dtype."""

    __slots__ = ("_bytes", "_dtype", "_how", "_scratch", "_slab", "_start", "capacity", "slots", "used")

    def __init__(self, entries: int, dtype: torch.dtype, how: int) -> None:
        kept = narrow_dtype(dtype)
        self._bytes, self._dtype, self._how = entries * kept.itemsize, dtype, how
        self.capacity = max(1, min(_MOST_ROWS, _HOST_BYTES // self._bytes))
        self._slab = torch.empty(self.capacity, entries, dtype=kept, device="cpu")
        self._scratch = torch.empty_like(self._slab)
        self._start = self._slab.data_ptr()
        self.slots: list[int] = []
        self.used = False

    def add(self, x: torch.Tensor, slot: int) -> bool:
        """Copy a tensor; return whether the slab is full."""
        at = len(self.slots)
        self.slots.append(slot)
        self.used = True
        if is_dense(x) and has_memory(x) and self._slab.dtype is self._dtype:
            # A tenth of what an operation of torch takes, and autograd does not see it.
            ctypes.memmove(self._start + at * self._bytes, x.data_ptr(), self._bytes)
        else:
            self._slab[at].copy_(flat_view(x.detach()))
        return at + 1 == self.capacity

    def take(self) -> tuple[list[int], _Rows]:
        """Reduce what was copied."""
        slots, self.slots = self.slots, []
        return slots, host_rows(self._slab[: len(slots)], self._how, self._scratch[: len(slots)])


@final
class HostPool:
    """Reduces small CPU tensors together.

    Args:
        put: Takes slots and their rows, once these are known.
    """

    def __init__(self, put: Callable[[list[int], _Rows], None]) -> None:
        self._put = put
        self._slabs: dict[tuple[int, torch.dtype, int], _HostSlab] = {}

    def add(self, x: torch.Tensor, slot: int, how: int) -> bool:
        """Take a real tensor for a slot; False where it is too large, or empty."""
        key = (x.numel(), x.dtype, how)
        slab = self._slabs.get(key)
        if slab is None:
            if not 0 < key[0] <= _HOST_ENTRIES:
                return False
            slab = self._slabs[key] = _HostSlab(*key)
        if slab.add(x, slot):
            self._put(*slab.take())
        return True

    def drain(self) -> None:
        """Hand over all that is left, and let go of memory that this step did not use."""
        for key, slab in list(self._slabs.items()):
            if slab.slots:
                self._put(*slab.take())
            if not slab.used:
                del self._slabs[key]
            slab.used = False

    def discard(self) -> None:
        """Forget what was taken."""
        self._slabs.clear()


@final
class _DeviceSlab:
    """Copies of an accelerator's tensors with one number of entries."""

    __slots__ = ("_places", "slab", "slots", "used")

    def __init__(self, entries: int, dtype: torch.dtype, device: torch.device) -> None:
        capacity = max(1, min(_MOST_ROWS, _DEVICE_BYTES // (entries * dtype.itemsize)))
        self.slab = torch.empty(capacity, entries, dtype=dtype, device=device)
        self._places = self.slab.unbind()
        self.slots: list[int] = []
        self.used = False

    def add(self, flat: torch.Tensor, slot: int) -> bool:
        """Copy a tensor; return whether the slab is full."""
        self._places[len(self.slots)].copy_(flat)
        self.slots.append(slot)
        self.used = True
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
        #: By number of entries and dtype: slots; sums and norms; ends; counts of zeros and of what is not finite.
        self._aside: dict[tuple[int, torch.dtype], tuple[list[int], _Values, _Values, _Values]] = {}

    def add(self, x: torch.Tensor, slot: int) -> None:
        """Take a real tensor for a slot."""
        flat = flat_view(x.detach())
        n, dtype = flat.numel(), flat.dtype
        if 0 < n <= _DEVICE_ENTRIES:
            key = n, narrow_dtype(dtype)
            slab = self._slabs.get(key)
            if slab is None:
                slab = self._slabs[key] = _DeviceSlab(*key, flat.device)
            if slab.add(flat, slot):
                self._reduce(slab)
        elif n and range_holds_squares(dtype, wide_dtype(flat.device)):
            self._put_aside(flat, slot)
        else:
            self._put([slot], device_rows(flat.unsqueeze(0)))

    def _reduce(self, slab: _DeviceSlab) -> None:
        slots, slab.slots = slab.slots, []
        self._put(slots, device_rows(slab.slab[: len(slots)]))

    def _put_aside(self, flat: torch.Tensor, slot: int) -> None:
        slots, sums, ends, counts = self._aside.setdefault((flat.numel(), flat.dtype), ([], [], [], []))
        slots.append(slot)
        sums += flat.sum(dtype=torch.float64), torch.linalg.vector_norm(flat, dtype=torch.float64)
        ends += torch.aminmax(flat)
        counts += (flat == 0).sum(), (flat - flat != 0).sum()  # of NaN and Inf the difference is NaN

    def drain(self) -> None:
        """Hand over all that is left, and let go of memory that this step did not use."""
        for key, slab in list(self._slabs.items()):
            if slab.slots:
                self._reduce(slab)
            if not slab.used:
                del self._slabs[key]
            slab.used = False
        aside, self._aside = self._aside, {}
        for (n, _), (slots, *values) in aside.items():
            sums, ends, counts = (torch.stack(some).to(torch.float64).view(-1, 2) for some in values)
            total, squares = sums[:, 0], sums[:, 1].square()
            rest = [torch.ones_like(total), total, squares, spread_of(total, squares, n)]
            self._put(slots, torch.cat([torch.stack(rest, 1), ends, counts], 1))

    def discard(self) -> None:
        """Forget what was taken."""
        self._slabs.clear()
        self._aside = {}
