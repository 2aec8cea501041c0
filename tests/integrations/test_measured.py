"""A NaN that was measured is told from a value that is missing."""

import math

import pandas as pd
import pytest
import torch
from torch import nn

import gradlab as gl
from gradlab.integrations.measured import measured
from gradlab.trace import Trace


def train(losses_of, *, rates=(0.1,), steps=3, log=True):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gl.watch(model, optimizer) as probe:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rates[min(step, len(rates) - 1)]
            optimizer.zero_grad()
            loss = losses_of(model(torch.ones(4, 2)), step)
            loss.backward()
            if log:
                probe.log(loss=loss)
            optimizer.step()
    return probe.trace


def test_a_nan_loss_makes_every_norm_of_its_step_nan_and_all_are_measured():
    trace = train(lambda y, step: y.mean() * (math.nan if step == 1 else 1.0))
    for table, column in [
        ("steps", "loss"),
        ("steps", "grad_norm"),
        ("params", "grad_norm"),
        ("params", "update_norm"),
    ]:
        rows = trace.tables[table]
        assert math.isnan(rows.loc[rows["step"] == 1, column].iloc[0]), (table, column)
        assert measured(trace, table, column).all(), (table, column)
    assert measured(trace, "params", "weight_norm").all()  # NaN from step 2 on
    assert trace.params["weight_norm"].isna().any()


def test_a_nan_learning_rate_shows_in_the_update_though_the_gradient_is_finite():
    trace = train(lambda y, _: y.mean(), rates=(0.1, math.nan), steps=2)
    assert (trace.params["grad_nonfinite"] == 0).all()
    assert trace.params["update_norm"].isna().any()
    assert measured(trace, "params", "update_norm").all()


def test_what_was_never_told_is_missing():
    trace = train(lambda y, _: y.mean(), log=False)
    assert not measured(trace, "steps", "loss").any()
    assert not measured(trace, "steps", "clip_coefficient").any()
    assert not measured(trace, "params", "grad_norm_unclipped").any()


def test_the_update_of_a_step_without_update_is_missing():
    skipped = Trace({
        "steps": pd.DataFrame({"step": [0, 1, 2], "skipped": [False, True, False]}),
        "params": pd.DataFrame({
            "step": [0, 1, 2], "param": "w", "grad_nonfinite": [0.0, 5.0, 0.0],
            "update_norm": [1.0, math.nan, math.nan], "weight_norm": [1.0, 1.0, 1.0],
        }),
    })  # fmt: skip
    assert measured(skipped, "params", "update_norm").tolist() == [True, False, True]
    unfinished = Trace(skipped.tables, {"last_step_closed": False})
    assert measured(unfinished, "params", "update_norm").tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("nonfinite", "expected"), [(0.0, False), (math.nan, False), (2.0, True)], ids=["none", "not-counted", "counted"]
)
def test_a_layers_nan_is_measured_where_its_entries_were_counted(nonfinite, expected):
    layers = pd.DataFrame({"step": [0], "layer": "a", "grad_norm": [math.nan], "grad_nonfinite": [nonfinite]})
    assert measured(Trace({"layers": layers}), "layers", "grad_norm").tolist() == [expected]


def test_infinity_is_always_measured():
    frame = pd.DataFrame({"step": [0], "layer": "a", "grad_gain": [math.inf]})
    assert measured(Trace({"batchnorm": frame}), "batchnorm", "grad_gain").tolist() == [True]
