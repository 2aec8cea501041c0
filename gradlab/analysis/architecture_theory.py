"""Arithmetic of convolutional architectures: receptive fields, parameters, multiply-adds; nothing is built or run.

A window is a pair (kernel, stride) of a convolution or a pool; a path is a row of windows from the image on. What a
net's deepest path looks like is written down here from the papers, apart from the nets that are trained: the two are
tested against each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from gradlab.errors import UsageError, unknown

__all__ = [
    "architecture_path",
    "conv_parameters",
    "inception_parameters",
    "multiply_adds",
    "receptive_field",
    "receptive_fields",
    "total_multiply_adds",
]

Window = tuple[int, int]
Path = dict[str, tuple[Window, ...]]

_VGG: Final = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_RESNET: Final = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_DENSENET: Final = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32)}
_INCEPTIONS: Final = {3: "ab", 4: "abcde", 5: "ab"}


def receptive_field(path: Sequence[Window]) -> int:
    """Return how many pixels across an output of a path sees of its input.

    r = 1 + sum over windows of (kernel - 1) * product of the strides before it. Padding and the image's border do not
    count: it is the field of an output whose windows all lie inside.

    Args:
        path: (kernel, stride) of each convolution and pool, from the input on; of parallel branches the largest.

    Returns:
        The side of the square field, in pixels of the input; 1 for an empty path.

    Raises:
        UsageError: A kernel or stride below 1.

    Example:
        >>> receptive_field([(3, 1)] * 2), receptive_field([(3, 1)] * 3), receptive_field([(7, 2), (3, 2)])
        (5, 7, 11)

    Source:
        Simonyan & Zisserman 2014 (arXiv 1409.1556), sec. 2.3, for stacks of 3x3; the sum is standard.
    """
    field, jump = 1, 1
    for kernel, stride in path:
        _check(kernel=kernel, stride=stride)
        field += (kernel - 1) * jump
        jump *= stride
    return field


def conv_parameters(inputs: int, outputs: int, kernel: int, *, groups: int = 1, bias: bool = False) -> int:
    """Return the parameters of a convolution: kernel^2 * inputs / groups * outputs, and one bias an output.

    Args:
        inputs: Channels in, a multiple of `groups`.
        outputs: Channels out, a multiple of `groups`.
        kernel: Side of the kernel; 1 with a map of one pixel is a linear layer.
        groups: Parts that the channels are split into.
        bias: Whether each output channel has a bias.

    Raises:
        UsageError: A value below 1, or channels that the groups do not divide.

    Example:
        >>> conv_parameters(192, 64, 1, bias=True), conv_parameters(96, 256, 5, groups=2)
        (12352, 307200)
    """
    _check(inputs=inputs, outputs=outputs, kernel=kernel, groups=groups)
    if inputs % groups or outputs % groups:
        raise UsageError(f"{groups} groups do not divide {inputs} input and {outputs} output channels: choose others.")
    return kernel**2 * (inputs // groups) * outputs + (outputs if bias else 0)


def multiply_adds(inputs: int, outputs: int, kernel: int, side: int, *, groups: int = 1) -> int:
    """Return the multiply-adds of a convolution on one image: its weights times the pixels of the output map.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        kernel: Side of the kernel.
        side: Side of the output map in pixels.
        groups: Parts that the channels are split into.

    Raises:
        UsageError: As `conv_parameters`, or a side below 1.

    Note:
        Biases, norms, activations and pools are not counted, as is the custom.

    Example:
        >>> multiply_adds(3, 64, 3, 224)
        86704128
    """
    _check(side=side)
    return conv_parameters(inputs, outputs, kernel, groups=groups) * side**2


def inception_parameters(
    inputs: int, widths: Sequence[int], *, reduced: bool = True, five_only: bool = False, bias: bool = True
) -> int:
    """Return the parameters of an inception block, with or without the 1x1 convolutions that shrink its channels.

    Args:
        inputs: Channels in.
        widths: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection.
        reduced: Whether 1x1 convolutions come before the 3x3 and the 5x5; the projection stays in both cases.
        five_only: Count the 5x5 branch alone.
        bias: Whether convolutions have biases.

    Raises:
        UsageError: Not six widths, or one below 1.

    Example:
        >>> block = (64, 96, 128, 16, 32, 32)  # 3a
        >>> inception_parameters(192, block), inception_parameters(192, block, reduced=False)
        (163696, 393472)

    Source:
        Szegedy et al. 2014 (arXiv 1409.4842), fig. 2 (naive and with reductions) and table 1.
    """
    if len(widths) != 6:
        raise UsageError(f"An inception block has 6 widths, but {len(widths)} were given: see table 1 of the paper.")
    one, reduce3, three, reduce5, five, project = widths
    kernels = {"one": (1, None, one), "three": (3, reduce3, three), "five": (5, reduce5, five)}
    kernels["pool"] = (1, None, project)
    total = 0
    for name, (kernel, reduce, outputs) in kernels.items():
        if five_only and name != "five":
            continue
        inner = inputs
        if reduced and reduce is not None:
            total += conv_parameters(inputs, reduce, 1, bias=bias)
            inner = reduce
        total += conv_parameters(inner, outputs, kernel, bias=bias)
    return total


def architecture_path(net: str) -> Path:
    """Return the windows of a net's deepest path, by the name of the piece that holds them.

    Args:
        net: "AlexNet", "VGG-16", "GoogLeNet", "ResNet-50", "DenseNet-121", "CIFAR-ResNet-20" or another published
            depth of these.

    Returns:
        Piece -> its windows, from the image on. A block with branches counts with its largest.

    Raises:
        UsageError: An unknown net.

    Note:
        Bottlenecks of ResNet have their stride in the first 1x1 convolution, as in the paper.

    Example:
        >>> path = architecture_path("VGG-16")
        >>> receptive_field([window for windows in path.values() for window in windows])  # pool5
        212
    """
    family, _, text = net.rpartition("-") if net.rpartition("-")[2].isdigit() else (net, "", "0")
    depth = int(text)
    if net == "AlexNet":
        return _alexnet()
    if net == "GoogLeNet":
        return _googlenet()
    if family == "VGG" and depth in _VGG:
        return _vgg(depth)
    if family == "ResNet" and depth in _RESNET:
        return _resnet(depth)
    if family == "DenseNet" and depth in _DENSENET:
        return _densenet(depth)
    if family == "CIFAR-ResNet" and depth >= 8 and depth % 6 == 2:
        return _cifar_resnet(depth)
    known = ["AlexNet", "GoogLeNet", *(f"VGG-{d}" for d in _VGG), *(f"ResNet-{d}" for d in _RESNET)]
    raise unknown("net", net, [*known, *(f"DenseNet-{d}" for d in _DENSENET), "CIFAR-ResNet-20"])


def receptive_fields(net: str) -> dict[str, int]:
    """Return the receptive field of an output of each piece on a net's deepest path.

    Args:
        net: As `architecture_path` takes it.

    Raises:
        UsageError: An unknown net.

    Example:
        >>> fields = receptive_fields("VGG-16")
        >>> fields["conv5_3"], fields["pool5"]
        (196, 212)
    """
    seen: list[Window] = []
    fields = {}
    for piece, windows in architecture_path(net).items():
        seen += windows
        fields[piece] = receptive_field(seen)
    return fields


def total_multiply_adds(layers: Iterable[Mapping[Any, Any]]) -> int:
    """Return the multiply-adds of a net on one image.

    Args:
        layers: For each convolution and linear layer: inputs, outputs, kernel, side (of the output map) and groups.

    Example:
        >>> total_multiply_adds([{"inputs": 4096, "outputs": 1000, "kernel": 1, "side": 1, "groups": 1}])
        4096000
    """
    return sum(
        multiply_adds(row["inputs"], row["outputs"], row["kernel"], row["side"], groups=row["groups"]) for row in layers
    )


def _alexnet() -> Path:
    windows = {
        "conv1": (11, 4), "pool1": (3, 2), "conv2": (5, 1), "pool2": (3, 2), "conv3": (3, 1), "conv4": (3, 1),
        "conv5": (3, 1), "pool5": (3, 2),
    }  # fmt: skip
    return {name: (window,) for name, window in windows.items()}


def _vgg(depth: int) -> Path:
    path: Path = {}
    for stage, count in enumerate(_VGG[depth], start=1):
        path |= {f"conv{stage}_{place}": ((3, 1),) for place in range(1, count + 1)}
        path[f"pool{stage}"] = ((2, 2),)
    return path


def _googlenet() -> Path:
    path: Path = {"conv1": ((7, 2),), "pool1": ((3, 2),), "conv2": ((3, 1),)}
    for stage, blocks in _INCEPTIONS.items():
        path[f"pool{stage - 1}"] = ((3, 2),)
        path |= {f"inception{stage}{block}": ((5, 1),) for block in blocks}
    return path


def _resnet(depth: int) -> Path:
    path: Path = {"stem": ((7, 2),), "pool": ((3, 2),)}
    for stage, count in enumerate(_RESNET[depth], start=1):
        for place in range(1, count + 1):
            stride = 2 if stage > 1 and place == 1 else 1
            bottleneck = ((1, stride), (3, 1), (1, 1))
            path[f"block{stage}_{place}"] = bottleneck if depth >= 50 else ((3, stride), (3, 1))
    return path


def _densenet(depth: int) -> Path:
    path: Path = {"stem": ((7, 2),), "pool": ((3, 2),)}
    for block, count in enumerate(_DENSENET[depth], start=1):
        path |= {f"dense{block}_{place}": ((1, 1), (3, 1)) for place in range(1, count + 1)}
        if block < len(_DENSENET[depth]):
            path[f"transition{block}"] = ((1, 1), (2, 2))
    return path


def _cifar_resnet(depth: int) -> Path:
    path: Path = {"stem": ((3, 1),)}
    for stage in range(3):
        for place in range((depth - 2) // 6):
            path[f"stage{stage}_{place}"] = ((3, 2 if stage and place == 0 else 1), (3, 1))
    return path


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"'{name}' is {value!r}, but must be a whole number of at least 1.")
