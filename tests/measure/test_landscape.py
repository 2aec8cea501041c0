"""Loss and gradient along a step against a quadratic whose landscape is known, and against naive autograd."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import gradlab as gl
from gradlab.errors import UsageError
from gradlab.measure.landscape import along_gradient
from gradlab.measure.normalization_modes import mode_losses, set_momentum
from gradlab.nets import MLP, initialize


def net(norm="batch"):
    return initialize(MLP(3, width=9, in_features=5, classes=3, norm=norm), "he_normal", seed=0).double()


def batch(count=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 5, generator=generator, dtype=torch.float64), torch.arange(count) % 3


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_along_the_gradient_equals_naive_steps(norm):
    model, (x, y) = net(norm), batch()
    found = along_gradient(model, x, y, lr=0.2, factors=(0.5, 4.0))
    for place, factor in enumerate((0.5, 4.0)):
        other = net(norm)
        first = torch.autograd.grad(cross_entropy(other(x), y), list(other.parameters()))
        with torch.no_grad():
            for p, g in zip(other.parameters(), first, strict=True):
                p -= 0.2 * factor * g
        loss = cross_entropy(other(x), y)
        second = torch.autograd.grad(loss, list(other.parameters()))
        change = sum(((b - a) ** 2).sum() for a, b in zip(first, second, strict=True)).sqrt()
        assert found.losses[place] == pytest.approx(float(loss.detach()), rel=1e-10)
        assert found.grad_changes[place] == pytest.approx(float(change), rel=1e-10)
        norm_of = sum((a**2).sum() for a in first).sqrt()
        assert found.grad_norm == pytest.approx(float(norm_of), rel=1e-10)


def test_the_model_is_left_as_it_was_and_a_probe_on_it_records_nothing():
    model, (x, y) = net(), batch()
    model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with gl.watch(model) as probe:
        along_gradient(model, x, y, lr=0.2, factors=(1.0,))
        mode_losses(model, x, y, batch_size=4)
        cross_entropy(model(x), y).backward()
        probe.step()
    assert probe.trace.layers.groupby("layer")["call"].count().eq(1).all()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize(("name", "value"), [("lr", 0.0), ("lr", float("nan")), ("factors", -1.0)])
def test_steps_must_be_above_0(name, value):
    settings = {"lr": 0.1, "factors": (1.0,)} | {name: (value,) if name == "factors" else value}
    with pytest.raises(UsageError, match=f"{name} has the value {value}"):
        along_gradient(net(), *batch(), **settings)


def test_modes_differ_by_their_statistics_alone():
    model, (x, y) = net(), batch()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.momentum = 1.0
    with torch.no_grad():
        in_training = float(cross_entropy(model(x), y))  # momentum 1: the running statistics are this batch's
    got = mode_losses(model, x, y, batch_size=12)
    assert got[0] == pytest.approx(in_training, rel=1e-12)
    # torch keeps the unbiased variance: only that factor 11/12 a layer is between the modes.
    assert got[1] != got[0]
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_var *= 11 / 12
    corrected = mode_losses(model, x, y, batch_size=12)
    assert corrected[1] == pytest.approx(corrected[0], rel=1e-12)


def test_modes_leave_buffers_momentum_and_counters():
    model, (x, y) = net(), batch(10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    mode_losses(model, x, y, batch_size=4)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d)} == {0.1}
    assert {m.momentum for m in set_momentum(model, 0.01).modules() if isinstance(m, torch.nn.BatchNorm1d)} == {0.01}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: mode_losses(net(), *batch(), batch_size=1), "batch_size is 1, but BatchNorm in training mode needs"),
        (lambda: mode_losses(net(), *batch(3), batch_size=4), "A batch of 4 cannot be taken of 3 images"),
        (lambda: set_momentum(net(), 0.0), "momentum is 0.0"),
        (lambda: set_momentum(net(), 1.5), "momentum is 1.5"),
    ],
    ids=["batch-1", "few-images", "momentum-0", "momentum-1.5"],
)
def test_bad_values_are_told_in_one_sentence(call, says):
    with pytest.raises(UsageError, match=says):
        call()
