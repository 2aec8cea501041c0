"""What each label claims about a run, in numbers with a margin: cases of the grey zones between have no place here."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from itertools import pairwise

from gradlab.benchmarks.diagnosis.case import Case
from gradlab.benchmarks.diagnosis.reference import Measured

__all__ = ["contradictions", "named_by"]

_SICK_RATIO, _HEALTHY_RATIO = 1e4, 1e2
_SICK_SHARE, _HEALTHY_SHARE = 0.8, 0.5
_GROWTH = 1e3


def named_by(patterns: Iterable[str], names: Iterable[str]) -> bool:
    """Return whether any of the names, or a module around or a parameter in it, is meant by any of the patterns.

    Example:
        >>> named_by(["linear3*"], ["linear3.weight"]), named_by(["encoder*"], ["head"])
        (True, False)
    """
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, f"{p}.*") for name in names for p in patterns)


def contradictions(case: Case, measured: Measured) -> tuple[str, ...]:
    """Return what of a measurement speaks against the case's label, one sentence each; nothing if it holds."""
    found = []
    for claim, holds in (_CLAIMS[case.label, case.axis](case, measured)).items():
        if not holds:
            found.append(f"not {claim}")
    return tuple(found)


def _ratios(values: tuple[float, ...]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _even(values: tuple[float, ...]) -> bool:
    """Return whether the median of the ratios is that of a healthy net, and none that of a sick one."""
    known = sorted(_ratios(values))
    if not known:
        return True
    middle = known[len(known) // 2]
    return 1 / _HEALTHY_RATIO < middle < _HEALTHY_RATIO and known[0] > 1 / _SICK_RATIO and known[-1] < _SICK_RATIO


def _healthy(case: Case, m: Measured) -> dict[str, bool]:
    hidden = [share for name, share in m.flat.items() if name not in case.bounded_ends]
    half = len(m.losses) // 2
    return {
        "even through depth": _even(m.depth),
        "even through time": _even(m.time),
        "alive": max(m.dead.values(), default=0.0) < _HEALTHY_SHARE,
        "steep": max(hidden, default=0.0) < _HEALTHY_SHARE,
        "finite but for what a scaler skips at first": all(step < half for step in m.bad_steps),
        "learning everywhere": not m.without_grad and not m.unchanged,
        "steady": _steady(m),
    }


def _steady(m: Measured) -> bool:
    return abs(m.losses[-1]) < 3 * abs(m.losses[0]) and m.weights[-1] < 3 * m.weights[0]


def _vanishing(case: Case, m: Measured) -> dict[str, bool]:
    ratios = _ratios(m.time if case.axis == "time" else m.depth)
    other = m.depth if case.axis == "time" else m.time
    return {
        "vanishing in every step": bool(ratios) and max(ratios) < 1 / _SICK_RATIO,
        "even along the other axis": _even(other),
        **_nothing_else(m),
    }


def _exploding(case: Case, m: Measured) -> dict[str, bool]:
    ratios = _ratios(m.time if case.axis == "time" else m.depth)
    other = m.depth if case.axis == "time" else m.time
    return {
        "exploding in every step": bool(ratios) and min(ratios) > _SICK_RATIO,
        "even along the other axis": _even(other),
        **_nothing_else(m),
    }


def _growing(_: Case, m: Measured) -> dict[str, bool]:
    late = [abs(loss) for loss in m.losses[len(m.losses) // 2 :]]
    return {
        "growing by a factor of a thousand": abs(m.losses[-1]) > _GROWTH * abs(m.losses[0]),
        "growing to the end": all(after > before for before, after in pairwise(late)),
        **_nothing_else(m),
    }


def _nothing_else(m: Measured) -> dict[str, bool]:
    return {
        "finite": not m.bad_steps,
        "alive": max(m.dead_late.values(), default=0.0) < _SICK_SHARE,
        "steep": max(m.flat.values(), default=0.0) < _HEALTHY_SHARE,
        "trained": not m.without_grad,
    }


def _dead(case: Case, m: Measured) -> dict[str, bool]:
    there = {name: share for name, share in m.dead_late.items() if named_by(case.places, [name])}
    return {"dead": max(there.values(), default=0.0) >= _SICK_SHARE, "finite": not m.bad_steps}


def _saturated(case: Case, m: Measured) -> dict[str, bool]:
    there = {name: share for name, share in m.flat.items() if named_by(case.places, [name])}
    return {
        "saturated": max(there.values(), default=0.0) >= _SICK_SHARE,
        "finite": not m.bad_steps,
        "alive": max(m.dead.values(), default=0.0) < _HEALTHY_SHARE,
        "no worse through depth": not m.depth or _even(m.depth),
    }


def _nonfinite(_: Case, m: Measured) -> dict[str, bool]:
    return {"NaN or Inf anywhere": bool(m.bad_steps)}


def _frozen(case: Case, m: Measured) -> dict[str, bool]:
    still = {*m.without_grad, *m.unchanged}
    rest = _healthy(case, m)
    rest.pop("learning everywhere")
    return {"frozen where it says": bool(still) and (not case.places or named_by(case.places, still)), **rest}


_CLAIMS = {
    ("healthy", ""): _healthy,
    ("vanishing", "depth"): _vanishing,
    ("vanishing", "time"): _vanishing,
    ("exploding", "depth"): _exploding,
    ("exploding", "time"): _exploding,
    ("exploding", "training"): _growing,
    ("dead", ""): _dead,
    ("saturated", ""): _saturated,
    ("nonfinite", ""): _nonfinite,
    ("frozen", ""): _frozen,
}
