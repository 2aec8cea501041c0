"""The gradient of an LSTM or GRU back through time, split into the path along its memory and the rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gradlab.errors import UsageError

__all__ = ["CellGradient", "cell_gradient"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CellGradient:
    """Gradients with respect to the memory m_t, for t from T back to the first step: c_t of an LSTM, h_t of a GRU.

    Args:
        lag: T - t; shape (T,), 0 first.
        log_full: ln of the norm of v^T dm_T/dm_t by every path, per sample and then averaged; shape (T,).
        log_path: The same along the memory alone, where each step multiplies by its gate (f of an LSTM, z of a GRU):
            the product of the gates.
        path_error: Largest difference between that product and autograd with the state cut off where gates and
            candidate read it, relative to the largest entry of the product at the same t.
        gate_mean: Mean of the gate over time, samples and units.
        gate_geometric: exp of the mean of ln gate: what a product of gates decays by.
        gate_by_unit: Mean of each unit's gate; shape (hidden,).
    """

    lag: npt.NDArray[np.int64]
    log_full: npt.NDArray[np.float64]
    log_path: npt.NDArray[np.float64]
    path_error: float
    gate_mean: float
    gate_geometric: float
    gate_by_unit: npt.NDArray[np.float64]


def cell_gradient(net: nn.LSTM | nn.GRU, inputs: torch.Tensor, *, warmup: int = 100, seed: int = 0) -> CellGradient:
    """Measure the gradient of v^T m_T with respect to every earlier memory state, v Gaussian noise.

    By the chain rule dm_T/dm_t has one term along the memory, the diagonal product of the gates, and others that leave
    it: the state acts on gates and candidate, and these on the next memory. The first is computed as that product and,
    to check it, by autograd with the state cut off (detached) where gates and candidate read it; the total by autograd
    of everything.

    Args:
        net: One layer, one direction, no projection; computed in float64 by its own weights.
        inputs: Shape (warmup + T, batch, input_size).
        warmup: Steps from a zero state before the first that counts, so that gates and states are typical.
        seed: Of v.

    Returns:
        Norms over units; means over samples of the logarithm.

    Raises:
        UsageError: Another kind of module, or inputs that leave fewer than two steps after the warm-up.

    Source:
        Hochreiter & Schmidhuber 1997; Gers et al. 2000 (forget gate); Cho et al. 2014 (GRU). The split is derived here.
    """
    kinds = (nn.LSTM, nn.GRU)
    if not isinstance(net, kinds) or net.num_layers != 1 or net.bidirectional or net.proj_size:
        raise UsageError("cell_gradient needs an nn.LSTM or nn.GRU of one layer and one direction without proj_size.")
    if inputs.dim() != 3 or len(inputs) - warmup < 2:
        raise UsageError(
            f"cell_gradient needs inputs of shape (warmup + T, batch, input_size) with T of at least 2; got "
            f"{tuple(inputs.shape)} and warmup={warmup}."
        )
    x = inputs.double()
    weights = _Weights(net)
    zeros = x.new_zeros(x.shape[1], net.hidden_size)
    state = (zeros, zeros)
    with torch.no_grad():
        for step in x[:warmup]:
            state, _ = weights.step(step, state, cut=False)
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(zeros.shape, generator=generator, dtype=torch.float64)

    def gradients(*, cut: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        memories, gates = [], []
        now = (state[0].clone().requires_grad_(True), state[1].clone().requires_grad_(True))
        for step in x[warmup:]:
            now, gate = weights.step(step, now, cut=cut)
            memories.append(now[1])
            gates.append(gate.detach())
        grads = torch.autograd.grad((memories[-1] * v).sum(), memories)
        return list(reversed(grads)), gates

    full, gates = gradients(cut=False)
    alone, _ = gradients(cut=True)
    product, error, path = v, 0.0, [v]
    for lag, gate in enumerate(reversed(gates[1:]), start=1):
        product = product * gate
        path.append(product)
        error = max(error, float((alone[lag] - product).abs().max() / product.abs().max()))
    stacked = torch.stack(gates)
    return CellGradient(
        lag=np.arange(len(path)),
        log_full=_mean_log_norm(full),
        log_path=_mean_log_norm(path),
        path_error=error,
        gate_mean=float(stacked.mean()),
        gate_geometric=float(stacked.log().mean().exp()),
        gate_by_unit=stacked.mean((0, 1)).numpy(),
    )


class _Weights:
    """The equations of one step, with the net's own weights in float64."""

    def __init__(self, net: nn.LSTM | nn.GRU) -> None:
        def double(name: str) -> torch.Tensor:
            weight: torch.Tensor = getattr(net, name).detach().double()
            return weight

        self._lstm = isinstance(net, nn.LSTM)
        self._input, self._hidden = double("weight_ih_l0").T, double("weight_hh_l0").T
        zero = self._input.new_zeros(self._input.shape[1])
        self._input_bias = double("bias_ih_l0") if net.bias else zero
        self._hidden_bias = double("bias_hh_l0") if net.bias else zero

    def step(
        self, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor], *, cut: bool
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Return the next (h, memory) and the gate that keeps memory; `cut` detaches h where gates read it."""
        h, memory = state
        h = h.detach() if cut else h
        driven, recurrent = x @ self._input + self._input_bias, h @ self._hidden + self._hidden_bias
        if self._lstm:
            i, f, g, o = (driven + recurrent).chunk(4, dim=1)  # torch's order of gates
            keep = f.sigmoid()
            memory = keep * memory + i.sigmoid() * g.tanh()
            return (o.sigmoid() * memory.tanh(), memory), keep
        (r, z, n), (hr, hz, hn) = driven.chunk(3, dim=1), recurrent.chunk(3, dim=1)
        keep = (z + hz).sigmoid()  # torch's z keeps memory: h' = (1 - z) n + z h, the other way round than some papers
        memory = (1 - keep) * (n + (r + hr).sigmoid() * hn).tanh() + keep * memory
        return (memory, memory), keep


def _mean_log_norm(grads: list[torch.Tensor]) -> npt.NDArray[np.float64]:
    norms = torch.stack([grad.norm(dim=1) for grad in grads])
    out: npt.NDArray[np.float64] = norms.log().mean(1).numpy()
    return out
