"""What training many seeds at once gains: the throughput of `train_seeds` against `train` of one seed after the other.

    .venv/bin/python benchmarks/seeds.py [--seeds 8] [--steps 60] [--rounds 5]

Each round trains all seeds apart and then at once, in one process on one thread; the median over rounds of the ratio of
CPU times is printed, with its range. Above 1 it is faster at once. Preparation (tracing the batched program) is part
of the time; it is that of one step or two, so that longer runs gain a little more.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import gradlab as gl
from gradlab.nets import MLP, CifarNet, initialize

RECORDED = {"4 steps": 0, "every 10th": 10, "every step": 1}


class RowByRow(nn.Module):
    """A vanilla recurrent net of linear layers that reads an image row by row."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.hidden = hidden
        self.inputs, self.states, self.head = nn.Linear(8, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores."""
        h = x.new_zeros(len(x), self.hidden)
        for row in x.squeeze(1).unbind(1):
            h = torch.tanh(self.inputs(row) + self.states(h))
        scores: torch.Tensor = self.head(h)
        return scores


def cifar(depth: int, norm: str) -> Callable[[int], nn.Module]:
    """Return what builds a residual net of width 8."""
    return lambda seed: initialize(CifarNet(depth, width=8, in_channels=1, norm=norm), "he_normal", seed=seed)


def rows(seed: int) -> nn.Module:
    """Build the recurrent net."""
    torch.manual_seed(seed)
    return RowByRow()


#: Net -> what builds it, batch size.
NETS: dict[str, tuple[Callable[[int], nn.Module], int]] = {
    "MLP 16 x 64": (lambda s: initialize(MLP(16, width=64, in_features=64, classes=10), "he_normal", seed=s), 32),
    "MLP 4 x 32": (lambda s: initialize(MLP(4, width=32, in_features=64, classes=10), "he_normal", seed=s), 32),
    "MLP 8 x 512": (lambda s: initialize(MLP(8, width=512, in_features=64, classes=10), "he_normal", seed=s), 128),
    "ResNet-8, width 8": (cifar(8, "none"), 32),
    "ResNet-8, width 8, BatchNorm": (cifar(8, "batch"), 32),
    "ResNet-20, width 8, BatchNorm": (cifar(20, "batch"), 128),
    "RNN cell, 8 steps x 64": (rows, 32),
}


def ratio(build: Callable[[int], nn.Module], batch_size: int, seeds: int, steps: int, every: int) -> float:
    """Return the CPU time apart divided by that at once."""
    task = gl.tasks.load_digits()
    settings = {"steps": steps, "batch_size": batch_size, "lr": 0.01, "channels_last": False}
    schedule = every or gl.log_spaced(steps, 4)
    start = time.process_time()
    for seed in range(seeds):
        gl.train(build(seed), task, gl.TrainSettings(seed=seed, **settings), device="cpu", every=schedule)
    between = time.process_time()
    models = [build(seed) for seed in range(seeds)]
    gl.train_seeds(models, task, gl.TrainSettings(**settings), range(seeds), device="cpu", every=schedule)
    return (between - start) / (time.process_time() - between)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--net", action="append", choices=NETS, metavar="NET", help="only this one; repeat for several")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{options.seeds} seeds, {options.steps} steps, one thread; throughput at once / apart, median [range]")
    print("| net | " + " | ".join(f"recorded: {name}" for name in RECORDED) + " |\n|---|" + "---|" * len(RECORDED))
    for name, (build, batch_size) in NETS.items():
        if options.net and name not in options.net:
            continue
        cells = []
        for every in RECORDED.values():
            found = [ratio(build, batch_size, options.seeds, options.steps, every) for _ in range(options.rounds + 1)][
                1:
            ]  # the first warms up
            cells.append(f"{statistics.median(found):.2f} [{min(found):.2f}, {max(found):.2f}]")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
