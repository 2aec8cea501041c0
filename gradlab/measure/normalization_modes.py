"""The same weights with batch statistics and with running ones: the gap between training and evaluation mode."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from gradlab.errors import UsageError

__all__ = ["mode_losses", "set_momentum"]


@torch.no_grad()
def mode_losses(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, batch_size: int
) -> tuple[float, float]:
    """Return the mean cross-entropy in training mode, batch by batch, and in evaluation mode, on the same images.

    Running statistics are not updated and no gradient is taken, so a probe on the model records nothing of it.

    Args:
        model: A classifier.
        images: Inputs; what is left after the last whole batch is not used.
        labels: Classes.
        batch_size: Of the batches that training mode takes its statistics from, at least 2.

    Returns:
        (loss in training mode, loss in evaluation mode).

    Raises:
        UsageError: A batch of 1, whose variance is 0, or fewer images than one batch.
    """
    if batch_size < 2:
        raise UsageError(
            f"batch_size is {batch_size}, but BatchNorm in training mode needs at least 2 samples to take a variance "
            "of: give 2 or more."
        )
    if len(images) < batch_size:
        raise UsageError(f"A batch of {batch_size} cannot be taken of {len(images)} images: give a smaller one.")
    whole = len(images) // batch_size * batch_size
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    was_training = model.training
    losses = []
    try:
        for norm in norms:
            norm.momentum = 0.0  # running = 1 * running + 0 * batch
            norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
        for training in (True, False):
            model.train(training)
            batches = zip(images[:whole].split(batch_size), labels[:whole].split(batch_size), strict=True)
            losses.append(torch.stack([cross_entropy(model(x), y) for x, y in batches]).mean())
    finally:
        model.train(was_training)
        for norm, (momentum, tracked) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked = tracked
    in_training, in_evaluation = torch.stack(losses).tolist()
    return in_training, in_evaluation


def set_momentum(model: nn.Module, momentum: float) -> nn.Module:
    """Set the weight of the newest batch in every BatchNorm layer's running statistics, and return the model.

    Args:
        model: Any module.
        momentum: Between 0 and 1, 0 excluded; torch's default is 0.1.

    Raises:
        UsageError: The momentum is out of range.
    """
    if not 0.0 < momentum <= 1.0:
        raise UsageError(f"momentum is {momentum}, but it must lie above 0 and be at most 1; torch's default is 0.1.")
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = momentum
    return model
