"""What published rules of diagnosis look at, read or estimated from a trace.

Published rules take means of absolute values and shares of entries, of which a trace keeps norms, means and standard
deviations. Each function says what stands in for what; all of them are exact for Gaussian entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.special import ndtr

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from gradlab.trace import Trace

__all__ = [
    "MEAN_ABS",
    "RECTIFIERS",
    "Matrix",
    "activations",
    "execution_order",
    "input_beyond",
    "kernels",
    "largest_number",
    "mean_abs",
    "unit_shares",
    "update_ratio",
    "zero_gradient_share",
]

MEAN_ABS: Final = math.sqrt(2 / math.pi)
"""Mean absolute entry over root mean square of Gaussian entries."""
RECTIFIERS: Final = ("ReLU", "ReLU6")
_LIMITS: Final = {  # smallest normal and largest number
    "float16": (6.103515625e-05, 65504.0),
    "bfloat16": (1.1754943508e-38, 3.3895313892e38),
    "float32": (1.1754943508e-38, 3.4028234663e38),
    "float64": (2.2250738585e-308, 1.7976931348e308),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """A number for each recorded step and name.

    Args:
        steps: Training steps, shape (s,).
        names: Layers or parameters, from input to output.
        values: Shape (s, n); NaN where there is none.
    """

    steps: NDArray[np.int64]
    names: tuple[str, ...]
    values: NDArray[np.float64]


def execution_order(trace: Trace) -> dict[str, int]:
    """Return the place of each layer in the order of execution, by its first call in the first step it ran in."""
    rows = trace.layers
    if rows.empty:
        return {}
    first = rows.sort_values(["step", "order"], kind="stable").drop_duplicates("layer")
    return {str(layer): int(order) for layer, order in zip(first["layer"], first["order"], strict=True)}


def kernels(trace: Trace, column: str = "grad_norm") -> Matrix:
    """Return a column of `trace.params` for every kernel, from input to output.

    A kernel is a parameter of two or more dimensions, as in the tools written for Keras; where shapes are unknown, one
    whose name holds no "bias". Layers that never ran stand last.
    """
    rows = trace.params
    shapes = {str(name): len(shape) for name, shape, *_ in trace.info.get("params", ())}
    place = execution_order(trace)
    owner = dict(zip(rows["param"], rows["layer"], strict=True))
    chosen = [name for name in owner if (shapes[name] >= 2 if name in shapes else "bias" not in name)]
    chosen.sort(key=lambda name: place.get(owner[name], len(place)))  # stable: else in the order of registration
    return _matrix(rows, "param", chosen, rows[column])


def mean_abs(trace: Trace) -> Matrix:
    """Return the mean absolute gradient of every kernel: RMS * sqrt(2/pi), which is exact for Gaussian entries."""
    norms = kernels(trace)
    sizes = dict(zip(trace.params["param"], trace.params["entries"], strict=True))
    roots = np.array([math.sqrt(max(sizes[name], 1)) for name in norms.names])
    return Matrix(steps=norms.steps, names=norms.names, values=MEAN_ABS * norms.values / roots)


def update_ratio(trace: Trace) -> Matrix:
    """Return |update| / |weight| of every kernel, as norms; NaN where the optimizer does not hold it or weights are 0.

    It equals the ratio of the means of absolute values if both are Gaussian.
    """
    updates, weights = kernels(trace, "update_norm"), kernels(trace, "weight_norm")
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(weights.values > 0, updates.values / weights.values, math.nan)
    return Matrix(steps=updates.steps, names=updates.names, values=ratio)


def activations(trace: Trace, kinds: tuple[str, ...], column: str) -> Matrix:
    """Return a column of `trace.layers` for the first call of every layer of some kinds, in order of execution."""
    rows = trace.layers
    rows = rows[rows["kind"].isin(kinds) & (rows["call"] == 0)].drop_duplicates(["step", "layer"])
    place = execution_order(trace)
    names = sorted(set(map(str, rows["layer"])), key=lambda name: place[name])
    return _matrix(rows, "layer", names, rows[column])


def input_beyond(trace: Trace, bounds: dict[str, float]) -> Matrix:
    """Return the share of inputs beyond +-bound of every layer of some kinds (kind -> bound).

    The input of an activation is taken to be the output of the layer that ran just before, and its entries to be
    Gaussian with the recorded mean and standard deviation.
    """
    rows = trace.layers.sort_values(["step", "order"], kind="stable")
    before = rows[["act_mean", "act_std", "step"]].shift(1)
    own = rows["kind"].isin(list(bounds)) & (rows["call"] == 0) & (before["step"] == rows["step"])
    kept = rows[own]
    limit = kept["kind"].map(bounds).to_numpy(np.float64)
    mean, std = (before.loc[own, name].to_numpy(np.float64) for name in ("act_mean", "act_std"))
    std = np.maximum(std, 1e-300)
    with np.errstate(invalid="ignore", over="ignore"):
        share = ndtr((-limit - mean) / std) + ndtr((mean - limit) / std)
    names = list(dict.fromkeys(map(str, kept["layer"])))
    return _matrix(kept, "layer", names, share)


def unit_shares(trace: Trace, column: str) -> dict[str, float]:
    """Return a share of units by layer: "dead_fraction" or "saturated_fraction", over the whole recorded window."""
    rows = trace.units[trace.units[column].notna()]
    return {str(layer): float(share) for layer, share in zip(rows["layer"], rows[column], strict=True)}


def zero_gradient_share(trace: Trace) -> Matrix:
    """Return, for each step, the share of all parameters' gradient entries that are exactly 0, as one column.

    A gradient whose norm is 0 counts whole. Of others the entries into dead units are 0: that share is the
    `dead_fraction` of the rectifier that runs next, before another layer with parameters; it is known over the whole
    window only, so that units which a single batch leaves off are missed.
    """
    rows = trace.params[trace.params["grad_norm"].notna()]
    place = execution_order(trace)
    dead, owners = unit_shares(trace, "dead_fraction"), set(map(str, trace.params["layer"]))
    in_order = sorted(place, key=lambda name: place[name])
    after: dict[str, float] = {}
    for number, name in enumerate(in_order):
        for later in in_order[number + 1 :]:
            if later in dead:
                after[name] = dead[later]
            if later in dead or later in owners:
                break
    entries = rows["entries"].to_numpy(np.float64)
    share = np.where(rows["grad_norm"] == 0, 1.0, rows["layer"].map(after).fillna(0.0)) * entries
    steps = np.unique(rows["step"].to_numpy())
    which = np.searchsorted(steps, rows["step"].to_numpy())
    total = np.bincount(which, entries, len(steps))
    values = np.bincount(which, share, len(steps)) / np.where(total > 0, total, math.nan)
    return Matrix(steps=steps, names=("",), values=values[:, None])


def largest_number(trace: Trace) -> tuple[float, float]:
    """Return the smallest normal and the largest number of the narrowest type among the parameters; float32's if none.

    Activations may have another type (under AMP, say), which a trace does not keep.
    """
    kinds = {str(kind) for _, _, *rest in trace.info.get("params", ()) for kind in rest}
    known = [_LIMITS[kind] for kind in kinds if kind in _LIMITS] or [_LIMITS["float32"]]
    return min(known, key=lambda limits: limits[1])


def _matrix(rows: pd.DataFrame, key: str, names: list[str], column: object) -> Matrix:
    steps = np.unique(rows["step"].to_numpy()).astype(np.int64)
    number = {name: place for place, name in enumerate(names)}
    which = rows[key].map(number).to_numpy(np.float64)
    keep = ~np.isnan(which)
    values = np.full((len(steps), len(names)), math.nan)
    at = np.searchsorted(steps, rows["step"].to_numpy()[keep])
    values[at, which[keep].astype(np.int64)] = np.asarray(column, dtype=np.float64)[keep]
    return Matrix(steps=steps, names=tuple(names), values=values)
