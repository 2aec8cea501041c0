"""Geometry, receptive fields and gradients of architectures against arithmetic and autograd."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from gradlab.analysis.architecture_theory import receptive_fields, total_multiply_adds
from gradlab.errors import UsageError
from gradlab.measure.architectures import (
    block_savings,
    channels_of_pieces,
    cifar_maps,
    layer_geometry,
    measured_receptive_fields,
    trunk_maps,
)
from gradlab.measure.families import (
    evaluated_loss,
    family_gradients,
    growth_gradients,
    heads_gradients,
    loss_gradients,
    trunk_pieces,
)
from gradlab.nets import growth_stack, initialize, loss_with_heads, published_net, small_net

# Published by torchvision in 10^9 for the nets that are the same there, rounded to three decimals.
ADDS = {
    "VGG-11": 7.609, "VGG-13": 11.308, "VGG-16": 15.47, "VGG-19": 19.632, "ResNet-18": 1.814, "ResNet-34": 3.664,
    "DenseNet-121": 2.834, "DenseNet-169": 3.36, "DenseNet-201": 4.291,
}  # fmt: skip


@pytest.mark.parametrize(("net", "adds"), ADDS.items(), ids=ADDS.keys())
def test_multiply_adds_are_the_published_ones(net: str, adds: float) -> None:
    with torch.device("meta"):
        layers = layer_geometry(published_net(net).eval(), torch.zeros(1, 3, 224, 224))
    assert round(total_multiply_adds(layers.to_dict("records")) / 1e9, 3) == adds


def test_geometry_reads_groups_and_linear_layers() -> None:
    with torch.device("meta"):
        layers = layer_geometry(published_net("AlexNet").eval(), torch.zeros(1, 3, 224, 224)).set_index("layer")
    second, linear = layers.loc["trunk.conv2.conv"], layers.loc["trunk.linear1.linear"]
    assert (second["groups"], second["side"], second["kernel"], second["parameters"]) == (2, 27, 5, 307_456)
    assert (linear["kind"], linear["inputs"], linear["side"]) == ("linear", 9216, 1)
    assert layers["parameters"].sum() == 60_965_224


@pytest.mark.parametrize("net", ["AlexNet", "VGG-16", "GoogLeNet", "ResNet-18", "ResNet-50"])
def test_measured_fields_are_the_arithmetic_s_at_every_piece(net: str) -> None:
    narrow = published_net(net, narrow=64, **({"towers": 1} if net == "AlexNet" else {}))
    expected = receptive_fields(net)
    found = measured_receptive_fields(trunk_maps(narrow), places=list(expected))
    assert found == expected


@pytest.mark.parametrize("depth", [20, 56], ids=str)
def test_measured_fields_of_cifar_resnets(depth: int) -> None:
    last = {20: ("stage2_2", 81), 56: ("stage2_8", 249)}[depth]
    assert measured_receptive_fields(cifar_maps(depth), places=[last[0]], across=8) == dict([last])


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
def test_no_sign_norm_or_choice_hides_a_pixel(sign: float) -> None:
    pieces = OrderedDict(
        conv=nn.Conv2d(1, 2, 3, padding=1),
        norm=nn.BatchNorm2d(2),
        relu=nn.ReLU(),
        drop=nn.Dropout(0.9),
        pool=nn.MaxPool2d(3, 2, padding=1),
        last=nn.Conv2d(2, 1, 3, padding=1),
    )
    with torch.no_grad():
        pieces["conv"].weight.fill_(sign)
        pieces["last"].weight.zero_()
    assert measured_receptive_fields(pieces, in_channels=1)["last"] == 1 + 2 + 2 + 2 * 2
    assert not pieces["last"].weight.any()  # a copy was measured


def test_unbounded_fields_and_unknown_places_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradlab.measure.architectures._LARGEST", 256)
    with pytest.raises(UsageError, match="'0' does not end within 256 pixels"):
        measured_receptive_fields(nn.Sequential(nn.AdaptiveAvgPool2d(1)), in_channels=1)
    with pytest.raises(UsageError, match="Unknown piece 'conv9'"):
        measured_receptive_fields(nn.Sequential(nn.Conv2d(1, 1, 3)), in_channels=1, places=["conv9"])


def test_savings_are_counted_on_modules() -> None:
    table = block_savings(width=8).set_index("block")
    assert table.loc["two 3x3", "parameters"] / table.loc["two 3x3", "plain"] == 0.72
    assert table.loc["inception 4a"].tolist() == [376_176, 1_597_952]
    assert table.loc["5x5 branch of 3a"].tolist() == [15_872, 153_600]
    assert table.loc["bottleneck 256"].tolist() == [69_632, 1_179_648]


def test_channels_of_a_dense_net() -> None:
    with torch.device("meta"):
        table = channels_of_pieces(published_net("DenseNet-121"), torch.zeros(1, 3, 64, 64)).set_index("piece")
    assert table.loc[["pool", "dense1_6", "transition1"], "channels"].tolist() == [64, 256, 128]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_loss_gradients_equal_retain_grad_in_float64() -> None:
    def make() -> nn.Module:
        return initialize(growth_stack("dense", 3, width=3, added=2).double(), "default", seed=4)

    x, y = normal(5, 1, 6, 6), torch.arange(5)
    trace = loss_gradients(make(), x, y, loss=functional.cross_entropy, layers=trunk_pieces)
    net, h, kept = make(), x, {}
    for name, piece in net.trunk.named_children():
        h = piece(h)
        h.retain_grad()
        kept[f"trunk.{name}"] = h
    functional.cross_entropy(net.head(h), y).backward()
    found = dict(zip(trace.layers["layer"], trace.layers["grad_norm"], strict=True))
    assert found == pytest.approx({name: float(tensor.grad.norm()) for name, tensor in kept.items()}, rel=1e-12)


def test_growth_traces_name_kind_and_depth() -> None:
    trace = growth_gradients(normal(4, 1, 4, 4), torch.arange(4), depths=(1, 2), norm="batch", width=2, added=1, seed=0)
    stems = trace.layers[trace.layers["layer"] == "trunk.stem"]
    assert len(stems) == 6
    assert set(stems["growth"]) == {"plain", "residual", "dense"}


def test_heads_change_the_gradient_and_not_the_weights() -> None:
    x, y = normal(4, 1, 8, 8), torch.arange(4)
    trace = heads_gradients(x, y, norm="none", inits=("default",), narrow=32, seed=3)
    first = trace.params[trace.params["param"] == "trunk.conv2.conv.weight"].set_index("heads")
    assert first.loc[True, "weight_norm"] == first.loc[False, "weight_norm"]
    net = initialize(small_net("googlenet", heads=True, narrow=32).double(), "default", seed=3)
    for heads in (False, True):
        net.zero_grad()
        outputs = net(x)
        (loss_with_heads(outputs, y) if heads else functional.cross_entropy(outputs[0], y)).backward()
        norm = float(net.trunk.conv2.conv.weight.grad.norm())
        assert first.loc[heads, "grad_norm"] == pytest.approx(norm, rel=1e-12)


def test_family_gradients_take_each_key() -> None:
    keys = [{"activation": "relu", "init": init, "dropout": 0.0} for init in ("default", "he_normal")]
    trace = family_gradients("alexnet", normal(4, 1, 8, 8), keys, norm="none", narrow=32, seed=0)
    ends = trace.layers[trace.layers["layer"].isin(["trunk.conv1", "trunk.linear2"])]
    norms = ends.set_index(["init", "layer"])["grad_norm"]
    ratio = {init: norms[init, "trunk.conv1"] / norms[init, "trunk.linear2"] for init in ("default", "he_normal")}
    assert ratio["default"] < 0.1 * ratio["he_normal"]


def test_evaluated_loss_is_the_mean_without_dropout_and_leaves_the_mode() -> None:
    net = small_net("alexnet", dropout=0.5, narrow=32).train()
    x, y = normal(7, 1, 8, 8).float(), torch.arange(7)
    found = evaluated_loss(net, x, y, batch_size=3)
    assert net.training
    with torch.no_grad():
        expected = float(functional.cross_entropy(net.eval()(x), y))
    assert found == pytest.approx(expected, rel=1e-6)
    assert np.isfinite(found)
