"""Lightning: a callback that watches the module while `Trainer.fit` trains it."""

from __future__ import annotations

import os
from typing import Any, Unpack, final

from gradlab.errors import GradlabError
from gradlab.integrations.extras import missing
from gradlab.integrations.trainer_watch import TrainerWatch, WatchOptions
from gradlab.trace import Trace

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise missing("lightning", extra="lightning") from error

__all__ = ["GradlabCallback"]


@final
class GradlabCallback(Callback):
    """Watches the LightningModule from the start of training to its end, or to the error that ends it.

    Steps are closed by the optimizers' own step hooks, so a step that accumulates gradients over batches is one step;
    its loss is the sum of what its batches sent backward. The scaler of 16-bit mixed precision is found. Where the
    trainer clips, it has done so when a parameter's gradient is recorded.

    Args:
        save_to: Folder for the trace, written when training ends; None keeps it in memory.
        **options: `every`, `layers`, `timesteps` and `without_grad`, as `gl.watch` takes them.

    Raises:
        UsageError: An option that `gl.watch` does not have.

    Example:
        >>> callback = GradlabCallback(every=10, layers="net.*")  # lightning.Trainer(callbacks=[callback])
        >>> callback.trace
        Traceback (most recent call last):
        gradlab.errors.UsageError: There is no trace yet: this callback has seen no training begin.
    """

    def __init__(self, *, save_to: str | os.PathLike[str] | None = None, **options: Unpack[WatchOptions]) -> None:
        self._watch = TrainerWatch(save_to, options)

    @property
    def trace(self) -> Trace:
        """The trace of the latest training.

        Raises:
            UsageError: No training has begun.
        """
        return self._watch.trace

    # -- what the trainer calls -----------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach: only now are the optimizers known and the checks of validation over."""
        self._watch.begin(pl_module, trainer.optimizers, getattr(trainer.precision_plugin, "scaler", None))

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:  # noqa: ARG002
        """Note the loss, which the precision plugin has scaled by then."""
        self._watch.add_loss(loss, scaled=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Detach and save."""
        self._watch.end(save=trainer.is_global_zero)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:  # noqa: ARG002
        """Detach and save what there is; a failure to save is noted on the error that ended the training."""
        try:
            self._watch.end(save=trainer.is_global_zero)
        except GradlabError as error:
            exception.add_note(f"The trace was not saved: {error}")
