"""Norms of parameters that lie in pieces on several ranks (DTensor): of the whole tensor, never of a local shard."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import timedelta
from itertools import count
from typing import Any, Final, final

import torch

from gradlab.errors import UsageError
from gradlab.probes.buffer import StepBuffer
from gradlab.probes.reduce import ROW, cpu_row, device_row, is_distributed

__all__ = ["ShardedRows", "await_ranks"]

#: Seconds that a rank waits for the others to call watch too.
PATIENCE = 120.0
_KINDS: Final = 3  # numbers kept of a parameter: of its weight, its gradient, its update
_SCALE, _SQUARES, _NONFINITE = (ROW.index(name) for name in ("scale", "squares", "nonfinite"))
_meetings = count()


@final
class ShardedRows:
    """Rows of the local shards of some parameters, joined across ranks once a step.

    Joining takes two small all-reduces for each mesh and way of sharding. Their size does not depend on what a rank
    has read, so that a gradient which only some ranks have cannot make the others wait for ever. All ranks must
    record the same steps.

    Args:
        params: The sharded parameters by place among all parameters.
        buffer: Where the joined rows go.
    """

    def __init__(self, params: dict[int, Any], buffer: StepBuffer) -> None:
        self._buffer = buffer
        self._groups: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
        for place, param in params.items():
            self._groups.setdefault((param.device_mesh, _sharded_dims(param)), []).append(place)
        self._rows: dict[tuple[int, int], torch.Tensor] = {}

    def add(self, place: int, kind: int, x: Any) -> None:
        """Read the local shard of the weight (kind 0), gradient (1) or update (2) of a parameter."""
        # The norm of a sum is not the sum of norms: what ranks still have to add up is added up first.
        partial = [placement.is_partial() for placement in x.placements]
        if any(partial):
            from torch.distributed.tensor import Replicate

            target = [Replicate() if open_ else p for open_, p in zip(partial, x.placements, strict=True)]
            x = x.redistribute(placements=target)
        local = x.to_local().detach()
        if local.is_cpu:
            self._rows[place, kind] = torch.tensor(cpu_row(local, norm_only=True), dtype=torch.float64)
        else:
            self._rows[place, kind] = device_row(local)

    def discard(self) -> None:
        """Forget the open step."""
        self._rows = {}

    def join(self) -> dict[tuple[int, int], int]:
        """Put the joined rows into the buffer and return their slots by place and kind."""
        rows, self._rows = self._rows, {}
        slots: dict[tuple[int, int], int] = {}
        for (mesh, dims), places in self._groups.items():
            keys = [(place, kind) for place in places for kind in range(_KINDS)]
            some = next((rows[key] for key in keys if key in rows), None)
            device = torch.device("cpu") if some is None else some.device
            none = torch.zeros(len(ROW), device=device, dtype=torch.float64 if some is None else some.dtype)
            joined = _joined(torch.stack([rows.get(key, none) for key in keys]), mesh, dims)
            first = self._buffer.block(joined)
            slots |= {key: first + offset for offset, key in enumerate(keys) if key in rows}
        return slots


def _sharded_dims(param: Any) -> tuple[int, ...]:
    """Return the dimensions of its mesh along which the parameter is cut; along others each rank has all of it."""
    return tuple(dim for dim, placement in enumerate(param.placements) if not placement.is_replicate())


def _joined(rows: torch.Tensor, mesh: Any, dims: tuple[int, ...]) -> torch.Tensor:
    """Return the rows of the whole tensors, scaled by a power of two so that no square leaves the range."""
    from torch.distributed import ReduceOp, all_reduce

    norms = rows[:, _SCALE] * rows[:, _SQUARES].sqrt()
    usable = norms.isfinite() & (norms > 0)
    exponent = torch.frexp(norms.where(usable, torch.ones_like(norms))).exponent.to(norms.dtype)
    exponent = exponent.where(usable, torch.full_like(exponent, -math.inf))
    for dim in dims:
        all_reduce(exponent, ReduceOp.MAX, group=mesh.get_group(dim))
    exponent = exponent.where(exponent.isfinite(), torch.zeros_like(exponent))
    sums = torch.stack([(norms * torch.exp2(-exponent)).square(), rows[:, _NONFINITE]])
    for dim in dims:
        all_reduce(sums, ReduceOp.SUM, group=mesh.get_group(dim))
    joined = torch.full_like(rows, math.nan)
    joined[:, _SCALE], joined[:, _SQUARES], joined[:, _NONFINITE] = torch.exp2(exponent), *sums
    return joined


def await_ranks(params: Iterable[torch.Tensor], told: Sequence[object]) -> None:
    """Wait until every rank that holds a shard watches too: joining norms needs all of them.

    Args:
        params: The parameters of the model; without a sharded one there is nothing to wait for.
        told: What must be the same on all ranks, of plain values.

    Raises:
        UsageError: Another rank did not call watch in time, or with other settings.
    """
    ranks: set[int] = set()
    for param in params:
        if is_distributed(param):
            ranks.update(param.device_mesh.mesh.flatten().tolist())  # type: ignore[attr-defined]
    if len(ranks) < 2:
        return
    from torch import distributed

    store = distributed.distributed_c10d._get_default_store()
    mine, prefix = repr(list(told)), f"gradlab/watch/{next(_meetings)}"
    store.set(f"{prefix}/{distributed.get_rank()}", mine)
    keys = [f"{prefix}/{rank}" for rank in sorted(ranks)]
    try:
        store.wait(keys, timedelta(seconds=PATIENCE))
    except RuntimeError as error:
        raise UsageError(
            f"This model is sharded over {len(ranks)} ranks, but not all of them called watch within {PATIENCE:g} s: "
            "norms of whole tensors need every rank, so call watch on each."
        ) from error
    others = {bytes(store.get(key)).decode() for key in keys}
    if others != {mine}:
        raise UsageError(
            f"This model is sharded over {len(ranks)} ranks, which must watch alike; got settings {sorted(others)}."
        )
