"""The overhead benchmark times what it says, leaves nets as they were, and refuses what it does not know."""

import json
import math

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from gradlab.benchmarks import overhead
from gradlab.benchmarks.conditions import OWN, PEERS, missing
from gradlab.benchmarks.workloads import WORKLOADS, Workload
from gradlab.cli import main

TINY = Workload(
    text="tiny", model=lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 10)),
    data=lambda: torch.randn(3, 4), steps=3,
)  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(WORKLOADS, "tiny", TINY)


def test_each_condition_has_a_ratio_a_round(tiny, capsys, tmp_path):
    found = overhead.measure(["tiny"], OWN, 2)
    assert set(found["tiny"]) == set(OWN) - {"gradlab timesteps=16"}  # it has no recurrent module
    assert all(len(ratios) == 2 for name, ratios in found["tiny"].items() if name != "bare")
    assert all(math.isfinite(ratio) and ratio > 0 for ratios in found["tiny"].values() for ratio in ratios)
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("|") for line in lines] == [7, 7, 7]
    overhead.draw(found, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 1000


@pytest.mark.parametrize("name", OWN)
def test_a_condition_watches_and_leaves_no_hook(name):
    model = nn.Sequential(nn.LSTM(4, 3)) if OWN[name].recurrent else TINY.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with OWN[name].watch(model, optimizer):
        hooks = [len(m._forward_hooks) for m in model]
        assert all(hooks) == (name != "bare")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def test_steps_are_whole_periods(tiny):
    seen = []

    class Counting(nn.Linear):
        def forward(self, x):
            seen.append(1)
            return super().forward(x)

    overhead.step_time(OWN["gradlab every=10"], 3, Counting(4, 10), torch.randn(2, 4), torch.tensor([0, 1]))
    assert len(seen) == 20  # a period to warm up, a period timed


def test_peers_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr("gradlab.benchmarks.conditions.find_spec", lambda _: None)
    assert missing() == list(PEERS)


@pytest.mark.parametrize("key", WORKLOADS)
def test_workloads_train(key):
    model, x, y = WORKLOADS[key].build("meta")
    nn.functional.cross_entropy(model(x), y).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workload", "W9"], "There is no net 'W9'"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--device", "cuda:99"], "cuda"),
    ],
    ids=["workload", "rounds", "device"],
)
def test_bench_overhead_refuses(arguments, said):
    done = CliRunner().invoke(main, ["bench", "overhead", *arguments])
    assert done.exit_code not in (0, None)
    assert said in done.output
    assert "Traceback" not in done.output


def test_ratios_as_json(tiny, tmp_path, monkeypatch):
    for name in overhead._QUIET:
        monkeypatch.setenv(name, "4000000000")
    monkeypatch.setattr(overhead, "OWN", {name: OWN[name] for name in ("bare", "gradlab")})
    threads = torch.get_num_threads()
    overhead.main(["--workloads", "tiny", "--rounds", "1", "--json", str(tmp_path / "ratios.json")])
    torch.set_num_threads(threads)
    assert set(json.loads((tmp_path / "ratios.json").read_text())["tiny"]) == {"bare", "gradlab"}
