"""sequence-length: how the gradient through time falls or grows with lag, net by net (notes N8, N9, N10, N13)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradlab.errors import UsageError
from gradlab.study import Cell, CellContext, CellResult, Drawing, Preset, Study, setting

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd

    from gradlab.analysis.claims import Claim
    from gradlab.study import Results

_NETS = (
    "tanh 0.4", "tanh 0.8", "tanh 1", "tanh 1.5", "tanh 2", "tanh 3", "sigmoid 1", "sigmoid 2", "sigmoid 4",
    "sigmoid 8", "relu 0.8", "relu 1", "relu 1.2", "orthogonal 1", "lstm default", "lstm bias 1", "lstm chrono 1000",
    "gru default",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What can be changed with --set; the defaults are the preset "default"."""

    net: tuple[str, ...] = setting(
        _NETS, "nets: activation or 'orthogonal' and gain; 'lstm' or 'gru' and initialization"
    )
    hidden: int = setting(128, "units", least=2)
    steps: int = setting(1000, "largest lag, in time steps", least=20)
    warmup: int = setting(100, "time steps before the earliest state that counts", least=0)
    batch_size: int = setting(8, "sequences", least=2)
    input_std: float = setting(0.5, "standard deviation of the Gaussian input; the rates depend on it", least=0)
    attention_steps: int = setting(200, "length of the sequence in the contrast with attention", least=20)
    seeds: int = setting(5, "seeds, from 0", least=1)

    def __post_init__(self) -> None:
        for net in self.net:
            kind, _, rest = net.partition(" ")
            gated = kind in ("lstm", "gru") and rest.partition(" ")[0] in ("default", "bias", "chrono")
            if not gated and not (kind in ("tanh", "relu", "sigmoid", "orthogonal") and _is_number(rest)):
                raise UsageError(
                    f"Unknown net '{net}': write an activation or 'orthogonal' and a gain ('tanh 1.5'), or 'lstm' or "
                    "'gru' and 'default', 'bias <value>' or 'chrono <steps>'."
                )


def _is_number(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


PRESETS = {
    "smoke": Preset(
        summary="Seconds: too small to decide most claims; for tests.",
        settings={
            "net": ("tanh 1", "sigmoid 2", "relu 1", "lstm default", "gru default"), "hidden": 16, "steps": 60,
            "warmup": 20, "seeds": 2, "attention_steps": 30,
        },
    ),
    "default": Preset(summary="18 nets, 128 units, lags to 1,000, 5 seeds; under a minute on 2 cores."),
    "long": Preset(summary="Lags to 10,000; about 10 minutes on 2 cores.", settings={"steps": 10_000, "seeds": 3}),
    "paper": Preset(
        summary="512 units, lags to 10,000, 10 seeds; hours on a CPU. Unverified.",
        settings={"hidden": 512, "steps": 10_000, "seeds": 10, "attention_steps": 1000},
    ),
}  # fmt: skip


def plan(settings: Settings) -> list[Cell]:
    """Lay out net x seed, and attention x seed."""
    names = ("hidden", "steps", "warmup", "batch_size", "input_std")
    shared = {name: getattr(settings, name) for name in names}
    cells = []
    for seed in range(settings.seeds):
        for net in settings.net:
            cost = settings.steps / 1000 * (0.9 if net.startswith(("lstm", "gru")) else 0.3)
            cells.append(
                Cell(part="net", label=f"{net} seed {seed}", settings=shared | {"net": net, "seed": seed}, cost=cost)
            )
        own = {"attention_steps": settings.attention_steps, "seed": seed}
        cells.append(Cell(part="attention", label=f"attention seed {seed}", settings=own, cost=0.1))
    cells.append(Cell(part="counts", label="parameter counts", settings={"seed": 0}, cost=0.1))
    return cells


def run(cell: Cell, context: CellContext) -> CellResult:
    """Run one cell."""
    import pandas as pd

    from gradlab.analysis.recurrent_theory import pascanu_bounds
    from gradlab.measure.forgetting import attention_path, forgetting

    context.progress(0, 1, None)
    own = dict(cell.settings)
    if cell.part == "counts":
        return CellResult(tables={"counts": _counts()})
    if cell.part == "attention":
        lags, log_norms = attention_path(steps=own["attention_steps"], seed=own["seed"])
        return CellResult(tables={"attention": pd.DataFrame({"lag": lags, "log_norm": log_norms})})
    found = forgetting(own.pop("net"), **own)
    kind = cell.settings["net"].partition(" ")[0]
    bound = float("nan")
    if found.weight is not None:
        bound = pascanu_bounds(found.weight, "tanh" if kind == "orthogonal" else kind).bound
    rates = {"exponent": [found.exponent], "exponent_error": [found.exponent_error], "pascanu_bound": [bound]}
    tables = {
        "lags": pd.DataFrame({"lag": found.lags, "log_norm": found.log_norms}),
        "rates": pd.DataFrame(rates),
    }
    return CellResult(tables=tables)


def _counts() -> pd.DataFrame:
    import pandas as pd
    import torch

    from gradlab.nets import parameter_count

    kinds = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}
    with torch.device("meta"):
        counts = [parameter_count(kind(64, 128)) for kind in kinds.values()]
    return pd.DataFrame({"core": list(kinds), "parameters": counts})


def claims(results: Results) -> list[Claim]:
    """Decide how fast each net forgets."""
    from gradlab.analysis.forgetting_claims import forgetting_claims

    return forgetting_claims(
        results.table("lags", "net"),
        results.table("rates", "net"),
        results.table("attention", "attention"),
        results.table("counts", "counts"),
        tabulated=(results.settings["hidden"], results.settings["input_std"]) == (128, 0.5),
    )


def _against_lag(results: Results) -> Drawing:
    from gradlab.plots import forgetting

    attention = results.table("attention", "attention")
    data = forgetting.against_lag_data(results.table("lags", "net"), results.table("rates", "net"), attention)
    return Drawing(figure=forgetting.against_lag(data), data=data, caption=forgetting.against_lag_caption(data))


def _rates(results: Results) -> Drawing:
    from gradlab.plots import forgetting

    data = forgetting.rates_data(results.table("lags", "net"), results.table("rates", "net"))
    return Drawing(figure=forgetting.rates(data), data=data, caption=forgetting.rates_caption(data))


FIGURES: dict[str, Callable[[Results], Drawing]] = {"gradient-against-lag": _against_lag, "rate-and-lyapunov": _rates}

STUDY = Study(
    name="sequence-length",
    title="The gradient through time against lag: vanilla, gated and attention",
    question=(
        "How far back does the gradient reach? Its norm against lag for vanilla RNNs of three activations, LSTM, GRU "
        "and attention, and its rate against the largest Lyapunov exponent."
    ),
    notes=("N8", "N9", "N10", "N13"),
    settings=Settings,
    presets=PRESETS,
    plan=plan,
    run=run,
    claims=claims,
    figures=FIGURES,
)
