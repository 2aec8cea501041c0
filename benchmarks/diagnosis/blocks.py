"""The parts that the zoo's nets are made of, initialized and trained in a few standard ways."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradlab.benchmarks.diagnosis.case import Batches, Case, Job, Label, Loss

__all__ = [
    "ACTIVATIONS",
    "chain",
    "dead_bias",
    "each_step",
    "initialize",
    "job",
    "net_case",
    "norm_layer",
    "optimizer_of",
]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu_in_place": lambda: nn.ReLU(inplace=True),
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "selu": nn.SELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "softsign": nn.Softsign,
    "hardtanh": nn.Hardtanh,
    "identity": nn.Identity,
}


def initialize(model: nn.Module, scheme: str = "default", gain: float = 1.0) -> nn.Module:
    """Draw the weights of all linear and convolutional layers anew, biases zero; "default" leaves torch's, times gain.

    Args:
        model: The net, changed in place.
        scheme: "default", "he", "xavier", "lecun", "orthogonal", or "normal" for a standard deviation of `gain`.
        gain: Factor on the weights.

    Returns:
        The model.
    """
    for module in model.modules():
        if not isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            continue
        weight = module.weight
        with torch.no_grad():
            if scheme == "he":
                nn.init.kaiming_normal_(weight, nonlinearity="relu")
            elif scheme == "lecun":
                nn.init.kaiming_normal_(weight, nonlinearity="linear")
            elif scheme == "xavier":
                nn.init.xavier_normal_(weight)
            elif scheme == "orthogonal":
                nn.init.orthogonal_(weight)
            elif scheme == "normal":
                nn.init.normal_(weight)
            weight.mul_(gain)
            if scheme != "default" and module.bias is not None:
                module.bias.zero_()
    return model


def norm_layer(name: str, width: int) -> nn.Module:
    """Return a normalization over `width` features or channels."""
    if name == "batch":
        return nn.BatchNorm1d(width)
    if name == "batch2d":
        return nn.BatchNorm2d(width)
    if name == "group":
        return nn.GroupNorm(4, width)
    return nn.LayerNorm(width)


def chain(
    depth: int,
    width: int = 48,
    *,
    inputs: int = 20,
    outputs: int = 5,
    activation: str = "relu",
    norm: str | None = None,
    init: str = "he",
    gain: float = 1.0,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Return an MLP of modules linear1, norm1, act1, drop1, ..., head."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for place in range(1, depth + 1):
        # BatchNorm takes every bias before it off again.
        parts[f"linear{place}"] = nn.Linear(inputs if place == 1 else width, width, bias=norm != "batch")
        if norm is not None:
            parts[f"norm{place}"] = norm_layer(norm, width)
        parts[f"act{place}"] = ACTIVATIONS[activation]()
        if dropout:
            parts[f"drop{place}"] = nn.Dropout(dropout)
    parts["head"] = nn.Linear(width, outputs)
    net = nn.Sequential(parts)
    initialize(net, init, gain)
    if init != "default" and init != "normal":  # a head of order one whatever its inputs' gain
        nn.init.normal_(parts["head"].weight, std=width**-0.5)  # type: ignore[arg-type]
    return net


def optimizer_of(name: str, params: Iterable[Any], lr: float) -> torch.optim.Optimizer:
    """Return an optimizer by its name."""
    if name == "adam":
        return torch.optim.Adam(params, lr=lr)
    if name == "adamw":
        return torch.optim.AdamW(params, lr=lr)
    return torch.optim.SGD(params, lr=lr, momentum=0.9 if name == "momentum" else 0.0)


def job(
    model: nn.Module,
    batches: Batches,
    loss: Loss = F.cross_entropy,
    *,
    lr: float = 1e-2,
    optimizer: str = "sgd",
    **settings: Any,
) -> Job:
    """Return the job of training all parameters that require a gradient."""
    params = [param for param in model.parameters() if param.requires_grad]
    return Job(model=model, optimizer=optimizer_of(optimizer, params, lr), batches=batches, loss=loss, **settings)


def each_step(scores: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy over all steps; scores (batch, length, classes), target (batch, length)."""
    return F.cross_entropy(scores.flatten(0, 1), target.flatten())


def dead_bias(net: nn.Module, name: str, share: float) -> nn.Module:
    """Take 20 off the biases of the first `share` of a layer's units, and return the net."""
    bias = cast(nn.Conv2d, net.get_submodule(name)).bias
    assert bias is not None
    with torch.no_grad():
        bias[: round(share * len(bias))] -= 20
    return net


def net_case(
    name: str,
    label: Label,
    why: str,
    model: Callable[[], nn.Module],
    *,
    family: str,
    batches: Callable[[], Batches],
    loss: Loss,
    axis: str = "",
    places: tuple[str, ...] = (),
    cuts: tuple[str, ...] = (),
    **training: Any,
) -> Case:
    """Return the case of a net.

    Args:
        name: Of the case.
        label: Of the case.
        why: Of the case.
        model: Makes the net.
        family: Of the case.
        batches: Makes the batches.
        loss: Of output and target.
        axis: Of the case.
        places: Of the case.
        cuts: Of the case.
        training: Further arguments of `job`.
    """

    def build() -> Job:
        return job(model(), batches(), loss, **training)

    return Case(name=name, family=family, label=label, build=build, why=why, axis=axis, places=places, cuts=cuts)
