"""Which modules and which steps are recorded."""

import numpy as np
import pytest
import torch
from torch import nn

from gradlab.errors import UsageError
from gradlab.probes import log_spaced, watch
from gradlab.probes.schedule import as_schedule


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def nested():
    return nn.ModuleDict({"stem": mlp(), "body": nn.Sequential(nn.Linear(2, 2), nn.ReLU())})


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        (None, ["stem.0", "stem.1", "stem.2", "stem.3", "stem.4", "body.0", "body.1"]),
        ("body.*", ["body.0", "body.1"]),
        (["stem.0", "body.[1]"], ["stem.0", "body.1"]),
        (lambda name, module: isinstance(module, nn.Tanh), ["stem.3"]),
        ("all", ["", "stem", "stem.0", "stem.1", "stem.2", "stem.3", "stem.4", "body", "body.0", "body.1"]),
    ],
    ids=["default", "glob", "list", "predicate", "all"],
)
def test_selection(layers, chosen):
    with watch(nested(), layers=layers) as probe:
        pass
    assert [name for name, _ in probe.trace.info["layers"]] == chosen


def test_module_with_own_parameters_and_children_is_watched():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.ones(1)), nn.Linear(2, 2)

        def forward(self, x):
            return self.inner(x) * self.scale

    model = nn.Sequential(Scaled())
    with watch(model) as probe:
        model(torch.ones(1, 2))
        probe.step()
    assert probe.trace.layers["layer"].tolist() == ["0.inner", "0"]


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("steem.0", "'steem.0'.*'stem.0'"),
        (["stem.0", "boddy"], "'boddy'.*'body'"),
        ([], "empty"),
        (lambda name, module: False, "none of"),
    ],
    ids=["glob", "list", "empty", "predicate"],
)
def test_selection_of_nothing(layers, words):
    model = nested()
    with pytest.raises(UsageError, match=words):
        watch(model, layers=layers)
    watch(model).close()  # and the failure left nothing behind


def recorded_steps(every, steps):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, every=every) as probe:
        for _ in range(steps):
            model(torch.ones(1, 1)).sum().backward()
            optimizer.step()
    trace = probe.trace
    assert (
        trace.steps["step"].tolist()
        == trace.layers["step"].tolist()
        == trace.params["step"].unique().tolist()[: len(trace.steps)]
    )
    assert trace.info["steps_closed"] == steps
    return trace.steps["step"].tolist()


@pytest.mark.parametrize("every", [1, 3, np.int64(4), lambda step: step in (2, 5)], ids=["1", "3", "numpy", "callable"])
def test_schedule(every):
    wanted = as_schedule(every)
    assert recorded_steps(every, 10) == [step for step in range(10) if wanted(step)]


@pytest.mark.parametrize(("steps", "count"), [(1, 2), (2, 2), (3, 5), (10, 4), (1000, 20)])
def test_log_spaced(steps, count):
    wanted = log_spaced(steps, count)
    points = [step for step in range(steps) if wanted(step)]
    assert points[0] == 0
    assert points[-1] == steps - 1
    assert len(points) <= count
    gaps = np.diff(points)
    assert (gaps[:-1] <= gaps[1:] + 1).all()  # dense early, sparse late
    if steps <= 10:
        assert recorded_steps(wanted, steps) == points


@pytest.mark.parametrize("every", [0, -1, True, 1.5, "2", None], ids=str)
def test_impossible_schedule(every):
    with pytest.raises(UsageError, match="every="):
        watch(nn.Linear(1, 1), every=every)


@pytest.mark.parametrize(("steps", "count"), [(0, 2), (5, 1), ("5", 2), (5, 2.5)], ids=str)
def test_impossible_log_spacing(steps, count):
    with pytest.raises(UsageError, match=r"log_spaced needs whole numbers .* got steps="):
        log_spaced(steps, count)
