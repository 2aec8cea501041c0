"""cell-state: does the cell state keep the gradient from vanishing? The path along it against the rest (note N11)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradlab.study import Cell, CellContext, CellResult, Drawing, Preset, Study, setting

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradlab.analysis.claims import Claim
    from gradlab.study import Results


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What can be changed with --set; the defaults are the preset "default"."""

    net: tuple[str, ...] = setting(("lstm", "gru"), "gated nets", choices=("lstm", "gru"))
    bias: tuple[float, ...] = setting((1.0, 2.0, 3.0), "biases of the gate that keeps memory", empty=True)
    chrono: tuple[int, ...] = setting(
        (200, 1000), "time scales of chrono initialization, in steps", least=3, empty=True
    )
    hidden: int = setting(128, "units", least=2)
    input_size: int = setting(1, "size of the input", least=1)
    input_std: float = setting(0.5, "standard deviation of the Gaussian input", least=0)
    batch_size: int = setting(8, "sequences", least=1)
    steps: int = setting(200, "time steps followed back", least=20)
    warmup: int = setting(100, "time steps before them", least=0)
    seeds: int = setting(5, "seeds, from 0", least=1)


PRESETS = {
    "smoke": Preset(
        summary="Seconds: too small to decide most claims; for tests.",
        settings={"hidden": 16, "steps": 30, "warmup": 10, "seeds": 2, "bias": (1.0,), "chrono": (200,)},
    ),
    "default": Preset(summary="128 units, 200 steps, 5 seeds, LSTM and GRU; under 30 seconds on 2 cores."),
    "paper": Preset(
        summary="512 units, 1,000 steps, 10 seeds; minutes.",
        settings={"hidden": 512, "steps": 1000, "seeds": 10, "chrono": (200, 1000, 2000)},
    ),
}


def plan(settings: Settings) -> list[Cell]:
    """Lay out the grid: net x initialization x seed."""
    inits = ["default", *(f"bias {value:g}" for value in settings.bias), *(f"chrono {t}" for t in settings.chrono)]
    shared = {
        name: getattr(settings, name) for name in ("hidden", "input_size", "input_std", "batch_size", "steps", "warmup")
    }
    return [
        Cell(
            part="split",
            label=f"{net}, {init}, seed {seed}",
            settings=shared | {"net": net, "init": init, "seed": seed},
        )
        for seed in range(settings.seeds)
        for net in settings.net
        for init in inits
    ]


def run(cell: Cell, context: CellContext) -> CellResult:
    """Measure one net at one initialization."""
    import pandas as pd
    import torch

    from gradlab.measure.cell_state import cell_gradient
    from gradlab.nets import chrono_init, set_forget_bias, set_update_bias

    own: dict[str, Any] = dict(cell.settings)
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[own["net"]]
    net = kind(own["input_size"], own["hidden"])  # drawn by the cell's seed
    scheme, _, value = own["init"].partition(" ")
    if scheme == "bias":
        (set_forget_bias if own["net"] == "lstm" else set_update_bias)(net, float(value))
    elif scheme == "chrono":
        chrono_init(net, int(value), seed=own["seed"])
    generator = torch.Generator().manual_seed(own["seed"])
    length = own["warmup"] + own["steps"]
    x = torch.randn(length, own["batch_size"], own["input_size"], generator=generator) * own["input_std"]
    context.progress(0, 1, None)
    got = cell_gradient(net, x, warmup=own["warmup"], seed=own["seed"])
    tables = {
        "gradients": pd.DataFrame({"lag": got.lag, "log_full": got.log_full, "log_path": got.log_path}),
        "openness": pd.DataFrame({"unit": range(len(got.gate_by_unit)), "gate": got.gate_by_unit}),
        "means": pd.DataFrame({
            "path_error": [got.path_error], "gate_mean": [got.gate_mean], "gate_geometric": [got.gate_geometric],
        }),
    }  # fmt: skip
    return CellResult(tables=tables)


def claims(results: Results) -> list[Claim]:
    """Decide what the cell state does and does not do."""
    from gradlab.analysis.cell_claims import cell_claims

    return cell_claims(results.table("gradients", "split"), results.table("means", "split"))


def _figure(name: str) -> Callable[[Results], Drawing]:
    def draw(results: Results) -> Drawing:
        from gradlab.plots import cell_state

        table = results.table("openness" if name == "gate-openness" else "gradients", "split")
        data = getattr(cell_state, f"{name.replace('-', '_')}_data")(table)
        figure = getattr(cell_state, name.replace("-", "_"))(data)
        caption = getattr(cell_state, f"{name.replace('-', '_')}_caption")(data)
        return Drawing(figure=figure, data=data, caption=caption)

    return draw


STUDY = Study(
    name="cell-state",
    title="The gradient of LSTM and GRU along the memory, and the rest",
    question=(
        "The update itself passes through an activation, so does it not vanish all the same? The gradient through time "
        "split into the path along the cell state, exactly the product of the forget gates, and all other paths."
    ),
    notes=("N9", "N11"),
    settings=Settings,
    presets=PRESETS,
    plan=plan,
    run=run,
    claims=claims,
    figures={name: _figure(name) for name in ("cell-path", "gate-openness")},
)
