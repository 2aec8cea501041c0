"""Where the rows of a step lie: host memory that the kernel writes to, and a tensor on each accelerator."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch

from gradlab.probes import native
from gradlab.probes.flat import FEW_ENTRIES
from gradlab.probes.reduce import ROW, address_of, wide_dtype

__all__ = ["MISSING", "NONE", "DeviceRows", "HostRows", "PlainRows"]

#: Stands for the slot of what was not read, or has to go another way.
NONE = -1
#: Stands for the slot of a gradient that is None.
MISSING = -2
_ROW_BYTES = 8 * len(ROW)


@final
class DeviceRows:
    """Rows of one accelerator: a preallocated tensor that grows by doubling between steps."""

    @torch.inference_mode(mode=False)  # what is made in that mode cannot be written to outside of it
    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.full((256, len(ROW)), float("nan"), device=device, dtype=wide_dtype(device))
        self.slots: list[int] = []  # slot of each row in use

    def put_rows(self, slots: Sequence[int], rows: torch.Tensor) -> None:
        self.next_rows(slots).copy_(rows)

    def next_rows(self, slots: Sequence[int]) -> torch.Tensor:
        first = len(self.slots)
        self.slots += slots
        while len(self.slots) > len(self.tensor):
            with torch.inference_mode(mode=False):
                self.tensor = torch.cat([self.tensor, torch.full_like(self.tensor, float("nan"))])
        return self.tensor[first : len(self.slots)]


@final
class PlainRows:
    """Takes slots for tensors that need no other way than the kernel's: the way through Python (in C: hooks.c).

    -1 stands for a tensor that has to go another way.
    """

    def __init__(self, address: Callable[[int], int]) -> None:
        self.slots = self.span = 0
        self.gradients_are_shared = False  # here each is read by whoever needs it
        self._address, self._kernel = address, native.kernel()

    def place(self, base: int, capacity: int) -> None:
        """Take where rows lie: asked for each time here."""

    def take(self, count: int) -> int:
        """Take so many slots and return the first."""
        first = self.slots
        self.slots = first + count
        return first

    def reduce(self, x: torch.Tensor, how: int) -> int:
        """Reduce a tensor: 0 for all statistics, 1 without moments, 2 for its norm."""
        if self._kernel is None or not _is_plain(x):
            return -1
        slot = self.slots
        self.slots = slot + 1
        if how == 2:
            self._kernel.norm_at(x.data_ptr(), None, x.numel(), self._address(slot))
        else:
            self._kernel.row_at(x.data_ptr(), x.numel(), how == 0, self._address(slot))
        return slot

    def reduce_shared(self, _: torch.Tensor) -> int:
        return -1

    def same_gradient(self, _: torch.Tensor, _slot: int) -> int:
        return -1

    def parameters(self, params: list[torch.Tensor]) -> bytes:
        slots = np.full((len(params), 2), NONE)
        for at, param in enumerate(params):
            grad = param.grad
            if grad is None:
                slots[at, 1] = MISSING
            # Small ones are not for the kernel: many at once cost less than a call from Python for each.
            if self._kernel is not None and param.numel() > FEW_ENTRIES:
                slots[at] = self.reduce(param, 2), MISSING if grad is None else self.reduce(grad, 2)
        return slots.tobytes()

    def sgd(self, *_: object) -> None:
        return None

    def holds(self, owners: list[dict[str, Any]], names: list[str], params: list[torch.Tensor | None]) -> bool:
        return all(
            owner["_parameters"].get(name) is param for owner, name, param in zip(owners, names, params, strict=True)
        )

    def difference(self, new: torch.Tensor, old: torch.Tensor) -> int:
        alike = self._kernel is not None and _is_plain(new) and _is_plain(old)
        if self._kernel is None or not (alike and new.is_contiguous() and old.is_contiguous()):
            return -1
        self.slots += 1
        self._kernel.norm_at(new.data_ptr(), old.data_ptr(), new.numel(), self._address(self.slots - 1))
        return self.slots - 1

    def batchnorm(self, *_: object) -> int:
        return -1

    def discard(self) -> None:
        self.slots = self.span = 0


def _is_plain(x: torch.Tensor) -> bool:
    return x.dtype is torch.float32 and x.is_cpu and x.numel() > 0 and address_of(x) != 0


@final
class HostRows:
    """Rows in host memory, at addresses that the kernel writes to: a preallocated array that grows by doubling."""

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock  # held by whoever writes from Python, so that no row is written where rows no longer lie
        self.array = np.full((256, len(ROW)), np.nan)
        self.moved: Callable[[int, int], object] = lambda _base, _capacity: None
        self._base = self.array.ctypes.data

    def address(self, slot: int) -> int:
        if slot >= len(self.array):
            with self._lock:
                while slot >= len(self.array):
                    array = np.full((2 * len(self.array), len(ROW)), np.nan)
                    array[: len(self.array)] = self.array
                    self.moved(array.ctypes.data, len(array))  # takes along what hooks in C have written meanwhile
                    self.array, self._base = array, array.ctypes.data
        return self._base + slot * _ROW_BYTES

    def put_rows(self, slots: list[int], rows: npt.NDArray[np.float64]) -> None:
        self.address(max(slots))
        self.array[slots] = rows

    def put(self, slot: int, row: tuple[float, ...]) -> None:
        self.address(slot)
        if len(row) < len(ROW):
            row = (*row, *(math.nan,) * (len(ROW) - len(row)))
        self.array[slot] = row
