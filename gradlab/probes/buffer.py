"""One buffer of rows a device, and one host copy for each recorded step."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch

from gradlab.errors import UsageError
from gradlab.probes import hooks, native
from gradlab.probes.device_pool import DevicePool
from gradlab.probes.flat import FEW_ENTRIES, FlatPlans, FlatTensors
from gradlab.probes.outputs import OutputHook, Outputs
from gradlab.probes.pool import ALL, NO_MOMENTS, NORM, HostPool
from gradlab.probes.reduce import can_reduce, cpu_row, has_memory, is_dense, wide_dtype
from gradlab.probes.rows import NONE, DeviceRows, HostRows, PlainRows

__all__ = ["Rows", "StepBuffer"]

_TOGETHER = 16  # steps that are delivered at once: code that ran a moment before takes a third of the time
#: Host form of a step's rows, shape (slots, 8).
Rows = npt.NDArray[np.float64]


def _same_entries(x: torch.Tensor, of: torch.Tensor) -> bool:
    return x is of or (x.numel() == of.numel() and x.dtype is of.dtype and is_dense(x) and is_dense(of))


class _Device(NamedTuple):
    """Where the rows of an accelerator lie, and what makes them."""

    rows: DeviceRows
    pool: DevicePool


@final
class StepBuffer:
    """Where the hooks of a step leave their rows, and where they are fetched when the step is closed.

    A slot is a number from 0 in the order of writing. On the CPU rows go straight to host memory; on an accelerator
    they stay in one device tensor until `flush`, which starts one copy to pinned memory and returns at once. The copy
    is read when it is done, or when the trace is asked for.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # backward passes of several devices run in threads of their own
        self._host = HostRows(self._lock)
        self._fast = native.hooks()
        self.rows: Any = self._fast.Rows(self._host.address) if self._fast else PlainRows(self._host.address)
        self._reads = native.kernel() is not None  # whether `rows` reads any tensor itself
        self._host.moved = self.rows.place
        self.rows.place(self._host.address(0), len(self._host.array))
        self._pool, self._plans = HostPool(self._host.put_rows), FlatPlans()
        self._devices: dict[torch.device, _Device] = {}
        self._pending: list[tuple[_Copy, Callable[[Rows], None]]] = []
        self._shared: dict[int, tuple[weakref.ref[torch.Tensor], int, int]] = {}

    def gate(self, *, without_grad: bool) -> Any:
        """Return a CallGate, the one in C where there is one."""
        return (self._fast or hooks).CallGate(without_grad=without_grad)

    def outputs(self, *args: Any) -> Any:
        """Return the Outputs that write into this buffer; the arguments are those after `rows`, the gate first."""
        kind: Any = self._fast.Outputs if self._fast else Outputs
        return kind(args[0], self.rows, *args[1:], self._reduce_if_possible)

    def output_hook(self, *args: Any) -> Any:
        """Return an OutputHook for such outputs."""
        if self._fast:
            return self._fast.OutputHook(*args)
        outputs, layer, record, units = args
        return OutputHook(outputs, layer, record, units, self._pool.follow)

    @property
    def foretells(self) -> bool:
        """Whether `sgd` can tell updates before they are made."""
        return self._fast is not None

    @property
    def span(self) -> int:
        """Number of the open step's span: a gradient scaler may change its scale from one to the next."""
        span: int = self.rows.span
        return span

    def end_span(self) -> None:
        """Begin the next span."""
        self.rows.span += 1

    def reduce(self, x: torch.Tensor, *, moments: bool = True, norm_only: bool = False) -> int:
        """Reduce a tensor into the next slot and return the slot; no gradient is followed."""
        how = NORM if norm_only else ALL if moments else NO_MOMENTS
        with self._lock:
            if self._reads:
                slot: int = self.rows.reduce(x, how)
                if slot >= 0:
                    return slot
            slot = self._take()
            if not x.is_cpu:
                self._device(x.device).pool.add([x], [slot], how)
            elif not self._pool.add(x, slot, how):
                self._host.put(slot, cpu_row(x.detach(), moments=moments, norm_only=norm_only))
            return slot

    def reduce_gradient_again(self, grad: torch.Tensor, of: int) -> int:
        """Return a slot with the norm of a gradient, read once if it is the one read last, of the output in slot `of`.

        The caller must hold that gradient since then: only so is the same memory the same tensor.
        """
        with self._lock:
            slot: int = self.rows.same_gradient(grad, of)
        return slot if slot >= 0 else self.reduce(grad, norm_only=True)

    def parameters(self, params: Sequence[torch.Tensor]) -> npt.NDArray[np.int64]:
        """Reduce what is plain of parameters and their gradients, as far as norms need: slots of shape (n, 2).

        -1 stands for what is not plain, `MISSING` for a gradient that is None.
        """
        with self._lock:
            return np.frombuffer(self.rows.parameters(list(params)), dtype=np.int64).reshape(-1, 2)

    def sgd(
        self,
        params: list[torch.Tensor],
        states: list[dict[str, Any] | None],
        slots: int,
        places: int,
        numbers: tuple[float, ...],
    ) -> int | None:
        """Do the same with parameters of an SgdGroup, and reduce their coming updates.

        Args:
            params: The n parameters.
            states: Their states, in which their momentum buffers are.
            slots: Address of int64 numbers, shape (, 3): rows get the slots of weight, gradient and update.
            places: Address of n int64 numbers: the row of each parameter.
            numbers: Those of the group.

        Returns:
            How many are not plain in every respect, whose rows are left as they are; None where hooks are not in C.
        """
        with self._lock:
            others: int | None = self.rows.sgd(params, states, slots, places, *numbers)
        return others

    def lay_flat(self, xs: Sequence[torch.Tensor | None]) -> FlatTensors | None:
        """Copy many small CPU tensors end to end; None where they are not alike. Called without autograd."""
        return self._plans.lay(xs)

    def flat_norms(self, xs: FlatTensors) -> npt.NDArray[np.int64]:
        """Reduce tensors that lie end to end, as far as norms need, and return their slots."""
        with self._lock:
            places = xs.plan.places
            first = self._take(len(places))
            self._host.address(first + len(places))
            xs.norms(self._host.array[first : first + len(places)])
            slots: npt.NDArray[np.int64] = places + first
        return slots

    def norms(self, xs: Sequence[torch.Tensor | None]) -> list[int]:
        """Reduce many tensors, as far as norms need, where no kernel does: the small ones of one dtype together.

        Called without autograd. -1 stands for what is no plain tensor.
        """
        slots = [NONE] * len(xs)
        alike: dict[torch.dtype, list[int]] = {}
        for at, x in enumerate(xs):
            if x is not None and has_memory(x) and x.is_cpu and 0 < x.numel() <= FEW_ENTRIES:
                alike.setdefault(x.dtype, []).append(at)
        for some in alike.values():
            flat = self.lay_flat([xs[at] for at in some])
            if flat is not None:
                for at, slot in zip(some, self.flat_norms(flat).tolist(), strict=True):
                    slots[at] = slot
        elsewhere: dict[torch.device, list[int]] = {}
        for at, x in enumerate(xs):
            if slots[at] == NONE and x is not None and has_memory(x) and can_reduce(x):
                if x.is_cpu:
                    slots[at] = self.reduce(x, norm_only=True)
                else:
                    elsewhere.setdefault(x.device, []).append(at)
        for device, some in elsewhere.items():
            with self._lock:
                first = self._take(len(some))
                slots_there = list(range(first, first + len(some)))
                self._device(device).pool.add([x for at in some if (x := xs[at]) is not None], slots_there, NORM)
            for at, slot in zip(some, slots_there, strict=True):
                slots[at] = slot
        return slots

    def reduce_difference(self, new: torch.Tensor, old: torch.Tensor) -> int:
        """Reduce new - old into the next slot, as far as its norm needs; -1 where no kernel does it."""
        with self._lock:
            slot: int = self.rows.difference(new, old)
        return slot

    def reduce_shared(self, x: torch.Tensor) -> int:
        """Reduce a tensor that several probes look at: read once as long as it is the same object and unchanged.

        A view of the whole of a tensor (a reshape, an identity that makes a node of its own) holds the same entries.
        """
        slot: int = self.rows.reduce_shared(x)
        if slot >= 0:
            return slot
        version = -1 if x.is_inference() else x._version
        base = x._base
        for seen in (x,) if base is None else (x, base):
            known = self._shared.get(id(seen))
            # The weak reference must still lead to the very object: another may have got its place in memory.
            if known is not None and known[0]() is seen and known[1] == version >= 0 and _same_entries(x, seen):
                return known[2]
        slot = self.reduce(x)
        self._shared[id(x)] = (weakref.ref(x), version, slot)
        return slot

    def _reduce_if_possible(self, x: torch.Tensor) -> int:
        return self.reduce_shared(x) if can_reduce(x) else NONE

    def values(self, values: list[torch.Tensor]) -> int:
        """Put one to eight one-entry tensors of one device into the next slot and return it."""
        dtype = wide_dtype(values[0].device)
        stacked = torch.stack([value.detach().reshape(()).to(dtype) for value in values])
        with self._lock:
            slot = self._take()
            if stacked.device.type == "cpu":
                self._host.put(slot, tuple(stacked.tolist()))
            else:
                self._device(stacked.device).rows.next_rows((slot,))[0, : len(values)].copy_(stacked)
            return slot

    def scalar(self, value: torch.Tensor | float, what: str = "value") -> int | float:
        """Return a plain number as it is (a float) and a tensor as the slot it was put in (an int)."""
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            return self.values([value])
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            got = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"{value!r:.60}"
            raise UsageError(f"log: the {what} must be a number or have one entry; got {got}.") from None

    def block(self, values: torch.Tensor) -> int:
        """Put the rows of a tensor, shape (k, at most 8), into the next k slots and return the first of them."""
        values, (count, width) = values.detach(), values.shape
        with self._lock:
            first = self._take(count)
            if values.device.type == "cpu":
                self._host.address(first + count)
                self._host.array[first : first + count] = np.nan
                self._host.array[first : first + count, :width] = values.numpy()
            else:
                slots = range(first, first + count)
                self._device(values.device).rows.next_rows(slots)[:, :width].copy_(values)
            return first

    def _take(self, count: int = 1) -> int:
        first: int = self.rows.take(count)  # in one go: hooks in C do not wait for the lock
        return first

    def _device(self, device: torch.device) -> _Device:
        if device not in self._devices:
            rows = DeviceRows(device)
            self._devices[device] = _Device(rows, DevicePool(rows.put_rows))
        return self._devices[device]

    def discard(self) -> None:
        """Forget the rows of the open step."""
        with self._lock:
            self._pool.discard()
            for device in self._devices.values():
                device.pool.discard()
            self._begin()

    def _begin(self) -> None:
        self.rows.discard()
        self._shared.clear()
        for device in self._devices.values():
            device.rows.slots = []

    def flush(self, deliver: Callable[[Rows], None]) -> None:
        """Start the one transfer of this step; `deliver` gets the rows once they are on the host and some have come."""
        with self._lock:
            self._pool.drain()
            for device in self._devices.values():
                device.pool.drain()
        used = self.rows.slots
        self._host.address(used)  # slots of devices have their place there too
        copy = _Copy(self._host.array[:used].copy(), [device.rows for device in self._devices.values()])
        self._begin()
        self._pending.append((copy, deliver))
        if len(self._pending) >= _TOGETHER:
            self.deliver_ready()

    def deliver_ready(self) -> None:
        """Deliver what has come."""
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
