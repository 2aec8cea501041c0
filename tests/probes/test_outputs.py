"""Outputs that are not one tensor, and outputs that cannot be recorded."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from gradlab.probes import watch
from gradlab.probes.hooks import tensors_in


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(5)


def one_step(model, x, loss_of=lambda y: y.square().sum(), **options):
    with watch(model, **options) as probe:
        loss_of(model(x)).backward()
        probe.step()
    return probe.trace


@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple
    note: str = "text"


class Many(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        y, z = x * 2, x * 3
        return {
            "tuple": (y, None, z),
            "list": [y, [z]],
            "dict": {"a": y, "b": {"c": z, "d": None}},
            "dataclass": Output(y, (z, None)),
            "integers_too": (y, torch.arange(3), z),
        }[self.form]


@pytest.mark.parametrize(
    ("form", "paths"),
    [
        ("tuple", ["0", "2"]),
        ("list", ["0", "1.0"]),
        ("dict", ["a", "b.c"]),
        ("dataclass", ["logits", "hidden.0"]),
        ("integers_too", ["0", "2"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_outputs_of_several_tensors(form, paths):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.many = Many(form)

        def forward(self, x):
            a, b = [t for _, t in tensors_in(self.many(x)) if t.is_floating_point()]
            return a.sum() + 10 * b.sum()

    rows = one_step(Wrapper(), torch.ones(4, requires_grad=True), lambda y: y).layers
    assert rows["output"].tolist() == paths
    assert rows["call"].tolist() == [0, 0]
    assert rows["act_norm"].tolist() == pytest.approx([4.0, 6.0])
    assert rows["grad_norm"].tolist() == pytest.approx([2.0, 20.0])


def test_lstm_outputs_and_states():
    model = nn.LSTM(3, 4, num_layers=2, batch_first=True)
    x = torch.randn(2, 5, 3)
    rows = one_step(model, x, lambda out: out[0].square().sum() + out[1][1].sum()).layers.set_index("output")
    assert rows.index.tolist() == ["0", "1.0", "1.1"]
    out, (_, c) = model(x)
    assert rows.loc["0", "act_norm"] == pytest.approx(out.norm().item(), rel=1e-6)
    assert rows.loc["0", "grad_norm"] == pytest.approx((2 * out).norm().item(), rel=1e-6)
    assert rows.loc["1.1", "grad_norm"] == pytest.approx(math.sqrt(c.numel()))
    assert math.isnan(rows.loc["1.0", "grad_norm"])  # no gradient is not a gradient of 0


class Odd(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return {
            "integers": lambda: x.argmax(-1),
            "text": lambda: "text",
            "complex": lambda: torch.complex(x, x),
            "sparse": lambda: x.detach().to_sparse(),
            "float8": lambda: x.detach().to(torch.float8_e4m3fn),
        }[self.value]()


@pytest.mark.parametrize("value", ["integers", "text", "complex", "sparse", "float8"])
def test_what_cannot_be_recorded_is_listed(value):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.odd = nn.Linear(3, 3), Odd(value)

        def forward(self, x):
            y = self.linear(x)
            self.odd(y)
            return y

    trace = one_step(Net(), torch.ones(1, 3))
    assert list(trace.info["not_seen"]) == ["odd"]
    assert trace.layers["layer"].tolist() == ["linear"]
    assert trace.never_ran == ()  # it ran
