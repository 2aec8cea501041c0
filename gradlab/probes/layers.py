"""What each layer puts out, and the gradient that comes back to it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import nn

from gradlab.probes.buffer import Rows, StepBuffer
from gradlab.probes.hooks import OutputLayerHook, tensors_in
from gradlab.probes.log import TableLog
from gradlab.probes.outputs import COLUMNS
from gradlab.probes.reduce import can_reduce, statistics
from gradlab.probes.units import UnitProbe

__all__ = ["LayerProbe"]

_KEYS = ("layer", "call", "order", "kind", "output")
_ACT = ("mean", "std", "norm", "abs_max", "zero_fraction", "nonfinite")
_GRAD = ("norm", "abs_max", "zero_fraction", "nonfinite")
_KNOWN = 64  # orders of execution whose keys are kept


class _Label(NamedTuple):
    layer: str
    kind: str
    path: str


@final
class LayerProbe:
    """Records outputs in forward hooks and their gradients in tensor hooks on those outputs.

    No full backward hooks: they fail where an in-place operation follows. A tensor is reduced where it was just
    written, since a later in-place operation may change it. What is the same in every step (names, order, calls) is
    worked out once: a hook leaves six numbers, and in the ordinary case it does so in C.

    Args:
        layers: Watched modules by dotted path.
        buffer: Where rows go.
        without_grad: Record forward calls made without autograd too.
        units: Follows units of activation modules; sees the calls that are recorded here.
    """

    def __init__(
        self,
        layers: Sequence[tuple[str, nn.Module]],
        buffer: StepBuffer,
        *,
        without_grad: bool,
        units: UnitProbe | None = None,
    ) -> None:
        self.gate = buffer.gate(without_grad=without_grad)
        self.not_seen: dict[str, str] = {}
        self.ran: set[str] = set()
        self._buffer, self._units = buffer, units
        self._outputs = buffer.outputs(self.gate, self._reduce_gradient, self._repeated, self._follow_leaf)
        self._labels: dict[_Label, int] = {}
        self._leaf_hooks: list[Any] = []
        # Entries are a value, not a key: with batches of varying size no two steps would share their keys.
        values = ["entries", *(f"act_{name}" for name in _ACT), *(f"grad_{name}" for name in _GRAD)]
        self._log = TableLog(_KEYS, values, _derive)
        self._keys: dict[bytes, list[tuple[object, ...]]] = {}  # by the labels and places of a step
        self._layers = list(layers)

    def attach(self) -> list[Any]:
        """Register the forward hooks and return their handles."""
        handles = []
        config = sys.modules.get("torch._dynamo.config")  # compiled autograd knows no hooks but Python's
        self._outputs.hooks_in_python = bool(config is not None and getattr(config, "compiled_autograd", False))
        layers, self._layers = self._layers, []  # a probe that is kept must not keep the model
        for name, module in layers:
            units = None if self._units is None else self._units.follower(name, module)
            hook = self._buffer.output_hook(self._outputs, name, partial(self._see, name), units)
            handles.append(module.register_forward_hook(OutputLayerHook(hook)))
        return handles

    def begin_pass(self, *_: object) -> None:
        """A call of the whole model begins, whose hook this is: calls of its modules are counted anew."""
        self._outputs.passes += 1

    def _label(self, layer: str, kind: str, path: str) -> int:
        return self._labels.setdefault(_Label(layer, kind, path), len(self._labels))

    def _see(self, layer: str, hook: Any, place: int, module: nn.Module, output: Any) -> None:
        """Record the call of a module that has the given place in the step's order."""
        self.ran.add(layer)
        kind = type(module).__name__
        if isinstance(output, torch.Tensor):
            hook.know(type(module), self._label(layer, kind, ""))
        seen = False
        for path, tensor in tensors_in(output):
            seen = self._record(tensor, self._label(layer, kind, path), place) or seen
        if not seen:
            self.not_seen.setdefault(layer, f"its output ({type(output).__name__}) holds no real dense tensor")

    def tap(self, tensor: torch.Tensor, name: str) -> None:
        """Record a tensor that no module puts out."""
        place = self.gate.admit(name)
        if place is not None and not self._record(tensor, self._label(name, "tap", ""), place):
            self.not_seen.setdefault(name, f"a {tensor.dtype} tensor cannot be recorded")

    def _record(self, tensor: torch.Tensor, label: int, place: int) -> bool:
        """Reduce one output now and its gradient when it comes; return whether the tensor could be reduced."""
        if not can_reduce(tensor):
            return False
        index = self._outputs.add(label, place, tensor.numel(), self._buffer.reduce_shared(tensor))
        if tensor.requires_grad:
            if tensor.grad_fn is None:
                self._follow_leaf(index, tensor)
            else:
                tensor.register_hook(self._outputs.gradient_hook(index))
        return True

    def _follow_leaf(self, index: int, tensor: torch.Tensor) -> None:
        # A parameter or input handed through: it outlives the step and its graph.
        self._leaf_hooks.append(tensor.register_hook(self._outputs.gradient_hook(index)))

    def _reduce_gradient(self, index: int, grad: torch.Tensor) -> None:
        if can_reduce(grad):
            self._outputs.set_gradient(index, self._buffer.reduce(grad, moments=False))

    def _repeated(self, label: int) -> None:
        layer = list(self._labels)[label].layer
        self.not_seen.setdefault(layer, "several backward passes reached one output; the last is recorded")

    @property
    def has_gradients(self) -> bool:
        """Whether a backward pass reached any entry of the open step."""
        return bool(self._outputs.with_gradient)

    def discard(self) -> None:
        """Forget the open step."""
        self._take()

    def _take(self) -> tuple[bytes, bytes, bool]:
        self.gate.close_step()
        for handle in self._leaf_hooks:
            handle.remove()
        self._leaf_hooks = []
        taken: tuple[bytes, bytes, bool] = self._outputs.take()
        return taken

    def _keys_of(self, signature: bytes) -> list[tuple[object, ...]]:
        keys = self._keys.get(signature)
        if keys is None:
            known = list(self._labels)
            calls: dict[str, dict[int, int]] = {}  # layer -> place -> call
            keys = []
            for order, (number, place) in enumerate(np.frombuffer(signature, dtype=np.int64).reshape(-1, 2).tolist()):
                label = known[number]
                of_layer = calls.setdefault(label.layer, {})
                call = of_layer.setdefault(place, len(of_layer))
                keys.append((label.layer, call, order, label.kind, label.path))
            self.ran.update(str(key[0]) for key in keys)
            if len(self._keys) >= _KNOWN:  # a net whose every step is another
                self._keys.clear()
            self._keys[signature] = keys
        return keys

    def close_step(self, step: int) -> Callable[[Rows, Sequence[float]], None]:
        """End the step; the function returned takes its rows, and the loss scale of each span, on the host."""
        signature, what, in_order = self._take()
        order = None
        if not in_order:  # repeated by checkpointing, or from several threads
            which = np.frombuffer(signature, dtype=np.int64).reshape(-1, 2)
            order = np.argsort(which[:, 1], kind="stable")  # outputs stay in their order
            last = {(label, place): row for row, (label, place) in enumerate(which[order].tolist())}
            order = order[sorted(last.values())]  # a repetition takes the place of the first run
            signature = which[order].tobytes()
        keys = self._keys_of(signature)

        def deliver(rows: Rows, loss_scales: Sequence[float]) -> None:
            table = np.frombuffer(what, dtype=np.int64).reshape(-1, len(COLUMNS))
            table = table if order is None else table[order]
            scale = loss_scales[0] if len(loss_scales) == 1 else np.array(loss_scales)[table[:, 3]]
            self._log.append_rows(step, keys, rows, table[:, 1:3], (table[:, 0], scale))

        return deliver

    def last(self) -> Any:
        """Return the rows of the step delivered last; see `TableLog.last`."""
        return self._log.last()

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of the steps closed."""
        return {"log": self._log.state_dict(), "ran": sorted(self.ran), "not_seen": dict(self.not_seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self._log.load_state_dict(state["log"])
        self.ran, self.not_seen = set(state["ran"]), dict(state["not_seen"])

    def frame(self) -> Any:
        """Return `trace.layers` so far."""
        return self._log.frame()


def _derive(rows: Rows, facts: Rows) -> dict[str, Rows]:
    """Return the value columns from the rows of output and gradient, and from entries and loss scale."""
    sizes, loss_scale = facts.T
    act, grad = (statistics(rows[:, place], sizes.astype(np.int64)) for place in range(2))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for name in ("norm", "abs_max"):
            grad[name] = grad[name] / loss_scale
    values = {"entries": sizes}
    return values | {f"act_{name}": act[name] for name in _ACT} | {f"grad_{name}": grad[name] for name in _GRAD}
