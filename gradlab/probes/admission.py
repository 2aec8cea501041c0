"""What watch refuses: models, optimizers and scalers that it could not watch rightly."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gradlab.errors import UsageError

__all__ = ["check_model", "check_owner", "check_scaler"]


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
        if own.isdisjoint(id(param) for group in optimizer.param_groups for param in group["params"]):
            raise UsageError("The optimizer holds none of the model's parameters: give the model's own optimizer.")
