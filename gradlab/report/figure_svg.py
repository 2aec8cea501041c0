"""A matplotlib figure as SVG that can stand in an HTML page beside others."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figure_svg"]

_MOST_BYTES: Final = 400_000  # of vectors; beyond, the marks of the figure become a picture inside it
_PICTURE_DPI: Final = 170


def figure_svg(figure: Figure, name: str) -> str:
    """Return a figure as an `svg` element, its letters as outlines: it looks the same without its font installed.

    Args:
        figure: The figure.
        name: Put before every id inside, so that ids of several figures in one page stay apart; letters, digits, "-".

    Returns:
        The element, hidden from screen readers: the page gives it a caption and a table.
    """
    text = _saved(figure)
    if len(text) > _MOST_BYTES:
        for axes in figure.axes:
            for artist in (*axes.collections, *axes.lines, *axes.images, *axes.patches):
                artist.set_rasterized(True)
        text = _saved(figure)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)  # the words behind outlines, which may be anybody's
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    # A hundredth of a point is beyond what anybody sees; six decimals would be a third of a page of sixty figures.
    place = r'\bd="[^"]*"|\b[xy]="[^"]*"|translate\([^)]*\)'
    text = re.sub(place, lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    return text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def _saved(figure: Figure) -> str:
    import matplotlib as mpl

    buffer = io.StringIO()
    # The salt and the missing date make equal tables give equal bytes.
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "gradlab"}):
        figure.savefig(buffer, format="svg", dpi=_PICTURE_DPI, metadata={"Date": None})
    return buffer.getvalue()
