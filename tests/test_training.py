"""The training loop against a naive one: losses, weights, divergence, callbacks, settings, evaluation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from gradlab.errors import UsageError
from gradlab.nets import MLP, CifarNet, initialize
from gradlab.tasks import load_digits
from gradlab.tasks.image import batch_schedule
from gradlab.training import TrainSettings, evaluate, learning_rate, train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def cifar(seed=0, depth=8, **settings):
    net = CifarNet(depth, width=4, in_channels=1, **{"norm": "batch", "skip": False, **settings})
    return initialize(net, "he_normal", seed=seed)


def mlp(seed=0, depth=3, **settings):
    return initialize(MLP(depth, width=16, in_features=64, classes=10, **settings), "he_normal", seed=seed)


def weights(model):
    return [value.detach().clone() for value in model.state_dict().values()]


def no_layers(step):
    return False


# -- against a naive loop ---------------------------------------------------------------------------------------------


def naive(model, task, s):
    """SGD by hand: gradients plus decay, scaled to the clipping norm, into the momentum, into the weights."""
    model.train()
    order = batch_schedule(len(task.train_labels), s.batch_size, s.steps, s.seed)
    speeds = [None for _ in model.parameters()]
    losses = []
    for step in range(s.steps):
        x, y = task.train_images[order[step]], task.train_labels[order[step]]
        loss = nn.functional.cross_entropy(model(x), y)
        losses.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        if s.clip_norm > 0:
            total = torch.stack([gradient.norm() for gradient in gradients]).norm()
            gradients = [g * min(1.0, s.clip_norm / float(total + 1e-6)) for g in gradients]
        rate = s.lr
        for milestone in s.milestones:
            rate *= s.lr_decay if step >= milestone else 1.0
        if step < s.warmup_steps:
            rate = s.warmup_lr
        with torch.no_grad():
            for place, (p, g) in enumerate(zip(model.parameters(), gradients, strict=True)):
                g = g.add(p, alpha=s.weight_decay)
                speeds[place] = g if speeds[place] is None else speeds[place].mul(s.momentum).add(g)
                p.sub_(speeds[place], alpha=rate)
    return losses


RECIPES = {
    "plain": {"momentum": 0.0, "weight_decay": 0.0},
    "momentum": {"momentum": 0.9, "weight_decay": 0.0},
    "weight decay": {"weight_decay": 0.05},
    "milestones": {"milestones": (2, 4), "lr_decay": 0.5},
    "warm-up": {"warmup_steps": 3, "warmup_lr": 0.01},
    "not clipped": {"clip_norm": 1e6},
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("net", [cifar, mlp], ids=["cifar", "mlp"])
def test_equals_a_naive_loop_bit_for_bit(digits, net, recipe):
    settings = TrainSettings(**{"steps": 6, "batch_size": 32, "lr": 0.05, "channels_last": False} | recipe)
    ours, theirs = net(), net()
    result = train(ours, digits, settings, device=CPU)
    expected = naive(theirs, digits, settings)
    assert result.losses.tolist() == expected
    assert all(torch.equal(a, b) for a, b in zip(weights(ours), weights(theirs), strict=True))


def test_clipping_equals_a_naive_loop(digits):
    settings = TrainSettings(steps=6, batch_size=32, lr=0.5, clip_norm=0.1, channels_last=False)
    ours, theirs, unclipped = cifar(), cifar(), cifar()
    result = train(ours, digits, settings, device=CPU)
    expected = naive(theirs, digits, settings)
    np.testing.assert_allclose(result.losses, expected, rtol=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    # ... and it clipped: without it the run is another, and the trace tells by how much.
    free = train(unclipped, digits, TrainSettings(steps=6, batch_size=32, lr=0.5, channels_last=False), device=CPU)
    assert abs(free.losses - result.losses).max() > 0.1
    assert (result.trace.steps["clip_coefficient"] < 1).all()
    np.testing.assert_allclose(result.trace.steps["grad_norm"], 0.1, rtol=1e-4)


def test_channels_last_computes_the_same(digits):
    settings = {"steps": 4, "batch_size": 32, "lr": 0.05}
    last = train(cifar(), digits, TrainSettings(channels_last=True, **settings), device=CPU)
    first = train(cifar(), digits, TrainSettings(channels_last=False, **settings), device=CPU)
    np.testing.assert_allclose(last.losses, first.losses, rtol=1e-4)


def test_watched_equals_unwatched(digits):
    settings = TrainSettings(steps=5, batch_size=32)
    watched, bare = cifar(skip=True), cifar(skip=True)
    a = train(watched, digits, settings, device=CPU, every=1, layers="all")
    b = train(bare, digits, settings, device=CPU, every=no_layers)
    assert a.losses.tolist() == b.losses.tolist()
    assert a.test_error == b.test_error
    assert all(torch.equal(x, y) for x, y in zip(weights(watched), weights(bare), strict=True))
    assert len(a.trace.layers) > 0
    assert len(b.trace.layers) == 0


def test_the_same_seed_repeats_and_another_differs():
    task = load_digits(augment=True)

    def losses(seed):
        return train(cifar(), task, TrainSettings(steps=4, batch_size=32, seed=seed), device=CPU).losses.tolist()

    torch.manual_seed(5)
    first = losses(0)
    torch.manual_seed(6)  # augmentation has a generator of its own
    assert losses(0) == first
    assert losses(1) != first


def test_augmentation_changes_the_batches(digits):
    augmented = load_digits(augment=True)
    settings = TrainSettings(steps=2, batch_size=32)
    assert train(cifar(), augmented, settings, device=CPU).losses[0] != train(
        cifar(), digits, settings, device=CPU
    ).losses[0]  # fmt: skip


# -- divergence -------------------------------------------------------------------------------------------------------


class Bomb(nn.Module):
    """A linear net whose logits are `value` from the given forward call on."""

    def __init__(self, at, value):
        super().__init__()
        self.linear, self.at, self.value, self.calls = nn.Linear(64, 10), at, value, 0

    def forward(self, x):
        y = self.linear(x.flatten(1))
        self.calls += 1
        return y * self.value if self.calls > self.at else y


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("at", [0, 3, 5])
def test_a_loss_that_is_not_finite_is_a_result(digits, at, value):
    told = []
    result = train(
        Bomb(at, value), digits, TrainSettings(steps=6, batch_size=16), device=CPU, on_step=lambda *a: told.append(a)
    )
    assert (result.status, result.diverged_at) == ("diverged", at)
    assert len(result.losses) == at + 1
    assert np.isfinite(result.losses[:-1]).all()
    assert not np.isfinite(result.losses[-1])
    assert math.isnan(result.test_error)
    assert result.trace.steps["step"].tolist() == list(range(at + 1))
    assert result.trace.layers["step"].max() == at
    assert [step for step, _ in told] == list(range(at + 1))
    assert not math.isfinite(told[-1][1])


def test_a_large_learning_rate_diverges(digits):
    net = mlp(depth=10, activation="linear")
    result = train(net, digits, TrainSettings(steps=30, batch_size=32, lr=100.0), device=CPU)
    assert result.status == "diverged"
    assert 0 < result.diverged_at < 30
    assert np.isfinite(result.losses[:-1]).all()


def test_steps_after_the_divergence_leave_the_trace(digits):
    # As on an accelerator, where the loss is looked at only later.
    from gradlab.training_steps import until

    trace = train(mlp(), digits, TrainSettings(steps=4, batch_size=16), device=CPU).trace
    kept = until(trace, 2)
    for name in ("steps", "layers", "params"):
        assert set(kept.tables[name]["step"]) == {0, 1}
    assert len(kept.units) == len(trace.units) > 0
    assert until(trace, 4) is trace


def test_finding_the_first_loss_that_is_not_finite():
    from gradlab.training_steps import _first_nonfinite

    losses = torch.tensor([1.0, math.nan, 1.0, math.inf, math.nan])
    assert _first_nonfinite(losses, 0, 4) == 1
    assert _first_nonfinite(losses, 2, 4) == 3
    assert _first_nonfinite(losses, 2, 2) is None


# -- callbacks --------------------------------------------------------------------------------------------------------


def test_on_step_gets_every_step_and_its_loss(digits):
    told = []
    settings = TrainSettings(steps=5, batch_size=16)
    result = train(mlp(), digits, settings, device=CPU, every=2, on_step=lambda *a: told.append(a))
    assert told == list(enumerate(result.losses))
    assert result.trace.steps["step"].tolist() == [0, 2, 4]
    np.testing.assert_array_equal(result.trace.steps["loss"], result.losses[::2])


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, ValueError, RuntimeError], ids=lambda e: e.__name__)
def test_what_on_step_raises_ends_the_training_and_leaves_no_hook(digits, error):
    def stop(step, loss):
        if step == 2:
            raise error("enough")

    net = mlp()
    with pytest.raises(error, match="enough"):
        train(net, digits, TrainSettings(steps=5, batch_size=16), device=CPU, on_step=stop)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    train(net, digits, TrainSettings(steps=1, batch_size=16), device=CPU)  # not watched any more


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": math.nan}, "lr=nan must be a finite number of at least 0."),
        ({"lr": math.inf}, "lr=inf must be a finite number of at least 0."),
        ({"lr": "0.1"}, "lr='0.1' must be a finite number of at least 0."),
        ({"steps": "6"}, "steps='6' must be a whole number."),
        ({"batch_size": 1.5}, "batch_size=1.5 must be a whole number."),
        ({"lr": -0.1}, "lr=-0.1 must be a finite number of at least 0."),
        ({"momentum": math.nan}, "momentum=nan must be a finite number of at least 0."),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be a finite number of at least 0."),
        ({"clip_norm": math.inf}, "clip_norm=inf must be a finite number of at least 0."),
        ({"steps": 0}, "steps=0 is too small: it must be at least 1."),
        ({"batch_size": 0}, "batch_size=0 is too small: it must be at least 1."),
        ({"warmup_steps": -1}, "warmup_steps=-1 is too small: it must be at least 0."),
        ({"precision": "float16"}, "Unknown precision 'float16'. Did you mean 'float32'?"),
    ],
    ids=lambda value: next(iter(value)) + "=" + str(next(iter(value.values()))) if isinstance(value, dict) else "",
)
def test_bad_settings_are_one_sentence(settings, message):
    with pytest.raises(UsageError) as error:
        TrainSettings(**settings)
    assert str(error.value) == message


def test_device_by_name(digits):
    settings = TrainSettings(steps=1, batch_size=16)
    torch.manual_seed(1)
    by_name = train(mlp(), digits, settings, device="cpu")
    torch.manual_seed(1)
    assert by_name.losses.tolist() == train(mlp(), digits, settings, device=CPU).losses.tolist()
    with pytest.raises(UsageError, match="Unknown device 'cup'"):
        train(mlp(), digits, settings, device="cup")


def test_a_batch_larger_than_the_data_is_one_sentence(digits):
    with pytest.raises(UsageError, match=r"A batch of 1401 cannot be drawn from 1400 training examples"):
        train(mlp(), digits, TrainSettings(steps=1, batch_size=1401), device=CPU)


def test_out_of_memory_is_one_sentence(digits, monkeypatch):
    from gradlab.errors import ResourceError

    class Greedy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 10)

        def forward(self, x):
            return self.linear(x.flatten(1)) + torch.empty(2**50, dtype=torch.uint8)

    net = Greedy()
    with pytest.raises(ResourceError) as error:
        train(net, digits, TrainSettings(steps=1, batch_size=16), device=CPU)
    text = str(error.value)
    assert text.startswith("Out of memory on cpu in training Greedy at batch_size=16: it asked for 1048576.00 GiB and ")
    assert text.endswith("lower batch_size, then width, depth or size.")
    assert not any(m._forward_hooks for m in net.modules())


def test_learning_rate_schedule():
    s = TrainSettings(lr=0.1, warmup_steps=10, warmup_lr=0.01, milestones=(100, 200), lr_decay=0.1)
    rates = [learning_rate(s, step) for step in (0, 9, 10, 99, 100, 199, 200, 10**6)]
    np.testing.assert_allclose(rates, [0.01, 0.01, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_the_trace_has_the_schedule(digits):
    settings = TrainSettings(steps=5, batch_size=16, lr=0.1, warmup_steps=2, warmup_lr=0.02, milestones=(4,))
    trace = train(mlp(), digits, settings, device=CPU).trace
    np.testing.assert_allclose(trace.steps["learning_rate"], [0.02, 0.02, 0.1, 0.1, 0.01])


# -- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [7, 397, 500])
@pytest.mark.parametrize("training", [True, False], ids=["train mode", "eval mode"])
def test_evaluate_counts_as_a_naive_loop_and_changes_nothing(digits, batch_size, training):
    net = cifar()
    train(net, digits, TrainSettings(steps=3, batch_size=32), device=CPU)
    net.train(training)
    before = weights(net)
    error = evaluate(net, digits, batch_size)
    assert net.training is training
    assert all(module.training is training for module in net.modules())
    assert all(torch.equal(a, b) for a, b in zip(weights(net), before, strict=True))
    net.eval()
    with torch.no_grad():
        wrong = sum(
            int(net(x[None]).argmax()) != int(y) for x, y in zip(digits.test_images, digits.test_labels, strict=True)
        )
    assert error == 100 * wrong / 397
    assert 0 < error < 100


def test_evaluate_gives_the_mode_back_after_an_error(digits):
    net = cifar()
    net.head = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="shape"):
        evaluate(net, digits)
    assert net.training


def test_test_error_is_that_of_the_trained_net(digits):
    net = cifar(skip=True)
    result = train(net, digits, TrainSettings(steps=40, batch_size=64), device=CPU)
    assert result.test_error == evaluate(net, digits)
    assert result.test_error < 60  # it learns
    assert result.seconds > 0
    assert result.cpu_seconds > 0


# -- the loop alone ---------------------------------------------------------------------------------------------------


def test_steps_end_where_asked_and_with_the_optimizers_own_rate():
    from gradlab.training_steps import run_steps

    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    twin = nn.Linear(3, 1)
    twin.load_state_dict(net.state_dict())
    asked = []

    def draw(step):
        return torch.full((2, 3), 1.0 + step), torch.zeros(2, 1)

    def stop(step):
        asked.append(step)
        return step == 3

    run = run_steps(net, optimizer, draw, nn.functional.mse_loss, steps=9, device=CPU, stop=stop, every=2)
    assert asked == [0, 1, 2, 3]
    assert len(run.losses) == 4
    assert run.diverged_at is None
    assert run.trace.steps["step"].tolist() == [0, 2]
    for step in range(4):
        loss = nn.functional.mse_loss(twin(draw(step)[0]), draw(step)[1])
        assert run.losses[step] == pytest.approx(float(loss.detach()), rel=1e-4)
        for parameter, gradient in zip(
            twin.parameters(), torch.autograd.grad(loss, list(twin.parameters())), strict=True
        ):
            with torch.no_grad():
                parameter -= 0.01 * gradient
    # The update fuses product and sum, which the one by hand rounds apart.
    for a, b in zip(weights(net), weights(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
