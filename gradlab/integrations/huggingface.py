"""Hugging Face: a callback that watches the model while `transformers.Trainer` trains it."""

from __future__ import annotations

import os
from typing import Any, Self, Unpack, final

import torch

from gradlab.integrations.extras import missing
from gradlab.integrations.trainer_watch import TrainerWatch, WatchOptions
from gradlab.probes.hooks import Hook
from gradlab.trace import Trace

try:
    import accelerate  # noqa: F401  # Trainer needs it, and says so much later
    from transformers import TrainerCallback
except ImportError as error:
    package = "accelerate" if "accelerate" in str(error) else "transformers"
    raise missing(package, extra="huggingface") from error

__all__ = ["GradlabCallback"]


@final
class GradlabCallback(TrainerCallback):
    """Watches the model of a `transformers.Trainer` from the start of training to its end.

    Steps are closed by the optimizer's own step hooks, so a step that accumulates gradients is one step. Its loss is
    the model's own (`output.loss`), weighted as the trainer weighted it: by the gradient that came back to it. With a
    loss computed elsewhere (`compute_loss_func`), `trace.steps.loss` is missing.

    Trainer tells its callbacks nothing about an error. As a context manager the callback detaches then too; otherwise
    call `close()`, or begin another training.

    Args:
        save_to: Folder for the trace, written when training ends; None keeps it in memory.
        **options: `every`, `layers`, `timesteps` and `without_grad`, as `gl.watch` takes them.

    Raises:
        UsageError: An option that `gl.watch` does not have.

    Example:
        >>> with GradlabCallback(every=10) as callback:
        ...     pass  # transformers.Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    """

    def __init__(self, *, save_to: str | os.PathLike[str] | None = None, **options: Unpack[WatchOptions]) -> None:
        self._watch = TrainerWatch(save_to, options)
        self._handle: Any = None
        self._saves = True

    @property
    def trace(self) -> Trace:
        """The trace of the latest training.

        Raises:
            UsageError: No training has begun.
        """
        return self._watch.trace

    def close(self) -> None:
        """Detach, and save where that was asked for; nothing happens where training has ended.

        Raises:
            StoreError: The trace cannot be written.
        """
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._watch.end(save=self._saves)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what the trainer calls -----------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Attach."""
        if self._handle is not None:  # a training that an error ended
            self._handle.remove()
        optimizer, scaler = unwrapped(kwargs["optimizer"])
        self._saves = state.is_world_process_zero
        self._watch.begin(kwargs["model"], [optimizer], scaler)
        self._handle = kwargs["model"].register_forward_hook(Hook(self._see_loss))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Detach and save."""
        self.close()

    def _see_loss(self, model: Any, args: Any, output: Any) -> None:  # noqa: ARG002
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if not (isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.requires_grad and self._watch.recording):
            return
        value = loss.detach()
        # What Trainer divides the loss by depends on the model and the batch; the gradient that comes back is exactly
        # that weight (times the loss scale).
        loss.register_hook(lambda weight: self._watch.add_loss(value * weight, scaled=True))


def unwrapped(optimizer: Any) -> tuple[torch.optim.Optimizer, torch.amp.GradScaler | None]:
    """Return torch's optimizer inside accelerate's wrapper, and the gradient scaler that the wrapper steps it with.

    Args:
        optimizer: What Trainer hands its callbacks.
    """
    scaler = None
    while hasattr(optimizer, "optimizer"):
        scaler = scaler or getattr(optimizer, "scaler", None)
        optimizer = optimizer.optimizer
    return optimizer, scaler
