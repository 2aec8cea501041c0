"""Reductions against float64 numpy, over dtypes, layouts, sizes and the whole range of values."""

import math

import numpy as np
import pytest
import torch

from gradlab.probes import native, reduce
from gradlab.probes.reduce import ROW, can_reduce, cpu_row, device_row, flat_view, statistics

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def _native(x):
    if native.kernel() is None:
        pytest.skip("no C compiler here")
    return np.array([cpu_row(x)])


def _torch(x):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "kernel", lambda: None)
        return np.array([cpu_row(x)])


def _device(x):
    return device_row(x).double().numpy()[None]


ways = pytest.mark.parametrize("way", [_native, _torch, _device], ids=["native", "torch", "device"])


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(3)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def reference(x):
    """Two-pass statistics in long double, where every square of a float64 entry is in range."""
    y = x.double().numpy().astype(np.longdouble).ravel()
    with np.errstate(invalid="ignore", over="ignore"):
        mean = y.mean()
        return {
            "mean": float(mean),
            "std": float(np.sqrt(np.mean((y - mean) ** 2))),
            "norm": float(np.sqrt(np.sum(y**2))),
            "abs_max": float(np.abs(y).max()),
            "zero_fraction": float(np.mean(y == 0)),
            "nonfinite": float(np.sum(~np.isfinite(y))),
        }


def check(x, rows, *, std_rel=1e-3):
    got = {name: value[0] for name, value in statistics(rows, np.array([x.numel()])).items()}
    want = reference(x)
    for name in ("zero_fraction", "abs_max", "nonfinite"):
        assert got[name] == pytest.approx(want[name], rel=1e-12, nan_ok=True), name
    assert got["norm"] == pytest.approx(want["norm"], rel=2e-6, nan_ok=True)
    # A mean near zero is known to a share of the typical entry only.
    typical = want["norm"] / math.sqrt(x.numel())
    assert got["mean"] == pytest.approx(want["mean"], rel=1e-6, abs=3e-7 * typical, nan_ok=True)
    assert got["std"] == pytest.approx(want["std"], rel=std_rel, abs=3e-8 * abs(want["mean"]), nan_ok=True)


@dtypes
@ways
@pytest.mark.parametrize("size", [1, 2, 3, 31, 1001])
def test_sizes(way, dtype, size, draw):
    x = (draw(size) * 2 + 0.5).to(dtype)
    x[::3] = 0
    check(x, way(x))


@dtypes
@pytest.mark.parametrize("size", [63, 64, 65, 257])
def test_blocks_are_put_together_right(dtype, size, draw, monkeypatch):
    monkeypatch.setattr(reduce, "_BLOCK", 16)
    monkeypatch.setattr(reduce, "_FAST_BLOCK", 64)
    x = draw(size).to(dtype)
    x[5] = 0
    check(x, _torch(x))
    x = (draw(size) + 1e4).to(dtype)
    check(x, _torch(x))
    x = (draw(size) * 1e-30).to(dtype)
    check(x, _torch(x))
    x[size - 1] = math.inf
    check(x, _torch(x))


@dtypes
@ways
def test_no_entries(way, dtype):
    got = statistics(way(torch.empty(0, 4, dtype=dtype)), np.array([0]))
    assert got["norm"][0] == 0
    assert got["nonfinite"][0] == 0
    assert all(math.isnan(got[name][0]) for name in ("mean", "std", "abs_max", "zero_fraction"))


def _layouts():
    base = torch.arange(2 * 6 * 4 * 5, dtype=torch.float64).sub(100).view(2, 6, 4, 5)
    deep = torch.arange(2 * 3 * 2 * 4 * 5, dtype=torch.float64).sub(100).view(2, 3, 2, 4, 5)
    return {
        "channels_last": base.to(memory_format=torch.channels_last),
        "channels_last_offset": base.to(memory_format=torch.channels_last)[1:],
        "channels_last_3d": deep.to(memory_format=torch.channels_last_3d),
        "transposed": base.transpose(1, 3),
        "expanded": base[:, :1, :, :1].expand(2, 6, 4, 5),
        "one_value_expanded": torch.tensor([-3.0], dtype=torch.float64).expand(7),
        "strided": base[:, ::2, 1:, ::3],
        "strided_1d": base.view(-1)[3::7],
        "scalar": torch.tensor(-2.5, dtype=torch.float64),
        "one_channel": base[:, :1].to(memory_format=torch.channels_last),
    }


@dtypes
@ways
@pytest.mark.parametrize("layout", _layouts())
def test_layouts(way, dtype, layout):
    x = _layouts()[layout].to(dtype)  # keeps strides
    check(x, way(x))


def test_flat_view_of_channels_last_is_no_copy():
    x = _layouts()["channels_last_offset"]
    assert flat_view(x).data_ptr() == x.data_ptr()
    assert sorted(flat_view(x).tolist()) == sorted(x.reshape(-1).tolist())


VALUES = {
    "subnormal_float32": (torch.float32, 1e-42),
    "square_underflows_float32": (torch.float32, 1e-38),
    "square_underflows_partly_float32": (torch.float32, 1e-22),
    "square_overflows_float32": (torch.float32, 1e38),
    "sum_overflows_float32": (torch.float32, 3e38),
    "square_underflows_float16": (torch.float16, 1e-6),
    "square_overflows_float16": (torch.float16, 4000.0),
    "tiny_bfloat16": (torch.bfloat16, 1e-38),
    "huge_bfloat16": (torch.bfloat16, 1e38),
    "square_underflows_float64": (torch.float64, 1e-200),
    "square_overflows_float64": (torch.float64, 1e200),
    "sum_overflows_float64": (torch.float64, 1e305),
}


@ways
@pytest.mark.parametrize("case", VALUES)
@pytest.mark.parametrize("signs", ["mixed", "same"])
def test_whole_range_of_the_dtype(way, case, signs):
    dtype, size = VALUES[case]
    x = torch.full((1000,), size, dtype=dtype)
    x[1::2] *= 0.75
    if signs == "mixed":
        x[::3] *= -1
    assert torch.isfinite(x).all()
    check(x, way(x))


@ways
def test_entries_of_very_different_size(way):
    x = torch.tensor([1e-30, 1e-45, 0.0, 1e30, -3e38], dtype=torch.float32)
    check(x, way(x))
    x = torch.cat([torch.full((1000,), 1e-24), torch.full((1,), 1e-13)])  # norm near where squares stop being safe
    check(x, way(x))


NONFINITE = {
    "nan": [math.nan],
    "inf": [math.inf],
    "minus_inf": [-math.inf],
    "both_inf": [math.inf, -math.inf],
    "all_kinds": [math.nan, math.inf, -math.inf, math.nan],
}


@dtypes
@ways
@pytest.mark.parametrize("case", NONFINITE)
def test_nonfinite_entries_are_counted(way, dtype, case, draw):
    x = draw(100).to(dtype)
    x[7] = 0
    for place, value in enumerate(NONFINITE[case]):
        x[10 + 20 * place] = value
    rows = way(x)
    got = {name: value[0] for name, value in statistics(rows, np.array([100])).items()}
    want = reference(x)
    assert got["nonfinite"] == want["nonfinite"] == len(NONFINITE[case])
    assert got["zero_fraction"] == 0.01
    for name in ("mean", "norm", "abs_max"):
        assert got[name] == pytest.approx(want[name], nan_ok=True), name
    assert not math.isfinite(got["std"])


@dtypes
@ways
def test_all_entries_nan(way, dtype):
    got = statistics(way(torch.full((9,), math.nan, dtype=dtype)), np.array([9]))
    assert got["nonfinite"][0] == 9
    assert math.isnan(got["norm"][0])


@dtypes
@ways
def test_all_zeros(way, dtype):
    x = torch.zeros(4, 5, dtype=dtype)
    x[0] = -0.0
    rows = way(x)
    check(x, rows)
    assert statistics(rows, np.array([20]))["norm"][0] == 0


@ways
@pytest.mark.parametrize("mean", [3.0, 25.0, 1e4, -1e4])
def test_std_where_the_mean_is_much_larger(way, mean, draw):
    x = (draw(200_000) + mean).float()
    check(x, way(x))


@ways
def test_std_is_the_population_one(way):
    assert statistics(way(torch.tensor([1.0, 3.0])), np.array([2]))["std"][0] == pytest.approx(1.0)


@ways
@dtypes
def test_std_of_a_constant_is_nearly_nothing(way, dtype):
    x = torch.full((999,), 0.1, dtype=dtype)
    assert statistics(way(x), np.array([999]))["std"][0] <= 1e-7 * 0.1


@dtypes
@pytest.mark.parametrize("size", [1e-38, 1e-24, 1.0, 3e38, 0.0])
@pytest.mark.parametrize("options", [{"norm_only": True}, {"moments": False}], ids=["norm_only", "no_moments"])
def test_less_than_everything(dtype, size, options, draw):
    x = (draw(321) * min(size, 1e37)).to(dtype)
    rows = np.array([cpu_row(x, **options)])
    assert rows.shape == (1, len(ROW))
    got, want = statistics(rows, np.array([321])), reference(x)
    assert got["norm"][0] == pytest.approx(want["norm"], rel=2e-6)
    assert got["nonfinite"][0] == want["nonfinite"]  # fp16 has turned 3e37 into Inf
    if "moments" in options:
        assert got["abs_max"][0] == want["abs_max"]
        assert got["zero_fraction"][0] == want["zero_fraction"]


@dtypes
@pytest.mark.parametrize("options", [{"norm_only": True}, {"moments": False}], ids=["norm_only", "no_moments"])
def test_nonfinite_is_counted_without_moments_too(dtype, options, draw):
    x = draw(50).to(dtype)
    x[3], x[4], x[5] = math.nan, math.inf, -math.inf
    got = statistics(np.array([cpu_row(x, **options)]), np.array([50]))
    assert got["nonfinite"][0] == 3
    assert math.isnan(got["norm"][0])


@pytest.mark.parametrize(
    ("tensor", "able"),
    [
        (torch.ones(2), True),
        (torch.ones(2, dtype=torch.bfloat16), True),
        (torch.ones(2, dtype=torch.int64), False),
        (torch.ones(2, dtype=torch.complex64), False),
        (torch.ones(2).to(torch.float8_e4m3fn), False),
        (torch.eye(2).to_sparse(), False),
    ],
    ids=["float32", "bfloat16", "int", "complex", "float8", "sparse"],
)
def test_what_can_be_reduced(tensor, able):
    assert can_reduce(tensor) is able


def test_input_is_left_alone(draw):
    for x in (draw(100).float(), (draw(100) * 1e-30).float(), draw(100).half(), draw(100) * 1e200):
        before, version = x.clone(), x._version
        cpu_row(x)
        cpu_row(x, norm_only=True)
        device_row(x)
        assert torch.equal(x, before)
        assert x._version == version


def test_device_without_float64_scales_before_it_squares():
    """On MPS the squares of a bfloat16 of 1e-30 were 0 in float32."""
    assert not reduce.range_holds_squares(torch.bfloat16, torch.float32)
    assert not reduce.range_holds_squares(torch.float16, torch.float32)
    assert not reduce.range_holds_squares(torch.float64, torch.float64)
    assert reduce.range_holds_squares(torch.float32, torch.float64)
