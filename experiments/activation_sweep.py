"""activation-sweep: what activation and initialization do to the gradient, against theory (notes N1, N12)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradlab.errors import UsageError, unknown
from gradlab.nets.names import ACTIVATIONS, INITIALIZATIONS, two_slopes
from gradlab.study import Cell, CellContext, CellResult, Drawing, Preset, Study, setting

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradlab.analysis.claims import Claim
    from gradlab.study import Results

#: Nets whose Jacobian is taken apart: activation -> sigma_w^2 at which it neither shrinks nor grows at first.
ISOMETRY = {"linear": 1.0, "tanh": 1.0, "relu": 2.0}
_DIGITS = 1400


def _size(text: str) -> tuple[int, int] | None:
    """Return width and depth of a text such as "50x20", or None if it is no such text."""
    width, _, depth = text.partition("x")
    ok = width.isdecimal() and depth.isdecimal() and int(width) > 0 and int(depth) > 0
    return (int(width), int(depth)) if ok else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What can be changed with --set; the defaults are the preset "default"."""

    activation: tuple[str, ...] = setting(
        ("sigmoid", "tanh", "relu", "1.5:1.5", "0.2:1.5"), "activations by torch's names, or slopes below:above 0"
    )
    init: tuple[str, ...] = setting(
        ("default", "lecun_normal", "he_normal", "orthogonal", "4"), "initializations by name, or sigma_w^2 as a number"
    )
    depth: tuple[int, ...] = setting((50,), "layers of the nets whose gain is measured", least=10)
    width: int = setting(256, "units a layer", least=2)
    batch_size: int = setting(16, "Gaussian inputs", least=2)
    seeds: int = setting(5, "seeds, from 0", least=1)
    weight_var: tuple[float, ...] = setting(
        (1.0, 1.3, 1.5, 1.76095, 2.0, 2.5, 3.0, 4.0), "sigma_w^2 of the tanh nets from order to chaos"
    )
    bias_var: float = setting(0.05, "sigma_b^2 of those nets", least=0)
    chaos_width: int = setting(600, "units a layer of those nets", least=2)
    chaos_depth: int = setting(60, "layers of those nets", least=10)
    chaos_seeds: int = setting(12, "seeds of those nets", least=1)
    law_size: tuple[str, ...] = setting(
        ("10x10", "20x20", "25x50", "50x20", "50x50"), "width x depth of the nets that show finite width"
    )
    law_nets: int = setting(2000, "nets of each of these sizes", least=2)
    glorot_width: int = setting(500, "units a layer of the tanh nets after Glorot and Bengio", least=2)
    glorot_depth: int = setting(5, "layers of those nets", least=1)
    spectrum_width: int = setting(128, "units a layer of the nets whose singular values are taken", least=2)
    spectrum_depth: int = setting(30, "layers of those nets", least=1)
    train_init: tuple[str, ...] = setting(
        ("he_normal", "glorot_normal", "default"), "initializations of the trained ReLU nets", choices=INITIALIZATIONS
    )
    train_depth: int = setting(30, "hidden layers of the trained nets", least=1)
    train_width: int = setting(100, "units of their hidden layers", least=1)
    train_seeds: int = setting(3, "seeds of the trained nets", least=1)
    steps: int = setting(400, "training steps on the digits", least=2)
    train_batch: int = setting(128, "images a step", least=1)
    lr: float = setting(0.03, "learning rate of plain SGD", least=0)
    window: int = setting(20, "steps at the end over which the training loss is averaged", least=1)

    def __post_init__(self) -> None:
        """Refuse what would fail in every cell."""
        for name in self.activation:
            if name not in ACTIVATIONS and two_slopes(name) is None:
                raise unknown("activation value", name, ACTIVATIONS, "Two slopes are written 0.2:1.5.")
        for name in self.init:
            if name not in INITIALIZATIONS and not _is_variance(name):
                raise unknown("init value", name, INITIALIZATIONS, "A number above 0 stands for sigma_w^2.")
        for value in self.weight_var:
            if not value > 0:
                raise UsageError(f"Setting 'weight_var' must be above 0; got {value:g}.")
        for text in self.law_size:
            if _size(text) is None:
                raise UsageError(f"Setting 'law_size' takes WIDTHxDEPTH, such as 50x20; got '{text}'.")
        if self.train_batch > _DIGITS:
            raise UsageError(
                f"Setting 'train_batch' is {self.train_batch}, but there are {_DIGITS:,} training digits: take at most "
                "as many."
            )


def _is_variance(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


PRESETS = {
    "smoke": Preset(
        summary="Seconds: every part once, too small to decide most claims; for tests.",
        settings={
            "depth": (10,), "width": 32, "batch_size": 4, "seeds": 2, "weight_var": (1.0, 3.0), "chaos_width": 32,
            "chaos_depth": 12, "chaos_seeds": 2, "law_size": ("10x10",), "law_nets": 50, "glorot_width": 24,
            "glorot_depth": 3, "spectrum_width": 12, "spectrum_depth": 4, "train_depth": 3, "train_width": 10,
            "train_seeds": 2, "steps": 6, "train_batch": 16, "window": 2,
        },
    ),
    "default": Preset(summary="25 cells of width 256, 5 seeds, order to chaos, 30-layer nets; 90 seconds on 2 cores."),
    "paper": Preset(
        summary="Width 1024, depth 100, 20 seeds, order to chaos 200 deep; for a GPU. Unverified.",
        settings={
            "depth": (100,), "width": 1024, "seeds": 20, "chaos_width": 1024, "chaos_depth": 200,
            "chaos_seeds": 20, "law_size": ("10x10", "20x20", "25x50", "50x20", "50x50", "100x50"), "law_nets": 10_000,
            "glorot_width": 1000, "spectrum_width": 512, "spectrum_depth": 100, "train_seeds": 10, "steps": 2000,
        },
    ),
}  # fmt: skip


def plan(settings: Settings) -> list[Cell]:
    """Lay out the cells: the grid of gains, order to chaos, finite width, Glorot's layers, spectra, training."""

    def shared(*names: str) -> dict[str, Any]:
        return {name: getattr(settings, name) for name in names}

    cells = [
        Cell(
            part="gain",
            label=f"gain of {activation}, {init}, depth {depth}, seed {seed}",
            settings={"activation": activation, "init": init, "depth": depth, "seed": seed}
            | shared("width", "batch_size"),
            cost=3e-8 * depth * settings.width**2,
        )
        for seed in range(settings.seeds)
        for activation in settings.activation
        for init in settings.init
        for depth in settings.depth
    ]
    cells += [
        Cell(
            part="chaos",
            label=f"tanh at sigma_w^2 {weight_var:g}, seed {seed}",
            settings={"weight_var": weight_var, "bias_var": settings.bias_var, "width": settings.chaos_width,
                      "depth": settings.chaos_depth, "batch_size": settings.batch_size, "seed": seed},
            cost=3e-8 * settings.chaos_depth * settings.chaos_width**2,
        )
        for seed in range(settings.chaos_seeds)
        for weight_var in settings.weight_var
    ]  # fmt: skip
    for place, text in enumerate(settings.law_size):
        width, depth = _size(text) or (1, 1)
        cells.append(
            Cell(
                part="law",
                label=f"{settings.law_nets} ReLU nets {text}",
                settings={"width": width, "depth": depth, "nets": settings.law_nets, "seed": place},
                cost=2.5e-8 * settings.law_nets * depth * width**2,
            )
        )
    cells += [
        Cell(
            part="glorot",
            label=f"{scheme} initialization, seed {seed}",
            settings={"scheme": scheme, "seed": seed} | shared("glorot_width", "glorot_depth"),
        )
        for scheme in ("standard", "normalized")
        for seed in range(settings.seeds)
    ]
    cells += [
        Cell(
            part="spectrum",
            label=f"spectrum of {activation}, {weights}, seed {seed}",
            settings={"activation": activation, "weights": weights, "seed": seed}
            | shared("spectrum_width", "spectrum_depth"),
        )
        for activation in ISOMETRY
        for weights in ("orthogonal", "Gaussian")
        for seed in range(settings.seeds)
    ]
    cells += [
        Cell(
            part="train",
            label=f"{settings.train_depth} layers, {init}, seed {seed}",
            settings={"init": init, "seed": seed}
            | shared("train_depth", "train_width", "steps", "train_batch", "lr"),
            cost=2e-4 * settings.steps * settings.train_depth,
        )
        for init in settings.train_init
        for seed in range(settings.train_seeds)
    ]  # fmt: skip
    return [*cells, Cell(part="vgg", label="VGG-B", settings={"seed": 0})]


def run(cell: Cell, context: CellContext) -> CellResult:
    """Run one cell."""
    parts: dict[str, Callable[[dict[str, Any], CellContext], CellResult]]
    parts = {"gain": _gain, "chaos": _chaos, "law": _law, "glorot": _glorot, "spectrum": _spectrum, "train": _train,
             "vgg": _vgg}  # fmt: skip
    return parts[cell.part](dict(cell.settings), context)


def _profile(own: dict[str, Any], context: CellContext, activation: str, init: str, bias_var: float) -> CellResult:
    import numpy as np
    import pandas as pd

    from gradlab.measure.mean_field import depth_profile, wide_stack

    # Streams of their own for weights and inputs, and none shared by neighbouring seeds.
    net = wide_stack(
        activation, init, width=own["width"], depth=own["depth"], seed=2 * own["seed"], bias_var=bias_var,
        device=context.device,
    )  # fmt: skip
    found = depth_profile(
        net,
        batch_size=own["batch_size"],
        seed=2 * own["seed"] + 1,
        progress=lambda done, total: context.progress(done, total, None),
    )
    table = pd.DataFrame({
        "layer": np.arange(1, own["depth"] + 1),
        "log_grad_norm": found.log_grad_norm,
        "length": found.length,
        "correlation": found.correlation,
    })  # fmt: skip
    return CellResult(tables={"profiles": table})


def _gain(own: dict[str, Any], context: CellContext) -> CellResult:
    return _profile(own, context, own["activation"], own["init"], 0.0)


def _chaos(own: dict[str, Any], context: CellContext) -> CellResult:
    return _profile(own, context, "tanh", repr(own["weight_var"]), own["bias_var"])


def _law(own: dict[str, Any], context: CellContext) -> CellResult:
    import pandas as pd

    from gradlab.measure.mean_field import relu_log_norms

    found = relu_log_norms(
        width=own["width"],
        depth=own["depth"],
        nets=own["nets"],
        seed=own["seed"],
        device=context.device,
        progress=lambda done, total: context.progress(done, total, None),
    )
    return CellResult(tables={"log_norms": pd.DataFrame({"net": range(len(found)), "log_norm": found})})


def _glorot(own: dict[str, Any], context: CellContext) -> CellResult:
    import numpy as np
    import pandas as pd

    from gradlab.measure.glorot import layer_histograms, layer_singular_values
    from gradlab.tasks import load_digits

    sizes = {"width": own["glorot_width"], "depth": own["glorot_depth"], "seed": own["seed"]}
    context.progress(0, 2, None)
    means = layer_singular_values(own["scheme"], **sizes)
    context.progress(1, 2, None)
    digits = load_digits()
    found = layer_histograms(own["scheme"], digits.train_images[:300], digits.train_labels[:300], **sizes)
    layers, frames = np.arange(1, own["glorot_depth"] + 1), []
    for what, edges, densities, stds in (
        ("activation", found.activation_edges, found.activations, found.activation_std),
        ("gradient", found.gradient_edges, found.gradients, found.gradient_std),
    ):
        centres = (edges[:-1] + edges[1:]) / 2
        for layer, density, std in zip(layers, densities, stds, strict=True):
            frames.append(
                pd.DataFrame({"what": what, "layer": layer, "value": centres, "density": density, "std": std})
            )
    tables = {
        "singular_values": pd.DataFrame({"layer": layers, "mean": means}),
        "histograms": pd.concat(frames, ignore_index=True),
    }
    return CellResult(tables=tables)


def _spectrum(own: dict[str, Any], context: CellContext) -> CellResult:
    import numpy as np
    import pandas as pd
    import torch

    from gradlab.measure.jacobian import jacobian_spectrum
    from gradlab.measure.mean_field import wide_stack
    from gradlab.nets import initialize

    weight_var, width = ISOMETRY[own["activation"]], own["spectrum_width"]
    context.progress(0, 1, None)
    net = wide_stack(
        own["activation"], repr(weight_var), width=width, depth=own["spectrum_depth"], seed=2 * own["seed"]
    )
    if own["weights"] == "orthogonal":
        initialize(net, "orthogonal", gain=math.sqrt(weight_var), seed=2 * own["seed"])
    x = torch.randn(1, width, generator=torch.Generator().manual_seed(2 * own["seed"] + 1), dtype=torch.float64)
    values = jacobian_spectrum(net.to(context.device), x.to(context.device))
    return CellResult(tables={"spectra": pd.DataFrame({"rank": np.arange(1, width + 1), "value": values})})


def _train(own: dict[str, Any], context: CellContext) -> CellResult:
    import numpy as np
    import pandas as pd

    from gradlab.nets import MLP, initialize
    from gradlab.probes import log_spaced
    from gradlab.tasks import load_digits
    from gradlab.training import TrainSettings, train

    model = MLP(own["train_depth"], width=own["train_width"], in_features=64, classes=10)
    initialize(model, own["init"], seed=own["seed"])
    steps = own["steps"]
    how = TrainSettings(
        steps=steps, batch_size=own["train_batch"], lr=own["lr"], momentum=0.0, weight_decay=0.0, channels_last=False,
        seed=own["seed"],
    )  # fmt: skip
    result = train(
        model,
        load_digits(),
        how,
        device=context.device,
        every=log_spaced(steps, min(8, steps)),
        layers=["stem.linear", "blocks.*.linear", "head"],
        on_step=lambda step, loss: context.progress(step + 1, steps, loss),
        checkpoint=context.checkpoint,
    )
    table = pd.DataFrame({"step": np.arange(len(result.losses)), "loss": result.losses})
    return CellResult(trace=result.trace, tables={"losses": table}, status=result.status)


def _vgg(own: dict[str, Any], context: CellContext) -> CellResult:
    import pandas as pd

    from gradlab.measure.initialization import vgg_b_gradient

    context.progress(0, 1, None)
    return CellResult(tables={"vgg": pd.DataFrame({"quotient": [vgg_b_gradient(seed=own["seed"])]})})


def claims(results: Results) -> list[Claim]:
    """Decide every claim this study tests from the tables of a run; any part of it may be missing."""
    from gradlab.analysis import gain_claims, initialization_claims
    from gradlab.analysis.depth_claims import vgg_claim

    settings = results.settings
    vgg = results.table("vgg", "vgg")
    return [
        *gain_claims.gain_claims(results.table("profiles", "gain")),
        *gain_claims.chaos_claims(results.table("profiles", "chaos")),
        *initialization_claims.finite_width_claims(results.table("log_norms", "law")),
        *initialization_claims.glorot_claims(results.table("singular_values", "glorot")),
        vgg_claim(float(vgg["quotient"].iloc[0]) if len(vgg) else math.nan),
        *initialization_claims.stall_claims(
            results.table("losses", "train"), depth=settings["train_depth"], window=settings["window"]
        ),
        *initialization_claims.isometry_claims(results.table("spectra", "spectrum")),
    ]


FIGURES = ("gain-against-theory", "phase-diagram", "layer-distributions", "deep-training", "singular-values")


def _figure(name: str) -> Callable[[Results], Drawing]:
    def draw(results: Results) -> Drawing:
        from gradlab.plots.activation_figures import draw_activation_figure

        figure, data, caption = draw_activation_figure(name, results.table)
        return Drawing(figure=figure, data=data, caption=caption)

    return draw


STUDY = Study(
    name="activation-sweep",
    title="Activation and initialization against depth: vanishing, exploding, critical",
    question=(
        "Does ReLU cure vanishing, and does exploding come from slopes above 1? Activation x initialization x depth, "
        "the gain of the gradient a layer against mean-field theory: slope and weight scale act only together."
    ),
    notes=("N1", "N12"),
    settings=Settings,
    presets=PRESETS,
    plan=plan,
    run=run,
    claims=claims,
    figures={name: _figure(name) for name in FIGURES},
)
