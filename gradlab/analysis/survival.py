"""Who gets there sooner, where some never do: censored step counts, and the verdict on two groups of them."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Unpack

import numpy as np
from scipy.stats import CensoredData, logrank

from gradlab.analysis.claim_record import Claim, Verdict
from gradlab.analysis.claims import About, not_decided
from gradlab.analysis.samples import ROUNDING, as_samples, check_fraction, mean_difference
from gradlab.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["decide_sooner", "log_rank_p", "permutation_p"]

_MOST_SPLITS = 200_000


def permutation_p(first: ArrayLike, second: ArrayLike) -> float:
    """Return the one-sided p-value of a permutation test that the mean of `first` is smaller.

        p = share of all splits of the joined samples, in groups of these sizes, whose first mean is as small or smaller

    Args:
        first: Finite samples, shape (n,), n at least 1.
        second: Finite samples, shape (m,), m at least 1.

    Returns:
        The exact p-value; where there are more than 200,000 splits, an estimate (k + 1) / (r + 1) of it from as many
        random ones, of a fixed seed.

    Raises:
        UsageError: A group is empty or holds a number that is not finite.

    Note:
        Assumes nothing but that the runs are independent and, without a difference, exchangeable. The smallest p of 3
        against 3 is 1/20, of 5 against 5 it is 1/252.

    Example:
        >>> permutation_p([700, 700, 600], [1200, 1500, 1400])
        0.05

    Source:
        Fisher 1935, The Design of Experiments, sec. 21.
    """
    a, b = as_samples(first, "samples first"), as_samples(second, "samples second")
    if not a.size or not b.size or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UsageError(f"A permutation test needs two groups of finite numbers; got {a.size} and {b.size} of them.")
    joined = np.concatenate([a, b])
    # Means are compared by sums of the first group: the rest is the same in every split.
    limit = a.sum() + ROUNDING * np.abs(joined).sum()
    splits = math.comb(joined.size, a.size)
    if splits <= _MOST_SPLITS:
        count = sum(bool(sum(split) <= limit) for split in itertools.combinations(joined.tolist(), a.size))
        return count / splits
    rng = np.random.default_rng(0)
    drawn = rng.permuted(np.broadcast_to(joined, (_MOST_SPLITS, joined.size)), axis=1)
    below = int((drawn[:, : a.size].sum(axis=1) <= limit).sum())
    return (below + 1) / (_MOST_SPLITS + 1)


def log_rank_p(first: ArrayLike, second: ArrayLike, cap: float) -> float:
    """Return the one-sided p-value of the log-rank test that the events of `first` come sooner.

    Args:
        first: Times of events, shape (n,); NaN for a run without one up to `cap`.
        second: The same, shape (m,).
        cap: Time at which a run without an event was given up.

    Returns:
        The p-value, asymptotic in the number of events; NaN where there is no event or nobody waits with another.

    Example:
        >>> round(log_rank_p([700, 700, 600], [1200, float("nan"), 1400], 1500), 3)
        0.015

    Source:
        Mantel 1966; as in `scipy.stats.logrank`.
    """
    a, b = as_samples(first, "samples first"), as_samples(second, "samples second")
    joined = np.nan_to_num(np.concatenate([a, b]), nan=cap)
    events = np.isfinite(a).any() or np.isfinite(b).any()
    if not a.size or not b.size or not events or len(np.unique(joined)) < 2:
        return math.nan
    x, y = (CensoredData.right_censored(np.nan_to_num(group, nan=cap), np.isnan(group)) for group in (a, b))
    return float(logrank(x, y, alternative="greater").pvalue)


def decide_sooner(
    first: ArrayLike, second: ArrayLike, *, cap: float, alpha: float = 0.05, **about: Unpack[About]
) -> Claim:
    """Decide a statistical claim (S), that runs of `first` need fewer steps than those of `second`.

    A permutation test of the mean step count, runs without success counted at the cap: reproduced if the first mean is
    smaller with p < alpha, not reproduced if it is greater with p < alpha the other way, else not decided. Censoring
    makes the difference too small, never too large, where it is the slower group that is censored.

    Args:
        first: Steps to success, shape (n,); NaN for a run that had none up to the cap.
        second: The same, shape (m,), of independent runs.
        cap: Steps after which a run was given up.
        alpha: Largest chance of a false "reproduced". Default .05.
        **about: The claim's description, see `About`.

    Returns:
        The claim; measured is the difference of the means (second less first), low and high its two-sided 95 % interval
        (Welch), n the smaller group's size. The detail has the ratio of the means and the log-rank test.

    Raises:
        UsageError: A value is out of range, or a success lies beyond the cap.

    Example:
        >>> about = dict(id="C5.7", statement="Chrono LSTM is faster.", source="Tallec & Ollivier 2018")
        >>> claim = decide_sooner([700] * 5, [1200, 1400, 1100, 1300, float("nan")], cap=1500, **about)
        >>> print(claim.verdict, round(claim.p_value, 4))
        reproduced 0.004
    """
    check_fraction("alpha", alpha, 0.5)
    groups = as_samples(first, "samples first"), as_samples(second, "samples second")
    if any((group[np.isfinite(group)] > cap).any() for group in groups):
        raise UsageError(f"A run has its success beyond the cap of {cap:g} steps; give the cap it was run to.")
    rule = (
        "(S) Reproduced if a permutation test over seeds of the mean number of steps, runs without success counted at "
        f"the cap of {cap:g}, finds it smaller with p < {alpha:g}, and not reproduced if it finds it greater so."
    )
    n = int(min(group.size for group in groups))
    about["unit"] = "steps fewer"
    if n < 2:
        return not_decided(f"n is {n}, where 2 are needed to know the noise.", rule=rule, expected="> 0", n=n, **about)
    a, b = (np.nan_to_num(group, nan=cap) for group in groups)
    solved = [int(np.isfinite(group).sum()) for group in groups]
    told = f"Solved: {solved[0]} of {a.size} against {solved[1]} of {b.size}."
    if not any(solved):
        return not_decided(f"{told} The cap is too low to tell.", rule=rule, expected="> 0", n=n, **about)
    sooner, later = permutation_p(a, b), permutation_p(b, a)
    found = mean_difference(b, a, paired=False)
    remarks = [
        told,
        f"Mean steps {a.mean():.4g} against {b.mean():.4g}, a factor of {b.mean() / a.mean():.3g}"
        f"{_bound(solved[0] == a.size, solved[1] == b.size)}.",
    ]
    by_rank = log_rank_p(groups[0], groups[1], cap)
    if math.isfinite(by_rank):
        remarks.append(f"Log-rank p = {by_rank:.2g}.")
    verdict = Verdict.NOT_DECIDED
    if sooner < alpha:
        verdict = Verdict.REPRODUCED
    elif later < alpha:
        verdict = Verdict.NOT_REPRODUCED
        remarks.append(f"The effect is in the other direction (p = {later:.2g}).")
    elif 1 / math.comb(a.size + b.size, a.size) >= alpha:
        remarks.append("With so few seeds no outcome would be significant.")
    about["detail"] = " ".join(part for part in (about.get("detail", ""), *remarks) if part)
    return Claim(
        id=about["id"],
        statement=about["statement"],
        source=about["source"],
        rule=rule,
        expected="> 0",
        measured=found.effect,
        low=found.low,
        high=found.high,
        unit=about["unit"],
        p_value=sooner,
        n=n,
        verdict=verdict,
        detail=about["detail"],
    )


def _bound(first_whole: bool, second_whole: bool) -> str:
    """Return what censoring makes of the factor: a bound where one group was cut at the cap, nothing firm for both."""
    if first_whole and second_whole:
        return ""
    return " or more" if first_whole else " or less" if second_whole else " as counted"
