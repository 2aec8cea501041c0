"""Findings about gradients and signals that shrink or grow: through depth, through time, and over training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gradlab.analysis.finding import Evidence, Finding
from gradlab.analysis.remedies import depth_remedy, time_remedy, training_remedy
from gradlab.analysis.trace_views import Profile, Trend, depth_profile, time_profiles, trend

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gradlab.analysis.finding import Kind
    from gradlab.trace import Trace

__all__ = ["depth_findings", "growth_findings", "time_findings"]

DECADES = 3.0  # by which a norm must change from end to end: the early part then learns a thousand times slower
ENDS = 2.5  # decades between the medians of the first and last tenth of places: no single odd layer decides
SIGNAL_DECADES = 4.0  # by which the size of activations must grow
FEWEST_LAYERS = 4
FEWEST_TIMES = 8
GROWTH = 3.0  # decades by which the gradient grows over training
GROWTH_WITH_ALL = 2.0  # the same where weights and loss grow tenfold too
WORST = 12.0  # decades at which severity is 1


def depth_findings(trace: Trace, steps: NDArray[np.int64]) -> list[Finding]:
    """Find gradients that shrink or grow layer after layer, and signals that grow."""
    profile = depth_profile(trace, steps)
    found = None
    if profile is not None and len(profile.x) >= FEWEST_LAYERS:
        found = _along_depth(trace, profile, profile.y, profile.steps)
        if found is None:  # an initialization that training may have mended since, if it was far off
            found = _along_depth(trace, profile, profile.first, (profile.steps[0],) * 2, times=1.5)
    if found is None:
        found = _signal(trace, steps)
    return [] if found is None else [found]


def _direction(change: Trend, decades: float, ends: float) -> Kind | None:
    """Return what a change from the first place to the last is, seen from the loss back."""
    if change.low > 0 and change.decades >= decades and change.ends >= ends:
        return "vanishing"
    if change.high < 0 and change.decades <= -decades and change.ends <= -ends:
        return "exploding"
    return None


def _along_depth(
    trace: Trace, profile: Profile, y: NDArray[np.float64], steps: tuple[int, int], *, times: float = 1.0
) -> Finding | None:
    change = trend(profile.x, y)
    kind = _direction(change, DECADES * times, ENDS * times)
    gone = change.zeros if change.points else 0.0
    if kind is None and not (0.25 <= gone < 1 and change.points):
        return None
    lost = y <= (np.median(y[np.isfinite(y)][-3:]) - DECADES)
    if kind == "exploding":
        lost = y >= (np.median(y[np.isfinite(y)][-3:]) + DECADES)
    cause, advice, source = depth_remedy(trace, kind or "vanishing")
    evidence = []
    if kind is not None:
        evidence = [
            Evidence(
                what="log10 of the gradient norm, slope over layers toward the loss", value=change.slope,
                low=change.low, high=change.high, unit="decades a layer", threshold="interval without 0",
            ),
            Evidence(
                what=f"over {change.points} layers that is", value=change.decades, unit="decades",
                threshold=f"beyond {DECADES * times:g}",
            ),
            Evidence(what="gradient norm at the first layers over the last", value=_power(-change.ends)),
        ]  # fmt: skip
    else:
        evidence = [Evidence(what="share of layers, from the input, whose gradient is exactly 0", value=gone)]
    return Finding(
        kind=kind or "vanishing",
        axis="depth",
        layers=tuple(name for name, out in zip(profile.places, lost, strict=True) if out),
        steps=steps,
        severity=_severity(abs(change.decades), DECADES) if kind else 1.0,
        evidence=tuple(evidence),
        cause=cause,
        advice=advice,
        source=source,
    )


def _power(decades: float) -> float:
    return 10.0**decades if abs(decades) < 300 else math.inf if decades > 0 else 0.0


def _severity(size: float, bound: float) -> float:
    return float(np.clip((size - bound) / (WORST - bound), 0.0, 1.0)) if math.isfinite(size) else 1.0


def _signal(trace: Trace, steps: NDArray[np.int64]) -> Finding | None:
    profile = depth_profile(trace, steps, "act_norm", rms=True)
    if profile is None or len(profile.x) < FEWEST_LAYERS:
        return None
    change = trend(profile.x, profile.y)
    if not (change.low > 0 and change.decades >= SIGNAL_DECADES and change.ends >= SIGNAL_DECADES):
        return None
    cause, advice, source = depth_remedy(trace, "exploding")
    return Finding(
        kind="exploding",
        axis="depth",
        layers=profile.places,
        steps=profile.steps,
        severity=_severity(change.decades, SIGNAL_DECADES),
        evidence=(
            Evidence(
                what="log10 of the activations' RMS, slope over layers", value=change.slope, low=change.low,
                high=change.high, unit="decades a layer", threshold="interval without 0",
            ),
            Evidence(
                what=f"over {change.points} layers that is", value=change.decades, unit="decades",
                threshold=f">= {SIGNAL_DECADES:g}",
            ),
        ),
        cause=cause, advice=advice, source=source,
    )  # fmt: skip


# -- time -------------------------------------------------------------------------------------------------------------


def time_findings(trace: Trace, steps: NDArray[np.int64]) -> list[Finding]:
    """Find gradients that shrink or grow step after step back in time, one finding a recurrent layer."""
    by_layer: dict[str, list[tuple[Profile, Trend]]] = {}
    for profile in time_profiles(trace, steps):
        if len(profile.x) >= FEWEST_TIMES:
            y = profile.y[::-1] if profile.backward else profile.y  # a backward sweep ends at the first time step
            by_layer.setdefault(profile.layer, []).append((profile, trend(profile.x, y)))
    found = (_along_time(trace, own) for own in by_layer.values())
    return [finding for finding in found if finding is not None]


def _along_time(trace: Trace, states: list[tuple[Profile, Trend]]) -> Finding | None:
    kinds = [_direction(change, DECADES, ENDS) for _, change in states]
    gone = [change.points >= 3 and change.zeros >= 0.25 for _, change in states]
    if "exploding" in kinds:
        kind: Kind = "exploding"
        profile, change = min(states, key=lambda item: np.nan_to_num(item[1].decades))
    elif all(kind == "vanishing" or zero for kind, zero in zip(kinds, gone, strict=True)):
        kind = "vanishing"  # as long as one state carries the gradient, it does not vanish
        profile, change = min(states, key=lambda item: np.nan_to_num(item[1].decades, nan=math.inf))
    else:
        return None
    cause, advice, source = time_remedy(trace, kind, profile.kind)
    half = math.log10(2) / abs(change.slope) if change.slope else math.inf
    word = "doubles" if kind == "exploding" else "halves"
    ends = (math.log10(2) / abs(end) if end else math.inf for end in (change.high, change.low))
    low, high = sorted(ends)
    return Finding(
        kind=kind,
        axis="time",
        layers=(profile.layer,),
        steps=profile.steps,
        timesteps=_lost_times(profile, kind),
        severity=_severity(abs(change.decades), DECADES),
        evidence=(
            Evidence(
                what=f"the gradient norm {word} every", value=half, low=low, high=high, unit="time steps back"
            ),
            Evidence(
                what=f"from the last of {len(profile.x)} time steps to the first it changes by", value=-change.decades,
                unit="decades", threshold=f"beyond {DECADES:g}",
            ),
            Evidence(what="gradient norm at the first time step over the last", value=_power(-change.ends)),
        ),
        cause=cause, advice=advice, source=source,
    )  # fmt: skip


def _lost_times(profile: Profile, kind: Kind) -> tuple[int, int]:
    """Return the time steps whose gradient is a thousand times off that at the loss's end."""
    y = profile.y[::-1] if profile.backward else profile.y
    near = np.median(y[np.isfinite(y)][-3:])
    lost = profile.x[y >= near + DECADES] if kind == "exploding" else profile.x[y <= near - DECADES]
    if not len(lost):
        lost = profile.x[:1]
    first, last = int(lost[0]), int(lost[-1])
    if profile.backward:
        end = int(profile.x[-1] + profile.x[0])
        first, last = end - last, end - first
    return first, last


# -- training ---------------------------------------------------------------------------------------------------------


def growth_findings(trace: Trace, steps: NDArray[np.int64]) -> list[Finding]:
    """Find gradients that grow over training together with weights, signals or the loss: a run about to diverge."""
    rows = trace.steps[np.isin(trace.steps["step"].to_numpy(), steps)]
    if len(rows) < 5:
        return []
    gradient = _growth(rows["step"].to_numpy(), rows["grad_norm"].to_numpy())
    if not gradient >= GROWTH_WITH_ALL:
        return []
    loss = _growth(rows["step"].to_numpy(), np.abs(rows["loss"].to_numpy()))
    weights = _summed_growth(trace, "params", "weight_norm", steps)
    signal = _last_signal_growth(trace, steps)
    # A gradient alone, or weights and signal with it, grow as a net leaves a plateau; the loss then falls.
    if not (gradient >= GROWTH and (loss >= 1 or weights >= 1 or signal >= 2)) and not (loss >= 1 and weights >= 1):
        return []
    cause, advice, source = training_remedy(trace)
    evidence = [
        Evidence(what="the norm of all gradients grew by", value=gradient, unit="decades", threshold=f">= {GROWTH:g}"),
        Evidence(what="the loss by", value=loss, unit="decades"),
        Evidence(what="the norm of all weights by", value=weights, unit="decades"),
        Evidence(what="the last layer's output by", value=signal, unit="decades"),
    ]
    return [
        Finding(
            kind="exploding",
            axis="training",
            steps=(int(rows["step"].iloc[0]), int(rows["step"].iloc[-1])),
            severity=_severity(gradient, GROWTH_WITH_ALL),
            evidence=tuple(item for item in evidence if not math.isnan(item.value)),
            cause=cause,
            advice=advice,
            source=source,
        )
    ]


def _growth(step: NDArray[np.int64], values: NDArray[np.float64]) -> float:
    """Return log10 of the median over the last tenth of steps over that of the first; NaN if there is none."""
    values = values[np.argsort(step)]
    tenth = max(2, len(values) // 10)
    with np.errstate(divide="ignore", invalid="ignore"):
        first, last = (np.log10(np.median(part)) for part in (values[:tenth], values[-tenth:]))
        return float(last - first)


def _summed_growth(trace: Trace, table: str, column: str, steps: NDArray[np.int64]) -> float:
    rows = trace.tables[table]
    rows = rows[np.isin(rows["step"].to_numpy(), steps)]
    if rows.empty:
        return math.nan
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.sqrt(rows[column].pow(2).groupby(rows["step"]).sum())
    return _growth(total.index.to_numpy(), total.to_numpy())


def _last_signal_growth(trace: Trace, steps: NDArray[np.int64]) -> float:
    rows = trace.layers[np.isin(trace.layers["step"].to_numpy(), steps)]
    if rows.empty:
        return math.nan
    last = rows.loc[rows.groupby("step")["order"].idxmax()]
    return _growth(last["step"].to_numpy(), last["act_norm"].to_numpy())
