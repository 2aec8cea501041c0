"""What watching through time costs: the ratio of a watched training step of a recurrent net to a bare one.

    .venv/bin/python benchmarks/timesteps.py [--length 1024] [--rounds 7]

Each round times every condition in turn in one process on one thread, so that a noisy machine disturbs all of them
alike; the median over rounds of the ratio of CPU times is printed, with its range. Never quote single times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

import gradlab as gl

HIDDEN, FEATURES, BATCH = 64, 16, 16
NETS = {"RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU}
CONDITIONS: dict[str, bool | int | None] = {"bare": None, "no time": False, "k=64": 64, "k=16": 16, "every": True}


class LastStep(nn.Module):
    """A recurrent module and a linear layer on its last output."""

    def __init__(self, recurrent: nn.RNNBase) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores."""
        scores: torch.Tensor = self.head(self.recurrent(x)[0][-1])
        return scores


def seconds_a_step(model: nn.Module, x: torch.Tensor, timesteps: bool | int | None) -> float:
    """Return the CPU time of a step, the lesser of two."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    y = torch.arange(BATCH) % 10
    context: AbstractContextManager[object] = nullcontext()
    if timesteps is not None:
        context = gl.watch(model, optimizer, timesteps=timesteps)
    times = []
    with context:
        for _ in range(2):
            start = time.process_time()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"T={options.length}, hidden {HIDDEN}, batch {BATCH}, one thread; median ratio to bare [range]")
    print("| net | " + " | ".join(list(CONDITIONS)[1:]) + " |\n|---|" + "---|" * (len(CONDITIONS) - 1))
    for name, kind in NETS.items():
        model, x = LastStep(kind(FEATURES, HIDDEN)), torch.randn(options.length, BATCH, FEATURES)
        ratios: dict[str, list[float]] = {condition: [] for condition in CONDITIONS}
        for _ in range(options.rounds + 1):
            took = {condition: seconds_a_step(model, x, value) for condition, value in CONDITIONS.items()}
            for condition, value in took.items():
                ratios[condition].append(value / took["bare"])
        cells = []
        for condition in list(CONDITIONS)[1:]:
            found = ratios[condition][1:]  # the first round warms up
            cells.append(f"{statistics.median(found):.2f} [{min(found):.2f}-{max(found):.2f}]")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
