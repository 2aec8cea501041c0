"""From one row a seed to what is drawn: a mean, an interval, and how many seeds stand behind it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from gradlab.analysis.samples import mean_interval
from gradlab.errors import DataError

__all__ = ["FEWEST_FOR_STUDENT", "interval_note", "need", "seed_intervals"]

FEWEST_FOR_STUDENT = 3
"""With two seeds the 95 % Student interval is 9 standard deviations wide to either side: it would show nothing."""

_LARGEST_EXPONENT = 300.0  # 10**x must stay a float64


def need(frame: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    """Raise a DataError unless the frame has rows and these columns.

    Args:
        frame: A tidy frame.
        columns: That must be there.
        what: What the rows would be, for the message: "residual nets", say.
    """
    if frame.empty:
        raise DataError(f"The run holds no {what}: run the cells that measure them.")
    missing = [column for column in columns if column not in frame]
    if missing:
        raise DataError(f"The table of {what} lacks the columns {', '.join(missing)}: give a frame that has them.")


def seed_intervals(frame: pd.DataFrame, by: Sequence[str], value: str, *, log: bool) -> pd.DataFrame:
    """Return the mean over seeds and its interval, for each combination of `by`.

    The interval is Student's at 95 % over the seeds that have a value; the smallest and the largest value for fewer
    than three seeds. With `log` both are taken of log10 and carried back: a geometric mean.

    Args:
        frame: One row a seed and combination.
        by: Columns to group by; their order of appearance is kept.
        value: Column to average.
        log: Average the logarithm. Values that are not above 0 then count as lost.

    Returns:
        Columns `by`, mean, low, high (NaN where there is no interval), n (seeds averaged) and lost (seeds whose
        value is NaN, infinite or, with `log`, zero).

    Raises:
        DataError: An empty frame or one that lacks a column.

    Example:
        >>> frame = pd.DataFrame({"layer": [1, 1, 1], "norm": [1.0, 10.0, 100.0]})
        >>> seed_intervals(frame, ["layer"], "norm", log=True).round(2).to_dict("list")
        {'layer': [1], 'mean': [10.0], 'low': [0.03], 'high': [3048.86], 'n': [3], 'lost': [0]}
    """
    need(frame, [*by, value], "measurements")
    raw = frame[value].to_numpy(dtype=np.float64)
    kept = np.isfinite(raw) & ((raw > 0) | (not log))
    scaled = np.full(raw.shape, np.nan)
    scaled[kept] = np.log10(raw[kept]) if log else raw[kept]
    rows = []
    for key, group in pd.Series(scaled, index=frame.index).groupby([frame[name] for name in by], sort=False):
        samples = group.dropna().to_numpy()
        rows.append((*key, *_interval(samples), len(samples), len(group) - len(samples)))
    out = pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "n", "lost"])
    if log:
        for name in ("mean", "low", "high"):
            out[name] = 10.0 ** out[name].clip(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return out


def _interval(samples: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, float, float]:
    if len(samples) >= FEWEST_FOR_STUDENT:
        return mean_interval(samples)
    if len(samples) == 0:
        return np.nan, np.nan, np.nan
    low, high = (samples.min(), samples.max()) if len(samples) > 1 else (np.nan, np.nan)
    return float(samples.mean()), float(low), float(high)


def interval_note(data: pd.DataFrame, *, log: bool) -> str:
    """Return a sentence on what lines and bands are.

    Args:
        data: With a column n, as `seed_intervals` returns it.
        log: As given to `seed_intervals`.

    Example:
        >>> interval_note(pd.DataFrame({"n": [5, 5]}), log=False)
        'Lines are means and bands 95 % Student intervals over 5 seeds.'
    """
    counts = data["n"].dropna()
    counts = counts[counts > 0].astype(int)
    most, least = (int(counts.max()), int(counts.min())) if len(counts) else (0, 0)
    mean = "geometric means" if log else "means"
    if most <= 1:
        return "One seed: no interval."
    seeds = f"{most} seeds" if least == most else f"{least} to {most} seeds (those with a value)"
    if most < FEWEST_FOR_STUDENT:
        return f"Lines are {mean} and bands run from the smallest to the largest of {seeds}."
    on_log = ", taken of the logarithm" if log else ""
    few = ", smallest to largest where there are fewer than 3" if least < FEWEST_FOR_STUDENT else ""
    return f"Lines are {mean} and bands 95 % Student intervals over {seeds}{on_log}{few}."
