"""BatchNorm does not see the scale of the weights before it, as long as eps does not."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradlab.errors import UsageError
from gradlab.nets import MLP

__all__ = ["ScaleResponse", "layer_scale_response", "net_scale_response", "scale_hidden_weights"]

_NO_EPS = torch.finfo(torch.float64).tiny
"""torch refuses eps = 0 in training mode; added to a variance of ordinary size this changes no bit of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleResponse:
    """What scaling weights by a did to output and gradient.

    Args:
        output_error: |BN(aWx) - BN(Wx)| / |BN(Wx)|, Euclidean.
        gradient_error: |a dL/d(aW) - dL/dW| / |dL/dW|, Euclidean, over all scaled weights together.
        gradient_ratio: a |dL/d(aW)| / |dL/dW|: 1 where the identity holds.
    """

    output_error: float
    gradient_error: float
    gradient_ratio: float


def layer_scale_response(
    weight: torch.Tensor, x: torch.Tensor, cotangent: torch.Tensor, *, scale: float, eps: float
) -> ScaleResponse:
    """Compare BN(aWx) with BN(Wx) for one layer, the gradient a fixed tensor at BatchNorm's output.

    BN(aWx) = BN(Wx) and dL/d(aW) = (1/a) dL/dW exactly for eps = 0; else the output shrinks by about
    a s / sqrt(a^2 s^2 + eps) where s is the standard deviation of Wx.

    Args:
        weight: W, (out, in), float64.
        x: Input, (batch, in), at least 2 samples.
        cotangent: dL/d(BN's output), (batch, out).
        scale: a, above 0.
        eps: BatchNorm's, at least 0; W and x at scale 1 are always taken with eps = 0.

    Raises:
        UsageError: A value is out of range.

    Source:
        Ioffe & Szegedy 2015 (arXiv 1502.03167), section 3.3.
    """
    _check(scale, eps, len(x))

    def through(factor: float, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = (factor * weight).detach().requires_grad_(True)
        y = nn.functional.batch_norm(x @ scaled.T, None, None, training=True, eps=max(epsilon, _NO_EPS))
        (gradient,) = torch.autograd.grad((y * cotangent).sum(), scaled)
        return y.detach(), gradient

    plain, changed = through(1.0, 0.0), through(scale, eps)
    return _compare(plain[0], changed[0], [plain[1]], [changed[1]], scale)


def net_scale_response(model: MLP, x: torch.Tensor, labels: torch.Tensor, *, scale: float, eps: float) -> ScaleResponse:
    """Compare a BatchNorm net's logits and hidden weight gradients before and after all hidden weights are scaled.

    The loss is the cross-entropy. As `layer_scale_response`, with every hidden layer's weights scaled at once; the
    head is not normalized and stays as it is. Weights, running statistics and eps are as before afterwards.

    Args:
        model: An MLP with BatchNorm, float64.
        x: Its input, at least 2 samples.
        labels: Classes, (batch,).
        scale: a, above 0.
        eps: Of all BatchNorm layers, at least 0; the net at scale 1 has eps = 0.

    Raises:
        UsageError: A value is out of range, or the model has no BatchNorm.
    """
    _check(scale, eps, len(x))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    if not norms:
        raise UsageError("The net has no BatchNorm, so its output is not invariant to scale: give norm='batch'.")
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    before = [(norm.eps, norm.training) for norm in norms]
    weights = hidden_weights(model)

    def through(factor: float, epsilon: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
        scale_hidden_weights(model, factor)
        for norm in norms:
            norm.eps = max(epsilon, _NO_EPS)
            norm.train()
        logits = model(x)
        gradients = torch.autograd.grad(cross_entropy(logits, labels), weights)
        return logits.detach(), list(gradients)

    try:
        plain = through(1.0, 0.0)
        changed = through(scale, eps)
    finally:
        model.load_state_dict(kept)
        for norm, (epsilon, training) in zip(norms, before, strict=True):
            norm.eps = epsilon
            norm.train(training)
    return _compare(plain[0], changed[0], plain[1], changed[1], scale)


def hidden_weights(model: MLP) -> list[torch.Tensor]:
    """Return the weight matrices of an MLP's hidden layers, the head's left out."""
    return [module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "head"]


@torch.no_grad()
def scale_hidden_weights(model: MLP, scale: float) -> MLP:
    """Multiply the weights of an MLP's hidden layers in place, not their biases and not the head, and return it.

    Args:
        model: The net.
        scale: The factor.
    """
    for weight in hidden_weights(model):
        weight.mul_(scale)
    return model


def _check(scale: float, eps: float, samples: int) -> None:
    if not (math.isfinite(scale) and scale > 0):
        raise UsageError(f"scale is {scale}, but it must be finite and above 0; give a factor such as 0.1.")
    if not (math.isfinite(eps) and eps >= 0):
        raise UsageError(f"eps is {eps}, but it must be finite and at least 0; give torch's 1e-5, say.")
    if samples < 2:
        raise UsageError(
            f"BatchNorm in training mode needs at least 2 samples to take a variance of, got {samples}: give more."
        )


def _compare(
    output: torch.Tensor, changed: torch.Tensor, grads: list[torch.Tensor], changed_grads: list[torch.Tensor], a: float
) -> ScaleResponse:
    first = torch.cat([grad.flatten() for grad in grads])
    second = torch.cat([grad.flatten() for grad in changed_grads]) * a
    return ScaleResponse(
        output_error=float((changed - output).norm() / output.norm()),
        gradient_error=float((second - first).norm() / first.norm()),
        gradient_ratio=float(second.norm() / first.norm()),
    )
