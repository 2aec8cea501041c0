"""Each label of the zoo is true: measured by plain autograd, with no part of gradlab's probes or rules."""

from __future__ import annotations

import ast
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from gradlab.benchmarks.diagnosis import reference
from gradlab.benchmarks.diagnosis.case import Case, Job
from gradlab.benchmarks.diagnosis.labels import contradictions, named_by
from gradlab.benchmarks.diagnosis.reference import measure
from gradlab.benchmarks.diagnosis.zoo import cases, find_case
from gradlab.errors import UsageError


@pytest.fixture(autouse=True)
def one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_label_is_true(case: Case) -> None:
    assert contradictions(case, measure(case)) == ()


def test_measurement_uses_neither_probes_nor_rules() -> None:
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in modules if name and name.startswith("gradlab")} == {"gradlab.benchmarks.diagnosis.case"}


@pytest.mark.parametrize(
    ("name", "label", "axis", "claim"),
    [
        ("mlp-he-relu-8", "vanishing", "depth", "not vanishing in every step"),
        ("mlp-he-relu-8", "exploding", "depth", "not exploding in every step"),
        ("mlp-he-relu-8", "exploding", "training", "not growing by a factor of a thousand"),
        ("mlp-he-relu-8", "dead", "", "not dead"),
        ("mlp-tanh-xavier-10", "saturated", "", "not saturated"),
        ("mlp-he-relu-8", "nonfinite", "", "not NaN or Inf anywhere"),
        ("mlp-he-relu-8", "frozen", "", "not frozen where it says"),
        ("rnn-every-step", "vanishing", "time", "not vanishing in every step"),
        ("rnn-default-100", "healthy", "", "not even through time"),
        ("mlp-default-relu-20", "healthy", "", "not even through depth"),
        ("mlp-he-times-2-relu-20", "healthy", "", "not even through depth"),
        ("mlp-dead-bias-one-layer", "healthy", "", "not alive"),
        ("mlp-saturated-tanh", "healthy", "", "not steep"),
        ("nonfinite-input-later", "healthy", "", "not finite but for what a scaler skips at first"),
        ("frozen-left-out-layer", "healthy", "", "not learning everywhere"),
        ("mlp-diverging-linear", "healthy", "", "not steady"),
    ],
    ids=lambda value: str(value).replace(" ", "-") or "no-axis",
)
def test_a_false_label_is_contradicted(name: str, label: str, axis: str, claim: str) -> None:
    case = dataclasses.replace(find_case(name), label=label, axis=axis)  # type: ignore[arg-type]
    assert claim in contradictions(case, measure(case))


# -- the measurement against closed forms -----------------------------------------------------------------------------


def case_of(model: nn.Module, x: torch.Tensor, *, loss: object = None, **facts: object) -> Case:
    def build() -> Job:
        def squares(y: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            return y.square().sum()

        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        return Job(model=model, optimizer=optimizer, batches=lambda _: ((x,), x), loss=loss or squares, steps=2)  # type: ignore[arg-type]

    return Case(name="toy", family="toy", label="healthy", build=build, why="", **facts)  # type: ignore[arg-type]


def test_depth_ratio_of_an_orthogonal_chain_is_a_power_of_its_gain() -> None:
    layers = [nn.Linear(8, 8, bias=False, dtype=torch.float64) for _ in range(6)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
        layer.weight.data *= 0.3
    measured = measure(case_of(nn.Sequential(*layers), torch.randn(4, 8).double(), cuts=("0", "5")))
    assert measured.depth == pytest.approx([0.3**5] * 2, rel=1e-12)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU], ids=lambda kind: kind.__name__)
def test_the_unrolled_net_is_the_stock_net(kind: type[nn.RNNBase]) -> None:
    stock = kind(3, 5, num_layers=2, bidirectional=True, batch_first=True).double()  # type: ignore[call-arg, arg-type]
    x = torch.randn(4, 7, 3).double()
    want = stock(x)[0]
    want.square().sum().backward()
    gradients = [param.grad.clone() for param in stock.parameters() if param.grad is not None]
    stock.zero_grad()
    got = reference._Unrolled(stock)(x)[0]
    got.square().sum().backward()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    for param, gradient in zip(stock.parameters(), gradients, strict=True):
        torch.testing.assert_close(param.grad, gradient, rtol=1e-10, atol=1e-12)


def test_time_ratio_of_a_linear_rnn_is_a_power_of_its_radius() -> None:
    rnn = nn.RNN(2, 4, nonlinearity="relu", batch_first=True).double()
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(0.7 * torch.eye(4, dtype=torch.float64))
        rnn.weight_ih_l0.fill_(1.0)
        rnn.bias_ih_l0.fill_(1.0)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = rnn

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(x)[0][:, -1]

    measured = measure(case_of(Last(), torch.rand(3, 11, 2).double()))
    assert measured.time == pytest.approx([0.7**10] * 2, rel=1e-12)


def test_units_slopes_and_gradients_are_counted() -> None:
    first, second = nn.Linear(4, 10), nn.Linear(10, 1)
    with torch.no_grad():
        first.bias[:7] = -1e3
        second.weight.zero_()
        second.bias.fill_(9.0)  # beyond it a sigmoid's slope is below 1 % of the steepest
    model = nn.Sequential(first, nn.ReLU(), second, nn.Sigmoid())
    spare = nn.Linear(2, 2)
    model.register_module("spare", spare)
    model.forward = lambda x: model[3](model[2](model[1](model[0](x))))  # type: ignore[method-assign]
    measured = measure(case_of(model, torch.randn(64, 4)))
    assert measured.dead["1"] == pytest.approx(0.7)
    assert measured.flat == {"3": 1.0}
    assert measured.without_grad == ("spare.weight", "spare.bias")
    assert set(measured.unchanged) == {name for name, _ in model.named_parameters()}
    assert measured.bad_steps == ()


def test_a_gradient_alone_that_is_not_finite_is_seen() -> None:
    model = nn.Linear(2, 1)

    def root_of_zero(y: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return (y - y.detach()).abs().sqrt().sum()

    measured = measure(case_of(model, torch.ones(1, 2), loss=root_of_zero))
    assert math.isfinite(measured.losses[0])
    assert measured.bad_steps[0] == 0


def test_names_are_matched_by_module_and_parameter() -> None:
    assert named_by(["encoder"], ["encoder.3.weight"])
    assert named_by(["act*"], ["head", "act2"])
    assert not named_by(["act2"], ["act20"])


def test_an_unknown_case_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'mlp-he-relu-8'"):
        find_case("mlp-he-relu-7")
