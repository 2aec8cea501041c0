"""Initialisations of recurrent layers: recurrent weights by name, and biases that set how long a gate remembers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from gradlab.errors import UsageError
from gradlab.nets.checks import check_member
from gradlab.nets.initialization import empty_on_cpu
from gradlab.nets.names import RECURRENT_INITIALIZATIONS
from gradlab.nets.recurrent import GRUCell, LSTMCell, RNNCell

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["chrono_init", "initialize_recurrent", "set_forget_bias", "set_update_bias"]

Model = TypeVar("Model", bound=nn.Module)

_LSTM = (nn.LSTM, nn.LSTMCell, LSTMCell)
_GRU = (nn.GRU, nn.GRUCell, GRUCell)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase, RNNCell, LSTMCell, GRUCell)
# Places of the blocks among the stacked gates: i, f, g, o for the LSTM; r, z, n for the GRU.
_INPUT, _FORGET, _UPDATE = 0, 1, 1


@torch.no_grad()
def initialize_recurrent(
    model: Model, scheme: str, *, gain: float = 1.0, input_gain: float = 1.0, seed: int | None = None
) -> Model:
    """Draw the weights of every recurrent layer anew, in place.

    Each gate's H x H block of W_hh becomes

        gaussian     entries N(0, gain^2 / H)
        orthogonal   gain * Q, Q orthogonal (Haar)
        identity     gain * I   (with biases 0 and phi = ReLU: the IRNN)
        default      gain * U(-1/sqrt(H), 1/sqrt(H)), torch's own: of gaussian's variance at gain 1/sqrt(3)

    and W_ih, with I columns, N(0, input_gain^2 / I), so that unit-variance inputs give pre-activations of standard
    deviation input_gain; biases become 0. Under "default" W_ih is input_gain * U(-1/sqrt(H), 1/sqrt(H)) and biases
    are U(-1/sqrt(H), 1/sqrt(H)).

    Args:
        model: Any module. Touched are `nn.RNN`, `nn.LSTM`, `nn.GRU` (all layers and directions), torch's cells and
            those of `gradlab.nets`; nothing else, so a linear head stays as it is.
        scheme: One of `RECURRENT_INITIALIZATIONS`.
        gain: Factor on the recurrent weights, finite and above 0. Default 1.
        input_gain: Factor on the input weights, finite and above 0. Default 1.
        seed: Seed of a generator of its own, which leaves torch's global random state untouched; None draws from the
            global generator.

    Returns:
        The same model.

    Raises:
        UsageError: Unknown scheme, a gain out of range, a model without recurrent layers, or one with projections
            (`proj_size`) under another scheme than "default".

    Note:
        Drawn on the CPU, in the weight's dtype (float32 for 16-bit weights), and copied: one seed gives the same
        weights on every device. Weights on the meta device have no values and are passed over. Le et al. draw W_ih
        with standard deviation 0.001: set input_gain for it.

    Example:
        >>> irnn = initialize_recurrent(nn.RNN(2, 3, nonlinearity="relu"), "identity", seed=0)
        >>> torch.equal(irnn.weight_hh_l0, torch.eye(3))
        True

    Source:
        Le, Jaitly & Hinton 2015 (arXiv 1504.00941), sec. 3 (identity); Saxe et al. 2014 (arXiv 1312.6120)
        (orthogonal); `torch.nn.RNNBase.reset_parameters` (default).
    """
    check_member("recurrent initialization", scheme, RECURRENT_INITIALIZATIONS)
    for name, value in (("gain", gain), ("input_gain", input_gain)):
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"The {name} is {value!r}, but must be a finite number above 0.")
    generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
    layers = _recurrent_layers(model)
    for layer in layers:
        if scheme != "default" and isinstance(layer, nn.RNNBase) and layer.proj_size:
            raise UsageError(
                f"The scheme '{scheme}' fills square recurrent weights, but proj_size is {layer.proj_size}: use a "
                "module without projection or the scheme 'default'."
            )
    for layer in layers:
        for name, parameter in layer.named_parameters(recurse=False):
            if not parameter.is_meta:
                factor = gain if name.startswith("weight_h") else input_gain
                parameter.copy_(_draw(name, parameter, scheme, factor, _hidden_size(layer), generator))
    return model


@torch.no_grad()
def set_forget_bias(model: Model, value: float) -> Model:
    """Set the forget gate's bias of every LSTM layer, in place, so that f = sigma(value) at zero input and state.

    torch's LSTM has two biases that add up, b_f = bias_ih + bias_hh: the first becomes `value`, the second 0. Filling
    both with `value` would give f = sigma(2 value).

    Args:
        model: Any module holding an `nn.LSTM`, `nn.LSTMCell` or `LSTMCell`; all layers and directions are set.
        value: b_f. 0 gives f = 0.5, 1 (Jozefowicz et al.) .731, 2 .881.

    Returns:
        The same model; all other weights are unchanged.

    Raises:
        UsageError: The value is not finite, or the model holds no LSTM with biases.

    Note:
        Both biases get the same gradient, so under SGD their sum learns at twice the rate.

    Example:
        >>> lstm = set_forget_bias(nn.LSTM(2, 1), 1.0)
        >>> (lstm.bias_ih_l0 + lstm.bias_hh_l0)[1].item()  # gate order i, f, g, o
        1.0

    Source:
        Gers, Schmidhuber & Cummins 2000; Jozefowicz, Zaremba & Sutskever 2015, sec. 3.4.
    """
    return _set_gate_bias(model, value, "LSTM", _LSTM, _FORGET)


@torch.no_grad()
def set_update_bias(model: Model, value: float) -> Model:
    """Set the update gate's bias of every GRU layer, in place, so that z = sigma(value) at zero input and state.

    In torch's convention, h' = (1 - z) n + z h, a *positive* value keeps the memory.

    Args:
        model: Any module holding an `nn.GRU`, `nn.GRUCell` or `GRUCell`; all layers and directions are set.
        value: b_z, the sum of the two biases.

    Returns:
        The same model; all other weights are unchanged.

    Raises:
        UsageError: The value is not finite, or the model holds no GRU with biases.

    Example:
        >>> gru = set_update_bias(nn.GRU(2, 1), 1.0)
        >>> (gru.bias_ih_l0 + gru.bias_hh_l0)[1].item()  # gate order r, z, n
        1.0
    """
    return _set_gate_bias(model, value, "GRU", _GRU, _UPDATE)


@torch.no_grad()
def chrono_init(model: Model, t_max: float, seed: int | None = None) -> Model:
    """Set the gate biases of every LSTM and GRU layer, in place, so that memories last from 1 to t_max steps.

        LSTM   b_f = log u,  b_i = -b_f,  u ~ U(1, t_max - 1)
        GRU    b_z = log u                (z keeps the memory in torch's convention)

    A gate sigma(log u) = u / (1 + u) = 1 - 1/(1 + u) forgets over 1 + u steps, which are uniform on (2, t_max).

    Args:
        model: Any module holding an `nn.LSTM`, an `nn.GRU`, their cells, or those of `gradlab.nets`.
        t_max: Longest dependency to be expected, in steps, above 2. The authors take 3T/2 for the copy task.
        seed: Seed of a generator of its own, which leaves torch's global random state untouched; None draws from the
            global generator.

    Returns:
        The same model; all other weights are unchanged.

    Raises:
        UsageError: t_max is not a finite number above 2, or the model holds no LSTM or GRU with biases.

    Note:
        Of the two biases that add up, bias_ih becomes the value and bias_hh 0. Drawn on the CPU: one seed gives the
        same biases on every device.

    Example:
        >>> lstm = chrono_init(nn.LSTM(2, 4), t_max=100, seed=0)
        >>> i, f, _, _ = (lstm.bias_ih_l0 + lstm.bias_hh_l0).chunk(4)
        >>> bool(torch.equal(i, -f) and f.min() >= 0 and f.exp().max() < 99)
        True

    Source:
        Tallec & Ollivier 2018 (arXiv 1804.11188), sec. 2 and eq. 16.
    """
    if not (math.isfinite(t_max) and t_max > 2):
        raise UsageError(f"t_max is {t_max!r}, but must be a finite number above 2: the longest memory, in steps.")
    generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
    for layer, bias_ih, bias_hh in _bias_pairs(model, "LSTM or GRU", (*_LSTM, *_GRU)):
        if bias_ih.is_meta:
            continue
        size = _hidden_size(layer)
        u = torch.empty(size, dtype=torch.float64).uniform_(1, t_max - 1, generator=generator)
        _fill(bias_ih, bias_hh, _FORGET, size, u.log())  # the GRU's update gate stands in the same place
        if isinstance(layer, _LSTM):
            _fill(bias_ih, bias_hh, _INPUT, size, -u.log())
    return model


def _draw(
    name: str, like: Tensor, scheme: str, factor: float, hidden_size: int, generator: torch.Generator | None
) -> Tensor:
    draw = empty_on_cpu(like)
    if scheme == "default":
        bound = 1 / math.sqrt(hidden_size)
        draw.uniform_(-bound, bound, generator=generator)
        return draw if name.startswith("bias") else draw.mul_(factor)
    if name.startswith("bias"):
        return draw.zero_()
    if scheme == "gaussian" or name.startswith("weight_ih"):
        return draw.normal_(0, factor / math.sqrt(like.shape[1]), generator=generator)
    for block in draw.split(hidden_size):  # one square block a gate
        if scheme == "orthogonal":
            nn.init.orthogonal_(block, gain=factor, generator=generator)
        else:
            block.copy_(factor * torch.eye(hidden_size, dtype=draw.dtype))
    return draw


def _set_gate_bias(model: Model, value: float, kind: str, types: tuple[type[nn.Module], ...], place: int) -> Model:
    if not math.isfinite(value):
        raise UsageError(f"The bias is {value!r}, but must be a finite number.")
    for layer, bias_ih, bias_hh in _bias_pairs(model, kind, types):
        _fill(bias_ih, bias_hh, place, _hidden_size(layer), value)
    return model


def _fill(bias_ih: Tensor, bias_hh: Tensor, place: int, size: int, value: float | Tensor) -> None:
    where = slice(place * size, (place + 1) * size)
    bias_ih[where] = value if isinstance(value, float | int) else value.to(bias_ih)
    bias_hh[where] = 0


def _hidden_size(layer: nn.Module) -> int:
    size = layer.hidden_size
    assert isinstance(size, int)
    return size


def _recurrent_layers(model: nn.Module) -> list[nn.Module]:
    layers: list[nn.Module] = [layer for layer in model.modules() if isinstance(layer, _RECURRENT)]
    if not layers:
        raise UsageError(f"{type(model).__name__} holds no recurrent layer: give a model with an RNN, LSTM or GRU.")
    return layers


def _bias_pairs(
    model: nn.Module, kind: str, types: tuple[type[nn.Module], ...]
) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    found = False
    for layer in model.modules():
        if isinstance(layer, types):
            biases = {n: p for n, p in layer.named_parameters(recurse=False) if n.startswith("bias_ih")}
            for name, bias_ih in biases.items():
                found = True
                yield layer, bias_ih, layer.get_parameter(name.replace("bias_ih", "bias_hh"))
    if not found:
        raise UsageError(f"{type(model).__name__} holds no {kind} with biases: give a model that does.")
