"""A probe keeps numbers, not tensors, and its trace can be read at any time."""

import gc
import math
import weakref

import pytest
import torch
from torch import nn

from gradlab.probes import watch
from gradlab.probes.buffer import StepBuffer
from gradlab.probes.reduce import norm_of


def mlp():
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 2))


def conv_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 2))


def test_no_activation_outlives_its_step():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = []
    handles = [m.register_forward_hook(lambda m, a, out: outputs.append(weakref.ref(out))) for m in model]
    with watch(model, optimizer) as probe:
        loss = model(torch.randn(6, 3)).sum()
        loss.backward()
        del loss
        assert [ref() for ref in outputs] == [None] * 5  # before the step is closed already
        optimizer.step()
    for handle in handles:
        handle.remove()
    assert len(probe.trace.layers) == 5


def test_tensors_do_not_pile_up():
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        model(torch.randn(4, 3, 6, 6)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def alive():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    with watch(model, optimizer) as probe:
        for _ in range(3):  # memory that is kept from step to step is as large as the steps before needed
            step()
        before = alive()
        for _ in range(20):
            step()
        assert alive() <= before + 5  # a slab may come to need one more; in twenty steps that is no pile
        assert len(probe._layers._log._interned) == 1
        assert len(probe._buffer._pending) < 16  # rows of steps, as arrays


def test_long_evaluation_leaves_little_behind():
    model = nn.Linear(1, 1)
    with watch(model) as probe, torch.no_grad():
        for _ in range(500):
            model(torch.ones(1, 1))
        assert probe._layers.gate.remembered <= 512
    assert probe.trace.info["calls_without_grad"] == 500


def test_trace_in_the_middle_and_after():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as probe:
        assert len(probe.trace.steps) == 0
        for step in range(3):
            assert probe.step_number == step
            model(torch.randn(6, 3)).sum().backward()
            optimizer.step()
            assert probe.trace.steps["step"].tolist() == list(range(step + 1))
            assert probe.trace is probe.trace
        middle = probe.trace
    assert probe.trace == middle
    assert not probe.recording
    steps = probe.trace.steps
    assert steps["seconds"].gt(0).all()
    assert steps["skipped"].eq(False).all()
    assert steps["loss_scale"].eq(1).all()
    assert all(math.isfinite(value) for value in steps["grad_norm"])


def test_calls_after_close_do_nothing():
    model = mlp()
    with watch(model) as probe:
        model(torch.randn(6, 3)).sum().backward()
        probe.step()
    before = probe.trace
    probe.log(loss=3.0)
    x = torch.ones(2)
    assert probe.tap(x, "late") is x
    model(torch.randn(6, 3)).sum().backward()
    assert probe.trace == before


def test_a_view_of_a_whole_tensor_is_read_once_and_nothing_else_is_shared():
    buffer = StepBuffer()
    x = torch.randn(4, 6)
    first = buffer.reduce_shared(x)
    assert buffer.reduce_shared(x.view_as(x)) == first
    assert buffer.reduce_shared(x.view(24)) == first
    assert buffer.reduce_shared(x[:2]) != first
    assert buffer.reduce_shared(x.t()) != first  # the same entries, but the kernel could not read them as they lie
    assert buffer.reduce_shared(x.clone()) != first
    view = x.view(24)
    x.mul_(2)
    again = buffer.reduce_shared(view)
    assert again != first
    norms = []
    buffer.flush(lambda rows: norms.extend(norm_of(rows)[[first, again]]))
    buffer.wait()
    assert norms[1] == pytest.approx(2 * norms[0])


class Last(nn.Module):
    """An LSTM, and a head on its last state."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][-1])


@pytest.mark.parametrize("kept", [True, False], ids=["probe kept", "probe dropped"])
@pytest.mark.parametrize(
    ("build", "shape"), [(mlp, (6, 3)), (conv_net, (6, 3, 6, 6)), (Last, (5, 6, 3))], ids=["MLP", "conv", "LSTM"]
)
def test_a_closed_probe_lets_the_model_go(build, shape, kept):
    gc.collect()
    gc.disable()  # else the collector may do what must not be needed
    try:
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with watch(model, optimizer, timesteps=build is Last) as probe:
            model(torch.randn(shape)).square().mean().backward()
            optimizer.step()
        gone = [weakref.ref(part) for part in (model, optimizer, next(model.parameters()))]
        del model, optimizer
        if not kept:
            del probe
        assert [ref() for ref in gone] == [None, None, None]
        if kept:
            assert len(probe.trace.layers)
            assert not probe.trace.never_ran
    finally:
        gc.enable()
