"""clipping: the gradient cliff of a recurrent net, and what clipping the gradient does there (note N8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradlab.study import Cell, CellContext, CellResult, Drawing, Preset, Study, setting

if TYPE_CHECKING:
    from gradlab.analysis.claims import Claim
    from gradlab.study import Results


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What can be changed with --set; the defaults are the preset "default"."""

    clip: tuple[float, ...] = setting((0.0, 1.0, 0.1), "largest gradient norms; 0 does not clip", least=0)
    starts: int = setting(20, "starts of gradient descent", least=1)
    weight: float = setting(5.188, "weight around which they begin, on the cliff")
    bias: float = setting(-2.729, "bias around which they begin")
    spread: float = setting(0.05, "largest distance of a start from there, in each coordinate", least=0)
    lr: float = setting(0.05, "learning rate", least=0)
    updates: int = setting(500, "updates", least=1)
    steps: int = setting(50, "time steps of the net", least=1)
    points: int = setting(150, "points of the surface in each direction", least=2)
    seed: int = setting(0, "of the starts", least=0)


PRESETS = {
    "smoke": Preset(summary="A second or two; for tests.", settings={"points": 40, "updates": 60}),
    "default": Preset(summary="20 starts, 500 updates, 150 x 150 surface; seconds."),
    "paper": Preset(summary="200 starts, 2,000 updates, 1,000 x 1,000 surface; a minute.", settings={
        "starts": 200, "updates": 2000, "points": 1000,
    }),
}  # fmt: skip

_DESCENT = ("starts", "weight", "bias", "spread", "lr", "updates", "steps", "seed")


def plan(settings: Settings) -> list[Cell]:
    """Lay out the surface and one descent for each clipping threshold."""
    surface = {"points": settings.points, "steps": settings.steps, "seed": 0}
    shared = {name: getattr(settings, name) for name in _DESCENT}
    return [
        Cell(part="surface", label="surface", settings=surface, cost=2),
        *(
            Cell(part="descent", label=f"clip {clip:g}" if clip else "no clipping", settings=shared | {"clip": clip})
            for clip in settings.clip
        ),
    ]


def run(cell: Cell, context: CellContext) -> CellResult:
    """Run one cell."""
    import numpy as np
    import pandas as pd

    from gradlab.measure.cliff import cliff_surface, descend

    own = cell.settings
    context.progress(0, 1, None)
    if cell.part == "surface":
        surface = cliff_surface(points=own["points"], steps=own["steps"])
        weight, bias = np.meshgrid(surface.weight, surface.bias)
        columns = {"weight_at": weight, "bias_at": bias, "loss": surface.loss, "grad_norm": surface.grad_norm}
        return CellResult(tables={"surface": pd.DataFrame({name: values.ravel() for name, values in columns.items()})})
    shifts = np.random.default_rng(own["seed"]).uniform(-own["spread"], own["spread"], (own["starts"], 2))
    found = descend(
        np.array([own["weight"], own["bias"]]) + shifts,
        lr=own["lr"], clip=own["clip"], updates=own["updates"], steps=own["steps"],
    )  # fmt: skip
    starts, updates = np.indices(found.loss.shape)
    paths = pd.DataFrame(
        {
            "start": starts.ravel(),
            "update": updates.ravel(),
            "weight_at": found.path[..., 0].ravel(),
            "bias_at": found.path[..., 1].ravel(),
            "loss": found.loss.ravel(),
            "step_length": np.pad(found.step, ((0, 0), (0, 1)), constant_values=np.nan).ravel(),
        }
    )
    return CellResult(tables={"descent": paths})


def claims(results: Results) -> list[Claim]:
    """Decide whether there is a cliff and whether clipping gets past it."""
    from gradlab.analysis.cliff_claims import cliff_claims

    return cliff_claims(results.table("surface", "surface"), results.table("descent", "descent"))


def _cliff(results: Results) -> Drawing:
    from gradlab.plots import cliff

    data = cliff.cliff_data(results.table("surface", "surface"), results.table("descent", "descent"))
    return Drawing(figure=cliff.cliff(data), data=data, caption=cliff.cliff_caption(data))


STUDY = Study(
    name="clipping",
    title="The gradient cliff of a recurrent net, with and without clipping",
    question=(
        "Repeated multiplication makes gradients explode on a thin wall in weight space. What does one step there do "
        "to training, and does clipping the gradient's norm help?"
    ),
    notes=("N8",),
    settings=Settings,
    presets=PRESETS,
    plan=plan,
    run=run,
    claims=claims,
    figures={"cliff": _cliff},
)
