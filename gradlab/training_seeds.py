"""Many seeds of one small net trained at once, as one batched program, each with its own trace."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, final

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradlab.errors import UsageError
from gradlab.probes import LayerSelection, Schedule, watch
from gradlab.runtime import resolve_device
from gradlab.seed_program import Tensors, batched_program
from gradlab.tasks.image import ImageTask, batch_schedule
from gradlab.training import TrainResult, TrainSettings, evaluate, learning_rate, sgd
from gradlab.training_steps import host_array, until

__all__ = ["train_seeds"]


def train_seeds(
    models: Sequence[nn.Module],
    task: ImageTask,
    settings: TrainSettings,
    seeds: Sequence[int],
    *,
    device: torch.device | str = "auto",
    every: int | Schedule = 1,
    layers: LayerSelection = None,
    on_step: Callable[[int, float | None], None] | None = None,
    loss: Callable[..., torch.Tensor] = cross_entropy,
) -> list[TrainResult]:
    """Train several nets that differ in their weights and seeds alone, as one program: `train` of each, but faster.

    A small net's step is spent on starting operators. Here every operator works on all nets at once: weights are
    stacked, W of shape (S, out, in), and one optimizer, whose rule acts entry by entry, updates them all. Steps that
    the probes record are run net by net on views of the same weights, so that each trace is what `train` records.

    Args:
        models: One for each seed, of one architecture, with their own initial weights; moved to the device.
        task: The data; each seed has its own order and augmentation.
        settings: How to train; its `seed` and `channels_last` are not used.
        seeds: Of the order of the data and its augmentation.
        device: As in `train`.
        every: Which steps the probes record. A recorded step costs what it costs in separate runs: record few.
        layers: Which layers; see `watch`.
        on_step: Called after each step with its number and the mean loss of the nets that have not diverged.
        loss: As in `train`.

    Returns:
        One result for each seed, as `train` gives it, equal to rounding; seconds are shared out evenly. A net whose
        loss is not finite has diverged there and leaves the others alone; its weights mean nothing afterwards.

    Raises:
        UsageError: The nets differ in their parameters, draw random numbers in their forward pass (dropout), have an
            operator without a batched form (nn.LSTM), or the precision is not float32: train them one by one.

    Note:
        Faster where operators are small, see benchmarks/README.md: for 8 seeds of an MLP of 16 layers x 64 nearly four
        times, for one of 8 layers x 512 not at all, nor where every step is recorded. nn.LSTM and its like cannot be
        batched so.

    Example:
        >>> from gradlab.tasks import load_digits
        >>> models = [nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(3)]
        >>> results = train_seeds(models, load_digits(), TrainSettings(steps=4), range(3), device="cpu", every=2)
        >>> [len(result.trace.steps) for result in results]
        [2, 2, 2]
    """
    device = resolve_device(device) if isinstance(device, str) else device
    if settings.precision != "float32":
        raise UsageError(f"Seeds are trained at once in float32; got precision={settings.precision}: train one by one.")
    if len(models) != len(seeds) or not models:
        raise UsageError(
            f"train_seeds takes as many models as seeds, at least one; got {len(models)} and {len(seeds)}."
        )
    wall, cpu = time.perf_counter(), time.process_time()
    task = task.to(device)
    for model in models:
        model.to(device).train()
    draw = _draws(task, settings, seeds, device)
    losses = torch.full((len(seeds), settings.steps), math.nan, device=device)
    with _stacked(models) as stack, ExitStack() as watches:
        optimizer = sgd(stack.trained, settings, fused=device.type in ("cpu", "cuda"))
        team = _Team(stack, optimizer, loss, clip_norm=settings.clip_norm)
        for model, shadow in zip(models, team.shadows, strict=True):
            team.probes.append(watches.enter_context(watch(model, shadow, every=every, layers=layers)))
        for step in range(settings.steps):
            team.set_rate(learning_rate(settings, step))
            losses[:, step] = team.step(*draw(step))
            value = None
            if device.type == "cpu":
                value = team.look(losses[:, step].tolist())
            if on_step is not None:
                on_step(step, value)
            if not any(team.training):
                break
        traces = [probe.trace for probe in team.probes]
    results = []
    for model, of_seed, trace in zip(models, losses, traces, strict=True):
        finite = torch.isfinite(of_seed)
        diverged_at = None if device.type == "meta" or bool(finite.all()) else int((~finite).nonzero()[0])
        kept = settings.steps if diverged_at is None else diverged_at + 1
        whole = diverged_at is None and device.type != "meta"
        results.append((diverged_at, of_seed[:kept], until(trace, kept), evaluate(model, task) if whole else math.nan))
    seconds = (time.perf_counter() - wall) / len(seeds), (time.process_time() - cpu) / len(seeds)
    return [
        TrainResult(
            status="done" if diverged_at is None else "diverged",
            losses=host_array(of_seed),
            diverged_at=diverged_at,
            trace=trace,
            test_error=error,
            seconds=seconds[0],
            cpu_seconds=seconds[1],
        )
        for diverged_at, of_seed, trace, error in results
    ]


def _draws(
    task: ImageTask, settings: TrainSettings, seeds: Sequence[int], device: torch.device
) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    """Return what gives the batches of a step, stacked: those that `train` draws for each seed."""
    count, size = len(task.train_labels), settings.batch_size
    order = torch.stack([batch_schedule(count, size, settings.steps, seed) for seed in seeds], 1).to(device)
    on = device if device.type != "meta" else torch.device("cpu")
    generators = [torch.Generator(on).manual_seed(seed + 1) for seed in seeds]

    def draw(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if task.augment:
            parts = [task.batch(own, generator) for own, generator in zip(order[step], generators, strict=True)]
            return torch.stack([x for x, _ in parts]), torch.stack([y for _, y in parts])
        x, y = task.batch(order[step].flatten())
        return x.unflatten(0, (len(seeds), size)), y.unflatten(0, (len(seeds), size))

    return draw


@final
class _Stack:
    """The parameters and buffers of several nets, stacked; the nets' own are views of them."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.models = models
        self.params: Tensors = {}
        for name, first in models[0].named_parameters():
            stacked = torch.stack([model.get_parameter(name).detach() for model in models])
            self.params[name] = stacked.requires_grad_(first.requires_grad)
            for model, part in zip(models, stacked.detach(), strict=True):
                model.get_parameter(name).data = part
        self.buffers: Tensors = {}
        for name, _ in models[0].named_buffers():
            self.buffers[name] = torch.stack([model.get_buffer(name) for model in models])
            _set_buffers(models, name, list(self.buffers[name]))
        self.trained = [param for param in self.params.values() if param.requires_grad]

    def release(self) -> None:
        """Give each net tensors of its own again."""
        for model in self.models:
            for param in model.parameters():
                param.data, param.grad = param.data.clone(), None
        for name, stacked in self.buffers.items():
            _set_buffers(self.models, name, [part.clone() for part in stacked])


def _set_buffers(models: Sequence[nn.Module], name: str, values: Sequence[torch.Tensor]) -> None:
    owner, _, leaf = name.rpartition(".")
    for model, value in zip(models, values, strict=True):
        model.get_submodule(owner)._buffers[leaf] = value


@contextmanager
def _stacked(models: Sequence[nn.Module]) -> Iterator[_Stack]:
    def form(model: nn.Module) -> list[tuple[str, tuple[int, ...], torch.dtype, bool]]:
        named = [*model.named_parameters(), *model.named_buffers()]
        return [(name, tuple(x.shape), x.dtype, x.requires_grad) for name, x in named]

    if any(form(model) != form(models[0]) for model in models[1:]):
        raise UsageError("Seeds are trained at once for nets of one architecture; these differ in their parameters.")
    every = [id(param) for model in models for param in model.parameters()]
    if len(set(every)) < len(every):
        raise UsageError("Each seed needs a net of its own; two of these share parameters.")
    stack = _Stack(models)
    try:
        yield stack
    finally:
        stack.release()


class _Shadow(torch.optim.Optimizer):
    """One net's share in the step of the optimizer of all: a probe closes its steps by it."""

    def __init__(self, params: Sequence[nn.Parameter], inner: Callable[[], None]) -> None:
        super().__init__(params, {})
        self.inner = inner

    def step(self, closure: Any = None) -> Any:  # noqa: ARG002  # torch's signature
        self.inner()


@final
class _Team:
    """Several nets that make each step together."""

    def __init__(
        self,
        stack: _Stack,
        optimizer: torch.optim.Optimizer,
        criterion: Callable[..., torch.Tensor],
        *,
        clip_norm: float,
    ) -> None:
        self._stack, self._optimizer, self._criterion, self._clip_norm = stack, optimizer, criterion, clip_norm
        self.probes: list[Any] = []
        self.training = [True] * len(stack.models)
        kind = type(type(optimizer).__name__, (_Shadow,), {})  # a trace says which optimizer was used
        self.shadows: list[_Shadow] = [kind(list(model.parameters()), optimizer.step) for model in stack.models]
        self._programs: dict[tuple[Any, ...], Callable[..., torch.Tensor]] = {}

    def set_rate(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        for shadow in self.shadows:
            shadow.param_groups[0]["lr"] = lr

    def step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Make one step; return the losses, (S,)."""
        self._optimizer.zero_grad(set_to_none=True)
        recorded = any(probe.recording for probe, on in zip(self.probes, self.training, strict=True) if on)
        losses = self._one_by_one(x, y) if recorded else self._at_once(x, y)
        step: Callable[[], Any] = self._optimizer.step
        if not recorded:
            step()
            for probe, on in zip(self.probes, self.training, strict=True):
                if on:
                    probe.skip()
            return losses
        for shadow, on in zip(self.shadows, self.training, strict=True):
            if on:  # each probe reads its net before the step inside and after it
                shadow.inner, step = step, shadow.step
        step()
        return losses

    def _one_by_one(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        losses = torch.full((len(x),), math.nan, device=x.device)
        for place, model in enumerate(self._stack.models):
            model.zero_grad(set_to_none=True)
            if self.training[place]:
                loss = self._criterion(model(x[place]), y[place])
                loss.backward()
                self.probes[place].log(loss=loss)
                if self._clip_norm > 0:
                    total = nn.utils.clip_grad_norm_(model.parameters(), self._clip_norm)
                    self.probes[place].log(clip=(total, self._clip_norm))
                losses[place] = loss.detach()
        for name, param in self._stack.params.items():
            grads = [model.get_parameter(name).grad for model in self._stack.models]
            like = next((grad for grad in grads if grad is not None), None)
            if like is not None:
                param.grad = torch.stack([torch.zeros_like(like) if grad is None else grad for grad in grads])
        return losses

    def _at_once(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        losses = self._program(x, y)(self._stack.params, self._stack.buffers, x, y)
        losses.sum().backward()
        if self._clip_norm > 0:
            self._clip()
        return losses.detach()

    def _clip(self) -> None:
        """Do to each net's gradients what clip_grad_norm_ does."""
        grads = [param.grad for param in self._stack.trained if param.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in grads])
        factors = (self._clip_norm / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(factors.view(-1, *[1] * (grad.dim() - 1)))

    def _program(self, x: torch.Tensor, y: torch.Tensor) -> Callable[..., torch.Tensor]:
        """Return the batched forward pass and losses of all nets, as plain operators on stacked tensors."""
        form = (x.shape, y.shape, x.dtype, y.dtype)
        if form not in self._programs:
            stack = self._stack
            self._programs[form] = batched_program(stack.models[0], stack.params, stack.buffers, self._criterion, x, y)
        return self._programs[form]

    def look(self, losses: Sequence[float]) -> float | None:
        """Let nets whose loss is not finite go, and return the mean loss of the others."""
        known = [loss for loss in losses if math.isfinite(loss)]
        for place, loss in enumerate(losses):
            if self.training[place] and not math.isfinite(loss):
                self.training[place] = False
                self.probes[place].close()
        return sum(known) / len(known) if known else None
