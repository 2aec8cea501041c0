"""How fast a driven recurrent net forgets: Lyapunov exponents forward, norms of the Jacobian against lag backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gradlab.errors import UsageError, unknown
from gradlab.measure.tangents import Step, tangent_step
from gradlab.probes.adjoint import adjoint
from gradlab.probes.rescale import down_by, exponent_of, norm_log2, square_sum, to_host

__all__ = ["LagNorms", "LyapunovExponents", "jacobian_lag_norms", "lyapunov_exponents"]

_STATES = ("h", "c", "cut")


@dataclass(frozen=True, kw_only=True, slots=True)
class LyapunovExponents:
    """The leading Lyapunov exponents of a driven recurrent net, in nats per step, largest first.

    Args:
        exponents: Mean over time and samples, shape (k,). exp(exponents[0]) is the factor per step by which the
            gradient through time changes in the long run.
        standard_errors: The larger of the two that follow, shape (k,).
        errors_over_time: By batch means: time cut into blocks, the spread of the blocks of each sample, pooled.
        errors_over_samples: By the spread of the samples' means; NaN for one sample.
        by_sample: The exponents of each sample, shape (N, k).
        steps: Steps averaged over, without the warm-up.
    """

    exponents: npt.NDArray[np.float64]
    standard_errors: npt.NDArray[np.float64]
    errors_over_time: npt.NDArray[np.float64]
    errors_over_samples: npt.NDArray[np.float64]
    by_sample: npt.NDArray[np.float64]
    steps: int


@torch.no_grad()
def lyapunov_exponents(
    module: nn.Module | Step,
    inputs: torch.Tensor,
    *,
    k: int = 1,
    warmup: int = 100,
    blocks: int = 10,
    state_size: int | None = None,
    seed: int = 0,
) -> LyapunovExponents:
    """Measure the leading Lyapunov exponents of a recurrent layer along the trajectories its inputs drive.

    k tangent vectors V are carried along, J_t V = Q R at each step, and lambda_i is the mean of ln |R_ii|, with J_t the
    Jacobian of the state (h, or h and c) at t + 1 with respect to that at t. In float64, from the zero state.

    Args:
        module: nn.RNN, nn.GRU or nn.LSTM with one layer and one direction, without projection. With `state_size`, any
            step in float64 from (input (N, in), state (N, n)) to the next state (N, n).
        inputs: (T, N, in), or (N, T, in) if the module is batch_first; (T, in) is one sample.
        k: Exponents wanted, at most the size of the state. Default 1, the largest.
        warmup: First steps, left out: the state and the tangents settle in them. Default 100.
        blocks: Parts of the time for the standard error over time, fewer where steps run out; each should be longer
            than the correlations of the trajectory. Default 10.
        state_size: n, where a step is given in place of a module.
        seed: Of the first tangents.

    Returns:
        The exponents with standard errors. -inf where a tangent becomes exactly 0 (ReLU units that are off).

    Raises:
        UsageError: Another kind of module, inputs of a wrong shape or too few steps, or k out of range.

    Note:
        The errors over time take blocks as independent. All samples share the weights: the errors say nothing about
        other draws of these. To draw weights anew is a matter of seeds.

    Example:
        >>> net = nn.RNN(1, 1, bias=False)
        >>> _ = nn.init.constant_(net.weight_hh_l0, 0.5)
        >>> found = lyapunov_exponents(net, torch.zeros(60, 1, 1), warmup=10)
        >>> round(float(np.exp(found.exponents[0])), 6)
        0.5

    Source:
        Benettin et al. 1980, Meccanica 15, 9-30 (QR on tangents); Asmussen & Glynn 2007, Stochastic Simulation, ch. IV
        (batch means).
    """
    step, size = tangent_step(module, state_size)
    x = _in_time_order(module, inputs)
    _check_counts(k=k, size=size, warmup=warmup, steps=len(x), blocks=blocks)
    state = x.new_zeros(x.shape[1], size)
    noise = torch.randn(x.shape[1], size, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tangents = torch.linalg.qr(noise.to(x.device)).Q.mT
    logs = []
    for t, u in enumerate(x):
        state, moved = step(u, state, tangents)
        if k == 1:
            lengths = torch.linalg.vector_norm(moved, dim=2)
            tangents = torch.where(lengths[..., None] > 0, moved / lengths[..., None], moved)
        else:
            q, r = torch.linalg.qr(moved.mT)
            tangents, lengths = q.mT, torch.diagonal(r, dim1=1, dim2=2).abs()
        if t >= warmup:
            logs.append(lengths.log())
    return _summary(to_host(torch.stack(logs)), blocks)


def _summary(logs: npt.NDArray[np.float64], blocks: int) -> LyapunovExponents:
    """Average ln of the stretch, (steps, N, k)."""
    steps, samples, k = logs.shape
    blocks = min(blocks, steps)
    with np.errstate(invalid="ignore"):
        by_sample = logs.mean(0)
        in_blocks = np.stack([part.mean(0) for part in np.array_split(logs, blocks)])
        over_time = np.full(k, math.nan)
        if blocks > 1:
            over_time = np.sqrt(in_blocks.var(0, ddof=1).mean(0) / (blocks * samples))
        over_samples = np.full(k, math.nan)
        if samples > 1:
            over_samples = by_sample.std(0, ddof=1) / math.sqrt(samples)
        exponents = by_sample.mean(0)
    return LyapunovExponents(
        exponents=exponents,
        standard_errors=np.fmax(over_time, over_samples),
        errors_over_time=over_time,
        errors_over_samples=over_samples,
        by_sample=by_sample,
        steps=steps,
    )


def _in_time_order(module: nn.Module | Step, inputs: torch.Tensor) -> torch.Tensor:
    """Return the inputs as (T, N, in) in float64."""
    size = module.input_size if isinstance(module, nn.RNNBase) else None
    if not isinstance(inputs, torch.Tensor) or inputs.ndim not in (2, 3) or size not in (None, inputs.shape[-1]):
        got = f"shape {tuple(inputs.shape)}" if isinstance(inputs, torch.Tensor) else type(inputs).__name__
        raise UsageError(f"The inputs are of {got}, but must be a tensor (T, N, {size or 'in'}), time first.")
    if inputs.ndim == 2:
        return inputs.detach().double().unsqueeze(1)
    batch_first = isinstance(module, nn.RNNBase) and module.batch_first
    return (inputs.transpose(0, 1) if batch_first else inputs).detach().double()


def _check_counts(*, k: int, size: int, warmup: int, steps: int, blocks: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= size:
        raise UsageError(f"k is {k!r}, but must be a whole number from 1 to {size}, the size of the state.")
    if isinstance(warmup, bool) or not isinstance(warmup, int) or not 0 <= warmup < steps:
        raise UsageError(
            f"The warmup is {warmup!r} for a sequence of {steps} steps, but must be a whole number from 0 that leaves "
            "at least one step: give longer inputs or a shorter warmup."
        )
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 2:
        raise UsageError(f"blocks is {blocks!r}, but must be a whole number of at least 2.")


@dataclass(frozen=True, kw_only=True, slots=True)
class LagNorms:
    """ln of the norm of v^T dh_T/dh_t against the lag T - t.

    Args:
        lags: Shape (L,), as given.
        log_norms: Natural log of each sample's norm, shape (N, L): what `gradlab.analysis.fit_decay` takes.
        state: With respect to which state.
    """

    lags: npt.NDArray[np.int64]
    log_norms: npt.NDArray[np.float64]
    state: str


def jacobian_lag_norms(
    module: nn.Module | Step,
    inputs: torch.Tensor,
    lags: Sequence[int],
    *,
    state: str = "h",
    state_size: int | None = None,
    seed: int = 0,
) -> LagNorms:
    """Measure ||v^T dh_T/dh_t|| at lags T - t by one reverse sweep, v Gaussian noise and T the last step.

    Args:
        module: nn.RNN, nn.GRU or nn.LSTM, in one direction, in its own dtype. With `state_size`, any step in float64
            from (input (N, in), state (N, n)) to the next state (N, n), samples apart.
        inputs: As the module takes them, (T, N, in) or (N, T, in).
        lags: Whole numbers from 0 to T, in any order. Leave out the first few, where v has not turned to the leading
            direction, and those that reach into the net's first steps, where the state has not settled.
        state: "h"; of an LSTM also "c", or "cut", h and c together. Of a stack, the top layer's.
        state_size: n, where a step is given in place of a module.
        seed: Of v.

    Returns:
        Norms for each sample, which never under- or overflow.

    Raises:
        UsageError: A lag out of range, an unknown state, or a module that `gradlab.adjoint` refuses.

    Note:
        In the long run the rate is the largest Lyapunov exponent, the same in both directions of time. Samples share
        the weights, so an interval over samples holds for this draw of them.

    Example:
        >>> from gradlab.analysis import fit_decay
        >>> net = nn.RNN(1, 1, bias=False)
        >>> _ = nn.init.constant_(net.weight_hh_l0, 0.5)
        >>> found = jacobian_lag_norms(net, torch.zeros(2000, 1, 1), [10, 500, 1900])
        >>> fit = fit_decay(found.lags, found.log_norms)
        >>> fit.best, round(fit.gain, 6)
        ('exponential', 0.5)

    Source:
        Pascanu, Mikolov & Bengio 2013 (arXiv 1211.5063), section 2: the product of Jacobians.
    """
    allowed = _STATES if isinstance(module, nn.LSTM) else _STATES[:1]
    if state not in allowed:
        raise unknown("state", state, allowed)
    if isinstance(module, nn.RNNBase) and state_size is None:
        # Read once, at the end of the top layer: h_T's gradient is v itself.
        table = adjoint(module, inputs, per_sample=True, seed=seed)
        table = table[(table["state"] == state) & (table["level"] == table["level"].max())]
        wide = table.pivot(index="sample", columns="t", values="log10_grad_norm").to_numpy() * math.log(10)
    else:
        wide = _swept_back(module, inputs, state_size, seed)
    last = wide.shape[1] - 1
    wrong = [lag for lag in lags if not (isinstance(lag, int | np.integer) and 0 <= lag <= last)]
    if wrong or not len(lags):
        got = f"The lag {wrong[0]!r} is" if wrong else "No lag is"
        raise UsageError(f"{got} given for {last} steps, but lags must be whole numbers from 0 to {last}: give such.")
    at = np.array(lags, dtype=np.int64)
    return LagNorms(lags=at, log_norms=wide[:, last - at], state=state)


def _swept_back(
    module: nn.Module | Step, inputs: torch.Tensor, state_size: int | None, seed: int
) -> npt.NDArray[np.float64]:
    """Return ln of the norms by autograd of one step at a time, shape (N, T + 1)."""
    _, size = tangent_step(module, state_size)  # checks the two
    x = _in_time_order(module, inputs)
    states = [x.new_zeros(x.shape[1], size)]
    with torch.no_grad():
        for u in x:
            states.append(module(u, states[-1]))
    noise = torch.randn(x.shape[1], size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    v, scale, rows = noise.to(x.device), x.new_zeros(x.shape[1]), []
    for t in reversed(range(len(states))):
        top = exponent_of(v)
        v, scale = down_by(v, top), scale + top
        rows.append(torch.stack([square_sum(v), scale]))
        if t > 0:
            before = states[t - 1].requires_grad_(True)
            with torch.enable_grad():
                (v,) = torch.autograd.grad(module(x[t - 1], before), before, v)
    squares, exponents = to_host(torch.stack(rows[::-1], 2))
    return norm_log2(squares, exponents) * math.log(2)
