"""From recorded gradients of nets made of pieces to what claims and figures need: places, slopes, ratios."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gradlab.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["depth_slopes", "dropout_gains", "head_ratios", "log_ratios", "piece_gradients"]

#: Pieces that hold no weights: no places on the way through a net.
_WEIGHTLESS = ("MaxPool2d", "AvgPool2d", "Flatten", "Dropout", "LocalResponseNorm")
_KEYS = ("family", "norm", "activation", "init", "dropout", "seed")
_START = "trunk.stem"
_FIRST_WEIGHT = "trunk.conv2.conv.weight"  # of the small GoogLeNet


def piece_gradients(layers: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Return the gradient norm at the output of every piece of a trunk that has weights, from input to output.

    Args:
        layers: Rows of `trace.layers` of one recorded step for each combination of `by`.
        by: Columns that tell the nets apart.

    Returns:
        Columns `by`, layer, place (1 is nearest the input), grad_norm, and log10_ratio: log10 of grad_norm over that
        at the last place.

    Raises:
        DataError: The frame holds no piece.
    """
    pieces = layers[layers["layer"].str.fullmatch(r"trunk\.[^.]+")] if len(layers) else layers
    if pieces.empty:
        raise DataError("No finished cell recorded the pieces of a net.")
    pieces = pieces[~pieces["kind"].isin(_WEIGHTLESS)].sort_values([*by, "order"])
    groups = pieces.groupby(list(by), sort=False)
    last = groups["grad_norm"].transform(lambda norms: norms.iloc[-1])  # pandas' "last" would pass over a NaN
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log10(pieces["grad_norm"] / last)
    tidy = pieces.assign(place=groups.cumcount() + 1, log10_ratio=ratio)
    return tidy[[*by, "layer", "place", "grad_norm", "log10_ratio"]].reset_index(drop=True)


def log_ratios(layers: pd.DataFrame) -> pd.DataFrame:
    """Return log10 of the gradient norm at the first piece over that at the last, for each small net.

    Args:
        layers: Rows of `trace.layers` at initialization, with the columns family, norm, activation, init, dropout
            and seed.

    Returns:
        These columns and log10_ratio.
    """
    places = piece_gradients(layers, _KEYS)
    return places.loc[places["place"] == 1, [*_KEYS, "log10_ratio"]].reset_index(drop=True)


def depth_slopes(layers: pd.DataFrame) -> pd.DataFrame:
    """Return how ln of the gradient norm at h_0 changes with the depth of a stack: the least-squares slope.

    Args:
        layers: Rows of `trace.layers` with columns growth, norm, seed and depth.

    Returns:
        Columns growth, norm, seed and slope (ln a layer; NaN for fewer than two depths or a norm that is not above 0).
    """
    start = layers[layers["layer"] == _START]
    rows = []
    for key, group in start.groupby(["growth", "norm", "seed"], sort=False):
        with np.errstate(divide="ignore"):
            logs = np.log(group["grad_norm"].to_numpy(dtype=np.float64))
        depth = group["depth"].to_numpy(dtype=np.float64)
        known = np.isfinite(logs).all() and len(np.unique(depth)) > 1
        centred = depth - depth.mean()
        slope = float(centred @ logs / (centred @ centred)) if known else np.nan
        rows.append((*key, slope))
    return pd.DataFrame(rows, columns=["growth", "norm", "seed", "slope"])


def head_ratios(params: pd.DataFrame) -> pd.DataFrame:
    """Return the gradient norm of GoogLeNet's first convolution with auxiliary losses over that without.

    Args:
        params: Rows of `trace.params` with columns norm, init, heads and seed.

    Returns:
        Columns norm, init, seed and ratio.
    """
    keys = ["norm", "init", "seed"]
    own = params[params["param"] == _FIRST_WEIGHT]
    sides = [own[own["heads"] == heads][[*keys, "grad_norm"]] for heads in (True, False)]
    both = sides[0].merge(sides[1], on=keys, suffixes=("_with", "_without"))
    both["ratio"] = both["grad_norm_with"] / both["grad_norm_without"]
    return both[[*keys, "ratio"]]


def dropout_gains(layers: pd.DataFrame) -> pd.DataFrame:
    """Return the factor on the squared gradient norm across each dropout layer, on the way back.

    Args:
        layers: As `log_ratios` takes them; only nets with dropout count.

    Returns:
        Columns dropout, seed, layer and gain: ||dL/d input||^2 / ||dL/d output||^2. The input is the output of the
        piece before.
    """
    own = layers[layers["dropout"] > 0].sort_values([*_KEYS, "order"])
    before = own.groupby(list(_KEYS), sort=False)["grad_norm"].shift(1)
    own = own.assign(gain=(before / own["grad_norm"]) ** 2)
    return own.loc[own["kind"] == "Dropout", ["dropout", "seed", "layer", "gain"]].reset_index(drop=True)
