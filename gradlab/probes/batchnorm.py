"""What BatchNorm does to signal and gradient, and how far its running statistics lag behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from threading import get_ident
from typing import Any, final

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradlab.probes.buffer import Rows, StepBuffer
from gradlab.probes.hooks import LayerHook
from gradlab.probes.log import TableLog
from gradlab.probes.reduce import can_reduce, norm_of, statistics

__all__ = ["BatchNormProbe"]

_STATE = ("mean_gap", "var_gap", "scale_mean", "scale_std", "scale_abs_max", "scale_abs_min", "low_variance_fraction")
_KNOWN = 64  # orders of execution whose keys are kept


class _Entry:
    __slots__ = ("facts", "grad_in", "grad_out", "input_slot", "layer", "output_slot", "sizes", "state_slot")

    def __init__(
        self, layer: str, facts: tuple[object, ...], sizes: tuple[int, int], slots: tuple[int, int, int]
    ) -> None:
        self.layer, self.facts, self.sizes = layer, facts, sizes
        self.input_slot, self.output_slot, self.state_slot = slots
        self.grad_in = self.grad_out = -1


@final
class BatchNormProbe:
    """Watches BatchNorm1d/2d/3d and SyncBatchNorm, in training and evaluation mode.

    Running statistics are compared as they were *before* the call updated them: that is how far they lag. torch
    normalizes with the biased batch variance while running_var averages the unbiased one; `var_gap` compares like
    with like (unbiased), `low_variance_fraction` uses the biased one that was divided by.

    The gradient gain is read at the layer's own node of the graph, so that what flows into the same input by another
    path (a skip connection) is not counted.

    Args:
        layers: Watched modules by dotted path; other kinds are passed over.
        buffer: Where rows go.
        without_grad: Record forward calls made without autograd too.
    """

    def __init__(self, layers: Sequence[tuple[str, nn.Module]], buffer: StepBuffer, *, without_grad: bool) -> None:
        self.gate = buffer.gate(without_grad=without_grad)
        self.not_seen: dict[str, str] = {}
        self._layers = [(name, module) for name, module in layers if isinstance(module, _BatchNorm)]
        self._buffer = buffer
        self._watched = len(self._layers)
        buffer.rows.gradients_are_shared = bool(self._layers)
        self._generation = 0
        self._entries: dict[int, _Entry] = {}  # by place in the order of execution
        # By layer and thread: a call in another thread may come between a call's two hooks.
        self._before: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor] | None] = {}
        self._places: dict[tuple[str, int], int] = {}
        self._log = TableLog(
            ("layer", "call", "training", "channels"), (*_STATE, "grad_gain", "act_gain"), _derive
        )  # fmt: skip
        self._keys: dict[tuple[object, ...], list[tuple[object, ...]]] = {}  # by the layers and facts of a step

    def attach(self) -> list[Any]:
        """Register the hooks and return their handles."""
        handles: list[Any] = []
        layers, self._layers = self._layers, []  # a probe that is kept must not keep the model
        for name, module in layers:
            handles.append(module.register_forward_pre_hook(LayerHook(self._pre_hook(name))))
            # First among the module's hooks: a hook of the user's may change the output in place.
            after = LayerHook(self._forward_hook(name))
            handles.append(module.register_forward_hook(after, prepend=True, with_kwargs=True))
        return handles

    def _pre_hook(self, layer: str) -> Callable[[_BatchNorm, Any], None]:
        def before(module: _BatchNorm, _: Any) -> None:
            key = (layer, get_ident())
            self._places.pop(key, None)
            place = self.gate.admit(layer)
            if place is None:
                return
            self._places[key] = place
            with torch.no_grad():
                mean, var = module.running_mean, module.running_var
                self._before[key] = None if mean is None or var is None else (mean.clone(), var.clone())

        return before

    def _forward_hook(self, layer: str) -> Callable[[_BatchNorm, Any, Any, Any], None]:
        def after(module: _BatchNorm, args: Any, named: Any, output: torch.Tensor) -> None:
            key = (layer, get_ident())
            place = self._places.pop(key, None)
            if place is None:
                return
            x: torch.Tensor = args[0] if args else named["input"]
            if not x.numel() or not can_reduce(x):
                return
            by_batch = module.training or module.running_mean is None
            with torch.no_grad():
                state = self._state(module, x, output, self._before.pop(key, None))
                slots = self._buffer.reduce_shared(x), self._buffer.reduce_shared(output), state
            entry = _Entry(layer, (by_batch, module.num_features), (x.numel(), output.numel()), slots)
            self._entries[place] = entry
            self._follow_gradient(layer, entry, output)

        return after

    def _follow_gradient(self, layer: str, entry: _Entry, output: torch.Tensor) -> None:
        node = output.grad_fn
        if node is None:
            return
        if "BatchNorm" not in node.name():
            self.not_seen.setdefault(layer, f"its output comes from {node.name()}, so its gradient gain is not read")
            return
        generation = self._generation

        def backward(grad_inputs: Any, grad_outputs: Any) -> None:
            if not self.gate.recording or generation != self._generation:
                return
            with torch.no_grad():
                if grad_outputs and grad_outputs[0] is not None:
                    entry.grad_out = self._buffer.reduce_gradient_again(grad_outputs[0], entry.output_slot)
                if grad_inputs and grad_inputs[0] is not None:
                    entry.grad_in = self._buffer.reduce(grad_inputs[0], norm_only=True)

        node.register_hook(backward)

    def _state(
        self,
        module: _BatchNorm,
        x: torch.Tensor,
        output: torch.Tensor,
        before: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> int:
        """Put the seven numbers of `_STATE` into a slot and return it."""
        count = x.numel() // x.shape[1]
        saved = _saved_statistics(module, x, output)
        if saved is not None:
            slot: int = self._buffer.rows.batchnorm(*saved, *(before or (None, None)), module.weight, count, module.eps)
            if slot >= 0:
                return slot
        return self._buffer.values(_state(module, x.detach(), saved, before))

    @property
    def has_gradients(self) -> bool:
        """Whether a backward pass reached any entry of the open step."""
        return any(entry.grad_out >= 0 for entry in self._entries.values())

    def discard(self) -> None:
        """Forget the open step."""
        self._entries = {}
        self._before.clear()
        self._places.clear()
        self.gate.close_step()
        self._generation += 1

    def close_step(self, step: int) -> Callable[[Rows], None]:
        """End the step; the function returned takes its rows once they are on the host."""
        if not self._watched:
            return lambda _: None
        entries = [entry for _, entry in sorted(self._entries.items())]
        self.discard()
        keys = self._keys_of([(entry.layer, *entry.facts) for entry in entries])
        slots = [
            (entry.input_slot, entry.output_slot, entry.state_slot, entry.grad_in, entry.grad_out) for entry in entries
        ]
        sizes = [entry.sizes for entry in entries]

        def deliver(rows: Rows) -> None:
            if entries:
                self._log.append_rows(step, keys, rows, np.array(slots, dtype=np.int64), tuple(np.array(sizes).T))

        return deliver

    def _keys_of(self, found: list[tuple[object, ...]]) -> list[tuple[object, ...]]:
        signature = tuple(found)
        keys = self._keys.get(signature)
        if keys is None:
            calls: Counter[object] = Counter()
            keys = []
            for layer, *facts in found:
                keys.append((layer, calls[layer], *facts))
                calls[layer] += 1
            if len(self._keys) >= _KNOWN:
                self._keys.clear()
            self._keys[signature] = keys
        return keys

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of the steps closed."""
        return {"log": self._log.state_dict(), "not_seen": dict(self.not_seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self._log.load_state_dict(state["log"])
        self.not_seen = dict(state["not_seen"])

    def frame(self) -> Any:
        """Return `trace.batchnorm` so far."""
        frame = self._log.frame()
        return frame.astype({"training": bool}) if len(frame) else frame


def _derive(rows: Rows, sizes: Rows) -> dict[str, Rows]:
    """Return the value columns from the rows of input, output, state and the gradients of input and output."""
    std_in, std_out = (statistics(rows[:, place], sizes[:, place].astype(np.int64))["std"] for place in range(2))
    values = {name: rows[:, 2, place] for place, name in enumerate(_STATE)}
    with np.errstate(divide="ignore", invalid="ignore"):
        return values | {"grad_gain": norm_of(rows[:, 3]) / norm_of(rows[:, 4]), "act_gain": std_out / std_in}


def _state(
    module: _BatchNorm,
    x: torch.Tensor,
    saved: tuple[torch.Tensor, torch.Tensor] | None,
    before: tuple[torch.Tensor, torch.Tensor] | None,
) -> list[torch.Tensor]:
    """Return the seven numbers of `_STATE`, on the layer's own device."""
    count = x.numel() // x.shape[1]
    mean, var = _batch_statistics(module, x, saved)
    nan = torch.full((), float("nan"), device=x.device, dtype=mean.dtype)
    mean_gap = var_gap = nan
    if before is not None:
        # Below eps the layer no longer divides by the variance: one constant channel must not drown the others.
        least = max(module.eps, torch.finfo(mean.dtype).tiny)
        running_mean, running_var = (value.to(mean.dtype) for value in before)
        unbiased = (var * (count / max(count - 1, 1))).clamp(min=least)
        mean_gap = ((mean - running_mean).square() / unbiased).mean().sqrt()
        var_gap = (unbiased.log() - running_var.clamp(min=least).log()).square().mean().sqrt()
    scale = torch.ones_like(mean) if module.weight is None else module.weight.detach().to(mean.dtype)
    size = scale.abs()
    low = (var < module.eps).to(mean.dtype).mean() + 0 * var.mean()  # NaN where a variance is not finite
    return [mean_gap, var_gap, scale.mean(), scale.std(correction=0), size.max(), size.min(), low]


def _saved_statistics(
    module: _BatchNorm, x: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return mean and 1/sqrt(var + eps) of each channel of this batch, as the layer's graph node has saved them.

    Then the input is not read again. None where the layer did not normalize by the batch, or nothing is to be had.
    """
    node = output.grad_fn
    # Under saved-tensor hooks a look at what was saved calls them: checkpointing would run its segment again.
    if node is None or not (module.training or module.running_mean is None) or _saving_is_hooked():
        return None
    mean = getattr(node, "_saved_result1", None)
    inverse_std = getattr(node, "_saved_result2", None)
    if mean is not None and inverse_std is not None and mean.shape == inverse_std.shape == (x.shape[1],):
        return mean, inverse_std
    return None


def _batch_statistics(
    module: _BatchNorm, x: torch.Tensor, saved: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and biased variance of each channel of this batch.

    A saved value gives the variance to eps times rounding, which is plenty for a gap.
    """
    if saved is not None:
        mean, inverse_std = (value if value.dtype == torch.float64 else value.float() for value in saved)
        return mean, (inverse_std.pow(-2) - module.eps).clamp(min=0)
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    var, mean = torch.var_mean(wide, dim=[0, *range(2, x.dim())], correction=0)
    return mean, var


def _saving_is_hooked() -> bool:
    """Return whether saved-tensor hooks are active; torch has no public way to ask, so an unknown answer is yes."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None
