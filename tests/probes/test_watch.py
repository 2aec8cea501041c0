"""A watched run is a bare run: bit for bit, with nothing left behind."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradlab.errors import UsageError
from gradlab.nets import CifarNet
from gradlab.probes import watch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(9)


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(4, 2)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(x))
        out += x
        return self.head(self.relu(out).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 5, num_layers=2, dropout=0.3, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def mlp():
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 2))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.stem, self.reentrant = nn.Linear(3, 6), reentrant
        self.first = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2))
        self.second = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.stem(x)
        for part in (self.first, self.second):
            plain = self.reentrant is None or not torch.is_grad_enabled()
            x = part(x) if plain else checkpoint(part, x, use_reentrant=self.reentrant)
        return self.head(x)


NETS = {
    "mlp": (mlp, (6, 3)),
    "conv": (ConvNet, (4, 3, 6, 6)),
    "lstm": (Recurrent, (4, 5, 3)),
    "checkpoint": (lambda: Checkpointed(False), (6, 3)),
    "checkpoint_reentrant": (lambda: Checkpointed(True), (6, 3)),
}


def train(make, shape, *, watched, steps=3, every=1):
    torch.manual_seed(1)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    probe = watch(model, optimizer, layers="all", every=every) if watched else None
    seen = []
    try:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(torch.randn(shape)).square().mean()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            if probe is not None:
                probe.log(loss=loss, clip=(norm, 0.5))
            seen += [loss.detach().clone(), *(p.grad.clone() for p in model.parameters())]
            optimizer.step()
            with torch.no_grad():
                model.eval()(torch.randn(shape))
                model.train()
            if probe is not None:
                assert len(probe.trace.steps) > 0  # reading in the middle changes nothing either
    finally:
        if probe is not None:
            probe.close()
    return [*seen, *model.state_dict().values(), torch.get_rng_state()]


@pytest.mark.parametrize("every", [1, 2], ids=["every_step", "every_second"])
@pytest.mark.parametrize("net", NETS)
def test_bit_identity(net, every):
    bare, watched = train(*NETS[net], watched=False), train(*NETS[net], watched=True, every=every)
    assert len(bare) == len(watched)
    for one, other in zip(bare, watched, strict=True):
        assert torch.equal(one, other)


HOOK_DICTS = [name for name in vars(nn.Module()) if "hook" in name]


def hooks_left(model, optimizer):
    left = [name for module in model.modules() for name in HOOK_DICTS if vars(module)[name]]
    left += [name for name, value in vars(optimizer).items() if "hook" in name and value]
    return left + [name for name, p in model.named_parameters() if p._backward_hooks]


@pytest.mark.parametrize("net", ["mlp", "conv", "lstm"])
@pytest.mark.parametrize("way", ["with", "exception", "close"])
def test_hooks_come_off(net, way):
    make, shape = NETS[net]
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    bare = scaler.step.__func__
    assert "_forward_hooks" in HOOK_DICTS
    probe = watch(model, optimizer, scaler=scaler)
    assert hooks_left(model, optimizer)
    if way == "close":
        probe.close()
        probe.close()
    else:
        with pytest.raises(ValueError, match="stop") if way == "exception" else probe, probe:
            scaler.scale(model(torch.randn(shape)).sum()).backward()
            if way == "exception":
                raise ValueError("stop")
    assert hooks_left(model, optimizer) == []
    assert scaler.step.__func__ is bare


def test_unclosed_step_is_kept_after_an_exception():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = watch(model, optimizer)

    def run():
        with probe:
            for step in range(3):
                model(torch.randn(6, 3)).sum().backward()
                if step == 2:
                    raise ValueError("stop")
                optimizer.step()

    with pytest.raises(ValueError, match="stop"):
        run()
    assert probe.trace.steps["step"].tolist() == [0, 1, 2]
    assert probe.trace.info["last_step_closed"] is False
    assert probe.trace.layers.query("step == 2")["grad_norm"].notna().all()
    assert probe.trace.params["step"].unique().tolist() == [0, 1]


def test_forward_without_backward_at_the_end_is_no_step():
    model = mlp()
    with watch(model) as probe:
        model(torch.randn(6, 3)).sum().backward()
        probe.step()
        model(torch.randn(6, 3))
    assert probe.trace.steps["step"].tolist() == [0]


def test_watch_twice():
    model = mlp()
    with watch(model):
        with pytest.raises(UsageError, match="already"):
            watch(model)
        model(torch.randn(6, 3))
    with watch(model) as probe:
        model(torch.randn(6, 3)).sum().backward()
        probe.step()
    assert len(probe.trace.layers) == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda: ("net",), "torch.nn.Module"),
        (lambda: (mlp(), torch.optim.SGD(mlp().parameters(), lr=0.1)), "own optimizer"),
        (lambda: (mlp(), mlp()), "torch.optim.Optimizer"),
    ],
    ids=["not_a_module", "other_optimizer", "not_an_optimizer"],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(UsageError, match=words):
        watch(*arguments())


def test_step_out_of_order():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as probe, pytest.raises(UsageError, match="optimizer"):
        probe.step()
    with watch(model) as probe:
        pass
    with pytest.raises(UsageError, match="closed"):
        probe.step()


def _saved(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES = {"save": _saved, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("net", ["mlp", "conv", "lstm"])
def test_watched_model_can_be_copied_and_the_copy_does_not_record(how, net):
    make, shape = NETS[net]
    model = make()
    keys = list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as probe:
        model(torch.randn(shape)).sum().backward()
        other = COPIES[how](model)
        other(torch.randn(shape)).sum().backward()
        optimizer.step()
        assert list(model.state_dict()) == list(other.state_dict()) == keys
    rows = probe.trace.layers.groupby("layer")["call"].max()
    assert rows.max() == (1 if net == "conv" else 0)  # the shared ReLU runs twice
    with watch(other) as second:
        other(torch.randn(shape)).sum().backward()
        second.step()
    assert len(second.trace.layers) == len(probe.trace.layers)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copied_scaler_and_optimizer_still_step(how):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with watch(model, optimizer, scaler=scaler) as probe:
        other_scaler = COPIES[how](scaler)
        other_model, other_optimizer = copy.deepcopy((model, optimizer))
        before = other_model[0].weight.detach().clone()
        other_scaler.scale(other_model(torch.randn(6, 3)).sum()).backward()
        other_scaler.step(other_optimizer)
        assert not torch.equal(before, other_model[0].weight)
        assert probe.step_number == 0


# -- activation checkpointing ---------------------------------------------------------------------------------------


def checkpointed_trace(reentrant, **options):
    torch.manual_seed(2)
    model = Checkpointed(reentrant)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, **options) as probe:
        for _ in range(2):
            with torch.no_grad():  # an evaluation must not be taken for the first run of a checkpoint
                model.eval()(torch.randn(6, 3))
                model.train()
            model(torch.randn(6, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return probe.trace


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_checkpointing_is_recorded_once_and_like_no_checkpointing(reentrant):
    plain, trace = checkpointed_trace(None), checkpointed_trace(reentrant)
    columns = ["step", "layer", "call", "order", "kind", "entries"]
    assert trace.layers[columns].values.tolist() == plain.layers[columns].values.tolist()
    first = plain.layers["step"] == 0  # running statistics differ from then on: torch updates them in each run
    for name in ("act_norm", "act_std", "grad_norm"):
        assert trace.layers[name].notna().all()
        torch.testing.assert_close(
            torch.tensor(trace.layers[name][first].to_numpy()), torch.tensor(plain.layers[name][first].to_numpy())
        )
    assert trace.batchnorm["grad_gain"].tolist()[0] == pytest.approx(plain.batchnorm["grad_gain"][0], rel=1e-5)
    assert len(trace.batchnorm) == 2
    assert trace.units.equals(plain.units)
    assert trace.never_ran == ()
    assert trace.info["not_seen"] == {}
    assert trace.info["calls_without_grad"] == plain.info["calls_without_grad"]


def test_reentrant_checkpointing_without_grad_has_gradients_too():
    layers = checkpointed_trace(True, without_grad=True).layers
    assert layers.groupby(["step", "layer"]).size().eq(2).all()  # the evaluation and the training pass
    assert layers["grad_norm"].notna().sum() == len(layers) / 2


def test_checkpointing_without_the_private_way_to_ask(monkeypatch):
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    torch.manual_seed(2)
    from gradlab.probes.hooks import recomputing

    assert recomputing() is False


# -- no synchronization ---------------------------------------------------------------------------------------------


META_NETS = {
    "cifar": (lambda: CifarNet(8, width=4), (2, 3, 8, 8)),
    "mlp": (mlp, (6, 3)),
    "conv_in_place": (ConvNet, (4, 3, 6, 6)),
    "lstm": (Recurrent, (4, 5, 3)),
    "checkpoint": (lambda: Checkpointed(True), (6, 3)),
    "bounded": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Sigmoid()), (6, 3)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("net", META_NETS)
def test_no_synchronization(net, dtype):
    make, shape = META_NETS[net]
    with torch.device("meta"):
        model = make().to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with watch(model, optimizer, layers="all") as probe:
            for _ in range(3):
                optimizer.zero_grad()
                loss = probe.tap(model(torch.empty(shape, dtype=dtype)), "tap").square().mean()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                probe.log(loss=loss, clip=(norm, 1.0))
                optimizer.step()
    trace = probe.trace
    assert trace.steps["step"].tolist() == [0, 1, 2]
    assert len(trace.layers) > 0
    assert trace.layers["grad_norm"].isna().all()
    assert trace.steps["loss"].isna().all()
    assert set(trace.params["step"]) == {0, 1, 2}


def test_meta_run_would_notice_a_synchronization():
    model = nn.Linear(2, 2, device="meta")
    model.register_forward_hook(lambda module, args, output: output.sum().item())
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(torch.empty(1, 2, device="meta"))


def test_device_rows_grow_past_their_first_size():
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(45))).to("meta")
    with watch(model) as probe:
        model(torch.empty(1, 1, device="meta")).sum().backward()
        probe.step()
        (device,) = probe._buffer._devices.values()
        assert len(device.rows.tensor) == 512
    assert len(probe.trace.layers) == 45


def test_trace_of_a_real_run_survives_the_disk(tmp_path):
    from gradlab.trace import Trace

    trace = checkpointed_trace(False)
    trace.save(tmp_path / "run")
    assert Trace.load(tmp_path / "run") == trace


def test_only_a_step_that_is_not_recorded_is_skipped():
    model = nn.Linear(2, 2)
    with watch(model, torch.optim.SGD(model.parameters(), lr=0.1), every=2) as probe:
        with pytest.raises(UsageError, match="not recorded can be skipped"):
            probe.skip()
        model(torch.ones(1, 2)).sum().backward()
        probe._updates.optimizers[0].step()
        probe.skip()
        assert (probe.step_number, probe.recording) == (2, True)
    with pytest.raises(UsageError, match="not recorded can be skipped"):
        probe.skip()
