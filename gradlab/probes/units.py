"""Units that no sample switched on, and units that sit where their activation is flat, over the recorded window."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import pandas as pd
import torch
from torch import nn

from gradlab.probes.hooks import CallGate, LayerHook
from gradlab.probes.reduce import can_reduce

__all__ = ["UnitProbe"]

_RECTIFIERS = (nn.ReLU, nn.ReLU6)
#: Bounded activations and the output beyond which the derivative is below 1 % of its largest.
_BOUNDED: dict[type[nn.Module], Callable[[torch.Tensor], torch.Tensor]] = {
    nn.Tanh: lambda y: 1 - y.square() < 0.01,
    nn.Sigmoid: lambda y: y * (1 - y) < 0.01 * 0.25,
    nn.Softsign: lambda y: (1 - y.abs()).square() < 0.01,
    nn.Hardtanh: lambda y: y.abs() >= 1,
    nn.Hardsigmoid: lambda y: (y <= 0) | (y >= 1),
}
_OWN_CALLS = 8  # uses of one module in a pass that count as layers of their own


@final
class UnitProbe:
    """Keeps one number a channel of each activation module on its device; read when the trace is asked for.

    A unit is a channel: dimension 1 of an image-like output (4 or 5 dimensions), else the last. One module used in
    several places of the net (a single ReLU after many layers) has units of its own in each; one called more than
    eight times in a pass is taken for a cell that walks through time, whose units are the same at each call.

    Args:
        model: The watched model; a call of it begins a new pass.
        layers: Watched modules by dotted path; only rectifiers and bounded activations are followed.
        without_grad: Record forward calls made without autograd too.
    """

    def __init__(self, model: nn.Module, layers: Sequence[tuple[str, nn.Module]], *, without_grad: bool) -> None:
        self.gate = CallGate(without_grad=without_grad)
        self._model = model
        self._layers = [(name, module) for name, module in layers if isinstance(module, (*_RECTIFIERS, *_BOUNDED))]
        self._calls: Counter[str] = Counter()
        self._cells: set[str] = set()
        self._alive: dict[tuple[str, int], torch.Tensor] = {}
        self._settled: dict[tuple[str, int], torch.Size] = {}
        self._flat: dict[tuple[str, int], tuple[torch.Tensor, int]] = {}

    def attach(self) -> list[Any]:
        """Register the hooks and return their handles."""
        if not self._layers:
            return []
        handles = [module.register_forward_hook(LayerHook(self._forward_hook(name))) for name, module in self._layers]
        return [self._model.register_forward_pre_hook(LayerHook(self._begin_pass)), *handles]

    def _begin_pass(self, *_: object) -> None:
        self._calls.clear()

    def _forward_hook(self, layer: str) -> Callable[[nn.Module, Any, Any], None]:
        def forward(module: nn.Module, _: Any, output: Any) -> None:
            if self.gate.admit(layer) is None:
                return
            if not isinstance(output, torch.Tensor) or not can_reduce(output) or not output.numel():
                return
            call = min(self._calls[layer], _OWN_CALLS)
            self._calls[layer] += 1
            if call == _OWN_CALLS:
                self._cells.add(layer)
            with torch.no_grad():
                if isinstance(module, _RECTIFIERS):
                    self._see_rectifier((layer, call), output.detach())
                else:
                    self._see_bounded((layer, call), module, output.detach())

        return forward

    def _see_rectifier(self, place: tuple[str, int], output: torch.Tensor) -> None:
        if self._settled.get(place) == output.shape[1:]:
            return
        top = _channel_max(output)
        known = self._alive.get(place)
        self._alive[place] = top = (
            top if known is None or known.shape != top.shape else torch.maximum(known.to(top.device), top)
        )
        if output.is_cpu:  # elsewhere a branch on data would wait for the device
            # Once each unit was active there is nothing more to learn; not so where NaN hides what a unit does.
            self._settled[place] = output.shape[1:] if bool((top > 0).all()) else torch.Size((-1,))

    def _see_bounded(self, place: tuple[str, int], module: nn.Module, output: torch.Tensor) -> None:
        flat = next(rule for kind, rule in _BOUNDED.items() if isinstance(module, kind))(output)
        rows = flat.movedim(_channel_dim(output), -1).flatten(0, -2) if output.dim() > 1 else flat.unsqueeze(0)
        count = rows.sum(0, dtype=torch.float32)
        known, seen = self._flat.get(place, (None, 0))
        if known is None or known.shape != count.shape:
            known, seen = torch.zeros_like(count), 0
        self._flat[place] = (known.to(count.device) + count, seen + rows.shape[0])

    def close_step(self) -> None:
        """End the step; what is known of the units stays."""
        self._calls.clear()
        self.gate.close_step()

    def _tops(self, layer: str) -> list[torch.Tensor]:
        """Return the largest entry that each unit of a rectifier ever put out, a tensor a place in the net."""
        tops = [self._alive[layer, call] for call in range(_OWN_CALLS + 1) if (layer, call) in self._alive]
        if layer in self._cells and len({top.shape for top in tops}) == 1:
            tops = [torch.stack(tops).amax(0)]
        return tops

    def dead_units(self) -> tuple[int, int]:
        """Return (dead, all) units of the rectifiers so far; (0, 0) on an accelerator, where it would wait."""
        tops = [top for layer, _ in self._layers for top in self._tops(layer)]
        if not all(top.is_cpu for top in tops):
            return 0, 0
        return sum(int((top <= 0).sum()) for top in tops), sum(top.numel() for top in tops)

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of the units so far."""
        return {
            "cells": sorted(self._cells),
            "alive": [(*place, top) for place, top in self._alive.items()],
            "settled": [(*place, list(shape)) for place, shape in self._settled.items()],
            "flat": [(*place, count, seen) for place, (count, seen) in self._flat.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned, wherever it lies: each layer's next output says where it belongs."""
        self._cells = set(state["cells"])
        self._alive = {(layer, call): top for layer, call, top in state["alive"]}
        self._settled = {(layer, call): torch.Size(shape) for layer, call, shape in state["settled"]}
        self._flat = {(layer, call): (count, seen) for layer, call, count, seen in state["flat"]}

    def frame(self) -> pd.DataFrame:
        """Return `trace.units` so far."""
        nan = float("nan")
        rows: list[tuple[str, int, float, float]] = []
        for layer, _ in self._layers:
            tops = self._tops(layer)
            counts = [self._flat[layer, call] for call in range(_OWN_CALLS + 1) if (layer, call) in self._flat]
            if layer in self._cells and len({count.shape for count, _ in counts}) == 1:
                counts = [(torch.stack([count for count, _ in counts]).sum(0), sum(seen for _, seen in counts))]
            if tops:
                dead = torch.cat([(top <= 0).double().reshape(-1) for top in tops])  # NaN is not dead
                rows.append((layer, dead.numel(), nan if dead.is_meta else float(dead.mean()), nan))
            elif counts:
                flat = torch.cat([(count / seen > 0.5).double().reshape(-1) for count, seen in counts])
                rows.append((layer, flat.numel(), nan, nan if flat.is_meta else float(flat.mean())))
        return pd.DataFrame(rows, columns=["layer", "units", "dead_fraction", "saturated_fraction"])


def _on_host(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_meta else x.cpu()


def _channel_dim(output: torch.Tensor) -> int:
    return 1 if output.dim() in (4, 5) else output.dim() - 1


def _channel_max(output: torch.Tensor) -> torch.Tensor:
    """Return the largest entry of each channel, reading memory in its own order; never a view of the output."""
    if output.dim() == 4 and output.is_contiguous(memory_format=torch.channels_last) and output.shape[1] > 1:
        # One long row a sample first: a reduction over a short last dimension does not vectorize.
        samples = output.permute(0, 2, 3, 1).reshape(output.shape[0], -1)
        return samples.amax(0).view(-1, output.shape[1]).amax(0)
    if output.dim() in (4, 5):
        return output.flatten(2).amax(2).amax(0)
    return output.amax(tuple(range(output.dim() - 1))) if output.dim() > 1 else output.clone()
