"""batchnorm: what BatchNorm does for training, what it does to gradients, and where it is worse (note N5)."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradlab.errors import UsageError
from gradlab.study import Cell, CellContext, CellResult, Drawing, Preset, Study, setting

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradlab.analysis.claims import Claim
    from gradlab.nets import MLP
    from gradlab.study import Results
    from gradlab.training import TrainSettings

IMAGES = 1400  # of digits, to train on
FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)  # of the learning rate, along the gradient: [1/2, 4] as published
EXPLODING = (("relu", "batch"), ("tanh", "batch"), ("linear", "batch"), ("relu", "none"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What can be changed with --set; the defaults are the preset "default"."""

    depth: int = setting(10, "hidden layers of the MLP that is trained", least=2)
    width: int = setting(100, "its units a layer", least=1)
    batch_size: int = setting(128, "images a step")
    steps: int = setting(300, "training steps", least=2)
    window: int = setting(30, "steps at the end over which the training loss is averaged", least=1)
    lr: float = setting(0.05, "learning rate of the sweeps over scale, batch size and momentum")
    lr_range: tuple[float, ...] = setting((0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0), "learning rates compared")
    scale: tuple[float, ...] = setting((1.0, 0.3, 0.1, 0.01, 0.001), "factors on the hidden weights at the start")
    small_batch: tuple[int, ...] = setting((2, 4, 8, 32), "further batch sizes to train with", empty=True)
    momentum: tuple[float, ...] = setting((0.1, 0.01), "weights of the newest batch in the running statistics")
    eps: tuple[float, ...] = setting((0.0, 1e-5, 1e-3), "eps of BatchNorm in the identity", least=0)
    identity_scale: tuple[float, ...] = setting(
        (1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3, 1.0, 10.0),
        "factors on the weights in the identity",
    )
    seeds: int = setting(3, "seeds of the trained nets, from 0", least=1)
    least_scale_seeds: int = setting(
        20, "seeds with BatchNorm from the smallest scale, where they differ most", least=1
    )
    edge_scale: float = setting(3e-4, "a scale so small that eps is expected to end training")
    long_steps: int = setting(600, "steps of longer runs from the two smallest scales", least=2)
    long_seeds: int = setting(10, "seeds of those with BatchNorm", least=1)
    landscape_lr: float = setting(0.1, "learning rate where the loss landscape is measured")
    landscape_points: int = setting(15, "places during training where it is", least=2)
    landscape_seeds: int = setting(5, "seeds of it", least=1)
    record: int = setting(16, "steps that the probes record, log-spaced", least=2)
    rate_width: int = setting(512, "width of the MLP that measures the explosion at initialization", least=8)
    rate_depth: int = setting(40, "its hidden layers", least=12)
    rate_batch: tuple[int, ...] = setting((32, 128, 512), "its batch sizes", least=4)
    blocks: int = setting(50, "blocks of the residual net at initialization", least=20)
    residual_width: int = setting(256, "its units", least=8)
    init_seeds: int = setting(3, "seeds of what is measured at initialization", least=1)

    def __post_init__(self) -> None:
        """Refuse what would fail in every cell."""
        for name in ("lr", "lr_range", "landscape_lr", "scale", "edge_scale", "identity_scale"):
            for value in _items(getattr(self, name)):
                if not value > 0:
                    raise UsageError(f"Setting '{name}' must be above 0; got {value:g}.")
        for name in ("batch_size", "small_batch"):
            for value in _items(getattr(self, name)):
                if value < 2:
                    raise UsageError(
                        f"Setting '{name}' must be at least 2, since BatchNorm takes a variance over the batch; got "
                        f"{value}."
                    )
                if value > IMAGES:
                    raise UsageError(f"Setting '{name}' is {value}, but digits has {IMAGES:,} training images.")
        for value in self.momentum:
            if not 0 < value <= 1:
                raise UsageError(f"Setting 'momentum' must lie above 0 and be at most 1; got {value:g}.")


def _items(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


PRESETS = {
    "smoke": Preset(
        summary="Seconds: every part once, too small to decide most claims; for tests.",
        settings={
            "depth": 3, "width": 20, "batch_size": 32, "steps": 12, "window": 4, "lr_range": (0.01, 0.1),
            "scale": (1.0, 0.1), "small_batch": (2,), "seeds": 2, "least_scale_seeds": 3,
            "landscape_points": 3, "landscape_seeds": 2, "record": 4, "rate_width": 32, "rate_depth": 12,
            "rate_batch": (8, 16), "blocks": 20, "edge_scale": 0.03, "long_steps": 16, "long_seeds": 3,
            "residual_width": 32, "init_seeds": 2, "identity_scale": (1e-3, 1.0),
        },
    ),
    "default": Preset(summary="Digits, 10 layers of 100 units, 300 steps, 3 to 5 seeds; under 2 minutes on 2 cores."),
    "paper": Preset(
        summary="Width 512, 1,000 steps, 10 seeds, explosion at width 2,048; for a GPU. Unverified.",
        settings={
            "width": 512, "steps": 1000, "window": 100, "seeds": 10, "least_scale_seeds": 30, "landscape_seeds": 10,
            "landscape_points": 50, "record": 40, "rate_width": 2048, "rate_depth": 60,
            "long_steps": 2000, "residual_width": 1024, "init_seeds": 10,
        },
    ),
}  # fmt: skip


# -- cells ------------------------------------------------------------------------------------------------------------


def plan(settings: Settings) -> list[Cell]:
    """Lay out the grid: training, its landscape, its running statistics, and what holds at initialization."""
    own = dataclasses.asdict(settings)
    net = {name: own[name] for name in ("depth", "width", "batch_size", "steps")}
    cost = 4e-8 * settings.depth * settings.width * settings.steps * (settings.batch_size + 200)
    cells = []

    def add(part: str, label: str, cost: float, **varied: Any) -> None:
        cells.append(Cell(part=part, label=f"{part}: {label}", settings=varied, cost=cost))

    trained = [
        *({"lr": settings.lr, "scale": scale} for scale in settings.scale),
        *({"lr": lr, "scale": 1.0} for lr in settings.lr_range),
        *({"lr": settings.lr, "scale": 1.0, "batch_size": size} for size in settings.small_batch),
    ]
    for seed, norm in itertools.product(range(settings.seeds), ("batch", "none")):
        for how in trained:
            about = net | {"window": settings.window, "norm": norm, "seed": seed} | how
            text = f"{norm}, lr {how['lr']:g}, scale {how['scale']:g}, batch {about['batch_size']}, seed {seed}"
            add("train", text, cost, **about)
    for how in _from_tiny_weights(settings):
        about = net | {"window": settings.window, "lr": settings.lr} | how
        text = f"{how['norm']}, scale {how['scale']:g}, {about['steps']} steps, seed {how['seed']}"
        add("train", text, cost * about["steps"] / settings.steps, **about)
    for seed, norm in itertools.product(range(settings.landscape_seeds), ("batch", "none")):
        about = net | {"lr": settings.landscape_lr, "points": settings.landscape_points, "norm": norm, "seed": seed}
        add("landscape", f"{norm}, seed {seed}", 2 * cost, **about)
    for seed, momentum in itertools.product(range(settings.seeds), settings.momentum):
        about = net | {"lr": settings.lr, "record": settings.record, "momentum": momentum, "seed": seed}
        add("running", f"momentum {momentum:g}, seed {seed}", 1.5 * cost, **about)
    for seed in range(settings.init_seeds):
        about = {"width": settings.width, "depth": settings.depth, "batch_size": settings.batch_size, "seed": seed}
        scales = {"eps": list(settings.eps), "scales": list(settings.identity_scale)}
        add("identity", f"seed {seed}", 1.0, **about, **scales)
        for (activation, norm), size in itertools.product(EXPLODING, settings.rate_batch):
            if (activation, norm) == ("relu", "batch") or size == _middle(settings.rate_batch):
                about = {"width": settings.rate_width, "depth": settings.rate_depth, "batch_size": size, "seed": seed}
                text = f"{activation}, {norm}, batch {size}, seed {seed}"
                add("explosion", text, size / 128, activation=activation, norm=norm, **about)
        add("growth", f"seed {seed}", 1.0, width=settings.residual_width, blocks=settings.blocks, seed=seed)
    return list({cell.key: cell for cell in cells}.values())  # the sweeps share a cell


def _from_tiny_weights(settings: Settings) -> list[dict[str, Any]]:
    least = min(settings.scale)
    if least >= 1:
        return []
    more = range(settings.seeds, settings.least_scale_seeds)
    runs: list[dict[str, Any]] = [{"norm": "batch", "scale": least, "seed": seed} for seed in more]
    for scale, norm in itertools.product((least, settings.edge_scale), ("batch", "none")):
        seeds = settings.long_seeds if (scale, norm) == (least, "batch") else settings.seeds
        about = {"norm": norm, "scale": scale, "steps": settings.long_steps}
        runs += [about | {"seed": seed} for seed in range(seeds)]
    return runs


def _middle(sizes: tuple[int, ...]) -> int:
    return 128 if 128 in sizes else sorted(sizes)[len(sizes) // 2]


def run(cell: Cell, context: CellContext) -> CellResult:
    """Run one cell."""
    parts: dict[str, Callable[[dict[str, Any], CellContext], CellResult]]
    parts = {
        "train": _train, "landscape": _landscape, "running": _running,
        "identity": _identity, "explosion": _explosion, "growth": _growth,
    }  # fmt: skip
    return parts[cell.part](dict(cell.settings), context)


def build(own: dict[str, Any]) -> tuple[MLP, TrainSettings]:
    """Return a cell's net, with He's initialization, and how it is trained: plain SGD."""
    from gradlab.measure.scale_invariance import scale_hidden_weights
    from gradlab.nets import MLP, initialize
    from gradlab.training import TrainSettings

    model = MLP(own["depth"], width=own["width"], in_features=64, classes=10, norm=own.get("norm", "batch"))
    scale_hidden_weights(initialize(model, "he_normal", seed=own["seed"]), own.get("scale", 1.0))
    how = TrainSettings(
        steps=own["steps"], batch_size=own["batch_size"], lr=own["lr"], momentum=0.0, weight_decay=0.0,
        channels_last=False, seed=own["seed"],
    )  # fmt: skip
    return model, how


def _train(own: dict[str, Any], context: CellContext) -> CellResult:
    import math

    import pandas as pd

    from gradlab.tasks import load_digits
    from gradlab.training import train

    model, how = build(own)
    steps = how.steps
    result = train(
        model, load_digits(), how, device=context.device, every=lambda step: step == steps - 1,
        on_step=lambda step, loss: context.progress(step + 1, steps, loss), checkpoint=context.checkpoint,
    )  # fmt: skip
    loss = math.inf if result.diverged_at is not None else float(result.losses[-own["window"] :].mean())
    ends = pd.DataFrame({"loss": [loss], "test_error": [result.test_error]})
    message = "" if result.diverged_at is None else f"the loss was not finite at step {result.diverged_at}"
    return CellResult(tables={"ends": ends}, status=result.status, message=message)


def _landscape(own: dict[str, Any], context: CellContext) -> CellResult:
    import numpy as np
    import pandas as pd

    from gradlab.measure.landscape import along_gradient
    from gradlab.tasks import batch_schedule, load_digits
    from gradlab.training import train

    model, how = build(own)
    task, steps = load_digits(), how.steps
    order = batch_schedule(len(task.train_labels), how.batch_size, steps + 1, how.seed)
    places = set(np.linspace(0, steps, own["points"]).round().astype(int).tolist())
    on_device = task.to(context.device)
    rows: list[dict[str, float]] = []

    def measure(updates: int) -> None:
        x, y = on_device.batch(order[updates])  # the one that the next step would take
        found = along_gradient(model, x, y, lr=how.lr, factors=FACTORS)
        start = {"updates": updates, "start": found.loss, "grad_norm": found.grad_norm}
        for factor, loss, change in zip(FACTORS, found.losses, found.grad_changes, strict=True):
            rows.append(start | {"factor": factor, "loss": loss, "grad_change": change})

    def on_step(step: int, loss: float | None) -> None:
        context.progress(step + 1, steps, loss)
        if step + 1 in places:
            measure(step + 1)

    model.to(context.device)
    measure(0)
    result = train(model, task, how, device=context.device, every=lambda step: step == steps - 1, on_step=on_step)
    message = "" if result.diverged_at is None else f"the loss was not finite at step {result.diverged_at}"
    return CellResult(tables={"landscape": pd.DataFrame(rows)}, status=result.status, message=message)


def _running(own: dict[str, Any], context: CellContext) -> CellResult:
    import pandas as pd

    from gradlab.measure.normalization_modes import mode_losses, set_momentum
    from gradlab.probes import log_spaced
    from gradlab.tasks import load_digits
    from gradlab.training import train

    model, how = build(own)
    set_momentum(model, own["momentum"])
    task, steps = load_digits().to(context.device), how.steps
    schedule = log_spaced(steps, own["record"])
    rows: list[tuple[int, float, float]] = []

    def on_step(step: int, loss: float | None) -> None:
        context.progress(step + 1, steps, loss)
        if schedule(step):
            modes = mode_losses(model, task.train_images, task.train_labels, batch_size=how.batch_size)
            rows.append((step, *modes))

    result = train(model, task, how, device=context.device, every=schedule, on_step=on_step)
    modes = pd.DataFrame(rows, columns=["step", "in_training", "in_evaluation"])
    return CellResult(trace=result.trace, tables={"modes": modes}, status=result.status)


def _identity(own: dict[str, Any], context: CellContext) -> CellResult:
    import pandas as pd
    import torch

    from gradlab.measure.scale_invariance import layer_scale_response, net_scale_response
    from gradlab.tasks import load_digits

    model, _ = build(own | {"steps": 1, "lr": 1.0})
    model.double()
    task = load_digits()
    generator = torch.Generator().manual_seed(own["seed"])
    chosen = torch.randperm(len(task.train_labels), generator=generator)[: own["batch_size"]]
    x, labels = task.train_images[chosen].double().flatten(1), task.train_labels[chosen]
    gaussian = torch.randn(own["batch_size"], own["width"], generator=generator, dtype=torch.float64)
    cotangent = torch.randn(own["batch_size"], own["width"], generator=generator, dtype=torch.float64)
    weight = torch.randn(own["width"], own["width"], generator=generator, dtype=torch.float64) / own["width"] ** 0.5
    rows = []
    pairs = list(itertools.product(own["eps"], own["scales"]))
    for done, (eps, scale) in enumerate(pairs):
        context.progress(done, len(pairs), None)
        found = {
            "one layer": layer_scale_response(weight, gaussian, cotangent, scale=scale, eps=eps),
            "net": net_scale_response(model, x, labels, scale=scale, eps=eps),
        }
        rows += [{"net": net, "epsilon": eps, "factor": scale} | dataclasses.asdict(got) for net, got in found.items()]
    return CellResult(tables={"identity": pd.DataFrame(rows)})


def _explosion(own: dict[str, Any], context: CellContext) -> CellResult:
    import pandas as pd

    from gradlab.measure.batchnorm import batchnorm_explosion

    context.progress(0, 1, None)
    norms = batchnorm_explosion(**own)
    return CellResult(tables={"explosion": pd.DataFrame({"place": range(1, own["depth"] + 1), "log_grad_norm": norms})})


def _growth(own: dict[str, Any], context: CellContext) -> CellResult:
    import pandas as pd

    from gradlab.measure.batchnorm import residual_growth

    blocks = own["blocks"]
    kinds: dict[str, dict[str, Any]] = {
        "BatchNorm": {"normalized": True},
        "no norm": {"normalized": False},
        "no norm, scaled": {"normalized": False, "branch_scale": blocks**-0.5},
    }
    frames = []
    for done, (kind, how) in enumerate(kinds.items()):
        context.progress(done, len(kinds), None)
        signal, gradient = residual_growth(
            width=own["width"], batch_size=own["width"], blocks=blocks, seed=own["seed"], **how
        )
        columns = {"kind": kind, "block": range(blocks + 1), "signal": signal, "gradient": gradient}
        frames.append(pd.DataFrame(columns))
    return CellResult(tables={"growth": pd.concat(frames, ignore_index=True)})


# -- claims and figures -----------------------------------------------------------------------------------------------


def claims(results: Results) -> list[Claim]:
    """Decide what BatchNorm does, and where it is the worse choice."""
    from gradlab.analysis import batchnorm_claims as decide
    from gradlab.analysis import batchnorm_init_claims as at_start

    settings = results.settings
    usual = {name: settings[name] for name in ("lr", "batch_size")}
    ends = results.table("ends", "train")
    return [
        *decide.identity_claims(results.table("identity", "identity")),
        *decide.scale_claims(ends, **usual, steps=settings["steps"]),
        *decide.rate_claims(ends, batch_size=settings["batch_size"]),
        *decide.batch_claims(ends, **usual),
        *decide.landscape_claims(results.table("landscape", "landscape"), lr=settings["landscape_lr"]),
        *at_start.explosion_claims(results.table("explosion", "explosion")),
        *at_start.growth_claims(results.table("growth", "growth")),
        *decide.running_claims(results.table("modes", "running")),
    ]


FIGURES = (
    "scale-invariance", "learning-rate-range", "loss-landscape", "explosion", "running-statistics", "residual-growth",
)  # fmt: skip


def _figure(name: str) -> Callable[[Results], Drawing]:
    def draw(results: Results) -> Drawing:
        from gradlab.plots.batchnorm_figures import draw_batchnorm_figure

        figure, data, caption = draw_batchnorm_figure(name, results.table, results.settings)
        return Drawing(figure=figure, data=data, caption=caption)

    return draw


STUDY = Study(
    name="batchnorm",
    title="BatchNorm: tiny weights, large learning rates, smoother steps, and where it is worse",
    question=(
        "Why does BatchNorm train with small weights and with large learning rates, what does it do to gradients at "
        "initialization and along a step, and where is a net without it the better one?"
    ),
    notes=("N5",),
    settings=Settings,
    presets=PRESETS,
    plan=plan,
    run=run,
    claims=claims,
    figures={name: _figure(name) for name in FIGURES},
)
