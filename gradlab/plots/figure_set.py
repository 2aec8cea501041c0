"""What the figures of an experiment are made of, and how one is drawn by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import pandas as pd

from gradlab.errors import unknown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Recipe", "Tables", "draw_by_name"]


class Tables(Protocol):
    """Gives a table of a run by its name and the part of the study that wrote it; empty where there is none."""

    def __call__(self, name: str, part: str | None = None, /) -> pd.DataFrame:
        """Return the table."""


#: From a run's tables to the frame that is drawn, from that to the figure, and from that to its caption.
Recipe = tuple[Callable[[Tables], pd.DataFrame], Callable[[pd.DataFrame], "Figure"], Callable[[pd.DataFrame], str]]


def draw_by_name(recipes: Mapping[str, Recipe], name: str, tables: Tables) -> tuple[Figure, pd.DataFrame, str]:
    """Return a figure, the frame it was drawn from, and its caption.

    Raises:
        UsageError: There is no such figure.
        DataError: The run lacks what it needs.
    """
    if name not in recipes:
        raise unknown("figure", name, recipes)
    prepare, draw, describe = recipes[name]
    data = prepare(tables)
    return draw(data), data, describe(data)
