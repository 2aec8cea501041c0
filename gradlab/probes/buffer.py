"""One buffer of rows a device, and one host copy for each recorded step."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch

from gradlab.probes import native
from gradlab.probes.reduce import ROW, cpu_row, device_row, has_memory, is_dense

__all__ = ["Rows", "StepBuffer"]

#: Host form of a step's rows, shape (slots, 8).
Rows = npt.NDArray[np.float64]
_ROW_BYTES = 8 * len(ROW)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def _same_entries(x: torch.Tensor, of: torch.Tensor | None) -> bool:
    return x is of or (
        of is not None and x.numel() == of.numel() and x.dtype is of.dtype and is_dense(x) and is_dense(of)
    )


class _DeviceRows:
    """Rows of one accelerator: a preallocated tensor that grows by doubling between steps."""

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.full((256, len(ROW)), float("nan"), device=device, dtype=_wide(device))
        self.slots: list[int] = []  # slot of each row in use

    def next_row(self, slot: int) -> torch.Tensor:
        return self.next_rows((slot,))[0]

    def next_rows(self, slots: Sequence[int]) -> torch.Tensor:
        first = len(self.slots)
        self.slots += slots
        while len(self.slots) > len(self.tensor):
            self.tensor = torch.cat([self.tensor, torch.full_like(self.tensor, float("nan"))])
        return self.tensor[first : len(self.slots)]


class _HostRows:
    """Rows in host memory, at addresses that the kernel writes to: a preallocated array that grows by doubling."""

    def __init__(self) -> None:
        self.array = np.full((256, len(ROW)), np.nan)
        self._base = self.array.ctypes.data

    def address(self, slot: int) -> int:
        while slot >= len(self.array):
            self.array = np.vstack([self.array, np.full_like(self.array, np.nan)])
            self._base = self.array.ctypes.data
        return self._base + slot * _ROW_BYTES

    def put(self, slot: int, row: tuple[float, ...]) -> None:
        self.address(slot)
        self.array[slot, : len(row)] = row
        self.array[slot, len(row) :] = np.nan


@final
class StepBuffer:
    """Where the hooks of a step leave their rows, and where they are fetched when the step is closed.

    A slot is a number from 0 in the order of writing. On the CPU rows go straight to host memory; on an accelerator
    they stay in one device tensor until `flush`, which starts one copy to pinned memory and returns at once. The copy
    is read when it is done, or when the trace is asked for.
    """

    def __init__(self) -> None:
        #: Number of the open step's span: a gradient scaler may change its scale from one to the next.
        self.span = 0
        self._slots = 0
        self._lock = threading.RLock()  # backward passes of several devices run in threads of their own
        self._host = _HostRows()
        self._kernel = native.kernel()
        self._devices: dict[torch.device, _DeviceRows] = {}
        self._pending: list[tuple[_Copy, Callable[[Rows], None]]] = []
        self._shared: dict[int, tuple[weakref.ref[torch.Tensor], int, int]] = {}

    def reduce(self, x: torch.Tensor, *, moments: bool = True, norm_only: bool = False) -> int:
        """Reduce a tensor into the next slot and return the slot; no gradient is followed."""
        with self._lock:
            return self._reduce(x, moments, norm_only)

    def _reduce(self, x: torch.Tensor, moments: bool, norm_only: bool) -> int:
        slot = self._take()
        native_type = x.dtype is torch.float32 and x.is_cpu and has_memory(x)
        if self._kernel is not None and native_type and is_dense(x) and (n := x.numel()):
            address = self._host.address(slot)
            if norm_only:
                self._kernel.norm_at(x.data_ptr(), None, n, address)
            else:
                self._kernel.row_at(x.data_ptr(), n, moments, address)
            return slot
        with torch.no_grad():
            if x.is_cpu:
                self._host.put(slot, cpu_row(x.detach(), moments=moments, norm_only=norm_only))
            else:
                self._rows(x.device).next_row(slot).copy_(device_row(x.detach()))
        return slot

    def reduce_difference(self, new: torch.Tensor, old: torch.Tensor) -> int:
        """Reduce new - old into the next slot, as far as its norm needs; `old` may be overwritten."""
        native_types = new.is_cpu and new.dtype is old.dtype is torch.float32 and has_memory(new) and has_memory(old)
        if self._kernel is not None and native_types and new.is_contiguous() and old.is_contiguous() and new.numel():
            with self._lock:
                slot = self._take()
                self._kernel.norm_at(new.data_ptr(), old.data_ptr(), new.numel(), self._host.address(slot))
                return slot
        with torch.no_grad():
            return self.reduce(old.neg_().add_(new.detach()), norm_only=True)

    def reduce_shared(self, x: torch.Tensor) -> int:
        """Reduce a tensor that several probes look at: read once as long as it is the same object and unchanged.

        A view of the whole of a tensor (a reshape, an identity that makes a node of its own) holds the same entries.
        """
        version = -1 if x.is_inference() else x._version
        for seen in (x, x._base):
            known = None if seen is None else self._shared.get(id(seen))
            # The weak reference must still lead to the very object: another may have got its place in memory.
            if known is not None and known[0]() is seen and known[1] == version and _same_entries(x, seen):
                return known[2]
        slot = self.reduce(x)
        self._shared[id(x)] = (weakref.ref(x), version, slot)
        return slot

    def values(self, values: list[torch.Tensor]) -> int:
        """Put one to eight one-entry tensors of one device into the next slot and return it."""
        dtype = _wide(values[0].device)
        stacked = torch.stack([value.detach().reshape(()).to(dtype) for value in values])
        with self._lock:
            slot = self._take()
            if stacked.device.type == "cpu":
                self._host.put(slot, tuple(stacked.tolist()))
            else:
                row = self._rows(stacked.device).next_row(slot)
                row[: len(values)].copy_(stacked)
            return slot

    def block(self, values: torch.Tensor) -> int:
        """Put the rows of a tensor, shape (k, at most 8), into the next k slots and return the first of them."""
        values, (count, width) = values.detach(), values.shape
        with self._lock:
            first = self._slots
            self._slots += count
            if values.device.type == "cpu":
                self._host.address(self._slots)
                self._host.array[first : self._slots] = np.nan
                self._host.array[first : self._slots, :width] = values.numpy()
            else:
                slots = range(first, self._slots)
                self._rows(values.device).next_rows(slots)[:, :width].copy_(values)
            return first

    def _take(self) -> int:
        self._slots += 1
        return self._slots - 1

    def _rows(self, device: torch.device) -> _DeviceRows:
        if device not in self._devices:
            self._devices[device] = _DeviceRows(device)
        return self._devices[device]

    def discard(self) -> None:
        """Forget the rows of the open step."""
        self._slots = self.span = 0
        self._shared.clear()
        for rows in self._devices.values():
            rows.slots = []

    def flush(self, deliver: Callable[[Rows], None]) -> None:
        """Start the one transfer of this step; `deliver` gets the rows once they are on the host."""
        self._host.address(self._slots)  # slots of devices have their place there too
        copy = _Copy(self._host.array[: self._slots].copy(), self._devices.values())
        self.discard()
        self._pending.append((copy, deliver))
        while self._pending and self._pending[0][0].ready():
            self._deliver_first()

    def wait(self) -> None:
        """Deliver everything still on its way."""
        while self._pending:
            self._deliver_first()

    def _deliver_first(self) -> None:
        copy, deliver = self._pending.pop(0)
        deliver(copy.rows())


class _Copy:
    """The rows of one step on their way to the host."""

    def __init__(self, host: Rows, devices: Any) -> None:
        self._host = host  # with old numbers in the slots that a device's rows will fill
        self._parts: list[tuple[list[int], torch.Tensor, torch.cuda.Event | None]] = []
        for rows in devices:
            if not rows.slots:
                continue
            used = rows.tensor[: len(rows.slots)]
            event = None
            if used.device.type == "cuda":
                landed = torch.empty(used.shape, dtype=used.dtype, pin_memory=True)
                landed.copy_(used, non_blocking=True)
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(used.device))
            elif used.device.type == "meta":
                landed = torch.full(used.shape, float("nan"), device="cpu")
            else:
                landed = used.to("cpu", copy=True)
            self._parts.append((rows.slots, landed, event))

    def ready(self) -> bool:
        return all(event is None or event.query() for _, _, event in self._parts)

    def rows(self) -> Rows:
        for places, landed, event in self._parts:
            if event is not None:
                event.synchronize()
            self._host[places] = landed.numpy()
        return self._host
