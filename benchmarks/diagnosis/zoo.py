"""All cases, and the traces of their runs."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from torch import nn

from gradlab.benchmarks.diagnosis import (
    autoencoders,
    convnets,
    deep_mlps,
    frozen,
    mixtures,
    mlps,
    nonfinite,
    recurrents,
    transformers,
    unit_mlps,
)
from gradlab.benchmarks.diagnosis.case import Case, seeded, train
from gradlab.benchmarks.diagnosis.split import half_of
from gradlab.errors import unknown
from gradlab.probes.watch import watch

if TYPE_CHECKING:
    from gradlab.trace import Trace

__all__ = ["cases", "find_case", "record"]


SPLITS = ("all", "tune", "held-out")


def cases(split: str = "all") -> tuple[Case, ...]:
    """Return the cases of the zoo, or those of one half.

    Args:
        split: "all", "tune" or "held-out".

    Raises:
        UsageError: Another split.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    return tuple(case for case in _all() if split in ("all", half_of(case.name)))


@cache
def _all() -> tuple[Case, ...]:
    parts = (mlps, deep_mlps, unit_mlps, convnets, autoencoders, recurrents, transformers, mixtures, nonfinite, frozen)
    return tuple(case for part in parts for case in part.CASES)


def find_case(name: str) -> Case:
    """Return a case by its name.

    Raises:
        UsageError: There is none of that name.
    """
    known = {case.name: case for case in cases()}
    if name not in known:
        raise unknown("case", name, known)
    return known[name]


def record(case: Case) -> Trace:
    """Run a case, watched as anybody would watch it: every layer, every step, and time where there is a recurrent net.

    Example:
        >>> trace = record(find_case("mlp-he-relu-8"))
        >>> len(trace.steps), trace.layers["layer"].nunique()
        (12, 17)
    """
    with seeded(case):
        job = case.build()
        through_time = any(isinstance(module, nn.RNNBase) for module in job.model.modules())
        with watch(job.model, job.optimizer, timesteps=through_time, scaler=job.scaler) as probe:
            train(job, probe.log)
        return probe.trace
