"""The size of each parameter, of its gradient as the optimizer uses it, and of the update it got."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import nn

from gradlab.probes.arithmetic import SgdGroup
from gradlab.probes.buffer import Rows, StepBuffer
from gradlab.probes.log import TableLog
from gradlab.probes.reduce import can_reduce, is_distributed, norm_of
from gradlab.probes.rows import MISSING
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
        self._got_grad = np.zeros(len(named), dtype=bool)  # in any recorded step
        self.not_seen: dict[str, str] = {}
        sharded = {place: param for place, (_, param) in enumerate(named) if is_distributed(param)}
        self._sharded = ShardedRows(sharded, buffer) if sharded else None
        self._sharded_places = frozenset(sharded)
        self._log = TableLog(
            ("param", "layer", "entries"),
            ("weight_norm", "grad_norm", "grad_norm_unclipped", "update_norm", "grad_nonfinite"),
            _derive,
        )
        self._slots = np.full((len(named), 3), _NONE)  # by place of the parameter and what of it
        self._scales: list[tuple[ReadScale, list[int]]] = []  # of the places read with it; the last one counts
        self._before: dict[int, torch.Tensor] = {}
        self._foretold: list[tuple[list[torch.Tensor], list[int]]] = []
        self._foretells = True
        self._read = False

    @property
    def with_grad(self) -> set[str]:
        """Layers whose own parameters had gradients in a recorded step."""
        return {self._keys[place][1] for place in np.flatnonzero(self._got_grad)}

    def _now(self) -> list[nn.Parameter | None]:
        return [owner._parameters.get(name) for owner, name in self._owners]

    def before_update(
        self,
        scale: ReadScale,
        *,
        but: Collection[int] = (),
        keep: Collection[int] = (),
        groups: Sequence[SgdGroup] | None = None,
    ) -> None:
        """Reduce weights and gradients; what was read before in this step is replaced.

        Args:
            scale: What these gradients have to be divided by.
            but: Ids of parameters to leave alone: other optimizers use them.
            keep: Ids of the parameters that an update follows of: they are copied until `after_update`.
            groups: Parameters of which the update can be foretold, as far as they are ordinary: not copied.
        """
        self._read, self._before, self._foretold = True, {}, []
        with torch.no_grad():
            mine = {id(x): (p, x) for p, x in enumerate(self._now()) if x is not None and id(x) not in but}
            places = [place for place, _ in mine.values()]
            self._scales.append((scale, places))
            self._slots[places] = _NONE
            for group in groups or () if self._foretells else ():
                self._foretell(group, mine)
            params = [param for _, param in mine.values()]
            places = [place for place, _ in mine.values()]
            slots = self._buffer.parameters(params)
            self._slots[places, :_UPDATE] = slots
            for at, kind in np.argwhere(slots == _NONE).tolist():
                self._reduce(places[at], kind, params[at] if kind == _WEIGHT else params[at].grad)
            self._got_grad[places] |= slots[:, _GRAD] != MISSING
            for place, param in zip(places, params, strict=True):
                if id(param) in keep:
                    self._before[place] = param.detach().clone()

    def _foretell(self, group: SgdGroup, mine: dict[int, tuple[int, nn.Parameter]]) -> None:
        """Read what is ordinary of a group, its coming updates included, and take it out of `mine`."""
        read = self._buffer.sgd(group)
        if read is None:
            return
        params, places, slots = [], [], []
        for param, row in zip(group.params, read, strict=True):
            if row[0] >= 0 and id(param) in mine:
                params.append(param)
                places.append(mine.pop(id(param))[0])
                slots.append(row)
        if places:
            self._slots[places] = slots
            self._got_grad[places] = True
            self._foretold.append((params, places))

    def _reduce(self, place: int, kind: int, x: torch.Tensor | None) -> None:
        self._slots[place, kind] = _NONE
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
        for params, places in self._foretold:
            if self._buffer.rows.stepped(params, self._slots[places, _UPDATE].tobytes()):
                # This SGD does not do what torch's does: its updates are measured from now on.
                self._slots[places, _UPDATE] = _NONE
                self._foretells = False
        self._foretold = []
        with torch.no_grad():
            now = self._now() if self._before else []
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
        self._slots[:], self._scales, self._before, self._foretold, self._read = _NONE, [], {}, [], False
        if self._sharded is not None:
            self._sharded.discard()

    def close_step(self, step: int) -> Callable[[Rows], float]:
        """End the step; the function returned takes its rows and gives the norm of all gradients together."""
        if self._sharded is not None and self._read:
            with torch.no_grad():
                for where, slot in self._sharded.join().items():
                    self._slots[where] = slot
        keys = self._keys if self._read else []
        slots = self._slots[: len(keys)].copy()
        scales = self._scales
        self.discard()

        def deliver(rows: Rows) -> float:
            facts = np.full((len(keys), 2), (1.0, np.nan))
            for scale, places in scales:
                facts[places] = _numbers(scale, rows)
            self._log.append_rows(step, keys, rows, slots, facts)
            known = slots[:, _GRAD] >= 0
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                return _total(norm_of(rows[slots[known, _GRAD]]) / facts[known, 0])

        return deliver

    def frame(self) -> Any:
        """Return `trace.params` so far."""
        return self._log.frame()


def _derive(rows: Rows, facts: Rows) -> dict[str, Rows]:
    """Return the value columns from the rows of weight, gradient and update, and from loss scale and clipping."""
    loss_scale, clip = facts.T
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        grad_norm = norm_of(rows[:, _GRAD]) / loss_scale
        return {
            "weight_norm": norm_of(rows[:, _WEIGHT]),
            "grad_norm": grad_norm,
            # Clipping an infinite norm multiplies by 0, from which nothing can be told: 0/0 is NaN.
            "grad_norm_unclipped": grad_norm / clip,
            "update_norm": norm_of(rows[:, _UPDATE]),
            "grad_nonfinite": rows[:, _GRAD, _NONFINITE],
        }


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
