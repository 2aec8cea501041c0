"""Multilayer perceptrons, plain and residual, of one width."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, final

from torch import nn

from gradlab.errors import UsageError
from gradlab.nets.checks import check_member, check_positive, check_skipinit
from gradlab.nets.names import ACTIVATIONS, NORMS
from gradlab.nets.residual import PlainBlock, ResidualBlock

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["MLP", "activation_module"]

_ACTIVATION_CLASSES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "hardtanh": nn.Hardtanh,
    "linear": nn.Identity,
}


def activation_module(name: str) -> nn.Module:
    """Return a new activation module, not in place, with torch's default settings.

    Args:
        name: One of `ACTIVATIONS`, spelt as in `torch.nn.functional`; "linear" is the identity.

    Returns:
        A module of its own for each call, so that hooks see each use.

    Raises:
        UsageError: Unknown name.

    Example:
        >>> activation_module("leaky_relu")
        LeakyReLU(negative_slope=0.01)
    """
    check_member("activation", name, ACTIVATIONS)
    return _ACTIVATION_CLASSES[name]()


@final
class MLP(nn.Module):
    """`depth` hidden layers of one width and a linear head, plain or residual.

    With f_l = activation(norm(W_l h + b_l)):

        h_1 = f_1(x),  h_l = f_l(h_{l-1})  (plain)  or  h_{l-1} + alpha_l f_l(h_{l-1})  (residual),  l = 2 .. depth

    and logits W h_depth + b. Nothing follows the sum, so the skip path is the identity from h_1 to the head.
    Attributes: `stem` (f_1), `blocks` (`PlainBlock` or `ResidualBlock`, f_2 to f_depth) and `head`.

    Args:
        depth: Hidden layers, at least 1; the head is not counted, so there are depth + 1 weight matrices.
        width: Units of each hidden layer.
        in_features: Entries of one input; images are flattened.
        classes: Outputs of the head.
        activation: One of `ACTIVATIONS`.
        norm: "none", or "batch" for BatchNorm between each hidden weight layer and its activation.
        skip: Whether layers 2 to depth are residual. Both kinds have the same parameter names and shapes.
        skipinit: Whether a learnable scalar alpha_l that starts at 0 scales each branch (else 1); needs skip.
        bias: Whether the linear layers have biases, as torch's do. Under norm "batch" those of the hidden layers
            have no effect, as the mean is taken off again.

    Raises:
        UsageError: A count below 1, an unknown activation or norm, or skipinit without skip; on a call, inputs of
            another size.

    Note:
        Weights are torch's default: `initialize` draws others.

    Example:
        >>> import torch
        >>> MLP(3, width=5, in_features=64, classes=10, skip=True)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int,
        *,
        width: int,
        in_features: int,
        classes: int,
        activation: str = "relu",
        norm: str = "none",
        skip: bool = False,
        skipinit: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_positive(depth=depth, width=width, in_features=in_features, classes=classes)
        check_member("activation", activation, ACTIVATIONS)
        check_member("norm", norm, NORMS)
        check_skipinit(skip=skip, skipinit=skipinit)
        self.depth = depth
        self.in_features = in_features

        def hidden(fan_in: int) -> nn.Sequential:
            layers: OrderedDict[str, nn.Module] = OrderedDict(linear=nn.Linear(fan_in, width, bias=bias))
            if norm == "batch":
                layers["norm"] = nn.BatchNorm1d(width)
            layers["activation"] = activation_module(activation)
            return nn.Sequential(layers)

        def block() -> nn.Module:
            return ResidualBlock(hidden(width), skipinit=skipinit) if skip else PlainBlock(hidden(width))

        self.stem = hidden(in_features)
        self.blocks = nn.Sequential(*(block() for _ in range(depth - 1)))
        self.head = nn.Linear(width, classes, bias=bias)

    def features(self, x: Tensor) -> Tensor:
        """Return the last hidden layer's output.

        Args:
            x: Inputs, (N, in_features) or any (N, ...) with as many entries each.

        Returns:
            h_depth, (N, width).

        Raises:
            UsageError: The inputs have another size.
        """
        if x.ndim < 2 or x.shape[1:].numel() != self.in_features:
            raise UsageError(
                f"The inputs have shape {tuple(x.shape)}, but this net takes (N, ...) with {self.in_features} entries "
                "each: reshape them, or set in_features."
            )
        hidden: Tensor = self.blocks(self.stem(x.flatten(1)))
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (N, classes), of inputs as in `features`."""
        logits: Tensor = self.head(self.features(x))
        return logits
