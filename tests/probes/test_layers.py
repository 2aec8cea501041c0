"""What the layers table holds, against closed form and naive autograd."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from gradlab.errors import UsageError
from gradlab.probes import watch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(5)


def one_step(model, x, loss_of=lambda y: y.square().sum(), **options):
    with watch(model, **options) as probe:
        loss_of(model(x)).backward()
        probe.step()
    return probe.trace


def by_layer(trace):
    assert not trace.layers["layer"].duplicated().any()
    return trace.layers.set_index("layer")


@pytest.mark.parametrize("gain", [0.5, 1.0, 2.0])
def test_deep_linear_net_in_closed_form(gain):
    depth, width = 60, 6
    layers = [nn.Linear(width, width, bias=False, dtype=torch.float64) for _ in range(depth)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain)
    model = nn.Sequential(*layers)
    x = torch.randn(5, width, dtype=torch.float64)
    trace = one_step(model, x, lambda y: y.square().sum() / 2)
    places = np.arange(1, depth + 1)
    start = x.norm().item()
    np.testing.assert_allclose(trace.layers["act_norm"], start * gain**places, rtol=1e-9)
    # dL/dy_L = y_L, and each layer takes the gradient back with the same gain.
    np.testing.assert_allclose(
        trace.layers["grad_norm"], start * gain**depth * gain ** (1.0 * depth - places), rtol=1e-9
    )


def test_float32_gradients_far_below_where_squares_underflow():
    layers = [nn.Linear(4, 4, bias=False) for _ in range(60)]
    for layer in layers:
        layer.weight.data = 0.25 * torch.eye(4)
    trace = one_step(nn.Sequential(*layers), torch.ones(1, 4), lambda y: y.sum())
    np.testing.assert_allclose(trace.layers["grad_norm"], 2 * 0.25 ** (60.0 - np.arange(1, 61)), rtol=1e-6)


class InPlace(nn.Module):
    """In-place operations right after outputs that are recorded."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.flatten, self.head = nn.Flatten(), nn.Linear(4 * 36, 3)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(x))
        out += x
        out = self.relu(out) * 2 - 1
        return self.head(functional.relu_(self.flatten(out)))  # in place on a view


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


NETS = {"mlp": (mlp, (7, 6)), "in_place": (InPlace, (5, 3, 6, 6))}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_against_retained_gradients(net, dtype):
    make, shape = NETS[net]
    model, x = make().to(dtype), torch.randn(shape, dtype=dtype)

    # Naive reference: a copy of each output before anything is done to it in place, and a clone of its gradient.
    want, seen = {}, []

    def keep(name):
        def hook(module, args, output):
            record = {"act": output.detach().double().clone()}
            calls = want.setdefault(name, [])
            calls.append(record)
            seen.append((name, len(calls) - 1))
            output.register_hook(lambda grad: record.update(grad=grad.double().clone()))

        return hook

    state = {key: value.clone() for key, value in model.state_dict().items()}
    handles = [m.register_forward_hook(keep(n)) for n, m in model.named_modules() if not list(m.children())]
    model(x).square().sum().backward()
    for handle in handles:
        handle.remove()
    model.load_state_dict(state)

    frame = one_step(model, x).layers
    assert list(zip(frame["layer"], frame["call"], strict=True)) == seen
    assert frame["order"].tolist() == list(range(len(seen)))
    for _, row in frame.iterrows():
        record = want[row["layer"]][row["call"]]
        assert row["entries"] == record["act"].numel()
        for side in ("act", "grad"):
            value = record.get(side)
            if value is None:  # torch drops the node of a view that an in-place operation rewrites: no hook sees it
                assert row["layer"] == "flatten"
                assert math.isnan(row["grad_norm"])
                continue
            assert row[f"{side}_norm"] == pytest.approx(value.norm().item(), rel=1e-5)
            assert row[f"{side}_abs_max"] == pytest.approx(value.abs().max().item(), rel=1e-12)
            assert row[f"{side}_zero_fraction"] == (value == 0).double().mean().item()
            assert row[f"{side}_nonfinite"] == 0
        assert row["act_mean"] == pytest.approx(record["act"].mean().item(), rel=1e-4, abs=1e-6)
        assert row["act_std"] == pytest.approx(record["act"].std(correction=0).item(), rel=1e-4)


def test_gradients_after_in_place_operations_equal_those_without():
    torch.manual_seed(0)
    model = InPlace()
    x = torch.randn(5, 3, 6, 6)
    in_place = by_call(one_step(model, x))
    torch.manual_seed(0)
    clean = InPlace()
    clean.relu = nn.ReLU()

    def forward(x):
        x = clean.relu(clean.bn1(clean.conv1(x)))
        out = clean.relu(clean.bn2(clean.conv2(x)) + x)
        return clean.head(functional.relu(clean.flatten(out * 2 - 1)))

    clean.forward = forward
    want = by_call(one_step(clean, x))
    assert in_place.index.tolist() == want.index.tolist()
    assert math.isnan(in_place.loc[("flatten", 0), "grad_norm"])  # unknown to torch, so missing and not 0
    in_place, want = in_place.drop(index="flatten", level="layer"), want.drop(index="flatten", level="layer")
    for column in ("act_norm", "act_zero_fraction", "grad_norm", "grad_zero_fraction"):
        np.testing.assert_allclose(in_place[column], want[column], rtol=1e-5)
    assert in_place.loc[("bn1", 0), "act_zero_fraction"] == 0  # before the ReLU that overwrote it


def by_call(trace):
    return trace.layers.set_index(["layer", "call"])


def test_order_is_that_of_execution():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(4, 2), nn.Linear(3, 4)

        def forward(self, x):
            return self.last(self.first(x))

    trace = one_step(Backwards(), torch.ones(2, 3))
    assert trace.layers["layer"].tolist() == ["first", "last"]
    assert trace.layers["order"].tolist() == [0, 1]


def test_each_call_of_a_shared_module_has_its_row():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh())
    x = torch.randn(3, 4)
    rows = by_call(one_step(model, x))
    assert rows.index.tolist() == [("0", 0), ("1", 0), ("0", 1), ("3", 0)]
    first = shared(x)
    second = shared(first.tanh())
    first.retain_grad()
    second.retain_grad()
    second.tanh().square().sum().backward()
    assert rows.loc[("0", 0), "grad_norm"] == pytest.approx(first.grad.norm().item(), rel=1e-5)
    assert rows.loc[("0", 1), "grad_norm"] == pytest.approx(second.grad.norm().item(), rel=1e-5)


def test_gradient_accumulation_gives_a_call_each_and_starts_anew_with_the_step():
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as probe:
        for _ in range(2):
            for _ in range(3):
                model(torch.randn(2, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert probe.trace.layers[["step", "call"]].values.tolist() == [[s, c] for s in (0, 1) for c in (0, 1, 2)]


def test_unused_module_is_listed_and_has_no_row():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    trace = one_step(Unused(), torch.ones(1, 3))
    assert trace.never_ran == ("unused",)
    assert trace.layers["layer"].tolist() == ["used"]


def test_tap():
    model = nn.Linear(3, 4)
    x = torch.randn(2, 3)
    with watch(model) as probe:
        y = probe.tap(functional.relu(model(x)), "relu")
        z = probe.tap(y * 3, "relu")
        probe.tap(torch.arange(3), "integers")
        z.sum().backward()
        probe.step()
        with pytest.raises(UsageError, match="watched module"):
            probe.tap(x, "")
    rows = probe.trace.layers.iloc[1:]
    assert rows[["layer", "call", "kind"]].values.tolist() == [["relu", 0, "tap"], ["relu", 1, "tap"]]
    assert rows["grad_norm"].tolist() == pytest.approx([3 * math.sqrt(8), math.sqrt(8)])
    assert list(probe.trace.info["not_seen"]) == ["integers"]


def test_evaluation_between_steps_is_counted_not_recorded():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as probe:
        for _ in range(2):
            model(torch.randn(3, 6)).sum().backward()
            optimizer.step()
            with torch.no_grad():
                model(torch.randn(50, 6))
            with torch.inference_mode():
                model(torch.randn(50, 6))
    assert len(probe.trace.layers) == 10
    assert probe.trace.info["calls_without_grad"] == 20


def test_without_grad_records_them():
    model = mlp()
    with watch(model, without_grad=True) as probe:
        with torch.no_grad():
            model(torch.randn(3, 6))
        with torch.inference_mode():
            model(torch.randn(3, 6))
        probe.step()
    assert len(probe.trace.layers) == 10
    assert probe.trace.layers["grad_norm"].isna().all()
    assert probe.trace.layers["act_norm"].gt(0).all()
    assert probe.trace.units["layer"].tolist() == ["1", "3"]
    assert probe.trace.info["calls_without_grad"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_nonfinite_values_are_counted_and_kept(value):
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 2))
    x = torch.ones(4, 3)
    x[1, 2] = value
    rows = by_layer(one_step(model, x.requires_grad_()))
    assert rows.loc["0", "act_nonfinite"] == 1
    assert rows.loc["1", "act_nonfinite"] == 2  # one sample, both units
    assert rows.loc["1", "grad_nonfinite"] == 2
    assert not math.isfinite(rows.loc["1", "grad_norm"])
    assert len(rows) == 2


def test_gradients_that_are_all_nan():
    rows = by_layer(one_step(mlp(), torch.randn(3, 6), lambda y: (y * math.nan).sum()))
    assert rows["grad_norm"].isna().all()
    assert rows["grad_nonfinite"].tolist()[2:] == rows["entries"].tolist()[2:]
    assert 0 < rows["grad_nonfinite"].iloc[0] < 24  # an off ReLU passes 0 on, whatever comes


def test_frozen_part_has_missing_gradients_not_zero():
    model = mlp()
    model[0].requires_grad_(False)
    rows = by_layer(one_step(model, torch.randn(3, 6)))
    assert rows["grad_norm"].isna().tolist() == [True, True, False, False, False]
    for column in ("grad_abs_max", "grad_zero_fraction", "grad_nonfinite"):
        assert rows[column].isna().tolist() == [True, True, False, False, False]


def test_detached_branch_has_missing_gradients_and_a_zero_gradient_is_zero():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with watch(model) as probe:
        (model[0](torch.ones(1, 2)).sum() * 0 + model[1](torch.ones(1, 2)).detach().sum()).backward()
        probe.step()
    rows = by_layer(probe.trace)
    assert rows.loc["0", "grad_norm"] == 0
    assert math.isnan(rows.loc["1", "grad_norm"])


def test_backward_after_its_step_is_ignored():
    model = nn.Linear(2, 2)
    with watch(model) as probe:
        late = model(torch.ones(1, 2)).sum()
        probe.step()
        model(torch.ones(1, 2)).sum().backward()
        late.backward()
        probe.step()
        late = model(torch.ones(1, 2)).sum()
    late.backward()
    grads = probe.trace.layers["grad_norm"].tolist()
    assert math.isnan(grads[0])
    assert grads[1] == pytest.approx(math.sqrt(2))
    assert len(grads) == 2


def test_two_backward_passes_through_one_output_are_owned_up_to():
    model = nn.Linear(2, 2)
    with watch(model) as probe:
        y = model(torch.ones(1, 2))
        y.sum().backward(retain_graph=True)
        (3 * y).sum().backward()
        probe.step()
    assert probe.trace.layers["grad_norm"][0] == pytest.approx(3 * math.sqrt(2))
    assert "backward passes" in probe.trace.info["not_seen"][""]


def test_module_that_hands_out_its_parameter_leaves_no_hook_on_it():
    class Position(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(3))

        def forward(self):
            return self.table

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.position, self.linear = Position(), nn.Linear(3, 1)

        def forward(self, x):
            return self.linear(x + self.position())

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer) as probe:
        for _ in range(3):
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert not model.position.table._backward_hooks
        model(torch.ones(2, 3))
    assert not model.position.table._backward_hooks
    assert probe.trace.layers.query("layer == 'position'")["grad_norm"].notna().all()


def test_batches_of_many_sizes_share_their_keys():
    model = mlp()
    with watch(model) as probe:
        for size in range(1, 30):
            model(torch.randn(size, 6)).sum().backward()
            probe.step()
        assert len(probe._layers._log._interned) == 1
    assert probe.trace.layers.query("layer == '0'")["entries"].tolist() == [8 * size for size in range(1, 30)]


def test_a_tensor_two_probes_look_at_is_read_once():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Identity())
    with watch(model) as probe:
        model(torch.randn(5, 3))
        assert probe._buffer.rows.slots == 3  # two tensors, and the state of the BatchNorm layer
