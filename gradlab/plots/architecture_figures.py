"""The figures of the experiment architectures: from a run's tables to figure, drawn numbers and caption."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from gradlab.analysis.family_profiles import log_ratios, piece_gradients
from gradlab.analysis.profiles import record_window
from gradlab.errors import DataError
from gradlab.plots import addition as stacks
from gradlab.plots import family_flow as flow
from gradlab.plots import family_sizes as sizes
from gradlab.plots.figure_set import Recipe, Tables, draw_by_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_architecture_figure"]


def draw_architecture_figure(name: str, tables: Tables) -> tuple[Figure, pd.DataFrame, str]:
    """Draw one figure of the experiment architectures.

    Args:
        name: Such as "family-flow".
        tables: Gives the run's tables.

    Returns:
        The figure, the frame it was drawn from, and its caption.

    Raises:
        UsageError: There is no such figure.
        DataError: The run lacks what it needs.
    """
    return draw_by_name(_DRAW, name, tables)


def _sizes(tables: Tables) -> pd.DataFrame:
    return sizes.family_sizes_data(tables("nets", "sizes"), tables("fields", "sizes"))


def _flow(tables: Tables) -> pd.DataFrame:
    layers = tables("layers", "train")
    if len(layers):
        kept = (layers["activation"] == "relu") & (layers["dropout"] == 0) & ~layers["heads"].astype(bool)
        layers = layers[kept & (layers["init"] != "default") & (layers["status"] == "done")]
    if layers.empty:
        raise DataError("No finished cell trained a net with ReLU without diverging.")
    frames = []
    for which, when in (("first", "at initialization"), ("last", "after training")):
        own = piece_gradients(record_window(layers, which), ["family", "norm", "seed"])
        frames.append(own.rename(columns={"family": "net"}).assign(when=when))
    large = tables("layers", "imagenet")
    if len(large):
        own = piece_gradients(large.assign(norm=_own_norm(large)), ["net", "norm", "seed"])
        frames.append(own.assign(when="at initialization"))
    return flow.family_flow_data(pd.concat(frames, ignore_index=True))


def _own_norm(layers: pd.DataFrame) -> pd.Series[str]:
    """Return the norm that a published net comes with."""
    return layers["net"].str.startswith(("ResNet", "DenseNet")).map({True: "batch", False: "none"})


def _activations(tables: Tables) -> pd.DataFrame:
    layers = tables("layers", "profile")
    if layers.empty:
        raise DataError("No finished cell measured the families at initialization.")
    return flow.activations_data(log_ratios(layers), tables("ends", "train"))


def _addition(tables: Tables) -> pd.DataFrame:
    layers = tables("layers", "growth")
    if layers.empty:
        raise DataError("No finished cell measured stacks.")
    start = layers[layers["layer"] == "trunk.stem"]
    return stacks.addition_data(start, piece_gradients(layers, ["growth", "norm", "depth", "seed"]))


def _heads(tables: Tables) -> pd.DataFrame:
    layers = tables("layers", "heads")
    if layers.empty:
        raise DataError("No finished cell measured auxiliary heads.")
    places = piece_gradients(layers, ["norm", "init", "heads", "seed"])
    return stacks.auxiliary_heads_data(places, tables("ends", "train"))


_DRAW: dict[str, Recipe] = {
    "sizes": (_sizes, sizes.family_sizes, sizes.family_sizes_caption),
    "family-flow": (_flow, flow.family_flow, flow.family_flow_caption),
    "addition-and-concatenation": (_addition, stacks.addition, stacks.addition_caption),
    "auxiliary-heads": (_heads, stacks.auxiliary_heads, stacks.auxiliary_heads_caption),
    "activations": (_activations, flow.activations, flow.activations_caption),
}
