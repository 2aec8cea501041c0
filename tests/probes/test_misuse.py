"""What cannot be watched is one sentence; nothing of the probe stays behind."""

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from gradlab.errors import UsageError
from gradlab.probes import watch

_OLD = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, inside its jvp


@pytest.fixture
def model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def test_scaler_of_a_wrong_kind_left_the_model_watched_for_ever(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match=r"GradScaler as its scaler; got str"):
        watch(model, optimizer, scaler="fp16")
    assert not any(module._forward_hooks for module in model.modules())
    watch(model, optimizer).close()


def test_close_that_fails_lets_the_model_go(model, monkeypatch):
    probe = watch(model)
    model(torch.ones(2, 4)).sum().backward()

    def fail(_):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(probe._buffer, "flush", fail)
    with pytest.raises(RuntimeError, match="gone"):
        probe.close()
    assert not any(module._forward_hooks for module in model.modules())
    watch(model).close()


@pytest.mark.parametrize(
    ("layers", "word"),
    [
        pytest.param(3, "int", id="number"),
        pytest.param([3], "int", id="list of numbers"),
        pytest.param([nn.ReLU()], "ReLU", id="modules"),
    ],
)
def test_layers_of_a_wrong_kind(model, layers, word):
    with pytest.raises(UsageError, match=f"got a {word}"):
        watch(model, layers=layers)


def test_scripted_model_is_refused(model):
    model.extra = torch.jit.ScriptModule()
    with pytest.raises(UsageError, match="takes no hooks"):
        watch(model)


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        pytest.param("x", "n", id="no tensor"),
        pytest.param(torch.ones(2), 3, id="name no text"),
    ],
)
def test_tap_of_a_wrong_kind(model, tensor, name):
    with watch(model) as probe, pytest.raises(UsageError, match="tap takes a tensor and its name"):
        probe.tap(tensor, name)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        pytest.param({"loss": "x"}, "the loss must be a number or have one entry; got 'x'", id="loss is text"),
        pytest.param({"loss": torch.ones(3)}, r"the loss must .* got shape \(3,\)", id="loss of three"),
        pytest.param({"clip": 1.0}, "clip takes a pair", id="clip no pair"),
        pytest.param({"clip": (torch.ones(3), 1.0)}, r"total norm must .* shape \(3,\)", id="norm of three"),
        pytest.param({"clip": (1.0, "x")}, "max_norm must .* got 'x'", id="max_norm is text"),
    ],
)
def test_log_of_a_wrong_kind(model, said, words):
    with watch(model) as probe, pytest.raises(UsageError, match=words):
        probe.log(**said)


def test_wrapper_of_tensors_crashed_the_process(model):
    """A wrapper subclass (as DTensor is) gives the address 0, which the kernel read."""
    x = torch.randn(3, 4)
    with watch(model) as probe:
        model(TwoTensor(x, x.clone())).sum().backward()
        probe.step()
    first = probe.trace.layers.iloc[0]
    assert first["act_norm"] == pytest.approx(model[0](x).norm().item(), rel=1e-6)


@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(lambda model, x: torch.func.vmap(model)(x), id="vmap"),
        pytest.param(lambda model, x: torch.func.jvp(model, (x,), (x,)), id="jvp", marks=_OLD),
        pytest.param(lambda model, x: torch.func.grad(lambda y: model(y).sum())(x), id="grad"),
    ],
)
def test_torch_func_runs_and_says_that_nothing_was_seen(model, transform):
    with watch(model) as probe:
        transform(model, torch.randn(3, 4))
        probe.step()
    assert set(probe.trace.info["not_seen"]) == {"0", "1", "2"}
