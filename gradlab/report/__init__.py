"""One self-contained HTML page of finished runs, or of the diagnosis of a trace; no torch.

    import gradlab as gl

    gl.report.write_diagnosis(probe.trace, "net.html")

The page opens from the disk, asks the network for nothing (its own Content-Security-Policy forbids it), and needs the
extra `gradlab[report]`: Jinja for the page, Altair and vl-convert for the charts and for Vega's JavaScript in it.
Names are resolved on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradlab.report.diagnosis_page import write_diagnosis
    from gradlab.report.run_page import write_report

__all__ = ["write_diagnosis", "write_report"]

_HOME = {"write_diagnosis": "diagnosis_page", "write_report": "run_page"}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
