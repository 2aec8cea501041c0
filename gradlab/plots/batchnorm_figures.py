"""The figures of the experiment batchnorm: from a run's tables to figure, drawn numbers and caption."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gradlab.analysis.batchnorm_claims import landscape_measures
from gradlab.analysis.batchnorm_init_claims import squared_gains
from gradlab.errors import DataError, unknown
from gradlab.plots import batchnorm_init, batchnorm_training
from gradlab.plots.figure_set import Tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_batchnorm_figure"]


def draw_batchnorm_figure(name: str, tables: Tables, settings: Mapping[str, Any]) -> tuple[Figure, pd.DataFrame, str]:
    """Draw one figure of the experiment.

    Args:
        name: Such as "learning-rate-range".
        tables: Gives the run's tables.
        settings: The run's settings.

    Returns:
        The figure, the frame it was drawn from, and its caption.

    Raises:
        UsageError: There is no such figure.
        DataError: The run lacks what it needs.
    """
    if name not in _PREPARE:
        raise unknown("figure", name, _PREPARE)
    prepare, source = _PREPARE[name]
    data = prepare(tables, settings)
    function = name.replace("-", "_")
    room = batchnorm_training if hasattr(batchnorm_training, function) else batchnorm_init
    figure: Figure = getattr(room, function)(data)
    return figure, data, f"{getattr(room, f'{function}_caption')(data)} {source}"


def _scale(tables: Tables, settings: Mapping[str, Any]) -> pd.DataFrame:
    ends = tables("ends", "train")
    if len(ends):
        usual = [ends[name] == settings[name] for name in ("lr", "batch_size", "steps")]
        ends = ends[np.logical_and.reduce(usual)]
    return batchnorm_training.scale_invariance_data(tables("identity", "identity"), ends)


def _rates(tables: Tables, settings: Mapping[str, Any]) -> pd.DataFrame:
    ends = tables("ends", "train")
    return batchnorm_training.learning_rate_range_data(ends, lr=settings["lr"], batch_size=settings["batch_size"])


def _landscape(tables: Tables, settings: Mapping[str, Any]) -> pd.DataFrame:
    landscape = tables("landscape", "landscape")
    if landscape.empty:
        raise DataError("The run holds no measured landscapes: run the cells that measure them.")
    return batchnorm_training.loss_landscape_data(landscape_measures(landscape, lr=settings["landscape_lr"]))


def _explosion(tables: Tables, _: Mapping[str, Any]) -> pd.DataFrame:
    explosion = tables("explosion", "explosion")
    return batchnorm_init.explosion_data(explosion, squared_gains(explosion))


def _running(tables: Tables, _: Mapping[str, Any]) -> pd.DataFrame:
    return batchnorm_training.running_statistics_data(tables("modes", "running"), tables("batchnorm", "running"))


def _growth(tables: Tables, _: Mapping[str, Any]) -> pd.DataFrame:
    return batchnorm_init.residual_growth_data(tables("growth", "growth"))


_PREPARE: dict[str, tuple[Callable[[Tables, Mapping[str, Any]], pd.DataFrame], str]] = {
    "scale-invariance": (_scale, "Claims C3.1; Ioffe & Szegedy 2015, sec. 3.3; note N5."),
    "learning-rate-range": (_rates, "Claims C3.2 and N5 batch; note N5; after De & Smith 2020."),
    "loss-landscape": (_landscape, "Claims C3.3; after Santurkar et al. 2018, Fig. 4."),
    "explosion": (_explosion, "Claims C2.4; Yang et al. 2019."),
    "running-statistics": (_running, "Claims N5 lag."),
    "residual-growth": (_growth, "Claims C3.4; De & Smith 2020, sections 2 and 3."),
}
