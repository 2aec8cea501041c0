"""A trace in each logger's own store, read back: every scalar is there once, NaN and Inf too."""

import json
import math
import struct
import time

import mlflow
import pandas as pd
import pytest
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard.writer import SummaryWriter
from wandb.proto import wandb_internal_pb2

import gradlab as gl
from gradlab.errors import UsageError
from gradlab.integrations import mlflow as to_mlflow
from gradlab.integrations import tensorboard as to_tensorboard
from gradlab.integrations import wandb as to_wandb
from gradlab.integrations.scalars import scalars
from gradlab.trace import Trace


@pytest.fixture(scope="module")
def probe():
    """A probe after three steps, the last of them with a NaN loss, that goes on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gl.watch(model, optimizer) as probe:
        for step in range(3):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 3)).square().mean() * (math.nan if step == 2 else 1.0)
            loss.backward()
            probe.log(loss=loss)
            optimizer.step()
    return probe


@pytest.fixture
def odd():
    """Values that loggers lose: Inf, NaN, numbers outside float32, a name that is no file's."""
    layers = pd.DataFrame({
        "step": [0, 1, 2, 3], "layer": "tap: a/b (x)", "grad_norm": [1e-60, 1e60, math.inf, math.nan],
        "grad_nonfinite": [0.0, 0.0, 1.0, 2.0],
    })  # fmt: skip
    return Trace({"layers": layers})


def texts(rows):
    return sorted((tag, step, repr(value)) for tag, value, step in rows)


# -- TensorBoard ------------------------------------------------------------------------------------------------------


def read_events(folder):
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    tags = events.Tags()["tensors"]
    return [(tag, event.tensor_proto.double_val[0], event.step) for tag in tags for event in events.Tensors(tag)]


def test_tensorboard_holds_every_scalar(tmp_path, probe):
    last = to_tensorboard.log_trace(probe.trace, tmp_path)
    assert last == 2
    assert texts(read_events(tmp_path)) == texts(scalars(probe.trace))


def test_tensorboard_holds_what_float32_does_not(tmp_path, odd):
    to_tensorboard.log_trace(odd, str(tmp_path), {"layers": ["grad_norm"]})
    assert [repr(value) for _, value, _ in read_events(tmp_path)] == ["1e-60", "1e+60", "inf", "nan"]


def test_a_users_writer_stays_open_and_takes_what_is_new(tmp_path, probe):
    with SummaryWriter(str(tmp_path)) as writer:
        early = Trace({"steps": probe.trace.steps.head(1), "layers": probe.trace.layers.query("step == 0")})
        last = to_tensorboard.log_trace(early, writer)
        assert last == 0
        assert to_tensorboard.log_trace(probe.trace, writer, {"steps": ["loss"]}, after=last) == 2
        writer.add_scalar("the user's own", 1.0, 0)
    found = [(tag, step) for tag, _, step in read_events(tmp_path) if tag == "steps/loss"]
    assert found == [("steps/loss", 0), ("steps/loss", 1), ("steps/loss", 2)]


# -- Weights & Biases -------------------------------------------------------------------------------------------------


def records_of(path):
    """Yield the records of a run's file: LevelDB's log format, blocks of 32 KiB, after a header of 7 bytes."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    place, parts = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:  # too short for a record's header: padding
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        if place + 7 + length > len(content):
            return  # still being written
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def read_offline_run(folder):
    """Return the history of an offline run: what a sync would send."""
    (path,) = folder.rglob("*.wandb")
    records, until = [], time.monotonic() + 20
    while "exit" not in [record.WhichOneof("record_type") for record in records]:  # another process writes the file
        assert time.monotonic() < until, "the run's file has no end"
        records = list(records_of(path))
        time.sleep(0.02)
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


@pytest.fixture
def run(tmp_path):
    with wandb.init(mode="offline", dir=tmp_path, project="gradlab") as run:
        yield run


def history_of(run, tmp_path):
    run.finish()
    return read_offline_run(tmp_path)


def test_wandb_holds_every_scalar_beside_the_users_own(tmp_path, run, probe):
    run.log({"accuracy": 0.5}, step=7)
    assert to_wandb.log_trace(probe.trace, run) == 2
    rows = history_of(run, tmp_path)
    assert [row["accuracy"] for row in rows if "accuracy" in row] == [0.5]
    others = {to_wandb.STEP, "accuracy", "_step", "_timestamp", "_runtime"}
    found = [(tag, float(row[tag]), int(row[to_wandb.STEP])) for row in rows for tag in row.keys() - others]
    assert texts(found) == texts(scalars(probe.trace))


def test_wandb_holds_nan_and_infinity(tmp_path, run, odd):
    to_wandb.log_trace(odd, None, {"layers": ["grad_norm"]})  # the active run
    tag = "layers.grad_norm/tap: a/b (x)"
    assert [repr(float(row[tag])) for row in history_of(run, tmp_path)] == ["1e-60", "1e+60", "inf", "nan"]


def test_wandb_without_a_run_is_refused(probe):
    with pytest.raises(UsageError, match=r"wandb\.init"):
        to_wandb.log_trace(probe.trace)


# -- MLflow -----------------------------------------------------------------------------------------------------------


STORES = {"files": "mlruns", "sqlite": "mlflow.db"}


@pytest.fixture(params=STORES.values(), ids=STORES)
def client(request, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow keeps it going, and wants to be asked for it
    if request.param == "mlruns":
        return mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    shared = tmp_path_factory.getbasetemp() / "mlflow.db"  # its tables take seconds to make
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{shared}")


def read_metrics(client, run_id):
    keys = client.get_run(run_id).data.metrics
    return [(m.key, m.value, m.step) for key in keys for m in client.get_metric_history(run_id, key)]


def test_mlflow_holds_every_scalar(client, probe):
    run_id = client.create_run("0").info.run_id
    assert to_mlflow.log_trace(probe.trace, run_id, client=client) == 2
    assert texts(read_metrics(client, run_id)) == texts(scalars(probe.trace))


def test_mlflow_holds_nan_and_infinity_under_a_legal_name(client, odd, request):
    run_id = client.create_run("0").info.run_id
    to_mlflow.log_trace(odd, run_id, {"layers": ["grad_norm"]}, client=client)
    found = read_metrics(client, run_id)
    infinity = "1.7976931348623157e+308" if "sqlite" in request.node.name else "inf"  # all that a database holds
    assert [repr(value) for _, value, _ in found] == ["1e-60", "1e+60", infinity, "nan"]
    assert {name for name, _, _ in found} == {to_mlflow.metric_name("layers.grad_norm/tap: a/b (x)")}


def test_more_metrics_than_mlflow_takes_at_once(client):
    layers = pd.DataFrame({"step": range(1100), "layer": "a", "grad_norm": 1.0})
    run_id = client.create_run("0").info.run_id
    to_mlflow.log_trace(Trace({"layers": layers}), run_id, {"layers": ["grad_norm"]}, client=client)
    assert len(read_metrics(client, run_id)) == 1100


def test_two_names_that_mlflow_takes_for_one_stay_two():
    names = [to_mlflow.metric_name(f"a.b/{label}") for label in ("x(1)", "x[1]", "x" * 300, "x" * 301, "..", "x_1_")]
    assert len(set(names)) == len(names)
    for name in names:
        mlflow.utils.validation._validate_metric_name(name)
        assert len(name) <= 250


def test_mlflow_without_a_run_is_refused(probe):
    with pytest.raises(UsageError, match=r"mlflow\.start_run"):
        to_mlflow.log_trace(probe.trace)
