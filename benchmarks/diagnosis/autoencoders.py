"""Autoencoders: narrow in the middle, their inputs are their targets."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradlab.benchmarks.diagnosis.batches import images, reproduction
from gradlab.benchmarks.diagnosis.blocks import ACTIVATIONS, chain, dead_bias, initialize, net_case
from gradlab.benchmarks.diagnosis.case import Case

__all__ = ["CASES"]


def _autoencoder(widths: list[int], activation: str, *, init: str = "he", end: nn.Module | None = None) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
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


def _large(net: nn.Module, name: str, factor: float) -> nn.Module:
    with torch.no_grad():
        cast(nn.Linear, net.get_submodule(name)).weight.mul_(factor)
    return net


_case = partial(net_case, family="autoencoder", batches=reproduction, loss=F.mse_loss)
_SCALE_FREE: dict[str, Any] = {"lr": 1e-5, "optimizer": "adam", "steps": 8}

CASES: tuple[Case, ...] = (
    _case(
        "autoencoder-bottleneck-2",
        "healthy",
        "two units in the middle",
        lambda: _autoencoder([32, 24, 8, 2, 8, 24, 32], "tanh", init="xavier"),
        cuts=("1", "9"),
        lr=0.05,
    ),
    _case(
        "autoencoder-relu",
        "healthy",
        "a bottleneck of rectifiers",
        lambda: _autoencoder([32, 32, 16, 32, 32], "relu"),
        cuts=("1", "5"),
        lr=0.05,
    ),
    _case(
        "autoencoder-variational",
        "healthy",
        "a sampled bottleneck and a sum of two losses",
        _Variational,
        loss=_evidence_bound,
        cuts=("encoder.act1", "decoder.act2"),
        lr=1e-3,
        optimizer="adam",
    ),
    _case("autoencoder-unet", "healthy", "skips over a bottleneck", _UNet, batches=lambda: _picture, lr=0.05),
    _case("autoencoder-tied-denoising", "healthy", "one weight used twice", _TiedAutoencoder, lr=0.1),
    _case(
        "autoencoder-binary-sum",
        "healthy",
        "binary cross entropy summed over entries and samples",
        lambda: _autoencoder([32, 32, 8, 32, 32], "relu"),
        loss=partial(F.binary_cross_entropy_with_logits, reduction="sum"),
        batches=partial(reproduction, binary=True),
        cuts=("1", "5"),
        lr=2e-4,
    ),
    _case(
        "autoencoder-sigmoid-deep",
        "vanishing",
        "sigmoid's slope is at most 1/4",
        lambda: _autoencoder([32, 32, 24, 16, 8, 8, 16, 24, 32, 32], "sigmoid", init="xavier"),
        axis="depth",
        cuts=("1", "15"),
        lr=0.05,
    ),
    _case(
        "autoencoder-default-relu-24",
        "vanishing",
        "torch's default initialization",
        lambda: _autoencoder([32] * 25, "relu", init="default"),
        axis="depth",
        cuts=("1", "45"),
        lr=0.02,
    ),
    _case(
        "autoencoder-he-times-2",
        "exploding",
        "twice He's weights",
        lambda: initialize(_autoencoder([32] * 25, "relu"), "he", 2.0),
        axis="depth",
        cuts=("1", "45"),
        **_SCALE_FREE,
    ),
    _case(
        "autoencoder-dead-code",
        "dead",
        "the code's units have a bias of -20",
        lambda: dead_bias(_autoencoder([32, 32, 16, 32, 32], "relu"), "2", 1.0),
        places=("3",),
        lr=3e-3,
    ),
    _case(
        "autoencoder-saturated-code",
        "saturated",
        "the code's weights are sixty times too large",
        lambda: _large(_autoencoder([32, 24, 8, 24, 32], "tanh", init="xavier"), "2", 60.0),
        places=("3",),
        lr=1e-3,
    ),
)
