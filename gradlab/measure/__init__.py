"""Measurements: on nets that are not trained, in float64, through the probes or by hand; and of what nets learn.

Experiments share them, since experiments never import each other. Each returns plain numbers or a Trace. The names here
are for your own nets; they are resolved on first use, since they load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradlab.measure.jacobian import jacobian_spectrum

__all__ = ["jacobian_spectrum"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gradlab.measure import jacobian

    value: object = getattr(jacobian, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
