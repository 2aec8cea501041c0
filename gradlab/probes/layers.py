"""What each layer puts out, and the gradient that comes back to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
from torch import nn

from gradlab.probes.buffer import Rows, StepBuffer
from gradlab.probes.hooks import CallGate, LayerHook, tensors_in
from gradlab.probes.log import TableLog
from gradlab.probes.reduce import can_reduce, statistics

__all__ = ["LayerProbe"]

_KEYS = ("layer", "call", "order", "kind", "output")
_ACT = ("mean", "std", "norm", "abs_max", "zero_fraction", "nonfinite")
_GRAD = ("norm", "abs_max", "zero_fraction", "nonfinite")


class _Entry:
    """One recorded output: what it is, and where its rows lie. Holds no activation."""

    __slots__ = ("act_slot", "grad_slot", "kind", "layer", "path", "size", "span")

    def __init__(self, layer: str, kind: str, path: str, size: int, act_slot: int) -> None:
        self.layer, self.kind, self.path, self.size, self.act_slot = layer, kind, path, size, act_slot
        self.grad_slot: int | None = None
        self.span = 0


@final
class LayerProbe:
    """Records outputs in forward hooks and their gradients in tensor hooks on those outputs.

    No full backward hooks: they fail where an in-place operation follows. A tensor is reduced where it was just
    written, since a later in-place operation may change it.

    Args:
        layers: Watched modules by dotted path.
        buffer: Where rows go.
        without_grad: Record forward calls made without autograd too.
    """

    def __init__(self, layers: Sequence[tuple[str, nn.Module]], buffer: StepBuffer, *, without_grad: bool) -> None:
        self.gate = CallGate(without_grad=without_grad)
        self.not_seen: dict[str, str] = {}
        self.ran: set[str] = set()
        self._buffer = buffer
        self._generation = 0
        self._entries: dict[tuple[int, str], _Entry] = {}  # by place in the order of execution and output path
        self._leaf_hooks: list[Any] = []
        # Entries are a value, not a key: with batches of varying size no two steps would share their keys.
        values = ["entries", *(f"act_{name}" for name in _ACT), *(f"grad_{name}" for name in _GRAD)]
        self._log = TableLog(_KEYS, values)
        self._layers = list(layers)

    def attach(self) -> list[Any]:
        """Register the forward hooks and return their handles."""
        return [module.register_forward_hook(LayerHook(self._forward_hook(name))) for name, module in self._layers]

    def _forward_hook(self, layer: str) -> Callable[[nn.Module, Any, Any], None]:
        def forward(module: nn.Module, _: Any, output: Any) -> None:
            place = self.gate.admit(layer)
            if place is None:
                return
            self.ran.add(layer)
            kind = type(module).__name__
            seen = False
            for path, tensor in tensors_in(output):
                seen = self._record(tensor, layer, place, kind, path) or seen
            if not seen:
                self.not_seen.setdefault(layer, f"its output ({type(output).__name__}) holds no real dense tensor")

        return forward

    def tap(self, tensor: torch.Tensor, name: str) -> None:
        """Record a tensor that no module puts out."""
        place = self.gate.admit(name)
        if place is not None and not self._record(tensor, name, place, "tap", ""):
            self.not_seen.setdefault(name, f"a {tensor.dtype} tensor cannot be recorded")

    def _record(self, tensor: torch.Tensor, layer: str, place: int, kind: str, path: str) -> bool:
        """Reduce one output now and its gradient when it comes; return whether the tensor could be reduced."""
        if not can_reduce(tensor):
            return False
        slot = self._buffer.reduce_shared(tensor)
        entry = self._entries[place, path] = _Entry(layer, kind, path, tensor.numel(), slot)
        if tensor.requires_grad:
            generation = self._generation

            def backward(grad: torch.Tensor) -> None:
                # A graph may outlive its step; its late gradients belong to no open step.
                if not self.gate.recording or generation != self._generation or not can_reduce(grad):
                    return
                if entry.grad_slot is not None:
                    self.not_seen.setdefault(layer, "several backward passes reached one output; the last is recorded")
                entry.grad_slot, entry.span = self._buffer.reduce(grad, moments=False), self._buffer.span

            handle = tensor.register_hook(backward)
            if tensor.grad_fn is None:  # a parameter or input handed through: it outlives the step and its graph
                self._leaf_hooks.append(handle)
        return True

    @property
    def has_gradients(self) -> bool:
        """Whether a backward pass reached any entry of the open step."""
        return any(entry.grad_slot is not None for entry in self._entries.values())

    def discard(self) -> None:
        """Forget the open step."""
        self._entries = {}
        self.gate.close_step()
        self._generation += 1
        for handle in self._leaf_hooks:
            handle.remove()
        self._leaf_hooks = []

    def close_step(self, step: int) -> Callable[[Rows, Sequence[float]], None]:
        """End the step; the function returned takes its rows, and the loss scale of each span, on the host."""
        placed = sorted(self._entries.items(), key=lambda item: item[0][0])  # stable: outputs stay in their order
        self.discard()
        calls: dict[str, dict[int, int]] = {}  # layer -> place -> call
        keys = []
        for order, ((place, _), entry) in enumerate(placed):
            of_layer = calls.setdefault(entry.layer, {})
            call = of_layer.setdefault(place, len(of_layer))
            keys.append((entry.layer, call, order, entry.kind, entry.path))
        act_slots = [entry.act_slot for _, entry in placed]
        grad_slots = [-1 if entry.grad_slot is None else entry.grad_slot for _, entry in placed]
        sizes = np.array([entry.size for _, entry in placed], dtype=np.int64)
        spans = [entry.span for _, entry in placed]
        self.ran.update(str(key[0]) for key in keys)

        def deliver(rows: Rows, loss_scales: Sequence[float]) -> None:
            loss_scale = np.array([loss_scales[span] for span in spans])
            padded = np.vstack([rows, np.full((1, rows.shape[1]), np.nan)])  # slot -1: no gradient came
            act = statistics(padded[act_slots], sizes)
            grad = statistics(padded[grad_slots], sizes)
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                for name in ("norm", "abs_max"):
                    grad[name] = grad[name] / loss_scale
            values = {"entries": sizes.astype(np.float64)}
            values |= {f"act_{name}": act[name] for name in _ACT} | {f"grad_{name}": grad[name] for name in _GRAD}
            self._log.append(step, keys, values)

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
