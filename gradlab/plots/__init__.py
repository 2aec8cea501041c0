"""Results in, figures out; no torch.

A figure is three functions: `<name>_data` makes of tidy frames the frame that is drawn, `<name>` draws it, and
`<name>_caption` says what it shows. Names are resolved on first use, so that importing this package costs neither
pandas nor matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradlab.plots.by_layer import gradient_by_layer, gradient_by_layer_caption, gradient_by_layer_data
    from gradlab.plots.flow import gradient_flow
    from gradlab.plots.heatmap import gradient_heatmap, gradient_heatmap_caption, gradient_heatmap_data
    from gradlab.plots.losses import training_loss, training_loss_caption, training_loss_data
    from gradlab.plots.normalization import batchnorm_gain, batchnorm_gain_caption, batchnorm_gain_data
    from gradlab.plots.paths import skip_and_branch, skip_and_branch_caption, skip_and_branch_data
    from gradlab.plots.responses import layer_responses, layer_responses_caption, layer_responses_data
    from gradlab.plots.style import paper_style

__all__ = [
    "batchnorm_gain",
    "batchnorm_gain_caption",
    "batchnorm_gain_data",
    "gradient_by_layer",
    "gradient_by_layer_caption",
    "gradient_by_layer_data",
    "gradient_flow",
    "gradient_heatmap",
    "gradient_heatmap_caption",
    "gradient_heatmap_data",
    "layer_responses",
    "layer_responses_caption",
    "layer_responses_data",
    "paper_style",
    "skip_and_branch",
    "skip_and_branch_caption",
    "skip_and_branch_data",
    "training_loss",
    "training_loss_caption",
    "training_loss_data",
]

#: Figure -> module. No module has a figure's name: importing it would put the module in the function's place.
_FIGURES = {
    "batchnorm_gain": "normalization",
    "gradient_by_layer": "by_layer",
    "gradient_heatmap": "heatmap",
    "layer_responses": "responses",
    "skip_and_branch": "paths",
    "training_loss": "losses",
}
_HOME = {f"{name}{suffix}": module for name, module in _FIGURES.items() for suffix in ("", "_data", "_caption")}
_HOME |= {"gradient_flow": "flow", "paper_style": "style"}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
