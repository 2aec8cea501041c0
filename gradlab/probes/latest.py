"""The latest recorded step as a snapshot, from tables that hold it already."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import final

import numpy as np
import numpy.typing as npt
import torch

from gradlab.errors import UsageError
from gradlab.live import LayerGroup, LiveView, Snapshot
from gradlab.probes.buffer import StepBuffer
from gradlab.probes.layers import LayerProbe
from gradlab.probes.log import Keys, TableLog
from gradlab.probes.units import UnitProbe

__all__ = ["Latest", "as_view"]


@final
class Latest:
    """Called, it returns the latest step that is on the host, or None before the first. No tensor is reduced for it."""

    def __init__(self, buffer: StepBuffer, layers: LayerProbe, units: UnitProbe, steps: TableLog) -> None:
        self._buffer, self._layers, self._units, self._steps = buffer, layers, units, steps
        self._told = False

    def __call__(self) -> Snapshot | None:
        self._buffer.deliver_ready()
        last = self._steps.last()
        if last is None:
            return None
        step, _, values = last
        loss = float(values["loss"][0])
        self._told = self._told or not math.isnan(loss)  # a loss that nobody tells is NaN in the table
        layers = self._layers.last()
        groups = () if layers is None or layers[0] != step else _by_layer(layers[1], layers[2])
        dead, units = self._units.dead_units()
        share = dead / units if units else math.nan
        return Snapshot(step=step, groups=groups, loss=loss, has_loss=self._told, dead_fraction=share)


def _by_layer(keys: Keys, values: Mapping[str, npt.NDArray[np.float64]]) -> tuple[LayerGroup, ...]:
    """Return a group a layer, in the order in which they first ran; its calls and outputs share one."""
    norms = values["grad_norm"].tolist()
    counts = (np.nan_to_num(values["grad_nonfinite"]) + np.nan_to_num(values["act_nonfinite"])).tolist()
    groups: dict[str, LayerGroup] = {}
    for (name, *_), norm, count in zip(keys, norms, counts, strict=True):
        norm = norm if math.isfinite(norm) else math.nan
        layer = str(name)
        row = LayerGroup(first=layer, last=layer, layers=1, smallest=norm, largest=norm, nonfinite=int(count))
        known = groups.get(layer)
        groups[layer] = row if known is None else replace(known + row, layers=1)
    return tuple(groups.values())


def as_view(live: bool | LiveView) -> LiveView | None:
    """Return the opened view that `watch` was asked for, or None.

    Raises:
        UsageError: It is neither.
    """
    if not isinstance(live, bool | LiveView):
        raise UsageError(f"watch: live takes True, False or a gradlab.live.LiveView; got {type(live).__name__}.")
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    if live is False or (ranks and torch.distributed.get_rank() != 0):  # ranks share a terminal: the first draws
        return None
    view = LiveView() if live is True else live
    view.open()
    return view
