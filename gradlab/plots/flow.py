"""The gradient through a net, layer by layer, from any trace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gradlab.errors import DataError, UsageError
from gradlab.plots.panels import LOST, log_axis, mark_lost, spaced
from gradlab.plots.style import DOUBLE, LINESTYLES, PALETTE, paper_style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from gradlab.trace import Trace

__all__ = ["gradient_flow"]

_MOST_NAMES = 24
_STYLES: tuple[tuple[str, Any, str], ...] = (
    ("o", LINESTYLES["residual"], PALETTE["residual"]),
    ("s", LINESTYLES["plain"], PALETTE["plain"]),
)


def gradient_flow(trace: Trace, *, step: int | None = None, ax: Axes | None = None) -> Axes:
    """Draw the gradient norm at each recorded layer, in order of execution, on a log axis.

    The norm is ||dL/d(output)||, over the whole batch. Layers whose gradient is exactly 0, NaN or infinite have no
    place on a log axis: they are gaps, with a cross at the foot. Layers that no gradient reached are left out.

    Args:
        trace: What a probe recorded, of one net.
        step: A recorded step. Default: the first and the last, a line each.
        ax: Axes to draw into. Default: those of a new figure in the house's style.

    Returns:
        The axes; `ax.figure.savefig(...)` writes the figure.

    Raises:
        DataError: The trace holds no gradient of a layer.
        UsageError: The step was not recorded, or the trace holds several nets (that of a whole run).

    Example:
        >>> import pandas as pd
        >>> from gradlab.trace import Trace
        >>> names, norms = ["0", "1", "2"], [1e-6, 1e-3, 1.0]
        >>> layers = pd.DataFrame({"step": 0, "layer": names, "order": [0, 1, 2], "grad_norm": norms})
        >>> axes = gradient_flow(Trace({"layers": layers}))
        >>> axes.get_yscale(), [label.get_text() for label in axes.get_xticklabels()]
        ('log', ['0', '1', '2'])
    """
    layers = trace.layers
    reached = layers[layers["grad_norm"].notna() | (layers["grad_nonfinite"] > 0)]
    if reached.empty:
        raise DataError("The trace holds no gradient of a layer: call backward() while the model is watched.")
    if reached.duplicated(["step", "order"]).any():
        raise UsageError("The trace holds several nets: draw one of them, such as the trace of one cell of a run.")
    recorded = sorted(int(value) for value in reached["step"].unique())
    if step is not None and step not in recorded:
        some = ", ".join(map(str, recorded[:8])) + (" and more" if len(recorded) > 8 else "")
        raise UsageError(f"Step {step} was not recorded; recorded with gradients are {some}: give one of these.")
    steps = list(dict.fromkeys([recorded[0], recorded[-1]])) if step is None else [step]
    reached = reached[reached["step"].isin(steps)].sort_values(["step", "order"])
    names = reached.apply(_name, axis=1)
    labels = list(dict.fromkeys(names))
    if ax is not None:
        _draw(ax, reached.assign(name=names), steps, labels)
        return ax
    import matplotlib.pyplot as plt

    with paper_style():
        longest = max(map(len, labels))  # names stand upright below the axis
        _, ax = plt.subplots(figsize=(DOUBLE, 2.6 + 0.06 * longest))
        _draw(ax, reached.assign(name=names), steps, labels)
    return ax


def _draw(ax: Axes, reached: pd.DataFrame, steps: list[int], labels: list[str]) -> None:
    place = {label: index for index, label in enumerate(labels)}
    drawn: list[float] = []
    few = len(labels) <= 2 * _MOST_NAMES
    for (marker, linestyle, color), step in zip(_STYLES, steps, strict=False):
        own = reached[reached["step"] == step]
        y = np.full(len(labels), np.nan)
        here = own["name"].map(place).to_numpy()
        y[here] = own["grad_norm"].to_numpy()
        good = np.isfinite(y) & (y > 0)
        shown = np.where(good, y, np.nan)
        marks: dict[str, Any] = {"marker": marker, "markersize": 3} if few else {}
        ax.plot(range(len(labels)), shown, color=color, linestyle=linestyle, label=f"step {step}", **marks)
        mark_lost(ax, sorted(here[~good[here]]), color=color, label=f"step {step}: {LOST}")
        drawn += shown[good].tolist()
    log_axis(ax, drawn, decades=2.0)
    ticks = spaced(labels, _MOST_NAMES)
    ax.set_xticks(ticks, [labels[tick] for tick in ticks], rotation=90)
    ax.set_xlabel("layer, in order of execution")
    ax.set_ylabel("gradient norm $\\|\\partial L/\\partial\\,\\mathrm{output}\\|$")
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, borderaxespad=0.2)


def _name(row: object) -> str:
    """Return a layer's name, with what tells its calls and outputs apart."""
    name, call, output = (getattr(row, key) for key in ("layer", "call", "output"))
    return f"{name}{f'[{output}]' if output else ''}{f' (call {call})' if call else ''}"
