"""The nets that the cost of watching is measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from gradlab.nets import CifarNet

__all__ = ["WORKLOADS", "Workload"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A net, its input, and how many steps make one timing of a tenth of a second or more."""

    text: str
    model: Callable[[], nn.Module]
    data: Callable[[], torch.Tensor]
    steps: int

    def build(self, device: str = "cpu") -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
        """Return the model, its input and the classes, the same at every call."""
        torch.manual_seed(0)
        model, x = self.model().to(device), self.data().to(device)
        if x.dim() == 4:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stub knows it not
        return model, x, torch.randint(0, 10, (len(x),), device=device)


class LastStep(nn.Module):
    """An LSTM and a linear layer on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 128, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.lstm(x)[0][:, -1])
        return y


class Encoder(nn.Module):
    """A small Transformer encoder and a linear layer on the mean of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.encoder(x).mean(1))
        return y


def mlp(depth: int, width: int) -> nn.Module:
    """Return a plain ReLU net."""
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def images(batch: int) -> torch.Tensor:
    """Return CIFAR-sized noise."""
    return torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)


WORKLOADS = {
    "W1": Workload(
        text="MLP 64 x 256, batch 128", model=lambda: mlp(64, 256), data=lambda: torch.randn(128, 256), steps=10
    ),
    "W2": Workload(text="ResNet-56, batch 32", model=lambda: CifarNet(56), data=lambda: images(32), steps=2),
    "W3": Workload(
        text="plain-20 with BatchNorm, batch 64",
        model=lambda: CifarNet(20, skip=False),
        data=lambda: images(64),
        steps=2,
    ),
    "W4": Workload(text="LSTM 128, T=256, batch 32", model=LastStep, data=lambda: torch.randn(32, 256, 16), steps=2),
    "W5": Workload(
        text="MLP 16 x 64, batch 32", model=lambda: mlp(16, 64), data=lambda: torch.randn(32, 64), steps=150
    ),
    "W6": Workload(
        text="Transformer 4 x 128, 64 tokens, batch 16", model=Encoder, data=lambda: torch.randn(16, 64, 128), steps=5
    ),
}
