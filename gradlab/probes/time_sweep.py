"""The total gradient of the states of a stock recurrent module, swept back through time in any number of steps.

Each layer of the module is run alone, top layer first, over short chunks of the sequence between cuts. At a cut all
gradient flows through the state (h, and c of an LSTM), and the backward pass is linear: the cotangent is divided by a
power of two, one for each sample, and the exponents are added up. Samples never mix inside a recurrent module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from gradlab.probes.rescale import down_by, exponent_of, norm_log2, square_sum, to_host

__all__ = ["Recurrent", "StateNorms", "TimeSweep", "stock_kind"]

Recurrent = nn.RNN | nn.LSTM | nn.GRU
"""The modules that can be swept."""


def stock_kind(module: nn.Module) -> type[nn.RNN] | type[nn.LSTM] | type[nn.GRU] | None:
    """Return which stock module this is, by its forward pass; None for any other."""
    for kind in (nn.RNN, nn.LSTM, nn.GRU):
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return kind
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class StateNorms:
    """Norms of the gradient of one layer's states at the cuts, as log2, of shape (cuts, samples).

    Args:
        state: "h", "c", or "cut" (h and c together, each with the other held fixed).
        level: Layer in the stack, 0 nearest the input.
        squares: Sums of squares of the scaled gradients.
        exponent: Exponents of the scales.
    """

    state: str
    level: int
    squares: npt.NDArray[np.float64]
    exponent: npt.NDArray[np.float64]

    def log2(self, *, per_sample: bool) -> npt.NDArray[np.float64]:
        """Return log2 of the norms, (cuts, samples), or over the whole batch, (cuts,)."""
        return norm_log2(self.squares, self.exponent, axis=None if per_sample else 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """What the forward pass of one layer leaves for the sweep; states at the cuts are all it keeps of them."""

    cell: nn.Module
    inputs: torch.Tensor  # (T, N, in)
    h: torch.Tensor  # (cuts, N, out)
    c: torch.Tensor | None  # (cuts, N, hidden)
    c_to_h: torch.Tensor | None  # (cuts, N, hidden): dh_t/dc_t within the step, o (1 - tanh(c)^2)
    mask: torch.Tensor | None  # dropout between this layer and the next, (T, N, out)


def _single(module: Recurrent, level: int) -> nn.Module:
    """Return one layer as a module of its own, with copies of the weights that need no gradient."""
    kind = stock_kind(module)
    assert kind is not None
    first: torch.Tensor = getattr(module, f"weight_ih_l{level}")
    options: dict[str, Any] = {"bias": module.bias, "device": first.device, "dtype": first.dtype}
    if kind is nn.RNN:
        options["nonlinearity"] = module.nonlinearity
    if kind is nn.LSTM:
        options["proj_size"] = module.proj_size
    cell: nn.Module = kind(first.shape[1], module.hidden_size, **options)
    with torch.no_grad():
        for name, weight in cell.named_parameters():
            weight.copy_(getattr(module, name.removesuffix("0") + str(level)))
    return cell.requires_grad_(False)  # left in training mode: cuDNN has no backward pass in the other


@final
class TimeSweep:
    """Runs a stock recurrent module forward layer by layer and its gradient back, keeping only states at cuts.

    Args:
        module: nn.RNN, nn.LSTM or nn.GRU with one direction.
        every: Steps between cuts.
    """

    def __init__(self, module: Recurrent, every: int) -> None:
        self._module, self._every = module, every
        self._layers: list[_Layer] = []
        self.cuts: list[int] = []

    @torch.no_grad()
    def forward(self, x: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Run forward.

        Args:
            x: (T, N, in).
            h0: (layers, N, out).
            c0: (layers, N, hidden) of an LSTM, else None.

        Returns:
            The top layer's outputs (T, N, out), the last h and, of an LSTM, the last c.
        """
        module = self._module
        self.cuts = [*range(0, len(x), self._every), len(x)]
        self._layers, last_h, last_c = [], [], []
        for level in range(module.num_layers):
            cell = _single(module, level)
            if c0 is None:
                outputs, _ = cell(x, h0[level : level + 1])
                c_at_cuts = c_to_h = None
            else:
                outputs, c_at_cuts = self._run_lstm(cell, x, h0[level : level + 1], c0[level : level + 1])
                c_to_h = self._c_to_h(cell, x, torch.cat([h0[level : level + 1], outputs[:-1]]), c_at_cuts)
                last_c.append(c_at_cuts[-1])
            h_at_cuts = torch.cat([h0[level : level + 1], outputs[[t - 1 for t in self.cuts[1:]]]])
            last_h.append(h_at_cuts[-1])
            mask = None
            if module.training and module.dropout > 0 and level < module.num_layers - 1:
                mask = functional.dropout(torch.ones_like(outputs), module.dropout)
            self._layers.append(_Layer(cell=cell, inputs=x, h=h_at_cuts, c=c_at_cuts, c_to_h=c_to_h, mask=mask))
            x = outputs if mask is None else outputs * mask
        return (x, torch.stack(last_h), *([torch.stack(last_c)] if last_c else []))

    def _run_lstm(
        self, cell: nn.Module, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outputs, c_at_cuts = [], [c]
        for start, stop in zip(self.cuts, self.cuts[1:], strict=False):
            out, (h, c) = cell(x[start:stop], (h, c))
            outputs.append(out)
            c_at_cuts.append(c)
        return torch.cat(outputs), torch.cat(c_at_cuts)

    def _c_to_h(self, cell: nn.Module, x: torch.Tensor, before: torch.Tensor, c_at_cuts: torch.Tensor) -> torch.Tensor:
        """Return dh_t/dc_t at the cuts, o_t (1 - tanh(c_t)^2), 0 at t = 0, where h is given and not made from c."""
        weights = dict(cell.named_parameters())
        rows = slice(3 * self._module.hidden_size, None)  # gates in order i, f, g, o
        steps = [t - 1 for t in self.cuts[1:]]
        z = x[steps] @ weights["weight_ih_l0"][rows].T + before[steps] @ weights["weight_hh_l0"][rows].T
        if self._module.bias:
            z = z + weights["bias_ih_l0"][rows] + weights["bias_hh_l0"][rows]
        slope = z.sigmoid() * (1 - c_at_cuts[1:].tanh().square())
        return torch.cat([torch.zeros_like(slope[:1]), slope])

    def backward(self, to_outputs: torch.Tensor, to_h: torch.Tensor, to_c: torch.Tensor | None) -> list[StateNorms]:
        """Sweep the gradient back through all layers.

        Args:
            to_outputs: dL/d(outputs), (T, N, out): the direct terms only.
            to_h: dL/d(last h as returned), (layers, N, out).
            to_c: Likewise for c, (layers, N, hidden), or None.

        Returns:
            The norms of every layer, "h" and, for an LSTM, "c" and "cut", at `cuts`.
        """
        exponent = exponent_of(to_outputs)
        direct = down_by(to_outputs, exponent)
        found: list[StateNorms] = []
        for level in reversed(range(len(self._layers))):
            mask = self._layers[level].mask
            if mask is not None:
                direct = direct * mask
            start_c = None if to_c is None else to_c[level]
            norms, direct, exponent = self._sweep_layer(level, direct, exponent, to_h[level], start_c)
            found = norms + found
        return found

    def _sweep_layer(
        self,
        level: int,
        direct: torch.Tensor,
        exponent: torch.Tensor,
        run_h: torch.Tensor,
        run_c: torch.Tensor | None,
    ) -> tuple[list[StateNorms], torch.Tensor, torch.Tensor]:
        """Return the norms of a layer and the gradient of its inputs, as scaled steps (T, N, in) and their exponents.

        `direct` and `exponent` are the gradient that enters at each step's output, `run_h` and `run_c` that of the last
        state by all that follows the sequence.
        """
        layer, width = self._layers[level], run_h.shape[-1]
        project = dict(layer.cell.named_parameters()).get("weight_hr_l0")
        run = run_h if run_c is None else torch.cat([run_h, run_c], -1)
        scale = exponent_of(run)
        run = down_by(run, scale)
        rows: list[torch.Tensor] = []  # (sums of squares of h, the rest of the cut, total c; exponent) at each cut
        to_inputs: list[torch.Tensor] = []
        input_exponents: list[torch.Tensor] = []
        for j in reversed(range(len(self.cuts))):
            stop = self.cuts[j]
            if stop > 0:
                common = torch.maximum(scale, exponent[stop - 1])
                run = down_by(run, common - scale)
                g_h = run[:, :width] + down_by(direct[stop - 1], common - exponent[stop - 1])
            else:
                common, g_h = scale, run[:, :width]
            g_c = run[:, width:]
            squares = [square_sum(g_h)]
            if layer.c_to_h is not None:
                through_h = g_h if project is None else g_h @ project
                squares += [square_sum(g_c), square_sum(g_c + through_h * layer.c_to_h[j])]
            rows.append(torch.stack([*squares, common]))
            if stop == 0:
                break
            run, to_x, scale = self._back_to(layer, j - 1, g_h, g_c, direct, exponent, common)
            if to_x is not None:
                top = exponent_of(to_x)
                to_inputs.append(down_by(to_x, top))
                input_exponents.append(top + scale)
            top = exponent_of(run)
            run, scale = down_by(run, top), scale + top
        table = to_host(torch.stack(rows[::-1], 1))  # (kinds + 1, cuts, N)
        kinds = {"h": table[0]}
        if layer.c is not None:
            kinds |= {"c": table[2], "cut": table[0] + table[1]}
        norms = [StateNorms(state=name, level=level, squares=s, exponent=table[-1]) for name, s in kinds.items()]
        if not to_inputs:
            return norms, direct, exponent
        return norms, torch.cat(to_inputs[::-1]), torch.cat(input_exponents[::-1])

    def _back_to(
        self,
        layer: _Layer,
        j: int,
        g_h: torch.Tensor,
        g_c: torch.Tensor,
        direct: torch.Tensor,
        exponent: torch.Tensor,
        common: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return the gradient of the state at cut j and of the inputs up to the next cut, and their exponent."""
        start, stop = self.cuts[j], self.cuts[j + 1]
        scale = common
        inner: torch.Tensor | None = None
        if stop - start > 1:  # gradient enters between the cuts too, at a scale of its own
            scale = torch.maximum(common, exponent[start : stop - 1].amax(0))
            inner = down_by(direct[start : stop - 1], scale - exponent[start : stop - 1])
            g_h, g_c = down_by(g_h, scale - common), down_by(g_c, scale - common)
        x = layer.inputs[start:stop].detach()
        state = [layer.h[j : j + 1].detach().requires_grad_(True)]
        if layer.c is not None:
            state.append(layer.c[j : j + 1].detach().requires_grad_(True))
        leaves = list(state)
        if layer is not self._layers[0]:
            leaves.append(x.requires_grad_(True))
        with torch.enable_grad():
            outputs, last = layer.cell(x, state[0] if layer.c is None else tuple(state))
            heads = [last] if layer.c is None else list(last)
            cotangents = [g_h[None]] if layer.c is None else [g_h[None], g_c[None]]
            if inner is not None:
                heads.append(outputs)
                cotangents.append(torch.cat([inner, torch.zeros_like(inner[:1])]))
            grads = torch.autograd.grad(heads, leaves, cotangents)
        run = grads[0][0] if layer.c is None else torch.cat([grads[0][0], grads[1][0]], -1)
        return run, grads[-1] if len(grads) > len(state) else None, scale
