"""Each published rule on hand-made traces: just over and just under its threshold, and where it is mistaken."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gradlab.analysis import published_views as views
from gradlab.analysis.diagnosis import diagnose
from gradlab.analysis.finding import Finding
from gradlab.analysis.published_rules import RULES
from gradlab.errors import UsageError
from gradlab.trace import Trace

DEPTH, ENTRIES = 7, 100


def make(
    grads: Any = 1.0,
    *,
    steps: int = 3,
    kinds: str | list[str] = "Linear",
    units: dict[str, tuple[float, float]] | None = None,
    dtype: str = "float32",
    params: dict[str, Any] | None = None,
    layers: dict[str, Any] | None = None,
    losses: list[float] | None = None,
) -> Trace:
    """Return a trace of a chain of kernels of 100 entries whose gradient norms are `grads`, healthy in all else."""
    norms = np.broadcast_to(np.asarray(grads, dtype=float), (DEPTH,))
    kind = [kinds] * DEPTH if isinstance(kinds, str) else kinds
    rows = [(s, place) for s in range(steps) for place in range(DEPTH)]
    names = [f"layer{place}" for place in range(DEPTH)]
    param_rows = pd.DataFrame(
        [
            {
                "step": s, "param": f"{names[p]}.weight", "layer": names[p], "entries": ENTRIES, "weight_norm": 10.0,
                "grad_norm": norms[p], "update_norm": 1e-2, "grad_nonfinite": 0.0,
            } | (params or {})
            for s, p in rows
        ]
    )  # fmt: skip
    layer_rows = pd.DataFrame(
        [
            {
                "step": s, "layer": names[p], "call": 0, "order": p, "kind": kind[p], "output": "", "entries": ENTRIES,
                "act_mean": 0.0, "act_std": 1.0, "act_abs_max": 3.0, "act_zero_fraction": 0.0, "grad_norm": norms[p],
                "grad_abs_max": norms[p], "grad_nonfinite": 0.0,
            } | (layers or {})
            for s, p in rows
        ]
    )  # fmt: skip
    told = losses or [1.0] * steps
    step_rows = pd.DataFrame({"step": range(len(told)), "loss": told, "grad_norm": [1.0] * len(told)})
    unit_rows = pd.DataFrame(
        [(name, 10, *shares) for name, shares in (units or {}).items()],
        columns=["layer", "units", "dead_fraction", "saturated_fraction"],
    )
    info = {"params": [[f"{name}.weight", [10, 10], dtype] for name in names]}
    return Trace({"params": param_rows, "layers": layer_rows, "steps": step_rows, "units": unit_rows}, info)


def mean(value: float) -> float:
    """Return the norm of 100 Gaussian entries whose mean absolute value is `value`."""
    return value * math.sqrt(ENTRIES) / math.sqrt(2 / math.pi)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def kinds_of(rules: str, trace: Trace) -> list[str]:
    return [finding.kind for finding in RULES[rules](trace)]


def ramp(first: float, last: float = 1.0) -> list[float]:
    """Return norms that are 1 but at the ends."""
    return [first, *[1.0] * (DEPTH - 2), last]


NAN = math.nan
TANH = ["Linear", "Tanh", "Linear", "Tanh", "Linear", "Tanh", "Linear"]
RELU = ["Linear", "ReLU", "Linear", "ReLU", "Linear", "ReLU", "Linear"]


def tanh(mean_input: float) -> Trace:
    """Return a trace whose tanh layers read N(mean_input, 1): half of it lies beyond that mean."""
    return make(kinds=TANH, layers={"act_mean": mean_input})


def relu(zeros: float) -> Trace:
    """Return a trace of rectifiers of whose outputs a share is zero."""
    return make(kinds=RELU, layers={"act_zero_fraction": zeros})


def half(norm: float = 1.0, top: float = 3.0) -> Trace:
    """Return a trace of a net in float16."""
    return make(norm, layers={"act_abs_max": top}, dtype="float16")


CASES: list[tuple[str, str, Trace, Trace]] = [
    ("autotrainer", "vanishing", make(ramp(0.99e-4, 0.2)), make(ramp(1.01e-4, 0.2))),
    ("autotrainer", "vanishing", make(ramp(0.99e-6, 1e-3)), make(ramp(1.01e-6, 1e-3))),
    ("autotrainer", "exploding", make(ramp(70.1)), make(ramp(69.9))),
    ("autotrainer", "exploding", make(params={"grad_norm": NAN, "grad_nonfinite": 1.0}), make()),
    ("autotrainer", "exploding", make(losses=[1.0, 1.0, NAN]), make(losses=[NAN, NAN, NAN])),
    ("autotrainer", "dead", make([1, 0, 0, 0, 0, 0, 1]), make([1, 0, 0, 0, 0, 1, 1])),
    ("sagemaker", "vanishing", make(mean(0.99e-7)), make(1.0)),
    ("sagemaker", "dead", make(units={"layer1": (0.51, NAN)}), make(units={"layer1": (0.5, NAN)})),
    ("sagemaker", "saturated", tanh(9.51), tanh(9.48)),
    ("sagemaker", "exploding", make(params={"update_norm": 100.1}), make(params={"update_norm": 99.9})),
    ("sagemaker", "frozen", make(params={"update_norm": 0.99e-7}), make(params={"update_norm": 1.01e-7})),
    ("sagemaker", "vanishing", make(0.99 * 10 * 1e-3 / 3.2897), make(1.01 * 10 * 1e-3 / 3.2897)),
    ("deepchecker", "vanishing", make(mean(0.99e-6)), make(mean(1.01e-6))),
    ("deepchecker", "vanishing", make(0.5 ** np.arange(6, -1, -1)), make(0.51 ** np.arange(6, -1, -1))),
    ("deepchecker", "exploding", make(mean(1.01e6)), make(mean(0.99e6))),
    ("deepchecker", "exploding", make(2.0 ** np.arange(6, -1, -1)), make(1.99 ** np.arange(6, -1, -1))),
    ("deepchecker", "dead", make(units={"layer1": (0.51, NAN)}), make(units={"layer1": (0.5, NAN)})),
    ("deepchecker", "exploding", make(params={"update_norm": 1.01}), make(params={"update_norm": 0.99})),
    ("deepchecker", "frozen", make(params={"update_norm": 0.99e-3}), make(params={"update_norm": 1.01e-3})),
    ("deepdiagnosis", "vanishing", make(mean(0.99e-7)), make(mean(1.01e-7))),
    ("deepdiagnosis", "dead", relu(0.7), relu(0.69)),
    ("deepdiagnosis", "saturated", tanh(5.01), tanh(4.99)),
    ("torchlens", "vanishing", make(0.99e-7), make(1.01e-7)),
    ("torchlens", "exploding", make(1.01e4), make(0.99e4)),
    ("torchlens", "exploding", make(layers={"grad_norm": NAN, "grad_nonfinite": 4.0}), make(0.0)),
    ("torchmortem", "vanishing", make(ramp(0.99e-2)), make(ramp(1.01e-2))),
    ("torchmortem", "dead", relu(0.51), relu(0.5)),
    ("torchmortem", "saturated", make(units={"layer1": (NAN, 0.51)}), make(units={"layer1": (NAN, 0.5)})),
    ("torchmortem", "exploding", make(params={"update_norm": 1.01}), make(params={"update_norm": 0.99})),
    ("torchmortem", "frozen", make(params={"update_norm": 0.99e-4}), make(params={"update_norm": 1.01e-4})),
    ("nansense", "vanishing", half(21.7 * 6.1035e-5), half(21.9 * 6.1035e-5)),
    ("nansense", "exploding", half(top=4095.0), half(top=4093.0)),
    ("olmo", "exploding", make(losses=[1.0, 3.0] * 40 + [8.2]), make(losses=[1.0, 3.0] * 40 + [7.9])),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rules", "kind", "over", "under"), CASES, ids=[f"{rules}-{kind}-{n}" for n, (rules, kind, *_) in enumerate(CASES)]
)
def test_rule_fires_over_its_threshold_and_not_under_it(rules: str, kind: str, over: Trace, under: Trace) -> None:
    assert kinds_of(rules, over)[0] == kind
    assert kinds_of(rules, under) == []


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_an_even_net_is_healthy_and_findings_cite_their_source(rules: str) -> None:
    assert diagnose(make(), rules=rules).healthy
    over = next(trace for name, _, trace, _ in CASES if name == rules)
    for finding in RULES[rules](over):
        assert isinstance(finding, Finding)
        assert finding.source
        assert finding.evidence[0].threshold


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_a_trace_without_one_of_the_tables_is_read(rules: str) -> None:
    whole = make(kinds=RELU, units={"layer1": (0.1, NAN)}).to_pandas()
    for name in whole:
        RULES[rules](Trace({other: frame for other, frame in whole.items() if other != name}))


def test_a_finding_names_what_and_when() -> None:
    trace = make(np.r_[1e-9, [1.0] * 6])
    (finding,) = RULES["torchlens"](trace)
    assert (finding.layers, finding.steps) == (("layer0",), (0, 2))
    assert finding.evidence[0].value == 1e-9
    assert diagnose(trace, rules="torchlens").leading == finding


def test_unknown_rules_name_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'autotrainer'"):
        diagnose(make(), rules="autotrain")


# -- what the rules get wrong, kept as it is --------------------------------------------------------------------------


def test_deepdiagnosis_calls_a_sparse_layer_dead_though_all_its_units_are_alive() -> None:
    sparse = make(kinds=RELU, units={"layer1": (0.0, NAN)}, layers={"act_zero_fraction": 0.75})
    assert kinds_of("deepdiagnosis", sparse) == ["dead"]
    assert kinds_of("sagemaker", sparse) == []


def test_torchmortem_calls_half_zero_outputs_dead_and_nan_vanishing() -> None:
    assert kinds_of("torchmortem", make(kinds=RELU, layers={"act_zero_fraction": 0.502})) == ["dead"]
    broken = make(params={"grad_norm": NAN, "grad_nonfinite": 100.0})
    assert kinds_of("torchmortem", broken)[0] == "vanishing"


def test_absolute_bounds_follow_the_scale_of_the_loss() -> None:
    even = 1e-8
    for rules in ("sagemaker", "deepchecker", "deepdiagnosis", "torchlens"):
        assert kinds_of(rules, make(even))[0] == "vanishing"
        assert kinds_of(rules, make(1.0)) == []


def test_olmo_waits_for_half_of_its_window() -> None:
    assert kinds_of("olmo", make(losses=[1.0, 3.0] * 31 + [1e6])) == []
    assert kinds_of("olmo", make(losses=[1.0, 3.0] * 31 + [1.0, 1e6])) == ["exploding"]


def test_poor_initialization_is_read_from_variances() -> None:
    frames = make().to_pandas()
    frames["layers"]["act_std"] = [*(10.0 ** -np.arange(DEPTH))] * 3
    (finding,) = RULES["sagemaker"](Trace(frames))
    assert (finding.kind, finding.axis, finding.steps) == ("vanishing", "depth", (0, 0))
    frames["layers"]["act_std"] = [*(10.0 ** np.arange(DEPTH))] * 3
    assert kinds_of("sagemaker", Trace(frames)) == ["exploding"]


# -- estimates --------------------------------------------------------------------------------------------------------


def test_mean_absolute_gradient_of_gaussian_entries(rng: np.random.Generator) -> None:
    entries = rng.normal(scale=3e-5, size=200_000)
    frames = make(float(np.linalg.norm(entries))).to_pandas()
    frames["params"]["entries"] = entries.size
    estimate = views.mean_abs(Trace(frames)).values[0, 0]
    assert estimate == pytest.approx(np.abs(entries).mean(), rel=0.01)


def test_share_of_inputs_beyond_a_bound(rng: np.random.Generator) -> None:
    entries = rng.normal(2.0, 4.0, size=200_000)
    trace = make(kinds=TANH, layers={"act_mean": entries.mean(), "act_std": entries.std()})
    beyond = views.input_beyond(trace, {"Tanh": 5.0})
    assert beyond.names == ("layer1", "layer3", "layer5")
    assert beyond.values == pytest.approx(np.mean(np.abs(entries) > 5.0), rel=0.02)


def test_share_of_zero_gradients_counts_dead_units_and_whole_kernels() -> None:
    trace = make(np.r_[[1.0] * 6, 0.0], kinds=RELU, units={"layer1": (0.6, NAN), "layer3": (0.2, NAN)})
    frames = trace.to_pandas()
    frames["params"] = frames["params"][frames["params"]["layer"].isin([f"layer{p}" for p in (0, 2, 4, 6)])]
    share = views.zero_gradient_share(Trace(frames, dict(trace.info)))
    assert share.values == pytest.approx((0.6 + 0.2 + 0.0 + 1.0) / 4)


def test_share_that_is_subnormal(rng: np.random.Generator) -> None:
    rms, tiny = 1e-4, 6.103515625e-05
    entries = np.abs(rng.normal(scale=rms, size=400_000))
    share = entries[entries < tiny].sum() / entries.sum()
    (finding,) = RULES["nansense"](make(rms * 10, dtype="float16"))
    assert finding.evidence[0].value == pytest.approx(share, rel=0.02)


def test_kernels_stand_in_order_of_execution_and_biases_are_left_out() -> None:
    layers = pd.DataFrame({"step": 0, "layer": ["b", "a"], "call": 0, "order": [0, 1], "kind": "Linear"})
    params = pd.DataFrame(
        [(0, f"{layer}.{name}", layer, 4, 1.0) for layer in "ab" for name in ("weight", "bias")],
        columns=["step", "param", "layer", "entries", "grad_norm"],
    )
    shapes = [
        [f"{layer}.{n}", [2, 2] if n == "weight" else [4], "float32"] for layer in "ab" for n in ("weight", "bias")
    ]
    for info in ({"params": shapes}, {}):
        assert views.kernels(Trace({"layers": layers, "params": params}, info)).names == ("b.weight", "a.weight")
