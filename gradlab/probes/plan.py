"""Which parameters are read in which way: worked out once, for as long as they are the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from operator import is_
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from gradlab.probes.arithmetic import SgdGroup

__all__ = ["Parameters", "Part", "Plan", "make_plan"]

#: By id: place and parameter.
Parameters = dict[int, tuple[int, torch.Tensor]]


class Part(NamedTuple):
    """Those parameters of a group of SGD that are watched: themselves, their places, their numbers in the group."""

    whole: list[torch.Tensor]  # all of the group
    ours: list[int]
    params: list[torch.Tensor]
    places: npt.NDArray[np.int64]
    places_at: int  # their address


class Plan(NamedTuple):
    """Which parameters are read in which way, as long as the model's and the groups' are these."""

    now: list[torch.Tensor | None]
    but: Collection[int]
    places: npt.NDArray[np.int64]
    groups: list[Part]
    rest: Parameters

    def holds(self, but: Collection[int], groups: Sequence[SgdGroup]) -> bool:
        """Return whether the groups' still are."""
        return (
            self.but == but
            and len(groups) == len(self.groups)
            and all(len(group.params) == len(part.whole) and all(map(is_, group.params, part.whole))
                    for group, part in zip(groups, self.groups, strict=True))
        )  # fmt: skip


def make_plan(now: list[torch.Tensor | None], but: Collection[int], groups: Sequence[SgdGroup]) -> Plan:
    """Return the plan for the model's parameters by place, but for those with some ids, and for groups of SGD."""
    rest: Parameters = {id(x): (place, x) for place, x in enumerate(now) if x is not None and id(x) not in but}
    places, parts = [place for place, _ in rest.values()], []
    uses = Counter(id(param) for group in groups for param in group.params)  # one listed twice is updated twice
    for group in groups:
        ours = [k for k, param in enumerate(group.params) if id(param) in rest and uses[id(param)] == 1]
        params = [group.params[k] for k in ours]
        theirs = np.array([rest.pop(id(param))[0] for param in params], dtype=np.int64)
        parts.append(Part(list(group.params), ours, params, theirs, theirs.ctypes.data))
    return Plan(now, but, np.array(places, dtype=np.int64), parts, rest)
