"""A stock recurrent module run over chunks of its sequence, so that its states at the cuts are in the graph.

torch's fused recurrent operators hand out the states of the last time step only. A chunk that ends at t hands out the
state at t; it is passed on to the next chunk, and it also takes the place of the chunk's own output at t. So the
gradient that reaches this one tensor is the whole of dL/dh_t: through time, and through the output at t.

Layers and directions are run one after the other, as the fused operators do inside. For each, the rows of the
sequence (a row is one sequence at one time step) lie one below the other in the order of torch's packed sequences; a
padded batch is the case in which every time step has as many rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast, final

import numpy as np
import torch
from torch import _VF, nn

__all__ = ["Cut", "Observe", "run_in_chunks"]

Weights = list[torch.Tensor]
States = tuple[torch.Tensor, ...]  # (h,) or (h, c), each (1, rows, features)


@final
class Cut:
    """A state that observers see: where it stands, and, in gated nets, what its time step was computed from."""

    __slots__ = ("before", "direction", "inputs", "level", "t", "weights")

    def __init__(
        self, level: int, direction: str, t: int, inputs: torch.Tensor, before: torch.Tensor, weights: Weights
    ) -> None:
        self.level, self.direction, self.t = level, direction, t
        self.inputs, self.before, self.weights = inputs, before, weights  # rows of x_t, rows of the h before it


#: Sees the states at a cut and returns what takes their place: the same values.
Observe = Callable[[Cut, States], States]


def run_in_chunks(
    module: nn.RNNBase,
    x: torch.Tensor,
    states: States,
    batch_sizes: torch.Tensor | None,
    times: Sequence[int],
    observe: Observe,
) -> tuple[torch.Tensor, States]:
    """Run the module as its fused operator would and let `observe` see its states at some times.

    Args:
        module: nn.RNN, nn.LSTM or nn.GRU.
        x: Shape (time, batch, features); with `batch_sizes` the data of a packed sequence, shape (rows, features).
        states: Initial states, each of shape (layers * directions, batch, features).
        batch_sizes: Those of a packed sequence, on the CPU.
        times: Which time steps to observe, ascending; the first and the last one must be among them.
        observe: Called for every layer, direction and time; a packed sequence has only its running sequences there.

    Returns:
        The output, in the form of `x`, and the final states, in the form of `states`.
    """
    module._update_flat_weights()
    flat = cast(Weights, module._flat_weights)
    directions = ("forward", "backward") if module.bidirectional else ("forward",)
    each = len(flat) // (module.num_layers * len(directions))
    ended: list[States] = []
    for level in range(module.num_layers):
        outputs = []
        for direction in directions:
            place = len(ended)
            weights = flat[place * each : (place + 1) * each]
            if x.is_cuda and len(flat) > each:
                weights = _compact(weights)
            sweep = _Sweep(module, weights, batch_sizes, level, direction, observe)
            output, final_states = sweep.run(x, tuple(s[place : place + 1] for s in states), times)
            outputs.append(output)
            ended.append(final_states)
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if module.dropout and module.training and level < module.num_layers - 1:
            x = torch.dropout(x, module.dropout, True)  # on the CPU the fused operators draw just this mask
    return x, tuple(torch.cat(parts) for parts in zip(*ended, strict=True))


def _compact(weights: Weights) -> Weights:
    """Return copies in one piece of memory: cuDNN would warn about a part of a larger module, and copy every time."""
    flat = torch.cat([weight.reshape(-1) for weight in weights])
    parts = flat.split([weight.numel() for weight in weights])
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]


@final
class _Sweep:
    """One layer in one direction over the whole sequence."""

    def __init__(
        self,
        module: nn.RNNBase,
        weights: Weights,
        batch_sizes: torch.Tensor | None,
        level: int,
        direction: str,
        observe: Observe,
    ) -> None:
        self._module, self._weights, self._batch_sizes = module, weights, batch_sizes
        self._level, self._direction, self._observe = level, direction, observe
        mode = module.mode.lower()  # "rnn_tanh", "rnn_relu", "lstm", "gru"
        self._operator: Callable[..., Any] = getattr(_VF, mode)
        self._is_lstm, self._is_gated = mode == "lstm", mode in ("lstm", "gru")

    def run(self, x: torch.Tensor, start: States, times: Sequence[int]) -> tuple[torch.Tensor, States]:
        sizes = [x.shape[1]] * x.shape[0] if self._batch_sizes is None else self._batch_sizes.tolist()
        rows = x.flatten(0, 1) if self._batch_sizes is None else x
        forward = self._direction == "forward"
        # Forward a chunk ends at an observed time, backward it begins there.
        cuts = [0, *(t + 1 for t in times)] if forward else [*times, len(sizes)]
        spans = list(pairwise(cuts))
        # split, not slices: the gradient of each slice would be as large as the whole sequence.
        chunks = rows.split([sum(sizes[a:b]) for a, b in spans])
        pieces, states = (self._forward if forward else self._backward)(chunks, spans, sizes, start)
        output = torch.cat(pieces)
        return (output.unflatten(0, x.shape[:2]) if self._batch_sizes is None else output), states

    def _forward(
        self, chunks: Sequence[torch.Tensor], spans: list[tuple[int, int]], sizes: list[int], start: States
    ) -> tuple[list[torch.Tensor], States]:
        pieces: list[torch.Tensor] = []
        ended: list[States] = []  # of sequences that are over, in the order in which they ended
        states = start
        for chunk, (a, b) in zip(chunks, spans, strict=True):
            running = sizes[b - 1]
            output, new = self._call(chunk, states, a, b)
            if running < sizes[a]:
                ended.append(tuple(s[:, running:] for s in new))
                new = tuple(s[:, :running] for s in new)
            length = len(output) - running
            inputs, before = chunk, states[0][0]
            if self._is_gated:  # else nobody asks for them, and each slice costs a microsecond or more
                with torch.no_grad():
                    inputs = chunk[length:]
                    before = output[length - sizes[b - 2] :][:running] if b - a > 1 else before[:running]
            new = self._observe(Cut(self._level, self._direction, b - 1, inputs, before, self._weights), new)
            if length:
                pieces.append(output[:length])
            pieces.append(new[0].squeeze(0))
            states = new
            if b < len(sizes) and sizes[b] < running:
                ended.append(tuple(s[:, sizes[b] :] for s in new))
                states = tuple(s[:, : sizes[b]] for s in new)
        if ended:
            states = tuple(torch.cat(parts, 1) for parts in zip(states, *reversed(ended), strict=False))
        return pieces, states

    def _backward(
        self, chunks: Sequence[torch.Tensor], spans: list[tuple[int, int]], sizes: list[int], start: States
    ) -> tuple[list[torch.Tensor], States]:
        pieces: list[torch.Tensor] = []
        states = tuple(s[:, :0] for s in start)
        for chunk, (a, b) in zip(reversed(chunks), reversed(spans), strict=True):
            first, carried = sizes[a], states[0].shape[1]
            if carried < first:  # sequences that end inside this chunk begin here with their initial states
                begun = [s[:, carried:first] for s in start]
                states = tuple(torch.cat(pair, 1) if carried else pair[1] for pair in zip(states, begun, strict=True))
            output, new = self._call(self._turn(chunk, a, b, sizes), states, a, b)
            output = self._turn(output, a, b, sizes)
            with torch.no_grad():
                before = states[0][0]
                if b - a > 1:
                    going = sizes[a + 1]
                    before = torch.cat([output[first : first + going], before[going:]])
                cut = Cut(self._level, self._direction, a, chunk[:first], before, self._weights)
            new = self._observe(cut, new)
            if len(output) > first:
                pieces.append(output[first:])
            pieces.append(new[0].squeeze(0))
            states = new
        return pieces[::-1], states

    def _call(self, chunk: torch.Tensor, states: States, a: int, b: int) -> tuple[torch.Tensor, States]:
        """Run the fused operator over the time steps a to b - 1."""
        module, hx = self._module, states if self._is_lstm else states[0]
        options = (self._weights, module.bias, 1, 0.0, module.training, False)
        if self._batch_sizes is None:
            if b - a == 1:
                output, *new = self._operator(chunk.unsqueeze(0), hx, *options, False)
                return output.squeeze(0), tuple(new)
            output, *new = self._operator(chunk.unflatten(0, (b - a, -1)), hx, *options, False)
            return output.flatten(0, 1), tuple(new)
        output, *new = self._operator(chunk, self._batch_sizes[a:b], hx, *options)
        return output, tuple(new)

    def _turn(self, rows: torch.Tensor, a: int, b: int, sizes: list[int]) -> torch.Tensor:
        """Reverse each sequence within the chunk from a to b - 1; its own inverse."""
        if b - a == 1:
            return rows
        if self._batch_sizes is None:
            return rows.reshape(b - a, -1, rows.shape[1]).flip(0).flatten(0, 1)
        counts = np.array(sizes[a:b])
        offsets = np.concatenate([[0], np.cumsum(counts)])
        lengths = (counts[:, None] > np.arange(counts[0])).sum(0)
        order = [offsets[lengths[:n] - 1 - s] + np.arange(n) for s, n in enumerate(counts)]
        index = torch.from_numpy(np.concatenate(order))
        return rows.index_select(0, index.to(rows.device, non_blocking=True))
