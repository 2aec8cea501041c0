"""Rule sets of published tools, as presets to compare with: `gl.diagnose(trace, rules="autotrainer")`, say.

Each rule has its published threshold and fires if it holds in any recorded step. None of them looks through time, none
knows an unused parameter, and most bounds are absolute, so that a loss summed or scaled changes the verdict. Where a
trace lacks the statistic of a rule, the nearest recorded one stands in for it; `gradlab.analysis.published_views` and
the docstrings here say which. A tool that has no word for a kind of finding gets the nearest one of `KINDS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import numpy as np

from gradlab.analysis import published_views as views
from gradlab.analysis.finding import Axis, Evidence, Finding, Kind
from gradlab.analysis.published_views import Matrix

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gradlab.trace import Trace

__all__ = ["RULES"]


def _found(
    kind: Kind,
    source: str,
    what: str,
    threshold: str,
    matrix: Matrix,
    holds: NDArray[np.bool_],
    *,
    axis: Axis = "",
    worst: Callable[[NDArray[np.float64]], float] = np.nanmax,
) -> list[Finding]:
    """Return one finding for the names and steps at which a rule holds; none where it never does."""
    if not holds.any():
        return []
    steps = matrix.steps[np.any(holds, axis=1)]
    names = tuple(name for name, bad in zip(matrix.names, holds.T, strict=True) if bad.any() and name)
    values = matrix.values[holds]
    value = float(worst(values)) if not np.isnan(values).all() else math.nan
    evidence = (Evidence(what=what, value=value, threshold=threshold),)
    return [
        Finding(
            kind=kind, axis=axis, layers=names, steps=(int(steps[0]), int(steps[-1])), evidence=evidence, source=source
        )
    ]


def _shares(kind: Kind, source: str, what: str, threshold: str, shares: dict[str, float], over: float) -> list[Finding]:
    """Return one finding for the layers whose share, known over the whole window, is above a bound."""
    bad = {name: share for name, share in shares.items() if share > over}
    if not bad:
        return []
    evidence = (Evidence(what=what, value=max(bad.values()), threshold=threshold),)
    return [Finding(kind=kind, layers=tuple(bad), evidence=evidence, source=source)]


def _column(steps: NDArray[np.int64], values: NDArray[np.float64]) -> Matrix:
    return Matrix(steps=steps, names=("",), values=values[:, None])


def _ends(matrix: Matrix) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the first and the last kernel's value of each step, of those that have one."""
    present = ~np.isnan(matrix.values).all(0)
    values = matrix.values[:, present]
    if values.shape[1] < 2:
        nothing = np.full(len(matrix.steps), math.nan)
        return nothing, nothing
    return values[:, 0], values[:, -1]


def _divide(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio: NDArray[np.float64] = a / b
    return ratio


def _in_a_row(bad: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    """Return for each step whether `count` neighbours in depth are bad."""
    if bad.shape[1] < count:
        return np.zeros(len(bad), dtype=np.bool_)
    windows = np.lib.stride_tricks.sliding_window_view(bad, count, axis=1)
    return np.array([row.all(-1).any() for row in windows], dtype=np.bool_)


def _autotrainer(trace: Trace) -> tuple[Finding, ...]:
    """AUTOTRAINER: norms of the first and last kernel's gradient; zero entries by `zero_gradient_share`."""
    source = "AUTOTRAINER (Zhang et al., ICSE 2021)"
    norms = views.kernels(trace)
    first, last = _ends(norms)
    ratio = _column(norms.steps, np.where(last == 0, 1.0, _divide(first, last)))  # as its code has it
    bad = _column(norms.steps, np.where(np.isinf(norms.values).any(1) | _broken(trace, norms.steps), math.inf, 0.0))
    zeros = views.zero_gradient_share(trace)
    what = "norm of the first over that of the last kernel's gradient"
    return (
        *_found("vanishing", source, what, "< 1e-3, and the first < 1e-4", ratio,
                (ratio.values < 1e-3) & (first[:, None] < 1e-4), axis="depth", worst=np.nanmin),
        *_found("exploding", source, what, "> 70", ratio, ratio.values > 70, axis="depth"),
        *_found("exploding", source, "a gradient or the loss", "NaN or Inf", bad, bad.values > 0),
        *_found("dead", source, "share of gradient entries that are exactly 0", ">= 0.7", zeros, zeros.values >= 0.7),
    )  # fmt: skip


def _broken(trace: Trace, steps: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each step whether a gradient held a NaN or Inf, or the loss was one."""
    params, rows = trace.params, trace.steps
    bad = set(params.loc[params["grad_nonfinite"] > 0, "step"])
    # Without one given, the loss is NaN in every step.
    given = rows["loss"].notna().any()
    bad |= set(rows.loc[~np.isfinite(rows["loss"].to_numpy()), "step"]) if given else set()
    return np.isin(steps, list(bad))


def _sagemaker(trace: Trace) -> tuple[Finding, ...]:
    """SageMaker Debugger's built-in rules.

    A unit is dead if it was active for no sample of the window (published: for less than 1 %); a tanh is saturated if
    half of its inputs are estimated to lie out of bounds; variances and the spread of gradients (5th to 95th
    percentile: 3.29 standard deviations of a Gaussian) are those of the first recorded step.
    """
    source = "Amazon SageMaker Debugger, built-in rules"
    means, updates = views.mean_abs(trace), views.update_ratio(trace)
    beyond = views.input_beyond(trace, {"Tanh": 9.4999})
    return (
        *_found("vanishing", source, "mean absolute gradient", "< 1e-7", means, means.values < 1e-7, worst=np.nanmin),
        *_shares("dead", source, "share of units of a layer that are dead", "> 0.5",
                 views.unit_shares(trace, "dead_fraction"), 0.5),
        *_found("saturated", source, "share of tanh's inputs beyond +-9.4999", "> 0.5", beyond, beyond.values > 0.5),
        *_found("exploding", source, "update over weight", "> 10", updates, updates.values > 10, axis="training"),
        *_found("frozen", source, "update over weight", "< 1e-8", updates, updates.values < 1e-8, worst=np.nanmin),
        *_poor_initialization(trace, source, means),
    )  # fmt: skip


def _poor_initialization(trace: Trace, source: str, means: Matrix) -> list[Finding]:
    owners = tuple(set(map(str, trace.layers.loc[trace.layers["layer"].isin(trace.params["layer"]), "kind"])))
    stds = views.activations(trace, owners, "act_std")
    found = []
    if len(stds.steps) and len(stds.names) > 1:
        variances = stds.values[0] ** 2
        known = variances[np.isfinite(variances)]
        if len(known) > 1 and known.min() > 0 and known.max() / known.min() > 10:
            grows = known[-1] > known[0]
            evidence = Evidence(what="ratio of layers' variances", value=known.max() / known.min(), threshold="> 10")
            found.append(
                Finding(
                    kind="exploding" if grows else "vanishing", axis="depth", layers=stds.names,
                    steps=(int(stds.steps[0]),) * 2, evidence=(evidence,), source=source,
                )
            )  # fmt: skip
    if len(means.steps):
        spread = Matrix(
            steps=means.steps[:1], names=means.names, values=means.values[:1] / views.MEAN_ABS * 2 * 1.6448536
        )
        what = "5th to 95th percentile of the gradient"
        found += _found("vanishing", source, what, "< 0.001", spread, spread.values < 0.001, worst=np.nanmin)
    return found


def _deepchecker(trace: Trace) -> tuple[Finding, ...]:
    """TheDeepChecker: a unit is dead if active for no sample (published: 95th percentile of absolute output < 1e-5)."""
    source = "TheDeepChecker (Ben Braiek and Khomh, TOSEM 2022)"
    means, updates = views.mean_abs(trace), views.update_ratio(trace)
    ratio = _divide(means.values[:, :-1], means.values[:, 1:])  # nearer the input over nearer the output
    shrinks = _column(means.steps, _in_a_row(ratio <= 0.5, 5).astype(np.float64))
    grows = _column(means.steps, _in_a_row(ratio >= 2, 5).astype(np.float64))
    with np.errstate(divide="ignore"):
        logs = Matrix(steps=updates.steps, names=updates.names, values=np.log10(updates.values))
    five = "ratios of neighbours, five in a row"
    return (
        *_found("vanishing", source, "mean absolute gradient", "< 1e-6", means, means.values < 1e-6, worst=np.nanmin),
        *_found("vanishing", source, five, "<= 0.5", shrinks, shrinks.values > 0, axis="depth"),
        *_found("exploding", source, "mean absolute gradient", "> 1e6", means, means.values > 1e6),
        *_found("exploding", source, five, ">= 2", grows, grows.values > 0, axis="depth"),
        *_shares("dead", source, "share of units of a layer that are dead", "> 0.5",
                 views.unit_shares(trace, "dead_fraction"), 0.5),
        *_found("exploding", source, "log10 of update over weight", "> -1", logs, logs.values > -1, axis="training"),
        *_found("frozen", source, "log10 of update over weight", "< -4", logs, logs.values < -4, worst=np.nanmin),
    )  # fmt: skip


def _deepdiagnosis(trace: Trace) -> tuple[Finding, ...]:
    """DeepDiagnosis: "dead" counts outputs of rectifiers that are 0, active units' too, so healthy nets are reported.

    Its bound of 5 on inputs is read for tanh and the sigmoid, by a Gaussian estimate.
    """
    source = "DeepDiagnosis (Wardat et al., ICSE 2022)"
    means = views.mean_abs(trace)
    zeros = views.activations(trace, views.RECTIFIERS, "act_zero_fraction")
    beyond = views.input_beyond(trace, {"Tanh": 5.0, "Sigmoid": 5.0})
    return (
        *_found("vanishing", source, "mean absolute gradient", "< 1e-7", means, means.values < 1e-7, worst=np.nanmin),
        *_found("dead", source, "share of outputs that are 0", ">= 0.7", zeros, zeros.values >= 0.7),
        *_found("saturated", source, "share of inputs beyond +-5", "> 0.5", beyond, beyond.values > 0.5),
    )


def _torchlens(trace: Trace) -> tuple[Finding, ...]:
    """Return what torchlens finds: bounds on the gradient norm of each output; NaN and Inf count as exploding."""
    source = "torchlens"
    layers = trace.layers
    kinds = tuple(set(map(str, layers["kind"])))
    norms = views.activations(trace, kinds, "grad_norm")
    bad = views.activations(trace, kinds, "grad_nonfinite")
    with np.errstate(invalid="ignore"):
        small = (norms.values > 0) & (norms.values < 1e-7)
        large = (norms.values > 1e4) | (bad.values > 0)
    what = "gradient norm of a layer"
    return (
        *_found("vanishing", source, what, "> 0 and < 1e-7", norms, small, worst=np.nanmin),
        *_found("exploding", source, what, "> 1e4, NaN or Inf", norms, large),
    )


def _torchmortem(trace: Trace) -> tuple[Finding, ...]:
    """Return what torchmortem 0.1.1 finds: a gradient of NaN counts as 0, so that NaN everywhere reads as vanishing.

    The share of entries below 1e-6 is that of zeros of a rectifier's output; the share above 0.95 is that of units
    whose slope is below 1 % for most samples (|tanh| above 0.995).
    """
    source = "torchmortem 0.1.1"
    norms, updates = views.kernels(trace), views.update_ratio(trace)
    broken = views.kernels(trace, "grad_nonfinite").values > 0
    first, last = _ends(
        Matrix(
            steps=norms.steps, names=norms.names, values=np.where(broken & np.isnan(norms.values), 0.0, norms.values)
        )
    )
    with np.errstate(invalid="ignore"):
        ratio = _column(norms.steps, np.where(first == 0, math.inf, _divide(last, first)))
    zeros = views.activations(trace, views.RECTIFIERS, "act_zero_fraction")
    return (
        *_found("vanishing", source, "norm of the last over that of the first kernel's gradient", "> 100",
                ratio, ratio.values > 100, axis="depth"),
        *_found("dead", source, "share of entries below 1e-6", "> 0.5", zeros, zeros.values > 0.5),
        *_shares("saturated", source, "share of entries above 0.95", "> 0.5",
                 views.unit_shares(trace, "saturated_fraction"), 0.5),
        *_found("exploding", source, "update over weight", "> 1e-1", updates, updates.values > 1e-1, axis="training"),
        *_found("frozen", source, "update over weight", "< 1e-5", updates, updates.values < 1e-5, worst=np.nanmin),
    )  # fmt: skip


def _nansense(trace: Trace) -> tuple[Finding, ...]:
    """Return what nansense 0.4 finds, by the type of the parameters: a trace does not keep that of activations.

    Of the sum of Gaussian absolute values, entries below t make up 1 - exp(-t^2 / (2 rms^2)).
    """
    source = "nansense 0.4"
    tiny, huge = views.largest_number(trace)
    means = views.mean_abs(trace)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        lost = -np.expm1(-((views.MEAN_ABS * tiny / means.values) ** 2) / 2)
    share = Matrix(steps=means.steps, names=means.names, values=np.where(means.values > 0, lost, 0.0))
    kinds = tuple(set(map(str, trace.layers["kind"])))
    tops = [views.activations(trace, kinds, name) for name in ("act_abs_max", "grad_abs_max")]
    what = "largest absolute entry"
    return (
        *_found("vanishing", source, "share of the summed gradient that is subnormal", "> 0.1",
                share, share.values > 0.1),
        *(found for top in tops
          for found in _found("exploding", source, what, f"> {huge / 16:.3g}", top, top.values > huge / 16)),
    )  # fmt: skip


_WINDOW, _SIGMAS = 128, 6.0


def _olmo(trace: Trace) -> tuple[Finding, ...]:
    """OLMo-core: spikes of loss or gradient norm; the rule waits until half of its window of 128 steps is full."""
    source = "OLMo-core, SkipStepOptimizer (Allen Institute for AI)"
    rows = trace.steps
    steps = rows["step"].to_numpy()
    found = []
    for name, what in (("loss", "loss"), ("grad_norm", "norm of all gradients")):
        values = rows[name].to_numpy(np.float64)
        above = np.full(len(values), math.nan)
        for place in range(_WINDOW // 2 - 1, len(values)):
            past = values[max(0, place - _WINDOW) : place]
            past = past[np.isfinite(past)]
            if len(past) > 1 and np.std(past, ddof=1) > 0:
                above[place] = (values[place] - past.mean()) / np.std(past, ddof=1)
        matrix = _column(steps, above)
        found += _found(
            "exploding", source, f"{what}, standard deviations above its mean", "> 6", matrix,
            matrix.values > _SIGMAS, axis="training",
        )  # fmt: skip
    return tuple(found)


RULES: Final[Mapping[str, Callable[[Trace], tuple[Finding, ...]]]] = MappingProxyType(
    {
        "autotrainer": _autotrainer,
        "sagemaker": _sagemaker,
        "deepchecker": _deepchecker,
        "deepdiagnosis": _deepdiagnosis,
        "torchlens": _torchlens,
        "torchmortem": _torchmortem,
        "nansense": _nansense,
        "olmo": _olmo,
    }
)
"""Name of a published rule set -> what it finds in a trace, in the order in which its rules are listed."""
