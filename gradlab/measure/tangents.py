"""One step of a stock recurrent layer together with its tangent map, written out."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from gradlab.errors import UsageError

__all__ = ["Step", "TangentStep", "tangent_step"]

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(input (N, in), state (N, n)) to the next state: any recurrent net that treats samples alike and apart."""

TangentStep = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(input (N, in), state (N, n), tangents (N, k, n)) to the next state and the tangents J v, in the same shapes."""


def tangent_step(module: nn.Module | Step, state_size: int | None = None) -> tuple[TangentStep, int]:
    """Return the step of a recurrent layer with its tangent map in float64, and the size n of its state.

    The state is h, or h and c of an LSTM one after the other. The tangent map is J v, J = d state_{t+1} / d state_t.

    Args:
        module: nn.RNN, nn.GRU or nn.LSTM with one layer and one direction, without projection; with `state_size`, any
            differentiable step in float64.
        state_size: n of such a step.

    Returns:
        The step and n.

    Raises:
        UsageError: Any other module.

    Example:
        >>> step, size = tangent_step(nn.LSTM(2, 3))
        >>> h, v = step(torch.zeros(1, 2).double(), torch.zeros(1, 6).double(), torch.ones(1, 4, 6).double())
        >>> size, h.shape, v.shape
        (6, torch.Size([1, 6]), torch.Size([1, 4, 6]))
    """
    if state_size is not None:
        if isinstance(state_size, bool) or not isinstance(state_size, int) or state_size < 1:
            raise UsageError(f"state_size is {state_size!r}, but must be a whole number of at least 1.")
        if isinstance(module, nn.RNNBase) or not callable(module):
            raise UsageError(f"state_size is for a step (input, state) -> state, not a {type(module).__name__}.")
        return _by_autograd(module), state_size
    if not isinstance(module, nn.RNN | nn.GRU | nn.LSTM):
        raise UsageError(
            f"The module is a {type(module).__name__}, but must be an nn.RNN, nn.GRU or nn.LSTM: for another net give "
            "its step (input, state) -> state, and state_size."
        )
    if module.num_layers != 1 or module.bidirectional or module.proj_size:
        raise UsageError(
            f"The module has {module.num_layers} layers, bidirectional={module.bidirectional} and proj_size="
            f"{module.proj_size}, but must be one layer in one direction without projection: take a layer alone."
        )
    weights = dict(copy.deepcopy(module).double().requires_grad_(False).named_parameters())
    w_ih, w_hh = weights["weight_ih_l0"], weights["weight_hh_l0"]
    zero = w_hh.new_zeros(len(w_hh))
    b_ih, b_hh = weights.get("bias_ih_l0", zero), weights.get("bias_hh_l0", zero)
    size = module.hidden_size

    def rnn(x: torch.Tensor, h: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = x @ w_ih.T + b_ih + h @ w_hh.T + b_hh
        if module.nonlinearity == "relu":
            return z.relu(), (v @ w_hh.T) * (z > 0).to(z).unsqueeze(1)
        new = z.tanh()
        return new, (v @ w_hh.T) * (1 - new * new).unsqueeze(1)

    def gru(x: torch.Tensor, h: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (ar, az, an), (br, bz, bn) = (x @ w_ih.T + b_ih).chunk(3, 1), (h @ w_hh.T + b_hh).chunk(3, 1)
        r, z = (ar + br).sigmoid(), (az + bz).sigmoid()
        n = (an + r * bn).tanh()
        dr, dz, dn = (v @ w_hh.T).chunk(3, 2)
        r_, z_, n_, bn_, h_ = (t.unsqueeze(1) for t in (r, z, n, bn, h))
        dr, dz = r_ * (1 - r_) * dr, z_ * (1 - z_) * dz
        dn = (1 - n_ * n_) * (dr * bn_ + r_ * dn)
        return (1 - z) * n + z * h, (1 - z_) * dn + z_ * v + dz * (h_ - n_)

    def lstm(x: torch.Tensor, state: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h, c = state[:, :size], state[:, size:]
        i, f, g, o = (x @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        new_c = f * c + i * g
        squashed = new_c.tanh()
        di, df, dg, do = (v[..., :size] @ w_hh.T).chunk(4, 2)
        i_, f_, g_, o_, c_, s_ = (t.unsqueeze(1) for t in (i, f, g, o, c, squashed))
        dc = f_ * v[..., size:] + c_ * f_ * (1 - f_) * df + g_ * i_ * (1 - i_) * di + i_ * (1 - g_ * g_) * dg
        dh = s_ * o_ * (1 - o_) * do + o_ * (1 - s_ * s_) * dc
        return torch.cat([o * squashed, new_c], 1), torch.cat([dh, dc], 2)

    if isinstance(module, nn.LSTM):
        return lstm, 2 * size
    return (gru if isinstance(module, nn.GRU) else rnn), size


def _by_autograd(step: Step) -> TangentStep:
    def moved(x: torch.Tensor, state: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The backward pass u -> J^T u is linear in u, so its own backward pass is v -> J v. (torch.func.jvp loads
        # torch.jit and its deprecation warning.)
        with torch.enable_grad():
            start = state.detach().requires_grad_(True)
            new = step(x, start)
            u = torch.zeros_like(new, requires_grad=True)
            (back,) = torch.autograd.grad(new, start, u, create_graph=True)
            images = [torch.autograd.grad(back, u, one, retain_graph=True)[0] for one in v.unbind(1)]
        return new.detach(), torch.stack(images, 1)

    return moved
