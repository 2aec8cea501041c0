"""How fast nets of every kind forget: the gradient against lag and what it should be, for one net by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gradlab.errors import UsageError
from gradlab.measure.lyapunov import jacobian_lag_norms, lyapunov_exponents
from gradlab.nets import CausalTransformer, chrono_init, initialize_recurrent, set_forget_bias, set_update_bias

__all__ = ["Forgetting", "attention_path", "forgetting", "spread_lags"]

_PHI: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
}
_MODULES: dict[str, Callable[[int, int], nn.RNNBase]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


@dataclass(frozen=True, kw_only=True, slots=True)
class Forgetting:
    """How the gradient of one net falls with lag.

    Args:
        lags: Shape (L,).
        log_norms: ln of the norm of v^T dh_T/dh_t, mean over samples; shape (L,).
        exponent: Largest Lyapunov exponent, in nats a step: the rate in the long run.
        exponent_error: Its standard error.
        weight: Recurrent weights of a vanilla net, else None.
    """

    lags: npt.NDArray[np.int64]
    log_norms: npt.NDArray[np.float64]
    exponent: float
    exponent_error: float
    weight: npt.NDArray[np.float64] | None


def forgetting(
    net: str, *, hidden: int, steps: int, warmup: int = 100, batch_size: int = 8, input_std: float = 0.5, seed: int = 0
) -> Forgetting:
    """Measure the gradient against lag of a recurrent net named like "tanh 1.5", "orthogonal 1", "lstm bias 1".

    A vanilla net is h' = phi(W h + x) with Gaussian W of variance gain^2 / hidden ("tanh", "relu", "sigmoid"), or
    W = gain Q ("orthogonal", tanh), driven by Gaussian x of `input_std` at every unit. "rnn", "lstm" and "gru" take one
    input of that strength and are torch's modules at "default"; gated ones also at "bias <value>" or "chrono <steps>".

    Args:
        net: Which.
        hidden: Units.
        steps: Largest lag, in steps.
        warmup: Steps before the earliest state that counts.
        batch_size: Sequences.
        input_std: Strength of the input; it changes the rate.
        seed: Of weights, inputs and cotangent.

    Raises:
        UsageError: An unknown name.
    """
    kind, _, rest = net.partition(" ")
    generator = torch.Generator().manual_seed(2 * seed + 1)
    length = warmup + steps
    lags = spread_lags(steps)
    if kind in _MODULES:
        module = _torch_module(kind, rest, hidden, 2 * seed)
        x = torch.randn(length, batch_size, 1, generator=generator) * input_std
        found = jacobian_lag_norms(module, x, lags, seed=seed)
        exponents, weight = lyapunov_exponents(module, x.double(), warmup=warmup, seed=seed), None
    else:
        if kind not in (*_PHI, "orthogonal"):
            raise UsageError(f"Unknown net '{net}': it begins with {', '.join((*_PHI, 'orthogonal', *_MODULES))}.")
        scheme = "orthogonal" if kind == "orthogonal" else "gaussian"
        core = initialize_recurrent(nn.RNN(hidden, hidden), scheme, gain=float(rest), seed=2 * seed)
        w = dict(core.named_parameters())["weight_hh_l0"].detach().double()
        phi = _PHI["tanh" if kind == "orthogonal" else kind]
        x = torch.randn(length, batch_size, hidden, generator=generator, dtype=torch.float64) * input_std

        def step(drive: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            return phi(h @ w.T + drive)

        found = jacobian_lag_norms(step, x, lags, state_size=hidden, seed=seed)
        if kind == "sigmoid":
            exponents = lyapunov_exponents(step, x, warmup=warmup, state_size=hidden, seed=seed)
        else:  # nn.RNN knows its own tangents, which is half the work of finding them by autograd
            same = _fed_directly(w, "relu" if kind == "relu" else "tanh")
            exponents = lyapunov_exponents(same, x, warmup=warmup, seed=seed)
        weight = w.numpy()
    return Forgetting(
        lags=found.lags,
        log_norms=found.log_norms.mean(0),
        exponent=float(exponents.exponents[0]),
        exponent_error=float(exponents.standard_errors[0]),
        weight=weight,
    )


def _fed_directly(w: torch.Tensor, nonlinearity: str) -> nn.RNN:
    """Return h' = phi(W h + x) as nn.RNN."""
    size = len(w)
    module = nn.RNN(size, size, nonlinearity=nonlinearity, bias=False, dtype=w.dtype)
    weights = dict(module.named_parameters())
    with torch.no_grad():
        weights["weight_ih_l0"].copy_(torch.eye(size))
        weights["weight_hh_l0"].copy_(w)
    return module


def _torch_module(kind: str, scheme: str, hidden: int, seed: int) -> nn.RNNBase:
    module = _MODULES[kind](1, hidden)
    initialize_recurrent(module, "default", seed=seed)
    name, _, value = scheme.partition(" ")
    if kind == "rnn" and name != "default":
        raise UsageError(f"Unknown initialization '{scheme}' of 'rnn': only default.")
    if name == "bias":
        (set_forget_bias if kind == "lstm" else set_update_bias)(module, float(value))
    elif name == "chrono":
        chrono_init(module, float(value), seed=seed)
    elif name != "default":
        raise UsageError(f"Unknown initialization '{scheme}' of '{kind}': default, bias <value> or chrono <steps>.")
    return module


def spread_lags(steps: int, most: int = 60) -> list[int]:
    """Return at most `most` lags from 0 to `steps`, dense at the short ones.

    Example:
        >>> spread_lags(1000, 6)
        [0, 1, 6, 32, 178, 1000]
    """
    return sorted({0, *np.geomspace(1, steps, most - 1).round().astype(int).tolist()})


def attention_path(
    *, steps: int, width: int = 64, seed: int = 0
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return lags and ln of the norm of dy_T/dx_t of one causal attention layer: every lag is one step away.

    Args:
        steps: Length of the sequence.
        width: Of the layer.
        seed: Of weights, inputs and cotangent.
    """
    net = CausalTransformer(input_size=8, outputs=8, max_length=steps, width=width, head="last", seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, steps, 8, generator=generator, dtype=torch.float64).requires_grad_(True)
    y = net(x)
    v = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    (grad,) = torch.autograd.grad((y * v).sum(), x)
    log_norms: npt.NDArray[np.float64] = grad.norm(dim=2).log().mean(0).flip(0).numpy()
    return np.arange(steps), log_norms
