"""What calls of modules put out in the open step, and hooks for the gradients of it: the way through Python.

The classes of the same names in hooks.c do the same for dense float32 CPU tensors without the interpreter in between,
and call what they are given here for all others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, final

import numpy as np
import torch

from gradlab.probes.hooks import CallGate

__all__ = ["COLUMNS", "OWN_CALLS", "OutputHook", "Outputs"]

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
    """

    def __init__(
        self,
        gate: CallGate,
        rows: Any,
        slow_gradient: Callable[[int, torch.Tensor], None],
        repeated: Callable[[int], None],
        leaf: Callable[[int, torch.Tensor], None],
    ) -> None:
        self.gate, self.leaf = gate, leaf
        #: Calls of the whole model so far; a module's calls are counted anew in each.
        self.passes = 0
        #: Outputs of the open step that a gradient has reached.
        self.with_gradient = 0
        #: Whether gradient hooks have to be Python's: here they are.
        self.hooks_in_python = True
        self._rows, self._slow_gradient, self._repeated = rows, slow_gradient, repeated
        self._generation = 0
        self._entries: list[list[int]] = []

    def add(self, label: int, place: int, size: int, slot: int) -> int:
        """Take an output that was reduced into a slot and return its index in this step."""
        self._entries.append([label, place, size, slot, -1, 0])
        return len(self._entries) - 1

    def gradient_hook(self, index: int) -> Callable[[torch.Tensor], None]:
        """Return a tensor hook for the gradient of an output."""
        generation = self._generation

        def backward(grad: torch.Tensor) -> None:
            # A graph may outlive its step; its late gradients belong to no open step.
            if self.gate.recording and generation == self._generation:
                self._slow_gradient(index, grad)

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
class OutputHook:
    """The forward hook of one module.

    Args:
        outputs: Where the output goes.
        layer: The module's dotted path.
        record: Takes (this hook, place, module, output) of a call that is recorded.
        units: Takes (this hook, the call's number in this pass, module, output); None where units are not followed.
    """

    def __init__(
        self, outputs: Outputs, layer: str, record: Callable[..., None], units: Callable[..., None] | None
    ) -> None:
        self._outputs, self._layer, self._record, self._units = outputs, layer, record, units
        self._pass, self._calls = -1, 0

    def __call__(self, module: Any, _: Any, output: Any) -> None:
        place = self._outputs.gate.admit(self._layer)
        if place is None:
            return
        self._record(self, place, module, output)
        if self._units is not None:
            self._calls = self._calls + 1 if self._pass == self._outputs.passes else 1
            self._pass = self._outputs.passes
            self._units(self, min(self._calls - 1, OWN_CALLS), module, output)

    def know(self, kind: type, label: int) -> None:
        """Take what a plain output of a module of this class is listed as: nothing to gain from that here."""

    def follow(
        self, call: int, top: torch.Tensor, address: int, channels: int, inner: int, trailing: tuple[int, ...]
    ) -> None:
        """Take the running maximum of a call's channels, to be updated in place: likewise."""

    def forget(self) -> None:
        """Keep no such maximum any longer: likewise."""
