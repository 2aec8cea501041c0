"""Recurrent cells written out from their equations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, final

import torch
from torch import nn
from torch.nn import functional

from gradlab.nets.checks import check_member, check_positive
from gradlab.nets.names import NONLINEARITIES

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GRUCell", "GRUGates", "LSTMCell", "LSTMGates", "RNNCell"]

_NONLINEARITY_FUNCTIONS = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}


class LSTMGates(NamedTuple):
    """What one LSTM step computes from its input and h: each (N, H), in torch's order of the weight blocks.

    Args:
        input: i, how much of the candidate is written into the cell, in (0, 1).
        forget: f, how much of the old cell is kept, in (0, 1).
        candidate: C~ (torch's g), what would be written, in (-1, 1).
        output: o, how much of the cell is shown as h, in (0, 1).
    """

    input: Tensor
    forget: Tensor
    candidate: Tensor
    output: Tensor


class GRUGates(NamedTuple):
    """What one GRU step computes from its input and h: each (N, H), in torch's order of the weight blocks.

    Args:
        reset: r, how much of W h enters the candidate, in (0, 1).
        update: z, how much of the old h is *kept*, in (0, 1); in Cho et al. too, while many texts swap z and 1 - z.
        candidate: n, what would be written, in (-1, 1).
    """

    reset: Tensor
    update: Tensor
    candidate: Tensor


class _Weights(nn.Module):
    """The four parameters every cell has, under torch's names and in torch's order and distribution."""

    def __init__(self, input_size: int, hidden_size: int, blocks: int) -> None:
        super().__init__()
        check_positive(input_size=input_size, hidden_size=hidden_size)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.weight_ih = nn.Parameter(torch.empty(blocks * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(blocks * hidden_size, hidden_size))
        self.bias_ih = nn.Parameter(torch.empty(blocks * hidden_size))
        self.bias_hh = nn.Parameter(torch.empty(blocks * hidden_size))
        bound = 1 / math.sqrt(hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def from_input(self, x: Tensor) -> Tensor:
        """Return W_ih x + b_ih, all blocks, (N, blocks H)."""
        return functional.linear(x, self.weight_ih, self.bias_ih)

    def from_hidden(self, h: Tensor) -> Tensor:
        """Return W_hh h + b_hh, all blocks, (N, blocks H)."""
        return functional.linear(h, self.weight_hh, self.bias_hh)

    def extra_repr(self) -> str:
        """Return what `print` shows of the settings."""
        return f"{self.input_size}, {self.hidden_size}"


@final
class RNNCell(_Weights):
    """One step of the vanilla recurrent net.

        h' = phi(W_ih x + b_ih + W_hh h + b_hh)

    Args:
        input_size: Entries of x.
        hidden_size: Entries of h, H.
        nonlinearity: phi: "tanh" (the default, torch's), "relu" or "sigmoid", which torch's own cell lacks.

    Raises:
        UsageError: A size below 1 or an unknown nonlinearity.

    Note:
        Parameter names, shapes and default distribution are those of `nn.RNNCell`: state dicts load both ways.

    Example:
        >>> RNNCell(3, 5, nonlinearity="sigmoid")(torch.zeros(2, 3), torch.zeros(2, 5)).shape
        torch.Size([2, 5])

    Source:
        Elman 1990, Finding Structure in Time; the formula as in `torch.nn.RNNCell`.
    """

    def __init__(self, input_size: int, hidden_size: int, *, nonlinearity: str = "tanh") -> None:
        check_member("nonlinearity", nonlinearity, NONLINEARITIES)
        super().__init__(input_size, hidden_size, blocks=1)
        self.nonlinearity = nonlinearity

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Return h', (N, H), from the input x, (N, input_size), and the state h, (N, H)."""
        return _NONLINEARITY_FUNCTIONS[self.nonlinearity](self.from_input(x) + self.from_hidden(h))

    def extra_repr(self) -> str:
        """Return what `print` shows of the settings."""
        return f"{super().extra_repr()}, nonlinearity={self.nonlinearity}"


@final
class LSTMCell(_Weights):
    """One step of the LSTM: the cell state c is added to, and h is what the output gate shows of it.

        i = sigma(W_i x + U_i h + b_i)      input gate
        f = sigma(W_f x + U_f h + b_f)      forget gate
        C~ = tanh(W_C x + U_C h + b_C)      candidate (update)
        o = sigma(W_o x + U_o h + b_o)      output gate
        c' = f * c + i * C~
        h' = o * tanh(c')

    Along the cell alone dc'/dc = diag(f): the gates see c only through h.

    Args:
        input_size: Entries of x.
        hidden_size: Entries of h and of c, H.

    Raises:
        UsageError: A size below 1.

    Note:
        Each b is the sum of two parameters, bias_ih and bias_hh, and the four blocks are stacked in the order i, f,
        C~, o, as in `nn.LSTMCell`: state dicts load both ways. `gates` and `next_state` are apart so that a study
        can cut one path (`gates(x, h.detach())`) and leave the other.

    Example:
        >>> h, c = LSTMCell(3, 5)(torch.zeros(2, 3), (torch.zeros(2, 5), torch.zeros(2, 5)))
        >>> h.shape == c.shape == (2, 5)
        True

    Source:
        Hochreiter & Schmidhuber 1997; Gers, Schmidhuber & Cummins 2000 (forget gate).
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size, blocks=4)

    def gates(self, x: Tensor, h: Tensor) -> LSTMGates:
        """Return the three gates and the candidate, each (N, H)."""
        i, f, candidate, o = (self.from_input(x) + self.from_hidden(h)).chunk(4, dim=-1)
        return LSTMGates(torch.sigmoid(i), torch.sigmoid(f), torch.tanh(candidate), torch.sigmoid(o))

    def next_state(self, gates: LSTMGates, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return h' and c', each (N, H), from the gates and the old cell state."""
        c = gates.forget * c + gates.input * gates.candidate
        return gates.output * torch.tanh(c), c

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return (h', c') from the input x, (N, input_size), and the state (h, c), each (N, H)."""
        h, c = state
        return self.next_state(self.gates(x, h), c)


@final
class GRUCell(_Weights):
    """One step of the GRU: two gates and no cell state.

        r = sigma(W_r x + b_r + U_r h + d_r)            reset gate
        z = sigma(W_z x + b_z + U_z h + d_z)            update gate
        n = tanh(W_n x + b_n + r * (U_n h + d_n))       candidate
        h' = (1 - z) * n + z * h

    Args:
        input_size: Entries of x.
        hidden_size: Entries of h, H.

    Raises:
        UsageError: A size below 1.

    Note:
        Blocks are stacked in the order r, z, n, as in `nn.GRUCell`: state dicts load both ways. z near 1 keeps the
        memory here, so a bias for long memory is positive; texts that write h' = z n + (1 - z) h turn the sign. The
        reset gate acts after the product with U_n (cuDNN's form); Cho et al. apply it to h before.

    Example:
        >>> GRUCell(3, 5)(torch.zeros(2, 3), torch.zeros(2, 5)).shape
        torch.Size([2, 5])

    Source:
        Cho et al. 2014 (arXiv 1406.1078), sec. 2.3; the formula as in `torch.nn.GRUCell`.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size, blocks=3)

    def gates(self, x: Tensor, h: Tensor) -> GRUGates:
        """Return the two gates and the candidate, each (N, H)."""
        x_r, x_z, x_n = self.from_input(x).chunk(3, dim=-1)
        h_r, h_z, h_n = self.from_hidden(h).chunk(3, dim=-1)
        reset = torch.sigmoid(x_r + h_r)
        return GRUGates(reset, torch.sigmoid(x_z + h_z), torch.tanh(x_n + reset * h_n))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Return h', (N, H), from the input x, (N, input_size), and the state h, (N, H)."""
        gates = self.gates(x, h)
        return (1 - gates.update) * gates.candidate + gates.update * h
