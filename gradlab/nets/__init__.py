"""What is trained: plain and residual nets that differ in the skip only, nets for sequences, and initialisations.

The names resolve lazily, so that `import gradlab.nets` and the plain tuples of names cost no import of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradlab.nets.names import (
    ACTIVATIONS,
    CORES,
    HEADS,
    INITIALIZATIONS,
    NONLINEARITIES,
    NORMS,
    PADDING_MODES,
    POSITIONS,
    RECURRENT_INITIALIZATIONS,
)

if TYPE_CHECKING:
    from gradlab.nets.cifar import CifarNet
    from gradlab.nets.counts import parameter_count
    from gradlab.nets.initialization import initialize, weight_variance
    from gradlab.nets.mlp import MLP, activation_module
    from gradlab.nets.recurrent import GRUCell, GRUGates, LSTMCell, LSTMGates, RNNCell
    from gradlab.nets.recurrent_initialization import (
        chrono_init,
        initialize_recurrent,
        set_forget_bias,
        set_update_bias,
    )
    from gradlab.nets.residual import Add, Fork, OptionA, PlainBlock, ResidualBlock
    from gradlab.nets.sequence import GrowingContextNet, MarkovNet, SequenceNet
    from gradlab.nets.transformer import CausalSelfAttention, CausalTransformer, sinusoidal_positions
    from gradlab.nets.unrolled import Unrolled

__all__ = [
    "ACTIVATIONS",
    "CORES",
    "HEADS",
    "INITIALIZATIONS",
    "MLP",
    "NONLINEARITIES",
    "NORMS",
    "PADDING_MODES",
    "POSITIONS",
    "RECURRENT_INITIALIZATIONS",
    "Add",
    "CausalSelfAttention",
    "CausalTransformer",
    "CifarNet",
    "Fork",
    "GRUCell",
    "GRUGates",
    "GrowingContextNet",
    "LSTMCell",
    "LSTMGates",
    "MarkovNet",
    "OptionA",
    "PlainBlock",
    "RNNCell",
    "ResidualBlock",
    "SequenceNet",
    "Unrolled",
    "activation_module",
    "chrono_init",
    "initialize",
    "initialize_recurrent",
    "parameter_count",
    "set_forget_bias",
    "set_update_bias",
    "sinusoidal_positions",
    "weight_variance",
]

_HOMES = {
    "Add": "residual",
    "CausalSelfAttention": "transformer",
    "CausalTransformer": "transformer",
    "CifarNet": "cifar",
    "Fork": "residual",
    "GRUCell": "recurrent",
    "GRUGates": "recurrent",
    "GrowingContextNet": "sequence",
    "LSTMCell": "recurrent",
    "LSTMGates": "recurrent",
    "MLP": "mlp",
    "MarkovNet": "sequence",
    "OptionA": "residual",
    "PlainBlock": "residual",
    "RNNCell": "recurrent",
    "ResidualBlock": "residual",
    "SequenceNet": "sequence",
    "Unrolled": "unrolled",
    "activation_module": "mlp",
    "chrono_init": "recurrent_initialization",
    "initialize": "initialization",
    "initialize_recurrent": "recurrent_initialization",
    "parameter_count": "counts",
    "set_forget_bias": "recurrent_initialization",
    "set_update_bias": "recurrent_initialization",
    "sinusoidal_positions": "transformer",
    "weight_variance": "initialization",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # later look-ups no longer pass here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
