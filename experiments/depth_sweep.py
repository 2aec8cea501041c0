"""depth-sweep: what depth does to plain and residual nets, with and without BatchNorm (note N4)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradlab.errors import DataError, UsageError
from gradlab.nets.names import INITIALIZATIONS
from gradlab.study import Cell, CellContext, CellResult, Drawing, Preset, Study, setting
from gradlab.tasks import fetch_task, load_task

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import pandas as pd
    from torch import nn

    from gradlab.analysis.claims import Claim
    from gradlab.study import Results
    from gradlab.tasks.image import ImageTask
    from gradlab.training import TrainResult, TrainSettings

#: Nets whose gradient profile at initialization is measured: skip, norm, initialization, SkipInit.
PROFILED = {
    "plain, BatchNorm": (False, "batch", "he_normal", False),
    "plain, He": (False, "none", "he_normal", False),
    "plain, torch default": (False, "none", "default", False),
    "residual, BatchNorm": (True, "batch", "he_normal", False),
    "residual, He": (True, "none", "he_normal", False),
    "residual, SkipInit": (True, "none", "he_normal", True),
}
COUNTED = (20, 32, 44, 56, 110, 1202)
#: What can be checked before a task is loaded: sides of its images that the nets take, and training images.
TASKS = {"digits": ((8, 4), 1400), "cifar10": ((32, 16, 8, 4), 50_000)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What can be changed with --set; the defaults are the preset "default"."""

    task: str = setting("digits", "data the nets are trained on", choices=("digits", "cifar10"))
    size: int = setting(8, "side of the images in pixels: 8 for digits; 32, 16 or 8 for cifar10", least=4)
    depth: tuple[int, ...] = setting((20, 56), "depths to train, each 6k+2", least=8)
    net: tuple[str, ...] = setting(("plain", "residual"), "nets to train", choices=("plain", "residual"))
    norm: tuple[str, ...] = setting(("batch", "none"), "normalizations to train with", choices=("batch", "none"))
    width: int = setting(8, "channels of the first stage", least=1)
    seeds: int = setting(5, "seeds, from 0", least=1)
    steps: int = setting(150, "training steps", least=2)
    batch_size: int = setting(128, "images a step", least=2)
    lr: float = setting(0.1, "learning rate after warm-up", least=0)
    momentum: float = setting(0.9, "momentum of SGD", least=0)
    weight_decay: float = setting(1e-4, "L2 penalty", least=0)
    milestones: tuple[int, ...] = setting((), "steps at which the rate falls to a tenth", least=1, empty=True)
    warmup_steps: int = setting(0, "steps at the rate warmup_lr", least=0)
    warmup_lr: float = setting(0.01, "learning rate of the warm-up", least=0)
    clip_norm: float = setting(0.0, "largest norm of the gradient; 0 does not clip", least=0)
    augment: bool = setting(False, "crop and flip the training images at random")
    init_batch: str = setting("default", "initialization of nets with BatchNorm", choices=INITIALIZATIONS)
    init_none: str = setting("he_normal", "initialization of nets without normalization", choices=INITIALIZATIONS)
    precision: str = setting("float32", "arithmetic", choices=("float32", "bf16", "fp16"))
    window: int = setting(50, "steps at the end over which the training loss is averaged", least=1)
    record: int = setting(16, "steps that the probes record, log-spaced", least=2)
    profile_depth: tuple[int, ...] = setting((20, 56, 110), "depths of the gradient profile at initialization", least=8)
    profile_width: int = setting(8, "channels of the first stage in the profile", least=1)
    profile_batch: int = setting(64, "images in the profile", least=2)
    rate_width: int = setting(512, "width of the MLP that measures BatchNorm's explosion rate", least=8)
    shatter_seeds: int = setting(20, "seeds of the shattered-gradients measurement", least=2)

    def __post_init__(self) -> None:
        """Refuse what would fail in every cell."""
        sizes, images = TASKS[self.task]
        if self.size not in sizes:
            allowed = ", ".join(map(str, sizes))
            raise UsageError(f"Setting 'size' is {self.size}, but task={self.task} has images of side {allowed}.")
        for name in ("depth", "profile_depth"):
            for depth in getattr(self, name):
                if depth % 6 != 2:
                    near = depth - (depth - 2) % 6
                    raise UsageError(f"Setting '{name}' takes depths 6k+2; got {depth}: take {near} or {near + 6}.")
        for name in ("batch_size", "profile_batch"):
            if getattr(self, name) > images:
                raise UsageError(
                    f"Setting '{name}' is {getattr(self, name)}, but task={self.task} has {images:,} training images: "
                    "take at most as many."
                )


PRESETS = {
    "smoke": Preset(
        summary="Seconds: every part once, too small to decide most claims; for tests.",
        settings={
            "depth": (8, 14), "width": 4, "seeds": 2, "steps": 6, "batch_size": 32, "window": 2, "record": 4,
            "profile_depth": (8, 14), "profile_width": 4, "profile_batch": 16, "rate_width": 64, "shatter_seeds": 2,
        },
    ),
    "default": Preset(summary="Digits, 8x8: degradation and both gradient regimes, 5 seeds; under 3 minutes, 2 cores."),
    "cifar": Preset(
        summary="CIFAR-10 at 16x16, width 8, 400 steps, 5 seeds; about 20 minutes on 2 cores.",
        settings={
            "task": "cifar10", "size": 16, "steps": 400, "window": 100, "weight_decay": 0.0, "profile_width": 16,
        },
    ),
    "paper": Preset(
        summary="He et al. 2015: CIFAR-10 at 32x32, 64,000 steps, depths 20 to 110; for a GPU. Unverified.",
        settings={
            "task": "cifar10", "size": 32, "width": 16, "depth": (20, 32, 44, 56, 110), "norm": ("batch",),
            "steps": 64_000, "milestones": (32_000, 48_000), "warmup_steps": 400, "augment": True,
            "init_batch": "he_normal", "window": 1000, "record": 40, "profile_width": 16,
        },
    ),
}  # fmt: skip


# -- cells ------------------------------------------------------------------------------------------------------------


def plan(settings: Settings) -> list[Cell]:
    """Lay out the grid: training, profiles at initialization, and what theory says about BatchNorm."""
    own = dataclasses.asdict(settings)
    shared = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in own.items()
        if key in _TRAINING
    }  # fmt: skip
    cells = []
    pixels = settings.width * settings.size**2 * settings.batch_size * settings.steps
    for seed in range(settings.seeds):
        for depth in settings.depth:
            for net in settings.net:
                for norm in settings.norm:
                    varied = {"depth": depth, "net": net, "norm": norm, "seed": seed, "init": own[f"init_{norm}"]}
                    label = f"{net}-{depth} {'BatchNorm' if norm == 'batch' else 'no norm'} seed {seed}"
                    cost = 8e-9 * depth * pixels * (1.0 if norm == "batch" else 0.6)
                    cells.append(Cell(part="train", label=label, settings=shared | varied, cost=cost))
        data = {"task": settings.task, "size": settings.size, "profile_batch": settings.profile_batch}
        for depth in settings.profile_depth:
            varied = data | {"depth": depth, "profile_width": settings.profile_width, "seed": seed}
            cells.append(Cell(part="profile", label=f"profile-{depth} seed {seed}", settings=varied, cost=depth / 20))
        rate = {"rate_width": settings.rate_width, "seed": seed}
        cells.append(Cell(part="rate", label=f"BatchNorm rate seed {seed}", settings=rate, cost=1))
    shatter = {"shatter_seeds": settings.shatter_seeds, "seed": 0}
    cells.append(Cell(part="shatter", label="shattered gradients", settings=shatter, cost=2))
    cells.append(Cell(part="arithmetic", label="exact arithmetic", settings={"seed": 0}, cost=1))
    return cells


_TRAINING = (
    "task", "size", "width", "steps", "batch_size", "lr", "momentum", "weight_decay", "milestones", "warmup_steps",
    "warmup_lr", "clip_norm", "augment", "precision", "record",
)  # fmt: skip


def prepare(settings: Settings, data_dir: Path | None) -> None:
    """Fetch the data set."""
    fetch_task(settings.task, data_dir)


def run(cell: Cell, context: CellContext) -> CellResult:
    """Run one cell."""
    parts: dict[str, Callable[[dict[str, Any], CellContext], CellResult]]
    parts = {"train": _train, "profile": _profile, "rate": _rate, "shatter": _shatter, "arithmetic": _arithmetic}
    return parts[cell.part](dict(cell.settings), context)


def _load(settings: dict[str, Any], context: CellContext) -> ImageTask:
    augment = settings.get("augment", False)
    return load_task(settings["task"], size=settings["size"], data_dir=context.data_dir, augment=augment)


def _train(settings: dict[str, Any], context: CellContext) -> CellResult:
    from gradlab.training import train

    task = _load(settings, context)
    return _trained(
        train(_net(settings, task), task, _how(settings), checkpoint=context.checkpoint, **_watched(settings, context))
    )


def _train_seeds(cells: Sequence[Cell], context: CellContext) -> list[CellResult]:
    """Train the seeds of one net at once: a program of stacked nets in place of one for each."""
    from gradlab.training_seeds import train_seeds

    of_seeds = [dict(cell.settings) for cell in cells]
    first, task = of_seeds[0], _load(of_seeds[0], context)
    nets, seeds = [_net(own, task) for own in of_seeds], [own["seed"] for own in of_seeds]
    return [_trained(result) for result in train_seeds(nets, task, _how(first), seeds, **_watched(first, context))]


def _net(settings: dict[str, Any], task: ImageTask) -> nn.Module:
    from gradlab.nets import CifarNet, initialize

    skip, norm, width = settings["net"] == "residual", settings["norm"], settings["width"]
    channels, classes = task.image_shape[0], task.classes
    net = CifarNet(settings["depth"], skip=skip, norm=norm, width=width, in_channels=channels, classes=classes)
    return initialize(net, settings["init"], seed=settings["seed"])


def _how(settings: dict[str, Any]) -> TrainSettings:
    from gradlab.training import TrainSettings

    names = {item.name for item in dataclasses.fields(TrainSettings)}
    how: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items() if key in names}
    return TrainSettings(**how)


def _watched(settings: dict[str, Any], context: CellContext) -> dict[str, Any]:
    from gradlab.probes import log_spaced

    steps = settings["steps"]

    def on_step(step: int, loss: float | None) -> None:
        context.progress(step + 1, steps, loss)

    return {"device": context.device, "every": log_spaced(steps, settings["record"]), "on_step": on_step}


def _trained(result: TrainResult) -> CellResult:
    import numpy as np
    import pandas as pd

    tables = {
        "losses": pd.DataFrame({"step": np.arange(len(result.losses)), "loss": result.losses}),
        "ends": pd.DataFrame([{
            "diverged_at": -1 if result.diverged_at is None else result.diverged_at,
            "test_error": result.test_error,
            "train_seconds": result.seconds,
            "train_cpu_seconds": result.cpu_seconds,
        }]),
    }  # fmt: skip
    message = "" if result.diverged_at is None else f"the loss was not finite at step {result.diverged_at}"
    return CellResult(trace=result.trace, tables=tables, status=result.status, message=message)


def _profile(settings: dict[str, Any], context: CellContext) -> CellResult:
    import torch

    from gradlab.measure.initialization import gradient_profile, initialized
    from gradlab.nets import CifarNet
    from gradlab.trace import Trace

    task = _load(settings, context)
    seed = settings["seed"]
    order = torch.randperm(len(task.train_labels), generator=torch.Generator().manual_seed(seed))
    images = task.train_images[order[: settings["profile_batch"]]].double()
    traces = []
    for done, (skip, norm, scheme, skipinit) in enumerate(PROFILED.values()):
        context.progress(done, len(PROFILED), None)
        model = CifarNet(
            settings["depth"],
            skip=skip,
            norm=norm,
            skipinit=skipinit,
            width=settings["profile_width"],
            in_channels=task.image_shape[0],
        )
        layers = ["stem.relu", "stages.*.activation", *(["stages.*.to_*"] if skip else [])]
        traces.append(
            gradient_profile(initialized(model, scheme, seed=seed), images, seed=~seed % 2**32, layers=layers)
        )
    return CellResult(trace=Trace.merge(traces, [{"net": name} for name in PROFILED]))


def _rate(settings: dict[str, Any], _: CellContext) -> CellResult:
    import numpy as np
    import pandas as pd

    from gradlab.measure.batchnorm import batchnorm_explosion, residual_branch_share

    seed, width = settings["seed"], settings["rate_width"]
    norms = batchnorm_explosion(width=width, batch_size=128, depth=40, seed=seed)
    shares = residual_branch_share(width=256, batch_size=256, blocks=50, seed=seed)
    tables = {
        "explosion": pd.DataFrame({"place": np.arange(1, 41), "log_grad_norm": norms}),
        "shares": pd.DataFrame({"block": np.arange(1, 51), "share": shares}),
    }
    return CellResult(tables=tables)


def _shatter(settings: dict[str, Any], context: CellContext) -> CellResult:
    import pandas as pd

    from gradlab.measure.batchnorm import shattering

    frames = []
    kinds = {
        "plain-24": (24, False, 1.0),
        "residual-50 beta=0.1": (50, True, 0.1),
        "residual-50 beta=1": (50, True, 1.0),
    }
    for done, (kind, (depth, residual, beta)) in enumerate(kinds.items()):
        for draw in range(settings["shatter_seeds"]):
            context.progress(done * settings["shatter_seeds"] + draw, 3 * settings["shatter_seeds"], None)
            acf = shattering(depth=depth, seed=draw, residual=residual, beta=beta)
            frames.append(pd.DataFrame({"kind": kind, "draw": draw, "lag": range(len(acf)), "autocorrelation": acf}))
    return CellResult(tables={"shattering": pd.concat(frames, ignore_index=True)})


def _arithmetic(*_: object) -> CellResult:
    import pandas as pd
    import torch

    from gradlab.measure.initialization import vgg_b_gradient
    from gradlab.nets import CifarNet, parameter_count

    with torch.device("meta"):
        counts = [parameter_count(CifarNet(depth)) for depth in COUNTED]
    tables = {
        "counts": pd.DataFrame({"depth": COUNTED, "parameters": counts}),
        "vgg": pd.DataFrame({"quotient": [vgg_b_gradient()]}),
    }
    return CellResult(tables=tables)


# -- claims -----------------------------------------------------------------------------------------------------------

_RUN = ("net", "norm", "depth", "seed")


def _or_nothing(transform: Callable[..., pd.DataFrame], *arguments: object) -> pd.DataFrame:
    """Return a transform's table, or an empty one where no cell recorded what it needs: then claims are undecided."""
    import pandas as pd

    try:
        return transform(*arguments)
    except DataError:
        return pd.DataFrame()


def claims(results: Results) -> list[Claim]:
    """Decide every claim this study tests from the tables of a run; any part of it may be missing."""
    from gradlab.analysis import depth_claims as decide
    from gradlab.analysis import profiles

    settings = results.settings
    losses = _or_nothing(profiles.final_losses, results.table("losses", "train"), _RUN, settings["window"])
    layers = results.table("layers", "train")
    if len(layers):
        layers = layers[(layers["norm"] == "batch") & (layers["status"] == "done")]
    nets = ("net", "depth", "seed")
    last = _or_nothing(profiles.record_window, layers, "last")
    responses = _or_nothing(profiles.layer_responses, last, nets)
    profile = _or_nothing(profiles.block_gradients, results.table("layers", "profile"), nets)
    ratios = _or_nothing(profiles.end_ratios, profile, nets)
    vgg = results.table("vgg", "arithmetic")
    as_tabulated = {"task": "cifar10", "size": 16, "profile_width": 16, "profile_batch": 64}
    tabulated = all(settings[name] == value for name, value in as_tabulated.items())
    full = settings["steps"] >= 64_000 and settings["augment"] and settings["size"] == 32 and settings["width"] == 16
    return [
        *decide.degradation_claims(losses),
        *decide.unnormalized_claims(losses, max(settings["depth"])),
        *decide.profile_claims(ratios, as_tabulated=tabulated),
        decide.explosion_claim(results.table("explosion", "rate"), settings["rate_width"]),
        *decide.shattering_claims(results.table("shattering", "shatter")),
        *decide.response_claims(responses),
        decide.vgg_claim(float(vgg["quotient"].iloc[0]) if len(vgg) else math.nan),
        *decide.share_claims(results.table("shares", "rate")),
        decide.counts_claim(results.table("counts", "arithmetic")),
        *decide.test_error_claim(results.table("ends", "train"), full_recipe=full),
    ]


# -- figures ----------------------------------------------------------------------------------------------------------

FIGURES = (
    "gradient-by-layer", "training-loss", "layer-responses", "gradient-heatmap", "batchnorm-gain", "skip-and-branch",
)  # fmt: skip


def _figure(name: str) -> Callable[[Results], Drawing]:
    def draw(results: Results) -> Drawing:
        from gradlab.plots.depth_figures import draw_depth_figure

        figure, data, caption = draw_depth_figure(name, results.table, size=results.settings["size"])
        return Drawing(figure=figure, data=data, caption=caption)

    return draw


STUDY = Study(
    name="depth-sweep",
    title="Plain and residual nets against depth, with and without BatchNorm",
    question=(
        "Why do deeper plain nets train worse, on the training set too, and what does adding x mean? Depth x "
        "{plain, residual} x {BatchNorm, none} x seeds, with the gradient split into the part that flows through the "
        "skip and the part that flows through the branch."
    ),
    notes=("N4",),
    settings=Settings,
    presets=PRESETS,
    plan=plan,
    prepare=prepare,
    run_seeds={"train": _train_seeds},
    run=run,
    claims=claims,
    figures={name: _figure(name) for name in FIGURES},
)
