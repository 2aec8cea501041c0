"""MLPs whose gradient vanishes or explodes through depth, or whose training diverges."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradlab.benchmarks.diagnosis.batches import regression, vectors
from gradlab.benchmarks.diagnosis.blocks import chain, initialize, job
from gradlab.benchmarks.diagnosis.case import Case, Job, Loss
from gradlab.benchmarks.diagnosis.mlps import chain_case

__all__ = ["CASES"]

_SUM = partial(F.cross_entropy, reduction="sum")


class ResidualMLP(nn.Module):
    """Blocks h + W2 relu(W1 h) without a normalization: the variance doubles at each."""

    def __init__(self, depth: int, width: int, *, gain: float = 1.0) -> None:
        super().__init__()
        self.stem = nn.Linear(20, width)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(depth)]
        )
        self.head = nn.Linear(width, 5)
        initialize(self.blocks, "he", gain)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h)
        scores: Tensor = self.head(h)
        return scores


def _residual(name: str, depth: int, gain: float) -> Case:
    return Case(
        name=name,
        family="residual",
        label="exploding",
        axis="depth",
        why="every block doubles the variance",
        build=lambda: job(ResidualMLP(depth, 40, gain=gain), vectors(), lr=1e-5, optimizer="adam"),
        cuts=("stem", f"blocks.{depth - 1}.2"),
    )


def _diverging(model: nn.Module, lr: float, optimizer: str = "sgd", *, loss: Loss = F.mse_loss, **how: Any) -> Job:
    return job(model, regression(), loss, lr=lr, optimizer=optimizer, **{"steps": 30, **how})


def _wrong_sign(scores: Tensor, target: Tensor) -> Tensor:
    return -F.mse_loss(scores, target)


def _linear() -> nn.Sequential:
    return chain(0, 20, inputs=20, outputs=3)


def _random_features() -> nn.Sequential:
    """Return a net all of whose layers but the head are frozen on purpose."""
    model = chain(3, outputs=3)
    for name, part in model.named_children():
        part.requires_grad_(name == "head")
    return model


def _grows(name: str, build: Callable[[], Job], why: str) -> Case:
    return Case(name=name, family="mlp", label="exploding", axis="training", build=build, why=why)


CASES: tuple[Case, ...] = (
    # vanishing: the factor a layer is 0.41 for torch's default with ReLU, 0.25 at most for a sigmoid
    chain_case(
        "mlp-default-relu-20", "vanishing", "torch's default initialization", 20, {"init": "default"}, axis="depth"
    ),
    chain_case(
        "mlp-default-relu-40",
        "vanishing",
        "torch's default initialization",
        40,
        {"init": "default", "width": 64},
        axis="depth",
        optimizer="adam",
        lr=1e-5,
    ),
    chain_case(
        "mlp-default-tanh-24",
        "vanishing",
        "torch's default initialization",
        24,
        {"init": "default", "activation": "tanh"},
        axis="depth",
    ),
    chain_case(
        "mlp-default-gelu-16",
        "vanishing",
        "torch's default initialization",
        16,
        {"init": "default", "activation": "gelu"},
        axis="depth",
    ),
    chain_case(
        "mlp-default-sigmoid-10",
        "vanishing",
        "sigmoid's slope is at most 1/4",
        10,
        {"init": "default", "activation": "sigmoid"},
        axis="depth",
    ),
    chain_case(
        "mlp-xavier-sigmoid-8",
        "vanishing",
        "sigmoid's slope is at most 1/4",
        8,
        {"init": "xavier", "activation": "sigmoid", "width": 64},
        axis="depth",
        lr=0.1,
    ),
    chain_case(
        "mlp-xavier-relu-40",
        "vanishing",
        "the factor two for ReLU is missing",
        40,
        {"init": "xavier", "width": 96},
        axis="depth",
    ),
    chain_case(
        "mlp-tiny-weights-relu-8", "vanishing", "weights of 0.02", 8, {"init": "normal", "gain": 0.02}, axis="depth"
    ),
    chain_case(
        "mlp-tiny-weights-tanh-6",
        "vanishing",
        "weights of 0.01",
        6,
        {"init": "normal", "gain": 0.01, "activation": "tanh"},
        axis="depth",
    ),
    chain_case(
        "mlp-orthogonal-half-24",
        "vanishing",
        "every singular value is a half",
        24,
        {"init": "orthogonal", "gain": 0.5, "activation": "identity"},
        axis="depth",
    ),
    chain_case(
        "mlp-vanishing-sum-loss",
        "vanishing",
        "a large loss hides it from absolute bounds",
        20,
        {"init": "default"},
        axis="depth",
        batches=partial(vectors, 512),
        loss=_SUM,
        lr=1e-4,
    ),
    chain_case(
        "mlp-vanishing-targets-1e6",
        "vanishing",
        "large targets hide it from absolute bounds",
        18,
        {"init": "default", "outputs": 3},
        axis="depth",
        batches=partial(regression, scale=1e6),
        loss=F.mse_loss,
        lr=1e-4,
        optimizer="adam",
    ),
    chain_case(
        "mlp-vanishing-batch-of-2",
        "vanishing",
        "two samples a step",
        20,
        {"init": "default"},
        axis="depth",
        batches=partial(vectors, 2),
        lr=1e-3,
    ),
    chain_case(
        "mlp-vanishing-softsign-30",
        "vanishing",
        "half of Xavier's weights",
        30,
        {"init": "xavier", "gain": 0.6, "activation": "softsign"},
        axis="depth",
    ),
    # exploding through depth
    chain_case(
        "mlp-he-times-1.5-relu-30",
        "exploding",
        "one and a half of He's weights",
        30,
        {"gain": 1.5, "width": 64},
        axis="depth",
        lr=1e-6,
        optimizer="adam",
    ),
    chain_case(
        "mlp-he-times-2-relu-20",
        "exploding",
        "twice He's weights",
        20,
        {"gain": 2.0, "width": 64},
        axis="depth",
        lr=1e-6,
        optimizer="adam",
    ),
    chain_case(
        "mlp-he-times-1.5-sum-loss-tiny",
        "exploding",
        "a tiny factor hides it from absolute bounds",
        32,
        {"gain": 1.5, "width": 64},
        axis="depth",
        loss=lambda s, y: 1e-9 * F.cross_entropy(s, y),
        lr=1e-6,
        optimizer="adam",
    ),
    chain_case(
        "mlp-linear-orthogonal-1.6",
        "exploding",
        "every singular value is 1.6",
        26,
        {"gain": 1.6, "init": "orthogonal", "activation": "identity"},
        axis="depth",
        lr=1e-6,
        optimizer="adam",
    ),
    chain_case(
        "mlp-tanh-gain-3-40",
        "exploding",
        "large weights: the gradient grows though the signal is bounded",
        40,
        {"gain": 2.6, "init": "xavier", "activation": "tanh", "width": 96},
        axis="depth",
        lr=1e-6,
        optimizer="adam",
    ),
    chain_case(
        "mlp-batchnorm-72",
        "exploding",
        "BatchNorm without skips multiplies the gradient by 1.2 a layer",
        72,
        {"norm": "batch", "width": 40},
        axis="depth",
        family="norm",
        batches=partial(vectors, 48),
        lr=1e-5,
        optimizer="adam",
        steps=8,
    ),
    chain_case(
        "mlp-batchnorm-90-default",
        "exploding",
        "BatchNorm without skips multiplies the gradient by 1.2 a layer",
        90,
        {"norm": "batch", "width": 32, "init": "default"},
        axis="depth",
        family="norm",
        batches=partial(vectors, 32),
        lr=1e-5,
        optimizer="adam",
        steps=8,
    ),
    _residual("mlp-residual-50", 50, 1.0),
    _residual("mlp-residual-30-gain-1.3", 30, 1.3),
    # exploding over training
    _grows("mlp-diverging-linear", lambda: _diverging(_linear(), 3.5), "a learning rate beyond the curvature's bound"),
    _grows(
        "mlp-diverging-momentum",
        lambda: _diverging(_linear(), 6.5, "momentum", steps=30),
        "a learning rate too large for its momentum",
    ),
    _grows(
        "mlp-diverging-head",
        lambda: _diverging(_random_features(), 0.15, steps=20),
        "a learning rate beyond the curvature's bound, on random features",
    ),
    _grows(
        "mlp-diverging-leaky",
        lambda: _diverging(chain(1, activation="leaky_relu", outputs=3, init="lecun"), 0.75, steps=7),
        "a learning rate beyond the curvature's bound",
    ),
    _grows("mlp-wrong-sign", lambda: _diverging(_linear(), 0.6, loss=_wrong_sign), "the loss is maximized"),
    _grows(
        "mlp-wrong-sign-momentum",
        lambda: _diverging(_linear(), 0.1, "momentum", loss=_wrong_sign),
        "the loss is maximized",
    ),
)
