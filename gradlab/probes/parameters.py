"""The size of each parameter, of its gradient as the optimizer uses it, and of the update it got."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import nn

from gradlab.probes.buffer import Rows, StepBuffer
from gradlab.probes.log import TableLog
from gradlab.probes.reduce import can_reduce, is_distributed, norm_of
from gradlab.probes.sharded import ShardedRows

__all__ = ["ParameterProbe", "ReadScale", "clip_coefficient", "describe_parameters"]

_NONFINITE = 7  # place of the count in a row
_WEIGHT, _GRAD, _UPDATE = range(3)
_NONE = -1  # slot of what was not read


class ReadScale(NamedTuple):
    """What the gradients of one reading are divided by: numbers (float), or the slots (int) that hold them."""

    loss: int | float = 1.0
    clip_norm: int | float = float("nan")
    clip_max: int | float = float("nan")


def describe_parameters(
    params: Sequence[tuple[str, nn.Parameter]], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Return facts about parameters as plain JSON data, as they are when the recording begins.

    Args:
        params: Parameters by dotted path.
        optimizers: The optimizers, as far as they are known.

    Returns:
        params: name, shape and dtype of each; params_without_grad: names of those with requires_grad=False (frozen on
        purpose); params_not_optimized: names of the others that no optimizer holds; optimizer: its class, of several
        their classes with ", " between them.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    left_out = [name for name, param in params if param.requires_grad and optimizers and id(param) not in held]
    return {
        "params": [[name, list(param.shape), str(param.dtype).removeprefix("torch.")] for name, param in params],
        "params_without_grad": [name for name, param in params if not param.requires_grad],
        "params_not_optimized": left_out,
        "optimizer": ", ".join(type(optimizer).__name__ for optimizer in optimizers) or None,
    }


@final
class ParameterProbe:
    """Reads parameters and gradients when an optimizer is about to step, and its parameters again after it.

    A parameter is looked up by its module and name at each reading: a model may be given new ones on the way.

    Args:
        model: The watched model; its parameters are those it has now, a shared one once.
        buffer: Where rows go.
    """

    def __init__(self, model: nn.Module, buffer: StepBuffer) -> None:
        self._buffer = buffer
        named = list(model.named_parameters())
        self.names = [name for name, _ in named]
        self._owners = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name, _ in named]
        self._keys = [(name, name.rpartition(".")[0], param.numel()) for name, param in named]
        self.with_grad: set[str] = set()  # layers whose parameters had a gradient in a recorded step
        self.not_seen: dict[str, str] = {}
        sharded = {place: param for place, (_, param) in enumerate(named) if is_distributed(param)}
        self._sharded = ShardedRows(sharded, buffer) if sharded else None
        self._sharded_places = frozenset(sharded)
        self._log = TableLog(
            ("param", "layer", "entries"),
            ("weight_norm", "grad_norm", "grad_norm_unclipped", "update_norm", "grad_nonfinite"),
        )
        self._slots: dict[tuple[int, int], int] = {}  # by place of the parameter and what of it
        self._scales: dict[int, ReadScale] = {}
        self._before: dict[int, torch.Tensor] = {}
        self._read = False

    def _now(self) -> list[nn.Parameter | None]:
        return [owner._parameters.get(name) for owner, name in self._owners]

    def before_update(self, scale: ReadScale, *, but: Collection[int] = (), keep: Collection[int] = ()) -> None:
        """Reduce weights and gradients; what was read before in this step is replaced.

        Args:
            scale: What these gradients have to be divided by.
            but: Ids of parameters to leave alone: other optimizers use them.
            keep: Ids of the parameters that an update follows of: they are copied until `after_update`.
        """
        self._read, self._before = True, {}
        with torch.no_grad():
            for place, param in enumerate(self._now()):
                if param is None or id(param) in but:
                    continue
                self._scales[place] = scale
                self._reduce(place, _WEIGHT, param)
                self._reduce(place, _GRAD, param.grad)
                self._slots.pop((place, _UPDATE), None)
                if id(param) in keep:
                    self._before[place] = param.detach().clone()
                if param.grad is not None:
                    self.with_grad.add(self._keys[place][1])

    def _reduce(self, place: int, kind: int, x: torch.Tensor | None) -> None:
        self._slots.pop((place, kind), None)
        x = None if x is None else _entries(x)
        if x is None:
            return
        if is_distributed(x):
            if self._sharded is not None and place in self._sharded_places:
                self._sharded.add(place, kind, x)
            else:
                self.not_seen.setdefault(self.names[place], "it was sharded after watch was called: shard, then watch")
        elif can_reduce(x):
            self._slots[place, kind] = self._buffer.reduce(x, norm_only=True)

    def after_update(self) -> None:
        """Reduce what the optimizer added."""
        with torch.no_grad():
            now = self._now()
            for place, old in self._before.items():
                new = now[place]
                if new is None or old.shape != new.shape:
                    continue
                if is_distributed(new) and is_distributed(old):
                    self._reduce(place, _UPDATE, new.detach() - old)
                elif can_reduce(new):
                    self._slots[place, _UPDATE] = self._buffer.reduce_difference(new, old)
                elif new.is_complex():
                    self._reduce(place, _UPDATE, new.detach() - old)
        self._before = {}

    def discard(self) -> None:
        """Forget the open step."""
        self._slots, self._scales, self._before, self._read = {}, {}, {}, False
        if self._sharded is not None:
            self._sharded.discard()

    def close_step(self, step: int) -> Callable[[Rows], float]:
        """End the step; the function returned takes its rows and gives the norm of all gradients together."""
        if self._sharded is not None and self._read:
            with torch.no_grad():
                self._slots |= self._sharded.join()
        keys = self._keys if self._read else []
        slots = np.array([[self._slots.get((p, kind), _NONE) for kind in range(3)] for p in range(len(keys))], int)
        slots = slots.reshape(-1, 3)
        of_place = [self._scales.get(place, ReadScale()) for place in range(len(keys))]
        self.discard()

        def deliver(rows: Rows) -> float:
            padded = np.vstack([rows, np.full((1, rows.shape[1]), np.nan)])  # slot -1: nothing to read
            known = {scale: _numbers(scale, rows) for scale in set(of_place)}
            loss, clip = np.array([known[scale] for scale in of_place]).reshape(-1, 2).T
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                grad_norm = norm_of(padded[slots[:, _GRAD]]) / loss
                # Clipping an infinite norm multiplies by 0, from which nothing can be told: 0/0 is NaN.
                unclipped = grad_norm / clip
            self._log.append(
                step,
                keys,
                {
                    "weight_norm": norm_of(padded[slots[:, _WEIGHT]]),
                    "grad_norm": grad_norm,
                    "grad_norm_unclipped": unclipped,
                    "update_norm": norm_of(padded[slots[:, _UPDATE]]),
                    "grad_nonfinite": padded[slots[:, _GRAD]][:, _NONFINITE],
                },
            )
            return _total(grad_norm[slots[:, _GRAD] >= 0])

        return deliver

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of the steps closed."""
        return {"log": self._log.state_dict(), "with_grad": sorted(self.with_grad), "not_seen": dict(self.not_seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self._log.load_state_dict(state["log"])
        self.with_grad, self.not_seen = set(state["with_grad"]), dict(state["not_seen"])

    def frame(self) -> Any:
        """Return `trace.params` so far."""
        return self._log.frame()


def _entries(x: torch.Tensor) -> torch.Tensor:
    """Return a dense real tensor with the norm of `x`, where that is possible."""
    if x.layout is not torch.strided:
        x = x.coalesce().values() if x.is_sparse else x.to_dense()
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _numbers(scale: ReadScale, rows: Rows) -> tuple[float, float]:
    """Return what a reading's gradients are divided by, and what clipping multiplied them by."""
    loss, norm, most = (float(rows[value, 0]) if isinstance(value, int) else value for value in scale)
    return loss, clip_coefficient(norm, most)


def clip_coefficient(norm: float, most: float) -> float:
    """Return what torch.nn.utils.clip_grad_norm_ multiplies by: max_norm / (total + 1e-6), at most 1."""
    if np.isnan(norm) or np.isnan(most):
        return float("nan")
    return min(1.0, most / (norm + 1e-6))


def _total(norms: Any) -> float:
    """Return the norm of several norms without leaving float64's range; NaN if there are none."""
    if not len(norms):
        return float("nan")
    top = float(np.max(norms))
    if not np.isfinite(top) or top == 0:
        return top
    return top * float(np.sqrt(np.sum((norms / top) ** 2)))
