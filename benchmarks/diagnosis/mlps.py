"""Healthy MLPs, each with something about it that a hasty rule takes for a disease."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradlab.benchmarks.diagnosis.batches import one_hot_vectors, regression, vectors
from gradlab.benchmarks.diagnosis.blocks import chain, initialize, job
from gradlab.benchmarks.diagnosis.case import Case, Job, train

__all__ = ["CASES", "chain_case"]


def chain_case(
    name: str,
    label: Any,
    why: str,
    depth: int,
    net: dict[str, Any] | None = None,
    *,
    axis: str = "",
    places: tuple[str, ...] = (),
    cuts: bool = True,
    change: Callable[[nn.Sequential], object] | None = None,
    batches: Callable[[], Any] = vectors,
    family: str = "mlp",
    **training: Any,
) -> Case:
    """Return the case of a `chain`.

    Args:
        name: Of the case.
        label: Of the case.
        why: Of the case.
        depth: Hidden layers.
        net: Arguments of `chain`.
        axis: Of the case.
        places: Of the case.
        cuts: Whether the gradient through depth is part of the label.
        change: Called with the net once it is made.
        batches: Makes the batches.
        family: Of the case.
        training: Arguments of `job`.
    """

    def build() -> Job:
        model = chain(depth, **(net or {}))
        if change is not None:
            change(model)
        return job(model, batches(), **training)

    ends = ("act1", f"act{depth}") if cuts and depth > 1 else ()
    return Case(name=name, family=family, label=label, build=build, why=why, axis=axis, places=places, cuts=ends)


_SUM = partial(F.cross_entropy, reduction="sum")


def _sum_of_squares(scores: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(scores, target, reduction="sum")


def _tiny(scores: Tensor, target: Tensor) -> Tensor:
    return 1e-6 * F.cross_entropy(scores, target)


def _converged() -> Job:
    """Let a net reproduce its own outputs, from weights that are off by one part in a hundred thousand."""
    model = chain(6)
    teacher = chain(6)
    teacher.load_state_dict(model.state_dict())
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1 + 1e-4 * torch.randn_like(param))

    def draw(number: int) -> tuple[tuple[Tensor, ...], Tensor]:
        inputs, _ = vectors()(number)
        with torch.no_grad():
            target: Tensor = teacher(*inputs)
        return inputs, target

    return job(model, draw, F.mse_loss, lr=0.05)


def _trained_classifier(loss: Any, end: nn.Module, steps: int) -> Job:
    """Train two classes apart until the outputs say so, and go on from there."""
    model = nn.Sequential()
    for name, part in chain(2, outputs=1).named_children():
        model.add_module(name, part)
    model.add_module("end", end)

    def draw(number: int) -> tuple[tuple[Tensor, ...], Tensor]:
        (x,), _ = vectors()(number)
        x = x.clone()
        sign = torch.where(x[:, :1] > 0, 1.0, -1.0)
        x[:, :1] += 3 * sign
        return (x,), (sign + 1) / 2 if isinstance(end, nn.Sigmoid) else sign

    train(job(model, draw, loss, lr=0.02, optimizer="adam", steps=steps))
    return job(model, draw, loss, lr=1e-3, optimizer="adam")


def _warmup(start: int) -> Job:
    run = job(chain(6), vectors(), lr=0.0, optimizer="adam")

    def before(step: int) -> None:
        run.optimizer.param_groups[0]["lr"] = 1e-3 * (step + start) / 10

    return Job(model=run.model, optimizer=run.optimizer, batches=run.batches, loss=run.loss, before_step=before)


class _Shared(nn.Module):
    """One layer, used eight times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.act = nn.Linear(20, 48), nn.Linear(48, 48), nn.ReLU()
        self.head = nn.Linear(48, 5)
        initialize(self, "he")

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        for _ in range(8):
            x = self.act(self.shared(x))
        scores: Tensor = self.head(x)
        return scores


class _TwoHeads(nn.Module):
    """A trunk whose two heads are trained in turn, so that one of them has no gradient in every other step."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = chain(3, outputs=32)
        self.heads = nn.ModuleList([nn.Linear(32, 5), nn.Linear(32, 5)])

    def forward(self, x: Tensor, turn: int) -> Tensor:
        scores: Tensor = self.heads[turn](F.relu(self.trunk(x)))
        return scores


def _in_turn(number: int) -> tuple[tuple[Any, ...], Tensor]:
    inputs, target = vectors()(number)
    return (*inputs, number % 2), target


class _Experts(nn.Module):
    """Every sample goes to one of four experts; a small batch may leave one without any."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(20, 4)
        self.experts = nn.ModuleList([chain(2) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).softmax(-1)
        best, chosen = share.max(-1)
        scores = x.new_zeros(len(x), 5)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().flatten()
            if len(rows):
                scores = scores.index_add(0, rows, expert(x[rows]) * best[rows, None])
        return scores


def _frozen_trunk() -> Job:
    model = chain(6)
    for place in (1, 2, 3):
        model.get_submodule(f"linear{place}").requires_grad_(False)
    return job(model, vectors(), lr=0.05)


def _scaled(start: float) -> Job:
    scaler = torch.amp.GradScaler("cpu", init_scale=start, backoff_factor=1 / 16)
    return job(chain(5), vectors(), _SUM, lr=1e-3, scaler=scaler)


def _half_scaled() -> Job:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, backoff_factor=1 / 16)
    return job(chain(5), vectors(), lr=0.05, scaler=scaler, autocast=torch.float16)


def _half(dtype: torch.dtype) -> Job:
    return job(chain(5).to(dtype), vectors(dtype=dtype), lr=0.1)


def _case(name: str, build: Callable[[], Job], why: str, **more: Any) -> Case:
    return Case(name=name, family="mlp", label="healthy", build=build, why=why, **more)


_ENDS = {"cuts": ("act1", "act5")}

CASES: tuple[Case, ...] = (
    chain_case("mlp-he-relu-8", "healthy", "half of all entries are zero", 8),
    chain_case("mlp-he-relu-24", "healthy", "half of all entries are zero, deep", 24, {"width": 96}, lr=3e-3),
    chain_case("mlp-he-relu-in-place", "healthy", "activations in place", 6, {"activation": "relu_in_place"}),
    chain_case(
        "mlp-sum-loss",
        "healthy",
        "a loss summed over 256 samples",
        6,
        batches=partial(vectors, 256),
        loss=_SUM,
        lr=1e-4,
    ),
    chain_case(
        "mlp-sum-of-squares-adam",
        "healthy",
        "a squared error summed over 512 samples",
        5,
        {"outputs": 3},
        batches=partial(regression, 512),
        loss=_sum_of_squares,
        lr=1e-3,
        optimizer="adam",
    ),
    chain_case("mlp-batch-of-2", "healthy", "two samples a step", 5, batches=partial(vectors, 2), lr=5e-3, steps=30),
    chain_case(
        "mlp-batch-of-4096",
        "healthy",
        "a huge batch",
        5,
        {"width": 24},
        batches=partial(vectors, 4096),
        lr=0.05,
        steps=8,
    ),
    chain_case(
        "mlp-targets-1e6",
        "healthy",
        "targets never scaled",
        5,
        {"outputs": 3},
        batches=partial(regression, scale=1e6),
        loss=F.mse_loss,
        lr=1e-3,
        optimizer="adam",
    ),
    chain_case(
        "mlp-targets-1e4-sum",
        "healthy",
        "targets never scaled, squared error summed",
        4,
        {"outputs": 3, "activation": "tanh", "init": "xavier"},
        batches=partial(regression, scale=1e4),
        loss=_sum_of_squares,
        lr=1e-3,
        optimizer="adam",
    ),
    chain_case("mlp-loss-times-1e-6", "healthy", "a tiny factor on the loss", 6, loss=_tiny, lr=1e-3, optimizer="adam"),
    chain_case(
        "mlp-tanh-xavier-10",
        "healthy",
        "a bounded activation that is not saturated",
        10,
        {"activation": "tanh", "init": "xavier"},
    ),
    chain_case("mlp-selu-lecun-20", "healthy", "self-normalizing", 20, {"activation": "selu", "init": "lecun"}),
    chain_case(
        "mlp-default-gelu-2",
        "healthy",
        "torch's own initialization, shallow",
        2,
        {"activation": "gelu", "init": "default"},
    ),
    chain_case("mlp-default-relu-3", "healthy", "torch's own initialization, shallow", 3, {"init": "default"}, lr=0.1),
    chain_case("mlp-silu-he-6", "healthy", "a smooth activation", 6, {"activation": "silu", "init": "he"}, lr=0.05),
    chain_case(
        "mlp-elu-he-8", "healthy", "a smooth activation", 8, {"activation": "elu", "init": "lecun", "gain": 1.2}
    ),
    chain_case("mlp-leaky-relu-12", "healthy", "a leak instead of zeros", 12, {"activation": "leaky_relu"}),
    chain_case("mlp-sigmoid-1", "healthy", "one sigmoid layer", 1, {"activation": "sigmoid", "init": "xavier"}, lr=0.1),
    chain_case(
        "mlp-dropout", "healthy", "half of all entries dropped on top of ReLU's zeros", 5, {"dropout": 0.5, "width": 64}
    ),
    chain_case(
        "mlp-layernorm-20",
        "healthy",
        "deep, normalized by layer",
        20,
        {"norm": "layer", "init": "default"},
        family="norm",
    ),
    chain_case("mlp-batchnorm-6", "healthy", "normalized by batch", 6, {"norm": "batch"}, family="norm", lr=0.05),
    chain_case(
        "mlp-batchnorm-default-8",
        "healthy",
        "torch's initialization under BatchNorm",
        8,
        {"norm": "batch", "init": "default"},
        family="norm",
        lr=0.02,
    ),
    chain_case(
        "mlp-batchnorm-batch-4",
        "healthy",
        "BatchNorm over four samples",
        4,
        {"norm": "batch"},
        family="norm",
        batches=partial(vectors, 4),
        lr=5e-3,
        steps=24,
    ),
    chain_case(
        "mlp-linear-orthogonal-40",
        "healthy",
        "deep linear, every singular value one",
        40,
        {"activation": "identity", "init": "orthogonal"},
        lr=2e-4,
    ),
    chain_case("mlp-clipped", "healthy", "every gradient clipped to a twentieth", 6, loss=_SUM, clip=0.5, lr=0.05),
    chain_case("mlp-accumulated", "healthy", "gradients of four batches added", 6, accumulate=4, lr=0.02, steps=8),
    chain_case("mlp-momentum", "healthy", "momentum", 6, optimizer="momentum", lr=5e-3, steps=20),
    chain_case("mlp-one-hot", "healthy", "inputs nearly all zero", 4, {"inputs": 200}, batches=one_hot_vectors, lr=0.1),
    chain_case("mlp-autocast-bf16", "healthy", "activations in bfloat16", 5, autocast=torch.bfloat16, lr=0.05),
    chain_case(
        "mlp-float64",
        "healthy",
        "double precision",
        6,
        change=lambda net: net.double(),
        batches=partial(vectors, dtype=torch.float64),
    ),
    _case("mlp-weights-bf16", partial(_half, torch.bfloat16), "weights in bfloat16, updates large enough", **_ENDS),
    _case("mlp-weights-fp16", partial(_half, torch.float16), "weights in float16", **_ENDS),
    _case("mlp-converged", _converged, "loss and gradients nearly zero", cuts=("act1", "act6")),
    _case(
        "mlp-sigmoid-output",
        partial(_trained_classifier, F.binary_cross_entropy, nn.Sigmoid(), 150),
        "a trained classifier's sigmoid is saturated",
        bounded_ends=("end",),
        cuts=("act1", "act2"),
    ),
    _case(
        "mlp-tanh-output",
        partial(_trained_classifier, F.mse_loss, nn.Tanh(), 150),
        "a trained classifier's tanh is saturated",
        bounded_ends=("end",),
        cuts=("act1", "act2"),
    ),
    _case("mlp-warmup-from-0", partial(_warmup, 0), "the first step's learning rate is 0", cuts=("act1", "act6")),
    _case("mlp-warmup", partial(_warmup, 1), "a learning rate that rises", cuts=("act1", "act6")),
    _case(
        "mlp-shared-weights",
        lambda: job(_Shared(), vectors(), lr=5e-3),
        "one layer called eight times",
        cuts=("first", "head"),
    ),
    _case("mlp-heads-in-turn", lambda: job(_TwoHeads(), _in_turn, lr=0.02), "no gradient in every other step"),
    _case(
        "mlp-experts", lambda: job(_Experts(), vectors(8), lr=0.05, steps=25), "experts without a sample in some steps"
    ),
    _case("mlp-frozen-trunk", _frozen_trunk, "frozen on purpose"),
    _case("mlp-scaler-skips", partial(_scaled, 2.0**127), "the scaler skips the first steps", **_ENDS),
    _case("mlp-autocast-fp16", _half_scaled, "the scaler skips the first steps, in float16", **_ENDS),
)
