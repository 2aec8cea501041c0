"""Seeds trained at once are the seeds trained one by one: losses, weights, every table of every trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import gradlab as gl
from gradlab.errors import UsageError
from gradlab.nets import MLP, CifarNet, initialize
from gradlab.probes import log_spaced
from gradlab.tasks import ImageTask, load_digits
from gradlab.training import TrainSettings, train
from gradlab.training_seeds import train_seeds

Build = Callable[[int], nn.Module]
SEEDS = (0, 1, 5)
STEPS = 9


def perceptron(seed: int) -> nn.Module:
    return initialize(MLP(4, width=12, in_features=64, classes=10), "he_normal", seed=seed)


def tanh(seed: int) -> nn.Module:
    net = MLP(3, width=12, in_features=64, classes=10, activation="tanh")
    return initialize(net, "glorot_normal", seed=seed)


def cifar(**how: Any) -> Build:
    def build(seed: int) -> nn.Module:
        return initialize(CifarNet(8, width=4, in_channels=1, **how), "he_normal", seed=seed)

    return build


class Odd(nn.Module):
    """A parameter that is not used, one that is frozen, one used twice, one of no dimension, a Linear without bias."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.unused, self.first, self.last = nn.Linear(3, 3), nn.Linear(64, 8, bias=False), nn.Linear(8, 10)
        self.shared, self.scale = nn.Linear(8, 8), nn.Parameter(torch.tensor(0.5))
        self.last.bias.requires_grad_(requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.flatten(1)).relu()
        return self.last(x + self.scale * self.shared(self.shared(x).tanh()))


class RowByRow(nn.Module):
    """A recurrent net of linear layers whose first state is no seed's own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inputs, self.states, self.head = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.new_zeros(len(x), 6)
        for row in x.squeeze(1).unbind(1):
            h = torch.tanh(self.inputs(row) + self.states(h))
        return self.head(h)


class Mixed(nn.Module):
    """Operators of many kinds: several results, in place, constants, Linear on three dimensions, LayerNorm, softmax."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.each, self.norm, self.head = nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 10)
        self.ramp = torch.linspace(0, 1, 8)  # neither parameter nor buffer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ramp = self.ramp.to(x.dtype).view(8, 1)
        left, right = (self.norm(self.each(x.squeeze(1))) + ramp).chunk(2, dim=-1)
        mixed = torch.cat([left.mul(2.0).relu_(), nn.functional.gelu(right).expand(-1, 8, 3)], -1)
        return self.head((mixed.softmax(1) * mixed).max(1).values.reshape(len(x), 6).add_(0.1))


NETS: dict[str, Build] = {
    "MLP": perceptron,
    "tanh": tanh,
    "plain": cifar(skip=False, norm="none"),
    "plain, BatchNorm": cifar(skip=False, norm="batch"),
    "residual, BatchNorm": cifar(skip=True, norm="batch"),
    "SkipInit": cifar(skip=True, norm="none", skipinit=True),
    "odd": Odd,
    "rows": RowByRow,
    "mixed": Mixed,
}


def both(
    build: Build, task: ImageTask, settings: TrainSettings, seeds: Sequence[int] = SEEDS, **options: Any
) -> tuple[list[Any], list[Any], list[nn.Module], list[nn.Module]]:
    apart, together = [build(seed) for seed in seeds], [build(seed) for seed in seeds]
    options = {"device": "cpu", "every": log_spaced(settings.steps, 4), **options}
    how = [TrainSettings(**{**settings_of(settings), "seed": seed}) for seed in seeds]
    one_by_one = [train(model, task, own, **options) for model, own in zip(apart, how, strict=True)]
    return one_by_one, train_seeds(together, task, settings, seeds, **options), apart, together


def settings_of(settings: TrainSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in TrainSettings.__dataclass_fields__}


def compare(one_by_one: list[Any], at_once: list[Any], *, rtol: float, atol: float = 1e-6) -> None:
    for a, b in zip(one_by_one, at_once, strict=True):
        assert (a.status, a.diverged_at) == (b.status, b.diverged_at)
        np.testing.assert_allclose(a.losses, b.losses, rtol=rtol)
        np.testing.assert_equal(abs(a.test_error - b.test_error) <= 1.0, not np.isnan(a.test_error))
        assert a.trace.tables.keys() == b.trace.tables.keys()
        for name, frame in a.trace.tables.items():
            timed = ["seconds"] if name == "steps" else []
            pd.testing.assert_frame_equal(
                frame.drop(columns=timed), b.trace.tables[name].drop(columns=timed), rtol=rtol, atol=atol, obj=name
            )
        assert a.trace.info == b.trace.info


@pytest.mark.parametrize("build", NETS.values(), ids=NETS)
def test_every_seed_is_as_if_it_were_alone(build: Build) -> None:
    settings = TrainSettings(steps=STEPS, batch_size=16, lr=0.02, milestones=(5,), channels_last=False)
    one_by_one, at_once, apart, together = both(build, load_digits(), settings)
    compare(one_by_one, at_once, rtol=2e-3, atol=2e-5)
    for a, b in zip(apart, together, strict=True):
        for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            torch.testing.assert_close(y, x, rtol=2e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("name", ["MLP", "residual, BatchNorm", "rows", "mixed"])
def test_in_double_precision_equal_to_ten_digits(name: str) -> None:
    task = load_digits().to("cpu", torch.float64)
    settings = TrainSettings(steps=STEPS, batch_size=16, lr=0.02, channels_last=False)
    one_by_one, at_once, *_ = both(lambda seed: NETS[name](seed).double(), task, settings)
    compare(one_by_one, at_once, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("every", [1, 2, 100], ids=["each step", "every other", "the first"])
def test_any_schedule(every: int) -> None:
    settings = TrainSettings(steps=5, batch_size=16, lr=0.02, channels_last=False)
    one_by_one, at_once, *_ = both(perceptron, load_digits(), settings, every=every)
    compare(one_by_one, at_once, rtol=1e-3, atol=1e-5)


def test_gradients_are_clipped_net_by_net() -> None:
    settings = TrainSettings(steps=STEPS, batch_size=16, lr=0.1, clip_norm=0.7, channels_last=False)
    one_by_one, at_once, *_ = both(perceptron, load_digits(), settings)
    assert (one_by_one[0].trace.steps["clip_coefficient"] < 1).any()
    compare(one_by_one, at_once, rtol=1e-3, atol=1e-5)


def test_augmentation_is_drawn_seed_by_seed() -> None:
    settings = TrainSettings(steps=5, batch_size=16, lr=0.02, channels_last=False)
    one_by_one, at_once, *_ = both(perceptron, load_digits(augment=True), settings)
    compare(one_by_one, at_once, rtol=1e-3, atol=1e-5)


def test_a_net_that_diverges_leaves_the_others_alone() -> None:
    def build(seed: int) -> nn.Module:
        net = perceptron(seed)
        with torch.no_grad():
            for param in net.parameters():
                param.mul_(1e9 if seed == 1 else 1.0)
        return net

    settings = TrainSettings(steps=STEPS, batch_size=16, lr=0.02, channels_last=False)
    one_by_one, at_once, *_ = both(build, load_digits(), settings)
    assert [result.status for result in at_once] == ["done", "diverged", "done"]
    compare(one_by_one, at_once, rtol=1e-3, atol=1e-5)


def test_when_all_have_diverged_training_ends() -> None:
    seen: list[int] = []
    settings = TrainSettings(steps=50, batch_size=16, lr=1e30, channels_last=False)
    models = [perceptron(seed) for seed in SEEDS]
    results = train_seeds(
        models, load_digits(), settings, SEEDS, device="cpu", on_step=lambda step, _: seen.append(step)
    )
    assert {result.status for result in results} == {"diverged"}
    assert max(seen) == max(result.diverged_at or 0 for result in results) < 49


def test_afterwards_each_net_has_weights_of_its_own_and_no_hook() -> None:
    models = [perceptron(seed) for seed in SEEDS]
    train_seeds(models, load_digits(), TrainSettings(steps=3, batch_size=16), SEEDS, device="cpu")
    for model in models:
        for param in model.parameters():
            assert param.untyped_storage().nbytes() == param.numel() * 4
        copy.deepcopy(model)
        with gl.watch(model):
            pass


def test_an_error_in_between_gives_the_nets_back() -> None:
    def on_step(step: int, _: float | None) -> None:
        if step == 2:
            raise KeyboardInterrupt

    models = [perceptron(seed) for seed in SEEDS]
    with pytest.raises(KeyboardInterrupt):
        train_seeds(models, load_digits(), TrainSettings(steps=5, batch_size=16), SEEDS, device="cpu", on_step=on_step)
    with gl.watch(models[0]):
        pass
    assert models[0].get_parameter("head.weight").untyped_storage().nbytes() == 12 * 10 * 4


def dropout(_: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.5), nn.Linear(8, 10))


class Recurrent(nn.Module):
    def __init__(self, _: int) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x.squeeze(1))[0][:, -1])


class Branching(nn.Module):
    def __init__(self, _: int) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1)) * (2.0 if x.sum() > 0 else 1.0)


@pytest.mark.parametrize("build", [dropout, Recurrent, Branching], ids=["dropout", "LSTM", "branching"])
def test_nets_that_cannot_be_batched_are_refused_in_a_sentence(build: Build) -> None:
    models = [build(seed) for seed in SEEDS]
    with pytest.raises(UsageError, match=r"cannot be trained at once \(.*\): train them one by one"):
        train_seeds(models, load_digits(), TrainSettings(steps=3, batch_size=16), SEEDS, device="cpu", every=100)


def test_wrong_lists_are_refused() -> None:
    task, settings = load_digits(), TrainSettings(steps=2, batch_size=16)
    with pytest.raises(UsageError, match="as many models as seeds"):
        train_seeds([perceptron(0)], task, settings, SEEDS, device="cpu")
    with pytest.raises(UsageError, match="at least one"):
        train_seeds([], task, settings, [], device="cpu")
    with pytest.raises(UsageError, match="differ in their parameters"):
        train_seeds([perceptron(0), tanh(0)], task, settings, (0, 1), device="cpu")
    net = perceptron(0)
    with pytest.raises(UsageError, match="share parameters"):
        train_seeds([net, net], task, settings, (0, 1), device="cpu")
    with pytest.raises(UsageError, match="precision=bf16"):
        train_seeds([net], task, TrainSettings(precision="bf16"), (0,), device="cpu")


def test_on_meta_nothing_asks_the_host() -> None:
    with torch.device("meta"):
        models = [MLP(3, width=8, in_features=64, classes=10) for _ in SEEDS]
    settings = TrainSettings(steps=4, batch_size=16, clip_norm=1.0, channels_last=False)
    results = train_seeds(models, load_digits(), settings, SEEDS, device=torch.device("meta"), every=2)
    assert [len(result.trace.steps) for result in results] == [2, 2, 2]
