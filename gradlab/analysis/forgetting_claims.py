"""The claims about how fast recurrent nets forget: C5.1, C5.2, C5.4, C6's path length, and note N8."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gradlab.analysis.claims import About, Claim, decide_exact, decide_theory, decide_threshold, not_decided
from gradlab.analysis.decay import fit_decay

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["forgetting_claims", "rates_a_step"]

#: C5.1, gain a step by net; 128 units, input of standard deviation 0.5. Not torch's own RNN: the prototype's 0.476 is
#: that of its recurrent weights (gain 0.577) with an input at every unit; here nn.RNN has one input, as gated nets do.
_TABULATED = {
    "tanh 0.4": 0.339, "tanh 0.8": 0.640, "tanh 1": 0.762, "tanh 1.5": 0.976, "tanh 2": 1.115, "tanh 3": 1.322,
    "sigmoid 1": 0.229, "sigmoid 2": 0.402, "sigmoid 4": 0.634, "sigmoid 8": 0.851,
    "relu 0.8": 0.561, "relu 1": 0.705, "relu 1.2": 0.851, "orthogonal 1": 0.761,
    "lstm default": 0.646, "lstm bias 1": 0.872, "gru default": 0.639,
}  # fmt: skip
_TORCH_RNN = "rnn default"
_DERIVED = "product of Jacobians; Oseledets' theorem; prototype of this project"
_PASCANU = "Pascanu et al. 2013, arXiv 1211.5063, sec. 2"
_ABSENT = "No finished cell measured this."


def rates_a_step(lags: pd.DataFrame) -> pd.DataFrame:
    """Return the factor a step on the gradient norm for each net and seed, fitted from lag 20 (or a tenth) to 3/4.

    Args:
        lags: Columns net, seed, lag, log_norm.

    Returns:
        Columns net, seed, gain.
    """
    rows = []
    for (net, seed), run in lags.groupby(["net", "seed"], sort=False):
        top = run["lag"].max()
        kept = run[run["lag"].between(min(20, top / 10), 0.75 * top)].sort_values("lag")
        rows.append((net, seed, fit_decay(kept["lag"].to_numpy(float), kept["log_norm"].to_numpy(float)).gain))
    return pd.DataFrame(rows, columns=["net", "seed", "gain"])


def forgetting_claims(
    lags: pd.DataFrame, rates: pd.DataFrame, attention: pd.DataFrame, counts: pd.DataFrame, *, tabulated: bool
) -> list[Claim]:
    """Decide how fast each net forgets; tables may be empty.

    Args:
        lags: Columns net, seed, lag, log_norm.
        rates: Columns net, seed, exponent, pascanu_bound.
        attention: Columns seed, lag, log_norm.
        counts: Columns core, parameters.
        tabulated: Units and input are those of the tabulated gains.
    """
    table = pd.DataFrame(columns=["net", "seed", "gain", "exponent", "pascanu_bound"])
    if len(lags) and len(rates):
        table = rates_a_step(lags).merge(rates[["net", "seed", "exponent", "pascanu_bound"]], on=["net", "seed"])
    return [
        *_lyapunov(table),
        *(_as_tabulated(table) if tabulated else []),
        *_pascanu(table),
        *_note_8(table),
        _parameters(counts),
        *_paths(table, attention),
    ]


def _of(table: pd.DataFrame, net: str, column: str = "gain") -> NDArray[np.float64]:
    out: NDArray[np.float64] = table[table["net"] == net].sort_values("seed")[column].to_numpy(dtype=np.float64)
    return out


def _lyapunov(table: pd.DataFrame) -> list[Claim]:
    claims = []
    for net in sorted(table["net"].unique()):
        gain, rate = _of(table, net), np.exp(_of(table, net, "exponent"))
        claims.append(
            decide_theory(
                gain / rate,
                1.0,
                rel_tol=0.02,
                within_se=None,
                id=f"C5.1 {net}",
                statement=f"The gradient of {net} changes by exp(largest Lyapunov exponent) a step.",
                source=_DERIVED,
                unit="gain a step over exp(exponent)",
                detail=f"Gain {gain.mean():.4f}, exp(exponent) {rate.mean():.4f}.",
            )
        )
    if not claims:
        statement = "The gradient changes by exp(largest Lyapunov exponent) a step."
        claims.append(not_decided(_ABSENT, id="C5.1", statement=statement, source=_DERIVED))
    return claims


def _as_tabulated(table: pd.DataFrame) -> list[Claim]:
    claims = []
    for net, expected in _TABULATED.items():
        samples = _of(table, net)
        if len(samples):
            claims.append(
                decide_theory(
                    samples,
                    expected,
                    rel_tol=0.05,
                    within_se=None,
                    id=f"C5.1 table {net}",
                    statement=f"The net '{net}' has the tabulated gain a step.",
                    source="prototype of this project, 128 units, input std 0.5",
                    unit="a step",
                )
            )
    return claims


def _pascanu(table: pd.DataFrame) -> list[Claim]:
    bounded = table[table["pascanu_bound"].notna()] if len(table) else table
    about = About(
        id="C5.2 sufficient",
        statement="Where sigma_max(W) gamma < 1 the gradient vanishes (gamma: largest slope of the activation).",
        source=_PASCANU,
        unit="counterexamples, plus 1",
    )
    other = About(
        id="C5.2 not exploding",
        statement="sigma_max(W) gamma > 1 is necessary for exploding, not sufficient: such nets vanish too.",
        source=_PASCANU,
        unit="nets above 1 that vanish",
    )
    below, above = bounded[bounded["pascanu_bound"] < 1], bounded[bounded["pascanu_bound"] > 1]
    if not len(below) or not len(above):
        reason = "Needs vanilla nets on both sides of the bound."
        return [not_decided(reason, **about), not_decided(reason, **other)]
    against = int((below["gain"] >= 1).sum())
    about["detail"] = f"{len(below)} nets below the bound, {against} of them do not vanish."
    vanish = int((above["gain"] < 1).sum())
    other["detail"] = f"{len(above)} nets above the bound, {vanish} of them vanish all the same."
    return [
        decide_exact(1.0 + against, 1.0, **about),
        decide_threshold([float(vanish)], threshold=0.5, direction=">", min_samples=1, **other),
    ]


def _note_8(table: pd.DataFrame) -> list[Claim]:
    texts = {
        "sigmoid": ("N8 sigmoid", "With sigmoid the gradient through time vanishes", "<"),
        "tanh 1": ("N8 tanh", "With another activation, tanh, it explodes instead", ">"),
        "relu 1": ("N8 relu", "With another activation, ReLU, it explodes instead", ">"),
    }
    claims = []
    for net, (name, text, direction) in texts.items():
        kept = (
            table[table["net"].str.startswith(net)] if net == "sigmoid" and len(table) else table[table["net"] == net]
        )
        samples = kept.groupby("seed")["gain"].max().to_numpy(dtype=np.float64) if len(kept) else np.empty(0)
        about = About(id=name, statement=f"{text}, at every gain measured.", source="note N8", unit="a step")
        if net != "sigmoid":
            about["statement"] = f"{text} (weights of gain 1)."
        if len(samples):
            claims.append(decide_threshold(samples, threshold=1.0, direction=direction, **about))  # type: ignore[arg-type]
        else:
            claims.append(not_decided(_ABSENT, **about))
    return claims


def _parameters(counts: pd.DataFrame) -> Claim:
    found = {} if counts.empty else dict(zip(counts["core"], counts["parameters"], strict=True))
    off = [abs(found[core] / found["rnn"] / times - 1) for core, times in (("gru", 3), ("lstm", 4))] if found else []
    return decide_exact(
        1.0 + max(off) if off else math.nan,
        1.0,
        id="C5.4",
        statement="RNN, GRU and LSTM have parameters in the ratio 1 : 3 : 4 exactly.",
        source="counted; note N10",
        unit="1 + largest relative error",
        detail=", ".join(f"{core} {count:,}" for core, count in found.items()) + "." if found else _ABSENT,
    )


def _paths(table: pd.DataFrame, attention: pd.DataFrame) -> list[Claim]:
    flat = About(
        id="C6 attention",
        statement="Through one attention layer the gradient does not fall with lag: |slope of ln norm| below 0.002.",
        source="note N13; path length, Vaswani et al. 2017; prototype of this project",
        unit="a step",
    )
    steep = About(
        id="C6 recurrent",
        statement="Through nn.RNN at torch's default initialization it falls: slope of ln norm below -0.3 a step.",
        source="note N13; prototype of this project",
        unit="a step",
    )
    claims = []
    if len(attention):
        top = attention["lag"].max()
        kept = attention[attention["lag"].between(0.05 * top, 0.75 * top)]
        slopes = [
            fit_decay(run["lag"].to_numpy(float), run["log_norm"].to_numpy(float)).slope
            for _, run in kept.groupby("seed")
        ]
        claims.append(decide_threshold(np.abs(slopes), threshold=0.002, direction="<", **flat))
    else:
        claims.append(not_decided(_ABSENT, **flat))
    samples = np.log(_of(table, _TORCH_RNN)) if len(table) else np.empty(0)
    claims.append(
        decide_threshold(samples, threshold=-0.3, direction="<", **steep)
        if len(samples)
        else not_decided(_ABSENT, **steep)
    )
    return claims
