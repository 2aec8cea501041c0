from __future__ import annotations

import math

import numpy as np
import pytest

from gradlab.analysis.block_theory import block_theory


@pytest.mark.parametrize(
    ("net", "gain"),
    [
        ("plain, BatchNorm", math.sqrt(math.pi / (math.pi - 1))),
        ("plain, He", 1.0),
        ("plain, torch default", math.sqrt(1 / 6)),
    ],
    ids=["BatchNorm", "He", "torch default"],
)
def test_plain_lines_have_the_gain_of_two_layers_a_block(net: str, gain: float) -> None:
    found = block_theory(net, 56)
    assert found is not None
    np.testing.assert_allclose(np.diff(found.log10_ratio), -2 * math.log10(gain), atol=1e-12)
    assert found.log10_ratio[-1] == 0
    assert np.isnan(found.branch_share).all()


def test_zero_padding_loses_what_a_naive_count_over_pixels_says() -> None:
    found = block_theory("plain, He", 14, 9)  # odd, so that a strided side is not half
    assert found is not None
    sides = [9, 9, 9, 5, 5, 3, 3]
    energy = np.ones((3, 3))
    norms = [1.0]
    for block in range(5, -1, -1):
        for stride, side in ((1, sides[block + 1]), (2 if sides[block] != sides[block + 1] else 1, sides[block])):
            spread = np.zeros((side, side))
            for (row, column), value in np.ndenumerate(energy):
                for down in (-1, 0, 1):
                    for right in (-1, 0, 1):
                        y, x = stride * row + down, stride * column + right
                        if 0 <= y < side and 0 <= x < side:
                            spread[y, x] += value / 9
            energy = spread
        norms.append(math.sqrt(energy.sum() / 9))
    np.testing.assert_allclose(10**found.log10_ratio, norms[::-1], rtol=1e-12)


@pytest.mark.parametrize("side", [32, 8], ids=str)
def test_deep_in_a_stage_zero_padding_has_the_rate_of_the_leading_mode(side: int) -> None:
    found = block_theory("plain, He", 1202, side)
    assert found is not None
    rate = (1 + 2 * math.cos(math.pi / (side + 1))) / 3
    assert np.diff(found.log10_ratio)[0] == pytest.approx(-2 * math.log10(rate), rel=1e-4)


def test_first_stage_of_residual_batchnorm_follows_spitzers_formula() -> None:
    # The walk is max(0, S_1, ..., S_n) in law; Spitzer 1956 gives its first two moments in closed form.
    found = block_theory("residual, BatchNorm", 110)
    assert found is not None
    for block in (1, 2, 5, 10, 18):
        k = np.arange(1, block + 1)
        mean = (1 / np.sqrt(2 * math.pi * k)).sum()
        pairs = sum(1 / math.sqrt(i * j) for i in k for j in k if i + j <= block)
        variance = block / 2 + pairs / (2 * math.pi) - mean**2
        ratio = math.pi / (math.pi - 1) / variance
        assert found.branch_share[block - 1] == pytest.approx(ratio / (1 + ratio), rel=0.03)


def test_skipinit_is_flat_but_for_the_zeros_of_the_stem_and_new_channels() -> None:
    found = block_theory("residual, SkipInit", 20)
    assert found is not None
    np.testing.assert_array_equal(found.branch_share, 0)
    # A quarter of the last channels come from the stem, and half of its ReLUs are open.
    np.testing.assert_allclose(10 ** found.log10_ratio[:-1], math.sqrt(1 / 8), rtol=0.02)


@pytest.mark.parametrize(
    ("net", "norm"), [("residual, BatchNorm", "batch"), ("residual, He", "none")], ids=["BatchNorm", "He"]
)
def test_residual_recursion_agrees_with_a_wide_net(net: str, norm: str) -> None:
    torch = pytest.importorskip("torch")
    from gradlab.analysis import profiles
    from gradlab.measure.initialization import gradient_profile, initialized
    from gradlab.nets import CifarNet

    shares, ratios = [], []
    for seed in range(3):
        x = torch.randn(16, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        model = initialized(CifarNet(20, norm=norm, width=32, padding_mode="circular"), "he_normal", seed=seed)
        trace = gradient_profile(model, x, seed=seed, layers=["stem.relu", "stages.*.activation", "stages.*.to_*"])
        layers = trace.layers.assign(net=net)
        shares.append(profiles.path_gradients(layers, ["net"])["branch_share"].to_numpy())
        ratios.append(profiles.block_gradients(layers, ["net"])["log10_ratio"].to_numpy())
    found = block_theory(net, 20)
    assert found is not None
    np.testing.assert_allclose(np.mean(shares, axis=0), found.branch_share, atol=0.04)
    np.testing.assert_allclose(np.mean(ratios, axis=0), found.log10_ratio, atol=0.15)


@pytest.mark.parametrize("depth", [20, 1202], ids=str)
def test_deep_nets_stay_finite(depth: int) -> None:
    for net in ("plain, BatchNorm", "residual, BatchNorm", "residual, He", "residual, SkipInit"):
        found = block_theory(net, depth, 32)
        assert found is not None
        assert np.isfinite(found.log10_ratio).all()
        assert len(found.log10_ratio) == (depth - 2) // 2 + 1


@pytest.mark.parametrize(
    "net", ["plain, SkipInit", "dense, He", "residual, torch default", "plain"], ids=lambda net: net.replace(",", "")
)
def test_no_theory_is_none(net: str) -> None:
    assert block_theory(net, 20) is None
