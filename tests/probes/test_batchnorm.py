"""The batchnorm table against numpy definitions and float64 autograd."""

import math
import socket

import numpy as np
import pytest
import torch
from torch import nn

from gradlab.probes import watch

SHAPES = {
    "1d_flat": (nn.BatchNorm1d, (12, 4)),
    "1d": (nn.BatchNorm1d, (6, 4, 5)),
    "2d": (nn.BatchNorm2d, (5, 4, 3, 2)),
    "3d": (nn.BatchNorm3d, (3, 4, 2, 3, 2)),
}
OPTIONS = {
    "default": {},
    "no_affine": {"affine": False},
    "no_running": {"track_running_stats": False},
    "cumulative": {"momentum": None},
    "large_eps": {"eps": 0.5},
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(8)


def disturbed(bn):
    """Return the layer with parameters and buffers that are not those of its birth."""
    with torch.no_grad():
        if bn.affine:
            bn.weight.uniform_(-1, 2)
            bn.bias.normal_()
        if bn.running_mean is not None:
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2)
    return bn


class Skip(nn.Module):
    """x + bn(x): the gradient that flows around the layer is not its own."""

    def __init__(self, bn):
        super().__init__()
        self.bn = bn

    def forward(self, x):
        return x + self.bn(x)


def expected(bn, x, upstream):
    """All columns by their definitions, in float64; the layer's own part of the gradient only."""
    x64 = x.detach().double().requires_grad_()
    axes = (0, *range(2, x.dim()))
    by_batch = bn.training or bn.running_mean is None
    shape = [1, -1] + [1] * (x.dim() - 2)
    mean = x64.mean(axes).view(shape)
    var = ((x64 - mean) ** 2).mean(axes).view(shape)
    used_mean, used_var = (
        (mean, var) if by_batch else (bn.running_mean.double().view(shape), bn.running_var.double().view(shape))
    )
    y = (x64 - used_mean) / (used_var + bn.eps).sqrt()
    gamma = np.ones(x.shape[1])
    if bn.affine:
        gamma = bn.weight.detach().double().numpy()
        y = y * bn.weight.detach().double().view(shape) + bn.bias.detach().double().view(shape)
    (grad,) = torch.autograd.grad(y, x64, upstream.double())
    m, v = mean.detach().numpy().ravel(), var.detach().numpy().ravel()
    n = x.numel() // x.shape[1]
    unbiased = np.maximum(v * n / (n - 1), bn.eps)
    gaps = (math.nan, math.nan)
    if bn.running_mean is not None:
        rm, rv = bn.running_mean.double().numpy(), np.maximum(bn.running_var.double().numpy(), bn.eps)
        gaps = np.sqrt(np.mean((m - rm) ** 2 / unbiased)), np.sqrt(np.mean(np.log(unbiased / rv) ** 2))
    return {
        "training": by_batch,
        "channels": x.shape[1],
        "call": 0,
        "mean_gap": gaps[0],
        "var_gap": gaps[1],
        "grad_gain": (grad.norm() / upstream.double().norm()).item(),
        "act_gain": (y.std(correction=0) / x64.std(correction=0)).item(),
        "scale_mean": gamma.mean(),
        "scale_std": gamma.std(),
        "scale_abs_max": np.abs(gamma).max(),
        "scale_abs_min": np.abs(gamma).min(),
        "low_variance_fraction": np.mean(v < bn.eps),
    }


def recorded(bn, x, upstream):
    with watch(Skip(bn)) as probe:
        probe._model(x.clone().requires_grad_()).backward(upstream)
        probe.step()
    (row,) = probe.trace.batchnorm.to_dict("records")
    return row


def check(row, want, rel):
    for name, value in want.items():
        assert row[name] == pytest.approx(value, rel=rel, nan_ok=True), name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_definitions(shape, option, training):
    kind, size = SHAPES[shape]
    bn = disturbed(kind(4, **OPTIONS[option])).train(training)
    x = torch.randn(size) * 2 + 0.5
    upstream = torch.randn(size)
    want = expected(bn, x, upstream)
    check(recorded(bn, x, upstream), want, 1e-4)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype, training):
    bn = disturbed(nn.BatchNorm2d(4)).to(dtype).train(training)
    x, upstream = (torch.randn(16, 4, 3, 3) + 0.5).to(dtype), torch.randn(16, 4, 3, 3).to(dtype)
    rel = {torch.float64: 1e-9, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    want = expected(bn, x, upstream)
    check(recorded(bn, x, upstream), want, rel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_input_to_a_float32_layer(dtype):
    bn = disturbed(nn.BatchNorm2d(4))
    x, upstream = (torch.randn(16, 4, 3, 3) + 0.5).to(dtype), torch.randn(16, 4, 3, 3).to(dtype)
    want = expected(bn, x, upstream)
    check(recorded(bn, x, upstream), want, 1e-2)


def test_channels_last():
    bn = disturbed(nn.BatchNorm2d(4))
    x = torch.randn(5, 4, 3, 2).to(memory_format=torch.channels_last)
    upstream = torch.randn(5, 4, 3, 2)
    want = expected(bn, x, upstream)
    check(recorded(bn, x, upstream), want, 1e-4)


def test_constant_channels_count_as_low_variance_and_drown_nothing():
    bn = nn.BatchNorm1d(4)
    x, upstream = torch.randn(50, 4), torch.randn(50, 4)
    x[:, 1] = 0.0
    x[:, 2] = 0.003 + torch.randn(50) * 1e-4  # variance far below eps
    want = expected(bn, x, upstream)
    assert want["low_variance_fraction"] == 0.5
    check(recorded(bn, x, upstream), want, 1e-3)


def test_gaps_compare_with_the_running_statistics_before_the_call():
    bn = nn.BatchNorm1d(3, momentum=1.0)  # after the call they are the batch's own
    x = torch.randn(20, 3) + 4
    row = recorded(bn, x, torch.ones(20, 3))
    assert row["mean_gap"] > 3
    torch.testing.assert_close(bn.running_mean, x.mean(0))


def test_buffers_end_as_without_a_probe():
    bare, watched = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    x = torch.randn(20, 3)
    bare(x)
    recorded(watched, x, torch.ones(20, 3))
    for name, buffer in bare.named_buffers():
        assert torch.equal(buffer, dict(watched.named_buffers())[name])
    assert bare.num_batches_tracked == watched.num_batches_tracked == 1


def test_in_place_relu_after_it():
    bn = disturbed(nn.BatchNorm2d(4))
    x, upstream = torch.randn(5, 4, 3, 2), torch.randn(5, 4, 3, 2)
    want = expected(bn, x, upstream)
    model = nn.Sequential(bn, nn.ReLU(inplace=True))
    with watch(model) as probe:
        model(x.requires_grad_()).backward(upstream)
        probe.step()
    row = probe.trace.batchnorm.iloc[0]
    assert row["act_gain"] == pytest.approx(want["act_gain"], rel=1e-4)
    assert 0 < row["grad_gain"] < math.inf


def test_shared_layer_has_a_row_a_call():
    bn = nn.BatchNorm1d(3)
    with watch(nn.Sequential(bn, nn.Tanh(), bn)) as probe:
        probe._model(torch.randn(9, 3, requires_grad=True)).square().sum().backward()
        probe.step()
    assert probe.trace.batchnorm["call"].tolist() == [0, 1]
    assert probe.trace.batchnorm["grad_gain"].gt(0).all()


def test_input_by_keyword():
    class Named(Skip):
        def forward(self, x):
            return self.bn(input=x)

    with watch(Named(nn.BatchNorm1d(3))) as probe:
        probe._model(torch.randn(9, 3))
        probe.step()
    assert probe.trace.batchnorm["layer"].tolist() == ["bn"]


def test_gain_is_missing_where_no_gradient_is_asked_for():
    bn = nn.BatchNorm1d(3)
    with watch(bn) as probe:
        bn(torch.randn(9, 3)).square().sum().backward()
        probe.step()
    assert probe.trace.batchnorm["grad_gain"].isna().all()


def test_nonfinite_input_is_not_an_error():
    x = torch.randn(9, 3)
    x[0, 0] = math.nan
    row = recorded(nn.BatchNorm1d(3), x, torch.ones(9, 3))
    assert math.isnan(row["act_gain"])
    assert math.isnan(row["mean_gap"])


@pytest.fixture
def one_process():
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_sync_batchnorm(training, one_process):
    # In one process torch falls back to plain batch_norm; the kernels of several processes exist for CUDA only.
    bn = disturbed(nn.SyncBatchNorm(4)).train(training)
    x, upstream = torch.randn(5, 4, 3, 2), torch.randn(5, 4, 3, 2)
    want = expected(bn, x, upstream)
    try:
        row = recorded(bn, x, upstream)
    except ValueError as error:
        pytest.skip(f"torch refuses: {error}")
    check(row, want, 1e-4)


def test_lazy_layer_is_refused_until_it_has_a_shape():
    from gradlab.errors import UsageError

    model = nn.Sequential(nn.LazyBatchNorm1d())
    with pytest.raises(UsageError, match="one batch"):
        watch(model)
    model(torch.randn(5, 3))
    with watch(model) as probe:
        model(torch.randn(5, 3))
        probe.step()
    assert len(probe.trace.batchnorm) == 1
