"""A study that takes no time, with a cell for each way to fail. On PYTHONPATH, so that workers can import it."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradlab.errors import DataError, ResourceError
from gradlab.study import Cell, CellContext, CellResult, Drawing, Preset, Study, setting

if TYPE_CHECKING:
    from gradlab.analysis.claims import Claim
    from gradlab.study import Results

TROUBLE = (
    "raise",
    "data",
    "resource",
    "diverge",
    "exit",
    "kill",
    "kill once",
    "hang",
    "hang hard",
    "library",
    "table",
    "memory",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """One field of each type that settings can have."""

    value: tuple[int, ...] = setting((1, 2, 3), "what is measured", least=1)
    trouble: tuple[str, ...] = setting((), "cells that end otherwise than well", choices=TROUBLE, empty=True)
    seeds: int = setting(2, "seeds, from 0", least=1)
    steps: int = setting(3, "steps of a cell", least=1)
    pace: float = setting(0.0, "seconds a step", least=0)
    shift: float = setting(0.0, "any number")
    rows: int = setting(4, "rows of a table", least=1)
    norm: str = setting("batch", "a name that is a column of a trace's table", choices=("batch", "none"))
    note: str = setting("", "any text")
    flag: bool = setting(False, "yes or no")
    limit: int | None = setting(None, "a number or none", least=0)
    train: int = setting(0, "steps of a cell that trains a net; 0 for no such cell", least=0)


def plan(settings: Settings) -> list[Cell]:
    """Lay out the cells."""
    shared = {name: getattr(settings, name) for name in ("steps", "pace", "rows", "norm", "limit")}
    work = [
        Cell(part="work", label=f"work {value} seed {seed}", settings=shared | {"value": value, "seed": seed})
        for seed in range(settings.seeds)
        for value in settings.value
    ]
    trouble = [Cell(part="trouble", label=how, settings={"how": how}, cost=2.0) for how in settings.trouble]
    net = {"steps": settings.train, "pace": settings.pace, "seed": 0}
    train = [Cell(part="train", label="train", settings=net, cost=3.0)] if settings.train else []
    return [*train, *work, *trouble]


def run(cell: Cell, context: CellContext) -> CellResult:
    """Run one cell, and leave a line in the file TOY_LOG names."""
    if log := os.environ.get("TOY_LOG"):
        with Path(log).open("a", encoding="utf-8") as file:
            file.write(f"{cell.label}\n")
    if cell.part == "train":
        return trained(cell.settings, context)
    return work(cell.settings, context) if cell.part == "work" else trouble(cell.settings["how"])


def work(settings: Any, context: CellContext) -> CellResult:
    """Multiply random matrices, which threads would sum in another order."""
    import pandas as pd
    import torch

    from gradlab.trace import Trace

    numbers = torch.rand(300, 300)
    for step in range(settings["steps"]):
        context.progress(step + 1, settings["steps"], float(step))
        time.sleep(settings["pace"])
        numbers = numbers @ numbers / numbers.sum()
    column = torch.rand(settings["rows"], dtype=torch.float64).numpy()
    tables = {"numbers": pd.DataFrame({"product": float(numbers.sum()), "random": column})}
    steps = pd.DataFrame({"step": range(settings["steps"]), "loss": float(numbers.sum())})
    timesteps = pd.DataFrame({"step": [0], "layer": ["rnn"], "state": ["h"], "t": [0], "norm": [1.5]})
    return CellResult(trace=Trace({"steps": steps, "timesteps": timesteps}), tables=tables)


def trained(settings: Any, context: CellContext) -> CellResult:
    """Train a small net with all that a checkpoint has to keep: random numbers, BatchNorm, momentum, probes."""
    import pandas as pd
    from torch import nn

    from gradlab.tasks import load_digits
    from gradlab.training import TrainSettings, train

    steps = settings["steps"]

    def on_step(step: int, loss: float | None) -> None:
        time.sleep(settings["pace"])
        context.progress(step + 1, steps, loss)

    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 10)
    )
    how = TrainSettings(steps=steps, batch_size=32, seed=settings["seed"])
    result = train(
        model, load_digits(augment=True), how, device="cpu", every=3, on_step=on_step, checkpoint=context.checkpoint
    )
    return CellResult(trace=result.trace, tables={"losses": pd.DataFrame({"loss": result.losses})})


def trouble(how: str) -> CellResult:
    """End as asked."""
    import pandas as pd
    import torch

    if how == "diverge":
        table = pd.DataFrame({"loss": [float("nan"), float("inf")]})
        return CellResult(tables={"bad": table}, status="diverged", message="the loss was not finite at step 1")
    if how == "table":
        return CellResult(tables={"layers": pd.DataFrame({"a": [1]})})
    if how == "exit":
        os._exit(3)
    if how == "kill" or (how == "kill once" and not Path(os.environ["TOY_ONCE"]).exists()):
        if how == "kill once":
            Path(os.environ["TOY_ONCE"]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "memory":  # more than the process may have, as in a container
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))
        try:
            torch.zeros(2**29).sum()
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if how == "hang":
        time.sleep(120)
    if how == "hang hard":  # where no signal is handled
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(120)
    errors = {
        "raise": ValueError("two\nlines"),
        "data": DataError("The data are damaged."),
        "resource": ResourceError("Out of memory on cpu."),
        "library": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    }
    if how in errors:
        raise errors[how]
    return CellResult()


def claims(results: Results) -> list[Claim]:
    """One claim that holds, one that does not; both need a cell of the part "work"."""
    from gradlab.analysis.claims import Claim, Verdict

    numbers = results.table("numbers", "work")["random"]
    text: dict[str, Any] = {"source": "counted", "expected": "1", "unit": "", "detail": "see [bold]x[/bold]"}
    none: dict[str, Any] = {"low": float("nan"), "high": float("nan"), "p_value": float("nan"), "n": len(numbers)}
    verdicts = {"T1": Verdict.REPRODUCED, "T2": Verdict.NOT_REPRODUCED}
    return [
        Claim(id=name, statement="|x| ≤ 1", rule="(E) <", measured=float(numbers.max()), verdict=v, **text, **none)
        for name, v in verdicts.items()
        if name == "T1" or not results.settings["flag"]
    ]


def line(results: Results) -> Drawing:
    """Draw what the parts "work" measured."""
    import matplotlib.pyplot as plt

    data = results.table("numbers", "work")[["random", "value"]]
    figure, axes = plt.subplots()
    axes.plot(data["random"])
    return Drawing(figure=figure, data=data, caption="Random numbers.")


def needs_more(results: Results) -> Drawing:
    """Refuse, as a figure does whose tables a run does not have."""
    raise DataError(f"the preset {results.preset} measures too little for it.")


def stopped(results: Results) -> Drawing:
    """Be interrupted, as by Ctrl-C."""
    if results.settings["note"] == "interrupt":
        raise KeyboardInterrupt
    raise DataError("only drawn with note=interrupt.")


STUDY = Study(
    name="toy",
    title="Nothing at all",
    question="Does the machinery hold?",
    notes=("N0",),
    settings=Settings,
    presets={
        "smoke": Preset(summary="One cell.", settings={"value": (1,), "seeds": 1}),
        "default": Preset(summary="Six cells."),
    },
    plan=plan,
    run=run,
    claims=claims,
    figures={"line": line, "needs-more": needs_more, "stopped": stopped},
)
