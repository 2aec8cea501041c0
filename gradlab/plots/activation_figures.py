"""The figures of the experiment activation-sweep: from a run's tables to figure, drawn numbers and caption."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import pandas as pd

from gradlab.errors import unknown
from gradlab.plots import gains, phase_plane, ridges, spectra, stalls

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_activation_figure"]


class Tables(Protocol):
    """Gives a table of a run by its name and the part of the study that wrote it; empty where there is none."""

    def __call__(self, name: str, part: str | None = None, /) -> pd.DataFrame:
        """Return the table."""


def draw_activation_figure(name: str, tables: Tables) -> tuple[Figure, pd.DataFrame, str]:
    """Draw one figure of an activation sweep.

    Args:
        name: Such as "phase-diagram".
        tables: Gives the run's tables.

    Returns:
        The figure, the frame it was drawn from, and its caption.

    Raises:
        UsageError: There is no such figure.
        DataError: The run lacks what it needs.
    """
    if name not in _FIGURES:
        raise unknown("figure", name, _FIGURES)
    prepare, draw, describe = _FIGURES[name]
    data = prepare(tables)
    return draw(data), data, describe(data)


_FIGURES: dict[
    str,
    tuple[Callable[[Tables], pd.DataFrame], Callable[[pd.DataFrame], Figure], Callable[[pd.DataFrame], str]],
] = {
    "gain-against-theory": (
        lambda tables: gains.gain_against_theory_data(tables("profiles", "gain")),
        gains.gain_against_theory,
        gains.gain_against_theory_caption,
    ),
    "phase-diagram": (
        lambda tables: phase_plane.phase_plane_data(tables("profiles", "chaos")),
        phase_plane.phase_plane,
        phase_plane.phase_plane_caption,
    ),
    "layer-distributions": (
        lambda tables: ridges.layer_distributions_data(tables("histograms", "glorot")),
        ridges.layer_distributions,
        ridges.layer_distributions_caption,
    ),
    "deep-training": (
        lambda tables: stalls.deep_training_data(tables("losses", "train"), tables("layers", "train")),
        stalls.deep_training,
        stalls.deep_training_caption,
    ),
    "singular-values": (
        lambda tables: spectra.singular_values_data(tables("spectra", "spectrum")),
        spectra.singular_values,
        spectra.singular_values_caption,
    ),
}
