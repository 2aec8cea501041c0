"""What an architecture is before it is trained: the shapes of its layers, what its outputs see, what blocks save."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn

from gradlab.errors import UsageError, unknown
from gradlab.nets import CifarNet, ConvNet, Inception, parameter_count
from gradlab.nets.imagenet_googlenet import INCEPTIONS

__all__ = [
    "block_savings",
    "channels_of_pieces",
    "cifar_maps",
    "layer_geometry",
    "measured_receptive_fields",
    "trunk_maps",
]

_LARGEST = 16_384  # pixels; beyond, a field is called unbounded


def layer_geometry(model: nn.Module, image: torch.Tensor) -> pd.DataFrame:
    """Return the shape of every convolution and linear layer as it runs, and of its output.

    Args:
        model: Any module, on the meta device for large ones: nothing is computed there.
        image: Its input, (1, C, H, W), on the same device.

    Returns:
        One row a call: layer, kind ("conv" or "linear"), inputs, outputs, kernel, groups, bias, side (of the output
        map; 1 for linear), parameters.

    Raises:
        UsageError: A convolution with a kernel or an output that is not square.

    Example:
        >>> layer_geometry(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 16, 16))["side"].tolist()
        [16]
    """
    rows: list[dict[str, Any]] = []

    def record(name: str, module: nn.Module, output: torch.Tensor) -> None:
        counts = {"parameters": sum(parameter.numel() for parameter in module.parameters())}
        if isinstance(module, nn.Linear):
            shape = {"kind": "linear", "inputs": module.in_features, "outputs": module.out_features, "kernel": 1}
            side, groups = 1, 1
        else:
            assert isinstance(module, nn.Conv2d)
            (kernel, other), (side, across) = module.kernel_size, output.shape[2:]
            if kernel != other or side != across:
                raise UsageError(f"'{name}' has a kernel or an output that is not square: give a square image.")
            shape = {"kind": "conv", "inputs": module.in_channels, "outputs": module.out_channels, "kernel": kernel}
            groups = module.groups
        rows.append({"layer": name, **shape, "groups": groups, "bias": module.bias is not None, "side": side} | counts)

    handles = [
        module.register_forward_hook(lambda module, _, output, name=name: record(name, module, output))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return pd.DataFrame(rows)


def measured_receptive_fields(
    pieces: nn.Sequential | OrderedDict[str, nn.Module],
    *,
    in_channels: int = 3,
    places: Sequence[str] | None = None,
    across: int = 64,
    height: int = 64,
) -> dict[str, int]:
    """Measure, through the gradient, how many pixels across an output of each piece sees.

    One output in the middle of each piece's map is sent back to the image; the field is the extent of the pixels whose
    gradient is not zero. So that nothing cancels, all weights are made positive, max pools (whose gradient reaches one
    pixel only) means, and norms and dropout the identity: that changes no window.

    Args:
        pieces: Maps images to maps, in a row. A copy is used. Few channels suffice: windows do not depend on them.
        in_channels: Channels of the image.
        places: Pieces to measure at; None is every piece.
        across: Width of the strip that is sent through.
        height: Its height at first, in pixels, rounded up to a power of two; it doubles until the field fits.

    Returns:
        Piece -> height of its field in pixels. Windows are taken to be square.

    Raises:
        UsageError: A field that does not end within 16,384 pixels, as after a mean over the map; an unknown place.

    Note:
        float64: the corner of n stacked 3x3 windows has a gradient of 9^-n.

    Example:
        >>> stack = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1) for _ in range(3)))
        >>> measured_receptive_fields(stack, in_channels=1)
        {'0': 3, '1': 5, '2': 7}
    """
    named = dict(pieces.named_children() if isinstance(pieces, nn.Module) else pieces)
    wanted = list(named) if places is None else list(places)
    for name in wanted:
        if name not in named:
            raise unknown("piece", name, named)
    linear = nn.Sequential(OrderedDict((name, _positive(piece)) for name, piece in named.items()))
    found: dict[str, int] = {}
    height = 1 << (max(height, across) - 1).bit_length()
    while len(found) < len(wanted):
        if height > _LARGEST:
            missing = next(name for name in wanted if name not in found)
            raise UsageError(f"The receptive field of '{missing}' does not end within {_LARGEST} pixels: leave it out.")
        image = torch.ones(1, in_channels, height, across, dtype=torch.float64, requires_grad=True)
        x, maps = image, {}
        for name, piece in linear.named_children():
            x = maps[name] = piece(x)
        for name in wanted:
            if name in found:
                continue
            out = maps[name]
            middle = out[0, :, out.shape[2] // 2, out.shape[3] // 2].sum()
            (gradient,) = torch.autograd.grad(middle, image, retain_graph=True)
            seen = torch.nonzero(gradient.sum((0, 1, 3))).flatten()
            if seen[0] > 0 and seen[-1] < height - 1:  # it ends inside: the border has cut nothing off
                found[name] = int(seen[-1] - seen[0]) + 1
        height *= 2
    return {name: found[name] for name in wanted}


def trunk_maps(net: ConvNet) -> OrderedDict[str, nn.Module]:
    """Return the pieces of a net's trunk up to the last map: those before it is flattened.

    Example:
        >>> from gradlab.nets import alexnet
        >>> list(trunk_maps(alexnet(narrow=64)))[-1]
        'pool5'
    """
    pieces: OrderedDict[str, nn.Module] = OrderedDict()
    for name, piece in net.trunk.named_children():
        if isinstance(piece, nn.Flatten):
            break
        pieces[name] = piece
    return pieces


def cifar_maps(depth: int) -> OrderedDict[str, nn.Module]:
    """Return stem and blocks of a CIFAR ResNet of one channel in a row.

    Args:
        depth: 6k+2.

    Example:
        >>> list(cifar_maps(8))
        ['stem', 'stage0_0', 'stage1_0', 'stage2_0']
    """
    net = CifarNet(depth, width=1)
    pieces: OrderedDict[str, nn.Module] = OrderedDict(stem=net.stem)
    for stage, blocks in enumerate(net.stages):
        pieces |= {f"stage{stage}_{place}": block for place, block in enumerate(blocks.children())}
    return pieces


def channels_of_pieces(net: ConvNet, image: torch.Tensor) -> pd.DataFrame:
    """Return the channels of each piece's output (columns piece, channels); on the meta device nothing is computed."""
    rows, x = [], image
    with torch.no_grad():
        for name, piece in trunk_maps(net).items():
            x = piece(x)
            rows.append({"piece": name, "channels": x.shape[1]})
    return pd.DataFrame(rows)


def block_savings(width: int = 64) -> pd.DataFrame:
    """Count the parameters of blocks with and without what is said to save them, as modules on the meta device.

    Stacks of 3x3 convolutions against one larger kernel; inception blocks with and without their 1x1 reductions; a
    bottleneck against two 3x3 convolutions.

    Args:
        width: Channels in and out of the stacks; their ratio does not depend on it.

    Returns:
        Columns block, parameters (with) and plain (without).

    Source:
        Simonyan & Zisserman 2014, sec. 2.3; Szegedy et al. 2014, table 1; He et al. 2015, fig. 5.
    """

    def conv(inputs: int, outputs: int, kernel: int, *, bias: bool = False) -> nn.Module:
        return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)

    def inception(name: str, inputs: int) -> tuple[nn.Module, nn.Module]:
        one, _, three, _, five, project = INCEPTIONS[name]
        branches = {1: one, 3: three, 5: five}
        naive = [conv(inputs, outputs, kernel, bias=True) for kernel, outputs in branches.items()]
        return Inception(inputs, INCEPTIONS[name]), nn.ModuleList([*naive, conv(inputs, project, 1, bias=True)])

    with torch.device("meta"):
        blocks = {
            "two 3x3": (nn.Sequential(*(conv(width, width, 3) for _ in range(2))), conv(width, width, 5)),
            "three 3x3": (nn.Sequential(*(conv(width, width, 3) for _ in range(3))), conv(width, width, 7)),
            "inception 3a": inception("3a", 192),
            "inception 4a": inception("4a", 480),
            "5x5 branch of 3a": (nn.Sequential(conv(192, 16, 1), conv(16, 32, 5)), conv(192, 32, 5)),
            "bottleneck 256": (
                nn.Sequential(conv(256, 64, 1), conv(64, 64, 3), conv(64, 256, 1)),
                nn.Sequential(conv(256, 256, 3), conv(256, 256, 3)),
            ),
        }
    rows = [(name, parameter_count(block), parameter_count(plain)) for name, (block, plain) in blocks.items()]
    return pd.DataFrame(rows, columns=["block", "parameters", "plain"])


def _positive(piece: nn.Module) -> nn.Module:
    """Return a copy without signs, norms, choices or chance, but with the same windows."""
    piece = copy.deepcopy(piece).double().eval()

    def replaced(module: nn.Module) -> nn.Module:
        if isinstance(module, nn.MaxPool2d):
            return nn.AvgPool2d(module.kernel_size, module.stride, module.padding, module.ceil_mode)
        if isinstance(module, nn.BatchNorm2d | nn.LocalResponseNorm | nn.Dropout):
            return nn.Identity()
        for name, child in module.named_children():
            setattr(module, name, replaced(child))
        return module

    piece = replaced(piece)
    with torch.no_grad():
        for parameter in piece.parameters():
            # A mean over the fan-in: the values neither vanish nor grow, however deep the net.
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.fill_(1.0 / fan_in if parameter.ndim > 1 else 0.0)
    return piece
