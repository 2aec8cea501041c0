"""gradlab: how signal and gradient travel through depth and through time.

    import gradlab as gl

    with gl.watch(model, optimizer) as probe:
        ...                                   # the training loop as it is
    print(gl.diagnose(probe.trace))           # what is wrong, where, why, and what helps
    gl.plots.gradient_flow(probe.trace)
    probe.trace.save("run.trace")

Names are resolved when first used: importing gradlab, reading a trace and drawing it load no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradlab import (
        analysis,
        live,
        measure,
        nets,
        plots,
        probes,
        report,
        runtime,
        study,
        sweep,
        tasks,
        trace,
        training,
    )
    from gradlab.analysis.diagnosis import diagnose
    from gradlab.analysis.finding import Diagnosis, Finding
    from gradlab.checkpoint import Checkpoint
    from gradlab.errors import GradlabError
    from gradlab.live.view import LiveView
    from gradlab.probes.adjoint import adjoint
    from gradlab.probes.schedule import log_spaced
    from gradlab.probes.watch import Probe, watch
    from gradlab.sweep.store import load
    from gradlab.trace import Trace
    from gradlab.training import TrainSettings, train
    from gradlab.training_seeds import train_seeds
    from gradlab.trial import WhatIf, whatif

__all__ = [
    "Checkpoint",
    "Diagnosis",
    "Finding",
    "GradlabError",
    "LiveView",
    "Probe",
    "Trace",
    "TrainSettings",
    "WhatIf",
    "adjoint",
    "analysis",
    "diagnose",
    "live",
    "load",
    "log_spaced",
    "measure",
    "nets",
    "plots",
    "probes",
    "report",
    "runtime",
    "study",
    "sweep",
    "tasks",
    "trace",
    "train",
    "train_seeds",
    "training",
    "watch",
    "whatif",
]

_HOME = {
    "Checkpoint": "gradlab.checkpoint",
    "Diagnosis": "gradlab.analysis.finding",
    "Finding": "gradlab.analysis.finding",
    "diagnose": "gradlab.analysis.diagnosis",
    "GradlabError": "gradlab.errors",
    "LiveView": "gradlab.live.view",
    "Probe": "gradlab.probes.watch",
    "Trace": "gradlab.trace",
    "TrainSettings": "gradlab.training",
    "adjoint": "gradlab.probes.adjoint",
    "load": "gradlab.sweep.store",
    "log_spaced": "gradlab.probes.schedule",
    "train": "gradlab.training",
    "train_seeds": "gradlab.training_seeds",
    "watch": "gradlab.probes.watch",
    "WhatIf": "gradlab.trial",
    "whatif": "gradlab.trial",
}
_ROOMS = frozenset(__all__) - _HOME.keys()


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"gradlab.{name}")
    raise AttributeError(f"module 'gradlab' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
