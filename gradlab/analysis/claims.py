"""From numbers to verdicts: rules that say reproduced, not reproduced or not decided, and why.

Every decider takes the numbers, the limits of its rule, and the claim's description as keywords (`About`). Too few
samples, runs that diverged and noise that hides the answer lead to "not decided", never to "reproduced".
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict, Unpack

import numpy as np

from gradlab.analysis.claim_record import Claim, Verdict, claims_from_json, claims_to_json
from gradlab.analysis.samples import ROUNDING, as_samples, check_fraction, mean_difference, mean_interval, spread
from gradlab.errors import UsageError, unknown

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "About",
    "Claim",
    "Verdict",
    "claims_from_json",
    "claims_to_json",
    "decide_exact",
    "decide_greater",
    "decide_theory",
    "decide_threshold",
    "mean_interval",
    "not_decided",
]


class About(TypedDict):
    """What a claim says, as keywords of every decider.

    `id`, `statement` and `source` as in `Claim`; `unit` is "" where absent; `detail` comes before the decider's own.
    """

    id: str
    statement: str
    source: str
    unit: NotRequired[str]
    detail: NotRequired[str]


def _claim(
    about: About,
    *,
    rule: str,
    expected: str,
    verdict: Verdict,
    measured: float = math.nan,
    low: float = math.nan,
    high: float = math.nan,
    p_value: float = math.nan,
    n: int,
    remarks: list[str],
) -> Claim:
    """Join the description with the outcome."""
    for name in about:
        if name not in About.__annotations__:
            raise unknown("keyword", name, About.__annotations__)
    for name in ("id", "statement", "source"):
        if name not in about:
            raise UsageError(f"The claim has no {name}, but it needs id, statement and source; give {name}=...")
    return Claim(
        id=about["id"],
        statement=about["statement"],
        source=about["source"],
        unit=about.get("unit", ""),
        expected=expected,
        rule=rule,
        measured=float(measured),
        low=float(low),
        high=float(high),
        p_value=float(p_value),
        n=n,
        verdict=verdict,
        detail=" ".join(part for part in (about.get("detail", ""), *remarks) if part),
    )


def _not_finite(values: NDArray[np.float64], name: str = "samples") -> list[str]:
    bad = int(np.count_nonzero(~np.isfinite(values)))
    return [f"{bad} of {values.size} {name} are not finite (runs that diverged or are missing)."] if bad else []


def _check_tolerance(rel_tol: float) -> None:
    if not (math.isfinite(rel_tol) and rel_tol > 0):
        raise UsageError(f"rel_tol is {rel_tol}, but it must be finite and above 0; give a number such as 0.01.")


def not_decided(
    reason: str, *, rule: str = "Not tested.", expected: str = "", n: int = 0, **about: Unpack[About]
) -> Claim:
    """Return the claim with the verdict "not decided" and no numbers.

    Args:
        reason: Why, one sentence; it becomes the detail.
        rule: The rule that would have decided. Default "Not tested.".
        expected: What the claim leads one to expect. Default "".
        n: Number of samples there were. Default 0.
        **about: The claim's description, see `About`.

    Example:
        >>> not_decided("Needs a GPU.", id="C2.1", statement="Deeper is better.", source="He et al. 2015").detail
        'Needs a GPU.'
    """
    return _claim(about, rule=rule, expected=expected, verdict=Verdict.NOT_DECIDED, n=n, remarks=[reason])


def decide_exact(measured: float, expected: float, *, rel_tol: float = 1e-10, **about: Unpack[About]) -> Claim:
    """Decide an exact identity (E): |measured / expected - 1| <= rel_tol.

    Args:
        measured: The measured number; of many, the one farthest off. NaN counts as not measured.
        expected: What the identity gives, finite; where it is 0 the difference itself must not pass `rel_tol`.
        rel_tol: Largest relative error. Default 1e-10, for float64; 1e-5 suits float32.
        **about: The claim's description, see `About`.

    Raises:
        UsageError: `expected` is not finite or `rel_tol` not above 0.

    Example:
        >>> about = dict(id="C5.4", statement="An LSTM has 4 times an RNN's parameters.", source="counted")
        >>> print(decide_exact(99_328 / 24_832, 4.0, **about).verdict)
        reproduced
    """
    _check_tolerance(rel_tol)
    if not math.isfinite(expected):
        raise UsageError(f"expected is {expected}, but an identity needs a finite value; give the exact number.")
    error = abs(measured - expected) / (abs(expected) or 1.0)
    if math.isnan(measured):
        verdict, remark = Verdict.NOT_DECIDED, "Nothing was measured (NaN)."
    else:
        verdict = Verdict.REPRODUCED if error <= rel_tol else Verdict.NOT_REPRODUCED
        remark = f"{'Relative' if expected else 'Absolute'} error {error:.2g}."
    return _claim(
        about,
        rule=f"(E) Reproduced if the measured number equals the expected one to a relative error of {rel_tol:g}.",
        expected=f"{expected:.12g}",
        measured=measured,
        verdict=verdict,
        n=0 if math.isnan(measured) else 1,
        remarks=[remark],
    )


def decide_theory(
    samples: ArrayLike,
    expected: float,
    *,
    rel_tol: float,
    within_se: float | None = 3.0,
    confidence: float = 0.95,
    **about: Unpack[About],
) -> Claim:
    """Decide a theory value (T): the mean over seeds within `rel_tol` of it, and it within `within_se` standard errors.

    Reproduced needs both, and a standard error no larger than the tolerance, for a noisier mean comes near the value by
    luck. "Not reproduced" needs a deviation that noise does not explain: the theory lies outside the `within_se`
    standard errors (or, with that part off, the whole interval lies outside the tolerance). All else is "not decided".

    Args:
        samples: One number for each seed, shape (n,).
        expected: The theory's value, finite and not 0.
        rel_tol: Largest relative deviation of the mean.
        within_se: Largest distance in standard errors. Default 3. None switches this part off, for theory whose known
            finite-size bias is smaller than the tolerance and larger than the noise; the rule then says so.
        confidence: Of the interval shown. Default .95.
        **about: The claim's description, see `About`.

    Raises:
        UsageError: A value is out of range.

    Example:
        >>> about = dict(id="C1.1", statement="He-ReLU keeps the gradient norm.", source="He et al. 2015b")
        >>> print(decide_theory([0.9958, 1.0021, 0.9972], 1.0, rel_tol=0.01, **about).verdict)
        reproduced
    """
    values = as_samples(samples)
    _check_tolerance(rel_tol)
    if not math.isfinite(expected) or expected == 0.0:
        raise UsageError(
            f"expected is {expected}, but a relative tolerance needs a finite value other than 0; give one."
        )
    if within_se is not None and not (math.isfinite(within_se) and within_se > 0):
        raise UsageError(f"within_se is {within_se}, but it must be finite and above 0, or None; give 3, say.")
    mean, low, high = mean_interval(values, confidence)
    noise = (
        f"the theory lies within {within_se:g} standard errors of it"
        if within_se is not None
        else "(finite-size bias being larger than the noise, no distance in standard errors is asked)"
    )
    rule = (
        f"(T) Reproduced if the mean over seeds is within {rel_tol:.3g} of the theory, relatively, "
        f"{'and ' if within_se is not None else ''}{noise}, with a standard error no larger than that tolerance."
    )
    remarks = _not_finite(values)
    verdict = Verdict.NOT_DECIDED
    if not remarks and values.size < 2:
        remarks = [f"{values.size} sample{'' if values.size == 1 else 's'}, where 2 are needed to know the noise."]
    if not remarks:
        error = spread(values, float(np.abs(values).max())) / math.sqrt(values.size)
        distance, tolerance = abs(mean - expected), rel_tol * abs(expected)
        near = distance <= tolerance * (1 + ROUNDING)
        if within_se is None:
            explained, excluded = True, low > expected + tolerance or high < expected - tolerance
        else:
            explained = distance <= within_se * error + ROUNDING * abs(expected)
            excluded = not explained
        remarks = [f"Deviation {mean / expected - 1:+.3g}, standard error {error / abs(expected):.2g}, relatively."]
        if near and explained and error <= tolerance:
            verdict = Verdict.REPRODUCED
        elif excluded:
            verdict = Verdict.NOT_REPRODUCED
            if near:
                remarks.append("Inside the tolerance, yet farther off than noise explains.")
        else:
            remarks.append("Too noisy to tell the measurement from the theory.")
    return _claim(
        about,
        rule=rule,
        expected=f"{expected:.6g} +- {rel_tol:.3g} relatively",
        measured=mean,
        low=low,
        high=high,
        verdict=verdict,
        n=int(values.size),
        remarks=remarks,
    )


def decide_greater(a: ArrayLike, b: ArrayLike, *, paired: bool, alpha: float = 0.05, **about: Unpack[About]) -> Claim:
    """Decide a statistical claim (S), that the mean of `a` is greater than that of `b`.

    A one-sided t-test, Welch's or paired: reproduced if the difference is positive with p < alpha, not reproduced if it
    is negative with p < alpha the other way, else not decided.

    Args:
        a: One number for each seed, shape (n,), of the side claimed to be greater.
        b: The same for the other side, shape (m,); m = n and the same seeds in the same order where `paired`.
        paired: Whether a[i] and b[i] share a seed; say so only where they do.
        alpha: Largest chance of a false "reproduced", below .5. Default .05.
        **about: The claim's description, see `About`.

    Returns:
        The claim; measured is mean(a) - mean(b), low and high its two-sided 95 % interval, n the smaller group's size.

    Raises:
        UsageError: A value is out of range, or paired groups differ in size.

    Note:
        Assumes roughly normal, independent seeds. A diverged run (not finite) makes it "not decided": replace it
        before, by a cap stated in `detail`, if the claim says how. Groups without any spread get the permutation test's
        smallest p in place of a t-test's 0.

    Example:
        >>> about = dict(id="C2.2a", statement="plain-56 trains worse than plain-20.", source="He et al. 2015")
        >>> claim = decide_greater([2.31, 2.15, 2.27], [1.65, 1.64, 1.66], paired=True, **about)
        >>> print(claim.verdict, round(claim.p_value, 4))
        reproduced 0.0027
    """
    first, second = as_samples(a, "samples a"), as_samples(b, "samples b")
    check_fraction("alpha", alpha, 0.5)
    if paired and first.size != second.size:
        raise UsageError(
            f"Paired groups have {first.size} and {second.size} samples, but need the same seeds; give pairs."
        )
    test = "paired" if paired else "Welch"
    rule = (
        f"(S) Reproduced if a one-sided {test} t-test over seeds, which takes "
        f"{'their differences' if paired else 'both groups'} as independent and roughly normal, finds a positive mean "
        f"difference with p < {alpha:g}, and not reproduced if it finds a negative one so."
    )
    n = int(min(first.size, second.size))
    effect, low, high, p_greater = math.nan, math.nan, math.nan, math.nan
    verdict = Verdict.NOT_DECIDED
    remarks = _not_finite(first, "samples a") + _not_finite(second, "samples b")
    if n < 2:
        remarks.append(f"n is {n}, where 2 are needed to know the noise.")
    if not remarks:
        found = mean_difference(first, second, paired=paired)
        effect, low, high, p_greater = found.effect, found.low, found.high, found.p_greater
        remarks = [f"Groups of {first.size} and {second.size}."] if first.size != second.size else []
        remarks += [found.remark]
        if effect > 0 and p_greater < alpha:
            verdict = Verdict.REPRODUCED
        elif effect < 0 and found.p_less < alpha:
            verdict = Verdict.NOT_REPRODUCED
            remarks.append(f"The effect is in the other direction (p = {found.p_less:.2g}).")
    return _claim(
        about,
        rule=rule,
        expected="> 0",
        measured=effect,
        low=low,
        high=high,
        p_value=p_greater,
        verdict=verdict,
        n=n,
        remarks=remarks,
    )


def decide_threshold(
    samples: ArrayLike,
    *,
    threshold: float,
    direction: Literal[">", "<"],
    min_samples: int = 3,
    **about: Unpack[About],
) -> Claim:
    """Decide a threshold claim (R): every seed lies beyond the threshold.

    Reproduced if all do, not reproduced if fewer than half do, else not decided.

    Args:
        samples: One number for each seed, shape (n,). Infinite ones compare as such: give a diverged loss as inf where
            the claim counts divergence as a large loss. NaN makes it "not decided".
        threshold: The bound, itself not beyond it.
        direction: ">" or "<".
        min_samples: Fewest samples that may decide. Default 3; 1 suits a single rank or ratio.
        **about: The claim's description, see `About`.

    Returns:
        The claim; measured is the median, low and high are the smallest and largest sample (a range, no interval).

    Raises:
        UsageError: A value is out of range.

    Example:
        >>> about = dict(id="C1.6", statement="Xavier stalls a 30-layer ReLU net.", source="He et al. 2015b")
        >>> print(decide_threshold([2.28, 2.27, 2.29], threshold=2.2, direction=">", **about).verdict)
        reproduced
    """
    values = as_samples(samples)
    if direction not in (">", "<"):
        raise unknown("direction", direction, (">", "<"))
    if math.isnan(threshold):
        raise UsageError("threshold is nan, but it must be a number; give the bound.")
    if min_samples < 1:
        raise UsageError(f"min_samples is {min_samples}, but at least 1 sample is needed to decide; give 1 or more.")
    who = f"all seeds, at least {min_samples}, are" if min_samples > 1 else "every measured number is"
    missing = int(np.isnan(values).sum())
    beyond = int(np.count_nonzero(values > threshold if direction == ">" else values < threshold))
    verdict = Verdict.NOT_DECIDED
    measured, low, high = math.nan, math.nan, math.nan
    if missing:
        remarks = [f"{missing} of {values.size} samples are NaN."]
    else:
        remarks = [f"{beyond} of {values.size} {'is' if beyond == 1 else 'are'} {direction} {threshold:g}."]
        if values.size:
            # Of an even number the lower middle one: averaging inf and -inf would make a NaN of two real outcomes.
            measured, low, high = (
                float(np.sort(values)[(values.size - 1) // 2]),
                float(values.min()),
                float(values.max()),
            )
        if values.size < min_samples:
            remarks.append(f"{min_samples} samples are needed.")
        elif beyond == values.size:
            verdict = Verdict.REPRODUCED
        elif 2 * beyond < values.size:
            verdict = Verdict.NOT_REPRODUCED
    return _claim(
        about,
        rule=(f"(R) Reproduced if {who} {direction} {threshold:g}, and not reproduced if fewer than half are."),
        expected=f"{direction} {threshold:g}",
        measured=measured,
        low=low,
        high=high,
        verdict=verdict,
        n=int(values.size),
        remarks=remarks,
    )
