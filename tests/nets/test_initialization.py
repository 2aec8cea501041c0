from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gradlab.errors import UsageError
from gradlab.nets import INITIALIZATIONS, CifarNet, initialize, weight_variance

# (layer, fan_in, fan_out, kernel entries), written out by hand; fans differ, so that no two schemes agree by chance.
LAYERS = {
    "linear-wide": (lambda: nn.Linear(300, 120), 300, 120, 1),
    "linear-tall": (lambda: nn.Linear(90, 400), 90, 400, 1),
    "conv1d": (lambda: nn.Conv1d(40, 60, 5), 200, 300, 5),
    "conv2d": (lambda: nn.Conv2d(24, 64, 3), 216, 576, 9),
    "conv2d-grouped": (lambda: nn.Conv2d(64, 64, 3, groups=4), 144, 576, 9),
    "conv3d": (lambda: nn.Conv3d(16, 40, (3, 2, 2)), 192, 480, 12),
}


def closed_form(scheme: str, fan_in: int, fan_out: int, kernel: int) -> float:
    rows = fan_out // kernel
    return {
        "default": 1 / 3 / fan_in,
        "lecun_normal": 1 / fan_in,
        "glorot_normal": 1 / (0.5 * (fan_in + fan_out)),
        "glorot_uniform": 1 / (0.5 * (fan_in + fan_out)),
        "he_normal": 1 / (0.5 * fan_in),
        "orthogonal": min(rows, fan_in) / (rows * fan_in),  # min(rows, columns) unit vectors over all entries
    }[scheme]


@pytest.mark.parametrize("gain", [1.0, 1.7], ids=["gain1", "gain1.7"])
@pytest.mark.parametrize("layer", LAYERS, ids=LAYERS.keys())
@pytest.mark.parametrize("scheme", INITIALIZATIONS, ids=INITIALIZATIONS)
def test_sample_variance_is_the_closed_form(scheme: str, layer: str, gain: float) -> None:
    make, fan_in, fan_out, kernel = LAYERS[layer]
    weight = initialize(make().double(), scheme, gain=gain, seed=3).weight.detach()
    variance = gain**2 * closed_form(scheme, fan_in, fan_out, kernel)
    assert weight_variance(scheme, fan_in, fan_out, gain, kernel=kernel) == pytest.approx(variance, rel=1e-14)
    # A mean square of n independent normals has relative standard error sqrt(2/n), of uniforms sqrt(0.8/n), of an
    # orthogonal matrix 0; 4.5 of them leave 7e-6 for chance, and the seed is fixed. Any two
    # variances of one layer that differ do so by 9 % or more, which is beyond the widest tolerance.
    spread = {"orthogonal": 0.0, "default": 0.8, "glorot_uniform": 0.8}.get(scheme, 2.0)
    tolerance = 4.5 * math.sqrt(spread / weight.numel()) + 1e-12
    assert tolerance < 0.08
    assert float(weight.square().mean()) == pytest.approx(variance, rel=tolerance)
    assert abs(float(weight.mean())) < 4.5 * math.sqrt(variance / weight.numel())


@pytest.mark.parametrize("scheme", ["default", "glorot_uniform"], ids=["default", "glorot_uniform"])
def test_uniform_schemes_fill_their_interval_and_no_more(scheme: str) -> None:
    weight = initialize(nn.Linear(300, 120), scheme, gain=2.0, seed=0).weight.detach().double()
    bound = math.sqrt(3 * weight_variance(scheme, 300, 120, 2.0))
    assert 0.999 * bound < float(weight.abs().max()) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("scheme", ["lecun_normal", "glorot_normal", "he_normal"], ids=["lecun", "glorot", "he"])
def test_normal_schemes_have_the_fourth_moment_of_a_normal(scheme: str) -> None:
    weight = initialize(nn.Linear(300, 120), scheme, seed=0).weight.detach().double()
    kurtosis = float(weight.pow(4).mean() / weight.square().mean() ** 2)
    assert kurtosis == pytest.approx(3, abs=4.5 * math.sqrt(24 / weight.numel()))  # a uniform has 1.8


@pytest.mark.parametrize("gain", [0.5, 1.0, 2.0], ids=["gain0.5", "gain1", "gain2"])
@pytest.mark.parametrize("layer", LAYERS, ids=LAYERS.keys())
def test_orthogonal_weights_are_semi_orthogonal(layer: str, gain: float) -> None:
    weight = initialize(LAYERS[layer][0]().double(), "orthogonal", gain=gain, seed=1).weight.detach().flatten(1)
    gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram), dtype=gram.dtype), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scheme", INITIALIZATIONS, ids=INITIALIZATIONS)
def test_gain_multiplies_the_weights_of_one_seed(scheme: str) -> None:
    one = initialize(nn.Conv2d(4, 5, 3).double(), scheme, seed=2)
    three = initialize(nn.Conv2d(4, 5, 3).double(), scheme, gain=3.0, seed=2)
    torch.testing.assert_close(three.weight, 3 * one.weight, rtol=1e-13, atol=1e-13)


def test_default_is_torch_own_reset() -> None:
    model = CifarNet(8, width=4)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.reset_parameters()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    initialize(model, "he_normal", seed=0)
    initialize(model, "default", seed=11)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("gain", [1.0, 5.0], ids=["gain1", "gain5"])
@pytest.mark.parametrize("scheme", INITIALIZATIONS, ids=INITIALIZATIONS)
def test_biases_are_zero_except_under_default(scheme: str, gain: float) -> None:
    bias = initialize(nn.Linear(100, 2000), scheme, gain=gain, seed=0).bias.detach()
    if scheme == "default":
        assert 0.0999 < float(bias.abs().max()) <= 0.1  # +-1/sqrt(100), whatever the gain
    else:
        assert not bias.any()


@pytest.mark.parametrize("scheme", INITIALIZATIONS, ids=INITIALIZATIONS)
def test_only_linear_and_conv_are_touched(scheme: str) -> None:
    model = nn.Sequential(
        nn.ConvTranspose2d(2, 3, 3), nn.BatchNorm2d(3), nn.LSTM(3, 2), CifarNet(8, width=2, skipinit=True)
    )
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.25)
    initialize(model, scheme, seed=0)
    owners = {id(p): type(m) for m in model.modules() for p in m.parameters(recurse=False)}
    for parameter in model.parameters():
        touched = owners[id(parameter)] in (nn.Conv2d, nn.Linear)
        assert bool((parameter == 0.25).all()) != touched


@pytest.mark.parametrize("scheme", INITIALIZATIONS, ids=INITIALIZATIONS)
def test_seed_fixes_the_draw_and_leaves_the_global_generator_alone(scheme: str) -> None:
    model = CifarNet(8, width=2)
    before = torch.get_rng_state()
    first = [p.detach().clone() for p in initialize(model, scheme, seed=5).parameters()]
    second = [p.detach().clone() for p in initialize(model, scheme, seed=5).parameters()]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = initialize(model, scheme, seed=6)
    assert not torch.equal(first[0], next(other.parameters()))


def test_without_seed_the_global_generator_is_used() -> None:
    draws = []
    with torch.random.fork_rng():
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            draws.append(initialize(nn.Linear(4, 4), "he_normal").weight.detach().clone())
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])


def test_layers_of_one_model_get_different_weights() -> None:
    first, second = initialize(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), "he_normal", seed=0)
    assert not torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("scheme", INITIALIZATIONS, ids=INITIALIZATIONS)
def test_meta_weights_are_passed_over(scheme: str) -> None:
    with torch.device("meta"):
        model = CifarNet(8, width=2)
        assert initialize(model, scheme, gain=2.0, seed=0) is model
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("scheme", INITIALIZATIONS, ids=INITIALIZATIONS)
def test_dtype_and_memory_format_are_kept(scheme: str) -> None:
    half = initialize(nn.Linear(8, 8).to(torch.bfloat16), scheme, seed=0)
    full = initialize(nn.Linear(8, 8), scheme, seed=0)
    assert half.weight.dtype == torch.bfloat16
    assert torch.equal(half.weight, full.weight.to(torch.bfloat16))
    last = initialize(nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last), scheme, seed=0)
    assert last.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last.weight, initialize(nn.Conv2d(4, 4, 3), scheme, seed=0).weight)


@pytest.mark.parametrize("gain", [0.0, -1.0, math.nan, math.inf], ids=str)
def test_gain_must_be_finite_and_above_zero(gain: float) -> None:
    with pytest.raises(UsageError, match="must be a finite number above 0"):
        initialize(nn.Linear(2, 2), "default", gain=gain)
    with pytest.raises(UsageError, match="must be a finite number above 0"):
        weight_variance("default", 2, 2, gain)


def test_unknown_scheme_names_the_nearest() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with pytest.raises(UsageError, match=r"Unknown initialization 'he_norml'\. Did you mean 'he_normal'\?"):
        initialize(model, "he_norml")
    with pytest.raises(UsageError, match="Unknown initialization"):
        weight_variance("xavier", 2, 2)
    assert torch.equal(model.weight, before)
    with pytest.raises(UsageError, match="'fan_in' is 0"):
        weight_variance("default", 0, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_one_seed_gives_the_same_weights_on_every_device() -> None:
    on_gpu = initialize(CifarNet(8, width=4).cuda(), "orthogonal", seed=4)
    on_cpu = initialize(CifarNet(8, width=4), "orthogonal", seed=4)
    for a, b in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
        assert torch.equal(a.cpu(), b)
