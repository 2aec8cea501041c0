"""What an optimizer is about to add, foretold from its own arithmetic, so that no copy of the weights is kept.

Only where it is exactly known: torch.optim.SGD as it is, without hooks of others between our two, on dense float32 CPU
tensors. The new weight is computed as torch rounds it, so the norm is that of what the weight really changes by, also
where an update is so small that rounding swallows a part of it. Everything else is measured against a copy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

__all__ = ["SgdGroup", "sgd_groups"]


class SgdGroup(NamedTuple):
    """A parameter group of SGD: its parameters, their momentum buffers, and the numbers of its arithmetic."""

    params: list[torch.Tensor]
    buffers: list[torch.Tensor | None]
    numbers: tuple[float, float, float, float, float, bool]  # lr, momentum, 1 - dampening, decay, sign, nesterov


def sgd_groups(optimizer: torch.optim.Optimizer, pre_hook: int, post_hook: int) -> list[SgdGroup] | None:
    """Return the groups of an optimizer whose update can be foretold, or None.

    Args:
        optimizer: The optimizer, about to step.
        pre_hook: The id of our hook before the step: nobody else's may follow.
        post_hook: The id of our hook after it: nobody else's may come before.
    """
    if type(optimizer) is not torch.optim.SGD:
        return None
    before, after = (getattr(optimizer, f"_optimizer_step_{which}_hooks", {}) for which in ("pre", "post"))
    if next(reversed(before), None) != pre_hook or next(iter(after), None) != post_hook:
        return None
    groups = []
    for group in optimizer.param_groups:
        numbers: list[Any] = [group.get(name) for name in ("lr", "momentum", "dampening", "weight_decay")]
        if group.get("fused") or group.get("differentiable") or not all(type(n) in (int, float) for n in numbers):
            return None
        lr, momentum, dampening, decay = (float(n) for n in numbers)
        params: list[torch.Tensor] = group["params"]
        state = optimizer.state
        buffers: list[torch.Tensor | None] = [None] * len(params)
        if momentum:
            buffers = [state[p].get("momentum_buffer") if p in state else None for p in params]
        sign = -1.0 if group.get("maximize") else 1.0
        groups.append(SgdGroup(params, buffers, (lr, momentum, 1 - dampening, decay, sign, bool(group["nesterov"]))))
    return groups
