"""The claims about the gradient cliff and clipping: C5.3."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gradlab.analysis.claims import About, Claim, Verdict, decide_threshold, not_decided

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SOLVED", "cliff_claims", "ends"]

#: A descent succeeded if it ends at a loss below this.
SOLVED = 1e-3
_SOURCE = "Pascanu et al. 2013, arXiv 1211.5063, sec. 2.3 and 3.2; the map and its constants are this project's"
_ALPHA = 0.05


def ends(descent: pd.DataFrame) -> pd.DataFrame:
    """Return, for each clipping threshold and start, the last loss, its longest update and whether it succeeded.

    Args:
        descent: Columns clip, start, update, loss, step_length.

    Returns:
        Columns clip, start, loss, longest, solved.
    """
    ordered = descent.sort_values("update").groupby(["clip", "start"], as_index=False)
    out = ordered.agg(loss=("loss", "last"), longest=("step_length", "max"))
    return out.assign(solved=out["loss"] < SOLVED)


def cliff_claims(surface: pd.DataFrame, descent: pd.DataFrame) -> list[Claim]:
    """Decide whether there is a cliff, what a step there does, and whether clipping helps.

    Args:
        surface: Columns loss and grad_norm on a grid; empty where not measured.
        descent: Columns clip (0: none), start, update, loss, step_length; empty where not measured.
    """
    outcome = ends(descent) if len(descent) else None
    clips = sorted(outcome["clip"].unique()) if outcome is not None else []
    large = max([clip for clip in clips if clip > 0], default=math.nan)
    small = min([clip for clip in clips if 0 < clip < large], default=math.nan)
    return [
        _cliff(surface),
        _longest(outcome, large),
        _compare(
            outcome, large, 0.0, "C5.3 clip",
            f"Clipped at {large:g}, gradient descent from the cliff ends at a loss below {SOLVED:g} more often than "
            "without clipping.",
        ),
        _compare(
            outcome, large, small, "C5.3 slow",
            f"Clipping can be too tight: at {small:g} fewer starts succeed in the same number of updates than at "
            f"{large:g}.",
        ),
    ]  # fmt: skip


def _cliff(surface: pd.DataFrame) -> Claim:
    about = About(
        id="C5.3 cliff", source=_SOURCE, unit="largest over median gradient norm",
        statement="The loss surface of a recurrent net has cliffs: somewhere the gradient is a thousand times the "
        "median one.",
    )  # fmt: skip
    if surface.empty:
        return not_decided("No finished cell measured the surface.", **about)
    norms = surface["grad_norm"]
    about["detail"] = f"Median {norms.median():.3g}, 99 % {norms.quantile(0.99):.3g}, largest {norms.max():.3g}."
    ratio = norms.max() / norms.median()
    return decide_threshold([ratio], threshold=1e3, direction=">", min_samples=1, **about)


def _longest(outcome: pd.DataFrame | None, clip: float) -> Claim:
    about = About(
        id="C5.3 step", source=_SOURCE, unit="longest update without over with clipping",
        statement="Without clipping one update from the cliff throws the weights far: more than a hundred times the "
        "longest clipped one.",
    )  # fmt: skip
    free, held = _rows(outcome, 0.0, "longest"), _rows(outcome, clip, "longest")
    if not len(free) or not len(held):
        return not_decided("Needs descents with and without clipping.", **about)
    about["detail"] = f"Longest update {free.max():.3g} without and {held.max():.3g} with clipping at {clip:g}."
    return decide_threshold([free.max() / held.max()], threshold=100, direction=">", min_samples=1, **about)


def _compare(outcome: pd.DataFrame | None, better: float, worse: float, name: str, statement: str) -> Claim:
    """Compare two shares of successes by Fisher's exact test."""
    first, second = _rows(outcome, better, "solved"), _rows(outcome, worse, "solved")
    if not len(first) or not len(second) or better == worse:
        return not_decided(
            "Needs descents at these two thresholds.", id=name, statement=statement, source=_SOURCE, unit="of starts"
        )
    from scipy.stats import fisher_exact

    counts = [[int(group.sum()), len(group) - int(group.sum())] for group in (first, second)]
    p_value, other = (float(fisher_exact(np.array(counts), alternative=side).pvalue) for side in ("greater", "less"))
    verdict = Verdict.NOT_DECIDED
    if p_value < _ALPHA:
        verdict = Verdict.REPRODUCED
    elif other < _ALPHA:
        verdict = Verdict.NOT_REPRODUCED
    return Claim(
        id=name, statement=statement, source=_SOURCE,
        rule=f"(S) Reproduced if Fisher's exact test, one-sided, gives p < {_ALPHA} for more successes, and not "
        "reproduced if it does for fewer.",
        expected="> 0",
        measured=float(np.mean(first) - np.mean(second)),
        low=math.nan, high=math.nan, unit="of starts more", p_value=p_value,
        n=min(len(first), len(second)), verdict=verdict,
        detail=f"{counts[0][0]} of {len(first)} against {counts[1][0]} of {len(second)}.",
    )  # fmt: skip


def _rows(outcome: pd.DataFrame | None, clip: float, column: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    if outcome is None:
        return np.empty(0)
    return outcome.loc[outcome["clip"] == clip, column].to_numpy(dtype=np.float64)
