"""What drawing costs: the ratio of a step watched with live=True to one watched without, on a real pseudo-terminal.

    .venv/bin/python benchmarks/live_view.py [--workloads W1,W5] [--rounds 7] [--seconds 2]

As in overhead.py both conditions are timed in turn in each round, in one process on one thread; the median over rounds
of the ratio of CPU times is printed, with its range. A round is long enough for several drawings. On a busy machine
that ratio is noisy; the share of the CPU time that was spent inside the view is not, and is printed beside it.
"""

from __future__ import annotations

import argparse
import os
import pty
import statistics
import threading
import time
from collections.abc import Callable

import torch
from overhead import WORKLOADS
from rich.console import Console
from torch import nn

import gradlab as gl


def cpu_time(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int, every: int, view: object
) -> tuple[float, float]:
    """Return the CPU seconds of some watched steps, closing the probe included, and those spent in the view."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    spent = 0.0
    if isinstance(view, gl.LiveView):

        def timed(method: Callable[..., None]) -> Callable[..., None]:
            def call(*words: object) -> None:
                nonlocal spent
                begun = time.thread_time()
                method(*words)
                spent += time.thread_time() - begun

            return call

        view.show, view.close = timed(view.show), timed(view.close)
    start = time.thread_time()  # drawing happens in this thread; the one that reads the terminal is nobody's cost
    with gl.watch(model, optimizer, every=every, live=view) as probe:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            probe.log(loss=loss)
            optimizer.step()
    return time.thread_time() - start, spent


def terminal() -> Console:
    """Return a console of 120 x 40 on a pseudo-terminal that somebody reads."""
    reader, writer = pty.openpty()

    def read() -> None:
        while os.read(reader, 1 << 16):
            pass

    threading.Thread(target=read, daemon=True).start()
    return Console(file=os.fdopen(writer, "w", encoding="utf-8"), force_terminal=True, width=120, height=40)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="W1,W5")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = terminal()
    print(f"torch {torch.__version__}, one thread, {options.rounds} rounds; median ratio of CPU time [range]\n")
    print("| workload | every | live / not live | in the view |\n|---|---|---|---|")
    for key in options.workloads.split(","):
        text, build, data, few = WORKLOADS[key]
        for every in (1, 10):
            torch.manual_seed(0)
            model, x = build(), data()
            y = torch.randint(0, 10, (len(x),))
            each = cpu_time(model, x, y, few, every, False)[0] / few
            steps = -(-int(options.seconds / each) // 10) * 10
            ratios, shares = [], []
            for number in range(options.rounds):
                views = [False, gl.LiveView(steps=steps, console=console)]
                turn = views if number % 2 else views[::-1]  # neither always goes first
                times = {bool(view): cpu_time(model, x, y, steps, every, view) for view in turn}
                ratios.append(times[True][0] / times[False][0])
                shares.append(times[True][1] / times[True][0])
            told = f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"
            print(f"| {key} {text} | {every} | {told} | {100 * statistics.median(shares):.2f}% |", flush=True)


if __name__ == "__main__":
    main()
