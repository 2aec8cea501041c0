"""Training of image classifiers, watched by probes and ending in numbers: SGD as in He et al. 2015."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradlab.checkpoint import Checkpoint
from gradlab.errors import UsageError, unknown
from gradlab.probes import LayerSelection, Schedule
from gradlab.runtime import PRECISIONS, explain_memory, resolve_device
from gradlab.tasks.image import ImageTask, batch_schedule
from gradlab.trace import Trace
from gradlab.training_steps import run_steps

__all__ = ["TrainResult", "TrainSettings", "evaluate", "learning_rate", "sgd", "train"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """How a net is trained: SGD with momentum, as in He et al. 2015, sec. 4.2, whose values are the defaults.

    Args:
        steps: Updates.
        batch_size: Images a step.
        lr: Learning rate after warm-up.
        momentum: Of SGD.
        weight_decay: L2 penalty, added to the gradient by the optimizer.
        milestones: Steps at which the rate is multiplied by `lr_decay`.
        lr_decay: See milestones.
        warmup_steps: Steps at `warmup_lr` before `lr`; He et al. warm up their 110-layer net at 0.01.
        warmup_lr: See warmup_steps.
        clip_norm: Largest norm of all gradients together; 0 does not clip.
        precision: "float32", or autocast to "bf16", or to "fp16" with a GradScaler (CUDA only).
        channels_last: Memory format of images and weights; about twice as fast for small CPU convolutions.
        seed: Of the order of the data and its augmentation.

    Raises:
        UsageError: A value out of range.
    """

    steps: int = 64_000
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    milestones: tuple[int, ...] = ()
    lr_decay: float = 0.1
    warmup_steps: int = 0
    warmup_lr: float = 0.01
    clip_norm: float = 0.0
    precision: str = "float32"
    channels_last: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("warmup_steps", 0)):
            if not isinstance(getattr(self, name), SupportsIndex):
                raise UsageError(f"{name}={getattr(self, name)!r} must be a whole number.")
            if not getattr(self, name) >= least:
                raise UsageError(f"{name}={getattr(self, name)} is too small: it must be at least {least}.")
        for name in ("lr", "momentum", "weight_decay", "clip_norm", "warmup_lr", "lr_decay"):
            value = getattr(self, name)
            if not (isinstance(value, Real) and 0 <= float(value) < math.inf):
                raise UsageError(f"{name}={value!r} must be a finite number of at least 0.")
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a training run ended with.

    Args:
        status: "done", or "diverged" where the loss became NaN or Inf.
        losses: Training loss of every step up to the last finite one and, if diverged, the one that was not; (steps,).
        diverged_at: The step whose loss was not finite, or None.
        trace: What the probes recorded, up to that step.
        test_error: Share of test images misclassified at the end, in percent; NaN if diverged or not evaluated.
        seconds: Wall time.
        cpu_seconds: Process time, which another process on the core does not inflate.
    """

    status: str
    losses: npt.NDArray[np.float64]
    diverged_at: int | None
    trace: Trace
    test_error: float
    seconds: float
    cpu_seconds: float


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Return the learning rate of a step: warm-up, then lr times lr_decay for each milestone reached.

    Example:
        >>> s = TrainSettings(lr=0.1, warmup_steps=10, warmup_lr=0.01, milestones=(100,))
        >>> [round(learning_rate(s, step), 4) for step in (0, 10, 99, 100)]
        [0.01, 0.1, 0.1, 0.01]
    """
    if step < settings.warmup_steps:
        return settings.warmup_lr
    return settings.lr * settings.lr_decay ** sum(step >= milestone for milestone in settings.milestones)


def train(
    model: nn.Module,
    task: ImageTask,
    settings: TrainSettings,
    *,
    device: torch.device | str = "auto",
    every: int | Schedule = 1,
    layers: LayerSelection = None,
    on_step: Callable[[int, float | None], None] | None = None,
    loss: Callable[..., torch.Tensor] = cross_entropy,
    checkpoint: Checkpoint | None = None,
) -> TrainResult:
    """Train a classifier and record it.

    Nothing is read back from an accelerator but at recorded steps, so on a GPU a loss that is not finite is noticed
    there; the result is the same, since every loss is kept on the device.

    Args:
        model: Maps images (N, C, H, W) to logits (N, classes); moved to the device.
        task: The data; moved to the device as a whole.
        settings: How to train.
        device: Where: a torch.device or its name. Default: CUDA if there is one, else MPS, else the CPU.
        every: Which steps the probes record; see `watch`.
        layers: Which layers; see `watch`.
        on_step: Called after each step with its number and its loss, None where the loss is still on the device. What
            it raises ends the training.
        loss: From what the model returns while training, and the labels, to a scalar. Default: cross-entropy of logits.
        checkpoint: Where the state is kept, and found again after a crash; see `Checkpoint`. What `on_step` gathers is
            not part of it. Default: nowhere.

    Returns:
        Losses, trace and test error; a loss that is not finite ends the training as "diverged" and is no exception.

    Raises:
        ResourceError: Out of memory: one sentence with what was asked for, what was free and what to lower.
        UsageError: An unknown device, fp16 without CUDA, or bf16 on a device that torch has no autocast for.

    Example:
        >>> from gradlab.tasks import load_digits
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> result = train(model, load_digits(), TrainSettings(steps=3), device="cpu")
        >>> result.status, len(result.losses), len(result.trace.steps)
        ('done', 3, 3)

    Source:
        K. He et al., "Deep residual learning for image recognition", 2015, sec. 4.2: the recipe of the defaults.
    """
    device = resolve_device(device) if isinstance(device, str) else device
    try:
        return _train(model, task, settings, device, every, layers, on_step, loss, checkpoint)
    except (RuntimeError, MemoryError) as error:
        doing = f"training {type(model).__name__} at batch_size={settings.batch_size}"
        explained = explain_memory(error, doing=doing, lower="batch_size, then width, depth or size", device=device)
        if explained is None:
            raise
        raise explained from error


def _train(
    model: nn.Module,
    task: ImageTask,
    settings: TrainSettings,
    device: torch.device,
    every: int | Schedule,
    layers: LayerSelection,
    on_step: Callable[[int, float | None], None] | None,
    criterion: Callable[..., torch.Tensor],
    checkpoint: Checkpoint | None,
) -> TrainResult:
    _check_precision(settings.precision, device)
    wall, cpu = time.perf_counter(), time.process_time()
    model.to(device).train()
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack this form
    task = task.to(device, channels_last=settings.channels_last)
    order = batch_schedule(len(task.train_labels), settings.batch_size, settings.steps, settings.seed).to(device)
    augmentation = torch.Generator(device if device.type != "meta" else "cpu").manual_seed(settings.seed + 1)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
    optimizer = sgd(model.parameters(), settings, fused=scaler.is_enabled())

    def draw(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return task.batch(order[step], augmentation if device.type != "meta" else None)

    run = run_steps(
        model,
        optimizer,
        draw,
        criterion,
        steps=settings.steps,
        device=device,
        rate=lambda step: learning_rate(settings, step),
        clip_norm=settings.clip_norm,
        precision=settings.precision,
        scaler=scaler,
        every=every,
        layers=layers,
        on_step=on_step,
        checkpoint=checkpoint,
        stateful={"augmentation": augmentation},
        about={"settings": repr(settings), "task": repr((task.name, task.image_shape, task.augment))},
    )
    error = math.nan if run.diverged_at is not None or device.type == "meta" else evaluate(model, task)
    return TrainResult(
        status="done" if run.diverged_at is None else "diverged",
        losses=run.losses,
        diverged_at=run.diverged_at,
        trace=run.trace,
        test_error=error,
        seconds=time.perf_counter() - wall + run.earlier_seconds,
        cpu_seconds=time.process_time() - cpu + run.earlier_cpu_seconds,
    )


def _check_precision(precision: str, device: torch.device) -> None:
    if precision == "fp16" and device.type != "cuda":
        raise UsageError("precision=fp16 needs a CUDA device: use precision=bf16 or float32 here.")
    if precision == "bf16" and not torch.amp.is_autocast_available(device.type):
        raise UsageError(f"precision=bf16 needs autocast, which torch has not for '{device.type}': use float32 there.")


def sgd(params: Iterable[torch.Tensor], settings: TrainSettings, *, fused: bool = False) -> torch.optim.SGD:
    """Make the optimizer; `fused` for a GradScaler, which else asks the host at each step whether to skip."""
    params = list(params)
    optimizer = torch.optim.SGD(
        params,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        fused=fused or None,
    )
    if fused and settings.momentum > 0:
        # The fused step takes its momentum from empty memory and leaves it so where the first update is skipped, as a
        # scaler's usually is; the second then adds what lay there. From zeros both steps are the ordinary ones.
        for param in params:
            optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    return optimizer


def evaluate(model: nn.Module, task: ImageTask, batch_size: int = 500) -> float:
    """Return the share of test images misclassified, in percent, with running statistics (evaluation mode)."""
    was_training = model.training
    model.eval()
    wrong = torch.zeros((), dtype=torch.int64, device=task.test_labels.device)
    try:
        with torch.no_grad():
            batches = zip(task.test_images.split(batch_size), task.test_labels.split(batch_size), strict=True)
            for x, y in batches:
                wrong += (model(x).argmax(1) != y).sum()
    finally:
        model.train(was_training)
    return 100.0 * int(wrong) / len(task.test_labels)
