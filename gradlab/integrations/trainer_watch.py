"""What all trainers' callbacks share: a probe from the start of training to its end, and the loss of each step."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, final

import torch
from torch import nn

from gradlab.errors import UsageError, unknown
from gradlab.probes.schedule import Schedule
from gradlab.probes.watch import LayerSelection, Probe, watch
from gradlab.trace import Trace

__all__ = ["TrainerWatch", "WatchOptions"]


class WatchOptions(TypedDict, total=False):
    """Options of `gl.watch` that a callback hands on; the trainer knows the model, its optimizers and the scaler."""

    every: int | Schedule
    layers: LayerSelection
    timesteps: bool | int
    without_grad: bool


@final
class TrainerWatch:
    """Watches one training of a trainer after the other, each with a probe of its own.

    Args:
        save_to: Folder for the trace of a training, written when it ends, by an error too; None keeps it in memory.
        options: Options of `gl.watch`.

    Raises:
        UsageError: An option that `gl.watch` does not have, or that the trainer decides.
    """

    def __init__(self, save_to: str | os.PathLike[str] | None, options: Mapping[str, Any]) -> None:
        for name in options:
            if name not in WatchOptions.__annotations__:
                raise unknown("option", name, WatchOptions.__annotations__)
        self._save_to = None if save_to is None else Path(save_to)
        self._options = dict(options)
        self._probe: Probe | None = None
        self._scaler: torch.amp.GradScaler | None = None
        self._open = False
        self._loss: tuple[int, torch.Tensor] | None = None

    def begin(
        self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], scaler: torch.amp.GradScaler | None
    ) -> None:
        """Attach a probe; one that an earlier training left attached is closed first.

        Args:
            model: The model, as the user built it.
            optimizers: The optimizers of torch that the trainer steps.
            scaler: The trainer's gradient scaler, if it has one.

        Raises:
            UsageError: What `save_to` names exists, or `gl.watch` refuses the model or the options.
        """
        self.end(save=False)
        if self._save_to is not None and self._save_to.exists():
            raise UsageError(
                f"save_to: {self._save_to} exists already, and no trace is overwritten: name a new folder."
            )
        several = optimizers if len(optimizers) > 1 else next(iter(optimizers), None)
        scaler = scaler if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled() else None
        self._probe = watch(model, several, scaler=scaler, **self._options)
        self._open, self._scaler, self._loss = True, scaler, None

    @property
    def recording(self) -> bool:
        """Whether a probe is attached and records the open step."""
        return self._open and self._probe is not None and self._probe.recording

    def add_loss(self, loss: torch.Tensor, *, scaled: bool) -> None:
        """Add to the open step's loss; the micro-batches of a step add up. Nothing is copied to the host.

        Args:
            loss: One entry: the share of the step's loss that is about to go, or went, backward.
            scaled: Whether the gradient scaler has multiplied it already.
        """
        if self._probe is None or not self.recording:
            return
        loss = loss.detach()
        if loss.dtype.itemsize < 4:
            loss = loss.float()  # micro-batches add up without rounding to 8 bits
        if scaled and self._scaler is not None:
            loss = loss / self._scaler.scale(torch.ones_like(loss))
        step = self._probe.step_number
        if self._loss is not None and self._loss[0] == step:
            loss = loss + self._loss[1]
        self._loss = step, loss
        self._probe.log(loss=loss)

    def end(self, *, save: bool) -> None:
        """Detach the probe, if one is attached; save its trace where that was asked for.

        Args:
            save: Whether to write it to `save_to`: one process of several does.

        Raises:
            StoreError: The folder cannot be written.
        """
        if self._probe is None or not self._open:
            return
        self._open, self._loss = False, None
        self._probe.close()
        if save and self._save_to is not None:
            self._probe.trace.save(self._save_to)

    @property
    def trace(self) -> Trace:
        """The trace of the latest training, so far or whole.

        Raises:
            UsageError: No training has begun.
        """
        if self._probe is None:
            raise UsageError("There is no trace yet: this callback has seen no training begin.")
        return self._probe.trace
