"""How the loss and its gradient vary along the gradient: what a step of the optimizer will find."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradlab.errors import UsageError

__all__ = ["AlongGradient", "along_gradient"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AlongGradient:
    """Loss and gradient at theta - factor * lr * g, for each factor.

    Args:
        loss: At theta.
        grad_norm: |g|, over all parameters.
        losses: One for each factor; NaN or inf where the step went there.
        grad_changes: |g(theta - factor lr g) - g(theta)|, one for each factor.
    """

    loss: float
    grad_norm: float
    losses: tuple[float, ...]
    grad_changes: tuple[float, ...]


def along_gradient(
    model: nn.Module, x: torch.Tensor, labels: torch.Tensor, *, lr: float, factors: Sequence[float]
) -> AlongGradient:
    """Measure the cross-entropy and its gradient along the negative gradient of one batch, in training mode.

    On a copy: neither the model's weights nor its running statistics change, and hooks on it are not called.

    Args:
        model: A classifier.
        x: Inputs of the batch.
        labels: Classes.
        lr: Step of factor 1, above 0.
        factors: Multiples of it; Santurkar et al. take [1/2, 4].

    Returns:
        Plain numbers.

    Raises:
        UsageError: lr or a factor is not finite and above 0.

    Note:
        Nets with larger gradients take longer steps at one lr; the change of the gradient relative to |g| and the loss
        relative to lr |g|^2 leave that out.

    Source:
        Santurkar et al. 2018 (arXiv 1805.11604), section 3.1 and Fig. 4.
    """
    for name, values in (("lr", [lr]), ("factors", factors)):
        for value in values:
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} has the value {value}, but it must be finite and above 0; give 0.1, say.")
    work = copy.deepcopy(model)
    for module in work.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    work.train()
    parameters = [p for p in work.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]

    def at() -> tuple[torch.Tensor, list[torch.Tensor]]:
        loss = cross_entropy(work(x), labels)
        return loss.detach(), list(torch.autograd.grad(loss, parameters))

    loss, gradient = at()
    losses, changes = [], []
    for factor in factors:
        with torch.no_grad():
            for p, origin, g in zip(parameters, start, gradient, strict=True):
                p.copy_(origin - factor * lr * g)
        there, other = at()
        losses.append(there)
        changes.append(_norm([b - a for a, b in zip(gradient, other, strict=True)]))
    numbers = torch.stack([loss, _norm(gradient), *losses, *changes]).tolist()  # one transfer
    count = len(factors)
    return AlongGradient(
        loss=numbers[0],
        grad_norm=numbers[1],
        losses=tuple(numbers[2 : 2 + count]),
        grad_changes=tuple(numbers[2 + count :]),
    )


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    total: torch.Tensor = torch.stack([t.norm() for t in tensors]).norm()
    return total
