"""Plain and residual convolutional nets, and autoencoders."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradlab.benchmarks.diagnosis.batches import images, reproduction
from gradlab.benchmarks.diagnosis.blocks import ACTIVATIONS, chain, initialize, job, norm_layer
from gradlab.benchmarks.diagnosis.case import Case, Job

__all__ = ["CASES", "ResidualConv", "conv_chain"]


def conv_chain(
    depth: int,
    width: int = 12,
    *,
    activation: str = "relu",
    norm: str | None = None,
    init: str = "he",
    gain: float = 1.0,
    end: bool = True,
) -> nn.Sequential:
    """Return 3x3 convolutions with circular padding: conv1, norm1, act1, ..., and pool, flat, head if `end`."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for place in range(1, depth + 1):
        parts[f"conv{place}"] = nn.Conv2d(
            3 if place == 1 else width, width, 3, padding=1, padding_mode="circular", bias=norm != "batch2d"
        )
        if norm is not None:
            parts[f"norm{place}"] = norm_layer(norm, width)
        parts[f"act{place}"] = ACTIVATIONS[activation]()
    if end:
        parts |= {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "head": nn.Linear(width, 5)}
    net = nn.Sequential(parts)
    initialize(net, init, gain)
    return net


class ResidualConv(nn.Module):
    """A stem, blocks h + alpha * branch(h), and a head.

    Args:
        blocks: Number of blocks.
        width: Channels.
        norm: Name for `norm_layer`; None for none.
        alpha: Learnable factor on each branch that starts at this value; None for none.
        last_gamma: What the scale of each branch's last normalization starts at.
        gain: Times He's initialization.
    """

    def __init__(
        self,
        blocks: int,
        width: int = 12,
        *,
        norm: str | None = "batch2d",
        alpha: float | None = None,
        last_gamma: float = 1.0,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList([self._branch(width, norm, last_gamma) for _ in range(blocks)])
        self.alpha = None if alpha is None else nn.Parameter(torch.full((blocks,), alpha))
        self.head = nn.Linear(width, 5)
        initialize(self.blocks, "he", gain)

    @staticmethod
    def _branch(width: int, norm: str | None, last_gamma: float) -> nn.Sequential:
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(2)]
        if norm is None:
            return nn.Sequential(convs[0], nn.ReLU(), convs[1])
        last = norm_layer(norm, width)
        nn.init.constant_(cast(nn.BatchNorm2d, last).weight, last_gamma)
        return nn.Sequential(convs[0], norm_layer(norm, width), nn.ReLU(), convs[1], last)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for place, block in enumerate(self.blocks):
            branch = block(h)
            h = h + (branch if self.alpha is None else self.alpha[place] * branch)
        scores: Tensor = self.head(h.relu().mean((2, 3)))
        return scores


class _Dense(nn.Module):
    """Every layer reads all before it, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3 + 6 * k, 6, 3, padding=1, bias=False) for k in range(8)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(6) for _ in range(8)])
        self.head = nn.Linear(51, 5)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.cat([x, F.relu(norm(conv(x)))], 1)
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


class _Separable(nn.Sequential):
    """Depthwise and pointwise convolutions with ReLU6, and a gate that squeezes and excites."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
        for _ in range(4):
            layers += [nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
            layers += [nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), _Gate(16)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


class _Gate(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze, self.excite, self.gate = nn.Linear(width, 4), nn.Linear(4, width), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        share: Tensor = self.gate(self.excite(F.silu(self.squeeze(x.mean((2, 3))))))
        return x * share[..., None, None]


def _lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5),
    )  # fmt: skip


def _fine_tuned() -> Job:
    """Train with every BatchNorm in evaluation mode, its running statistics kept."""
    model = conv_chain(5, norm="batch2d")
    with torch.no_grad():
        for number in range(30):
            model(*images()(1000 + number)[0])
    model.eval()
    return job(model, images(), lr=0.02)


# -- autoencoders ------------------------------------------------------------------------------------------------------


def _autoencoder(widths: list[int], activation: str, *, init: str = "he", end: nn.Module | None = None) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(before, after), ACTIVATIONS[activation]()]
    layers[-1] = nn.Identity() if end is None else end
    return initialize(nn.Sequential(*layers), init)


class _Variational(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = chain(2, inputs=32, outputs=8)
        self.decoder = chain(2, inputs=4, outputs=32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(z), mean, log_variance


def _evidence_bound(output: Any, target: Tensor) -> Tensor:
    x, mean, log_variance = output
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1).mean()
    return F.mse_loss(x, target, reduction="sum") / len(target) + cast(Tensor, divergence)


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.join, self.act = nn.Conv2d(16, 3, 3, padding=1), nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.act(self.down1(x))
        up = self.act(self.up(self.act(self.down2(first))))
        image: Tensor = self.join(torch.cat([first, up], 1))
        return image


def _picture(number: int) -> tuple[tuple[Tensor], Tensor]:
    (x,), _ = images()(number)
    smooth = F.avg_pool2d(x, 3, 1, 1)
    return (smooth,), smooth


class _TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 32) / 32**0.5), nn.Parameter(torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        noisy = x + 0.3 * torch.randn_like(x)
        return torch.tanh(noisy @ self.weight.T) @ self.weight + self.bias


def _dead_channels(net: nn.Module, name: str, share: float) -> nn.Module:
    bias = cast(nn.Conv2d, net.get_submodule(name)).bias
    assert bias is not None
    with torch.no_grad():
        bias[: round(share * len(bias))] -= 20
    return net


def _conv(name: str, label: Any, why: str, model: Callable[[], nn.Module], **how: Any) -> Case:
    facts = {key: how.pop(key) for key in ("family", "axis", "places", "cuts", "bounded_ends") if key in how}
    batches = how.pop("batches", images)
    return Case(
        name=name, label=label, why=why, build=lambda: job(model(), batches(), **how), **{"family": "conv", **facts}
    )


_ENDS8 = ("act1", "act8")
_SQUARES: dict[str, Any] = {"loss": F.mse_loss, "batches": reproduction, "family": "autoencoder"}
_SCALE_FREE: dict[str, Any] = {"lr": 1e-5, "optimizer": "adam", "steps": 8}

CASES: tuple[Case, ...] = (
    _conv("conv-he-8", "healthy", "half of all entries are zero", partial(conv_chain, 8), cuts=_ENDS8, lr=0.03),
    _conv("conv-lenet", "healthy", "max pooling sends most gradients to zero", _lenet, cuts=("1", "8"), lr=0.05),
    _conv("conv-batchnorm-10", "healthy", "a few layers of BatchNorm", partial(conv_chain, 10, norm="batch2d"), cuts=("act1", "act10"), lr=0.02),
    _conv("conv-groupnorm-12", "healthy", "normalized by group", partial(conv_chain, 12, norm="group", init="default"), cuts=("act1", "act12"), lr=0.02),
    _conv("conv-separable-relu6", "healthy", "depthwise convolutions, ReLU6, sigmoid gates", _Separable, cuts=("2", "26"), lr=0.3),
    _conv("conv-dense-concatenation", "healthy", "every layer reads all before it", _Dense, lr=0.05),
    Case(name="conv-fine-tuned-eval", family="conv", label="healthy", build=_fine_tuned, why="BatchNorm in evaluation mode", cuts=("act1", "act5")),
    _conv("residual-batchnorm-10", "healthy", "BatchNorm on the branches", partial(ResidualConv, 10), family="residual", cuts=("stem", "blocks.9.4"), lr=0.02, steps=8),
    _conv("residual-skipinit-20", "healthy", "every branch starts at zero and gets no gradient in the first step", partial(ResidualConv, 20, norm=None, alpha=0.0), family="residual", lr=0.02, steps=10),
    _conv("residual-zero-gamma-8", "healthy", "every branch starts at zero and gets no gradient in the first step", partial(ResidualConv, 8, last_gamma=0.0), family="residual", lr=0.05, steps=10),
    _conv("residual-groupnorm-8", "healthy", "GroupNorm on the branches, two images a step", partial(ResidualConv, 8, norm="group"), family="residual", cuts=("stem", "blocks.7.4"), lr=5e-3, batches=partial(images, 2), steps=16),
    _conv("residual-fixup-30", "healthy", "deep without a normalization, branches scaled down", partial(ResidualConv, 30, norm=None, gain=0.1), family="residual", cuts=("stem", "blocks.29.2"), lr=0.02, steps=8),
    _conv("autoencoder-bottleneck-2", "healthy", "two units in the middle", lambda: _autoencoder([32, 24, 8, 2, 8, 24, 32], "tanh", init="xavier"), cuts=("1", "9"), lr=0.05, **_SQUARES),
    _conv("autoencoder-relu", "healthy", "a bottleneck of rectifiers", lambda: _autoencoder([32, 32, 16, 32, 32], "relu"), cuts=("1", "5"), lr=0.05, **_SQUARES),
    _conv("autoencoder-variational", "healthy", "a sampled bottleneck and a sum of two losses", _Variational, loss=_evidence_bound, batches=reproduction, family="autoencoder", cuts=("encoder.act1", "decoder.act2"), lr=1e-3, optimizer="adam"),
    _conv("autoencoder-unet", "healthy", "skips over a bottleneck", _UNet, loss=F.mse_loss, batches=lambda: _picture, family="autoencoder", lr=0.05),
    _conv("autoencoder-tied-denoising", "healthy", "one weight used twice", _TiedAutoencoder, lr=0.1, **_SQUARES),
    _conv("autoencoder-binary-sum", "healthy", "binary cross entropy summed over entries and samples", lambda: _autoencoder([32, 32, 8, 32, 32], "relu"), family="autoencoder", loss=partial(F.binary_cross_entropy_with_logits, reduction="sum"), batches=partial(reproduction, binary=True), cuts=("1", "5"), lr=2e-4),
    # sick
    _conv("conv-default-20", "vanishing", "torch's default initialization", partial(conv_chain, 20, init="default"), axis="depth", cuts=("act1", "act20")),
    _conv("conv-default-leaky-24", "vanishing", "torch's default initialization", partial(conv_chain, 24, init="default", activation="leaky_relu"), axis="depth", cuts=("act1", "act24"), optimizer="adam", lr=1e-5),
    _conv("conv-tiny-weights-8", "vanishing", "weights of 0.01", partial(conv_chain, 8, init="normal", gain=0.01), axis="depth", cuts=_ENDS8),
    _conv("conv-sigmoid-10", "vanishing", "sigmoid's slope is at most 1/4", partial(conv_chain, 10, init="xavier", activation="sigmoid"), axis="depth", cuts=("act1", "act10")),
    _conv("autoencoder-sigmoid-deep", "vanishing", "sigmoid's slope is at most 1/4", lambda: _autoencoder([32, 32, 24, 16, 8, 8, 16, 24, 32, 32], "sigmoid", init="xavier"), axis="depth", cuts=("1", "15"), lr=0.05, **_SQUARES),
    _conv("autoencoder-default-relu-24", "vanishing", "torch's default initialization", lambda: _autoencoder([32] * 25, "relu", init="default"), axis="depth", cuts=("1", "45"), lr=0.02, **_SQUARES),
    _conv("conv-he-times-2-16", "exploding", "twice He's weights", partial(conv_chain, 16, gain=2.0), axis="depth", cuts=("act1", "act16"), **_SCALE_FREE),
    _conv("conv-batchnorm-80", "exploding", "BatchNorm without skips multiplies the gradient at each layer", partial(conv_chain, 80, 8, norm="batch2d"), axis="depth", cuts=("act1", "act80"), batches=partial(images, 8, 3, 6), lr=1e-5, optimizer="adam", steps=6),
    _conv("residual-conv-40", "exploding", "every block doubles the variance", partial(ResidualConv, 40, norm=None), family="residual", axis="depth", cuts=("stem", "blocks.39.2"), batches=partial(images, 8, 3, 6), **_SCALE_FREE),
    _conv("autoencoder-he-times-2", "exploding", "twice He's weights", lambda: initialize(_autoencoder([32] * 25, "relu"), "he", 2.0), axis="depth", cuts=("1", "45"), **_SCALE_FREE, **_SQUARES),
    _conv("conv-dead-channels", "dead", "nine in ten channels have a bias of -20", lambda: _dead_channels(conv_chain(4, 20), "conv2", 0.9), places=("act2",), lr=3e-3),
    _conv("conv-dead-layer", "dead", "a layer's channels have a bias of -20", lambda: _dead_channels(conv_chain(5), "conv4", 1.0), places=("act4",), lr=3e-3),
    _conv("autoencoder-dead-code", "dead", "the code's units have a bias of -20", lambda: _dead_channels(_autoencoder([32, 32, 16, 32, 32], "relu"), "2", 1.0), places=("3",), lr=3e-3, **_SQUARES),
    _conv("conv-saturated-tanh", "saturated", "weights forty times Xavier's", partial(conv_chain, 2, activation="tanh", init="xavier", gain=40.0), places=("act*",), lr=1e-4),
    _conv("autoencoder-saturated-code", "saturated", "the code's weights are sixty times too large", lambda: _large(_autoencoder([32, 24, 8, 24, 32], "tanh", init="xavier"), "2", 60.0), places=("3",), lr=1e-3, **_SQUARES),
)  # fmt: skip


def _large(net: nn.Module, name: str, factor: float) -> nn.Module:
    with torch.no_grad():
        cast(nn.Linear, net.get_submodule(name)).weight.mul_(factor)
    return net
