"""A trace as scalars by step: every number once, missing ones left out, NaN and Inf kept."""

import math

import pandas as pd
import pytest
import torch
from torch import nn

import gradlab as gl
from gradlab.errors import UsageError
from gradlab.integrations.scalars import SCALARS, Scalar, by_step, last_step, scalars
from gradlab.trace import SCHEMA, Trace


def trained(steps=3, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gl.watch(model, optimizer, **options) as probe:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 3)).square().mean()
            loss.backward()
            probe.log(loss=loss)
            optimizer.step()
    return probe.trace


def test_every_number_of_a_trace_stands_under_its_tag_and_step():
    trace = trained()
    found = {(row.tag, row.step): row.value for row in scalars(trace)}
    wanted = {}
    for row in trace.steps.to_dict("records"):
        wanted |= {(f"steps/{name}", row["step"]): float(row[name]) for name in SCALARS["steps"]}
    for table, key in (("layers", "layer"), ("params", "param"), ("batchnorm", "layer"), ("units", "layer")):
        for row in trace.tables[table].to_dict("records"):
            for name in SCALARS[table]:
                wanted[f"{table}.{name}/{row[key]}", row.get("step", 2)] = float(row[name])
    wanted = {place: value for place, value in wanted.items() if not math.isnan(value)}
    assert len(wanted) > 100
    assert found == wanted


def test_scalars_come_in_the_order_of_steps_and_each_once():
    rows = scalars(trained())
    assert [row.step for row in rows] == sorted(row.step for row in rows)
    assert len({(row.tag, row.step) for row in rows}) == len(rows)
    steps = list(by_step(rows))
    assert [step for step, _ in steps] == [0, 1, 2]
    assert sum(len(values) for _, values in steps) == len(rows)


def test_after_gives_what_is_new():
    trace = trained(steps=4)
    parts = scalars(trace, after=-1), scalars(trace, after=1), scalars(trace, after=last_step(trace))
    assert [row for row in parts[0] if row.step > 1] == parts[1]
    assert {row.step for row in parts[1]} == {2, 3}
    assert parts[2] == []


def test_a_missing_value_is_no_scalar_and_a_measured_nan_is_one():
    layers = pd.DataFrame({
        "step": [0, 1, 2], "layer": "a", "act_nonfinite": 0.0,
        "grad_norm": [math.nan, math.nan, math.inf], "grad_nonfinite": [math.nan, 2.0, 1.0],
    })  # fmt: skip
    rows = scalars(Trace({"layers": layers}), {"layers": ["grad_norm", "act_std", "grad_nonfinite"]})
    shown = [(row.tag, row.step, str(row.value)) for row in rows]
    assert shown == [
        ("layers.grad_norm/a", 1, "nan"),
        ("layers.grad_nonfinite/a", 1, "2.0"),
        ("layers.grad_norm/a", 2, "inf"),
        ("layers.grad_nonfinite/a", 2, "1.0"),
    ]


@pytest.mark.parametrize(
    ("losses", "shown"),
    [([math.nan] * 3, []), ([1.0, math.nan, math.inf], ["1.0", "nan", "inf"])],
    ids=["none-was-given", "it-became-nan"],
)
def test_a_loss_that_became_nan_is_kept(losses, shown):
    rows = scalars(Trace({"steps": pd.DataFrame({"step": [0, 1, 2], "loss": losses})}), {"steps": ["loss"]})
    assert [str(row.value) for row in rows] == shown


def test_a_real_gradient_of_nan_is_shown():
    model = nn.Linear(2, 1)
    with gl.watch(model) as probe:
        model(torch.tensor([[1.0, math.nan]])).sum().backward()
        probe.step()
    rows = {row.tag: row.value for row in scalars(probe.trace)}
    assert math.isnan(rows["params.grad_norm/weight"])
    assert rows["params.grad_nonfinite/weight"] == 1
    assert math.isnan(rows["layers.act_std/model"])  # the watched model itself has the empty path


def test_calls_and_outputs_have_curves_of_their_own():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.lstm = nn.Linear(3, 3), nn.LSTM(3, 2)

        def forward(self, x):
            return self.lstm(self.linear(self.linear(x)))[0].sum()

    model = Twice()
    with gl.watch(model, timesteps=True) as probe:
        model(torch.randn(4, 2, 3)).backward()
        probe.step()
    tags = [row.tag for row in scalars(probe.trace, {"layers": ["act_std"], "timesteps": ["grad_norm"]})]
    assert tags[:5] == [
        "layers.act_std/linear",
        "layers.act_std/linear call1",
        "layers.act_std/lstm output.0",
        "layers.act_std/lstm output.1.0",
        "layers.act_std/lstm output.1.1",
    ]
    assert "timesteps.grad_norm/lstm forward h t3" in tags
    assert len(set(tags)) == len(tags)


def test_two_curves_never_share_a_tag():
    layers = pd.DataFrame({"step": 0, "layer": ["a", "a", "a call1"], "call": [0, 1, 0], "grad_norm": [1.0, 2.0, 3.0]})
    rows = scalars(Trace({"layers": layers}), {"layers": ["grad_norm"]})
    assert [(row.tag.partition("/")[2], row.value) for row in rows] == [("a", 1.0), ("a call1", 2.0), ("a call1+", 3.0)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"layer": ["grad_norm"]}, "Unknown table 'layer'. Did you mean 'layers'?"),
        ({"layers": ["gradnorm"]}, "Unknown column of layers 'gradnorm'. Did you mean 'grad_norm'?"),
        ({"layers": ["kind"]}, "Unknown column of layers 'kind'."),
        ({"layers": "grad_norm"}, "put it in []"),
    ],
    ids=["table", "column", "text-column", "one-text"],
)
def test_what_a_trace_has_not_is_refused(columns, message):
    with pytest.raises(UsageError) as refused:
        scalars(Trace(), columns)
    assert message in str(refused.value)


def test_a_merged_trace_is_refused():
    merged = Trace.merge([trained(1), trained(1)], [{"seed": 0}, {"seed": 1}])
    with pytest.raises(UsageError, match="merged from 2 runs"):
        scalars(merged)


def test_the_default_columns_exist_and_an_empty_trace_has_no_scalars():
    assert all(set(names) <= set(SCHEMA[table]) for table, names in SCALARS.items())
    assert scalars(Trace()) == []
    assert Scalar("a", 1.0, 0) == ("a", 1.0, 0)
