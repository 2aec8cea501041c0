"""What is trained: plain and residual nets that differ in the skip only, nets for sequences, and initialisations.

The names resolve lazily, so that `import gradlab.nets` and the plain tuples of names cost no import of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradlab.nets.names import (
    ACTIVATIONS,
    CORES,
    FAMILIES,
    GROWTHS,
    HEADS,
    INITIALIZATIONS,
    NONLINEARITIES,
    NORMS,
    PADDING_MODES,
    POSITIONS,
    PUBLISHED,
    RECURRENT_INITIALIZATIONS,
)

if TYPE_CHECKING:
    from gradlab.nets.cifar import CifarNet
    from gradlab.nets.convnet import ConvNet, loss_with_heads
    from gradlab.nets.counts import parameter_count
    from gradlab.nets.imagenet_alexnet import alexnet
    from gradlab.nets.imagenet_densenet import DenseLayer, densenet
    from gradlab.nets.imagenet_googlenet import Inception, googlenet
    from gradlab.nets.imagenet_resnet import resnet
    from gradlab.nets.imagenet_vgg import vgg
    from gradlab.nets.initialization import initialize, weight_variance
    from gradlab.nets.mlp import MLP, activation_module
    from gradlab.nets.published import published_net
    from gradlab.nets.recurrent import GRUCell, GRUGates, LSTMCell, LSTMGates, RNNCell
    from gradlab.nets.recurrent_initialization import (
        chrono_init,
        initialize_recurrent,
        set_forget_bias,
        set_update_bias,
    )
    from gradlab.nets.residual import Add, Fork, OptionA, PlainBlock, ResidualBlock
    from gradlab.nets.sequence import GrowingContextNet, MarkovNet, SequenceNet
    from gradlab.nets.small_nets import growth_stack, small_net
    from gradlab.nets.transformer import CausalSelfAttention, CausalTransformer, sinusoidal_positions
    from gradlab.nets.unrolled import Unrolled

__all__ = [
    "ACTIVATIONS",
    "CORES",
    "FAMILIES",
    "GROWTHS",
    "HEADS",
    "INITIALIZATIONS",
    "MLP",
    "NONLINEARITIES",
    "NORMS",
    "PADDING_MODES",
    "POSITIONS",
    "PUBLISHED",
    "RECURRENT_INITIALIZATIONS",
    "Add",
    "CausalSelfAttention",
    "CausalTransformer",
    "CifarNet",
    "ConvNet",
    "DenseLayer",
    "Fork",
    "GRUCell",
    "GRUGates",
    "GrowingContextNet",
    "Inception",
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
    "alexnet",
    "chrono_init",
    "densenet",
    "googlenet",
    "growth_stack",
    "initialize",
    "initialize_recurrent",
    "loss_with_heads",
    "parameter_count",
    "published_net",
    "resnet",
    "set_forget_bias",
    "set_update_bias",
    "sinusoidal_positions",
    "small_net",
    "vgg",
    "weight_variance",
]

_HOMES = {
    "Add": "residual",
    "CausalSelfAttention": "transformer",
    "CausalTransformer": "transformer",
    "CifarNet": "cifar",
    "ConvNet": "convnet",
    "DenseLayer": "imagenet_densenet",
    "Fork": "residual",
    "GRUCell": "recurrent",
    "GRUGates": "recurrent",
    "GrowingContextNet": "sequence",
    "Inception": "imagenet_googlenet",
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
    "alexnet": "imagenet_alexnet",
    "chrono_init": "recurrent_initialization",
    "densenet": "imagenet_densenet",
    "googlenet": "imagenet_googlenet",
    "growth_stack": "small_nets",
    "initialize": "initialization",
    "initialize_recurrent": "recurrent_initialization",
    "loss_with_heads": "convnet",
    "parameter_count": "counts",
    "published_net": "published",
    "resnet": "imagenet_resnet",
    "set_forget_bias": "recurrent_initialization",
    "set_update_bias": "recurrent_initialization",
    "sinusoidal_positions": "transformer",
    "small_net": "small_nets",
    "vgg": "imagenet_vgg",
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
