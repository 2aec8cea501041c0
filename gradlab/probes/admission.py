"""What watch refuses: models, optimizers and scalers that it could not watch rightly."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gradlab.errors import UsageError

__all__ = ["as_optimizers", "check_model", "check_owner", "check_scaler", "held"]


def check_model(model: nn.Module) -> None:
    """Refuse a model whose parameters have no shape yet, or none of their own."""
    if any(is_lazy(value) for value in [*model.parameters(), *model.buffers()]):
        raise UsageError("This model has lazy parameters that have no shape yet: run one batch through it first.")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UsageError("Parameters of FullyShardedDataParallel are flat local shards: use fully_shard instead.")


def check_scaler(scaler: object, optimizers: tuple[torch.optim.Optimizer, ...]) -> None:
    """Refuse what is no scaler, and one without an optimizer."""
    if scaler is not None and not optimizers:
        raise UsageError("watch needs the optimizer with the scaler: only then is it known which gradients are scaled.")
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise UsageError(f"watch needs a torch.amp.GradScaler as its scaler; got {type(scaler).__name__}.")


def check_owner(params: list[tuple[str, nn.Parameter]], optimizers: tuple[torch.optim.Optimizer, ...]) -> None:
    """Refuse an optimizer that holds none of the model's parameters."""
    own = {id(param) for _, param in params}
    for optimizer in optimizers:
        if own.isdisjoint(held(optimizer)):
            raise UsageError("The optimizer holds none of the model's parameters: give the model's own optimizer.")


def as_optimizers(optimizer: Any) -> tuple[torch.optim.Optimizer, ...]:
    """Return one, several or no optimizers as a tuple.

    Raises:
        UsageError: Something is no optimizer, is given twice, or two hold one parameter.
    """
    several = tuple(optimizer) if isinstance(optimizer, list | tuple) else () if optimizer is None else (optimizer,)
    if optimizer is not None and not several:
        raise UsageError("The list of optimizers is empty: give one, several, or None to close the steps yourself.")
    for one in several:
        if not (hasattr(one, "register_step_pre_hook") and hasattr(one, "param_groups")):
            raise UsageError(f"watch needs a torch.optim.Optimizer as its optimizer; got {type(one).__name__}.")
    users: dict[int, int] = {}
    for place, one in enumerate(several):
        for param in held(one):
            if users.setdefault(param, place) != place:
                raise UsageError(
                    f"Optimizers {users[param]} and {place} of the list hold the same parameter, so which gradient is "
                    "used is not one number: give one of them."
                )
    return several


def held(optimizer: torch.optim.Optimizer) -> set[int]:
    """Return the ids of an optimizer's parameters."""
    return {id(param) for group in optimizer.param_groups for param in group["params"]}
