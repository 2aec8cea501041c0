"""The training loop on other devices and in half precision: free of host syncs, which the meta device proves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from gradlab.errors import UsageError
from gradlab.nets import MLP, CifarNet, initialize
from gradlab.tasks import load_digits
from gradlab.training import TrainSettings, sgd, train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def cifar(seed=0, depth=8, **settings):
    net = CifarNet(depth, width=4, in_channels=1, **{"norm": "batch", "skip": False, **settings})
    return initialize(net, "he_normal", seed=seed)


def mlp(seed=0, depth=3, **settings):
    return initialize(MLP(depth, width=16, in_features=64, classes=10, **settings), "he_normal", seed=seed)


def weights(model):
    return [value.detach().clone() for value in model.state_dict().values()]


class Bomb(nn.Module):
    """A linear net whose logits are `value` from the given forward call on."""

    def __init__(self, at, value):
        super().__init__()
        self.linear, self.at, self.value, self.calls = nn.Linear(64, 10), at, value, 0

    def forward(self, x):
        y = self.linear(x.flatten(1))
        self.calls += 1
        return y * self.value if self.calls > self.at else y


# -- no host syncs ----------------------------------------------------------------------------------------------------

META_NETS = {
    "plain, BatchNorm": lambda: cifar(),
    "plain, none": lambda: cifar(norm="none"),
    "residual, BatchNorm": lambda: cifar(skip=True),
    "residual, none": lambda: cifar(skip=True, norm="none"),
    "residual, BatchNorm, SkipInit": lambda: cifar(skip=True, skipinit=True),
    "residual, none, SkipInit": lambda: cifar(skip=True, norm="none", skipinit=True),
    "MLP": lambda: mlp(),
    "MLP, BatchNorm": lambda: mlp(norm="batch"),
    "MLP, residual, SkipInit": lambda: mlp(skip=True, skipinit=True),
}


META_RUNS = {name: (make, 0.0) for name, make in META_NETS.items()} | {
    f"{name}, clipped and augmented": (META_NETS[name], 1.0) for name in ("plain, none", "residual, BatchNorm", "MLP")
}


@pytest.mark.parametrize(("make", "clip_norm"), META_RUNS.values(), ids=META_RUNS)
def test_a_step_never_waits_for_the_host(make, clip_norm):
    # On meta any .item(), bool() or copy to the host raises, and so does any tensor left on the CPU.
    task = load_digits(augment=clip_norm > 0).to("meta")
    told = []
    result = train(
        make(),
        task,
        TrainSettings(steps=3, batch_size=16, clip_norm=clip_norm, milestones=(1,), warmup_steps=1),
        device=torch.device("meta"),
        every=1,
        layers="all",
        on_step=lambda *a: told.append(a),
    )
    assert result.trace.steps["step"].tolist() == [0, 1, 2]
    assert set(result.trace.layers["step"]) == {0, 1, 2}
    assert len(result.trace.params) > 0
    assert told == [(0, None), (1, None), (2, None)]


def test_meta_would_catch_a_sync():
    class Syncs(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 10)

        def forward(self, x):
            y = self.linear(x.flatten(1))
            return y if y.sum() > 0 else -y

    with pytest.raises(RuntimeError, match="meta tensors"):
        train(Syncs(), load_digits(), TrainSettings(steps=1, batch_size=16), device=torch.device("meta"))


def test_bf16_where_torch_has_no_autocast_is_one_sentence(digits):
    with pytest.raises(UsageError, match=r"precision=bf16 needs autocast, which torch has not for 'meta'"):
        train(mlp(), digits, TrainSettings(steps=1, precision="bf16"), device=torch.device("meta"))


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("make", META_NETS.values(), ids=META_NETS)
def test_cuda_steps_that_are_not_recorded_never_sync(make, precision):
    def on_step(step, loss):
        assert (loss is not None) == (step in (0, 5))
        # From the first record on: kernels are loaded and the allocator is warm. The last step may sync again.
        torch.cuda.set_sync_debug_mode("error" if step < 4 else "default")

    try:
        result = train(
            make(),
            load_digits(augment=True),
            TrainSettings(steps=6, batch_size=32, lr=0.01, clip_norm=1.0, precision=precision),
            device=torch.device("cuda:0"),
            every=lambda step: step in (0, 5),
            on_step=on_step,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.status == "done"
    assert result.trace.steps["step"].tolist() == [0, 5]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_cuda_half_precision_learns(digits, precision):
    settings = TrainSettings(steps=60, batch_size=64, precision=precision)
    result = train(cifar(skip=True), digits, settings, device=torch.device("cuda:0"))
    assert result.status == "done"
    assert result.losses[-5:].mean() < 0.7 * result.losses[0]
    assert np.isfinite(result.trace.params["weight_norm"]).all()


@pytest.mark.gpu
@needs_cuda
def test_cuda_agrees_with_the_cpu(digits, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    settings = TrainSettings(steps=5, batch_size=32, lr=0.01)
    a = train(cifar(skip=True), digits, settings, device=torch.device("cuda:0"))
    b = train(cifar(skip=True), digits, settings, device=CPU)
    np.testing.assert_allclose(a.losses, b.losses, rtol=1e-3)
    np.testing.assert_allclose(a.trace.layers["grad_norm"], b.trace.layers["grad_norm"], rtol=1e-2)


@pytest.mark.gpu
@needs_cuda
def test_cuda_divergence_is_found_at_the_same_step(digits):
    settings = TrainSettings(steps=6, batch_size=16)
    result = train(Bomb(3, math.nan), digits, settings, device=torch.device("cuda:0"), every=5)
    assert (result.status, result.diverged_at, len(result.losses)) == ("diverged", 3, 4)
    assert result.trace.steps["step"].tolist() == [0]


# -- precision --------------------------------------------------------------------------------------------------------


def test_bf16_trains_on_the_cpu(digits):
    settings = {"steps": 8, "batch_size": 64, "lr": 0.05}
    half = train(cifar(), digits, TrainSettings(precision="bf16", **settings), device=CPU)
    full = train(cifar(), digits, TrainSettings(**settings), device=CPU)
    assert half.status == "done"
    assert half.losses.tolist() != full.losses.tolist()
    np.testing.assert_allclose(half.losses, full.losses, rtol=0.05)


def test_fp16_needs_cuda(digits):
    with pytest.raises(UsageError, match=r"precision=fp16 needs a CUDA device: use precision=bf16 or float32 here\."):
        train(mlp(), digits, TrainSettings(precision="fp16", steps=1), device=CPU)


def test_a_skipped_first_update_leaves_no_stray_momentum():
    # Fused SGD takes its momentum from empty memory, and a skipped first step never fills it.
    torch.manual_seed(0)
    ours, theirs = nn.Linear(50, 50), nn.Linear(50, 50)
    theirs.load_state_dict(ours.state_dict())
    settings = TrainSettings(lr=0.1, momentum=0.9, weight_decay=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    fused = sgd(ours.parameters(), settings, fused=True)
    plain = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    x = torch.randn(8, 50)
    start = weights(ours)
    for step in range(4):
        fused.zero_grad()
        junk = [torch.full((50, 50), math.nan) for _ in range(8)]  # what freed memory may hold
        del junk
        factor = math.inf if step == 0 else 1.0
        scaler.scale(ours(x).square().mean() * factor).backward()
        scaler.step(fused)
        scaler.update()
        if step == 0:
            assert all(torch.equal(a, b) for a, b in zip(weights(ours), start, strict=True))
        else:
            plain.zero_grad()
            theirs(x).square().mean().backward()
            plain.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5], ids=["free", "clipped"])
def test_fp16_with_a_scaler_on_the_cpu_in_place_of_cuda(digits, monkeypatch, clip_norm):
    # The whole path of a GPU (scaler, fused step, probes) where torch can also do it without one.
    from gradlab import training

    monkeypatch.setattr(training, "_check_precision", lambda *_: None)
    settings = {"steps": 5, "batch_size": 32, "lr": 0.01, "clip_norm": clip_norm}
    ours, theirs = cifar(skip=True), cifar(skip=True)
    half = train(ours, digits, TrainSettings(precision="fp16", **settings), device=CPU)
    full = train(theirs, digits, TrainSettings(**settings), device=CPU)
    skipped = half.trace.steps["skipped"].to_numpy()
    taken = half.trace.steps["loss_scale"].to_numpy()
    assert not skipped.any()
    np.testing.assert_array_equal(taken, 65536.0)
    np.testing.assert_allclose(half.losses, full.losses, rtol=0.02)
    for column in ("grad_norm", "clip_coefficient"):
        np.testing.assert_allclose(half.trace.steps[column], full.trace.steps[column], rtol=0.05)
    np.testing.assert_allclose(half.trace.params["update_norm"], full.trace.params["update_norm"], rtol=0.3, atol=1e-5)
    a, b = (t.layers.query("kind == 'BatchNorm2d'")["grad_norm"] for t in (half.trace, full.trace))
    np.testing.assert_allclose(a, b, rtol=0.2)


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_a_scaler_gets_the_fused_step(digits, monkeypatch, precision):
    # Without it GradScaler.step asks the host at each step, by .item(), whether to skip.
    from gradlab import training

    made = []
    monkeypatch.setattr(training, "_check_precision", lambda *_: None)
    monkeypatch.setattr(training, "sgd", lambda *args, **kwargs: made.append(sgd(*args, **kwargs)) or made[-1])
    train(mlp(), digits, TrainSettings(steps=1, batch_size=16, precision=precision), device=CPU)
    (optimizer,) = made
    assert bool(optimizer.defaults["fused"]) is (precision == "fp16")


def test_fp16_skips_an_overflowing_update_and_goes_on(digits, monkeypatch):
    from gradlab import training

    class Loud(nn.Module):
        """Its first gradient overflows in fp16 once scaled by 65536; the loss is finite."""

        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(64, 10), 0

        def forward(self, x):
            y = self.linear(x.flatten(1))
            self.calls += 1
            return y * 1000 if self.calls == 1 else y

    monkeypatch.setattr(training, "_check_precision", lambda *_: None)
    result = train(Loud(), digits, TrainSettings(steps=4, batch_size=32, precision="fp16", lr=0.01), device=CPU)
    assert result.status == "done"
    assert result.trace.steps["skipped"].tolist() == [True, False, False, False]
    assert result.trace.steps["loss_scale"].tolist() == [65536.0, 32768.0, 32768.0, 32768.0]
    assert np.isfinite(result.losses).all()
    assert result.losses[-1] < 4
