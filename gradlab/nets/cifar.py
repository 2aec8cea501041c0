"""The plain and residual nets of He et al. for small images."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, final

from torch import nn

from gradlab.errors import UsageError
from gradlab.nets.checks import check_member, check_positive, check_skipinit
from gradlab.nets.names import NORMS, PADDING_MODES
from gradlab.nets.residual import OptionA, PlainBlock, ResidualBlock

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CifarNet"]

_SMALLEST_IMAGE = 4  # pixels a side: two strides of 2 leave one pixel


@final
class CifarNet(nn.Module):
    """ResNet-6k+2 for small images, or its plain counterpart.

    A 3x3 convolution of `width` channels; three stages of k blocks with width, 2 width and 4 width channels, the
    second and third starting with stride 2; global average pooling; a linear head. A block is
    conv-norm-relu-conv-norm, then the sum with the skip (`OptionA` where the shape changes), then ReLU. Attributes:
    `stem`, `stages` (three sequences of blocks) and `head`.

    Args:
        depth: Weight layers on the longest path, 6k+2 and at least 8. Default 20, the paper's smallest.
        skip: Whether blocks have skips; without, the net is "plain". Both kinds have the same parameter names and
            shapes.
        norm: "batch" (BatchNorm after every convolution) or "none".
        width: Channels of the first stage. Default 16, the paper's.
        in_channels: Channels of the images.
        classes: Outputs of the head.
        skipinit: Whether a learnable scalar that starts at 0 scales each branch; needs skip.
        padding_mode: "zeros" (the paper's), "circular" or "replicate". Zeros at the border lower the gain of each
            layer, so mean-field theory is tested with "circular".

    Raises:
        UsageError: A depth that is not 6k+2, an unknown norm or padding mode, a count below 1, or skipinit
            without skip; on a call, images of another channel count or smaller than 4x4.

    Note:
        Convolutions have no bias, with norm "none" either, so that the parameter sets of the two differ in the
        norm only. Weights are torch's default: `initialize` draws others. Every ReLU is a module of its own and
        not in place, so that hooks see each use.

    Example:
        >>> import torch
        >>> CifarNet(8, width=4)(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])

    Source:
        He et al. 2015, Deep Residual Learning, sec. 4.2.
    """

    def __init__(
        self,
        depth: int = 20,
        *,
        skip: bool = True,
        norm: str = "batch",
        width: int = 16,
        in_channels: int = 3,
        classes: int = 10,
        skipinit: bool = False,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        _check_depth(depth)
        check_member("norm", norm, NORMS)
        check_member("padding mode", padding_mode, PADDING_MODES)
        check_positive(width=width, in_channels=in_channels, classes=classes)
        check_skipinit(skip=skip, skipinit=skipinit)
        self.depth = depth
        self.in_channels = in_channels
        mode: Any = padding_mode  # checked above, which torch's Literal type cannot know

        def conv_norm(index: str, fan_in: int, fan_out: int, stride: int = 1) -> OrderedDict[str, nn.Module]:
            conv = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False, padding_mode=mode)
            layers: OrderedDict[str, nn.Module] = OrderedDict({f"conv{index}": conv})
            if norm == "batch":
                layers[f"norm{index}"] = nn.BatchNorm2d(fan_out)
            return layers

        def block(fan_in: int, fan_out: int, stride: int) -> nn.Module:
            first, second = conv_norm("1", fan_in, fan_out, stride), conv_norm("2", fan_out, fan_out)
            branch = nn.Sequential(OrderedDict([*first.items(), ("relu", nn.ReLU()), *second.items()]))
            if not skip:
                return PlainBlock(branch, nn.ReLU())
            shortcut = None if (fan_in, stride) == (fan_out, 1) else OptionA(fan_in, fan_out, stride)
            return ResidualBlock(branch, shortcut, skipinit=skipinit, activation=nn.ReLU())

        def stage(fan_in: int, fan_out: int, stride: int) -> nn.Sequential:
            rest = (depth - 2) // 6 - 1
            return nn.Sequential(block(fan_in, fan_out, stride), *(block(fan_out, fan_out, 1) for _ in range(rest)))

        self.stem = nn.Sequential(OrderedDict([*conv_norm("", in_channels, width).items(), ("relu", nn.ReLU())]))
        self.stages = nn.Sequential(stage(width, width, 1), stage(width, 2 * width, 2), stage(2 * width, 4 * width, 2))
        self.head = nn.Sequential(
            OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(4 * width, classes))
        )

    def features(self, x: Tensor) -> Tensor:
        """Return the last block's output, before pooling.

        Args:
            x: Images, (N, in_channels, H, W), H and W at least 4.

        Returns:
            Feature maps, (N, 4 width, ceil(H/4), ceil(W/4)).

        Raises:
            UsageError: The images have another shape.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels or min(x.shape[2:]) < _SMALLEST_IMAGE:
            raise UsageError(
                f"The images have shape {tuple(x.shape)}, but this net takes (N, {self.in_channels}, H, W) with H and "
                f"W of at least {_SMALLEST_IMAGE}: reshape or enlarge them, or set in_channels."
            )
        maps: Tensor = self.stages(self.stem(x))
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (N, classes), of images as in `features`."""
        logits: Tensor = self.head(self.features(x))
        return logits


def _check_depth(depth: int) -> None:
    if not isinstance(depth, int) or isinstance(depth, bool):
        raise UsageError(f"The depth is {depth!r}, but must be a whole number 6k+2, such as 20, 56 or 110.")
    if depth >= 8 and depth % 6 == 2:
        return
    below = depth - (depth - 2) % 6
    nearest = f"take {below} or {below + 6}" if below >= 8 else "take 8"
    raise UsageError(f"The depth is {depth}, but must be 6k+2 and at least 8, for three stages of k blocks: {nearest}.")
