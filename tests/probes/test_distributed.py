"""Two ranks on the CPU: what the optimizer uses is the same on both, and equals one process on the joined batch."""

import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from gradlab.errors import UsageError
from gradlab.probes import watch

SCRIPT = Path(__file__).with_name("ranks.py")
WAYS = ["ddp", "fsdp", "fsdp_not_resharded"]

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return what both ranks wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    targets = [folder / f"{rank}.json" for rank in range(2)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(folder / "store"), str(target)],
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for rank, target in enumerate(targets)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    return [json.loads(target.read_text(encoding="utf-8")) for target in targets]


@pytest.fixture(scope="module")
def alone():
    """Return the trace of one process on the joined batch, and its losses, gradients and weights."""
    spec = util.spec_from_file_location("ranks", SCRIPT)
    script = util.module_from_spec(spec)
    spec.loader.exec_module(script)
    trace, left = script.train(script.net(), None)
    return trace, left


@pytest.mark.parametrize("way", WAYS)
def test_watched_ranks_train_as_bare_ones_in_every_bit(ranks, way):
    assert [rank[way]["same"] for rank in ranks] == [True, True]


@pytest.mark.parametrize("way", WAYS)
def test_norms_of_parameters_equal_those_of_one_process_on_the_joined_batch(ranks, alone, way):
    want = alone[0].params
    for rank in ranks:
        got = pd.DataFrame(rank[way]["params"])
        assert got["param"].str.removeprefix("module.").tolist() == want["param"].tolist()
        assert got["entries"].tolist() == want["entries"].tolist()
        for column in ("weight_norm", "grad_norm", "update_norm"):
            np.testing.assert_allclose(got[column], want[column], rtol=2e-5, err_msg=column)
        assert got["grad_nonfinite"].eq(0).all()
        total = pd.DataFrame(rank[way]["steps"])["grad_norm"]
        np.testing.assert_allclose(total, alone[0].steps["grad_norm"], rtol=2e-5)
        assert rank[way]["not_seen"] == {}
    # And the reference itself against plain arithmetic, so that both cannot be wrong in the same way.
    grads = [g.double().norm().item() for g in alone[1][1:7]]
    np.testing.assert_allclose(want.query("step == 0")["grad_norm"], grads, rtol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_layers_show_each_ranks_own_batch(ranks, alone, way):
    parts = [pd.DataFrame(rank[way]["layers"]) for rank in ranks]
    want = alone[0].layers
    joined = np.hypot(*(part["act_norm"] for part in parts))
    np.testing.assert_allclose(joined, want["act_norm"], rtol=2e-5)
    # Each rank's loss is a mean over its own half, the joined one a mean over all.
    joined = np.hypot(*(part["grad_norm"] for part in parts)) / 2
    np.testing.assert_allclose(joined, want["grad_norm"], rtol=2e-5)


def test_sharded_norms_over_the_whole_range(ranks):
    for rank in ranks:
        rows = {row["param"]: row for row in rank["extremes"]}
        for name, value in {"tiny": 2e-30, "huge": 2e30, "wide": 2e200, "zero": 0.0}.items():
            assert rows[name]["weight_norm"] == pytest.approx(value, rel=1e-6)
            assert rows[name]["grad_norm"] == pytest.approx(2 * value, rel=1e-6)
        assert rows["nan"]["weight_norm"] is None  # NaN in JSON
        assert rows["nan"]["grad_nonfinite"] == 1  # counted on all ranks, wherever it lies


def test_sharded_after_watch_is_said_and_missing_not_a_local_norm(ranks):
    for rank in ranks:
        assert rank["late"]["norms"] == 0
        assert "shard, then watch" in rank["late"]["not_seen"]["0.weight"]


def test_a_rank_that_watches_alone_gets_a_sentence_not_a_hang(ranks):
    assert "call watch on each" in ranks[0]["alone"]
    for rank in ranks:
        assert "must watch alike" in rank["unlike"]


def test_flat_parameters_are_refused():
    class FullyShardedDataParallel(nn.Sequential):
        """Has the name of the wrapper whose parameters are flat local shards."""

    with pytest.raises(UsageError, match="use fully_shard"):
        watch(FullyShardedDataParallel(nn.Linear(2, 2)))
