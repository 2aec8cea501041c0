"""The names the nets know, importable without torch so that a command line can list them."""

from __future__ import annotations

import math

__all__ = [
    "ACTIVATIONS",
    "CORES",
    "FAMILIES",
    "GROWTHS",
    "HEADS",
    "INITIALIZATIONS",
    "NONLINEARITIES",
    "NORMS",
    "PADDING_MODES",
    "POSITIONS",
    "PUBLISHED",
    "RECURRENT_INITIALIZATIONS",
    "two_slopes",
]

INITIALIZATIONS = ("default", "lecun_normal", "glorot_normal", "glorot_uniform", "he_normal", "orthogonal")
"""Weight initialisations of `initialize`; "default" is torch's own."""

NORMS = ("batch", "none")
"""Normalisations of the nets: BatchNorm after every weight layer but the head, or nothing."""

ACTIVATIONS = (
    "relu",
    "tanh",
    "sigmoid",
    "leaky_relu",
    "elu",
    "selu",
    "gelu",
    "silu",
    "softplus",
    "softsign",
    "hardtanh",
    "linear",
)
"""Activations of `activation_module`, spelt as in `torch.nn.functional`; "linear" is the identity."""

PADDING_MODES = ("zeros", "circular", "replicate")
"""Paddings of the convolutions. Torch's "reflect" is left out: it cannot pad the 1x1 maps of a 4x4 input."""

CORES = ("rnn", "lstm", "gru")
"""Recurrent cores of `SequenceNet` and `Unrolled`."""

NONLINEARITIES = ("tanh", "relu", "sigmoid")
"""Nonlinearities of the vanilla recurrent net; torch's own `nn.RNN` has the first two."""

RECURRENT_INITIALIZATIONS = ("default", "gaussian", "orthogonal", "identity")
"""Initialisations of `initialize_recurrent`; "default" is torch's own."""

HEADS = ("last", "every")
"""Where a sequence net's head reads: the last step or every step."""

POSITIONS = ("learned", "sinusoidal")
"""Position codes of `CausalTransformer`."""

FAMILIES = ("alexnet", "vgg", "googlenet", "resnet", "densenet")
"""Families of convolutional nets, in the order of their papers."""

GROWTHS = ("plain", "residual", "dense")
"""How a layer's output joins its input in `growth_stack`: alone, by addition, by concatenation."""

PUBLISHED = {
    "alexnet": ("AlexNet", "AlexNet one tower"),
    "vgg": ("VGG-11", "VGG-13", "VGG-16", "VGG-19"),
    "googlenet": ("GoogLeNet", "GoogLeNet with heads"),
    "resnet": ("ResNet-18", "ResNet-34", "ResNet-50", "ResNet-101", "ResNet-152"),
    "densenet": ("DenseNet-121", "DenseNet-169", "DenseNet-201"),
}
"""The published nets of each family, by the names that `published_net` knows."""


def two_slopes(name: str) -> tuple[float, float] | None:
    """Return the slopes below and above 0 that a name such as "0.2:1.5" stands for, or None for any other name.

    Example:
        >>> two_slopes("0.2:1.5"), two_slopes("tanh")
        ((0.2, 1.5), None)
    """
    below, colon, above = name.partition(":")
    if not colon:
        return None
    try:
        slopes = float(below), float(above)
    except ValueError:
        return None
    return slopes if all(math.isfinite(slope) for slope in slopes) else None
