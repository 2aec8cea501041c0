"""The gradient through the five families and through stacks before training, and the loss after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradlab.measure.initialization import gradient_profile, initialized
from gradlab.nets import GROWTHS, growth_stack, loss_with_heads, small_net
from gradlab.probes import LayerSelection, watch
from gradlab.trace import Trace

__all__ = [
    "evaluated_loss",
    "family_gradients",
    "growth_gradients",
    "heads_gradients",
    "loss_gradients",
    "trunk_pieces",
]

Progress = Callable[[int, int, float | None], None]


def trunk_pieces(path: str, _: nn.Module) -> bool:
    """Choose the pieces of a `ConvNet`'s trunk, for the argument `layers` of `watch`.

    Example:
        >>> trunk_pieces("trunk.conv1", nn.Identity()), trunk_pieces("trunk.conv1.conv", nn.Identity())
        (True, False)
    """
    return path.startswith("trunk.") and path.count(".") == 1


def loss_gradients(
    model: nn.Module,
    x: torch.Tensor,
    labels: torch.Tensor,
    *,
    loss: Callable[..., torch.Tensor],
    layers: LayerSelection = None,
) -> Trace:
    """Record one forward and backward pass of an untrained net under a real loss.

    Args:
        model: In training mode afterwards; in float64 nothing vanishes by rounding.
        x: Its input.
        labels: Of the input.
        loss: From the model's output and the labels to a scalar.
        layers: Which layers are recorded; see `watch`.

    Returns:
        A trace of one step; unlike those of `gradient_profile` its norms depend on the loss and on the batch size.
    """
    model.train()
    with watch(model, layers=layers) as probe:
        loss(model(x), labels).backward()
        probe.step()
    model.zero_grad()
    return probe.trace


def evaluated_loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch_size: int = 500) -> float:
    """Return the mean cross-entropy of a net in evaluation mode: without dropout, and without auxiliary heads.

    Args:
        model: Maps images to logits in evaluation mode.
        images: On the model's device.
        labels: Of the images.
        batch_size: Images at a time.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64 if images.device.type != "mps" else torch.float32, device=images.device)
    try:
        with torch.no_grad():
            for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
                total += cross_entropy(model(x), y, reduction="sum").to(total)
    finally:
        model.train(was_training)
    return float(total) / len(labels)


def growth_gradients(
    x: torch.Tensor,
    labels: torch.Tensor,
    *,
    depths: Sequence[int],
    norm: str,
    width: int,
    added: int,
    seed: int,
    progress: Progress = lambda *_: None,
) -> Trace:
    """Record the gradient through plain, residual and dense stacks at torch's default initialization.

    Args:
        x: Images, float64.
        labels: Their labels.
        depths: Layers of the stacks.
        norm: "batch" or "none".
        width: Channels at the start.
        added: Channels that each layer of a dense stack adds.
        seed: Of the weights.
        progress: Called with (stacks done, stacks in all, None).

    Returns:
        `trace.layers` with columns growth and depth; layer "trunk.stem" is h_0.
    """
    keys = [{"growth": growth, "depth": depth} for depth in depths for growth in GROWTHS]
    traces = []
    for done, key in enumerate(keys):
        progress(done, len(keys), None)
        net = growth_stack(**key, width=width, added=added, in_channels=x.shape[1], norm=norm)  # type: ignore[arg-type]
        initialized(net, "default", seed=seed)
        traces.append(loss_gradients(net, x, labels, loss=cross_entropy, layers=trunk_pieces))
    return Trace.merge(traces, keys)


def family_gradients(
    family: str,
    x: torch.Tensor,
    keys: Sequence[dict[str, Any]],
    *,
    norm: str,
    narrow: int,
    seed: int,
    progress: Progress = lambda *_: None,
) -> Trace:
    """Record the gradient through small nets at initialization, entering as noise at the trunk's end.

    Args:
        family: One of `FAMILIES`.
        x: Images, float64.
        keys: For each net: init, and settings of `small_net`.
        norm: "batch" or "none".
        narrow: Divisor of the published widths.
        seed: Of the weights, and of the noise (its complement).
        progress: Called with (nets done, nets in all, None).

    Returns:
        `trace.layers` with the keys as columns.
    """
    traces = []
    for done, key in enumerate(keys):
        progress(done, len(keys), None)
        how = {name: value for name, value in key.items() if name != "init"}
        net = small_net(family, side=x.shape[-1], in_channels=x.shape[1], norm=norm, narrow=narrow, **how)
        initialized(net, key["init"], seed=seed)
        traces.append(gradient_profile(net, x, seed=~seed % 2**32, layers=trunk_pieces))
    return Trace.merge(traces, keys)


def heads_gradients(
    x: torch.Tensor,
    labels: torch.Tensor,
    *,
    norm: str,
    inits: Sequence[str],
    narrow: int,
    seed: int,
    progress: Progress = lambda *_: None,
) -> Trace:
    """Record the gradient through one and the same GoogLeNet with and without its auxiliary heads' losses.

    Args:
        x: Images, float64.
        labels: Their labels.
        norm: "batch" or "none".
        inits: Initializations.
        narrow: Divisor of the published widths.
        seed: Of the weights.
        progress: Called with (nets done, nets in all, None).

    Returns:
        `trace.layers` and `trace.params` with columns init and heads.
    """
    losses: dict[bool, Callable[..., torch.Tensor]]
    losses = {False: lambda outputs, y: cross_entropy(outputs[0], y), True: loss_with_heads}
    keys = [{"init": init, "heads": heads} for init in inits for heads in losses]
    traces = []
    for done, key in enumerate(keys):
        progress(done, len(keys), None)
        net = small_net("googlenet", side=x.shape[-1], in_channels=x.shape[1], narrow=narrow, norm=norm, heads=True)
        initialized(net, str(key["init"]), seed=seed)
        traces.append(loss_gradients(net, x, labels, loss=losses[bool(key["heads"])], layers=trunk_pieces))
    return Trace.merge(traces, keys)
