"""Remedies applied to somebody's model in place: initialization, activation, BatchNorm, skips, recurrent biases."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from gradlab.nets.initialization import initialize
from gradlab.nets.recurrent_initialization import chrono_init, initialize_recurrent, set_forget_bias, set_update_bias

__all__ = ["REMEDIES", "Remedy", "Scaled"]

_BOUNDED = (nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardtanh, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink)
_ACTIVATIONS = (*_BOUNDED, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Mish)
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """One change to a model or to how it is trained.

    Args:
        name: Such as "batchnorm".
        text: What it does, a few words.
        source: Author and year.
        apply: Changes a model in place, given what one forward pass of it did; returns how many modules it changed.
        clip: Gradient norm to clip at while training; 0 for none.
        rate: Factor on the learning rate.
    """

    name: str
    text: str
    source: str
    apply: Callable[[nn.Module, Anatomy], int]
    clip: float = 0.0
    rate: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call of a module without children in a forward pass."""

    name: str
    module: nn.Module
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Anatomy:
    """The calls of a forward pass, in order, and the time steps of the longest recurrent call."""

    calls: tuple[Call, ...]
    times: int

    @classmethod
    def of(cls, model: nn.Module, forward: Callable[[], object]) -> Anatomy:
        """Run a forward pass and note what was called; buffers and random state are put back."""
        calls: list[Call] = []
        times = [0]

        def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                shapes = [
                    tuple(x.shape) if isinstance(x, torch.Tensor) else () for x in (args[0] if args else 0, output)
                ]
                calls.append(Call(name=name, module=module, input_shape=shapes[0], output_shape=shapes[1]))
                if isinstance(module, nn.RNNBase) and len(shapes[0]) == 3:
                    times[0] = max(times[0], shapes[0][1 if module.batch_first else 0])

            return hook

        leaves = [(name, module) for name, module in model.named_modules() if next(module.children(), None) is None]
        handles = [module.register_forward_hook(note(name)) for name, module in leaves]
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        try:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                forward()
        finally:
            for handle in handles:
                handle.remove()
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    if name in buffers:
                        buffer.copy_(buffers[name])
        cells = sum(isinstance(call.module, nn.RNNCellBase) for call in calls)
        return cls(calls=tuple(calls), times=max(times[0], cells))

    def followed(self) -> Iterator[tuple[Call, Call | None]]:
        """Yield each call of a linear or convolution layer and the call after it."""
        for place, call in enumerate(self.calls):
            if isinstance(call.module, _WEIGHTED):
                yield call, self.calls[place + 1] if place + 1 < len(self.calls) else None


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in another's place, under each of the names that it has."""
    old = model.get_submodule(name)
    for path in [path for path, found in model.named_modules(remove_duplicate=False) if found is old]:
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, module)


def _has(anatomy: Anatomy, kinds: tuple[type[nn.Module], ...]) -> int:
    return len({id(call.module) for call in anatomy.calls if isinstance(call.module, kinds)})


def _rectified(anatomy: Anatomy) -> bool:
    """Return whether most activations of the net are rectifiers, or it shows none (functional ones, most likely)."""
    activations = [call for call in anatomy.calls if isinstance(call.module, _ACTIVATIONS)]
    bounded = sum(isinstance(call.module, _BOUNDED) for call in activations)
    return 2 * bounded <= len(activations)


def _initialization(model: nn.Module, anatomy: Anatomy) -> int:
    initialize(model, "he_normal" if _rectified(anatomy) else "glorot_normal", seed=0)
    return _has(anatomy, _WEIGHTED)


def _hidden_activations(anatomy: Anatomy) -> list[Call]:
    """Return activations after which another layer with weights runs: an output's activation is part of the task."""
    last = max((place for place, call in enumerate(anatomy.calls) if isinstance(call.module, _WEIGHTED)), default=0)
    return [call for call in anatomy.calls[:last] if isinstance(call.module, _ACTIVATIONS)]


def _activation(model: nn.Module, anatomy: Anatomy) -> int:
    hidden = {call.name: call for call in _hidden_activations(anatomy)}
    bounded = [name for name, call in hidden.items() if isinstance(call.module, _BOUNDED)]
    dying = [name for name, call in hidden.items() if isinstance(call.module, nn.ReLU | nn.ReLU6)]
    for name in bounded:
        _replace(model, name, nn.ReLU())
    for name in dying if not bounded else ():
        _replace(model, name, nn.LeakyReLU(0.01))
    if bounded:  # weights drawn for a bounded activation are too small for ReLU
        initialize(model, "he_normal", seed=0)
    return len(bounded) or len(dying)


def _batchnorm(model: nn.Module, anatomy: Anatomy) -> int:
    layers: dict[str, nn.Module] = {}
    for call, after in anatomy.followed():
        if after is None or isinstance(after.module, _NORMS):
            continue  # the output, and what is normalized already
        norms = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
        dims = len(call.output_shape)
        if isinstance(call.module, nn.Linear) and dims == 3:
            layers[call.name] = nn.LayerNorm(call.output_shape[-1])
        elif isinstance(call.module, nn.Conv1d) and dims == 3:
            layers[call.name] = nn.BatchNorm1d(call.output_shape[1])
        elif dims in norms and (isinstance(call.module, nn.Linear) == (dims == 2)):
            layers[call.name] = norms[dims](call.output_shape[1])
    for name, norm in layers.items():
        own = model.get_submodule(name)
        weight = next(own.parameters())
        _replace(model, name, nn.Sequential(own, norm.to(weight.device, weight.dtype)))
    return len(layers)


class Scaled(nn.Module):
    """A skip around one layer: x + scale * layer(x)."""

    def __init__(self, layer: nn.Module, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x + scale * layer(x)."""
        out: torch.Tensor = x + self.scale * self.layer(x)
        return out


def _skip(model: nn.Module, anatomy: Anatomy) -> int:
    names = dict.fromkeys(
        call.name
        for call, after in anatomy.followed()
        if after is not None and call.input_shape and call.input_shape == call.output_shape
    )
    return _scale_branches(model, list(names))


def _scale_branches(model: nn.Module, names: list[str]) -> int:
    """Put a skip around each named layer, its branch scaled by 1/sqrt(their number); return how many there are."""
    for name in names:
        _replace(model, name, Scaled(model.get_submodule(name), 1.0 / math.sqrt(len(names))))
    return len(names)


def _recurrent_weights(model: nn.Module, anatomy: Anatomy) -> int:
    count = _has(anatomy, (nn.RNN, nn.RNNCell))
    if count and not _has(anatomy, (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell)):
        initialize_recurrent(model, "orthogonal", seed=0)
        return count
    return 0


def _memory(model: nn.Module, anatomy: Anatomy) -> int:
    lstm, gru = _has(anatomy, (nn.LSTM, nn.LSTMCell)), _has(anatomy, (nn.GRU, nn.GRUCell))
    if lstm:
        set_forget_bias(model, 1.0)
    if gru:
        set_update_bias(model, 1.0)
    return lstm + gru


def _chrono(model: nn.Module, anatomy: Anatomy) -> int:
    count = _has(anatomy, (nn.LSTM, nn.LSTMCell, nn.GRU, nn.GRUCell))
    if not count or anatomy.times < 4:
        return 0
    chrono_init(model, float(anatomy.times), seed=0)
    return count


def _nothing(model: nn.Module, anatomy: Anatomy) -> int:  # noqa: ARG001
    return 1


_HE = "He et al. 2015, arXiv 1502.01852"

#: In the order in which they are tried and, where two do equally well, recommended: the smallest change first.
REMEDIES: Final[tuple[Remedy, ...]] = (
    Remedy(
        name="initialization", text="He's weights (Glorot's where activations are bounded), biases 0",
        source=f"{_HE}; Glorot & Bengio 2010", apply=_initialization,
    ),
    Remedy(
        name="recurrent_weights", text="orthogonal recurrent weights", source="Saxe et al. 2014, arXiv 1312.6120",
        apply=_recurrent_weights,
    ),
    Remedy(
        name="forget_bias", text="forget-gate bias 1 (GRU: update-gate bias 1)", source="Jozefowicz et al. 2015",
        apply=_memory,
    ),
    Remedy(
        name="chrono", text="gate biases for a memory as long as the sequence",
        source="Tallec & Ollivier 2018, arXiv 1804.11188", apply=_chrono,
    ),
    Remedy(
        name="activation", text="ReLU with He's weights for bounded activations, LeakyReLU for ReLU",
        source=f"{_HE}; Lu et al. 2019, arXiv 1903.06733", apply=_activation,
    ),
    Remedy(
        name="batchnorm", text="BatchNorm after each hidden layer (LayerNorm in sequences)",
        source="Ioffe & Szegedy 2015, arXiv 1502.03167", apply=_batchnorm,
    ),
    Remedy(
        name="skip", text="a skip around each layer of equal input and output, branches scaled by 1/sqrt(their number)",
        source="He et al. 2016, arXiv 1512.03385; De & Smith 2020, arXiv 2002.10444", apply=_skip,
    ),
    Remedy(
        name="clipping", text="gradient norm clipped at 1", source="Pascanu et al. 2013, arXiv 1211.5063",
        apply=_nothing, clip=1.0,
    ),
    Remedy(
        name="learning_rate", text="a tenth of the learning rate", source="Pascanu et al. 2013, arXiv 1211.5063",
        apply=_nothing, rate=0.1,
    ),
)  # fmt: skip
