"""The size of each parameter, of its gradient as the optimizer uses it, and of the update it got."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gradlab.probes.arithmetic import SgdGroup
from gradlab.probes.buffer import Rows, StepBuffer
from gradlab.probes.flat import FEW_ENTRIES, FlatTensors
from gradlab.probes.log import TableLog
from gradlab.probes.plan import Parameters, Part, Plan, make_plan
from gradlab.probes.reduce import can_reduce, has_memory, is_distributed, norm_of
from gradlab.probes.rows import MISSING, NONE
from gradlab.probes.sharded import ShardedRows

__all__ = ["ParameterProbe", "ReadScale", "clip_coefficient", "describe_parameters"]

_SCALE, _NONFINITE = 0, 7  # places in a row
_WEIGHT, _GRAD, _UPDATE = range(3)


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
        owners = [vars(model.get_submodule(name.rpartition(".")[0])) for name, _ in named]
        self._where = owners, [name.rpartition(".")[2] for name, _ in named]
        self._keys = [(name, name.rpartition(".")[0], param.numel()) for name, param in named]
        self._got_grad = np.zeros(len(named), dtype=bool)  # in any recorded step
        self.not_seen: dict[str, str] = {}
        sharded = {place: param for place, (_, param) in enumerate(named) if is_distributed(param)}
        self._sharded = ShardedRows(sharded, buffer) if sharded else None
        self._sharded_places = frozenset(sharded)
        self._log = TableLog(
            ("param", "layer", "entries"),
            ("weight_norm", "grad_norm", "grad_norm_unclipped", "update_norm", "grad_nonfinite"),
            self._derive,
        )
        self._totals: dict[int, float] = {}  # by step
        self._slots = np.full((len(named), 3), NONE, dtype=np.int64)  # by place of the parameter and what of it
        self._slots_at = self._slots.ctypes.data
        self._scales: list[
            tuple[ReadScale, Sequence[int] | npt.NDArray[np.int64]]
        ] = []  # of the places read with it; the last one counts
        self._before: dict[int, torch.Tensor] = {}
        self._copies: dict[int, torch.Tensor] = {}  # by place: memory for parameters before their update
        #: Places of small parameters, and these end to end, until the update.
        self._before_flat: tuple[npt.NDArray[np.int64], FlatTensors] | None = None
        self._foretold: list[torch.Tensor] = []  # parameters whose updates were foretold, and their places
        self._foretold_places: list[npt.NDArray[np.int64]] = []
        self._foretells = buffer.foretells
        self._plan: Plan | None = None
        self._read = False

    @property
    def with_grad(self) -> set[str]:
        """Layers whose own parameters had gradients in a recorded step."""
        return {self._keys[place][1] for place in np.flatnonzero(self._got_grad)}

    def _now(self) -> list[torch.Tensor | None]:
        return [owner["_parameters"].get(name) for owner, name in zip(*self._where, strict=True)]

    def before_update(
        self,
        scale: ReadScale,
        *,
        but: Collection[int] = (),
        keep: Collection[int] | Callable[[], Collection[int]] = (),
        groups: Sequence[SgdGroup] | None = None,
    ) -> None:
        """Reduce weights and gradients; what was read before in this step is replaced.

        Args:
            scale: What these gradients have to be divided by.
            but: Ids of parameters to leave alone: other optimizers use them.
            keep: Ids of the parameters that an update follows of, or what gives them: those that have to be measured
                are copied until `after_update`.
            groups: Parameters of which the update can be foretold, as far as they are ordinary: not copied.
        """
        self._before, self._before_flat, self._foretold, self._foretold_places = {}, None, [], []
        groups = groups if groups is not None and self._foretells else ()
        plan = self._plan_of(but, groups)
        self._scales.append((scale, plan.places))
        if self._read:
            self._slots[plan.places] = NONE
        self._read, rest = True, plan.rest
        for group, part in zip(groups, plan.groups, strict=True):
            rest = rest | self._foretell(group, part)
        if rest:
            with torch.no_grad():
                self._measure(rest, keep() if callable(keep) else keep)

    def _plan_of(self, but: Collection[int], groups: Sequence[SgdGroup]) -> Plan:
        """Return how the parameters are read: that of the step before where they are the same."""
        plan = self._plan
        if plan is None or not (plan.holds(but, groups) and self._buffer.rows.holds(*self._where, plan.now)):
            plan = self._plan = make_plan(self._now(), but, groups)
        return plan

    def _measure(self, mine: Parameters, keep: Collection[int]) -> None:
        """Read parameters and gradients, and copy the parameters that are updated."""
        params = [param for _, param in mine.values()]
        places = np.array([place for place, _ in mine.values()])
        slots = self._buffer.parameters(params)
        self._slots[places, :_UPDATE] = slots
        self._got_grad[places] |= slots[:, _GRAD] != MISSING
        weights, grads = (np.flatnonzero(slots[:, kind] == NONE).tolist() for kind in (_WEIGHT, _GRAD))
        # Small parameters that no kernel reads are copied end to end: for their norms, and for the update to come.
        kept = [at for at, param in enumerate(params) if id(param) in keep]
        small = [at for at in kept if params[at].numel() <= FEW_ENTRIES] if weights else []
        flat = self._buffer.lay_flat([params[at] for at in small])
        if flat is not None:
            self._before_flat = places[small], flat
            self._slots[places[small], _WEIGHT] = self._buffer.flat_norms(flat)
            kept, weights = _without(kept, small), _without(weights, small)
        self._keep(places[kept].tolist(), [params[at].detach() for at in kept])
        for kind, those, xs in (
            (_WEIGHT, weights, [params[at] for at in weights]),
            (_GRAD, grads, [params[at].grad for at in grads]),
        ):
            self._reduce_all(places[those].tolist(), kind, xs)

    def _keep(self, places: list[int], params: list[torch.Tensor]) -> None:
        """Copy parameters, all in one go, into memory that is kept: fresh pages cost more than the copy."""
        alike: dict[tuple[torch.device, torch.dtype], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for place, param in zip(places, params, strict=True):
            if not has_memory(param) or param.layout is not torch.strided:
                self._before[place] = param.clone()
                continue
            copy = self._copies.get(place)
            if copy is None or (copy.shape, copy.dtype, copy.device, copy.stride()) != (
                param.shape, param.dtype, param.device, param.stride()
            ):  # fmt: skip
                copy = self._copies[place] = torch.empty_like(param)
            self._before[place] = copy
            alike.setdefault((param.device, param.dtype), []).append((copy, param))
        for pairs in alike.values():
            torch._foreach_copy_([copy for copy, _ in pairs], [param for _, param in pairs])

    def _foretell(self, group: SgdGroup, part: Part) -> Parameters:
        """Read what is ordinary of a group, its coming updates included; return the others."""
        all_ours = len(part.ours) == len(group.states)
        states = group.states if all_ours else [group.states[k] for k in part.ours]
        places, params, others = part.places, part.params, {}
        left = self._buffer.sgd(params, states, self._slots_at, part.places_at, group.numbers)
        if left is None:
            return {id(param): (place, param) for place, param in zip(places.tolist(), params, strict=True)}
        if left:
            plain = self._slots[places, _WEIGHT] != NONE
            sorted_out = list(zip(places.tolist(), params, plain.tolist(), strict=True))
            others = {id(param): (place, param) for place, param, good in sorted_out if not good}
            params, places = [param for _, param, good in sorted_out if good], places[plain]
        self._got_grad[places] = True
        self._foretold = self._foretold + params if self._foretold else params
        self._foretold_places.append(places)
        return others

    def _reduce_all(self, places: list[int], kind: int, xs: Sequence[torch.Tensor | None]) -> None:
        """Reduce tensors for these places: ordinary ones together."""
        flat = self._buffer.lay_flat(xs)
        if flat is not None:
            self._slots[places, kind] = self._buffer.flat_norms(flat)
            return
        for place, slot, x in zip(places, self._buffer.norms(xs), xs, strict=True):
            if slot == NONE:
                self._reduce(place, kind, x)
            else:
                self._slots[place, kind] = slot

    def _reduce(self, place: int, kind: int, x: torch.Tensor | None) -> None:
        self._slots[place, kind] = NONE
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
        if self._foretold and self._buffer.rows.stepped(self._foretold):
            # This SGD does not do what torch's does: its updates are measured from now on.
            self._slots[np.concatenate(self._foretold_places), _UPDATE] = NONE
            self._foretells = False
        self._foretold, self._foretold_places = [], []
        if not self._before and self._before_flat is None:
            return
        with torch.no_grad():
            now = self._now()
            self._compare_flat(now)
            changes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
            for place, old in self._before.items():
                new = now[place]
                if new is None or old.shape != new.shape:
                    continue
                if is_distributed(new) and is_distributed(old):
                    self._reduce(place, _UPDATE, new.detach() - old)
                elif can_reduce(new):
                    self._slots[place, _UPDATE] = slot = self._buffer.reduce_difference(new, old)
                    if slot == NONE:
                        changes[place] = old, new.detach()
                elif new.is_complex():
                    self._reduce(place, _UPDATE, new.detach() - old)
            if changes:
                olds = [old for old, _ in changes.values()]
                torch._foreach_sub_(olds, [new for _, new in changes.values()])
                self._reduce_all(list(changes), _UPDATE, olds)
        self._before = {}

    def _compare_flat(self, now: Sequence[torch.Tensor | None]) -> None:
        """Reduce what was added to small parameters; where one has another shape, each is left to be read singly."""
        if self._before_flat is None:
            return
        (places, old), self._before_flat = self._before_flat, None
        new = self._buffer.lay_flat([now[place] for place in places.tolist()])
        if new is not None and new.subtract(old):
            self._slots[places, _UPDATE] = self._buffer.flat_norms(new)
            return
        for place, part in zip(places.tolist(), old.parts(), strict=True):
            x = now[place]
            if x is not None and x.numel() == part.numel():
                self._before[place] = part.view(x.shape)

    def let_go(self) -> None:
        """Keep no module and no parameter: nothing is read any more."""
        self._where, self._plan, self._copies = ([], []), None, {}

    def discard(self) -> None:
        """Forget the open step."""
        if self._read:
            self._slots.fill(NONE)
        self._scales, self._read = [], False
        self._before, self._before_flat, self._foretold, self._foretold_places = {}, None, [], []
        if self._sharded is not None:
            self._sharded.discard()

    def close_step(self, step: int) -> Callable[[Rows], None]:
        """End the step; the function returned takes its rows."""
        if self._sharded is not None and self._read:
            with torch.no_grad():
                for where, slot in self._sharded.join().items():
                    self._slots[where] = slot
        keys = self._keys if self._read else []
        slots = self._slots[: len(keys)].copy()
        scales = self._scales
        self.discard()

        def deliver(rows: Rows) -> None:
            loss_scale: float | npt.NDArray[np.float64] = 1.0
            clip: float | npt.NDArray[np.float64] = math.nan
            for scale, places in scales:
                if len(places) == len(keys):
                    loss_scale, clip = _numbers(scale, rows)
                else:
                    loss_scale, clip = (np.array(np.broadcast_to(known, len(keys))) for known in (loss_scale, clip))
                    loss_scale[places], clip[places] = _numbers(scale, rows)
            self._log.append_rows(step, keys, rows, slots, (loss_scale, clip, step))

        return deliver

    def _derive(self, rows: Rows, facts: Rows) -> dict[str, Rows]:
        """Return the value columns from rows of weight, gradient and update, and from loss scale, clipping and step."""
        loss_scale, clip, steps = facts.T
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            grad_norm = norm_of(rows[:, _GRAD]) / loss_scale
            self._add_up(steps, grad_norm, rows[:, _GRAD, _SCALE])
            return {
                "weight_norm": norm_of(rows[:, _WEIGHT]),
                "grad_norm": grad_norm,
                # Clipping an infinite norm multiplies by 0, from which nothing can be told: 0/0 is NaN.
                "grad_norm_unclipped": grad_norm / clip,
                "update_norm": norm_of(rows[:, _UPDATE]),
                "grad_nonfinite": rows[:, _GRAD, _NONFINITE],
            }

    def _add_up(self, steps: Rows, norms: Rows, read: Rows) -> None:
        """Keep the norm of all gradients of each step together; `read` is NaN where there was none."""
        starts = np.flatnonzero(np.diff(steps, prepend=np.nan) != 0)
        some = np.isfinite(read)
        norms = np.where(some, norms, 0.0)
        top = np.maximum.reduceat(norms, starts)
        usable = np.isfinite(top) & (top > 0)
        by = np.repeat(np.where(usable, top, 1.0), np.diff(starts, append=len(norms)))
        totals = np.where(usable, top * np.sqrt(np.add.reduceat((norms / by) ** 2, starts)), top)
        totals[~np.logical_or.reduceat(some, starts)] = math.nan
        self._totals.update(zip(steps[starts].astype(int).tolist(), totals.tolist(), strict=True))

    def total(self, step: int) -> float:
        """Return the norm of all gradients of a recorded step together, without leaving float64's range."""
        return self._totals.get(step, math.nan)

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of the steps closed."""
        log = self._log.state_dict()  # adds up what waits
        known = {"with_grad": sorted(self.with_grad), "not_seen": dict(self.not_seen)}
        return {"log": log, "totals": dict(self._totals), **known}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self._log.load_state_dict(state["log"])
        self._totals, self.not_seen = dict(state["totals"]), dict(state["not_seen"])
        self._got_grad = np.array([layer in state["with_grad"] for _, layer, _ in self._keys], dtype=bool)

    def frame(self) -> Any:
        """Return `trace.params` so far."""
        return self._log.frame()


def _without(some: list[int], others: Collection[int]) -> list[int]:
    return sorted(set(some).difference(others))


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
    if math.isnan(norm) or math.isnan(most):
        return math.nan
    return min(1.0, most / (norm + 1e-6))
