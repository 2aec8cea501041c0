"""Several probes at once, and threads: each probe records its own, and nobody's training changes."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from gradlab.probes import watch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(12)


def norm(x):
    return x.detach().norm(dtype=torch.float64).item()


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))


def test_probes_on_a_model_and_on_a_part_of_it(bare_and_watched):
    def train(start):
        model = nn.Sequential(mlp(), nn.ReLU(), nn.LSTM(2, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with start(model, optimizer), start(model[0]) as inner:
            model(torch.randn(6, 4))[0].square().sum().backward()
            inner.step()
            optimizer.step()
        return list(model.state_dict().values())

    outer, inner = bare_and_watched(train)
    part = outer.layers[outer.layers["layer"].str.startswith("0.")]
    for column in ("act_norm", "grad_norm", "act_std"):
        assert part[column].tolist() == inner.layers[column].tolist()
    assert len(inner.layers) == 4
    assert outer.params["grad_norm"].tolist()[:6] == inner.params["grad_norm"].tolist()
    assert outer.batchnorm[["mean_gap", "grad_gain"]].equals(inner.batchnorm[["mean_gap", "grad_gain"]])


@pytest.mark.parametrize("first", [0, 1], ids=["outer_closed_first", "inner_closed_first"])
def test_probe_on_a_part_goes_on_when_the_other_is_closed(first):
    model = nn.Sequential(mlp(), nn.ReLU())
    probes = [watch(model), watch(model[0])]
    probes[first].close()
    model(torch.randn(6, 4)).sum().backward()
    probes[1 - first].step()
    probes[1 - first].close()
    assert len(probes[1 - first].trace.layers) == (4 if first == 0 else 5)
    assert not any(module._forward_hooks for module in model.modules())


def train_own(seed):
    """Train a watched model of its own; nothing global, not even the random state, is drawn from."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    for p in model.parameters():
        p.data = torch.rand(p.shape, generator=generator) - 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with watch(model, optimizer) as probe:
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.randn(16, 8, generator=generator)).square().mean().backward()
            optimizer.step()
    return probe.trace


def test_threads_with_models_of_their_own():
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(train_own, range(8)))
    for seed, trace in enumerate(together):
        other = train_own(seed)
        assert trace.layers.equals(other.layers)
        assert trace.params.equals(other.params)
        assert trace.batchnorm.equals(other.batchnorm)


@pytest.fixture
def _restless():
    """Let threads take turns far more often than they do, so that a race shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_restless")
def test_threads_that_call_one_model_at_once():
    """Backward passes of several devices, and inference servers, call one probe's hooks from several threads."""
    model = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64).eval(), nn.Tanh(), nn.Linear(64, 8))
    sizes = list(range(1, 41))
    inputs = {size: torch.randn(size, 8) for size in sizes}
    together = threading.Barrier(4)

    def call(size):
        if size <= 4:
            together.wait(30)
        model(inputs[size]).square().sum().backward()

    with watch(model) as probe:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(call, sizes))
        probe.step()
    rows = probe.trace.layers
    assert len(rows) == 4 * len(sizes)
    assert sorted(rows["order"]) == list(range(len(rows)))
    for size in sizes:
        y = model[0](inputs[size])
        row = rows[(rows["layer"] == "0") & (rows["entries"] == y.numel())]
        assert row["act_norm"].tolist() == pytest.approx([norm(y)], rel=1e-6)
        y.retain_grad()
        model[3](model[2](model[1](y))).square().sum().backward()
        assert row["grad_norm"].tolist() == pytest.approx([norm(y.grad)], rel=1e-5)
    assert len(probe.trace.batchnorm) == len(sizes)
    assert probe.trace.batchnorm["grad_gain"].notna().all()


def test_a_batchnorm_call_in_the_midst_of_another_threads_call():
    """What a call's first hook kept was once taken, and thrown away, by another thread's call."""
    model = nn.BatchNorm1d(3)
    inputs = [torch.randn(4, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True)]
    with watch(model) as probe:

        def other_call_first(module, args):
            if len(args[0]) == 4:
                other = threading.Thread(target=lambda: module(inputs[1]).square().sum().backward())
                other.start()
                other.join(30)

        model.register_forward_pre_hook(other_call_first)
        model(inputs[0]).square().sum().backward()
        probe.step()
    assert len(probe.trace.batchnorm) == 2
    assert probe.trace.batchnorm["grad_gain"].notna().all()
