"""Small tensors that are reduced together, against float64, whatever lies beside them in their slab."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradlab.probes import device_pool, native, pool, watch
from gradlab.probes.buffer import StepBuffer
from gradlab.probes.reduce import norm_of, statistics

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SCALES = [1.0, 1e-30, 1e-42, 0.0, 1e30, math.nan, math.inf, 1e-18, 1e18]


@pytest.fixture
def noise():
    generator = torch.Generator().manual_seed(8)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _without_kernel(monkeypatch):
    """As where nothing could be compiled."""
    monkeypatch.setattr(native, "kernel", lambda: None)
    monkeypatch.setattr(native, "hooks", lambda: None)


def fetched(buffer, slots):
    got = []
    buffer.flush(lambda rows: got.append(rows[slots]))
    buffer.wait()
    return got[0]


def want(x):
    """Statistics in long double, where every square of a float64 entry is in range."""
    y = x.double().numpy().astype(np.longdouble).ravel()
    with np.errstate(invalid="ignore", over="ignore"):
        mean = y.mean() if y.size else np.nan
        return {
            "mean": float(mean),
            "std": float(np.sqrt(np.mean((y - mean) ** 2))) if y.size else math.nan,
            "norm": float(np.sqrt(np.sum(y**2))),
            "abs_max": float(np.abs(y).max()) if y.size else math.nan,
            "zero_fraction": float(np.mean(y == 0)) if y.size else math.nan,
            "nonfinite": float(np.sum(~np.isfinite(y))),
        }


def check(xs, rows, names=("mean", "std", "norm", "abs_max", "zero_fraction", "nonfinite")):
    got = statistics(rows, np.array([x.numel() for x in xs]))
    for at, x in enumerate(xs):
        right = want(x)
        typical = right["norm"] / math.sqrt(max(x.numel(), 1))
        for name in names:
            if name == "std" and not math.isfinite(right["norm"]):
                assert not math.isfinite(got["std"][at])
                continue
            slack = {"mean": 3e-7 * typical, "std": 3e-8 * abs(right["mean"])}.get(name, 0)
            slack = slack if math.isfinite(slack) else 0
            rel = {"std": 1e-3, "norm": 2e-6, "mean": 1e-6}.get(name, 1e-12)
            assert got[name][at] == pytest.approx(right[name], rel=rel, abs=slack, nan_ok=True), (at, name, x.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_range_side_by_side_in_one_slab_and_again_in_another_order(dtype, noise):
    """What was remembered of a row's range must not matter where another tensor takes its place."""
    buffer = StepBuffer()
    xs = [(noise(40) * scale).to(dtype) for scale in SCALES]
    xs += [(noise(40) + 1e4).to(dtype), torch.full((40,), 0.1, dtype=dtype)]
    with_zeros = noise(40).to(dtype)
    with_zeros[3:20] = 0
    xs.append(with_zeros)
    for order in (xs, xs, xs[::-1], xs[3:] + xs[:3]):
        slots = [buffer.reduce(x) for x in order]
        assert slots == list(range(len(xs)))
        check(order, fetched(buffer, slots))
        slots = [buffer.reduce(x, moments=False) for x in order]
        check(order, fetched(buffer, slots), ("norm", "abs_max", "zero_fraction", "nonfinite"))
        slots = [buffer.reduce(x, norm_only=True) for x in order]
        check(order, fetched(buffer, slots), ("norm", "nonfinite"))


def test_a_range_that_comes_back_is_read_with_the_power_remembered(noise, monkeypatch):
    buffer, x = StepBuffer(), (noise(50) * 1e-30).float()
    for _ in range(2):
        check([x], fetched(buffer, [buffer.reduce(x)]))
    (slab,) = buffer._pool._slabs.values()
    assert slab.by[0, 0] > 1e29
    monkeypatch.setattr(pool._HostSlab, "again", lambda *_: pytest.fail("read again"))
    check([x], fetched(buffer, [buffer.reduce(x)]))


def test_mixed_sizes_dtypes_and_layouts(noise):
    wide = noise(3, 4, 5, 6)
    xs = [x for dtype in DTYPES for x in (wide.to(dtype), wide.to(dtype).to(memory_format=torch.channels_last))]
    xs += [
        noise(6, 4).float().t(),
        noise(1).float().expand(9),
        torch.tensor(-2.5),
        torch.empty(0, 3),
        noise(7, 8)[:, ::3],
    ]
    xs += [noise(3).float(), noise(2, 40_000).float()]
    buffer = StepBuffer()
    check(xs, fetched(buffer, [buffer.reduce(x) for x in xs]))


def test_a_slab_that_fills_up_in_the_middle_of_a_step(noise, monkeypatch):
    monkeypatch.setattr(pool, "_MOST_ROWS", 4)
    buffer = StepBuffer()
    for _ in range(2):
        xs = [(noise(20) * 10.0 ** (-3 * k)).float() for k in range(11)] + [noise(21).float()]
        check(xs, fetched(buffer, [buffer.reduce(x) for x in xs]))


def test_what_is_changed_in_place_later_is_recorded_as_it_was(noise):
    buffer, x = StepBuffer(), noise(30).float()
    before = x.clone()
    slot = buffer.reduce_shared(x)
    x.mul_(3)
    again = buffer.reduce_shared(x)
    check([before, x], fetched(buffer, [slot, again]))


def test_rows_of_a_step_that_is_given_up_do_not_come_back(noise):
    buffer, x = StepBuffer(), noise(30).float()
    buffer.reduce(noise(30).float())
    buffer.discard()
    check([x], fetched(buffer, [buffer.reduce(x)]))


def test_memory_of_sizes_that_are_gone_is_let_go(noise):
    buffer = StepBuffer()
    for size in range(1, 50):
        buffer.reduce(noise(size))
        buffer.flush(lambda _: None)
        buffer.wait()
        assert len(buffer._pool._slabs) <= 2


@pytest.mark.parametrize("together", [1, 7], ids=["singly", "seven at once"])
@pytest.mark.parametrize("how", [pool.ALL, pool.NORM], ids=["all", "norm"])
@pytest.mark.parametrize("limit", [1 << 16, 10], ids=["copied", "put aside"])
def test_an_accelerators_pool(noise, limit, how, together, monkeypatch):
    """On the CPU, where its numbers can be looked at."""
    monkeypatch.setattr(device_pool, "_DEVICE_ENTRIES", limit)
    monkeypatch.setattr(pool, "_MOST_ROWS", 3)
    there = {}
    found = device_pool.DevicePool(lambda slots, given: there.update(zip(slots, given.double().numpy(), strict=True)))
    xs = [(noise(4, 25) * scale).to(dtype) for dtype in DTYPES for scale in SCALES]
    xs += [torch.empty(0), noise(3).float(), noise(40, 5).t().half(), torch.full((100,), 0.1, dtype=torch.float64)]
    for _ in range(2):  # the second time slabs have the rows that the first one needed
        there.clear()
        for start in range(0, len(xs), together):
            slots = list(range(len(xs)))[start : start + together]
            found.add([xs[slot] for slot in slots], slots, how)
        found.drain()
        assert sorted(there) == list(range(len(xs)))
        rows = np.array([there[slot] for slot in range(len(xs))])
        asked = ("norm", "nonfinite") if how == pool.NORM else ("norm", "abs_max", "zero_fraction", "nonfinite", "mean")
        check(xs, rows, asked)


def test_slabs_have_the_rows_that_the_step_before_needed(noise, monkeypatch):
    monkeypatch.setattr(pool, "_FEW_ROWS", 2)
    buffer, xs = StepBuffer(), [noise(30).float() for _ in range(11)]
    for wanted in (2, 11, 11):
        slots = [buffer.reduce(x) for x in xs]
        (slab,) = buffer._pool._slabs.values()
        assert slab.capacity == wanted
        check(xs, fetched(buffer, slots), ("norm", "mean", "std"))


class Launches(TorchDispatchMode):
    """Counts operations that are launched on a device; views are not."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += not op.is_view
        return op(*args, **(kwargs or {}))


def test_on_an_accelerator_a_step_takes_few_launches_more():
    model = nn.Sequential(*[part for _ in range(16) for part in (nn.Linear(64, 64), nn.ReLU())]).to("meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.empty(32, 64, device="meta")

    def launches():
        with Launches() as mode:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        return mode.count

    launches()
    bare = launches()
    with watch(model, optimizer):
        for _ in range(3):
            launches()
        more = launches() - bare
    # One a tensor (32 outputs, 32 gradients), one copy of each of 32 parameters, two for each of 16 rectifiers' units,
    # and what is left for each of few sizes together.
    assert more < 64 + 32 + 32 + 150


@pytest.mark.parametrize("size", [4, 400], ids=["copied", "put aside"])
def test_on_an_accelerator_nothing_waits_for_it(size, monkeypatch):
    monkeypatch.setattr(device_pool, "_DEVICE_ENTRIES", 100)
    monkeypatch.setattr(pool, "_MOST_ROWS", 3)
    model = nn.Sequential(*(nn.Linear(size, size) for _ in range(5)), nn.ReLU()).to("meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with watch(model, optimizer) as probe:
        for _ in range(2):
            model(torch.empty(2, size, device="meta")).sum().backward()
            optimizer.step()
    assert len(probe.trace.layers) == 12


@pytest.mark.parametrize("momentum", [0.0, 0.9], ids=str)
def test_parameters_laid_end_to_end_are_measured_right(momentum, noise):
    model = nn.Sequential(
        nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(200, 200), nn.Linear(7, 3)
    )
    del model[4]  # beside small ones
    model.insert(0, nn.Linear(150, 5))
    big = nn.Parameter(noise(200, 150).float())
    model.register_parameter("big", big)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=momentum)
    wanted = []
    with watch(model, optimizer) as probe:
        for scale in (1.0, 1e-30, 1.0):
            optimizer.zero_grad()
            x = noise(4, 150).float()
            (model(x).square().mean() * scale + scale * (x @ big.t()).square().mean()).backward()
            before = [(name, p.detach().double().clone(), p.grad.double()) for name, p in model.named_parameters()]
            optimizer.step()
            for (name, old, grad), new in zip(before, model.parameters(), strict=True):
                update = (new.detach().float() - old.float()).double()
                wanted.append((name, *(float((y * 2.0**300).norm()) / 2.0**300 for y in (old, grad, update))))
    got = probe.trace.params[["param", "weight_norm", "grad_norm", "update_norm"]]
    assert got["param"].tolist() == [name for name, *_ in wanted]
    for at, column in enumerate(("weight_norm", "grad_norm", "update_norm"), 1):
        assert got[column].tolist() == pytest.approx([row[at] for row in wanted], rel=3e-6, abs=0), column


def test_a_parameter_that_is_gone_after_the_update_has_none_and_the_others_have():
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as probe:
        handle = optimizer.register_step_pre_hook(lambda *_: setattr(model, "bias", None))
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        handle.remove()
    frame = probe.trace.params.set_index("param")
    assert math.isnan(frame.loc["bias", "update_norm"])
    assert frame.loc["weight", "update_norm"] == pytest.approx(0.3)


def test_units_told_from_the_slabs_are_those_of_each_output(monkeypatch, noise):
    monkeypatch.setattr(pool, "_MOST_ROWS", 3)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Unflatten(1, (3, 2, 1)), nn.ReLU())
    tops = [torch.full((6,), -1.0), torch.full((6,), -1.0)]
    with torch.no_grad(), watch(model, without_grad=True) as probe:
        model[0].bias.copy_(torch.tensor([-90.0, 0, 0, 0, -90, 0]))
        model[2].bias.copy_(torch.tensor([0.0, 0, -90, 0, 0, 0]))
        for _ in range(7):
            x = noise(4, 6).float()
            for at, place in enumerate((1, 3)):
                tops[at] = torch.maximum(tops[at], model[: place + 1].float().forward(x).amax(0))
            model(x)
            probe.step()
    dead = probe.trace.units.set_index("layer")["dead_fraction"]
    assert dead["1"] == pytest.approx(float((tops[0] <= 0).double().mean()))
    assert dead["3"] == pytest.approx(float((tops[1] <= 0).double().mean()))
    assert dead["1"] >= 2 / 6
    assert dead["5"] == pytest.approx(float((tops[1].view(3, 2).amax(1) <= 0).double().mean()))


def test_norms_of_rows_are_those_of_the_tensors(noise):
    xs = [noise(9).float(), (noise(9) * 1e25).float()]
    buffer = StepBuffer()
    assert norm_of(fetched(buffer, [buffer.reduce(x, norm_only=True) for x in xs])).tolist() == pytest.approx(
        [float(x.double().norm()) for x in xs], rel=1e-6
    )
