"""Likely causes and published remedies, from what a trace knows of weights, activations and normalization."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gradlab.analysis.trace_views import normalizes

if TYPE_CHECKING:
    from gradlab.trace import Trace

__all__ = ["Remedy", "dead_remedy", "depth_remedy", "saturated_remedy", "time_remedy", "training_remedy", "weight_gain"]

Remedy = tuple[str, str, str]
"""Likely cause, what to try, and its source."""

#: Weight variance times fan-in at which a wide net keeps the gradient's size, by activation.
_CRITICAL = {"ReLU": 2.0, "LeakyReLU": 2.0, "ReLU6": 2.0, "Tanh": 1.0, "Identity": 1.0, "SELU": 1.0, "GELU": 2.0}
_TALLEC = "Tallec & Ollivier 2018, arXiv 1804.11188"
#: Class of a gated layer -> the gate that keeps its memory, what is wrong with it, what to try, and the source.
_MEMORY = {
    "LSTM": (
        "f", "The forget gate lets too little through at each time step",
        "Begin with a larger forget-gate bias: 1, or chrono initialization for long memory",
        f"Jozefowicz et al. 2015; {_TALLEC}",
    ),
    "GRU": (
        "z", "The update gate keeps too little of the state at each time step",
        "Begin with a larger bias of torch's update gate z, which keeps the state", _TALLEC,
    ),
}  # fmt: skip
_HE = "He et al. 2015, arXiv 1502.01852"
_GLOROT = "Glorot & Bengio 2010"
_RESNET = "He et al. 2016, arXiv 1512.03385"
_PASCANU = "Pascanu et al. 2013, arXiv 1211.5063"


def weight_gain(trace: Trace) -> float:
    """Return the median over weight matrices of their variance times fan-in, at the first recorded step; NaN if none.

    The variance is the mean square: weights are taken to have mean 0.
    """
    shapes = {str(item[0]): item[1] for item in trace.info.get("params", ()) if len(item) > 1}
    rows = trace.params
    if rows.empty:
        return math.nan
    rows = rows[rows["step"] == rows["step"].min()]
    found = []
    for name, norm, entries in zip(rows["param"], rows["weight_norm"], rows["entries"], strict=True):
        shape = shapes.get(name, ())
        if len(shape) >= 2 and entries:
            found.append(norm**2 / entries * math.prod(shape[1:]))
    return float(np.median(found)) if found else math.nan


def _activation(trace: Trace) -> str:
    """Return the commonest activation class of the trace; "" if none is known."""
    kinds = trace.layers["kind"]
    kinds = kinds[trace.layers["step"] == trace.layers["step"].min()]
    known = kinds[kinds.isin([*_CRITICAL, "Sigmoid", "Hardsigmoid", "Softsign", "Softplus", "SiLU", "ELU"])]
    return "" if known.empty else str(known.value_counts().index[0])


def depth_remedy(trace: Trace, kind: str) -> Remedy:
    """Say why a gradient vanishes or explodes through depth."""
    activation, gain = _activation(trace), weight_gain(trace)
    critical = _CRITICAL.get(activation, 1.0)
    of = f" where {activation} keeps the gradient at {critical:g}" if activation in _CRITICAL else ""
    norm = bool(trace.layers["kind"].map(normalizes).any())
    init = "kaiming_normal_" if critical == 2 else "xavier_normal_"
    if kind == "vanishing":
        if activation in ("Sigmoid", "Hardsigmoid"):
            return (
                "The sigmoid's derivative is at most 1/4, so that each layer shrinks the gradient.",
                "Use ReLU with He's initialization in the hidden layers, or BatchNorm before each sigmoid",
                f"{_GLOROT}; {_HE}",
            )
        if gain < 0.8 * critical and not norm:
            return (
                f"The weights are small: their variance times fan-in is {gain:.2g}{of}.",
                f"Initialize the weights with torch.nn.init.{init}, or normalize (BatchNorm), or add skip connections",
                _HE if critical == 2 else _GLOROT,
            )
        return (
            "Each layer shrinks the gradient a little, and there are many.",
            "Add skip connections around every two layers, or normalize",
            _RESNET,
        )
    if gain > 1.25 * critical and not norm:
        return (
            f"The weights are large: their variance times fan-in is {gain:.2g}{of}.",
            f"Initialize the weights with torch.nn.init.{init}, or normalize",
            _HE if critical == 2 else _GLOROT,
        )
    if norm:
        return (
            "Normalization in a deep net without skips multiplies the gradient in every layer (BatchNorm with ReLU: by "
            "1.21 at initialization).",
            "Add skip connections, or use fewer layers",
            "Yang et al. 2019, arXiv 1902.08129",
        )
    return (
        "Each layer or residual branch adds to the signal or to the gradient, and nothing normalizes.",
        "Normalize, or scale each residual branch by 1/sqrt(number of blocks) or a gain that begins at 0",
        "De & Smith 2020, arXiv 2002.10444",
    )


def time_remedy(trace: Trace, kind: str, layer_kind: str) -> Remedy:
    """Say why a gradient vanishes or explodes through time."""
    if kind == "exploding":
        return (
            "The recurrent weights multiply the gradient by more than 1 at each time step.",
            "Clip the gradient's norm (torch.nn.utils.clip_grad_norm_), and begin with orthogonal or smaller recurrent "
            "weights",
            _PASCANU,
        )
    known = _MEMORY.get(layer_kind.removesuffix("Cell"))
    if known is not None:
        gate, does, advice, source = known
        mean = _gate(trace, gate)
        return f"{does}{f' (mean {mean:.2f})' if math.isfinite(mean) else ''}.", advice, source
    return (
        "The recurrent weights and the activation's derivative shrink the gradient at each time step.",
        "Use an LSTM with a large forget-gate bias or a GRU, or begin with orthogonal recurrent weights",
        f"{_PASCANU}; Le et al. 2015, arXiv 1504.00941",
    )


def _gate(trace: Trace, gate: str) -> float:
    rows = trace.gates[trace.gates["gate"] == gate]
    return float(rows["mean"].mean()) if len(rows) else math.nan


def training_remedy(trace: Trace) -> Remedy:
    """Say why a gradient grows over training."""
    rates = trace.steps["learning_rate"].dropna()
    rate = f" ({rates.iloc[-1]:.3g})" if len(rates) else ""
    return (
        f"The steps are too large: the learning rate{rate} is beyond what the loss's curvature allows.",
        "Lower the learning rate, warm it up, or clip the gradient's norm",
        _PASCANU,
    )


def dead_remedy(trace: Trace) -> Remedy:
    """Say why rectifiers are dead."""
    gain = weight_gain(trace)
    size = f" (weight variance times fan-in {gain:.2g}, He's is 2)" if math.isfinite(gain) else ""
    return (
        f"A large step or a negative bias pushed the units below 0 for every input{size}.",
        "Lower the learning rate, begin with He's initialization and zero biases, or use LeakyReLU",
        "Lu et al. 2019, arXiv 1903.06733",
    )


def saturated_remedy(trace: Trace) -> Remedy:
    """Say why bounded activations are saturated."""
    gain = weight_gain(trace)
    size = f": weight variance times fan-in {gain:.2g}, Glorot's is about 1" if math.isfinite(gain) else ""
    return (
        f"Their inputs are too large{size}.",
        "Begin with Glorot's initialization, scale the inputs to unit variance, or normalize before the activation",
        _GLOROT,
    )
