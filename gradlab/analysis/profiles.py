"""From recorded tables to tidy profiles over depth: one row a place in the net, ready for a fit or a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradlab.errors import DataError, unknown

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

__all__ = [
    "batchnorm_gains",
    "block_gradients",
    "end_ratios",
    "final_losses",
    "layer_responses",
    "path_gradients",
    "record_window",
]


def record_window(frame: pd.DataFrame, which: str) -> pd.DataFrame:
    """Return the rows of each cell's first or last recorded step.

    Args:
        frame: A table of a run, with columns step and cell.
        which: "first" or "last".

    Raises:
        DataError: The frame is empty: no cell recorded this.
    """
    if which not in ("first", "last"):
        raise unknown("recorded step", which, ("first", "last"))
    if frame.empty:
        raise DataError("No finished cell recorded what this needs.")
    steps = frame.groupby("cell")["step"].transform("min" if which == "first" else "max")
    return frame[frame["step"] == steps]


def block_gradients(layers: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Return the gradient norm at the output of the stem and of every block, from input to output.

    Args:
        layers: Rows of `trace.layers` of one recorded step for each combination of `by`; blocks end in a module
            called "activation", the stem in "stem.relu".
        by: Columns that tell the nets apart (net, depth, seed).

    Returns:
        Columns `by`, layer, block (0 is the stem), grad_norm, and log10_ratio: log10 of grad_norm over that at the
        last block.
    """
    places = (
        layers[layers["layer"].str.fullmatch(r"stem\.relu|stages\.\d+\.\d+\.activation")] if len(layers) else layers
    )
    if places.empty:
        raise DataError("No finished cell recorded the outputs of blocks.")
    places = places.sort_values([*by, "order"])
    groups = places.groupby(list(by), sort=False)
    last = groups["grad_norm"].transform(lambda norms: norms.iloc[-1])  # pandas' "last" would pass over a NaN
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log10(places["grad_norm"] / last)
    tidy = places.assign(block=groups.cumcount(), log10_ratio=ratio)
    return tidy[[*by, "layer", "block", "grad_norm", "log10_ratio"]].reset_index(drop=True)


def end_ratios(profile: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Return log10 of the gradient norm at the first block over that at the last, for each net.

    Args:
        profile: As `block_gradients` returns it.
        by: Columns that tell the nets apart.

    Returns:
        Columns `by` and log10_ratio.
    """
    if profile.empty:
        raise DataError("No finished cell recorded the outputs of blocks.")
    first = profile[profile["block"] == 1]
    return first[[*by, "log10_ratio"]].reset_index(drop=True)


def final_losses(losses: pd.DataFrame, by: Sequence[str], window: int) -> pd.DataFrame:
    """Return each training run's mean loss over its last `window` steps; Inf for a run that diverged.

    Args:
        losses: A run's table "losses": step, loss, status and the columns of `by`.
        by: Columns that tell the runs apart.
        window: Steps.
    """
    if losses.empty:
        raise DataError("No finished cell trained a net.")
    last = losses.groupby(list(by))["step"].transform("max")
    kept = losses[losses["step"] > last - window]
    out: pd.DataFrame = kept.groupby([*by, "status"])["loss"].mean().reset_index()
    out.loc[out["status"] == "diverged", "loss"] = np.inf
    return out.drop(columns="status")


def layer_responses(layers: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Return the standard deviation of each normalized response, before the ReLU or the sum (He et al. 2015, Fig. 7).

    Args:
        layers: Rows of `trace.layers` of one recorded step for each combination of `by`.
        by: Columns that tell the nets apart.

    Returns:
        Columns `by`, layer, place (1 is nearest the input), second (the layer ends its block's branch), std.
    """
    norms = layers[layers["kind"].str.startswith("BatchNorm")] if len(layers) else layers
    if norms.empty:
        raise DataError("No finished cell recorded a net with BatchNorm.")
    norms = norms.sort_values([*by, "order"])
    place = norms.groupby(list(by), sort=False).cumcount() + 1
    second = norms["layer"].str.endswith(".norm2")
    tidy = norms.assign(place=place, second=second, std=norms["act_std"])
    return tidy[[*by, "layer", "place", "second", "std"]].reset_index(drop=True)


def path_gradients(layers: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Return how much of the gradient reaches each residual block's input through the skip and through the branch.

    The gradient at a block's input is the sum of what the skip and what the branch pass back; the two are recorded at
    the forks `to_skip` and `to_branch`, the sum at the output of the module before the block.

    Args:
        layers: Rows of `trace.layers` of one recorded step for each combination of `by`.
        by: Columns that tell the nets apart.

    Returns:
        Columns `by`, block (1 is nearest the input), skip and branch (norms over the norm of the sum), and
        branch_share: branch^2 / (skip^2 + branch^2), the branch's share of the squared gradient if the two are
        orthogonal.
    """
    if layers.empty or not layers["layer"].str.endswith(".to_skip").any():
        raise DataError("No finished cell recorded a residual net.")
    kept = layers[layers["layer"].str.contains(r"\.to_skip$|\.to_branch$|^stem\.relu$|\.\d+\.activation$")].copy()
    kept["block_name"] = kept["layer"].str.extract(r"^(stages\.\d+\.\d+)\.to_", expand=False)
    kept = kept.sort_values([*by, "order"])
    # A fork reads what the last end before it put out. Counted, not filled forward, which would pass over a NaN norm.
    kept["place"] = kept["block_name"].isna().groupby([kept[column] for column in by]).cumsum()
    kept["total"] = kept.groupby([*by, "place"])["grad_norm"].transform(lambda norms: norms.iloc[0])
    paths = kept.dropna(subset=["block_name"])
    keys = [*by, "block_name"]
    forks = {path: paths[paths["layer"].str.endswith(f".to_{path}")] for path in ("skip", "branch")}
    # Merged, not pivoted: a pivot orders blocks as text (stages.0.10 before stages.0.2) and drops those with NaN.
    branch = forks["branch"][[*keys, "order", "total", "grad_norm"]].rename(columns={"grad_norm": "branch"})
    wide = branch.merge(forks["skip"][[*keys, "grad_norm"]].rename(columns={"grad_norm": "skip"}), on=keys)
    wide = wide.sort_values([*by, "order"])
    wide["block"] = wide.groupby(list(by), sort=False).cumcount() + 1
    with np.errstate(divide="ignore", invalid="ignore"):
        wide["branch_share"] = 1.0 / (1.0 + (wide["skip"] / wide["branch"]) ** 2)  # squares of tiny norms underflow
        wide["skip"], wide["branch"] = wide["skip"] / wide["total"], wide["branch"] / wide["total"]
    return wide[[*by, "block", "skip", "branch", "branch_share"]].reset_index(drop=True)


def batchnorm_gains(batchnorm: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Return the factor by which each BatchNorm layer multiplies the gradient norm on the way back.

    Args:
        batchnorm: Rows of `trace.batchnorm`, in order of execution, of one recorded step for each combination of `by`.
        by: Columns that tell the nets apart.

    Returns:
        Columns `by`, layer, place (1 is nearest the input) and grad_gain.
    """
    if batchnorm.empty:
        raise DataError("No finished cell recorded a net with BatchNorm.")
    place = batchnorm.groupby(list(by), sort=False).cumcount() + 1
    return batchnorm.assign(place=place)[[*by, "layer", "place", "grad_gain"]].reset_index(drop=True)
