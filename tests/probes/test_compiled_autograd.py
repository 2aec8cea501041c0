"""A backward pass that torch's compiled autograd runs: it knows Python's hooks only."""

import contextlib

import pytest
import torch
from torch import nn

import gradlab as gl

compiled_autograd = pytest.importorskip("torch._dynamo.compiled_autograd")


def around_both():
    return compiled_autograd._enable(torch.compile(backend="eager"))


def train(region, backward, watched):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(16, 4)
    with gl.watch(model, optimizer) if watched else contextlib.nullcontext() as probe:
        for _ in range(2):
            optimizer.zero_grad()
            with region():
                backward(model(x).square().mean())
            optimizer.step()
    return probe, [param.detach().clone() for param in model.parameters()]


@pytest.mark.filterwarnings("ignore")  # torch's own, as it traces a backward pass
@pytest.mark.parametrize("way", ["context", "config"])
def test_layers_are_recorded_and_training_is_the_same_under_compiled_autograd(way):
    eager, _ = train(contextlib.nullcontext, torch.Tensor.backward, watched=True)
    with torch._dynamo.config.patch(compiled_autograd=way == "config"):
        if way == "context":
            region, backward = around_both, torch.Tensor.backward
        else:
            region, backward = contextlib.nullcontext, torch.compile(lambda loss: loss.backward(), backend="eager")
        _, bare = train(region, backward, watched=False)
        probe, watched = train(region, backward, watched=True)
    for ours, theirs in zip(watched, bare, strict=True):
        assert torch.equal(ours, theirs)
    expected, got = (trace.layers[["step", "layer", "grad_norm"]] for trace in (eager.trace, probe.trace))
    assert got[["step", "layer"]].equals(expected[["step", "layer"]])
    assert got["grad_norm"].notna().all()
    torch.testing.assert_close(torch.tensor(got["grad_norm"]), torch.tensor(expected["grad_norm"]), rtol=1e-6, atol=0)
