"""Odd models, tensors and hooks: right numbers, or one sentence, or a missing value."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from gradlab.errors import UsageError
from gradlab.probes import watch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(12)


def norm(x):
    return x.detach().norm(dtype=torch.float64 if not x.is_complex() else None).item()


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))


# -- models ---------------------------------------------------------------------------------------------------------


def test_model_without_parameters():
    x = torch.randn(3, 4, requires_grad=True)
    with watch(nn.Sequential(nn.Tanh(), nn.Flatten())) as probe:
        y = probe._model(x)
        y.sum().backward()
        probe.step()
    trace = probe.trace
    assert len(trace.params) == 0
    assert trace.layers["grad_norm"].tolist() == pytest.approx([math.sqrt(12)] * 2)
    assert math.isnan(trace.steps["grad_norm"][0])


def test_model_without_parameters_has_no_optimizer_of_its_own():
    with pytest.raises(UsageError, match="none of the model's parameters"):
        watch(nn.Tanh(), torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1))


def test_nothing_requires_grad():
    model = mlp().requires_grad_(False)
    with watch(model) as probe:
        model(torch.randn(6, 4))
        probe.step()
    trace = probe.trace
    assert len(trace.layers) == 4
    assert trace.layers["act_norm"].gt(0).all()
    assert trace.layers["grad_norm"].isna().all()
    assert trace.params["weight_norm"].notna().all()
    assert trace.params["grad_norm"].isna().all()
    assert len(trace.info["params_without_grad"]) == 6


def test_forward_without_backward_is_missing_not_zero():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as probe:
        model(torch.randn(6, 4))
        optimizer.step()
    assert probe.trace.layers["grad_norm"].isna().all()
    assert probe.trace.params["grad_norm"].isna().all()
    assert probe.trace.batchnorm["grad_gain"].isna().all()


def test_backward_twice_through_one_graph_accumulates_in_params_and_is_said_for_layers(bare_and_watched):
    want = []

    def train(start):
        model = mlp()
        with start(model) as probe:
            loss = model(torch.randn(6, 4)).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
            want[:] = [norm(p.grad) for p in model.parameters()]
            probe.step()
        return [p.grad for p in model.parameters()]

    (trace,) = bare_and_watched(train)
    np.testing.assert_allclose(trace.params["grad_norm"], want, rtol=1e-6)
    assert all("several backward passes" in trace.info["not_seen"][str(layer)] for layer in range(4))


def test_gradient_penalty(bare_and_watched):
    want = []

    def train(start):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.randn(5, 3, requires_grad=True)
        with start(model, optimizer):
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            loss = (slope.norm(dim=1) - 1).square().mean() + model(x).square().mean()
            loss.backward()
            want[:] = [norm(p.grad) for p in model.parameters()]
            optimizer.step()
        return [loss, x.grad, *model.state_dict().values()]

    (trace,) = bare_and_watched(train)
    np.testing.assert_allclose(trace.params["grad_norm"], want, rtol=1e-6)
    assert trace.info["not_seen"]  # two backward passes reached the outputs of the first call


def test_module_whose_parameters_are_replaced_or_added_on_the_way():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with watch(model) as probe:
        model[0].weight = nn.Parameter(torch.ones(3, 3))
        model.add_module("late", nn.Linear(2, 2))
        model(torch.randn(4, 3)).sum().backward()
        want = norm(model[0].weight.grad)
        probe.step()
        del model[1].bias
        model[1].bias = None
        model(torch.randn(4, 3)).sum().backward()
        probe.step()
    params = probe.trace.params.set_index(["step", "param"])
    assert params.loc[(0, "0.weight"), ["weight_norm", "grad_norm"]].tolist() == pytest.approx([3.0, want])
    assert math.isnan(params.loc[(1, "1.bias"), "weight_norm"])
    (note,) = probe.trace.info["notes"]
    assert "2 parameters were added" in note
    assert "'late.weight'" in note


# -- tensors --------------------------------------------------------------------------------------------------------


def test_complex_parameters():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))

        def forward(self, x):
            return (x @ self.weight.conj()).abs()

    model = Complex()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as probe:
        model(torch.randn(4, 3, dtype=torch.complex64)).sum().backward()
        grad, weight = norm(model.weight.grad), norm(model.weight)
        optimizer.step()
    row = probe.trace.params.iloc[0]
    assert row[["weight_norm", "grad_norm", "update_norm"]].tolist() == pytest.approx(
        [weight, grad, 0.1 * grad], rel=1e-5
    )


class Odd(nn.Module):
    """Hands on a tensor of a kind that has no real dense entries."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


ODD = {
    "quantized": lambda x: torch.quantize_per_tensor(x.detach(), 0.1, 0, torch.quint8),
    "sparse": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x.detach().to_sparse_csr(),
    "complex": lambda x: torch.complex(x, x),
    "integer": lambda x: (x * 9).long(),
    "bool": lambda x: x > 0,
    "nested": lambda x: torch.nested.nested_tensor([x[0].detach(), x[0, :2].detach()], layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|quantiz).*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantize.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_between_layers(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.odd = nn.Linear(4, 4), Odd(ODD[kind])

        def forward(self, x):
            y = self.linear(x)
            self.odd(y)
            return y

    model = Net()
    with watch(model, layers="all") as probe:
        model(torch.randn(2, 4)).sum().backward()
        probe.step()
    assert list(probe.trace.info["not_seen"]) == ["odd"]
    assert probe.trace.layers["layer"].tolist() == ["linear", ""]
    assert probe.trace.layers["grad_norm"].tolist() == pytest.approx([math.sqrt(8)] * 2)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4)], ids=str)
def test_empty_batches(bare_and_watched, shape):
    def train(start):
        model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2), nn.Tanh())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with start(model, optimizer):
            loss = model(torch.randn(shape)).sum()
            loss.backward()
            optimizer.step()
        return [loss, *model.state_dict().values()]

    (trace,) = bare_and_watched(train)
    assert trace.layers["entries"].eq(0).all()
    assert trace.layers[["act_mean", "act_std", "act_zero_fraction", "grad_zero_fraction"]].isna().all(axis=None)
    assert trace.params["grad_norm"].eq(0).all()  # a gradient that came and is 0
    assert len(trace.units) == 0


def test_meta_model_counts_and_knows_no_numbers():
    with torch.device("meta"):
        model = mlp()
        with watch(model, torch.optim.AdamW(model.parameters())) as probe:
            model(torch.empty(6, 4)).sum().backward()
            probe._updates.optimizers[0].step()
    assert len(probe.trace.layers) == 4
    assert probe.trace.params[["weight_norm", "grad_norm", "update_norm"]].isna().all(axis=None)


def test_nan_everywhere_is_counted_in_every_table(bare_and_watched):
    def train(start):
        model = mlp()
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(math.nan)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with start(model, optimizer):
            model(torch.randn(6, 4)).sum().backward()
            optimizer.step()
        return list(model.state_dict().values())

    (trace,) = bare_and_watched(train)
    assert (trace.layers["act_nonfinite"] == trace.layers["entries"]).all()
    assert trace.params["weight_norm"].isna().all()
    assert (trace.params["grad_nonfinite"] == trace.params["entries"]).sum() >= 4
    assert trace.steps["skipped"].eq(False).all()


# -- hooks of the user's --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False], ids=["registered_before", "registered_after"])
def test_a_hook_that_changes_the_output(before):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    raw = {}

    def double(module, args, output):
        raw["out"] = norm(output)
        return output * 2

    if before:
        model[0].register_forward_hook(double)
    with watch(model) as probe:
        if not before:
            model[0].register_forward_hook(double)
        model(torch.randn(4, 3)).sum().backward()
        probe.step()
    first = probe.trace.layers.iloc[0]
    passed_on = norm(model[1].weight.detach().expand(4, 2))  # dL/d(what the next layer got)
    factor = 2 if before else 1
    assert first["act_norm"] == pytest.approx(factor * raw["out"], rel=1e-6)
    assert first["grad_norm"] == pytest.approx(passed_on * 2 / factor, rel=1e-6)


def test_full_backward_hooks_of_the_users(bare_and_watched):
    def train(start):
        model, seen = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), []
        for module in model:
            module.register_full_backward_hook(lambda m, into, out: seen.append(out[0].clone()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with start(model, optimizer):
            model(torch.randn(4, 3, requires_grad=True)).square().sum().backward()
            optimizer.step()
        norms[:] = [norm(g) for g in seen[::-1]]
        return [*seen, *model.state_dict().values()]

    norms = []
    (trace,) = bare_and_watched(train)
    np.testing.assert_allclose(trace.layers["grad_norm"], norms, rtol=1e-6)
