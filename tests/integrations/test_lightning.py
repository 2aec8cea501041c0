"""The Lightning callback: what it records, when it lets go, and that training is the bare one's."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradlab as gl
from gradlab.errors import UsageError
from gradlab.integrations.lightning import GradlabCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers:UserWarning",
    "ignore:The 'val_dataloader' does not have many workers:UserWarning",
)


class Net(LightningModule):
    def __init__(self, fail_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))
        self.fail_at = fail_at
        self.losses = []

    def training_step(self, batch, place):
        if place == self.fail_at:
            raise RuntimeError("the user's own error")
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        self.losses.append(loss.detach().item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Validated(Net):
    def validation_step(self, batch, place):
        self.net(batch[0])


def data(batches=6):
    x = torch.randn(batches * 8, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)


def trainer(*callbacks, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings = {"max_epochs": 1, "accelerator": "cpu", "enable_model_summary": False, "log_every_n_steps": 1}
    return Trainer(callbacks=list(callbacks), **quiet | settings | options)


def watched_modules(model):
    return [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]


def test_a_fit_is_recorded_and_is_the_bare_one():
    bare, watched = Validated(), Validated()
    torch.manual_seed(3)
    trainer(max_epochs=2).fit(bare, data(), data(2))
    state = torch.get_rng_state()
    callback = GradlabCallback()
    torch.manual_seed(3)
    trainer(callback, max_epochs=2).fit(watched, data(), data(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert watched.losses == bare.losses
    assert all(
        torch.equal(a, b) for a, b in zip(bare.state_dict().values(), watched.state_dict().values(), strict=True)
    )
    trace = callback.trace
    assert trace.steps["step"].tolist() == list(range(12))
    assert trace.steps["loss"].tolist() == pytest.approx(bare.losses)
    assert set(trace.layers["layer"]) == {"net.0", "net.1", "net.2", "net.3", "net.4"}
    assert trace.layers.groupby("step").size().tolist() == [5] * 12  # a layer once: validation is no call of the step
    assert trace.params["update_norm"].notna().all()
    assert watched_modules(watched) == []


def test_the_trace_equals_that_of_a_loop_written_out():
    module, reference = Net(), Net()
    callback = GradlabCallback()
    torch.manual_seed(3)
    trainer(callback).fit(module, data())
    optimizer = reference.configure_optimizers()
    torch.manual_seed(3)
    with gl.watch(reference, optimizer) as probe:
        for x, y in data():
            optimizer.zero_grad()
            loss = (reference.net(x) - y).square().mean()
            loss.backward()
            probe.log(loss=loss)
            optimizer.step()
    for name, table in probe.trace.tables.items():
        ours = callback.trace.tables[name]
        if name == "steps":
            table, ours = table.drop(columns="seconds"), ours.drop(columns="seconds")
        assert ours.equals(table), name


def test_accumulated_batches_are_one_step_and_their_losses_add_up():
    module = Net()
    callback = GradlabCallback()
    trainer(callback, accumulate_grad_batches=3).fit(module, data(6))
    trace = callback.trace
    assert trace.steps["loss"].tolist() == pytest.approx([sum(module.losses[:3]) / 3, sum(module.losses[3:]) / 3])
    calls = trace.layers[trace.layers["layer"] == "net.0"].groupby("step")["call"].apply(list)
    assert calls.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_clipped_gradients_are_recorded_as_the_optimizer_uses_them():
    callback = GradlabCallback()
    trainer(callback, gradient_clip_val=1e-3).fit(Net(), data(3))
    assert callback.trace.steps["grad_norm"].tolist() == pytest.approx([1e-3] * 3, rel=1e-3)


def test_the_precision_plugins_scaler_is_found():
    class Overflow(Net):
        def training_step(self, batch, place):
            loss = super().training_step(batch, place)
            return loss * math.inf if place == 1 else loss

    module = Overflow()
    torch.manual_seed(3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    callback = GradlabCallback()
    plugin = MixedPrecision(precision="16-mixed", device="cpu", scaler=scaler)
    trainer(callback, plugins=[plugin]).fit(module, data(3))
    steps = callback.trace.steps
    assert steps["loss_scale"].tolist() == [1024.0, 1024.0, 512.0]
    assert steps["skipped"].tolist() == [False, True, False]
    assert steps["loss"].tolist() == pytest.approx([module.losses[0], math.inf, module.losses[2]], rel=1e-3)
    assert "step" not in vars(scaler)  # let go

    plain, unscaled = Net(), GradlabCallback()
    torch.manual_seed(3)
    trainer(unscaled).fit(plain, data(1))
    norms = [
        c.trace.params.query("step == 0 and param == 'net.4.weight'")["grad_norm"].item() for c in (callback, unscaled)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)  # fp16 against fp32


def test_an_error_in_training_detaches_and_keeps_the_trace(tmp_path):
    module = Net(fail_at=2)
    callback = GradlabCallback(save_to=tmp_path / "run.trace")
    with pytest.raises(RuntimeError, match="the user's own error"):
        trainer(callback).fit(module, data())
    assert watched_modules(module) == []
    assert callback.trace.steps["step"].tolist() == [0, 1]
    assert gl.load(tmp_path / "run.trace") == callback.trace
    gl.watch(module).close()  # free to be watched again


def test_a_trace_that_cannot_be_saved_does_not_hide_the_error(tmp_path):
    module = Net(fail_at=1)
    callback = GradlabCallback(save_to=tmp_path / "run.trace")
    trained = trainer(callback)
    module.on_train_start = lambda: (tmp_path / "run.trace").mkdir()
    with pytest.raises(RuntimeError, match="user's own error") as failed:
        trained.fit(module, data())
    assert [note.partition(":")[0] for note in failed.value.__notes__] == ["The trace was not saved"]
    assert watched_modules(module) == []


def test_the_trace_is_saved_and_never_overwrites(tmp_path):
    callback = GradlabCallback(save_to=tmp_path / "run.trace", every=2)
    trainer(callback).fit(Net(), data())
    assert gl.load(tmp_path / "run.trace").steps["step"].tolist() == [0, 2, 4]
    module = Net()
    with pytest.raises(UsageError, match="exists already"):
        trainer(GradlabCallback(save_to=tmp_path / "run.trace")).fit(module, data())
    assert watched_modules(module) == []
    assert module.losses == []  # said before training, not after it


def test_two_optimizers_close_a_step_together():
    class Two(LightningModule):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 1)
            self.automatic_optimization = False

        def training_step(self, batch, place):
            x, y = batch
            for part, optimizer in zip((self.a, self.b), self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward((part(x) - y).square().mean())
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.a, self.b)]

    callback = GradlabCallback()
    trainer(callback).fit(Two(), data(3))
    trace = callback.trace
    assert trace.steps["step"].tolist() == [0, 1, 2]
    assert trace.params["update_norm"].gt(0).all()
    assert trace.steps["loss"].gt(0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"evry": 2}, "Did you mean 'every'"), ({"scaler": None}, "Unknown option 'scaler'")],
    ids=["misspelt", "the-trainers"],
)
def test_options_are_those_of_watch(options, message):
    with pytest.raises(UsageError) as refused:
        GradlabCallback(**options)
    assert message in str(refused.value)


def test_there_is_no_trace_before_training():
    with pytest.raises(UsageError, match="no training begin"):
        _ = GradlabCallback().trace
