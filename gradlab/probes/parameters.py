"""The size of each parameter, of its gradient as the optimizer uses it, and of the update it got."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import nn

from gradlab.probes.buffer import Rows, StepBuffer
from gradlab.probes.log import TableLog
from gradlab.probes.reduce import can_reduce, norm_of

__all__ = ["ParameterProbe", "StepScales", "describe_parameters"]

_NONFINITE = 7  # place of the count in a row


class StepScales(NamedTuple):
    """What a step's numbers are divided by: one where nothing was scaled."""

    loss: float
    params: float
    clip: float


def describe_parameters(
    params: Sequence[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer | None
) -> dict[str, Any]:
    """Return facts about parameters as plain JSON data, as they are when the recording begins.

    Args:
        params: Parameters by dotted path.
        optimizer: The optimizer, if one is known.

    Returns:
        params: name, shape and dtype of each; params_without_grad: names of those with requires_grad=False (frozen on
        purpose); params_not_optimized: names of the others that the optimizer does not hold; optimizer: its class.
    """
    held = None if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
    left_out = [name for name, param in params if param.requires_grad and held is not None and id(param) not in held]
    return {
        "params": [[name, list(param.shape), str(param.dtype).removeprefix("torch.")] for name, param in params],
        "params_without_grad": [name for name, param in params if not param.requires_grad],
        "params_not_optimized": left_out,
        "optimizer": None if optimizer is None else type(optimizer).__name__,
    }


@final
class ParameterProbe:
    """Reads parameters and gradients when the optimizer is about to step, and parameters again after it.

    Args:
        params: Parameters by dotted path, each once.
        buffer: Where rows go.
        updated: Ids of the parameters that the optimizer updates; of the others no update is known.
    """

    def __init__(
        self, params: Sequence[tuple[str, nn.Parameter]], buffer: StepBuffer, updated: Collection[int] = ()
    ) -> None:
        self._params, self._buffer = list(params), buffer
        self._updated = frozenset(updated)
        self._keys = [(name, name.rpartition(".")[0], param.numel()) for name, param in self._params]
        self._log = TableLog(
            ("param", "layer", "entries"),
            ("weight_norm", "grad_norm", "grad_norm_unclipped", "update_norm", "grad_nonfinite"),
        )
        self._slots: list[tuple[int, int]] = []
        self._updates: list[int] = []
        self._before: list[torch.Tensor | None] = []

    def before_update(self, *, keep_weights: bool) -> None:
        """Reduce weights and gradients; keep a copy of the weights until `after_update` if an update follows."""
        none = -1
        self._slots = []
        with torch.no_grad():
            for _, param in self._params:
                grad = param.grad
                if grad is not None and grad.layout is not torch.strided:
                    grad = grad.coalesce().values() if grad.is_sparse else grad.to_dense()
                weight_slot = self._norm(param) if can_reduce(param) else none
                grad_slot = self._norm(grad) if grad is not None and can_reduce(grad) else none
                self._slots.append((weight_slot, grad_slot))
            self._before = (
                [p.detach().clone() if id(p) in self._updated else None for _, p in self._params]
                if keep_weights
                else []
            )

    def after_update(self) -> None:
        """Reduce what the optimizer added."""
        with torch.no_grad():
            self._updates = [
                self._buffer.reduce_difference(param, old)
                if old is not None and can_reduce(param) and old.shape == param.shape
                else -1
                for old, (_, param) in zip(self._before, self._params, strict=True)
            ]
        self._before = []

    def discard(self) -> None:
        """Forget the open step."""
        self._slots, self._updates, self._before = [], [], []

    def _norm(self, x: torch.Tensor) -> int:
        return self._buffer.reduce(x, norm_only=True)

    def close_step(self, step: int) -> Callable[[Rows, StepScales], float]:
        """End the step; the function returned takes its rows and gives the norm of all gradients together."""
        slots, updates = self._slots, self._updates or [-1] * len(self._slots)
        self.discard()
        keys = self._keys if slots else []

        def deliver(rows: Rows, scales: StepScales) -> float:
            padded = np.vstack([rows, np.full((1, rows.shape[1]), np.nan)])  # slot -1: nothing to read
            weight_slots, grad_slots = ([pair[k] for pair in slots] for k in (0, 1))
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                grad_norm = norm_of(padded[grad_slots]) / scales.params
                # Clipping an infinite norm multiplies by 0, from which nothing can be told: 0/0 is NaN.
                unclipped = grad_norm / scales.clip
            self._log.append(
                step,
                keys,
                {
                    "weight_norm": norm_of(padded[weight_slots]),
                    "grad_norm": grad_norm,
                    "grad_norm_unclipped": unclipped,
                    "update_norm": norm_of(padded[updates]),
                    "grad_nonfinite": padded[grad_slots][:, _NONFINITE],
                },
            )
            present = grad_norm[np.array(grad_slots) >= 0]
            return _total(present)

        return deliver

    def frame(self) -> Any:
        """Return `trace.params` so far."""
        return self._log.frame()


def _total(norms: Any) -> float:
    """Return the norm of several norms without leaving float64's range; NaN if there are none."""
    if not len(norms):
        return float("nan")
    top = float(np.max(norms))
    if not np.isfinite(top) or top == 0:
        return top
    return top * float(np.sqrt(np.sum((norms / top) ** 2)))
