"""What calls of modules put out in the open step, and hooks for the gradients of it: the way through Python.

The classes of the same names in hooks.c do the same for dense float32 CPU tensors without the interpreter in between,
and call what they are given here for all others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, final

import numpy as np
import torch

from gradlab.probes import native
from gradlab.probes.hooks import CallGate
from gradlab.probes.reduce import address_of, can_reduce

__all__ = ["COLUMNS", "OWN_CALLS", "OutputHook", "Outputs", "channel_max"]

#: What `Outputs.take` tells of an output beside its label and its place in the order of execution.
COLUMNS: Final = ("size", "act_slot", "grad_slot", "span")
OWN_CALLS: Final = 8  # uses of one module in a pass that count as layers of their own


@final
class Outputs:
    """The outputs recorded in the open step, and where their rows and those of their gradients lie.

    Args:
        gate: Decides which calls are recorded.
        rows: Has the number of the open span (`span`).
        slow_gradient: Takes (index, gradient): reduces it and calls `set_gradient`.
        repeated: Told the label of an output that several backward passes reached.
        leaf: Takes (index, tensor) of an output without a graph node, whose hook has to be removed later.
        reduce: Reduces an output and returns the slot, -1 where it cannot be.
    """

    def __init__(
        self,
        gate: CallGate,
        rows: Any,
        slow_gradient: Callable[[int, torch.Tensor], None],
        repeated: Callable[[int], None],
        leaf: Callable[[int, torch.Tensor], None],
        reduce: Callable[[torch.Tensor], int],
    ) -> None:
        self.gate, self.leaf = gate, leaf
        #: Calls of the whole model so far; a module's calls are counted anew in each.
        self.passes = 0
        #: Outputs of the open step that a gradient has reached.
        self.with_gradient = 0
        #: Whether gradient hooks have to be Python's: here they are.
        self.hooks_in_python = True
        self._rows, self._slow_gradient, self._repeated = rows, slow_gradient, repeated
        self._reduce = reduce
        self._generation = 0
        self._entries: list[list[int]] = []

    def add(self, label: int, place: int, size: int, slot: int) -> int:
        """Take an output that was reduced into a slot and return its index in this step."""
        self._entries.append([label, place, size, slot, -1, 0])
        return len(self._entries) - 1

    def record(self, label: int, place: int, x: torch.Tensor) -> int:
        """Reduce an output now, and its gradient when it comes; return its slot, -1 where it cannot be."""
        slot = self._reduce(x)
        if slot < 0:
            return slot
        entries = self._entries
        index = len(entries)
        entries.append([label, place, x.numel(), slot, -1, 0])
        if x.requires_grad:
            node = x.grad_fn
            if node is None:
                self.leaf(index, x)
                return slot
            # What register_hook does, without a handle: the hook goes with the graph.
            hooks: Any = x._backward_hooks
            if hooks is None:
                hooks = x._backward_hooks = OrderedDict()
                node._register_hook_dict(x)
            hook = self.gradient_hook(index)
            hooks[hook] = hook
        return slot

    def gradient_hook(self, index: int) -> Callable[[torch.Tensor], None]:
        """Return a tensor hook for the gradient of an output."""
        generation, gate, slow_gradient = self._generation, self.gate, self._slow_gradient

        def backward(grad: torch.Tensor) -> None:
            # A graph may outlive its step; its late gradients belong to no open step.
            if gate.recording and generation == self._generation:
                slow_gradient(index, grad)

        return backward

    def set_gradient(self, index: int, slot: int) -> None:
        """Take the slot that an output's gradient was reduced into."""
        entry = self._entries[index]
        if entry[4] >= 0:
            self._repeated(entry[0])
        else:
            self.with_gradient += 1
        entry[4:] = slot, self._rows.span

    def take(self) -> tuple[bytes, bytes, bool]:
        """End the step and forget its outputs.

        Returns:
            Rows of int64: label and place of each output; then its size, slots and span (`COLUMNS`); and whether places
            only go up.
        """
        table = np.array(self._entries, dtype=np.int64).reshape(-1, 6)
        self._entries, self.with_gradient = [], 0
        self._generation += 1
        return table[:, :2].tobytes(), table[:, 2:].tobytes(), not (np.diff(table[:, 1]) < 0).any()


@final
class _Unit:
    """The largest entry so far of each channel of a rectifier's output."""

    __slots__ = ("_at", "_kernel", "_seen", "_settled", "_skip", "_trailing", "channels", "inner", "top")

    def __init__(self, top: torch.Tensor, address: int, channels: int, inner: int, trailing: tuple[int, ...]) -> None:
        self.top, self._at, self.channels, self.inner, self._trailing = top, address, channels, inner, trailing
        self._kernel, self._settled = native.kernel(), False
        self._seen = self._skip = 0  # calls until it is asked whether every unit was active: asking takes long itself

    def see(self, output: Any, slot: int, pooled: Callable[[int, _Unit], bool]) -> bool:
        """Take an output that was reduced into a slot; return whether it is one that can be followed here."""
        if type(output) is not torch.Tensor or output.shape[1:] != self._trailing:
            return False
        if self._settled:
            return True
        if output.dtype is not torch.float32 or not (output.is_cpu and can_reduce(output) and address_of(output)):
            return False
        ordered = output.is_contiguous()
        if self._kernel is None:
            if not (ordered and pooled(slot, self)):
                torch.maximum(self.top, channel_max(output.detach()), out=self.top)
                self.settle()
        elif n := output.numel():
            inner = self.inner if ordered else 1
            self._kernel.channel_max(output.data_ptr(), n // (self.channels * inner), self.channels, inner, self._at)
            self.settle()
        return True

    def settle(self) -> None:
        """Ask now and then, after every twice as many calls, whether there is anything left to learn."""
        self._skip -= 1
        if self._skip < 0:
            self._settled = bool((self.top > 0).all())  # not so where NaN hides what a unit does
            self._seen = self._skip = 2 * self._seen + 1


def channel_max(output: torch.Tensor) -> torch.Tensor:
    """Return the largest entry of each channel, reading memory in its own order; never a view of the output."""
    if output.dim() == 4 and output.is_contiguous(memory_format=torch.channels_last) and output.shape[1] > 1:
        # One long row a sample first: a reduction over a short last dimension does not vectorize.
        samples = output.permute(0, 2, 3, 1).reshape(output.shape[0], -1)
        return samples.amax(0).view(-1, output.shape[1]).amax(0)
    if output.dim() in (4, 5):
        return output.flatten(2).amax(2).amax(0)
    return output.amax(tuple(range(output.dim() - 1))) if output.dim() > 1 else output.clone()


@final
class OutputHook:
    """The forward hook of one module.

    Args:
        outputs: Where the output goes.
        layer: The module's dotted path.
        record: Takes (this hook, place, module, output) of a call that is recorded.
        units: Takes (this hook, the call's number in this pass, module, output); None where units are not followed.
        pooled: Takes the slot of an output and who wants its channels' largest entries; False where it tells none.
    """

    def __init__(
        self,
        outputs: Outputs,
        layer: str,
        record: Callable[..., None],
        units: Callable[..., None] | None,
        pooled: Callable[[int, _Unit], bool],
    ) -> None:
        self._outputs, self._layer, self._record, self._units = outputs, layer, record, units
        self._pooled = pooled
        self._pass, self._calls = -1, 0
        self._kind: type | None = None  # the class of module that the label is for
        self._label = -1
        self._followed: dict[int, _Unit] = {}  # by the call's number

    def __call__(self, module: Any, _: Any, output: Any) -> None:
        outputs = self._outputs
        place = outputs.gate.admit(self._layer)
        if place is None:
            return
        slot = -1
        if type(module) is self._kind and type(output) is torch.Tensor:
            slot = outputs.record(self._label, place, output)
        if slot < 0:
            self._record(self, place, module, output)
        if self._units is not None:
            self._calls = self._calls + 1 if self._pass == outputs.passes else 1
            self._pass = outputs.passes
            call = min(self._calls - 1, OWN_CALLS)
            followed = self._followed.get(call)
            if followed is None or not followed.see(output, slot, self._pooled):
                self._units(self, call, module, output)

    def know(self, kind: type, label: int) -> None:
        """Take what a plain output of a module of this class is listed as."""
        self._kind, self._label = kind, label

    def follow(
        self, call: int, top: torch.Tensor, address: int, channels: int, inner: int, trailing: tuple[int, ...]
    ) -> None:
        """Take the running maximum of a call's channels, to be updated in place."""
        self._followed[call] = _Unit(top, address, channels, inner, trailing)

    def forget(self) -> None:
        """Keep no such maximum any longer."""
        self._followed.clear()
