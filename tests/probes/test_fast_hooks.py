"""The hooks in C, the hooks in Python with the kernel, and torch alone record the same numbers."""

import copy
import math
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradlab.nets import CifarNet
from gradlab.probes import native, watch
from gradlab.probes.buffer import StepBuffer
from gradlab.probes.reduce import norm_of, statistics

needs_hooks = pytest.mark.skipif(native.hooks() is None, reason="no C compiler or no Python headers here")
WAYS = {"hooks in C": (True, True), "kernel": (False, True), "torch": (False, False)}


@pytest.fixture
def way(monkeypatch):
    """Choose between the three ways that a probe may go on the CPU."""
    hooks, kernel = native.hooks(), native.kernel()

    def choose(name):
        with_hooks, with_kernel = WAYS[name]
        monkeypatch.setattr(native, "hooks", lambda: hooks if with_hooks else None)
        monkeypatch.setattr(native, "kernel", lambda: kernel if with_kernel else None)

    return choose


class Mixed(nn.Module):
    """What hooks meet: several outputs, a reused module, in-place operations, a parameter handed through, float64."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten())
        self.act = nn.Tanh()
        self.out = nn.Linear(96, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.same = nn.Identity()
        self.wide = nn.Linear(4, 4).double()
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x):
        y = self.act(self.out(self.act(self.inner(x))))
        y = y * self.same(self.scale)
        y = checkpoint(self.same, y, use_reentrant=False)
        return self.lstm(self.wide(y.double()).float().unsqueeze(1))[0].sum(1)


def record(model, optimizer, x, steps=3, **options):
    with watch(model, optimizer, **options) as probe:
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    return probe.trace


NETS = {
    "mixed": (Mixed, (5, 3, 6, 6)),
    "resnet": (lambda: CifarNet(8, width=4), (4, 3, 8, 8)),
    "mlp": (lambda: nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(9, 9), nn.ReLU())]), (7, 9)),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_three_ways_one_trace(way, net, layout):
    make, shape = NETS[net]
    torch.manual_seed(3)
    first, x = make(), torch.randn(shape)
    x = x.to(memory_format=layout) if x.dim() == 4 else x
    traces = []
    for name in WAYS:
        way(name)
        model = copy.deepcopy(first).to(memory_format=layout) if x.dim() == 4 else copy.deepcopy(first)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        traces.append(record(model, optimizer, x))
    for table in ("layers", "params", "batchnorm", "units"):
        one, *others = (trace.tables[table] for trace in traces)
        assert len(one) or table == "batchnorm" or (table == "units" and net == "resnet")
        for other in others:
            near_zero = [name for name in one if name == "act_mean"]  # a sum that cancels, after a BatchNorm layer
            pd.testing.assert_frame_equal(one[near_zero], other[near_zero], rtol=2e-5, atol=1e-6)
            rest = [name for name in one if name not in near_zero]
            pd.testing.assert_frame_equal(one[rest], other[rest], rtol=2e-5, atol=1e-12)
    steps = [trace.steps.drop(columns="seconds") for trace in traces]
    pd.testing.assert_frame_equal(steps[0], steps[1], rtol=1e-5)
    infos = [trace.info for trace in traces]
    assert infos[0] == infos[1] == infos[2]


# -- updates foretold -------------------------------------------------------------------------------------------------

SGDS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "dampening": {"momentum": 0.5, "dampening": 0.3},
    "decay": {"weight_decay": 0.1},
    "all": {"momentum": 0.9, "weight_decay": 1e-2, "maximize": True, "nesterov": True},
    "foreach": {"momentum": 0.9, "weight_decay": 1e-2, "foreach": True},
}


@needs_hooks
@pytest.mark.parametrize("options", SGDS.values(), ids=SGDS)
@pytest.mark.parametrize("lr", [0.1, 1e-7, 1e-9], ids=["usual", "mostly_rounded_away", "all_rounded_away"])
def test_foretold_update_is_the_one_that_was_made(options, lr):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 300), nn.Tanh(), nn.Linear(300, 5))
    model[0].weight.data[:7] *= 1e-25
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, **options)
    x, want = torch.randn(8, 40), []
    with watch(model, optimizer) as probe:
        for step in range(4):
            optimizer.param_groups[0]["lr"] = lr * (step + 1)
            optimizer.zero_grad()
            model(x).square().sum().backward()
            before = [p.detach().double() for p in model.parameters()]
            optimizer.step()
            assert not probe._params._before  # nothing was copied
            changes = [p.detach().double() - old for p, old in zip(model.parameters(), before, strict=True)]
            want += [float((change * 2.0**200).norm()) / 2.0**200 for change in changes]
    got = probe.trace.params["update_norm"]
    assert got.tolist() == pytest.approx(want, rel=1e-6, abs=0)
    assert all(value > 0 for value in want) or lr < 0.1


class _Halved(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.data.mul_(0.5)


@needs_hooks
@pytest.mark.parametrize("which", ["subclass", "pre_hook", "post_hook", "replaced"])
def test_an_sgd_that_does_something_else_is_measured(which, monkeypatch):
    model = nn.Linear(3, 3)
    optimizer = (_Halved if which == "subclass" else torch.optim.SGD)(model.parameters(), lr=0.1)

    def clip(*_):
        model.weight.data.clamp_(-0.01, 0.01)

    def double(*_):
        model.weight.grad.mul_(2)

    if which == "post_hook":
        optimizer.register_step_post_hook(clip)  # before ours
    if which == "replaced":  # another arithmetic under the same name: found out by the first update
        module = sys.modules["torch.optim.sgd"]
        sgd = module.sgd
        monkeypatch.setattr(module, "sgd", lambda *args, **named: sgd(*args, **named | {"lr": 0.3}))
    want = []
    with watch(model, optimizer) as probe:
        if which == "pre_hook":
            optimizer.register_step_pre_hook(double)  # after ours
        for _ in range(2):
            before = model.weight.detach().clone()
            optimizer.zero_grad()
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            want.append(float((model.weight.detach() - before).norm()))
    got = probe.trace.params.query("param == 'weight'")["update_norm"].tolist()
    if which == "replaced":
        assert math.isnan(got[0])
        got, want = got[1:], want[1:]
    assert got == pytest.approx(want, rel=1e-5)


# -- reads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e-22, 3e-38, 1e-41, 1e18, 1e30], ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e3], ids=["centred", "far_from_zero"])
def test_every_range_against_float64(scale, mean):
    x = ((torch.randn(20_011, generator=torch.Generator().manual_seed(1)) + mean) * scale).float()
    wide, got, buffer = x.double(), [], StepBuffer()
    slots = [buffer.reduce(x), buffer.reduce(x, moments=False), buffer.reduce(x, norm_only=True)]
    buffer.flush(lambda rows: got.append(rows[slots]))
    buffer.wait()
    rows = got[0]
    all_of = statistics(rows[:1], torch.tensor([x.numel()]).numpy())
    norm = float((wide * 2.0**60).norm()) / 2.0**60
    assert norm_of(rows).tolist() == pytest.approx([norm] * 3, rel=1e-6, abs=0)
    assert all_of["mean"][0] == pytest.approx(float(wide.mean()), rel=1e-5, abs=float(wide.std()) * 1e-6)
    assert all_of["std"][0] == pytest.approx(float(wide.std(correction=0)), rel=2e-5 if mean else 1e-6, abs=0)
    assert all_of["abs_max"][0] == float(wide.abs().max())


def test_a_hook_by_somebody_else_on_the_same_output_still_works(way):
    for name in WAYS:
        way(name)
        model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        grads = []

        def second(_, grads=grads):
            grads.append("second")

        with watch(model) as probe:
            y = model(torch.ones(2, 3))
            handle = y.register_hook(lambda _: pytest.fail("it was removed"))
            y.register_hook(second)
            handle.remove()
            y.sum().backward()
            probe.step()
        assert grads == ["second"]
        assert probe.trace.layers["grad_norm"].notna().all()


def test_off_schedule_no_hook_is_on_a_module_and_order_is_kept():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU())
    order = []
    with watch(model, every=2) as probe:
        ours = [list(m._forward_hooks) for m in model]
        model(torch.randn(4, 3)).sum().backward()
        probe.step()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in (model, *model))
        model[0].register_forward_hook(lambda *_: order.append("theirs"))
        model(torch.randn(4, 3))
        probe.step()
        assert [list(m._forward_hooks)[: len(keys)] for m, keys in zip(model, ours, strict=True)] == ours
        assert len(model[0]._forward_hooks) == 2  # theirs came later and stays behind
        model(torch.randn(4, 3)).sum().backward()
        probe.step()
        assert len(model[0]._forward_hooks) == 2  # with somebody else's there, ours stay
        model(torch.randn(4, 3))
        probe.step()
    assert order == ["theirs"] * 3
    assert probe.trace.layers.groupby("step").size().to_dict() == {0: 3, 2: 3}
    assert [len(m._forward_hooks) for m in model] == [1, 0, 0]


RANGES = [1.0, 1e-30, 1e-42, 0.0, 1e-42, 1e30, math.nan, 1e-18, 1e18, 0.0, math.inf, 1e-12, 1.0]


@needs_hooks
def test_a_scale_remembered_from_the_step_before_changes_no_digit():
    """Vanishing gradients are read with the scale of their last reading: right or not, the numbers are the same."""
    noise = torch.randn(9_001, generator=torch.Generator().manual_seed(2))
    kept, ways = StepBuffer(), ({"moments": False}, {"norm_only": True})
    for step, scale in enumerate(RANGES):
        x = (noise * scale).float()
        rows = []
        for buffer in (kept, StepBuffer()):
            slots = [buffer.reduce(x, **way) for way in ways] + [buffer.reduce_difference(x, torch.zeros_like(x))]
            buffer.flush(lambda found, slots=slots, rows=rows: rows.append(found[slots]))
            buffer.wait()
        assert norm_of(rows[0]).tolist() == pytest.approx(norm_of(rows[1]).tolist(), rel=0, abs=0, nan_ok=True), step
        if math.isfinite(scale):
            norm = float((x.double() * 2.0**200).norm()) / 2.0**200
            assert norm_of(rows[0]).tolist() == pytest.approx([norm] * 3, rel=1e-6, abs=0), scale
        assert (rows[0][:, 7] == (0 if math.isfinite(scale) else x.numel())).all()


@needs_hooks
def test_updates_of_every_range_one_after_the_other():
    param = nn.Parameter(torch.randn(5_003, generator=torch.Generator().manual_seed(3)))
    optimizer, buffer = torch.optim.SGD([param], lr=1.0, momentum=0.5), StepBuffer()
    noise, got, want = torch.randn(5_003, generator=torch.Generator().manual_seed(4)), [], []
    for scale in [size for size in RANGES if math.isfinite(size)]:
        param.data.mul_(0.0 if scale < 1e-20 else 1.0)  # else nothing is left of such an update
        param.grad = noise * scale
        held = [optimizer.state.get(param)]
        slots, place = np.full((2, 3), -1), np.array([1])  # the parameter is the second of two
        numbers = (1.0, 0.5, 1.0, 0.0, 1.0, False)
        assert buffer.sgd([param], held, slots.ctypes.data, place.ctypes.data, numbers) == 0
        assert (slots[0] == -1).all()
        buffer.flush(lambda rows, slots=slots: got.append(norm_of(rows[slots[1]])))
        buffer.wait()
        before = param.detach().double()
        optimizer.step()
        wide = (before, param.grad.double(), param.detach().double() - before)
        want.append([float((x * 2.0**200).norm()) / 2.0**200 for x in wide])
    assert np.array(got).ravel().tolist() == pytest.approx(np.array(want).ravel().tolist(), rel=1e-6, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norms_of_many_tensors_at_once(dtype, monkeypatch):
    """Where no kernel reads them: small ones together, and those whose squares leave the range each on its own."""
    monkeypatch.setattr(native, "kernel", lambda: None)
    noise = torch.randn(70_000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sizes = [1, 3, 1000, 70_000, 0, 17]
    ranges = [1.0, 1e-30, 0.0, 1e25, 1e-200, 1e200] if dtype is torch.float64 else [1.0, 1e-30, 0.0, 1e25, 1e-42]
    xs = [(noise[:size] * scale).to(dtype) for size in sizes for scale in ranges]
    xs += [
        torch.full((5,), math.nan, dtype=dtype),
        torch.ones(3, 4, dtype=dtype).t(),
        torch.ones((), dtype=dtype).expand(9),
    ]
    buffer, got = StepBuffer(), []
    slots = buffer.norms(xs)
    buffer.flush(lambda rows: got.append(rows[slots]))
    buffer.wait()
    tops = [float(x.double().abs().max()) if x.numel() else 0.0 for x in xs]
    want = [top * float((x.double() / top).norm()) if top else 0.0 for x, top in zip(xs, tops, strict=True)]
    assert norm_of(got[0]).tolist() == pytest.approx(want, rel=1e-6, abs=0, nan_ok=True)
    assert got[0][:, 7].tolist() == [float(x.isnan().sum()) for x in xs]


OPTIMIZERS = {"SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "Adam": lambda p: torch.optim.Adam(p, lr=0.1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", WAYS)
def test_a_net_with_one_small_parameter_trains_as_it_would(way, name, optimizer, dtype):
    """Its only parameter was once laid end to end where it lay already, and taken from itself: the weight was 0."""
    way(name)
    x, weights = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).to(dtype), []
    for watched in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(3, 1, bias=False).to(dtype)
        made = OPTIMIZERS[optimizer](model.parameters())
        if watched:
            trace = record(model, made, x)
        else:
            for _ in range(3):
                made.zero_grad()
                model(x).square().mean().backward()
                made.step()
        weights.append(model.weight.detach().clone())
    assert torch.equal(*weights)
    assert (trace.params["update_norm"] > 0).all()


@pytest.mark.parametrize("name", WAYS)
def test_zeros_without_memory_and_entries_negated_as_they_are_read(way, name):
    """torch hands out gradients that lie in no memory, and views whose memory holds the opposite."""
    way(name)
    model = nn.Linear(3, 4)
    with watch(model) as probe:
        torch.sgn(model(torch.randn(5, 3))).sum().backward()
        probe.tap(torch._neg_view(torch.full((4,), 2.0)), "negated")
        probe.step()
    layers = probe.trace.layers.set_index("layer")
    assert layers.loc["", "grad_norm"] == 0
    assert layers.loc["negated", "act_mean"] == -2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WAYS)
def test_what_was_made_under_inference_mode_serves_training_too(way, name, dtype):
    way(name)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 20_000), nn.ReLU()).to(dtype)
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(5, 3).to(dtype)
    with watch(model, optimizer, without_grad=True) as probe:
        for _ in range(2):
            with torch.inference_mode():
                model(x)
            model(x).square().mean().backward()
            optimizer.step()
    assert len(probe.trace.layers) == 16
    assert probe.trace.layers["act_norm"][:4].tolist() == probe.trace.layers["act_norm"][4:8].tolist()


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_that_is_listed_twice_is_measured(way, name):
    way(name)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD([model.weight, model.weight, model.bias], lr=0.1)
    before = model.weight.detach().clone()
    trace = record(model, optimizer, torch.randn(5, 3), steps=1)
    assert trace.params["update_norm"][0] == pytest.approx((model.weight.detach() - before).norm().item(), rel=1e-5)


def test_going_back_to_a_state_brings_no_step_of_the_run_given_up():
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    with watch(model, optimizer) as probe:
        train(3)
        state = probe.state_dict()
        train(4)
        probe.load_state_dict(state)
        train(2)
    assert probe.trace.steps["step"].tolist() == probe.trace.layers["step"].tolist() == [0, 1, 2, 3, 4]


def test_the_table_of_steps_keeps_no_steps_rows_alive():
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    with watch(model) as probe:
        for _ in range(40):
            model(x).square().mean().backward()
            probe.step()
        assert {one.rows.base is None and one.rows.size for one in probe._steps._raw} == {0}
