"""A loop over time around the recurrent cells that equals torch's fused modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn

from gradlab.errors import UsageError
from gradlab.nets.checks import check_member, check_positive
from gradlab.nets.names import CORES, NONLINEARITIES
from gradlab.nets.recurrent import GRUCell, LSTMCell, RNNCell

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Unrolled", "check_nonlinearity"]


@final
class Unrolled(nn.Module):
    """A readable recurrent net: a loop over time around `RNNCell`, `LSTMCell` or `GRUCell`, one cell a layer.

    Equal to rounding to `nn.RNN`, `nn.LSTM` and `nn.GRU` with `batch_first=True` and the same weights, and slower.
    Attribute: `cells`; a hook on one of them fires once a step.

    Args:
        core: "rnn", "lstm" or "gru".
        input_size: Entries of the input at one step.
        hidden_size: Entries of the state, H.
        layers: Cells on top of each other. Default 1.
        nonlinearity: Of core "rnn" only; see `RNNCell`.

    Raises:
        UsageError: An unknown name, a count below 1, or a nonlinearity for a gated core; on a call, inputs of
            another shape or of no step.

    Example:
        >>> output, (h, c) = Unrolled("lstm", 3, 5, layers=2)(torch.zeros(4, 7, 3))
        >>> output.shape, h.shape
        (torch.Size([4, 7, 5]), torch.Size([2, 4, 5]))
    """

    def __init__(
        self, core: str, input_size: int, hidden_size: int, *, layers: int = 1, nonlinearity: str = "tanh"
    ) -> None:
        super().__init__()
        check_member("core", core, CORES)
        check_positive(input_size=input_size, hidden_size=hidden_size, layers=layers)
        check_nonlinearity(core, nonlinearity)
        self.core = core
        self.input_size = input_size
        self.hidden_size = hidden_size

        def cell(fan_in: int) -> nn.Module:
            if core == "rnn":
                return RNNCell(fan_in, hidden_size, nonlinearity=nonlinearity)
            return (LSTMCell if core == "lstm" else GRUCell)(fan_in, hidden_size)

        self.cells = nn.ModuleList(cell(hidden_size if layer else input_size) for layer in range(layers))

    @classmethod
    def copy_of(cls, fused: nn.RNNBase) -> Unrolled:
        """Return the readable twin of a fused module, with copies of its weights, on its device, in its dtype.

        Args:
            fused: An `nn.RNN`, `nn.LSTM` or `nn.GRU`, of any number of layers, with biases.

        Returns:
            A net that takes batch-first inputs, whatever `fused.batch_first` is.

        Raises:
            UsageError: The module is bidirectional, has projections or dropout, or no biases.

        Example:
            >>> fused = nn.GRU(3, 5, batch_first=True)
            >>> x = torch.ones(2, 7, 3)
            >>> torch.allclose(Unrolled.copy_of(fused)(x)[0], fused(x)[0], atol=1e-6)
            True
        """
        unsupported = {
            "bidirectional": fused.bidirectional, "proj_size": fused.proj_size, "dropout": fused.dropout,
            "bias=False": not fused.bias,
        }  # fmt: skip
        found = [name for name, used in unsupported.items() if used]
        if found:
            raise UsageError(
                f"A {type(fused).__name__} with {' and '.join(found)} has no unrolled twin: use one direction, with "
                "biases, without projection and dropout."
            )
        core = fused.mode.partition("_")[0].lower()
        nonlinearity = fused.mode.partition("_")[2].lower() or "tanh"
        with torch.device("meta"):  # neither memory nor random numbers for weights that are copied anyway
            twin = cls(core, fused.input_size, fused.hidden_size, layers=fused.num_layers, nonlinearity=nonlinearity)
        state = {
            f"cells.{layer}.{name}": getattr(fused, f"{name}_l{layer}").detach().clone()
            for layer in range(fused.num_layers)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        twin.load_state_dict(state, assign=True)
        return twin

    def forward(
        self, x: Tensor, state: Tensor | tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """Return the last layer's h of every step, and the last state of every layer.

        Args:
            x: Inputs, (N, T, input_size), T at least 1.
            state: h_0, (layers, N, H), or for core "lstm" (h_0, c_0); None is zeros.

        Returns:
            Outputs, (N, T, H), and h_T, (layers, N, H), or (h_T, c_T): what torch's modules return.

        Raises:
            UsageError: The inputs have another shape.
        """
        if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] != self.input_size:
            raise UsageError(
                f"The inputs have shape {tuple(x.shape)}, but this net takes (N, T, {self.input_size}) with at least "
                "one step."
            )
        if state is None:
            zeros = x.new_zeros(len(self.cells), len(x), self.hidden_size)
            state = (zeros, zeros) if self.core == "lstm" else zeros
        steps = x.unbind(1)
        last: list[Any] = []  # h, or (h, c), of each layer after the last step
        for layer, cell in enumerate(self.cells):
            now = (state[0][layer], state[1][layer]) if self.core == "lstm" else state[layer]
            outputs = []
            for step in steps:
                now = cell(step, now)
                outputs.append(now[0] if self.core == "lstm" else now)
            steps = tuple(outputs)
            last.append(now)
        output = torch.stack(steps, dim=1)
        if self.core == "lstm":
            return output, (torch.stack([h for h, _ in last]), torch.stack([c for _, c in last]))
        return output, torch.stack(last)


def check_nonlinearity(core: str, nonlinearity: str) -> None:
    """Raise unless the nonlinearity is known and, for a gated core, left at its default."""
    check_member("nonlinearity", nonlinearity, NONLINEARITIES)
    if core != "rnn" and nonlinearity != "tanh":
        raise UsageError(
            f"The nonlinearity '{nonlinearity}' was asked for with core '{core}', whose nonlinearities are fixed: use "
            "core 'rnn' or leave it out."
        )
