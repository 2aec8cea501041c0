"""The five families: exact sizes, the papers written out, a watched step on the meta device, clear errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import gradlab as gl
from gradlab.errors import UsageError
from gradlab.measure.families import trunk_pieces
from gradlab.nets import (
    FAMILIES,
    GROWTHS,
    INITIALIZATIONS,
    PUBLISHED,
    ConvNet,
    alexnet,
    densenet,
    googlenet,
    growth_stack,
    initialize,
    loss_with_heads,
    parameter_count,
    published_net,
    resnet,
    small_net,
    vgg,
)
from gradlab.nets.imagenet_googlenet import INCEPTIONS, Inception

COUNTS = {
    "AlexNet": 60_965_224, "AlexNet one tower": 62_378_344, "VGG-11": 132_863_336, "VGG-13": 133_047_848,
    "VGG-16": 138_357_544, "VGG-19": 143_667_240, "GoogLeNet": 6_998_552, "GoogLeNet with heads": 13_378_280,
    "ResNet-18": 11_689_512, "ResNet-34": 21_797_672, "ResNet-50": 25_557_032, "ResNet-101": 44_549_160,
    "ResNet-152": 60_192_808, "DenseNet-121": 7_978_856, "DenseNet-169": 14_149_480, "DenseNet-201": 20_013_928,
}  # fmt: skip


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_counts_cover_every_published_net() -> None:
    assert [net for nets in PUBLISHED.values() for net in nets] == list(COUNTS)


@pytest.mark.parametrize("name", COUNTS, ids=str)
def test_parameters_are_exactly_the_paper_s(name: str) -> None:
    with torch.device("meta"):
        assert parameter_count(published_net(name)) == COUNTS[name]


def test_parameters_of_the_parts_by_hand() -> None:
    with torch.device("meta"):
        net = alexnet()
        linear = sum(m.weight.numel() + m.bias.numel() for m in net.modules() if isinstance(m, nn.Linear))
        assert linear == 9216 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000
        assert linear / COUNTS["AlexNet"] == pytest.approx(0.962, abs=5e-4)
        assert parameter_count(vgg(16).trunk) - parameter_count(vgg(16).trunk.linear1) - 4096 * 4097 == 14_714_688
        assert parameter_count(googlenet()) - 1024 * 1000 - 1000 == 5_973_552
        assert parameter_count(Inception(192, INCEPTIONS["3a"])) == 163_696
        assert parameter_count(Inception(480, INCEPTIONS["4a"])) == 376_176


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("AlexNet", {"conv1": 55, "pool1": 27, "conv2": 27, "pool2": 13, "conv5": 13, "pool5": 6}),
        ("VGG-16", {"conv1_2": 224, "pool1": 112, "conv5_3": 14, "pool5": 7}),
        ("GoogLeNet", {"conv1": 112, "pool1": 56, "pool2": 28, "inception4a": 14, "inception5b": 7}),
        ("ResNet-50", {"stem": 112, "pool": 56, "block1_3": 56, "block2_1": 28, "block4_3": 7}),
        ("DenseNet-121", {"stem": 112, "dense1_6": 56, "transition1": 28, "dense4_16": 7}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_maps_have_the_sides_of_the_paper_s_table(name: str, sides: dict[str, int]) -> None:
    found = {}
    with torch.device("meta"):
        net, x = published_net(name), torch.empty(1, 3, 224, 224)
        for piece, module in net.trunk.named_children():
            x = module(x)
            found[piece] = x.shape[-1]
    assert {piece: found[piece] for piece in sides} == sides


def block_by_hand(state: dict[str, Tensor], x: Tensor, widths: tuple[int, ...]) -> Tensor:
    """An inception block as one function of its weights."""

    def conv(name: str, h: Tensor) -> Tensor:
        weight, bias = state[f"{name}.conv.weight"], state[f"{name}.conv.bias"]
        return functional.conv2d(h, weight, bias, padding=weight.shape[-1] // 2).clamp(min=0)

    pooled = functional.max_pool2d(x, 3, 1, 1)
    branches = [
        conv("one", x),
        conv("three.conv", conv("three.reduce", x)),
        conv("five.conv", conv("five.reduce", x)),
        conv("pool.project", pooled),
    ]
    assert [branch.shape[1] for branch in branches] == [widths[0], widths[2], widths[4], widths[5]]
    assert state["five.conv.conv.weight"].shape[-1] == 5
    return torch.cat(branches, 1)


def test_inception_is_the_paper_s_figure_written_out() -> None:
    widths = (3, 2, 4, 2, 5, 2)
    block = Inception(6, widths).double()
    x = normal(2, 6, 5, 5)
    torch.testing.assert_close(block(x), block_by_hand(block.state_dict(), x, widths), rtol=1e-12, atol=1e-12)


def test_two_towers_of_alexnet_meet_in_conv3_and_the_linear_layers_only() -> None:
    net = alexnet(narrow=16, side=63)
    groups = {name: piece.conv.groups for name, piece in net.trunk.named_children() if name.startswith("conv")}
    assert groups == {"conv1": 1, "conv2": 2, "conv3": 1, "conv4": 2, "conv5": 2}
    x = normal(1, net.trunk.conv2.conv.in_channels, 6, 6).float()
    other = x.clone()
    other[:, x.shape[1] // 2 :] += 1  # the second tower's channels
    first, second = (net.trunk.conv2.conv(h) for h in (x, other))
    half = first.shape[1] // 2
    assert torch.equal(first[:, :half], second[:, :half])
    assert not torch.equal(first[:, half:], second[:, half:])


def test_growth_stacks_are_their_formulas() -> None:
    x = normal(2, 1, 6, 6)
    for growth in GROWTHS:
        net = initialize(growth_stack(growth, 3, width=4, added=2).double(), "he_normal", seed=1)
        state = net.state_dict()
        h = functional.conv2d(x, state["trunk.stem.weight"], state["trunk.stem.bias"], padding=1)
        for layer in range(1, 4):
            weight, bias = (state[f"trunk.layer{layer}.branch.conv.{name}"] for name in ("weight", "bias"))
            f = functional.conv2d(h.clamp(min=0), weight, bias, padding=1)
            h = {"plain": f, "residual": h + f if growth == "residual" else f, "dense": torch.cat([h, f], 1)}[growth]
        torch.testing.assert_close(net.features(x), h.clamp(min=0), rtol=1e-12, atol=1e-12)


def test_dense_blocks_grow_and_transitions_halve() -> None:
    with torch.device("meta"):
        net, x, channels = densenet(121), torch.empty(1, 3, 64, 64), {}
        for name, piece in net.trunk.named_children():
            x = piece(x)
            channels[name] = x.shape[1]
    assert [channels[f"dense{block}_{n}"] for block, n in ((1, 6), (2, 12), (3, 24), (4, 16))] == [256, 512, 1024, 1024]
    assert [channels[f"transition{block}"] for block in (1, 2, 3)] == [128, 256, 512]


def test_heads_answer_while_training_only_and_weigh_03() -> None:
    net = small_net("googlenet", heads=True, narrow=32).double()
    x, y = normal(3, 1, 8, 8), torch.tensor([0, 1, 2])
    outputs = net(x)
    assert len(outputs) == 3
    cross = [functional.cross_entropy(logits, y) for logits in outputs]
    torch.testing.assert_close(loss_with_heads(outputs, y), cross[0] + 0.3 * (cross[1] + cross[2]))
    plain = small_net("googlenet", narrow=32).double()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("heads")})
    torch.testing.assert_close(net.eval()(x), plain(x))
    torch.testing.assert_close(loss_with_heads(plain(x), y), cross[0])


# -- watched on the meta device: any synchronization with the host would raise ------------------------------------

# On meta a recorded tensor costs 5 ms of Python, whatever its size: parameters are recorded where they are few.
FEW_PARAMETERS = ("AlexNet", "VGG-11", "ResNet-18", "alexnet none", "alexnet batch", "resnet batch")

SMALL: dict[str, dict[str, Any]] = {
    **{f"{family} {norm}": {"family": family, "norm": norm} for family in FAMILIES for norm in ("batch", "none")},
    "alexnet dropout": {"family": "alexnet", "dropout": 0.5},
    "googlenet heads": {"family": "googlenet", "heads": True},
    "vgg tanh": {"family": "vgg", "activation": "tanh"},
}


def watched_step(net: ConvNet, x: Tensor, name: str, layers: Any = trunk_pieces) -> None:
    """A whole watched training step; every piece must leave a row, and every parameter a gradient."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    labels = torch.empty(len(x), dtype=torch.long, device=x.device)
    with gl.watch(net, optimizer if name in FEW_PARAMETERS else None, layers=layers) as probe:
        optimizer.zero_grad()
        loss = loss_with_heads(net(x), labels)
        loss.backward()
        probe.log(loss=loss)
        optimizer.step()
    rows = probe.trace.layers
    assert set(rows["layer"]) >= {f"trunk.{name}" for name, _ in net.trunk.named_children()}
    assert rows["grad_norm"].isna().all()  # on meta there are no values
    assert len(probe.trace.params) == (len(list(net.parameters())) if name in FEW_PARAMETERS else 0)
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("name", COUNTS, ids=str)
def test_published_nets_train_watched_on_meta(name: str) -> None:
    with torch.device("meta"):
        net, x = published_net(name), torch.empty(2, 3, 224, 224)
    watched_step(net, x, name)


@pytest.mark.parametrize("name", SMALL, ids=str)
def test_small_nets_train_watched_on_meta(name: str) -> None:
    with torch.device("meta"):
        net, x = small_net(**SMALL[name]), torch.empty(4, 1, 8, 8)
    watched_step(net, x, name)


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("growth", GROWTHS, ids=str)
def test_stacks_train_watched_on_meta(growth: str, norm: str) -> None:
    with torch.device("meta"):
        net, x = growth_stack(growth, 3, norm=norm), torch.empty(4, 1, 8, 8)
    watched_step(net, x, growth, layers="all")


@pytest.mark.parametrize("side", [4, 8, 12, 32], ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_small_nets_take_every_side_from_four(family: str, side: int) -> None:
    with torch.device("meta"):
        assert small_net(family, side=side, in_channels=3)(torch.empty(2, 3, side, side)).shape == (2, 10)


@pytest.mark.parametrize("scheme", INITIALIZATIONS, ids=str)
def test_every_weight_of_a_small_net_is_drawn_anew(scheme: str) -> None:
    nets = [initialize(small_net("resnet", narrow=32), scheme, seed=seed) for seed in (0, 0, 1)]
    for a, b, c in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(a, b)
        assert scheme != "default" or a.ndim == 1 or not torch.equal(a, c)


# -- bad input -----------------------------------------------------------------------------------------------------

BAD = {
    "alexnet small": (lambda: alexnet(side=62), "at least 63 pixels a side; got 62"),
    "vgg small": (lambda: vgg(16, side=31), "VGG-16 needs images of at least 32 pixels a side; got 31"),
    "small net small": (lambda: small_net("vgg", side=3), "at least 4 pixels a side; got 3"),
    "vgg variant": (lambda: vgg(15), "There is no VGG-15: its published depths are 11, 13, 16, 19"),
    "resnet variant": (lambda: resnet(20), "There is no ResNet-20: its published depths are 18, 34, 50"),
    "densenet variant": (lambda: densenet(122), "There is no DenseNet-122"),
    "towers": (lambda: alexnet(towers=3), "'towers' is 3, but AlexNet has 1 or 2"),
    "family": (lambda: small_net("vggg"), "Unknown family 'vggg'. Did you mean 'vgg'"),
    "net": (lambda: published_net("ResNet-51"), "Unknown net 'ResNet-51'. Did you mean 'ResNet-50'"),
    "growth": (lambda: growth_stack("dens", 3), "Unknown growth 'dens'. Did you mean 'dense'"),
    "norm": (lambda: resnet(18, norm="bach"), "Unknown norm 'bach'. Did you mean 'batch'"),
    "activation": (lambda: small_net("densenet", activation="relo"), "Unknown activation 'relo'"),
    "narrow": (lambda: densenet(121, narrow=0), "'narrow' is 0"),
    "classes": (lambda: googlenet(classes=-1), "'classes' is -1"),
    "depth": (lambda: growth_stack("plain", 0), "'depth' is 0"),
    "dropout": (lambda: alexnet(dropout=1.0), "'dropout' is 1.0, but must be at least 0 and below 1"),
    "dropout nowhere": (lambda: small_net("resnet", dropout=0.5), "'resnet' has none"),
    "heads nowhere": (lambda: small_net("vgg", heads=True), "Auxiliary heads belong to googlenet"),
}


@pytest.mark.parametrize(("build", "sentence"), BAD.values(), ids=BAD.keys())
def test_bad_settings_are_one_sentence(build: Any, sentence: str) -> None:
    with torch.device("meta"), pytest.raises(UsageError) as error:
        build()
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("build", "shape", "sentence"),
    [
        (resnet, (1, 3, 31, 31), "at least 32 pixels"),
        (densenet, (1, 3, 16, 224), "at least 32 pixels"),
        (googlenet, (1, 3, 31, 40), "at least 32 pixels"),
        (lambda: googlenet(heads=True), (1, 3, 64, 64), "exactly 224 pixels, and can be built for 224 or more"),
        (alexnet, (1, 3, 64, 64), "exactly 224 pixels, and can be built for 63 or more"),
        (vgg, (1, 3, 32, 32), "exactly 224 pixels, and can be built for 32 or more"),
        (resnet, (1, 1, 64, 64), "takes (N, 3, H, W)"),
        (lambda: small_net("densenet"), (1, 1, 3, 8), "at least 4 pixels"),
    ],
    ids=["resnet", "densenet", "googlenet", "heads", "alexnet", "vgg", "channels", "small"],
)
def test_images_that_do_not_fit_are_one_sentence(build: Any, shape: tuple[int, ...], sentence: str) -> None:
    with torch.device("meta"):
        net, x = build(), torch.empty(shape)
        with pytest.raises(UsageError) as error:
            net(x)
    assert sentence in str(error.value)
