"""A step under an integration runs the probe and nothing else: the same hooks, the same operations."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradlab as gl
from gradlab.integrations.scalars import scalars
from gradlab.integrations.trainer_watch import TrainerWatch


class Operations(TorchDispatchMode):
    """Counts what torch is asked to compute."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def steps_of(model, optimizer, log, count=3):
    """Return the operations of each step."""
    found = []
    for _ in range(count):
        with Operations() as seen:
            optimizer.zero_grad()
            loss = model(torch.ones(8, 3)).square().mean()
            loss.backward()
            log(loss)
            optimizer.step()
        found.append(seen.counts)
    return found


def hooks(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]


@pytest.mark.parametrize("every", [1, 2], ids=["each-step", "each-second"])
def test_a_step_under_a_callback_is_a_step_under_the_probe(every):
    model, optimizer = net()
    with gl.watch(model, optimizer, every=every) as probe:
        probed_hooks = hooks(model)
        probed = steps_of(model, optimizer, lambda loss: probe.log(loss=loss))
    model, optimizer = net()
    watch = TrainerWatch(None, {"every": every})
    watch.begin(model, [optimizer], None)
    assert hooks(model) == probed_hooks
    ours = steps_of(model, optimizer, lambda loss: watch.add_loss(loss, scaled=True))
    watch.end(save=False)
    for mine, probes in zip(ours, probed, strict=True):
        del mine["aten.detach.default"], probes["aten.detach.default"]  # of the loss: a view, nothing is computed
        assert mine == probes


def test_a_trace_becomes_scalars_without_an_operation_of_torch():
    model, optimizer = net()
    with gl.watch(model, optimizer) as probe:
        steps_of(model, optimizer, lambda loss: probe.log(loss=loss))
    trace = probe.trace
    with Operations() as seen:
        assert len(scalars(trace)) > 50
    assert not seen.counts


def test_the_loss_is_read_without_waiting_for_the_device():
    with torch.device("meta"):
        model = nn.Linear(3, 1)
        watch = TrainerWatch(None, {})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu")
        watch.begin(model, [optimizer], None)
        watch._scaler = scaler  # as in a training with it; torch.amp itself does not run on meta
        scaler._scale = torch.ones(())
        for _ in range(2):  # two micro-batches: any copy to the host raises on meta
            loss = model(torch.ones(8, 3)).square().mean()
            loss.backward()
            watch.add_loss(loss, scaled=True)
        watch.end(save=False)
    assert not hooks(model)[0][0]
