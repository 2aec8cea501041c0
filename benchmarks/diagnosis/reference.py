"""What is true of a case, measured by plain autograd: no probe and no rule of gradlab has a part in it."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from gradlab.benchmarks.diagnosis.case import Case, Job, seeded, train_step

__all__ = ["Measured", "measure"]

_RECTIFIERS = (nn.ReLU, nn.ReLU6)
_BOUNDED = (nn.Tanh, nn.Sigmoid, nn.Softsign, nn.Hardtanh)
_FLAT = 0.01  # a slope below this share of the steepest is flat


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Facts about one run.

    Args:
        depth: For each step, |dL/dh| at the case's first cut over that at its last; empty without cuts.
        time: For each step, |dL/d(state)| at the first time step over that at the last; empty without a recurrent net.
        dead: Path of each rectifier -> share of its units that were active for no sample.
        dead_late: The same over the last half of the steps alone.
        flat: Path of each bounded activation -> share of entries whose slope is below 1 % of the steepest.
        bad_steps: Steps in which a NaN or Inf appeared, in an output, a gradient or the loss.
        without_grad: Parameters that require a gradient and got none in any step.
        unchanged: Parameters that require a gradient and are at the end what they were at the start, bit by bit.
        losses: Loss of each step.
        weights: L2 norm of all parameters, before the first step and after each.
    """

    depth: tuple[float, ...] = ()
    time: tuple[float, ...] = ()
    dead: dict[str, float] = field(default_factory=dict)
    dead_late: dict[str, float] = field(default_factory=dict)
    flat: dict[str, float] = field(default_factory=dict)
    bad_steps: tuple[int, ...] = ()
    without_grad: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    losses: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()


class _Unrolled(nn.Module):
    """A stock recurrent module as a loop of cells over its own parameters; every state keeps its gradient."""

    def __init__(self, stock: nn.RNNBase) -> None:
        super().__init__()
        self.stock = stock
        self.states: dict[int, list[Tensor]] = defaultdict(list)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        self.states.clear()
        stock = self.stock
        h = x if stock.batch_first else x.transpose(0, 1)
        for level in range(stock.num_layers):
            ways = []
            for way in range(1 + stock.bidirectional):
                steps = h.unbind(1)[:: -1 if way else 1]
                outputs = self._run(steps, f"_l{level}" + "_reverse" * way)
                ways.append(torch.stack(outputs[:: -1 if way else 1], 1))
            h = torch.cat(ways, -1)
        return (h if stock.batch_first else h.transpose(0, 1)), None

    def _run(self, steps: tuple[Tensor, ...], suffix: str) -> list[Tensor]:
        stock = self.stock
        weights = [getattr(stock, name + suffix) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        zero = steps[0].new_zeros(len(steps[0]), stock.hidden_size)
        outputs, state, cell = [], zero, zero
        for t, x in enumerate(steps):
            if isinstance(stock, nn.LSTM):
                state, cell = torch.lstm_cell(x, (state, cell), *weights)
            elif isinstance(stock, nn.GRU):
                state = torch.gru_cell(x, state, *weights)
            else:
                step = torch.rnn_relu_cell if cast(nn.RNN, stock).nonlinearity == "relu" else torch.rnn_tanh_cell
                state = step(x, state, *weights)
            for kept in (state, cell) if isinstance(stock, nn.LSTM) else (state,):
                kept.retain_grad()
                self.states[t].append(kept)
            outputs.append(state)
        return outputs

    def ratio(self) -> float:
        """Return |dL/d(state)| at the first over that at the last step that a sequence runs through."""
        first, last = (_norm_of(self.states[t]) for t in (0, len(self.states) - 1))
        return first / last if last else math.nan


def _norm_of(tensors: list[Tensor]) -> float:
    squares = [float(t.grad.double().square().sum()) for t in tensors if t.grad is not None]
    return math.sqrt(sum(squares))


class _Observer:
    """Watches one model by plain hooks."""

    def __init__(self, case: Case, model: nn.Module) -> None:
        self.loops: list[_Unrolled] = []
        self.kept: dict[str, Tensor] = {}
        self.alive: dict[str, list[Tensor]] = defaultdict(list)
        self.flat: dict[str, list[float]] = defaultdict(list)
        self.bad = False
        for name, module in list(model.named_modules()):
            if next(module.children(), None) is None:
                module.register_forward_hook(self._finite)
            if name in case.cuts:
                module.register_forward_hook(self._keep(name))
            if isinstance(module, _RECTIFIERS):
                module.register_forward_hook(self._see_units(name))
            elif isinstance(module, _BOUNDED):
                module.register_forward_pre_hook(self._see_slopes(name))
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.RNNBase):
                parent, _, last = name.rpartition(".")
                self.loops.append(_Unrolled(module))
                setattr(model.get_submodule(parent), last, self.loops[-1])

    def _finite(self, _: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            self.bad |= not bool(output.isfinite().all())
            if output.requires_grad:
                output.register_hook(self._finite_grad)

    def _finite_grad(self, grad: Tensor) -> None:
        self.bad |= not bool(grad.isfinite().all())

    def _keep(self, name: str) -> Any:
        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            output.retain_grad()
            self.kept[name] = output

        return keep

    def _see_units(self, name: str) -> Any:
        def see(_: nn.Module, __: Any, output: Tensor) -> None:
            units = output.detach().movedim(1 if output.dim() == 4 else -1, 0).flatten(1)
            self.alive[name].append((units > 0).any(1))

        return see

    def _see_slopes(self, name: str) -> Any:
        def see(module: nn.Module, inputs: tuple[Tensor]) -> None:
            with torch.enable_grad():
                points = torch.cat([inputs[0].detach().double().flatten(), torch.zeros(1).double()])
                points.requires_grad_()
                (slope,) = torch.autograd.grad(type(module).forward(module, points).sum(), points)
            # The last point is 0, where each of these activations is steepest.
            self.flat[name].append(float((slope[:-1] < _FLAT * slope[-1]).double().mean()))

        return see


def measure(case: Case) -> Measured:
    """Run a case without gradlab and measure what its label claims."""
    with seeded(case):
        job = case.build()
        return _run(case, job)


def _run(case: Case, job: Job) -> Measured:
    named = [(name, param) for name, param in job.model.named_parameters() if param.requires_grad]
    before = {name: param.detach().clone() for name, param in named}
    observer = _Observer(case, job.model)
    depth, time, bad, losses, weights = [], [], [], [], [_weight_norm(job.model)]
    seen: set[str] = set()

    def read(*, loss: float, **_: Any) -> None:
        losses.append(loss)
        for name, param in named:
            if param.grad is not None:
                seen.add(name)
                grad = param.grad.coalesce().values() if param.grad.is_sparse else param.grad
                observer.bad |= not bool(grad.isfinite().all())

    for step in range(job.steps):
        observer.bad = False
        train_step(job, step, read)
        weights.append(_weight_norm(job.model))
        if observer.bad or not math.isfinite(losses[-1]):
            bad.append(step)
        if case.cuts:
            first, last = (_norm_of([observer.kept[name]]) for name in case.cuts)
            depth.append(first / last if last else math.nan)
        time += [loop.ratio() for loop in observer.loops]
    return Measured(
        depth=tuple(depth),
        time=tuple(time),
        dead={name: _dead(seen) for name, seen in observer.alive.items()},
        dead_late={name: _dead(seen[-max(1, len(seen) // 2) :]) for name, seen in observer.alive.items()},
        flat={name: sum(shares) / len(shares) for name, shares in observer.flat.items()},
        bad_steps=tuple(bad),
        without_grad=tuple(name for name, _ in named if name not in seen),
        unchanged=tuple(name for name, param in named if torch.equal(param, before[name])),
        losses=tuple(losses),
        weights=tuple(weights),
    )


def _dead(alive: list[Tensor]) -> float:
    return 1 - float(torch.stack(alive).any(0).double().mean())


def _weight_norm(model: nn.Module) -> float:
    with torch.no_grad():
        return math.sqrt(sum(float(param.double().square().sum()) for param in model.parameters()))
