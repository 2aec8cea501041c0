"""What watching costs: the ratio of a watched training step to a bare one.

    .venv/bin/python benchmarks/overhead.py [--workloads W1,W5] [--rounds 7]

Each round times every condition in turn in one process on one thread, so that a noisy machine disturbs all of them
alike; the median over rounds of the ratio of CPU times is printed, with its range. Never quote single times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

import gradlab as gl
from gradlab.nets import CifarNet


class LastStep(nn.Module):
    """An LSTM and a linear layer on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 128, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def mlp(depth: int, width: int) -> nn.Module:
    """Return a plain ReLU net."""
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def images(batch: int) -> torch.Tensor:
    """Return CIFAR-sized noise."""
    return torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)


#: name -> (what it is, model, input, steps a round)
WORKLOADS: dict[str, tuple[str, Callable[[], nn.Module], Callable[[], torch.Tensor], int]] = {
    "W1": ("MLP 64 x 256, batch 128", lambda: mlp(64, 256), lambda: torch.randn(128, 256), 10),
    "W2": ("ResNet-56, batch 32", lambda: CifarNet(56), lambda: images(32), 2),
    "W3": ("plain-20 with BatchNorm, batch 64", lambda: CifarNet(20, skip=False), lambda: images(64), 2),
    "W4": ("LSTM 128, T=256, batch 32", LastStep, lambda: torch.randn(32, 256, 16), 2),
    "W5": ("MLP 16 x 64, batch 32", lambda: mlp(16, 64), lambda: torch.randn(32, 64), 150),
}

Watch = Callable[[nn.Module, torch.optim.Optimizer], AbstractContextManager[object]]


@contextmanager
def naive(model: nn.Module, _: torch.optim.Optimizer) -> Iterator[None]:
    """Hooks as most people write them: a few statistics, each read back at once."""
    numbers: list[float] = []

    def forward(_m: nn.Module, _a: object, y: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        y = y if isinstance(y, torch.Tensor) else y[0]
        x = y.detach()
        numbers.extend([x.mean().item(), x.std().item(), x.abs().max().item(), (x == 0).float().mean().item()])
        if y.requires_grad:
            y.register_hook(lambda g: numbers.append(g.norm().item()))

    leaves = [m for m in model.modules() if next(m.children(), None) is None]
    handles = [m.register_forward_hook(forward) for m in leaves]
    handles += [
        p.register_post_accumulate_grad_hook(lambda p: numbers.extend([p.grad.norm().item(), p.detach().norm().item()]))
        for p in model.parameters()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


CONDITIONS: dict[str, Watch] = {
    "bare": lambda _m, _o: nullcontext(),
    "gradlab": lambda m, o: gl.watch(m, o),
    "gradlab every=10": lambda m, o: gl.watch(m, o, every=10),
    "naive .item()": naive,
}


def step_time(name: str, steps: int, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Return CPU seconds a training step under a condition."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    with CONDITIONS[name](model, optimizer):
        start = time.process_time()
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return (time.process_time() - start) / steps


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, {options.rounds} rounds; median ratio of CPU time [range]\n")
    print("| workload | bare step | " + " | ".join(name for name in CONDITIONS if name != "bare") + " |")
    print("|---|---|" + "---|" * (len(CONDITIONS) - 1))
    for key in options.workloads.split(","):
        text, build, data, steps = WORKLOADS[key]
        torch.manual_seed(0)
        model, x = build(), data()
        if x.dim() == 4:
            model = model.to(memory_format=torch.channels_last)
        y = torch.randint(0, 10, (len(x),))
        steps = max(steps, 1)
        times: dict[str, list[float]] = {name: [] for name in CONDITIONS}
        for round_number in range(options.rounds + 1):
            for name in CONDITIONS:
                # every=10 needs whole periods, or its one recorded step in ten is not one in ten
                count = -(-steps // 10) * 10 if "every=10" in name else steps
                seconds = step_time(name, count, model, x, y)
                if round_number:  # the first round warms up
                    times[name].append(seconds)
        cells = []
        for name in CONDITIONS:
            if name != "bare":
                ratios = sorted(t / b for t, b in zip(times[name], times["bare"], strict=True))
                cells.append(f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]")
        print(f"| {key} {text} | {1e3 * statistics.median(times['bare']):.1f} ms | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
