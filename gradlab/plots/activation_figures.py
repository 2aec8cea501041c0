"""The figures of the experiment activation-sweep: from a run's tables to figure, drawn numbers and caption."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from gradlab.plots import gains, phase_plane, ridges, spectra, stalls
from gradlab.plots.figure_set import Recipe, Tables, draw_by_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_activation_figure"]


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
    return draw_by_name(_FIGURES, name, tables)


_FIGURES: dict[str, Recipe] = {
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
