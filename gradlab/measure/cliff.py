"""The gradient cliff of a one-unit recurrent net, and gradient descent on it with and without clipping."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gradlab.errors import UsageError

__all__ = ["CliffSurface", "Descent", "cliff_loss", "cliff_surface", "descend"]

_TARGET, _START = 0.7, 0.5  # this project's choice, as is the map itself


@dataclass(frozen=True, kw_only=True, slots=True)
class CliffSurface:
    """Loss and gradient norm on a grid of weight and bias; both of shape (len(bias), len(weight))."""

    weight: npt.NDArray[np.float64]
    bias: npt.NDArray[np.float64]
    loss: npt.NDArray[np.float64]
    grad_norm: npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Descent:
    """Gradient descent from several starts.

    Args:
        path: (weight, bias) before each update and at the end; shape (starts, updates + 1, 2).
        loss: At each of these; shape (starts, updates + 1).
        step: Length of each update in the plane; shape (starts, updates).
    """

    path: npt.NDArray[np.float64]
    loss: npt.NDArray[np.float64]
    step: npt.NDArray[np.float64]


def cliff_loss(weight: torch.Tensor, bias: torch.Tensor, *, steps: int = 50) -> torch.Tensor:
    """Return (sigmoid(h_T) - 0.7)^2 of the map h <- w sigmoid(h) + b, h_0 = 0.5.

    Where the map has two stable states, the border between their basins is a cliff: on it the T-fold product of slopes
    is large.

    Args:
        weight: w; any shape.
        bias: b; the same shape.
        steps: T.

    Source:
        After Pascanu et al. 2013, arXiv 1211.5063, sec. 2.3 and Fig. 6; the constants are this project's.
    """
    if steps < 1:
        raise UsageError(f"steps={steps} must be at least 1.")
    h = torch.full_like(weight, _START)
    for _ in range(steps):
        h = weight * h.sigmoid() + bias
    return (h.sigmoid() - _TARGET).square()


def cliff_surface(
    *,
    weights: tuple[float, float] = (2.0, 8.0),
    biases: tuple[float, float] = (-4.0, -1.0),
    points: int = 200,
    steps: int = 50,
) -> CliffSurface:
    """Return loss and gradient norm on a grid of points x points."""
    if points < 2:
        raise UsageError(f"points={points} must be at least 2.")
    w, b = (torch.linspace(*ends, points, dtype=torch.float64) for ends in (weights, biases))
    bias, weight = (part.clone().requires_grad_(True) for part in torch.meshgrid(b, w, indexing="ij"))
    loss = cliff_loss(weight, bias, steps=steps)
    grads = torch.autograd.grad(loss.sum(), (weight, bias))
    return CliffSurface(
        weight=w.numpy(), bias=b.numpy(), loss=loss.detach().numpy(), grad_norm=torch.hypot(*grads).numpy()
    )


def descend(
    starts: npt.NDArray[np.float64], *, lr: float = 0.05, clip: float = 0.0, updates: int = 500, steps: int = 50
) -> Descent:
    """Run gradient descent on the cliff from several starts.

    Args:
        starts: (weight, bias) of each start; shape (starts, 2).
        lr: Learning rate.
        clip: Largest norm of the gradient; 0 does not clip.
        updates: Number of updates.
        steps: Time steps of the net.
    """
    point = torch.tensor(starts, dtype=torch.float64)
    if point.dim() != 2 or point.shape[1] != 2:
        raise UsageError(f"starts must have shape (starts, 2); got {tuple(point.shape)}.")
    path, losses, lengths = [point], [], []
    for _ in range(updates):
        point = point.detach().requires_grad_(True)
        loss = cliff_loss(point[:, 0], point[:, 1], steps=steps)
        (grad,) = torch.autograd.grad(loss.sum(), point)
        if clip > 0:
            grad = grad * (clip / grad.norm(dim=1, keepdim=True).clamp(min=clip))
        losses.append(loss.detach())
        lengths.append(lr * grad.norm(dim=1))
        point = point.detach() - lr * grad
        path.append(point)
    losses.append(cliff_loss(point[:, 0], point[:, 1], steps=steps))
    stacked = (torch.stack(parts, dim=1).numpy() for parts in (path, losses, lengths))
    places, heights, sizes = (part.copy() for part in [p.astype(np.float64) for p in stacked])
    return Descent(path=places, loss=heights, step=sizes)
