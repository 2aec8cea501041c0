"""Plain and residual convolutional nets."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradlab.benchmarks.diagnosis.batches import images
from gradlab.benchmarks.diagnosis.blocks import ACTIVATIONS, dead_bias, initialize, job, net_case, norm_layer
from gradlab.benchmarks.diagnosis.case import Case, Job

__all__ = ["CASES", "ResidualConv", "conv_chain"]


def conv_chain(
    depth: int,
    width: int = 12,
    *,
    activation: str = "relu",
    norm: str | None = None,
    init: str = "he",
    gain: float = 1.0,
    end: bool = True,
) -> nn.Sequential:
    """Return 3x3 convolutions with circular padding: conv1, norm1, act1, ..., and pool, flat, head if `end`."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for place in range(1, depth + 1):
        parts[f"conv{place}"] = nn.Conv2d(
            3 if place == 1 else width, width, 3, padding=1, padding_mode="circular", bias=norm != "batch2d"
        )
        if norm is not None:
            parts[f"norm{place}"] = norm_layer(norm, width)
        parts[f"act{place}"] = ACTIVATIONS[activation]()
    if end:
        parts |= {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "head": nn.Linear(width, 5)}
    net = nn.Sequential(parts)
    initialize(net, init, gain)
    return net


class ResidualConv(nn.Module):
    """A stem, blocks h + alpha * branch(h), and a head.

    Args:
        blocks: Number of blocks.
        width: Channels.
        norm: Name for `norm_layer`; None for none.
        alpha: Learnable factor on each branch that starts at this value; None for none.
        last_gamma: What the scale of each branch's last normalization starts at.
        gain: Times He's initialization.
    """

    def __init__(
        self,
        blocks: int,
        width: int = 12,
        *,
        norm: str | None = "batch2d",
        alpha: float | None = None,
        last_gamma: float = 1.0,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList([self._branch(width, norm, last_gamma) for _ in range(blocks)])
        self.alpha = None if alpha is None else nn.Parameter(torch.full((blocks,), alpha))
        self.head = nn.Linear(width, 5)
        initialize(self.blocks, "he", gain)

    @staticmethod
    def _branch(width: int, norm: str | None, last_gamma: float) -> nn.Sequential:
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(2)]
        if norm is None:
            return nn.Sequential(convs[0], nn.ReLU(), convs[1])
        last = norm_layer(norm, width)
        nn.init.constant_(cast(nn.BatchNorm2d, last).weight, last_gamma)
        return nn.Sequential(convs[0], norm_layer(norm, width), nn.ReLU(), convs[1], last)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for place, block in enumerate(self.blocks):
            branch = block(h)
            h = h + (branch if self.alpha is None else self.alpha[place] * branch)
        scores: Tensor = self.head(h.relu().mean((2, 3)))
        return scores


class _Dense(nn.Module):
    """Every layer reads all before it, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3 + 6 * k, 6, 3, padding=1, bias=False) for k in range(8)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(6) for _ in range(8)])
        self.head = nn.Linear(51, 5)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.cat([x, F.relu(norm(conv(x)))], 1)
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


class _Separable(nn.Sequential):
    """Depthwise and pointwise convolutions with ReLU6, and a gate that squeezes and excites."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
        for _ in range(4):
            layers += [nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
            layers += [nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), _Gate(16)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


class _Gate(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze, self.excite, self.gate = nn.Linear(width, 4), nn.Linear(4, width), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        share: Tensor = self.gate(self.excite(F.silu(self.squeeze(x.mean((2, 3))))))
        return x * share[..., None, None]


def _lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 5),
    )


def _fine_tuned() -> Job:
    """Train with every BatchNorm in evaluation mode, its running statistics kept."""
    model = conv_chain(5, norm="batch2d")
    with torch.no_grad():
        for number in range(30):
            model(*images()(1000 + number)[0])
    model.eval()
    return job(model, images(), lr=0.02)


_conv = partial(net_case, family="conv", batches=images, loss=F.cross_entropy)
_residual = partial(net_case, family="residual", batches=images, loss=F.cross_entropy)
_SCALE_FREE: dict[str, Any] = {"lr": 1e-5, "optimizer": "adam", "steps": 8}

CASES: tuple[Case, ...] = (
    _conv(
        "conv-he-8", "healthy", "half of all entries are zero", partial(conv_chain, 8), cuts=("act1", "act8"), lr=0.03
    ),
    _conv("conv-lenet", "healthy", "max pooling sends most gradients to zero", _lenet, cuts=("1", "8"), lr=0.05),
    _conv(
        "conv-batchnorm-10",
        "healthy",
        "a few layers of BatchNorm",
        partial(conv_chain, 10, norm="batch2d"),
        cuts=("act1", "act10"),
        lr=0.02,
    ),
    _conv(
        "conv-groupnorm-12",
        "healthy",
        "normalized by group",
        partial(conv_chain, 12, norm="group", init="default"),
        cuts=("act1", "act12"),
        lr=0.02,
    ),
    _conv(
        "conv-separable-relu6",
        "healthy",
        "depthwise convolutions, ReLU6, sigmoid gates",
        _Separable,
        cuts=("2", "26"),
        lr=0.3,
    ),
    _conv("conv-dense-concatenation", "healthy", "every layer reads all before it", _Dense, lr=0.05),
    Case(
        name="conv-fine-tuned-eval",
        family="conv",
        label="healthy",
        build=_fine_tuned,
        why="BatchNorm in evaluation mode",
        cuts=("act1", "act5"),
    ),
    _residual(
        "residual-batchnorm-10",
        "healthy",
        "BatchNorm on the branches",
        partial(ResidualConv, 10),
        cuts=("stem", "blocks.9.4"),
        lr=0.02,
        steps=8,
    ),
    _residual(
        "residual-skipinit-20",
        "healthy",
        "every branch starts at zero and gets no gradient in the first step",
        partial(ResidualConv, 20, norm=None, alpha=0.0),
        lr=0.02,
        steps=10,
    ),
    _residual(
        "residual-zero-gamma-8",
        "healthy",
        "every branch starts at zero and gets no gradient in the first step",
        partial(ResidualConv, 8, last_gamma=0.0),
        lr=0.05,
        steps=10,
    ),
    _residual(
        "residual-groupnorm-8",
        "healthy",
        "GroupNorm on the branches, two images a step",
        partial(ResidualConv, 8, norm="group"),
        cuts=("stem", "blocks.7.4"),
        lr=5e-3,
        batches=partial(images, 2),
        steps=16,
    ),
    _residual(
        "residual-fixup-30",
        "healthy",
        "deep without a normalization, branches scaled down",
        partial(ResidualConv, 30, norm=None, gain=0.1),
        cuts=("stem", "blocks.29.2"),
        lr=0.02,
        steps=8,
    ),
    _conv(
        "conv-default-20",
        "vanishing",
        "torch's default initialization",
        partial(conv_chain, 20, init="default"),
        axis="depth",
        cuts=("act1", "act20"),
    ),
    _conv(
        "conv-default-leaky-24",
        "vanishing",
        "torch's default initialization",
        partial(conv_chain, 24, init="default", activation="leaky_relu"),
        axis="depth",
        cuts=("act1", "act24"),
        optimizer="adam",
        lr=1e-5,
    ),
    _conv(
        "conv-tiny-weights-8",
        "vanishing",
        "weights of 0.01",
        partial(conv_chain, 8, init="normal", gain=0.01),
        axis="depth",
        cuts=("act1", "act8"),
    ),
    _conv(
        "conv-sigmoid-10",
        "vanishing",
        "sigmoid's slope is at most 1/4",
        partial(conv_chain, 10, init="xavier", activation="sigmoid"),
        axis="depth",
        cuts=("act1", "act10"),
    ),
    _conv(
        "conv-he-times-2-16",
        "exploding",
        "twice He's weights",
        partial(conv_chain, 16, gain=2.0),
        axis="depth",
        cuts=("act1", "act16"),
        **_SCALE_FREE,
    ),
    _conv(
        "conv-batchnorm-80",
        "exploding",
        "BatchNorm without skips multiplies the gradient at each layer",
        partial(conv_chain, 80, 8, norm="batch2d"),
        axis="depth",
        cuts=("act1", "act80"),
        batches=partial(images, 8, 3, 6),
        lr=1e-5,
        optimizer="adam",
        steps=6,
    ),
    _residual(
        "residual-conv-40",
        "exploding",
        "every block doubles the variance",
        partial(ResidualConv, 40, norm=None),
        axis="depth",
        cuts=("stem", "blocks.39.2"),
        batches=partial(images, 8, 3, 6),
        **_SCALE_FREE,
    ),
    _conv(
        "conv-dead-channels",
        "dead",
        "nine in ten channels have a bias of -20",
        lambda: dead_bias(conv_chain(4, 20), "conv2", 0.9),
        places=("act2",),
        lr=3e-3,
    ),
    _conv(
        "conv-dead-layer",
        "dead",
        "a layer's channels have a bias of -20",
        lambda: dead_bias(conv_chain(5), "conv4", 1.0),
        places=("act4",),
        lr=3e-3,
    ),
    _conv(
        "conv-saturated-tanh",
        "saturated",
        "weights forty times Xavier's",
        partial(conv_chain, 2, activation="tanh", init="xavier", gain=40.0),
        places=("act*",),
        lr=1e-4,
    ),
)
