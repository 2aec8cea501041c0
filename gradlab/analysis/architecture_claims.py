"""The claims about the five families: C4, and what the study notes say in N1, N2, N3 and N6.

Each function takes tidy tables and returns claims; a table may be empty where cells are missing, and then its claims
are not decided. Counts and receptive fields are exact (`size_claims`); gradients are decided over seeds by rules fixed
beforehand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gradlab.analysis.architecture_size_claims import size_claims
from gradlab.analysis.claims import (
    About,
    Claim,
    decide_greater,
    decide_theory,
    decide_threshold,
    not_decided,
)
from gradlab.analysis.family_profiles import depth_slopes, dropout_gains, head_ratios, log_ratios

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = ["activation_claims", "dropout_claims", "growth_claims", "heads_claims", "size_claims"]

_ABSENT = "No finished cell measured this."
_PROJECT = "derived; prototype of this project"


def growth_claims(layers: pd.DataFrame) -> list[Claim]:
    """Decide how the gradient at the start depends on depth in plain, residual and dense stacks.

    Args:
        layers: Rows of `trace.layers` of the stacks: layer, grad_norm, growth, depth, norm, seed.
    """
    slopes = depth_slopes(layers) if len(layers) else pd.DataFrame(columns=["growth", "norm", "seed", "slope"])

    def of(growth: str, norm: str = "none") -> NDArray[np.float64]:
        own = slopes[(slopes["growth"] == growth) & (slopes["norm"] == norm)].sort_values("seed")
        values: NDArray[np.float64] = own["slope"].to_numpy(dtype=np.float64)
        return values

    def listed(norm: str) -> str:
        parts = [f"{growth} {of(growth, norm).mean():+.3f}" for growth in ("plain", "residual", "dense")]
        return ", ".join(parts)

    detail = _ABSENT
    if len(of("plain")):
        detail = f"Slopes without norm: {listed('none')}."
        if len(of("plain", "batch")):
            detail += f" With BatchNorm: {listed('batch')}."
    plain = About(
        id="C4 plain",
        statement="Without norm, at torch's default init, the gradient at the start of a plain stack falls by more "
        "than e^-0.8 a layer of depth.",
        source=_PROJECT,
        unit="ln a layer",
        detail=detail,
    )
    dense = plain | About(
        id="C4 dense",
        statement="Concatenation keeps it: in a dense stack ln of the gradient changes by less than 0.05 a layer.",
        source=f"Huang et al. 2016; {_PROJECT}",
    )
    flatter = plain | About(
        id="N6 flat",
        statement="Concatenation keeps the gradient flatter over depth than addition (absolute slopes, no norm).",
        source="study notes N6; Huang et al. 2016",
    )
    return [
        _if(of("plain"), lambda s: decide_threshold(s, threshold=-0.8, direction="<", **plain), plain),
        _if(np.abs(of("dense")), lambda s: decide_threshold(s, threshold=0.05, direction="<", **dense), dense),
        _if(
            np.abs(of("residual")),
            lambda s: decide_greater(s, np.abs(of("dense")), paired=True, **flatter),
            flatter,
        ),
    ]


def _if(samples: NDArray[np.float64], decide: Callable[[NDArray[np.float64]], Claim], about: About) -> Claim:
    """Decide where there are samples."""
    if len(samples):
        return decide(samples)
    words = {key: value for key, value in about.items() if key != "detail"}
    return not_decided(_ABSENT, **words)  # type: ignore[arg-type]


def heads_claims(params: pd.DataFrame) -> list[Claim]:
    """Decide what the auxiliary heads do for the first convolution's gradient.

    Args:
        params: Rows of `trace.params` of the GoogLeNet: param, grad_norm, norm, init, heads, seed.
    """
    ratios = head_ratios(params) if len(params) else pd.DataFrame(columns=["norm", "init", "seed", "ratio"])
    own = ratios[(ratios["norm"] == "none") & (ratios["init"] == "default")]["ratio"].to_numpy(dtype=np.float64)
    others = [
        f"{init}, {'BatchNorm' if norm == 'batch' else 'no norm'}: {np.exp(np.log(group['ratio']).mean()):.2f}"
        for (norm, init), group in ratios.groupby(["norm", "init"], sort=False)
        if (norm, init) != ("none", "default")
    ]
    about = About(
        id="C4 heads",
        statement="Without norm, at torch's default init, auxiliary losses raise the gradient of GoogLeNet's first "
        "convolution more than tenfold.",
        source=f"Szegedy et al. 2014, sec. 5; {_PROJECT}",
        unit="with / without heads",
        detail=f"Elsewhere the benefit is another: {'; '.join(others)} (geometric means)." if others else "",
    )
    return [_if(own, lambda s: decide_threshold(s, threshold=10.0, direction=">", **about), about)]


def activation_claims(layers: pd.DataFrame, ends: pd.DataFrame) -> list[Claim]:
    """Decide whether ReLU overcomes the vanishing gradient in AlexNet, against tanh and sigmoid (note N1).

    Args:
        layers: Rows of `trace.layers` of the small nets at initialization.
        ends: What training ended with: family, norm, activation, dropout, heads, init, seed, train_loss.
    """
    ratios = log_ratios(layers) if len(layers) else pd.DataFrame()
    claims = []
    for init, name in (("he_normal", "He's init"), ("default", "torch's default init")):
        for other in ("tanh", "sigmoid"):
            pair = [_ratio(ratios, activation, init) for activation in ("relu", other)]
            about = About(
                id=f"N1 {other} {init.partition('_')[0]}",
                statement=f"At {name}, without norm, the gradient falls less through AlexNet with ReLU than with "
                f"{other} (log10 of the norm at the first over that at the last layer).",
                source="study notes N1; Krizhevsky et al. 2012, sec. 3.1",
                unit="decades",
            )
            claims.append(_paired(pair[0], pair[1], about, ("ReLU", other), "decades"))
    for other in ("tanh", "sigmoid"):
        about = About(
            id=f"N1 {other} loss",
            statement=f"AlexNet with ReLU reaches a lower training loss than with {other} in the same steps.",
            source="study notes N1; Krizhevsky et al. 2012, fig. 1",
            unit="training loss",
        )
        pair = [_ends(ends, "train_loss", activation=activation, dropout=0.0) for activation in (other, "relu")]
        claims.append(_paired(pair[0], pair[1], about, (other, "ReLU"), "loss"))
    return claims


def dropout_claims(layers: pd.DataFrame, ends: pd.DataFrame) -> list[Claim]:
    """Decide what dropout does to the gradient and to the error in AlexNet (note N1).

    Args:
        layers: As in `activation_claims`, with a net that has dropout.
        ends: As in `activation_claims`, with test_error.
    """
    gains = dropout_gains(layers) if len(layers) else pd.DataFrame(columns=["dropout", "seed", "gain"])
    gain = About(
        id="N1 dropout gain",
        statement="Each dropout layer of probability p multiplies the squared gradient norm by 1 / (1 - p).",
        source="derived from the mask's scale 1 / (1 - p)",
        unit="squared norm",
    )
    rate = float(gains["dropout"].iloc[0]) if len(gains) else 0.5
    samples = gains.groupby("seed")["gain"].mean().to_numpy(dtype=np.float64)
    about = About(
        id="N1 dropout error",
        statement="Dropout lowers the test error of AlexNet.",
        source="study notes N1; Krizhevsky et al. 2012, sec. 4.2",
        unit="% test error",
    )
    used = sorted(ends["dropout"].unique()) if len(ends) else []
    pair = [_ends(ends, "test_error", activation="relu", dropout=value) for value in (0.0, used[-1] if used else 0.5)]
    if len(used) < 2:
        pair = [pd.Series(dtype=float)] * 2
    return [
        _if(samples, lambda s: decide_theory(s, 1 / (1 - rate), rel_tol=0.05, **gain), gain),
        _paired(pair[0], pair[1], about, ("without", "with"), "%"),
    ]


def _paired(a: pd.Series[float], b: pd.Series[float], about: About, names: tuple[str, str], unit: str) -> Claim:
    """Decide that a is greater than b over the seeds that both have; a run that diverged leaves it undecided."""
    table = pd.concat([a, b], axis=1).replace([np.inf, -np.inf], np.nan)
    if table.dropna().empty:
        return not_decided(_ABSENT, **about)
    first, second = (table.iloc[:, place].to_numpy(dtype=np.float64) for place in range(2))
    means = [f"{name} {np.nanmean(values):.3g}" for name, values in zip(names, (first, second), strict=True)]
    about["detail"] = f"Means: {', '.join(means)} {unit}."
    return decide_greater(first, second, paired=True, **about)


def _ratio(ratios: pd.DataFrame, activation: str, init: str) -> pd.Series[float]:
    if ratios.empty:
        return pd.Series(dtype=float)
    own = ratios[
        (ratios["family"] == "alexnet")
        & (ratios["norm"] == "none")
        & (ratios["activation"] == activation)
        & (ratios["init"] == init)
        & (ratios["dropout"] == 0)
    ]
    return own.set_index("seed")["log10_ratio"].sort_index()


def _ends(ends: pd.DataFrame, value: str, *, activation: str, dropout: float) -> pd.Series[float]:
    if ends.empty:
        return pd.Series(dtype=float)
    own = ends[
        (ends["family"] == "alexnet")
        & (ends["norm"] == "none")
        & (ends["activation"] == activation)
        & (ends["dropout"] == dropout)
    ]
    return own.set_index("seed")[value].sort_index()
