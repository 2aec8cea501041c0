"""Units that no sample switched on, and units that sit where their activation is flat, over the recorded window."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, final

import pandas as pd
import torch
from torch import nn

from gradlab.probes.outputs import OWN_CALLS, channel_max
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


@final
class UnitProbe:
    """Keeps one number a channel of each activation module on its device; read when the trace is asked for.

    A unit is a channel: dimension 1 of an image-like output (4 or 5 dimensions), else the last. One module used in
    several places of the net (a single ReLU after many layers) has units of its own in each; one called more than
    eight times in a pass is taken for a cell that walks through time, whose units are the same at each call.

    Args:
        layers: Watched modules by dotted path; only rectifiers and bounded activations are followed.
    """

    def __init__(self, layers: Sequence[tuple[str, nn.Module]]) -> None:
        self._layers = [name for name, module in layers if isinstance(module, (*_RECTIFIERS, *_BOUNDED))]
        self._cells: set[str] = set()
        self._alive: dict[tuple[str, int], torch.Tensor] = {}
        self._settled: dict[tuple[str, int], torch.Size] = {}
        self._flat: dict[tuple[str, int], tuple[torch.Tensor, int]] = {}
        self._followed: set[Any] = set()  # hooks that keep a maximum themselves

    def __bool__(self) -> bool:
        """Whether there is a module to follow."""
        return bool(self._layers)

    def follower(self, layer: str, module: nn.Module) -> Callable[..., None] | None:
        """Return what sees the recorded calls of a module, as an OutputHook wants it; None if it has no units."""
        return partial(self._see, layer) if isinstance(module, (*_RECTIFIERS, *_BOUNDED)) else None

    def _see(self, layer: str, hook: Any, call: int, module: nn.Module, output: Any) -> None:
        if not isinstance(output, torch.Tensor) or not can_reduce(output) or not output.numel():
            return
        if call == OWN_CALLS:
            self._cells.add(layer)
        if isinstance(module, _RECTIFIERS):
            place = (layer, call)
            if self._settled.get(place) != output.shape[1:]:
                self._see_rectifier(place, output.detach())
            self._let_follow(hook, place, output)
        else:
            with torch.no_grad():
                self._see_bounded((layer, call), module, output.detach())

    def _let_follow(self, hook: Any, place: tuple[str, int], output: torch.Tensor) -> None:
        """Let the hook keep the maximum from now on, where it is one that C can update in place."""
        top = self._alive[place]
        if top.is_inference():  # which could not be written to outside of that mode
            with torch.inference_mode(mode=False):
                top = self._alive[place] = top.clone()
        if top.is_cpu and top.dtype is torch.float32 and top.is_contiguous() and output.dim() > 1:
            inner = math.prod(output.shape[2:]) if output.dim() in (4, 5) else 1
            self._followed.add(hook)
            hook.follow(place[1], top, top.data_ptr(), top.numel(), inner, tuple(output.shape[1:]))

    def _see_rectifier(self, place: tuple[str, int], output: torch.Tensor) -> None:
        known = self._alive.get(place)
        most = channel_max(output)
        if known is None or known.shape != most.shape:
            self._alive[place] = most
        else:
            self._alive[place] = torch.maximum(known.to(most.device), most)
        if output.is_cpu:  # elsewhere a branch on data would wait for the device
            # Once each unit was active there is nothing more to learn; not so where NaN hides what a unit does.
            alive = bool((self._alive[place] > 0).all())
            self._settled[place] = output.shape[1:] if alive else torch.Size((-1,))

    def _see_bounded(self, place: tuple[str, int], module: nn.Module, output: torch.Tensor) -> None:
        flat = next(rule for kind, rule in _BOUNDED.items() if isinstance(module, kind))(output)
        rows = flat.movedim(_channel_dim(output), -1).flatten(0, -2) if output.dim() > 1 else flat.unsqueeze(0)
        count = rows.sum(0, dtype=torch.float32)
        known, seen = self._flat.get(place, (None, 0))
        if known is None or known.shape != count.shape:
            known, seen = torch.zeros_like(count), 0
        self._flat[place] = (known.to(count.device) + count, seen + rows.shape[0])

    def _tops(self, layer: str) -> list[torch.Tensor]:
        """Return the largest entry that each unit of a rectifier ever put out, a tensor a place in the net."""
        tops = [self._alive[layer, call] for call in range(OWN_CALLS + 1) if (layer, call) in self._alive]
        if layer in self._cells and len({top.shape for top in tops}) == 1:
            tops = [torch.stack(tops).amax(0)]
        return tops

    def dead_units(self) -> tuple[int, int]:
        """Return (dead, all) units of the rectifiers so far; (0, 0) on an accelerator, where it would wait."""
        tops = [top for layer in self._layers for top in self._tops(layer)]
        if not all(top.is_cpu for top in tops):
            return 0, 0
        return sum(int((top <= 0).sum()) for top in tops), sum(top.numel() for top in tops)

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of the units so far."""
        return {
            "cells": sorted(self._cells),
            "alive": [(*place, top.clone()) for place, top in self._alive.items()],  # hooks write into them
            "settled": [(*place, list(shape)) for place, shape in self._settled.items()],
            "flat": [(*place, count, seen) for place, (count, seen) in self._flat.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned, wherever it lies: each layer's next output says where it belongs."""
        self._cells = set(state["cells"])
        self._alive = {(layer, call): top for layer, call, top in state["alive"]}
        self._settled = {(layer, call): torch.Size(shape) for layer, call, shape in state["settled"]}
        self._flat = {(layer, call): (count, seen) for layer, call, count, seen in state["flat"]}
        for hook in self._followed:
            hook.forget()

    def frame(self) -> pd.DataFrame:
        """Return `trace.units` so far."""
        nan = float("nan")
        rows: list[tuple[str, int, float, float]] = []
        for layer in self._layers:
            tops = self._tops(layer)
            counts = [self._flat[layer, call] for call in range(OWN_CALLS + 1) if (layer, call) in self._flat]
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
