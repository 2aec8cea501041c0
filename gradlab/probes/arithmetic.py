"""What an optimizer is about to add, foretold from its own arithmetic, so that no copy of the weights is kept.

Only where it is exactly known: torch.optim.SGD as it is, without hooks of others between our two, on dense float32 CPU
tensors. The new weight is computed as torch rounds it, so the norm is that of what the weight really changes by, also
where an update is so small that rounding swallows a part of it. Everything else is measured against a copy.
"""

from __future__ import annotations

from operator import is_
from typing import Any, NamedTuple, final

import torch

__all__ = ["Foreteller", "SgdGroup"]

_NUMBERS = ("lr", "momentum", "dampening", "weight_decay")
_PLAIN = (int, float)


class SgdGroup(NamedTuple):
    """A parameter group of SGD: its parameters, their states or None, and the numbers of its arithmetic."""

    params: list[torch.Tensor]
    states: list[dict[str, Any] | None]
    numbers: tuple[float, float, float, float, float, bool]  # lr, momentum, 1 - dampening, decay, sign, nesterov


@final
class Foreteller:
    """Gives the groups of one optimizer whose update can be foretold.

    Args:
        optimizer: The optimizer.
        pre_hook: The id of our hook before its step: nobody else's may follow.
        post_hook: The id of our hook after it: nobody else's may come before.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, pre_hook: int, post_hook: int) -> None:
        self._optimizer = optimizer
        self._hooks = pre_hook, post_hook
        # Looking a tensor up costs a call of its __hash__ in Python, so the state of each is looked up once.
        self._state: object = None
        self._known: list[tuple[list[torch.Tensor], list[dict[str, Any] | None]]] = []

    def groups(self) -> list[SgdGroup] | None:
        """Return the groups of the optimizer, about to step; None where what it does is not exactly known."""
        optimizer = self._optimizer
        if type(optimizer) is not torch.optim.SGD:
            return None
        before, after = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
        if (next(reversed(before), None), next(iter(after), None)) != self._hooks:
            return None
        groups = []
        for number, group in enumerate(optimizer.param_groups):
            given: list[Any] = [group.get(name) for name in _NUMBERS]
            if group.get("fused") or group.get("differentiable") or not all(type(n) in _PLAIN for n in given):
                return None
            lr, momentum, dampening, decay = given
            params: list[torch.Tensor] = group["params"]
            sign = -1.0 if group.get("maximize") else 1.0
            numbers = (lr, momentum, 1 - dampening, decay, sign, bool(group["nesterov"]))
            groups.append(SgdGroup(params, self._states(number, params) if momentum else [None] * len(params), numbers))
        return groups

    def _states(self, number: int, params: list[torch.Tensor]) -> list[dict[str, Any] | None]:
        """Return the states of a group. One that was put there by hand shows in the update, which is compared."""
        state = self._optimizer.state
        if state is not self._state:
            self._state, self._known = state, []
        if number < len(self._known):
            known, states = self._known[number]
            if len(known) == len(params) and all(map(is_, known, params)):
                return states
        states = [state.get(param) for param in params]
        if None not in states:
            self._known[number:] = [(list(params), states)]
        return states
