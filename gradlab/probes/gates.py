"""The gates of stock LSTM and GRU modules at the time steps that are followed."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import nn

from gradlab.probes.buffer import StepBuffer
from gradlab.probes.chunks import Cut

__all__ = ["GateReader", "has_gates"]

#: Gates and their places among the blocks of torch's stacked weights: i, f, g, o and r, z, n.
_GATES: dict[str, dict[str, int]] = {"LSTM": {"i": 0, "f": 1, "o": 3}, "GRU": {"r": 0, "z": 1}}
_BLOCKS = {"LSTM": 4, "GRU": 2}  # of a GRU the candidate n is left out
_CLOSED, _OPEN = 0.1, 0.9  # Karpathy, Johnson & Li 2015 (arXiv 1506.02078), section 4.2
_BATCH = 1 << 20  # entries of pre-activations worked on at once: a few megabytes beside the states


def has_gates(module: nn.RNNBase) -> bool:
    """Return whether the module is an LSTM or a GRU."""
    return module.mode in _GATES


@final
class GateReader:
    """Computes the gates of one call again from what the cuts hold, many cuts at once, and reduces them.

    The fused operators keep their gates to themselves. From o_t also follows dh_t/dc_t at constant gates,
    o_t * (1 - tanh(c_t)^2), which the gradient of c_t needs.

    Args:
        module: The LSTM or GRU.
        buffer: Where rows go: mean, share of closed entries, share of open entries.
        slope: Told (place, dh_t/dc_t before the projection) of each cut that was added with its c.
    """

    def __init__(self, module: nn.RNNBase, buffer: StepBuffer, slope: Callable[[int, torch.Tensor], None]) -> None:
        self.entries: list[tuple[tuple[object, ...], int]] = []  # (level, direction, gate, t), slot
        self._size, self._bias = module.hidden_size, module.bias
        self._gates, self._blocks = _GATES[module.mode], _BLOCKS[module.mode]
        self._buffer, self._slope = buffer, slope
        self._waiting: list[tuple[int, Cut, torch.Tensor | None]] = []
        self._rows = 0

    def add(self, place: int, cut: Cut, c: torch.Tensor | None) -> None:
        """Take a cut; `c`, shape (1, rows, hidden), where a gradient will ask for its slope."""
        if self._waiting and self._waiting[0][1].weights is not cut.weights:  # another level or direction
            self.flush()
        self._waiting.append((place, cut, None if c is None else c.detach()))
        self._rows += len(cut.inputs)
        if self._rows * self._blocks * self._size >= _BATCH:
            self.flush()

    @torch.no_grad()
    def flush(self) -> None:
        """Work on the cuts that wait."""
        waiting, self._waiting, self._rows = self._waiting, [], 0
        if not waiting:
            return
        cuts = [cut for _, cut, _ in waiting]
        counts = [len(cut.inputs) for cut in cuts]
        blocks = self._pre_activations(cuts).chunk(self._blocks, -1)
        gates = {name: blocks[place].sigmoid() for name, place in self._gates.items()}
        for name, gate in gates.items():
            first = self._buffer.block(_measures(gate, counts))
            facts = [(cut.level, cut.direction, name, cut.t) for cut in cuts]
            self.entries += zip(facts, range(first, first + len(cuts)), strict=True)
        cells = [(place, c) for place, _, c in waiting if c is not None]
        if cells:  # then all have one
            slopes = gates["o"] * (1 - torch.cat([c[0] for _, c in cells]).tanh().square())
            for (place, _), slope in zip(cells, slopes.split(counts), strict=True):
                self._slope(place, slope)

    def _pre_activations(self, cuts: list[Cut]) -> torch.Tensor:
        """Return W x_t + U h_{t-1} + b of all cuts, one below the other: shape (rows, blocks * hidden)."""
        rows = self._blocks * self._size
        weights = [weight.detach()[:rows] for weight in cuts[0].weights[: 4 if self._bias else 2]]
        w, u, *biases = weights
        b, b_hidden = biases or (None, None)
        given = nn.functional.linear(torch.cat([cut.inputs.detach() for cut in cuts]), w, b)
        return given + nn.functional.linear(torch.cat([cut.before.detach() for cut in cuts]), u, b_hidden)


def _measures(gate: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Return mean, share below 0.1 and share above 0.9 over the entries of each cut: shape (cuts, 3)."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    mean = gate.mean(1, dtype=wide)
    # A gate that is NaN is neither closed nor open: its share is not known, so NaN is added.
    closed, opened = ((side.to(wide).mean(1) + 0 * mean) for side in (gate < _CLOSED, gate > _OPEN))
    measures = torch.stack([mean, closed, opened], 1)
    if len(set(counts)) == 1:
        return measures.view(len(counts), counts[0], 3).mean(1)
    return torch.stack([part.mean(0) for part in measures.split(counts)])
