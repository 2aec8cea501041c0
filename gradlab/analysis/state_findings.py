"""Findings about states: numbers that are not finite, units that are dead or saturated, parameters that stay put."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradlab.analysis.finding import Evidence, Finding
from gradlab.analysis.remedies import dead_remedy, saturated_remedy

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from gradlab.trace import Trace

__all__ = ["first_nonfinite", "frozen_findings", "nonfinite_finding", "unit_findings"]

SHARE = 0.5  # of a layer's units that must be dead or saturated
ALL_ZERO = 0.99  # share of zero outputs of a rectifier late in the window: units that died after its beginning
COLLAPSED = 0.8  # share of dead units up to which they may be those that are off in a layer that ignores its input
NEGLIGIBLE = 1e-4  # of the largest gradient norm of a step
SKIPPED = 0.5  # share of updates that the gradient scaler skipped
_RECTIFIERS = ("ReLU", "ReLU6")
_HALF = ("float16", "bfloat16")
_PASCANU = "Pascanu et al. 2013, arXiv 1211.5063"
_MIXED = "Micikevicius et al. 2018, arXiv 1710.03740"


# -- nonfinite --------------------------------------------------------------------------------------------------------


def first_nonfinite(trace: Trace, steps: NDArray[np.int64]) -> int | None:
    """Return the first usable step at which a NaN or Inf mattered: in a gradient, a weight or the loss, or a NaN.

    An Inf in a forward pass that leaves gradients, weights and loss finite is a mask at work (-inf before a softmax).
    """
    found = []
    steps_table, layers, params = (_kept(trace.tables[name], steps) for name in ("steps", "layers", "params"))
    if len(steps_table):
        found.append(steps_table.loc[np.isinf(steps_table["loss"]) | _nan_loss(steps_table), "step"])
    if len(layers):
        found.append(layers.loc[layers["grad_nonfinite"] > 0, "step"])
        found.append(layers.loc[(layers["act_nonfinite"] > 0) & layers["act_abs_max"].isna(), "step"])
    if len(params):
        found.append(params.loc[params["grad_nonfinite"] > 0, "step"])
        found.append(params.loc[np.isinf(params["weight_norm"]), "step"])
    firsts = [int(column.min()) for column in found if len(column)]
    return min(firsts) if firsts else None


def _nan_loss(steps: pd.DataFrame) -> pd.Series[bool]:
    """Return where the loss is NaN, if it was told at all: a run that never told it has NaN everywhere."""
    told = steps["loss"].notna()
    return ~told & bool(told.any())


def _kept(rows: pd.DataFrame, steps: NDArray[np.int64]) -> pd.DataFrame:
    return rows[np.isin(rows["step"].to_numpy(), steps)]


def nonfinite_finding(trace: Trace, step: int) -> Finding:
    """Say where the numbers of a step first left the finite ones, and in which direction of the pass."""
    layers = trace.layers[trace.layers["step"] == step].sort_values("order")
    params = trace.params[trace.params["step"] == step]
    bad_weights = params.loc[~np.isfinite(params["weight_norm"]) & params["weight_norm"].notna(), "param"]
    forward = layers[layers["act_nonfinite"] > 0]
    backward = layers[layers["grad_nonfinite"] > 0]
    gradients = params.loc[params["grad_nonfinite"] > 0, "param"]
    evidence: tuple[Evidence, ...]
    advice = "Run that step under torch.autograd.detect_anomaly, and guard divisions, roots and logarithms by an eps"
    source = "torch documentation, torch.autograd"
    if len(forward) and _matters(forward, layers, backward, gradients):
        where = forward.iloc[0]
        place, direction = str(where["layer"]), "forward"
        evidence = (Evidence(what="NaN or Inf entries of its output", value=float(where["act_nonfinite"])),)
        cause = _forward_cause(trace, layers, where, step, len(bad_weights) > 0)
    elif len(backward):
        where = backward.iloc[-1]
        place, direction = str(where["layer"]), "backward"
        evidence = (Evidence(what="NaN or Inf entries of its gradient", value=float(where["grad_nonfinite"])),)
        after = layers[layers["order"] > where["order"]]
        cause = "The loss gave a gradient that is not finite."
        if len(after):
            cause = (
                f"What follows it in the forward pass ({after['layer'].iloc[0]} first) has no finite derivative there."
            )
    elif len(gradients):
        place, direction = str(gradients.iloc[-1]), "backward"
        evidence = (Evidence(what="parameters with a gradient that is not finite", value=float(len(gradients))),)
        cause = "An operation that no watched module does has no finite derivative there."
    else:
        place, direction = "", "forward"
        evidence = (Evidence(what="loss", value=float("nan")),)
        cause = "The loss itself is not finite, while all that was watched is."
    if "diverged" in cause:
        advice, source = "Lower the learning rate, warm it up, or clip the gradient's norm", _PASCANU
    elif _half(trace):
        source = _MIXED
        advice = "Use bfloat16, or float16 with a torch.amp.GradScaler, and keep losses and norms in float32"
    return Finding(
        kind="nonfinite",
        layers=(place,) if place else (),
        steps=(step, step),
        evidence=(*evidence, Evidence(what=f"first at training step, in the {direction} pass", value=float(step))),
        cause=cause,
        advice=advice,
        source=source,
    )


def _matters(forward: pd.DataFrame, layers: pd.DataFrame, backward: pd.DataFrame, gradients: pd.Series[str]) -> bool:
    """Return whether a forward NaN or Inf is the beginning, and no mask beside an independent failure."""
    if forward["act_abs_max"].isna().any():
        return True
    last = layers.iloc[-1]
    return bool(last["act_nonfinite"] > 0) and bool(len(backward) or len(gradients))


def _half(trace: Trace) -> bool:
    return any(len(item) > 2 and item[2] in _HALF for item in trace.info.get("params", ()))


def _forward_cause(trace: Trace, layers: pd.DataFrame, where: pd.Series, step: int, bad_weights: bool) -> str:
    before = trace.steps[trace.steps["step"] < step]
    grown = before["grad_norm"].iloc[[0, -1]].to_numpy() if len(before) else np.array([np.nan, np.nan])
    if grown[1] > 100 * grown[0]:
        of = f"from {grown[0]:.2g} at step {before['step'].iloc[0]} to {grown[1]:.2g} at step {before['step'].iloc[-1]}"
        return f"Training diverged: the norm of all gradients grew {of}, so the steps are too large."
    if bad_weights:
        at = f"step {int(before['step'].iloc[-1])}" if len(before) else "a step before"
        return f"Its weights were not finite before the pass: the update of {at} broke them."
    earlier = layers[layers["order"] < where["order"]]
    if earlier.empty:
        return "It is the first layer and its weights are finite: the batch itself holds NaN or Inf."
    top = float(earlier["act_abs_max"].iloc[-1])
    if top > 1e15 or (top > 1e3 and _half(trace)):
        return f"Its input reached {top:.2g}: the signal left the range of its dtype."
    return f"Its input was finite (largest {top:.2g}): the layer itself, or what lies before it unwatched, made it."


def skipped_finding(trace: Trace) -> Finding | None:
    """Find a gradient scaler that skips most updates."""
    rows = trace.steps
    if len(rows) < 3 or rows["skipped"].mean() <= SKIPPED:
        return None
    bad = rows[rows["skipped"]]
    params = trace.params[(trace.params["step"] == bad["step"].iloc[0]) & (trace.params["grad_nonfinite"] > 0)]
    return Finding(
        kind="nonfinite",
        layers=tuple(params["param"].iloc[-1:]),
        steps=(int(bad["step"].iloc[0]), int(bad["step"].iloc[-1])),
        severity=float(rows["skipped"].mean()),
        evidence=(
            Evidence(
                what="share of updates that the gradient scaler skipped", value=float(rows["skipped"].mean()),
                threshold=f"> {SKIPPED:g}",
            ),
            Evidence(what="loss scale at the last step", value=float(rows["loss_scale"].iloc[-1])),
        ),
        cause="Gradients are not finite at any loss scale: they overflow before they are scaled, or hold NaN.",
        advice="Look for NaN in the unscaled forward pass, and keep losses, norms and softmax in float32",
        source=_MIXED,
    )  # fmt: skip


# -- units ------------------------------------------------------------------------------------------------------------


def unit_findings(trace: Trace, steps: NDArray[np.int64]) -> list[Finding]:
    """Find layers most of whose units are dead, or saturated."""
    order = trace.layers.groupby("layer")["order"].min()
    units = trace.units.assign(order=trace.units["layer"].map(order)).sort_values("order")
    span = (int(steps[0]), int(steps[-1])) if len(steps) else None
    found = []
    dead = dict(zip(units["layer"], units["dead_fraction"], strict=True))
    dead = {layer: share for layer, share in dead.items() if share > SHARE} | _silent(trace, steps)
    constant = _constant_layers(trace, steps)
    dead = {layer: share for layer, share in dead.items() if share > COLLAPSED or layer not in constant}
    if dead:
        layers = sorted(dead, key=lambda layer: order.get(layer, 0))
        found.append(_unit_finding("dead", layers, dead, span, dead_remedy(trace)))
    hidden = units[~units["layer"].isin(_outputs(trace))]
    flat = hidden[hidden["saturated_fraction"] > SHARE]
    if len(flat):
        shares = dict(zip(flat["layer"], flat["saturated_fraction"], strict=True))
        found.append(_unit_finding("saturated", list(flat["layer"]), shares, span, saturated_remedy(trace)))
    return found


def _silent(trace: Trace, steps: NDArray[np.int64]) -> dict[str, float]:
    """Return rectifiers all of whose outputs are 0 in the last quarter of the steps: they died in between."""
    late = steps[len(steps) - max(1, len(steps) // 4) :]
    rows = _kept(trace.layers, late)
    rows = rows[rows["kind"].isin(_RECTIFIERS)]
    shares = rows.groupby("layer")["act_zero_fraction"].min()
    return {str(layer): float(share) for layer, share in shares.items() if share >= ALL_ZERO}


def _constant_layers(trace: Trace, steps: NDArray[np.int64]) -> set[str]:
    """Return rectifiers whose units are each on for all samples or for none: they ignore their input.

    So it is where the signal shrank away before them and biases alone are left: half the units are then off, but
    nothing died. A unit that lives is off for some samples.
    """
    rows = _kept(trace.layers, steps)
    rows = rows[rows["kind"].isin(_RECTIFIERS)]
    off = rows.groupby("layer")["act_zero_fraction"].median()
    dead = trace.units.set_index("layer")["dead_fraction"]
    return {str(layer) for layer, share in off.items() if share - dead.get(layer, 0.0) < 0.1 * (1 - share)}


def _outputs(trace: Trace) -> set[str]:
    """Return layers after which no layer with parameters runs: the output's activation is meant to saturate."""
    owners = set(trace.params["layer"].unique())
    rows = trace.layers[trace.layers["step"] == trace.layers["step"].min()]
    last = rows.loc[rows["layer"].isin(owners), "order"].max()
    return set(rows.loc[rows["order"] > last, "layer"])


def _unit_finding(
    kind: str, layers: list[str], shares: dict[str, float], span: tuple[int, int] | None, remedy: tuple[str, str, str]
) -> Finding:
    worst = max(layers, key=lambda layer: shares[layer])
    cause, advice, source = remedy
    return Finding(
        kind="dead" if kind == "dead" else "saturated",
        layers=tuple(layers),
        steps=span,
        severity=(max(shares.values()) - SHARE) / (1 - SHARE),
        evidence=(
            Evidence(what=f"largest share of {kind} units, in {worst}", value=shares[worst], threshold=f"> {SHARE:g}"),
            Evidence(what="layers with such a share", value=float(len(layers))),
        ),
        cause=cause,
        advice=advice,
        source=source,
    )


# -- frozen -----------------------------------------------------------------------------------------------------------


def frozen_findings(trace: Trace, steps: NDArray[np.int64]) -> list[Finding]:
    """Find parameters that want a gradient and get none, or are never updated."""
    rows = _kept(trace.params, steps)
    on_purpose = set(trace.info.get("params_without_grad", ()))
    rows = rows[~rows["param"].isin(on_purpose)]
    if rows.empty:
        return []
    given = rows["grad_nonfinite"].notna()  # the norm is NaN where a gradient holds NaN, too
    got = given.groupby(rows["param"], sort=False).any()
    found = []
    without = [str(name) for name in got.index[~got]]
    if without and got.any():
        found.append(_without_gradient(trace, without, steps))
    elif trace.info.get("optimizer") and not (rows["grad_norm"] > 0).any() and _flowed(trace, steps):
        found.append(_zeroed(list(map(str, got.index)), steps))
    still = _not_updated(trace, rows[given])
    if still:
        found.append(_still(trace, rows, still, steps))
    return found


def _flowed(trace: Trace, steps: NDArray[np.int64]) -> bool:
    """Return whether gradients reached the layers, whatever became of them."""
    return bool((_kept(trace.layers, steps)["grad_norm"] > 0).any())


def _zeroed(names: list[str], steps: NDArray[np.int64]) -> Finding:
    return Finding(
        kind="frozen",
        layers=tuple(names),
        steps=(int(steps[0]), int(steps[-1])),
        evidence=(Evidence(what="parameters without a gradient when the optimizer stepped", value=float(len(names))),),
        cause="The backward pass reached the layers, but the gradients were gone when the optimizer stepped.",
        advice="Call zero_grad before backward, not between backward and the optimizer's step",
        source="torch documentation, torch.optim",
    )


def _without_gradient(trace: Trace, names: list[str], steps: NDArray[np.int64]) -> Finding:
    owner = dict(zip(trace.params["param"], trace.params["layer"], strict=True))
    unused = [name for name in names if owner.get(name) in trace.never_ran]
    if len(unused) == len(names):
        cause = "Their layers never ran."
    else:
        cause = "The graph from the loss does not reach them: a detach, a no_grad block or a result that is not used."
    return Finding(
        kind="frozen",
        layers=tuple(names),
        steps=(int(steps[0]), int(steps[-1])),
        evidence=(Evidence(what="parameters that require a gradient and got none", value=float(len(names))),),
        cause=cause,
        advice="Use them in the loss, or set requires_grad=False if that is meant",
        source="torch documentation, autograd mechanics",
    )


def _not_updated(trace: Trace, rows: pd.DataFrame) -> list[str]:
    left_out = [str(name) for name in trace.info.get("params_not_optimized", ())]
    # A gradient far below the others' may well be rounded away: of a bias before BatchNorm, of a vanishing gradient.
    largest = rows.groupby("step")["grad_norm"].transform("max")
    moved = rows.assign(still=rows["update_norm"] == 0)
    moved = moved[moved["update_norm"].notna() & (rows["grad_norm"] > NEGLIGIBLE * largest)]
    shares = moved.groupby("param", sort=False)["still"].mean() if len(moved) else moved["still"]
    still = [str(name) for name, share in shares.items() if share >= 0.9]
    return list(dict.fromkeys([*left_out, *still]))


def _still(trace: Trace, rows: pd.DataFrame, names: list[str], steps: NDArray[np.int64]) -> Finding:
    left_out = set(trace.info.get("params_not_optimized", ()))
    rates = trace.steps["learning_rate"].dropna()
    if len(rates) and (rates == 0).all():
        cause, advice = "The learning rate is 0.", "Set a learning rate, or look at the schedule's first value"
    elif set(names) <= left_out:
        cause, advice = "The optimizer does not hold them.", "Give the optimizer these parameters too"
    elif _half(trace):
        cause = "The updates are smaller than the spacing of the weights' 16-bit numbers and are rounded away."
        advice = "Keep a float32 master copy of the weights (torch.autocast does)"
    else:
        cause, advice = "The optimizer adds nothing to them.", "Look at the learning rate of their parameter group"
    own = rows[rows["param"].isin(names)]
    return Finding(
        kind="frozen",
        layers=tuple(names),
        steps=(int(steps[0]), int(steps[-1])),
        evidence=(
            Evidence(what="parameters that have a gradient and are never updated", value=float(len(names))),
            Evidence(what="median norm of their gradients", value=float(own["grad_norm"].median())),
        ),
        cause=cause,
        advice=advice,
        source=_MIXED if "16-bit" in cause else "torch documentation, torch.optim",
    )
