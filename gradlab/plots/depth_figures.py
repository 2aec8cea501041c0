"""The figures of the experiment depth-sweep: from a run's tables to figure, drawn numbers and caption."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pandas as pd

from gradlab import plots
from gradlab.analysis import profiles
from gradlab.errors import DataError, unknown
from gradlab.plots.figure_set import Tables
from gradlab.plots.paths import INITIAL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_depth_figure"]

_NETS = ("net", "depth", "seed")
_RESIDUAL = "residual, BatchNorm"


def draw_depth_figure(name: str, tables: Tables, *, size: int | None = None) -> tuple[Figure, pd.DataFrame, str]:
    """Draw one figure of a depth sweep.

    Args:
        name: Such as "gradient-by-layer".
        tables: Gives the run's tables.
        size: Side of the images in pixels, for predictions that count what zero padding loses.

    Returns:
        The figure, the frame it was drawn from, and its caption.

    Raises:
        UsageError: There is no such figure.
        DataError: The run lacks what it needs.
    """
    if name not in _PREPARE:
        raise unknown("figure", name, _PREPARE)
    prepare, source = _PREPARE[name]
    data = prepare(tables, size)
    function = name.replace("-", "_")
    figure: Figure = getattr(plots, function)(data)
    return figure, data, f"{getattr(plots, f'{function}_caption')(data)} {source}"


def _trained(tables: Tables, name: str) -> pd.DataFrame:
    """Return a table's rows of nets with BatchNorm whose training did not diverge."""
    frame = tables(name, "train")
    kept = frame[(frame["norm"] == "batch") & (frame["status"] == "done")] if len(frame) else frame
    if kept.empty:
        raise DataError("No finished cell trained a net with BatchNorm without diverging.")
    return kept


def _first_and_last(
    frame: pd.DataFrame, measure: Callable[[pd.DataFrame], pd.DataFrame], names: tuple[str, str]
) -> list[pd.DataFrame]:
    moments = zip(("first", "last"), names, strict=True)
    return [measure(profiles.record_window(frame, which)).assign(when=name) for which, name in moments]


def _gradient_by_layer(tables: Tables, size: int | None) -> pd.DataFrame:
    profile = profiles.block_gradients(tables("layers", "profile"), _NETS)
    return plots.gradient_by_layer_data(profile, size=size)


def _training_loss(tables: Tables, _: int | None) -> pd.DataFrame:
    return plots.training_loss_data(tables("losses", "train"))


def _layer_responses(tables: Tables, _: int | None) -> pd.DataFrame:
    last = profiles.record_window(_trained(tables, "layers"), "last")
    return plots.layer_responses_data(profiles.layer_responses(last, _NETS))


def _gradient_heatmap(tables: Tables, _: int | None) -> pd.DataFrame:
    layers = _trained(tables, "layers")
    return plots.gradient_heatmap_data(profiles.block_gradients(layers, (*_NETS, "step")))


def _batchnorm_gain(tables: Tables, _: int | None) -> pd.DataFrame:
    def measure(rows: pd.DataFrame) -> pd.DataFrame:
        return profiles.batchnorm_gains(rows, _NETS)

    moments = _first_and_last(_trained(tables, "batchnorm"), measure, (INITIAL, "after training"))
    return plots.batchnorm_gain_data(pd.concat(moments, ignore_index=True))


def _skip_and_branch(tables: Tables, _: int | None) -> pd.DataFrame:
    def measure(rows: pd.DataFrame) -> pd.DataFrame:
        return profiles.path_gradients(rows, _NETS)

    parts = []
    profile = tables("layers", "profile")
    if len(profile) and (profile["net"] == _RESIDUAL).any():
        parts.append(measure(profile[profile["net"] == _RESIDUAL]).assign(when=INITIAL))
    try:
        trained = _trained(tables, "layers")
        trained = trained[trained["net"] == "residual"]
        if trained.empty:
            raise DataError("No finished cell trained a residual net with BatchNorm: skip and branch need one.")
        parts += _first_and_last(trained, measure, ("first step", "last step"))
    except DataError:
        if not parts:
            raise
    return plots.skip_and_branch_data(pd.concat(parts, ignore_index=True))


_PREPARE: dict[str, tuple[Callable[[Tables, int | None], pd.DataFrame], str]] = {
    "gradient-by-layer": (
        _gradient_by_layer,
        "Claims C2.3 vanish, explode, power, flat; He et al. 2015, sec. 4.1; Yang et al. 2019; De & Smith 2020.",
    ),
    "training-loss": (_training_loss, "Claims C2.2a to d, C2.3 plain and residual; after He et al. 2015, Fig. 6."),
    "layer-responses": (_layer_responses, "Claims C2.6; after He et al. 2015, Fig. 7."),
    "gradient-heatmap": (_gradient_heatmap, "Claims C2.2a and C2.3 explode; He et al. 2015, sec. 4.1."),
    "batchnorm-gain": (_batchnorm_gain, "Claim C2.4; Yang et al. 2019; De & Smith 2020."),
    "skip-and-branch": (_skip_and_branch, "Claims C3.4 and C2.3 power; De & Smith 2020; theory derived here."),
}
