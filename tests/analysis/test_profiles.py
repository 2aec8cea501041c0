"""Profiles over depth from small frames with known answers, and the path split against autograd."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from gradlab.analysis.profiles import (
    block_gradients,
    end_ratios,
    final_losses,
    layer_responses,
    path_gradients,
    record_window,
)
from gradlab.errors import DataError, UsageError

BY = ("net", "seed")


def layer_rows(norms, **keys):
    """Rows of trace.layers: layer -> gradient norm, in order of execution."""
    rows = [{"layer": name, "order": place, "grad_norm": norm} for place, (name, norm) in enumerate(norms.items())]
    return pd.DataFrame(rows).assign(**keys)


@pytest.mark.parametrize(
    "call",
    [
        lambda empty: record_window(empty, "last"),
        lambda empty: block_gradients(empty, BY),
        lambda empty: end_ratios(empty, BY),
        lambda empty: final_losses(empty, BY, 2),
        lambda empty: layer_responses(empty, BY),
        lambda empty: path_gradients(empty, BY),
    ],
    ids=["record_window", "block_gradients", "end_ratios", "final_losses", "layer_responses", "path_gradients"],
)
def test_nothing_recorded_is_one_sentence(call):
    with pytest.raises(DataError, match=r"^No finished cell .*\.$"):
        call(pd.DataFrame())


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (block_gradients, "the outputs of blocks"),
        (layer_responses, "a net with BatchNorm"),
        (path_gradients, "a residual net"),
    ],
    ids=["block_gradients", "layer_responses", "path_gradients"],
)
def test_other_layers_only_is_one_sentence(call, what):
    frame = layer_rows({"head.linear": 1.0}, net="plain", seed=0, kind="Linear")
    with pytest.raises(DataError, match=f"No finished cell recorded {what}"):
        call(frame, BY)


# -- record_window ----------------------------------------------------------------------------------------------------


def test_each_cell_has_its_own_first_and_last_step():
    frame = pd.DataFrame({"cell": list("aaabb"), "step": [0, 3, 9, 0, 5], "value": range(5)})
    assert record_window(frame, "first")["value"].tolist() == [0, 3]
    assert record_window(frame, "last")["value"].tolist() == [2, 4]


def test_another_step_is_one_sentence():
    with pytest.raises(UsageError, match=r"Unknown recorded step 'lst'. Did you mean 'last'\?"):
        record_window(pd.DataFrame({"cell": ["a"], "step": [0]}), "lst")


# -- block_gradients --------------------------------------------------------------------------------------------------


def test_blocks_in_order_of_execution_and_their_ratio_to_the_last():
    # Twelve blocks, so that an order by name would put stages.0.10 before stages.0.2.
    norms = {"stem.conv": 7.0, "stem.relu": 10.0}
    for place in range(12):
        norms |= {f"stages.0.{place}.branch.relu": 5.0, f"stages.0.{place}.activation": 10.0 ** (place - 11)}
    both = [
        layer_rows(norms, net="plain", seed=1),
        layer_rows({"stem.relu": 4.0, "stages.0.0.activation": 2.0}, net="residual", seed=0),
    ]
    frame = pd.concat(both).sample(frac=1, random_state=0)  # rows come in any order
    tidy = block_gradients(frame, BY)
    assert list(tidy.columns) == ["net", "seed", "layer", "block", "grad_norm", "log10_ratio"]
    plain = tidy[tidy["net"] == "plain"]
    assert plain["block"].tolist() == list(range(13))
    assert plain["layer"].tolist() == ["stem.relu"] + [f"stages.0.{place}.activation" for place in range(12)]
    np.testing.assert_allclose(plain["log10_ratio"], [1, *range(-11, 1)], atol=1e-12)
    np.testing.assert_allclose(tidy[tidy["net"] == "residual"]["log10_ratio"], [math.log10(2), 0])
    ratios = end_ratios(tidy, BY)
    assert ratios.values.tolist() == [["plain", 1, pytest.approx(-11)], ["residual", 0, 0.0]]


def test_a_vanished_gradient_is_minus_infinity_and_no_warning():
    frame = layer_rows({"stem.relu": 0.0, "stages.0.0.activation": 0.0, "stages.0.1.activation": 1.0}, net="p", seed=0)
    assert block_gradients(frame, BY)["log10_ratio"].tolist() == [-math.inf, -math.inf, 0.0]


def test_a_last_norm_that_is_nan_makes_every_ratio_nan():
    # pandas' "last" passes over NaN and would divide by another block.
    frame = layer_rows(
        {"stem.relu": 1.0, "stages.0.0.activation": 2.0, "stages.0.1.activation": math.nan}, net="p", seed=0
    )
    assert block_gradients(frame, BY)["log10_ratio"].isna().all()


# -- final_losses -----------------------------------------------------------------------------------------------------


def test_final_losses():
    def run(losses, status, **keys):
        return pd.DataFrame({"step": range(len(losses)), "loss": losses}).assign(status=status, **keys)

    frame = pd.concat([
        run([9.0, 3.0, 1.0, 2.0], "done", net="a", seed=0),
        run([4.0, 5.0], "done", net="a", seed=1),
        run([2.0, 2.0, math.nan], "diverged", net="b", seed=0),
        run([math.inf], "diverged", net="b", seed=1),
    ])  # fmt: skip
    out = final_losses(frame, BY, window=3)
    assert out.values.tolist() == [["a", 0, 2.0], ["a", 1, 4.5], ["b", 0, math.inf], ["b", 1, math.inf]]
    assert list(out.columns) == ["net", "seed", "loss"]
    assert final_losses(frame, BY, window=1)["loss"].tolist() == [2.0, 5.0, math.inf, math.inf]


# -- layer_responses --------------------------------------------------------------------------------------------------


def test_layer_responses():
    names = ["stem.norm", "stages.0.0.branch.norm1", "stages.0.0.branch.norm2", "stages.0.1.branch.norm1"]
    frame = layer_rows(dict.fromkeys(names, 1.0), net="p", seed=0).assign(
        kind="BatchNorm2d", act_std=[1.0, 2.0, 3.0, 4.0]
    )
    other = layer_rows({"head.linear": 1.0}, net="p", seed=0).assign(kind="Linear", act_std=9.0)
    tidy = layer_responses(pd.concat([other, frame.iloc[::-1]]), BY)
    assert tidy["layer"].tolist() == names
    assert tidy["place"].tolist() == [1, 2, 3, 4]
    assert tidy["second"].tolist() == [False, False, True, False]
    assert tidy["std"].tolist() == [1.0, 2.0, 3.0, 4.0]


# -- path_gradients ---------------------------------------------------------------------------------------------------


def residual_rows(*blocks, stem=2.0, **keys):
    """One stage; each block is (norm through the branch, through the skip, at its output)."""
    norms = {"stem.relu": stem}
    for place, (branch, skip, end) in enumerate(blocks):
        name = f"stages.0.{place}"
        norms |= {
            f"{name}.to_branch": branch,
            f"{name}.branch.relu": 99.0,
            f"{name}.to_skip": skip,
            f"{name}.activation": end,
        }
    return layer_rows(norms, **{"net": "residual", "seed": 0} | keys)


def test_paths_on_a_frame():
    frame = pd.concat([residual_rows((3.0, 4.0, 10.0), (1.0, 0.0, 1.0)), residual_rows((0.0, 2.0, 5.0), seed=1)])
    plain = layer_rows({"stem.relu": 1.0, "stages.0.0.activation": 1.0}, net="plain", seed=0)
    tidy = path_gradients(pd.concat([plain, frame]).sample(frac=1, random_state=1), BY)
    assert list(tidy.columns) == ["net", "seed", "block", "skip", "branch", "branch_share"]
    expected = [
        ["residual", 0, 1, 2.0, 1.5, 9 / 25],
        ["residual", 0, 2, 0.0, 0.1, 1.0],
        ["residual", 1, 1, 1.0, 0.0, 0.0],
    ]
    for row, wanted in zip(tidy.values.tolist(), expected, strict=True):
        assert row[:3] == wanted[:3]
        assert row[3:] == pytest.approx(wanted[3:], abs=1e-12)


def test_more_than_ten_blocks_stay_in_order():
    tidy = path_gradients(residual_rows(*((1.0, 1.0, 10.0 + place) for place in range(12))), BY)
    np.testing.assert_allclose(1 / tidy["skip"], [2, *range(10, 21)])


def test_squares_of_tiny_norms_do_not_underflow():
    tidy = path_gradients(residual_rows((3e-200, 4e-200, 1.0), stem=5e-200), BY)
    assert tidy["branch_share"].tolist() == pytest.approx([9 / 25])


def test_a_nan_norm_stays_with_its_own_block():
    tidy = path_gradients(residual_rows((1.0, 1.0, math.nan), (1.0, 1.0, 4.0), (1.0, 1.0, 1.0)), BY)
    np.testing.assert_array_equal(tidy["skip"], [0.5, math.nan, 0.25])


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_paths_agree_with_autograd(norm):
    torch = pytest.importorskip("torch")
    from gradlab.measure.initialization import gradient_profile, initialized
    from gradlab.nets import CifarNet

    def make():
        return initialized(CifarNet(14, width=3, in_channels=1, norm=norm), "he_normal", seed=4)

    x = torch.randn(6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layers = gradient_profile(make(), x, seed=7).layers.assign(net="residual", seed=0)
    tidy = path_gradients(layers, BY)

    # The same net by hand: each block reads two copies of its input, whose gradients are the two paths.
    net, copies = make().train(), []
    h = net.stem(x)
    shortcuts = []
    for blocks in net.stages:
        for block in blocks:
            to_branch, to_skip = h * 1, h * 1
            for tensor in (h, to_branch, to_skip):
                tensor.retain_grad()
            copies.append((h, to_branch, to_skip))
            shortcuts.append(type(block.shortcut).__name__)
            skip = to_skip if block.shortcut is None else block.shortcut(to_skip)
            h = (block.branch(to_branch) + skip).relu()
    noise = torch.randn(h.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (h * noise).sum().backward()

    assert shortcuts.count("OptionA") == 2  # where stages meet
    assert tidy["block"].tolist() == list(range(1, len(copies) + 1))
    for row, (total, branch, skip) in zip(tidy.itertuples(), copies, strict=True):
        whole = float(total.grad.norm())
        assert row.branch == pytest.approx(float(branch.grad.norm()) / whole, rel=1e-10)
        assert row.skip == pytest.approx(float(skip.grad.norm()) / whole, rel=1e-10)
        cross = 2 * float((branch.grad * skip.grad).sum()) / whole**2
        assert row.skip**2 + row.branch**2 + cross == pytest.approx(1.0, rel=1e-10)
