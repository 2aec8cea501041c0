"""What watching costs: the ratio of a watched training step to a bare one.

    .venv/bin/python benchmarks/overhead.py [--workloads W1,W5] [--rounds 7] [--peers] [--figure cost.png]

Every condition is timed in turn in one process on one thread, each between two bare timings, so that a noisy machine
disturbs all alike; printed is the median over rounds of the ratio of CPU times (wall times on CUDA), with its range.
Never quote single times. `gradlab bench overhead` runs gradlab's own part.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from gradlab.benchmarks.conditions import OWN, PEERS, Condition, missing
from gradlab.benchmarks.workloads import WORKLOADS

__all__ = ["Ratios", "main", "measure"]

#: Workload -> condition -> ratios to the bare step, one a round; under "bare" its seconds.
Ratios = dict[str, dict[str, list[float]]]
#: glibc gives freed memory back and takes it again: page faults are up to a third of a bare step.
_QUIET = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}


def step_time(condition: Condition, steps: int, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Return seconds a training step under a condition, after one step (or period) to warm up."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    steps = -(-steps // condition.period) * condition.period  # a whole period, or one step in ten is not one in ten
    with condition.watch(model, optimizer) as record:

        def run(count: int) -> None:
            for _ in range(count):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                if record is not None:
                    record(x)
                optimizer.step()

        run(condition.period)
        if x.is_cuda:
            torch.cuda.synchronize()
        clock = time.perf_counter if x.is_cuda else time.process_time
        start = clock()
        run(steps)
        if x.is_cuda:
            torch.cuda.synchronize()
        return (clock() - start) / steps


def measure(workloads: Sequence[str], conditions: Mapping[str, Condition], rounds: int, device: str = "cpu") -> Ratios:
    """Time every condition on every workload, and print a row of the table for each as it is done."""
    names = [name for name in conditions if name != "bare"]
    print("| workload | bare step | " + " | ".join(names) + " |\n|---|---|" + "---|" * len(names))
    found: Ratios = {}
    for key in workloads:
        workload = WORKLOADS[key]
        model, x, y = workload.build(device)
        recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        ratios: dict[str, list[float]] = {"bare": []}
        for number in range(rounds + 1):
            before = step_time(conditions["bare"], workload.steps, model, x, y)
            for name in names:
                if conditions[name].recurrent and not recurrent:
                    continue
                watched = step_time(conditions[name], workload.steps, model, x, y)
                after = step_time(conditions["bare"], workload.steps, model, x, y)
                if number:  # the first round warms up
                    ratios.setdefault(name, []).append(2 * watched / (before + after))
                    ratios["bare"].append(after)
                before = after
        found[key] = ratios
        cells = [cell(ratios[name]) if name in ratios else "-" for name in names]
        bare = 1e3 * statistics.median(ratios["bare"])
        print(f"| {key} {workload.text} | {bare:.1f} ms | {' | '.join(cells)} |", flush=True)
    return found


def cell(ratios: Sequence[float]) -> str:
    """Return median and range as text."""
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


def draw(found: Ratios, path: Path) -> None:
    """Draw the table: a row a condition, a colour a workload, medians with their ranges on a log axis."""
    import seaborn as sns
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    names = [name for name in [*OWN, *PEERS] if any(name in ratios for ratios in found.values()) and name != "bare"]
    figure = Figure(figsize=(7, 1.2 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    colours = sns.color_palette("colorblind", len(found))
    for number, (key, ratios) in enumerate(found.items()):
        known = [name for name in names if name in ratios]
        medians = [statistics.median(ratios[name]) for name in known]
        low = [m - min(ratios[name]) for m, name in zip(medians, known, strict=True)]
        high = [max(ratios[name]) - m for m, name in zip(medians, known, strict=True)]
        places = [names.index(name) + (number - (len(found) - 1) / 2) * 0.12 for name in known]
        label = f"{key} {WORKLOADS[key].text}"
        axes.errorbar(medians, places, xerr=[low, high], fmt="o", ms=4, lw=1, color=colours[number], label=label)
    for place in range(1, len(names)):
        axes.axhline(place - 0.5, color="0.9", lw=0.5)
    axes.axvline(1, color="0.6", lw=1)
    axes.set(xscale="log", yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    axes.set_xlabel("time of a training step / time of the bare step")
    axes.xaxis.set_major_locator(FixedLocator([0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    figure.legend(fontsize="small", loc="outside lower center", ncols=2, frameon=False)
    sns.despine(figure)
    figure.savefig(path, dpi=150)


def peak_memory(name: str, workload: str) -> float:
    """Return the peak of memory in MB of a process that trains under a condition; on Linux and macOS only."""
    code = (
        "import resource, sys, torch, gradlab.probes.watch\n"  # what watching loads is no part of what it keeps
        "from gradlab.benchmarks.overhead import *\nfrom gradlab.benchmarks import overhead\n"
        "torch.set_num_threads(1)\n"
        f"model, x, y = overhead.WORKLOADS[{workload!r}].build()\n"
        f"overhead.step_time(overhead.OWN[{name!r}], 10, model, x, y)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == 'darwin' else 1e3))\n"
    )
    env = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    return float(subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True).stdout)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", action="store_true", help="time other tools too, as far as they are installed")
    parser.add_argument("--memory", action="store_true", help="print peak memory over bare instead")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--figure", type=Path, help="draw the table into this file")
    parser.add_argument("--json", type=Path, help="write all ratios into this file")
    options = parser.parse_args(arguments)
    workloads = options.workloads.split(",")
    unknown = [key for key in workloads if key not in WORKLOADS]
    if unknown or options.rounds < 1:
        parser.error(
            f"no workload {unknown[0]!r}: {', '.join(WORKLOADS)}" if unknown else "--rounds must be at least 1"
        )
    if sys.platform == "linux" and not _QUIET.keys() <= os.environ.keys():
        command = [sys.executable, "-m", "gradlab.benchmarks.overhead", *(arguments or sys.argv[1:])]
        raise SystemExit(subprocess.run(command, env=os.environ | _QUIET, check=False).returncode)
    torch.set_num_threads(1)
    if options.memory:
        for key in workloads:
            bare, watched = (
                statistics.median(peak_memory(name, key) for _ in range(3)) for name in ("bare", "gradlab")
            )
            print(f"{key} {WORKLOADS[key].text}: {bare:.0f} MB bare, {watched - bare:+.1f} MB with gradlab")
        return
    from gradlab.probes import native

    absent = missing() if options.peers else []
    conditions = OWN | {name: peer for name, peer in PEERS.items() if options.peers and name not in absent}
    print(f"torch {torch.__version__}, one thread, {options.rounds} rounds; median ratio [range] to the bare step")
    print(f"kernel {native.status()}" + (f"; not installed: {', '.join(absent)}" if absent else "") + "\n")
    found = measure(workloads, conditions, options.rounds, options.device)
    if options.figure:
        draw(found, options.figure)
    if options.json:
        options.json.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
