"""Whole nets for sequences: recurrent ones, and those that read a window of the past (naive and Markov)."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from torch import nn
from torch.nn import functional

from gradlab.errors import UsageError
from gradlab.nets.checks import check_member, check_positive
from gradlab.nets.mlp import MLP
from gradlab.nets.names import CORES, HEADS, RECURRENT_INITIALIZATIONS
from gradlab.nets.recurrent_initialization import initialize_recurrent
from gradlab.nets.seeding import weights_from
from gradlab.nets.unrolled import Unrolled, check_nonlinearity

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GrowingContextNet", "MarkovNet", "SequenceNet", "as_features"]


def as_features(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Return a sequence as vectors: tokens one-hot, features as they are.

    Args:
        x: Tokens, int64, (N, T), each from 0 to size - 1; or features, floating point, (N, T, size).
        size: Number of different tokens, or of features.
        dtype: Type of the one-hot vectors.

    Returns:
        Vectors, (N, T, size).

    Raises:
        UsageError: Another shape or type, no step at all, or (on the CPU, where it can be seen without waiting) a
            token that does not exist.

    Example:
        >>> as_features(torch.tensor([[2, 0]]), 3, torch.float32).tolist()
        [[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]]
    """
    tokens = x.ndim == 2 and x.dtype in (torch.int64, torch.int32)
    features = x.ndim == 3 and x.is_floating_point() and x.shape[2] == size
    if not (tokens or features) or x.shape[1] < 1:
        raise UsageError(
            f"The inputs have shape {tuple(x.shape)} and type {x.dtype}, but this net takes integer tokens (N, T) "
            f"below {size} or floating-point features (N, T, {size}), with at least one step."
        )
    if features:
        return x
    try:
        # Not functional.one_hot, which reads the largest token back; an embedding also checks the range on the device.
        return functional.embedding(x, torch.eye(size, dtype=dtype, device=x.device))
    except IndexError as error:
        raise UsageError(
            f"The inputs hold tokens from {int(x.min())} to {int(x.max())}, but this net knows 0 to {size - 1}: "
            "enlarge input_size."
        ) from error


@final
class SequenceNet(nn.Module):
    """A recurrent net with a linear head: the latent autoregressive model, whose state sums up the past.

        h_t = core(x_t, h_{t-1}),   y_t = W h_t + b

    Attributes: `core` (torch's own fused `nn.RNN`, `nn.LSTM` or `nn.GRU`, batch first, or `Unrolled` where torch has
    no such core: nonlinearity "sigmoid") and `head` (`nn.Linear`).

    Args:
        core: "rnn", "lstm" or "gru".
        input_size: Features of a step, or number of different tokens, which are fed one-hot.
        hidden_size: Units of the state, H.
        outputs: Outputs of the head at one step.
        layers: Recurrent layers. Default 1.
        nonlinearity: Of core "rnn": "tanh", "relu" or "sigmoid".
        head: "last" reads the last step only; "every" each step.
        init: Of the recurrent layers, one of `RECURRENT_INITIALIZATIONS`; "identity" with "relu" is the IRNN. Gate
            biases are set afterwards, by `set_forget_bias`, `set_update_bias` or `chrono_init`.
        gain: Factor on the recurrent weights; see `initialize_recurrent`.
        input_gain: Factor on the input weights; see `initialize_recurrent`.
        seed: Seed of all weights, the head's too, which leaves torch's global random state untouched; None draws
            from the global generator.

    Raises:
        UsageError: An unknown name, a count below 1, a gain out of range, or a nonlinearity for a gated core; on a
            call, inputs of another shape, of no step or with a token that does not exist.

    Example:
        >>> net = SequenceNet("gru", input_size=2, hidden_size=8, outputs=1, seed=0)
        >>> net(torch.zeros(4, 100, 2)).shape
        torch.Size([4, 1])
        >>> SequenceNet("lstm", input_size=10, hidden_size=8, outputs=9, head="every")(torch.zeros(4, 7).long()).shape
        torch.Size([4, 7, 9])
    """

    def __init__(
        self,
        core: str,
        *,
        input_size: int,
        hidden_size: int,
        outputs: int,
        layers: int = 1,
        nonlinearity: str = "tanh",
        head: str = "last",
        init: str = "default",
        gain: float = 1.0,
        input_gain: float = 1.0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_member("core", core, CORES)
        check_member("head", head, HEADS)
        check_member("recurrent initialization", init, RECURRENT_INITIALIZATIONS)
        check_nonlinearity(core, nonlinearity)
        check_positive(input_size=input_size, hidden_size=hidden_size, outputs=outputs, layers=layers)
        self.input_size = input_size
        self.every_step = head == "every"
        with weights_from(seed, self):
            self.core: nn.Module
            if nonlinearity == "sigmoid":
                self.core = Unrolled(core, input_size, hidden_size, layers=layers, nonlinearity=nonlinearity)
            elif core == "rnn":
                self.core = nn.RNN(input_size, hidden_size, layers, nonlinearity=nonlinearity, batch_first=True)
            else:
                fused = nn.LSTM if core == "lstm" else nn.GRU
                self.core = fused(input_size, hidden_size, layers, batch_first=True)
            self.head = nn.Linear(hidden_size, outputs)
            if init != "default" or (gain, input_gain) != (1.0, 1.0):
                initialize_recurrent(self, init, gain=gain, input_gain=input_gain)

    def features(self, x: Tensor) -> Tensor:
        """Return the last layer's state of every step.

        Args:
            x: Tokens, int64, (N, T), or features, (N, T, input_size); T at least 1.

        Returns:
            h_1 to h_T, (N, T, hidden_size).

        Raises:
            UsageError: The inputs have another shape, or hold a token that does not exist.
        """
        states: Tensor = self.core(as_features(x, self.input_size, self.head.weight.dtype))[0]
        return states

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, outputs) with head "last", (N, T, outputs) with "every", for inputs as in `features`."""
        states = self.features(x)
        y: Tensor = self.head(states if self.every_step else states[:, -1])
        return y


@final
class MarkovNet(nn.Module):
    """A model that knows the last k steps only and loses all before: an MLP on x_{T-k+1} to x_T.

    Attribute: `mlp` (`MLP`), on the k vectors one after the other, oldest first; a sequence of fewer steps is
    padded with zero vectors on the left.

    Args:
        k: Steps it sees, the last one included.
        input_size: Features of a step, or number of different tokens, which are fed one-hot.
        outputs: Outputs.
        width: Units of each hidden layer. Default 64.
        depth: Hidden layers. Default 1.
        activation: One of `ACTIVATIONS`.
        seed: Seed of the weights, which leaves torch's global random state untouched; None draws from the global
            generator.

    Raises:
        UsageError: A count below 1 or an unknown activation; on a call, inputs as in `SequenceNet`.

    Example:
        >>> net = MarkovNet(2, input_size=4, outputs=2, seed=0)
        >>> x = torch.tensor([[1, 0, 3], [2, 0, 3]])
        >>> torch.equal(*net(x))  # they differ in the step before the last two only
        True

    Source:
        Markov 1906; the baseline of Bengio et al. 2003, A Neural Probabilistic Language Model, sec. 2.
    """

    def __init__(
        self,
        k: int,
        *,
        input_size: int,
        outputs: int,
        width: int = 64,
        depth: int = 1,
        activation: str = "relu",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_positive(k=k, input_size=input_size)
        self.k = k
        self.input_size = input_size
        with weights_from(seed, self):
            self.mlp = MLP(depth, width=width, in_features=k * input_size, classes=outputs, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs, (N, outputs), for tokens (N, T) or features (N, T, input_size)."""
        window = x[:, -self.k :] if x.ndim > 1 else x  # the check below refuses the latter in words
        vectors = as_features(window, self.input_size, self.mlp.head.weight.dtype)
        missing = self.k - vectors.shape[1]
        y: Tensor = self.mlp(functional.pad(vectors, (0, 0, missing, 0)))
        return y


@final
class GrowingContextNet(nn.Module):
    """The naive model: an MLP on the whole past, so it and its number of weights grow with the context.

    Attribute: `window` (`MarkovNet` with k = length). A sequence shorter than `length` is padded with zero vectors on
    the left; a longer one is refused, since nothing may be forgotten.

    Args:
        length: Longest context, in steps.
        input_size: Features of a step, or number of different tokens, which are fed one-hot.
        outputs: Outputs.
        width: Units of each hidden layer. Default 64.
        depth: Hidden layers. Default 1.
        activation: One of `ACTIVATIONS`.
        seed: As of `MarkovNet`.

    Raises:
        UsageError: A count below 1 or an unknown activation; on a call, inputs as in `SequenceNet` or longer than
            `length`.

    Example:
        >>> from gradlab.nets import parameter_count
        >>> [parameter_count(GrowingContextNet(length, input_size=4, outputs=2)) for length in (32, 64)]
        [8386, 16578]
    """

    def __init__(
        self,
        length: int,
        *,
        input_size: int,
        outputs: int,
        width: int = 64,
        depth: int = 1,
        activation: str = "relu",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_positive(length=length)
        self.length = length
        self.window = MarkovNet(
            length, input_size=input_size, outputs=outputs, width=width, depth=depth, activation=activation, seed=seed
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs, (N, outputs), for tokens (N, T) or features (N, T, input_size), T at most `length`."""
        if x.ndim > 1 and x.shape[1] > self.length:
            raise UsageError(
                f"The inputs have {x.shape[1]} steps, but this net's context holds {self.length}: give a longer "
                "`length`, or a MarkovNet if the past may be forgotten."
            )
        y: Tensor = self.window(x)
        return y
