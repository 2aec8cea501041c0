"""A case of the zoo: one small net in one training run, and the label that an independent measurement confirms."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

__all__ = ["Batches", "Case", "Job", "Label", "Log", "Loss", "seeded", "train", "train_step"]

Label = Literal["healthy", "vanishing", "exploding", "dead", "saturated", "nonfinite", "frozen"]
Batches = Callable[[int], tuple[tuple[Any, ...], Tensor]]
"""Number of the batch -> (inputs of the model, target)."""
Loss = Callable[[Any, Tensor], Tensor]
Log = Callable[..., None]
"""Told `loss=` and, where gradients were clipped, `clip=(total norm, largest norm)` before the optimizer steps."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A training run, ready to go; made anew each time it is run.

    Args:
        model: The net.
        optimizer: Its optimizer.
        batches: Draws a batch.
        loss: Of the model's output and the target.
        steps: Optimizer steps.
        accumulate: Batches whose gradients are added up before a step.
        clip: Largest norm of all gradients; None for no clipping.
        scaler: Scales the loss under AMP.
        autocast: The type of AMP's operations; None for none.
        before_step: Called with the number of the step before its gradients are zeroed: a learning-rate schedule, say.
        before_update: Called with it when the gradients are there.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Batches
    loss: Loss
    steps: int = 12
    accumulate: int = 1
    clip: float | None = None
    scaler: torch.amp.GradScaler | None = None
    autocast: torch.dtype | None = None
    before_step: Callable[[int], None] | None = None
    before_update: Callable[[int], None] | None = None


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One net of the zoo.

    Args:
        name: Its name, unique.
        family: Kind of architecture.
        label: What is wrong with it, or "healthy".
        build: Makes the job; draws from torch's global generator, which `seeded` sets.
        why: The trap or the cause, a few words.
        axis: "depth", "time" or "training" for a label that has one.
        places: Globs over dotted paths, of which a right finding names at least one; empty where it is about all.
        cuts: Modules nearest the input and nearest the loss through whose outputs all gradient flows; the norms there
            are what "vanishing" and "exploding" through depth are measured by. Empty where a net has no such cuts.
        bounded_ends: Bounded activations that are saturated as they should be: the output of a converged net.
    """

    name: str
    family: str
    label: Label
    build: Callable[[], Job]
    why: str
    axis: str = ""
    places: tuple[str, ...] = ()
    cuts: tuple[str, ...] = ()
    bounded_ends: tuple[str, ...] = ()


@contextmanager
def seeded(case: Case) -> Iterator[None]:
    """Seed torch's global generator by the case's name, and give it back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(case.name.encode()))
        yield


def train(job: Job, log: Log | None = None) -> None:
    """Run a job to its end."""
    for step in range(job.steps):
        train_step(job, step, log)


def train_step(job: Job, step: int, log: Log | None = None) -> None:
    """Run one step of a job: forward and backward for each batch that is accumulated, then the update."""
    if job.before_step is not None:
        job.before_step(step)
    job.optimizer.zero_grad()
    total = 0.0
    for part in range(job.accumulate):
        inputs, target = job.batches(step * job.accumulate + part)
        with torch.autocast("cpu", dtype=job.autocast, enabled=job.autocast is not None):
            loss = job.loss(job.model(*inputs), target) / job.accumulate
        (loss if job.scaler is None else job.scaler.scale(loss)).backward()
        total += float(loss.detach())
    if job.before_update is not None:
        job.before_update(step)
    told: dict[str, Any] = {"loss": total}
    if job.clip is not None:
        if job.scaler is not None:
            job.scaler.unscale_(job.optimizer)
        told["clip"] = (nn.utils.clip_grad_norm_(job.model.parameters(), job.clip), job.clip)
    if log is not None:
        log(**told)
    if job.scaler is None:
        job.optimizer.step()
    else:
        job.scaler.step(job.optimizer)
        job.scaler.update()
