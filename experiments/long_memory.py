"""long-memory: who learns what at which distance (notes N7, N10, N13)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradlab.errors import UsageError
from gradlab.study import Cell, CellContext, CellResult, Drawing, Preset, Study, setting

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradlab.analysis.claims import Claim
    from gradlab.study import Results

NETS = ("tanh", "orthogonal", "irnn", "lstm", "lstm bias 1", "lstm chrono", "gru")
CONTEXTS = ("growing", "tanh", "gru", "lstm", "transformer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What can be changed with --set; the defaults are the preset "default"."""

    net: tuple[str, ...] = setting(
        ("tanh", "lstm", "lstm bias 1", "lstm chrono", "gru"), "nets on the adding problem", choices=NETS
    )
    length: tuple[int, ...] = setting(
        (25, 50, 100), "steps T of the adding problem; the claims take the longest", least=4
    )
    hidden: int = setting(32, "units of every recurrent net, width of the Transformer", least=2)
    seeds: int = setting(5, "seeds of the adding problem at the longest T, from 0", least=1)
    other_seeds: int = setting(3, "seeds of everything else, from 0", least=1)
    steps: int = setting(1200, "training steps on the adding problem at most", least=1)
    batch_size: int = setting(50, "sequences a step there", least=1)
    lr: float = setting(5e-3, "learning rate there", least=0)
    optimizer: str = setting("adam", "optimizer everywhere", choices=("adam", "rmsprop"))
    clip_norm: float = setting(1.0, "largest norm of the gradient everywhere; 0 does not clip", least=0)
    evaluate_every: int = setting(50, "steps between evaluations", least=1)
    evaluation_size: int = setting(500, "sequences in an evaluation set", least=2)
    record: int = setting(10, "the time steps are recorded every so many steps, at the longest T, seed 0", least=1)
    timesteps: int = setting(5, "every so many time steps are recorded", least=1)
    copy_net: tuple[str, ...] = setting(("tanh", "lstm chrono"), "nets on copy memory", choices=NETS)
    copy_length: int = setting(100, "pause T of copy memory, in steps", least=4)
    copy_steps: int = setting(600, "training steps there", least=1)
    copy_batch: int = setting(20, "sequences a step there", least=1)
    copy_lr: float = setting(3e-3, "learning rate there", least=0)
    window: tuple[int, ...] = setting((1, 2, 4, 8, 16, 32), "tokens k that a Markov net sees", least=1)
    window_steps: int = setting(1000, "training steps of the nets on a window or a growing context", least=1)
    window_batch: int = setting(256, "sequences a step there", least=1)
    window_lr: float = setting(2e-3, "learning rate there", least=0)
    window_evaluation: int = setting(20_000, "sequences they are evaluated on, once, at the end", least=2)
    context: tuple[str, ...] = setting(CONTEXTS, "nets on the whole write/query series", choices=CONTEXTS)
    query_length: int = setting(64, "tokens of the write/query series", least=4)
    query_steps: int = setting(600, "training steps there at most, but of the growing context", least=1)
    query_batch: int = setting(128, "sequences a step there", least=1)
    query_lr: float = setting(5e-3, "learning rate there", least=0)

    def __post_init__(self) -> None:
        if max(self.window) >= self.query_length:
            raise UsageError(
                f"Setting 'window' has {max(self.window)}, but the write/query series has {self.query_length} tokens: "
                "take shorter windows or a longer query_length."
            )


PRESETS = {
    "smoke": Preset(
        summary="Seconds: too small to decide most claims; for tests.",
        settings={
            "net": ("tanh", "lstm", "lstm chrono"), "length": (4, 8), "hidden": 8, "seeds": 2, "other_seeds": 2,
            "steps": 6, "batch_size": 8, "evaluate_every": 3, "evaluation_size": 20, "record": 2, "timesteps": 3,
            "copy_net": ("tanh", "lstm chrono"), "copy_length": 4, "copy_steps": 4, "copy_batch": 4, "window": (1, 4),
            "query_length": 8, "query_steps": 4, "query_batch": 8, "window_steps": 4, "window_batch": 8,
            "window_evaluation": 40,
        },
    ),
    "default": Preset(summary="Adding at T to 100, copy memory, write/query, 5 seeds; under 6 minutes on 2 cores."),
    "wide": Preset(
        summary="The same with 64 units and 2,000 steps at T = 100; about 10 minutes on 2 idle cores. Unverified.",
        settings={"hidden": 64, "steps": 2000, "length": (100,), "copy_batch": 50, "copy_steps": 800},
    ),
    "paper": Preset(
        summary="Tallec & Ollivier 2018: 128 units, RMSprop, T to 750, 50,000 steps; for a GPU. Unverified.",
        settings={
            "net": NETS, "length": (100, 200, 400, 750), "hidden": 128, "other_seeds": 5, "steps": 50_000, "lr": 1e-3,
            "optimizer": "rmsprop", "clip_norm": 0.0, "evaluate_every": 500, "evaluation_size": 20_000, "record": 500,
            "timesteps": 10, "copy_net": NETS, "copy_length": 500, "copy_steps": 50_000, "copy_batch": 50,
            "copy_lr": 1e-3,
        },
    ),
}  # fmt: skip

_HOW = ("hidden", "optimizer", "clip_norm")


def plan(settings: Settings) -> list[Cell]:
    """Lay out adding (net x T x seed), copy memory (net x seed), write/query (net x seed), and its look-up table."""
    shared = {name: getattr(settings, name) for name in _HOW}
    cells = []
    for length in settings.length:
        longest = length == max(settings.length)
        how = shared | {
            "length": length, "steps": settings.steps, "batch_size": settings.batch_size, "lr": settings.lr,
            "evaluate_every": settings.evaluate_every, "evaluation_size": settings.evaluation_size,
            "timesteps": settings.timesteps,
        }  # fmt: skip
        for seed in range(settings.seeds if longest else settings.other_seeds):
            record = {"record": settings.record if longest and seed == 0 else 0}
            cells += [_cell("adding", net, seed, how | record, length) for net in settings.net]
    copying = shared | {
        "length": settings.copy_length, "steps": settings.copy_steps, "batch_size": settings.copy_batch,
        "lr": settings.copy_lr, "evaluate_every": settings.evaluate_every, "evaluation_size": settings.evaluation_size,
    }  # fmt: skip
    asking = shared | {
        "length": settings.query_length, "steps": settings.query_steps, "batch_size": settings.query_batch,
        "lr": settings.query_lr, "evaluate_every": settings.evaluate_every,
        "evaluation_size": settings.evaluation_size,
    }  # fmt: skip
    # A net on a window is trained to the end and then evaluated once, on many sequences.
    once = asking | {
        "steps": settings.window_steps, "batch_size": settings.window_batch, "lr": settings.window_lr,
        "evaluate_every": settings.window_steps, "evaluation_size": settings.window_evaluation,
    }  # fmt: skip
    looked_up = {"window": list(settings.window), "length": settings.query_length}
    for seed in range(settings.other_seeds):
        cells += [_cell("copy", net, seed, copying, settings.copy_length) for net in settings.copy_net]
        cells += [_cell("query", f"markov {k}", seed, once, 10) for k in settings.window]
        for net in settings.context:
            growing = net == "growing"
            cells.append(_cell("query", net, seed, once if growing else asking, 10 if growing else 64))
        own = looked_up | {"seed": seed}
        cells.append(Cell(part="table", label=f"look-up table seed {seed}", settings=own, cost=0.5))
    return cells


def _cell(part: str, net: str, seed: int, how: dict[str, Any], steps: int) -> Cell:
    """Return a training cell; its cost is what a step through so many time steps takes on one core."""
    slow = {"gru": 3.0, "transformer": 3.0}.get(net, 1.0)
    cost = 1e-4 * steps * how["steps"] * slow * (how["hidden"] / 32)
    label = f"{part} {how['length']}, {net}, seed {seed}"
    return Cell(part=part, label=label, settings=how | {"net": net, "seed": seed}, cost=cost)


def run(cell: Cell, context: CellContext) -> CellResult:
    """Run one cell."""
    return _table(cell, context) if cell.part == "table" else _train(cell, context)


def _train(cell: Cell, context: CellContext) -> CellResult:
    import zlib

    import numpy as np
    import pandas as pd

    from gradlab.analysis.memory_claims import ADDING_SOLVED, LATENT_SOLVED
    from gradlab.measure.learning import LearnSettings, learn, memory_net
    from gradlab.tasks import AddingTask, CopyTask, SequenceTask, WriteQueryTask

    own = cell.settings
    net, length, steps = own["net"], own["length"], own["steps"]
    tasks: dict[str, Callable[[], SequenceTask]] = {
        "adding": lambda: AddingTask(length=length),
        "copy": lambda: CopyTask(T=length),
        "query": lambda: WriteQueryTask(length=length),
    }
    task = tasks[cell.part]()
    sees = int(net.removeprefix("markov ")) if net.startswith("markov ") else length
    bayes = task.bayes_loss(sees) if isinstance(task, WriteQueryTask) else float("nan")
    # Weights, batches and evaluation set are drawn anew for every run, so that runs are independent of each other.
    drawn = zlib.crc32(f"{cell.part} {net} {length} {own['seed']}".encode())
    # The longest memory to prepare for: the series, and for copy memory three halves of the pause, as in the paper.
    horizon = 1.5 * length if cell.part == "copy" else length
    model = memory_net(net, task, hidden=own["hidden"], horizon=horizon, seed=drawn)
    targets = {"adding": ADDING_SOLVED, "query": 0.0 if net.startswith(("markov", "growing")) else LATENT_SOLVED}
    how = LearnSettings(
        steps=steps,
        batch_size=own["batch_size"],
        lr=own["lr"],
        optimizer=own["optimizer"],
        clip_norm=own["clip_norm"],
        evaluate_every=own["evaluate_every"],
        evaluation_size=own["evaluation_size"],
        target=targets.get(cell.part, 0.0),
        seed=drawn,
    )
    found = learn(
        model,
        task,
        how,
        device=context.device,
        record_every=own.get("record", 0),
        timesteps=own.get("timesteps", 0),
        on_step=lambda step, loss: context.progress(step + 1, steps, loss),
        checkpoint=context.checkpoint,
    )
    outcome = {
        "solved_at": np.nan if found.solved_at is None else found.solved_at,
        "best": found.losses.min(initial=np.inf),
        "last": found.losses[-1] if found.status == "done" else np.inf,
        "parameters": found.parameters,
        "baseline": task.baseline,
        "bayes": bayes,
        "train_seconds": found.seconds,
        "train_cpu_seconds": found.cpu_seconds,
    }
    tables = {
        "curve": pd.DataFrame({"step": found.steps, "loss": found.losses, "train_loss": found.train_losses}),
        "outcome": pd.DataFrame([outcome]),
    }
    message = "" if found.status == "done" else "the training loss was not finite"
    trace = found.trace if own.get("record") else None
    return CellResult(trace=trace, tables=tables, status=found.status, message=message)


def _table(cell: Cell, context: CellContext) -> CellResult:
    import pandas as pd
    import torch
    from torch.nn.functional import nll_loss

    from gradlab.tasks import WriteQueryTask, evaluation_set

    own = cell.settings
    task = WriteQueryTask(length=own["length"])
    x, y = evaluation_set(task, 50_000, seed=own["seed"])
    rows = []
    for done, window in enumerate(own["window"]):
        context.progress(done, len(own["window"]), None)
        loss = nll_loss(torch.log(task.look_up(x, window).double()), y)
        rows.append((window, float(loss), task.bayes_loss(window)))
    return CellResult(tables={"table": pd.DataFrame(rows, columns=["window", "loss", "bayes"])})


def claims(results: Results) -> list[Claim]:
    """Decide who learns what."""
    from gradlab.analysis.memory_claims import memory_claims

    adding, copying, query = (results.table("outcome", part) for part in ("adding", "copy", "query"))
    return memory_claims(adding, copying, query, results.table("table", "table"))


def _curves(results: Results) -> Drawing:
    from gradlab.plots import memory

    parts = []
    for part in ("adding", "copy"):
        curves, outcomes = results.table("curve", part), results.table("outcome", part)
        parts.append(curves.merge(outcomes[["cell", "baseline"]], on="cell") if len(curves) else curves)
    data = memory.learning_curves_data(*parts)
    return Drawing(figure=memory.learning_curves(data), data=data, caption=memory.learning_curves_caption(data))


def _success(results: Results) -> Drawing:
    from gradlab.plots import memory

    data = memory.success_by_length_data(results.table("outcome", "adding"))
    return Drawing(figure=memory.success_by_length(data), data=data, caption=memory.success_by_length_caption(data))


def _windows(results: Results) -> Drawing:
    from gradlab.plots import windows

    data = windows.window_loss_data(results.table("outcome", "query"), results.table("table", "table"))
    return Drawing(figure=windows.window_loss(data), data=data, caption=windows.window_loss_caption(data))


def _through_time(results: Results) -> Drawing:
    from gradlab.plots import time_heatmap

    data = time_heatmap.time_heatmap_data(results.table("timesteps", "adding"))
    return Drawing(figure=time_heatmap.time_heatmap(data), data=data, caption=time_heatmap.time_heatmap_caption(data))


FIGURES: dict[str, Callable[[Results], Drawing]] = {
    "learning-curves": _curves,
    "success-by-length": _success,
    "window-loss": _windows,
    "gradient-through-time": _through_time,
}

STUDY = Study(
    name="long-memory",
    title="Who learns what at which distance: recurrent nets, windows and attention",
    question=(
        "A Markov model loses what lies before its window, a naive one grows with its context, a latent one sums up "
        "the past in a state. Who learns to bridge how many steps, and in how many updates?"
    ),
    notes=("N7", "N10", "N13"),
    settings=Settings,
    presets=PRESETS,
    plan=plan,
    run=run,
    claims=claims,
    figures=FIGURES,
)
