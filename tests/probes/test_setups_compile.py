"""torch.compile: a watched run is the bare one, parameters are right, and what cannot be seen is said."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from gradlab.probes import watch

# torch's own, inside its compilation of optimizers
_OLD = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def net():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))


def wrapper(backend):
    model = torch.compile(net(), backend=backend)
    return model, model


def wrapper_that_ran_before(backend):
    model, _ = wrapper(backend)
    model(torch.randn(6, 4)).sum().backward()
    model.zero_grad()
    return model, model


def original_of_a_wrapper(backend):
    model = net()
    return torch.compile(model, backend=backend), model


def in_place(backend):
    model = net()
    model.compile(backend=backend)
    return model, model


def one_layer(backend):
    model = net()
    model[0].compile(backend=backend)
    return model, model


def one_wrapped_layer(backend):
    model = net()
    model[0] = torch.compile(model[0], backend=backend)
    return model, model


#: way -> (what makes the model to run and the one to watch, layers that a hook sees)
WAYS = {
    "wrapper": (wrapper, 0),
    "ran_before": (wrapper_that_ran_before, 0),
    "original": (original_of_a_wrapper, 0),
    "in_place": (in_place, 0),
    "one_layer": (one_layer, 3),
    "one_wrapped_layer": (one_wrapped_layer, 3),
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("way", WAYS)
def test_compiled_model(bare_and_watched, way, backend):
    make, seen = WAYS[way]
    want = []

    def train(start):
        torch._dynamo.reset()
        model, watched = make(backend)
        optimizer = torch.optim.SGD(watched.parameters(), lr=0.1, momentum=0.9)
        left = []
        torch.manual_seed(7)
        with start(watched, optimizer):
            for _ in range(2):
                optimizer.zero_grad()
                loss = model(torch.randn(6, 4)).square().mean()
                loss.backward()
                left += [loss, *(p.grad.clone() for p in watched.parameters())]
                optimizer.step()
        want[:] = [p.grad.double().norm().item() for p in watched.parameters()]
        return [*left, *watched.state_dict().values()]

    (trace,) = bare_and_watched(train)
    assert trace.steps["step"].tolist() == [0, 1]
    np.testing.assert_allclose(trace.params.query("step == 1")["grad_norm"], want, rtol=1e-6)
    assert trace.params["update_norm"].notna().all()
    assert len(trace.layers) == 2 * seen
    # Every layer that was not seen is named, with what to do; one without parameters only where that can be known.
    with_weights = {name for name in trace.never_ran if not name.endswith("2")}
    assert len(trace.never_ran) == 4 - seen
    assert with_weights <= set(trace.info["not_seen"])
    if way != "original":
        assert set(trace.never_ran) == set(trace.info["not_seen"])
    assert all("force_eager" in reason for reason in trace.info["not_seen"].values())


@pytest.mark.parametrize("ran", [False, True], ids=["first", "after_compiled_steps"])
def test_under_the_stance_that_the_sentence_names_all_is_seen(ran):
    model = net()
    compiled = torch.compile(model, backend="eager")
    if ran:
        compiled(torch.randn(6, 4)).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(compiled, optimizer) as probe, torch.compiler.set_stance("force_eager"):
        y = compiled(torch.randn(6, 4))
        y.sum().backward()
        optimizer.step()
    rows = probe.trace.layers
    assert rows["layer"].tolist() == ["_orig_mod.0", "_orig_mod.1", "_orig_mod.2", "_orig_mod.3"]
    assert rows["grad_norm"].iloc[-1] == pytest.approx(math.sqrt(12))
    assert rows["act_norm"].iloc[-1] == pytest.approx(y.norm().item(), rel=1e-6)
    assert probe.trace.info["not_seen"] == {}


def test_compiled_model_is_not_broken_into_pieces_by_a_watch():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    model = torch.compile(net(), backend=counter)
    with watch(model) as probe:
        model(torch.randn(6, 4)).sum().backward()
        probe.step()
    assert counter.frame_count == 1


def test_tap_inside_a_compiled_model_hands_its_tensor_on():
    class Tapping(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.probe = nn.Linear(3, 3), None

        def forward(self, x):
            y = self.linear(x).relu()
            return y if self.probe is None else self.probe.tap(y, "relu")

    model = Tapping()
    with watch(model) as model.probe:
        x = torch.randn(2, 3)
        y = torch.compile(model, backend="eager", fullgraph=False)(x)
        assert torch.equal(y, model.linear(x).relu())
        y.sum().backward()
        model.probe.step()
    trace = model.probe.trace
    assert trace.params["grad_norm"].gt(0).all()


@_OLD
@pytest.mark.parametrize("how", ["step", "function"])
def test_compiled_optimizer_closes_its_steps(how):
    torch.compile(lambda: None, backend="eager")()  # as anybody's who compiles
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = torch.compile(optimizer.step if how == "step" else lambda: optimizer.step(), backend="eager")
    with watch(model, optimizer) as probe:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(6, 4)).sum().backward()
            step()
    assert probe.trace.steps["step"].tolist() == [0, 1, 2]
    params = probe.trace.params
    np.testing.assert_allclose(params["update_norm"], 0.1 * params["grad_norm"], rtol=1e-4)


def test_weights_used_without_a_call_of_their_module_are_said():
    model = nn.MultiheadAttention(4, 2)
    with watch(model) as probe:
        x = torch.randn(3, 2, 4)
        model(x, x, x)[0].sum().backward()
        probe.step()
    assert probe.trace.never_ran == ("out_proj",)
    assert "used by another module" in probe.trace.info["not_seen"]["out_proj"]
