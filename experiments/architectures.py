"""architectures: AlexNet, VGG, GoogLeNet, ResNet and DenseNet counted and probed (notes N1, N2, N3, N4, N6)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradlab.errors import UsageError, unknown
from gradlab.nets.names import ACTIVATIONS, FAMILIES, INITIALIZATIONS, PUBLISHED
from gradlab.study import Cell, CellContext, CellResult, Drawing, Preset, Study, setting
from gradlab.tasks import fetch_task, load_task

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pandas as pd
    import torch

    from gradlab.analysis.claims import Claim
    from gradlab.study import Results

_ALL_NETS = tuple(net for nets in PUBLISHED.values() for net in nets)
#: Where receptive fields are stated: net -> pieces.
PLACES = {"VGG-16": ("conv5_3", "pool5"), "AlexNet": ("conv5", "pool5")}
CIFAR_DEPTHS = (20, 56, 110)
#: Sides of a task's images, and its training images.
TASKS = {"digits": ((8, 4), 1400), "cifar10": ((32, 16, 8, 4), 50_000)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What can be changed with --set; the defaults are the preset "default"."""

    task: str = setting("digits", "data the small nets see", choices=tuple(TASKS))
    size: int = setting(8, "side of the images in pixels: 8 for digits; 32, 16 or 8 for cifar10", least=4)
    family: tuple[str, ...] = setting(FAMILIES, "families", choices=FAMILIES)
    norm: tuple[str, ...] = setting(("none", "batch"), "normalizations", choices=("none", "batch"))
    activation: tuple[str, ...] = setting(("relu", "tanh", "sigmoid"), "activations", choices=ACTIVATIONS)
    init: tuple[str, ...] = setting(
        ("he_normal", "default"), "initializations; the first trains", choices=INITIALIZATIONS
    )
    narrow: int = setting(8, "divisor of the published widths, in the small nets", least=1)
    seeds: int = setting(5, "seeds of what is measured at initialization, from 0", least=1)
    profile_batch: int = setting(16, "images of what is measured at initialization", least=2)
    growth_depth: tuple[int, ...] = setting((6, 12, 24, 40), "layers of the stacks", least=1)
    growth_width: int = setting(16, "channels at the stacks' start", least=1)
    growth_added: int = setting(4, "channels that a layer of the concatenating stack adds", least=1)
    heads_narrow: int = setting(4, "divisor of the published widths, in the GoogLeNet with heads", least=1)
    train_seeds: int = setting(3, "seeds of training, from 0", least=1)
    activation_family: tuple[str, ...] = setting(
        ("alexnet", "vgg", "resnet"), "families that are trained with every activation", choices=FAMILIES, empty=True
    )
    steps: int = setting(25, "training steps", least=2)
    batch_size: int = setting(32, "images a step", least=2)
    lr_batch: float = setting(0.05, "learning rate with BatchNorm", least=0)
    lr_none: float = setting(0.01, "learning rate without", least=0)
    momentum: float = setting(0.9, "momentum of SGD", least=0)
    dropout: float = setting(0.5, "probability of dropout, in the AlexNet that has it", least=0)
    record: int = setting(8, "steps that the probes record, log-spaced", least=2)
    imagenet: tuple[str, ...] = setting((), "published nets whose gradient is followed on 224x224 noise", empty=True)
    imagenet_batch: int = setting(8, "images for them", least=2)

    def __post_init__(self) -> None:
        """Refuse what would fail in every cell."""
        sizes, images = TASKS[self.task]
        if self.size not in sizes:
            allowed = ", ".join(map(str, sizes))
            raise UsageError(f"Setting 'size' is {self.size}, but task={self.task} has images of side {allowed}.")
        for name in ("batch_size", "profile_batch"):
            if getattr(self, name) > images:
                raise UsageError(
                    f"Setting '{name}' is {getattr(self, name)}, but task={self.task} has {images:,} training images: "
                    "take at most as many."
                )
        if self.dropout >= 1:
            raise UsageError(f"Setting 'dropout' is {self.dropout}, but must be below 1: take 0.5, say.")
        for net in self.imagenet:
            if net not in _ALL_NETS:
                raise unknown("imagenet value", net, _ALL_NETS)


PRESETS = {
    "smoke": Preset(
        summary="Seconds: every part once, too small to decide most claims; for tests.",
        settings={
            "family": ("alexnet", "googlenet"), "narrow": 32, "seeds": 2, "growth_depth": (2, 4), "growth_width": 4,
            "growth_added": 2, "heads_narrow": 32, "train_seeds": 1, "steps": 3, "record": 2,
        },
    ),
    "default": Preset(summary="Digits, 8x8: counts, fields, gradients of the five families; under 90 s on 2 cores."),
    "paper": Preset(
        summary="CIFAR-10 at 32x32, full widths; ImageNet forms at 224x224; for a GPU. Unverified.",
        settings={
            "task": "cifar10", "size": 32, "narrow": 1, "heads_narrow": 1, "profile_batch": 64, "steps": 10_000,
            "batch_size": 128, "record": 24, "imagenet_batch": 32,
            "imagenet": ("AlexNet", "VGG-16", "GoogLeNet", "ResNet-50", "DenseNet-121"),
        },
    ),
}  # fmt: skip


# -- cells ------------------------------------------------------------------------------------------------------------


def plan(settings: Settings) -> list[Cell]:
    """Lay out the grid: arithmetic, stacks, profiles and heads at initialization, training."""
    values = dataclasses.asdict(settings)

    def some(*names: str) -> dict[str, Any]:
        return {name: list(values[name]) if isinstance(values[name], tuple) else values[name] for name in names}

    data = some("task", "size", "profile_batch")
    cells = [
        Cell(part="sizes", label=f"sizes of {family}", settings={"family": family, "seed": 0}, cost=2)
        for family in settings.family
    ]
    cells.append(Cell(part="blocks", label="stacks, blocks, CIFAR ResNets", settings={"seed": 0}, cost=1))
    for seed in range(settings.seeds):
        for norm in settings.norm:
            varied = data | {"norm": norm, "seed": seed}
            where = f"{norm}, seed {seed}"
            own = varied | some("growth_depth", "growth_width", "growth_added")
            cells.append(Cell(part="growth", label=f"stacks, {where}", settings=own, cost=2))
            init = some("init")["init"] if norm == "none" else settings.init[:1]  # BatchNorm undoes the scale
            varied["init"] = list(init)
            own = varied | some("heads_narrow")
            cells.append(Cell(part="heads", label=f"auxiliary heads, {where}", settings=own, cost=1))
            own = varied | some("narrow", "activation", "dropout")
            cells += [
                Cell(part="profile", label=f"{family}, {where}", settings=own | {"family": family}, cost=0.5)
                for family in settings.family
            ]
        for net in settings.imagenet:
            varied = some("imagenet_batch") | {"net": net, "init": settings.init[0], "seed": seed}
            cells.append(Cell(part="imagenet", label=f"{net} at init, seed {seed}", settings=varied, cost=20))
    shared = some("task", "size", "narrow", "steps", "batch_size", "momentum", "record")
    for seed in range(settings.train_seeds):
        for varied in _trained(settings):
            lr = settings.lr_batch if varied["norm"] == "batch" else settings.lr_none
            words = [varied["family"], varied["norm"], varied["activation"]]
            words += ["dropout"] if varied["dropout"] else []
            words += ["heads"] if varied["heads"] else []
            label = f"train {' '.join(words)} {varied['init']} seed {seed}"
            slow = {"alexnet": 8, "vgg": 18, "googlenet": 42, "resnet": 19, "densenet": 29}[varied["family"]]
            cost = slow * 1e-3 * settings.steps
            cells.append(
                Cell(part="train", label=label, settings=shared | varied | {"lr": lr, "seed": seed}, cost=cost)
            )
    return cells


def _trained(settings: Settings) -> list[dict[str, Any]]:
    """Return what is trained: families x norms; activations without norm; dropout; heads."""
    base = {"activation": settings.activation[0], "dropout": 0.0, "heads": False, "init": settings.init[0]}
    runs = []
    for family in settings.family:
        runs += [base | {"family": family, "norm": norm} for norm in settings.norm]
        if "none" in settings.norm:
            own = {"family": family, "norm": "none"}
            if family in settings.activation_family:
                runs += [base | own | {"activation": activation} for activation in settings.activation[1:]]
            if family == "alexnet" and settings.dropout > 0:
                runs.append(base | own | {"dropout": settings.dropout})
            if family == "googlenet":
                runs.append(base | own | {"heads": True})
    return [run for place, run in enumerate(runs) if run not in runs[:place]]


def prepare(settings: Settings, data_dir: Path | None) -> None:
    """Fetch the data set."""
    fetch_task(settings.task, data_dir)


def run(cell: Cell, context: CellContext) -> CellResult:
    """Run one cell."""
    parts: dict[str, Callable[[dict[str, Any], CellContext], CellResult]] = {
        "sizes": _sizes, "blocks": _blocks, "growth": _growth, "profile": _profile, "heads": _heads,
        "imagenet": _imagenet, "train": _train,
    }  # fmt: skip
    return parts[cell.part](dict(cell.settings), context)


def _sizes(settings: dict[str, Any], context: CellContext) -> CellResult:
    import pandas as pd
    import torch

    from gradlab.analysis.architecture_theory import total_multiply_adds
    from gradlab.measure import architectures as measure
    from gradlab.nets import parameter_count, published_net

    rows, tables = [], {}
    names = PUBLISHED[settings["family"]]
    for done, net in enumerate(names):
        context.progress(done, len(names), None)
        with torch.device("meta"):  # arithmetic: no weight is ever in memory
            model, image = published_net(net).eval(), torch.zeros(1, 3, 224, 224)
            layers = measure.layer_geometry(model, image)
            if net == "DenseNet-121":
                tables["channels"] = measure.channels_of_pieces(model, image)
        rows.append({
            "net": net, "parameters": parameter_count(model), "heads_parameters": parameter_count(model.heads),
            "linear_parameters": int(layers.loc[layers["kind"] == "linear", "parameters"].sum()),
            "multiply_adds": total_multiply_adds(layers.to_dict("records")),
        })  # fmt: skip
    tables["nets"] = pd.DataFrame(rows)
    plain = [net for net in names if " " not in net]  # variants have the windows of their net
    tables["fields"] = pd.concat([_fields(net) for net in plain], ignore_index=True)
    return CellResult(tables=tables)


def _fields(net: str) -> pd.DataFrame:
    """Measure a net's receptive fields where one is stated and at its last map, beside the arithmetic's."""
    import pandas as pd

    from gradlab.analysis.architecture_theory import receptive_fields
    from gradlab.measure.architectures import cifar_maps, measured_receptive_fields, trunk_maps
    from gradlab.nets import published_net

    arithmetic = receptive_fields(net)
    places = list(dict.fromkeys([*PLACES.get(net, ()), list(arithmetic)[-1]]))
    if net.startswith("CIFAR"):
        measured = measured_receptive_fields(cifar_maps(int(net.rpartition("-")[2])), places=places, across=8)
    else:
        # Windows do not depend on widths: a narrow net of one tower shows them at little cost.
        narrow = published_net(net, narrow=64, **({"towers": 1} if net == "AlexNet" else {}))
        across = 64 if net == "AlexNet" else 32  # the narrowest images that leave something at the end
        pieces = trunk_maps(narrow)
        measured = measured_receptive_fields(pieces, places=places, across=across, height=arithmetic[places[-1]])
    rows = [(net, place, field, arithmetic[place]) for place, field in measured.items()]
    return pd.DataFrame(rows, columns=["net", "place", "measured", "arithmetic"])


def _blocks(_: dict[str, Any], context: CellContext) -> CellResult:
    import pandas as pd
    from torch import nn

    from gradlab.analysis.architecture_theory import receptive_field
    from gradlab.measure.architectures import block_savings, measured_receptive_fields

    context.progress(0, 1, None)
    stack = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1) for _ in range(3)))
    found = measured_receptive_fields(stack, in_channels=1)
    rows = [("3x3", f"{n} of 3x3", found[str(n - 1)], receptive_field([(3, 1)] * n)) for n in (1, 2, 3)]
    frames = [pd.DataFrame(rows, columns=["net", "place", "measured", "arithmetic"])]
    frames += [_fields(f"CIFAR-ResNet-{depth}") for depth in CIFAR_DEPTHS]
    return CellResult(tables={"fields": pd.concat(frames, ignore_index=True), "savings": block_savings()})


def _images(settings: dict[str, Any], context: CellContext) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images and labels of what is measured at initialization, in float64, by the cell's seed."""
    import torch

    task = load_task(settings["task"], size=settings["size"], data_dir=context.data_dir)
    order = torch.randperm(len(task.train_labels), generator=torch.Generator().manual_seed(settings["seed"]))
    chosen = order[: settings["profile_batch"]]
    return task.train_images[chosen].double(), task.train_labels[chosen]


def _growth(settings: dict[str, Any], context: CellContext) -> CellResult:
    from gradlab.measure.families import growth_gradients

    own = {name.removeprefix("growth_"): settings[name] for name in ("growth_width", "growth_added", "norm", "seed")}
    trace = growth_gradients(
        *_images(settings, context), depths=settings["growth_depth"], progress=context.progress, **own
    )
    return CellResult(trace=trace)


def _profile(settings: dict[str, Any], context: CellContext) -> CellResult:
    from gradlab.measure.families import family_gradients

    # The keys become columns of what is recorded, in the place of the cell's lists of the same names.
    keys = [
        {"activation": activation, "init": init, "dropout": 0.0}
        for activation in settings["activation"]
        for init in settings["init"]
    ]
    if settings["family"] == "alexnet" and settings["dropout"] > 0:
        keys.append(keys[0] | {"dropout": settings["dropout"]})
    x, _ = _images(settings, context)
    how = {name: settings[name] for name in ("norm", "narrow", "seed")}
    return CellResult(trace=family_gradients(settings["family"], x, keys, progress=context.progress, **how))


def _heads(settings: dict[str, Any], context: CellContext) -> CellResult:
    from gradlab.measure.families import heads_gradients

    trace = heads_gradients(
        *_images(settings, context), norm=settings["norm"], inits=settings["init"], narrow=settings["heads_narrow"],
        seed=settings["seed"], progress=context.progress,
    )  # fmt: skip
    return CellResult(trace=trace)


def _imagenet(settings: dict[str, Any], context: CellContext) -> CellResult:
    import torch

    from gradlab.measure.families import trunk_pieces
    from gradlab.measure.initialization import gradient_profile
    from gradlab.nets import initialize, published_net

    context.progress(0, 1, None)
    seed = settings["seed"]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(settings["imagenet_batch"], 3, 224, 224, generator=generator).to(context.device)
    net = initialize(published_net(settings["net"]), settings["init"], seed=seed).to(context.device)
    return CellResult(trace=gradient_profile(net, x, seed=~seed % 2**32, layers=trunk_pieces))


def _train(settings: dict[str, Any], context: CellContext) -> CellResult:
    import pandas as pd
    from torch.nn.functional import cross_entropy

    from gradlab.measure.families import evaluated_loss, trunk_pieces
    from gradlab.nets import initialize, loss_with_heads, small_net
    from gradlab.probes import log_spaced
    from gradlab.training import TrainSettings, train

    task = load_task(settings["task"], size=settings["size"], data_dir=context.data_dir)
    model = small_net(
        settings["family"], side=settings["size"], in_channels=task.image_shape[0], classes=task.classes,
        norm=settings["norm"], activation=settings["activation"], dropout=settings["dropout"],
        heads=settings["heads"], narrow=settings["narrow"],
    )  # fmt: skip
    initialize(model, settings["init"], seed=settings["seed"])
    steps = settings["steps"]
    # Not channels_last: there torch 2.13's 1x1 convolutions with stride 2 corrupt the heap if channels are few.
    how = TrainSettings(
        steps=steps, batch_size=settings["batch_size"], lr=settings["lr"], momentum=settings["momentum"],
        weight_decay=0.0, seed=settings["seed"], channels_last=False,
    )  # fmt: skip
    result = train(
        model, task, how, device=context.device, every=log_spaced(steps, settings["record"]), layers=trunk_pieces,
        on_step=lambda step, loss: context.progress(step + 1, steps, loss), checkpoint=context.checkpoint,
        loss=loss_with_heads if settings["heads"] else cross_entropy,
    )  # fmt: skip
    loss = float("inf")
    if result.status == "done":
        task = task.to(context.device)
        loss = evaluated_loss(model, task.train_images, task.train_labels)
    ends = {"test_error": result.test_error, "train_loss": loss, "train_cpu_seconds": result.cpu_seconds}
    message = "" if result.diverged_at is None else f"the loss was not finite at step {result.diverged_at}"
    return CellResult(trace=result.trace, tables={"ends": pd.DataFrame([ends])}, status=result.status, message=message)


# -- claims and figures -----------------------------------------------------------------------------------------------


def claims(results: Results) -> list[Claim]:
    """Decide every claim this study tests from the tables of a run; any part of it may be missing."""
    from gradlab.analysis import architecture_claims as decide

    sizes = [results.table(name) for name in ("nets", "fields", "savings", "channels")]
    layers = {part: results.table("layers", part) for part in ("growth", "profile", "heads")}
    return [
        *decide.size_claims(*sizes),
        *decide.growth_claims(layers["growth"]),
        *decide.heads_claims(results.table("params", "heads")),
        *decide.activation_claims(layers["profile"], results.table("ends", "train")),
        *decide.dropout_claims(layers["profile"], results.table("ends", "train")),
    ]


FIGURES = ("sizes", "family-flow", "addition-and-concatenation", "auxiliary-heads", "activations")


def _figure(name: str) -> Callable[[Results], Drawing]:
    def draw(results: Results) -> Drawing:
        from gradlab.plots.architecture_figures import draw_architecture_figure

        figure, data, caption = draw_architecture_figure(name, results.table)
        return Drawing(figure=figure, data=data, caption=caption)

    return draw


STUDY = Study(
    name="architectures",
    title="AlexNet, VGG, GoogLeNet, ResNet and DenseNet: sizes, receptive fields, gradient flow",
    question=(
        "What do the ideas of five families cost and buy: parameters and receptive fields by exact count, and the "
        "gradient through each family with and without BatchNorm, by activation, with dropout, with auxiliary heads, "
        "and by addition against concatenation?"
    ),
    notes=("N1", "N2", "N3", "N4", "N6"),
    settings=Settings,
    presets=PRESETS,
    plan=plan,
    prepare=prepare,
    run=run,
    claims=claims,
    figures={name: _figure(name) for name in FIGURES},
)
