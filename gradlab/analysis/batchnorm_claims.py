"""The claims about BatchNorm in training: C3.1 to C3.3, its running statistics, and where it is the worse choice."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gradlab.analysis.claims import (
    About,
    Claim,
    Verdict,
    decide_exact,
    decide_greater,
    decide_threshold,
    not_decided,
)
from gradlab.analysis.samples import as_samples

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "batch_claims",
    "decide_separated",
    "identity_claims",
    "landscape_claims",
    "landscape_measures",
    "rate_claims",
    "running_claims",
    "scale_claims",
]

_ABSENT = "No finished cell measured this."
_IOFFE = "Ioffe & Szegedy 2015, arXiv 1502.03167"
_SANTURKAR = "Santurkar et al. 2018, arXiv 1805.11604, sec. 3.1"
_NOTE = "note N5; thresholds of this project"
_UNTRAINED = 2.2  # nats; guessing among 10 classes is ln 10 = 2.303
_TINY_TRAINED = 0.2  # mean final loss below which a net trained from tiny weights
_TRAINED = 0.1  # final loss below which a learning rate counts as workable


def identity_claims(identity: pd.DataFrame) -> list[Claim]:
    """Decide the invariance to scale (columns net, epsilon, factor, seed, output_error, gradient_error and _ratio)."""
    exact = identity[identity["epsilon"] == 0] if len(identity) else identity
    worst = float(exact[["output_error", "gradient_error"]].to_numpy().max()) if len(exact) else math.nan
    factors = f"factors {exact['factor'].min():g} to {exact['factor'].max():g}" if len(exact) else ""
    limit = identity[(identity["epsilon"] == 1e-5) & (identity["factor"] == 1e-3)] if len(identity) else identity
    ratios = [_by_seed(limit, "gradient_ratio", net=net) for net in ("one layer", "net")]
    return [
        decide_exact(
            1.0 + worst,
            1.0,
            rel_tol=1e-10,
            id="C3.1",
            statement="BN(aWx) = BN(Wx) and dL/d(aW) = (1/a) dL/dW, for one layer and for a whole net, at eps = 0.",
            source=f"{_IOFFE}, sec. 3.3",
            unit="1 + largest relative error",
            detail=f"float64, {factors}." if factors else "",
        ),
        decide_threshold(
            ratios[1],
            threshold=0.99,
            direction="<",
            id="C3.1 eps",
            statement="eps ends it: at torch's eps = 1e-5 and a = 1e-3 the gradients of a net are more than 1 % off.",
            source=_NOTE,
            unit="a |dL/d(aW)| / |dL/dW|",
            detail=f"Net {_mean(ratios[1])}, one layer {_mean(ratios[0])} (prototype: .860 in its setting)."
            if len(ratios[1])
            else _ABSENT,
        ),
    ]


def scale_claims(ends: pd.DataFrame, *, lr: float, batch_size: int, steps: int) -> list[Claim]:
    """Decide training from tiny weights (columns norm, lr, scale, batch_size, steps, seed, loss; inf if it diverged).

    `steps` are the usual ones; runs of more say whether a slow start was only slow, and where eps ends the claim.
    """
    every = _where(ends, lr=lr, batch_size=batch_size)
    every = every[every["scale"] < 1] if len(every) else every
    usual = _where(every, steps=steps)
    scales = sorted(usual["scale"].unique(), reverse=True) if len(usual) else []
    claims = [_trains(usual, scale, lr, f"C3.1 train {scale:g}", f"in {steps} steps") for scale in scales]
    longer = every[every["steps"] > steps] if len(every) else every
    for scale in sorted(longer["scale"].unique(), reverse=True) if len(longer) else []:
        run = _where(longer, scale=scale)
        about = f"in {run['steps'].max()} steps"
        if scale in scales:
            claims.append(_trains(run, scale, lr, f"C3.1 train {scale:g} longer", about))
        else:
            claims.append(_stalls(run, scale, lr, about))
    bare = every[every["norm"] == "none"].groupby("seed")["loss"].min().to_numpy() if len(every) else np.empty(0)
    claims.append(
        decide_threshold(
            bare,
            threshold=_UNTRAINED,
            direction=">",
            id="C3.1 bare",
            statement=f"Without BatchNorm it does not train from any of these: the best final loss is above "
            f"{_UNTRAINED:g}.",
            source=_NOTE,
            unit="nats",
            detail=f"Scales {', '.join(f'{scale:g}' for scale in scales)}." if scales else _ABSENT,
        )
    )
    pair = _pairs(_where(usual, scale=scales[-1]) if scales else usual, "loss", "norm", "none", "batch")
    least = f"{scales[-1]:g}" if scales else "few"
    claims.append(
        decide_greater(
            *pair,
            paired=True,
            id="C3.1 lower",
            statement=f"From weights {least} times He's the final loss with BatchNorm is the lower one.",
            source=_NOTE,
            unit="nats",
        )
    )
    return claims


def _trains(runs: pd.DataFrame, scale: float, lr: float, name: str, within: str) -> Claim:
    losses, bare = (_by_seed(runs, "loss", norm=norm, scale=scale) for norm in ("batch", "none"))
    return decide_greater(
        np.full(losses.size, _TINY_TRAINED),
        losses,
        paired=True,  # with a constant: a one-sample test of the mean over seeds
        id=name,
        statement=f"With BatchNorm the net trains from weights {scale:g} times He's {within}: its final loss is, in "
        f"the mean over seeds, below {_TINY_TRAINED:g}.",
        source=_NOTE,
        unit=f"nats below {_TINY_TRAINED:g}",
        detail=f"Mean loss {_mean(losses)}, largest {max(losses, default=math.nan):.3g}; without BatchNorm "
        f"{_mean(bare)}; lr {lr:g}, eps 1e-5.",
    )


def _stalls(runs: pd.DataFrame, scale: float, lr: float, within: str) -> Claim:
    return decide_threshold(
        _by_seed(runs, "loss", norm="batch", scale=scale),
        threshold=_UNTRAINED,
        direction=">",
        id="C3.1 train limit",
        statement=f"eps ends it: from weights {scale:g} times He's the net does not train with BatchNorm either "
        f"{within}, since the variance that BatchNorm divides by is then far below eps.",
        source=_NOTE,
        unit="nats",
        detail=f"lr {lr:g}, eps 1e-5.",
    )


def workable(ends: pd.DataFrame, *, batch_size: int) -> pd.DataFrame:
    """Return the largest learning rate with a final loss below 0.1, by norm and seed (columns norm, seed, largest)."""
    kept = _where(ends, scale=1.0, batch_size=batch_size)
    rows = [
        (norm, seed, run.loc[run["loss"] < _TRAINED, "lr"].max())
        for (norm, seed), run in (kept.groupby(["norm", "seed"]) if len(kept) else ())
    ]
    return pd.DataFrame(rows, columns=["norm", "seed", "largest"])


def rate_claims(ends: pd.DataFrame, *, batch_size: int) -> list[Claim]:
    """Decide the range of learning rates, and print the rates at which BatchNorm is the worse choice."""
    largest = workable(ends, batch_size=batch_size)
    batch, none = _pairs(largest, "largest", "norm", "batch", "none")
    kept = _where(ends, scale=1.0, batch_size=batch_size)
    rates = sorted(kept["lr"].unique()) if len(kept) else []
    pairs = {rate: _pairs(_where(kept, lr=rate), "loss", "norm", "batch", "none") for rate in rates}
    worse = [
        f"{rate:g} ({_mean(pairs[rate][0])} against {_mean(pairs[rate][1])})"
        for rate in rates
        if len(pairs[rate][0]) and pairs[rate][0].mean() > pairs[rate][1].mean()
    ]
    smallest = rates[0] if rates else math.nan
    slow = pairs[smallest] if rates else (np.empty(0), np.empty(0))
    return [
        decide_threshold(
            batch / none,
            threshold=3.0 * (1 - 1e-9),  # a grid's factor of 3 counts
            direction=">",
            id="C3.2",
            statement="The largest learning rate that reaches a loss below 0.1 is at least 3 times larger with "
            "BatchNorm.",
            source=_NOTE,
            unit="ratio of largest rates",
            detail=f"Largest with BatchNorm {_list(batch)}, without {_list(none)}." if len(batch) else _ABSENT,
        ),
        decide_greater(
            *slow,
            paired=True,
            id="C3.2 small",
            statement="At the smallest learning rate BatchNorm is the worse choice: its final loss is higher.",
            source=f"{_NOTE}; De & Smith 2020, arXiv 2002.10444",
            unit="nats",
            detail=f"At lr {smallest:g}. BatchNorm has the higher mean loss at: {', '.join(worse) or 'no rate'}."
            if rates
            else _ABSENT,
        ),
    ]


def batch_claims(ends: pd.DataFrame, *, lr: float, batch_size: int) -> list[Claim]:
    """Decide what tiny batches do: BatchNorm's statistics are then mostly noise."""
    kept = _where(ends, lr=lr, scale=1.0)
    sizes = sorted(kept["batch_size"].unique()) if len(kept) else []
    claims = []
    for size in (2, 4):
        about = About(
            id=f"N5 batch {size}",
            statement=f"With batches of {size} BatchNorm is the worse choice: its final training loss is higher.",
            source=_NOTE,
            unit="nats",
        )
        if size not in sizes or size == batch_size:
            claims.append(not_decided(_ABSENT, **about))
            continue
        losses, errors = (
            _pairs(_where(kept, batch_size=size), value, "norm", "batch", "none") for value in ("loss", "test_error")
        )
        about["detail"] = (
            f"With {_mean(losses[0])}, without {_mean(losses[1])}; test error {_mean(errors[0])} % against "
            f"{_mean(errors[1])} %; lr {lr:g} and as many steps as with {batch_size}."
        )
        claims.append(decide_greater(*losses, paired=True, **about))
    return claims


_MEASURES = {
    "loss_range": ("the loss varies less", "nats"),
    "grad_change": ("the gradient changes less", "largest |g' - g|"),
    "relative_change": ("the gradient changes less relative to its own norm", "largest |g' - g| / |g|"),
    "relative_range": ("the loss varies less relative to what the gradient promises", "range / (lr |g|^2)"),
}


def landscape_measures(landscape: pd.DataFrame, *, lr: float) -> pd.DataFrame:
    """Return how loss and gradient vary along the gradient, at each place during training.

    Args:
        landscape: Columns norm, seed, updates, factor, start, loss, grad_norm, grad_change.
        lr: The step of factor 1.

    Returns:
        Columns norm, seed, updates and, over all factors: loss_range (largest less smallest), grad_change (largest),
        relative_change (over |g|), relative_range (over lr |g|^2). A loss that is not finite makes them inf.
    """
    finite = landscape.replace({"loss": {np.nan: np.inf}, "grad_change": {np.nan: np.inf}})
    by = finite.groupby(["norm", "seed", "updates"])
    found = by.agg(
        high=("loss", "max"), low=("loss", "min"), grad_change=("grad_change", "max"), grad_norm=("grad_norm", "first")
    )
    found["loss_range"] = (found["high"] - found["low"]).fillna(np.inf)
    found["relative_change"] = found["grad_change"] / found["grad_norm"]
    found["relative_range"] = found["loss_range"] / (lr * found["grad_norm"] ** 2)
    return found.drop(columns=["high", "low"]).reset_index()


def landscape_claims(landscape: pd.DataFrame, *, lr: float) -> list[Claim]:
    """Decide whether BatchNorm makes loss and gradient more predictable along a step."""
    found = landscape_measures(landscape, lr=lr) if len(landscape) else pd.DataFrame(columns=["norm", "seed"])
    claims = []
    for name, (text, unit) in _MEASURES.items():
        means = found.groupby(["norm", "seed"])[name].mean().reset_index() if len(found) else found
        bare, normed = (_by_seed(means, name, norm=norm) for norm in ("none", "batch"))
        claims.append(
            decide_separated(
                bare,
                normed,
                id=f"C3.3 {name.replace('_', ' ')}",
                statement=f"With BatchNorm {text} along the gradient, from half a step to four.",
                source=_SANTURKAR,
                unit=unit,
                detail=f"Means over training, by seed: without {_list(bare)}; with {_list(normed)}; lr {lr:g}."
                if len(bare)
                else _ABSENT,
            )
        )
    return claims


def decide_separated(large: ArrayLike, small: ArrayLike, *, alpha: float = 0.05, **about: object) -> Claim:
    """Decide that every sample of one group lies above every sample of another, with an exact permutation test.

    Reproduced if all do and the one-sided p of the rank sum is at most `alpha`; not reproduced if the rank sum is
    significant the other way; else not decided. Ranks, so that a diverged run (inf) counts as large.

    Args:
        large: Samples of the group claimed to be greater, one a seed.
        small: Those of the other.
        alpha: Largest p.
        **about: The claim's description, see `About`.

    Example:
        >>> about = dict(id="C3.3", statement="Smoother.", source="Santurkar et al. 2018")
        >>> claim = decide_separated([2, 3, 4, 5, 6.0], [1, 0.5, 0.2, 0.1, 0.3], **about)
        >>> print(claim.verdict, round(claim.p_value, 4))
        reproduced 0.004
    """
    a, b = np.asarray(large, dtype=np.float64), np.asarray(small, dtype=np.float64)
    n = int(min(a.size, b.size))
    rule = (
        f"(S) Reproduced if every seed of one group lies above every seed of the other and the exact one-sided "
        f"permutation test of the rank sum has p <= {alpha:g}; not reproduced if it is significant the other way."
    )
    text: dict[str, str] = {name: str(value) for name, value in about.items()}
    detail = text.pop("detail", "")
    if n == 0 or np.isnan(a).any() or np.isnan(b).any():
        reason = detail or _ABSENT
        return not_decided(reason, rule=rule, expected="> 0", n=n, **text)
    both = np.concatenate([a, b])
    ranks = np.array([np.sum(both < value) + (np.sum(both == value) + 1) / 2 for value in both])
    seen = ranks[: a.size].sum()
    sums = np.array([sum(chosen) for chosen in itertools.combinations(ranks, a.size)])
    p_greater, p_less = float(np.mean(sums >= seen - 1e-9)), float(np.mean(sums <= seen + 1e-9))
    verdict = Verdict.NOT_DECIDED
    if a.min() > b.max() and p_greater <= alpha:
        verdict = Verdict.REPRODUCED
    elif p_less <= alpha:
        verdict = Verdict.NOT_REPRODUCED
        detail += f" The effect is in the other direction (p = {p_less:.2g})."
    claim = not_decided(detail, rule=rule, expected="> 0", n=n, **text)
    effect = float(a.mean() - b.mean()) if np.isfinite(both).all() else math.inf
    return replace(claim, measured=effect, p_value=p_greater, verdict=verdict)


def running_claims(modes: pd.DataFrame) -> list[Claim]:
    """Decide the gap between training and evaluation mode (columns momentum, seed, step, in_training, _evaluation)."""
    about = About(
        id="N5 lag",
        statement="Running statistics lag: early on the loss in evaluation mode is above that in training mode.",
        source=_NOTE,
        unit="nats",
    )
    slower = about | {
        "id": "N5 lag momentum",
        "statement": "The smaller the momentum, the larger the gap.",
    }
    momenta = sorted(modes["momentum"].unique(), reverse=True) if len(modes) else []
    if len(momenta) < 2:
        return [not_decided(_ABSENT, **about), not_decided("Needs two momenta at least.", **slower)]
    early = modes[modes["step"] <= modes["step"].max() / 3]
    means = early.groupby(["momentum", "seed"])[["in_training", "in_evaluation"]].mean().reset_index()
    means["gap"] = means["in_evaluation"] - means["in_training"]
    usual, slow = _pairs(means, "gap", "momentum", momenta[0], momenta[-1])
    ends = modes[modes["step"] == modes["step"].max()].assign(gap=lambda f: f["in_evaluation"] - f["in_training"])
    last = _pairs(ends, "gap", "momentum", momenta[0], momenta[-1])
    about["detail"] = (
        f"Recorded steps up to {early['step'].max()}, momentum {momenta[0]:g}; gap at the last step {_mean(last[0])}."
    )
    slower["detail"] = (
        f"Momentum {momenta[-1]:g}: gap {_mean(slow)} early and {_mean(last[1])} at the last step; {momenta[0]:g}: "
        f"{_mean(usual)}."
    )
    return [
        decide_greater(usual, np.zeros(len(usual)), paired=True, **about),
        decide_greater(slow, usual, paired=True, **slower),
    ]


def _where(frame: pd.DataFrame, **values: float) -> pd.DataFrame:
    for name, value in values.items():
        frame = frame[frame[name] == value] if len(frame) else frame
    return frame


def _by_seed(frame: pd.DataFrame, value: str, **where: object) -> NDArray[np.float64]:
    """Return a column's values of the rows that match, in the order of seeds."""
    if frame.empty:
        return np.empty(0)
    for name, wanted in where.items():
        frame = frame[frame[name] == wanted]
    out: NDArray[np.float64] = frame.sort_values("seed")[value].to_numpy(dtype=np.float64)
    return out


def _pairs(
    frame: pd.DataFrame, value: str, by: str, first: object, second: object
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a column of the rows where `by` is first, and where it is second, of the seeds that have both."""
    if frame.empty:
        return np.empty(0), np.empty(0)
    columns = [frame[frame[by] == wanted].set_index("seed")[value].astype(float) for wanted in (first, second)]
    seeds = sorted(set(columns[0].index) & set(columns[1].index))
    return as_samples(columns[0].loc[seeds]), as_samples(columns[1].loc[seeds])


def _mean(values: ArrayLike) -> str:
    array = np.asarray(values, dtype=np.float64)
    return f"{array.mean():.3g}" if array.size else "nothing"


def _list(values: ArrayLike) -> str:
    return ", ".join(f"{value:.3g}" for value in np.asarray(values, dtype=np.float64))
