"""What nets are trained on: images, shipped or fetched once and checked, and sequences, drawn as they are needed.

Listing the tasks or asking where a data set lies imports no torch; a task's own module is imported when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from gradlab.errors import unknown

if TYPE_CHECKING:
    from os import PathLike

    from gradlab.tasks.adding import AddingTask, adding_baseline
    from gradlab.tasks.cifar10 import load_cifar10
    from gradlab.tasks.cifar10_files import find_cifar10
    from gradlab.tasks.copy_memory import CopyTask, copy_baseline
    from gradlab.tasks.digits import load_digits
    from gradlab.tasks.image import ImageTask, batch_schedule, box_downsample
    from gradlab.tasks.pixels import PixelTask, load_pixel_digits
    from gradlab.tasks.recall import RecallTask, recall_baseline
    from gradlab.tasks.sequence_draws import EVALUATION_SEQUENCES, SequenceTask, evaluation_set
    from gradlab.tasks.write_query import WriteQueryTask, write_query_bayes_loss

__all__ = [
    "EVALUATION_SEQUENCES",
    "TASK_NAMES",
    "AddingTask",
    "CopyTask",
    "ImageTask",
    "PixelTask",
    "RecallTask",
    "SequenceTask",
    "WriteQueryTask",
    "adding_baseline",
    "batch_schedule",
    "box_downsample",
    "copy_baseline",
    "evaluation_set",
    "fetch_task",
    "find_cifar10",
    "load_cifar10",
    "load_digits",
    "load_pixel_digits",
    "load_task",
    "recall_baseline",
    "write_query_bayes_loss",
]

TASK_NAMES = ("digits", "cifar10")

_HOME = {
    "AddingTask": "adding",
    "CopyTask": "copy_memory",
    "EVALUATION_SEQUENCES": "sequence_draws",
    "ImageTask": "image",
    "PixelTask": "pixels",
    "RecallTask": "recall",
    "SequenceTask": "sequence_draws",
    "WriteQueryTask": "write_query",
    "adding_baseline": "adding",
    "batch_schedule": "image",
    "box_downsample": "image",
    "copy_baseline": "copy_memory",
    "evaluation_set": "sequence_draws",
    "find_cifar10": "cifar10_files",
    "load_cifar10": "cifar10",
    "load_digits": "digits",
    "load_pixel_digits": "pixels",
    "recall_baseline": "recall",
    "write_query_bayes_loss": "write_query",
}


def __getattr__(name: str) -> object:
    """Import the module a public name lives in on first use, so that `import gradlab.tasks` stays free of torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def fetch_task(name: str, data_dir: str | PathLike[str] | None = None) -> None:
    """Make sure that a task's files are on this machine, downloading them if need be; loads nothing.

    Call it before several processes load a task, so that not each of them downloads it.

    Args:
        name: One of `TASK_NAMES`.
        data_dir: As in `load_task`.

    Raises:
        UsageError: The name is unknown.
        DataError: The files are missing, damaged or could not be downloaded.

    Example:
        >>> fetch_task("digits")
    """
    if name not in TASK_NAMES:
        raise unknown("task", name, TASK_NAMES)
    if name == "cifar10":
        from gradlab.tasks.cifar10_files import fetch_cifar10

        fetch_cifar10(data_dir)


def load_task(
    name: str, *, size: int | None = None, data_dir: str | PathLike[str] | None = None, augment: bool = False
) -> ImageTask:
    """Load a task by its name, normalized and ready to train on.

    Args:
        name: One of `TASK_NAMES`: "digits" (8x8, shipped) or "cifar10" (32x32, downloaded once).
        size: Side of the images in pixels; a divisor of the task's own size. Default: the task's own size.
        data_dir: Where the CIFAR-10 files lie (see `find_cifar10`); "digits" needs no files and ignores it.
        augment: Whether training batches are cropped and flipped at random. Default: no.

    Returns:
        The task, on the CPU in float32.

    Raises:
        UsageError: The name is unknown, or the task has no images of that size.
        DataError: The files are missing, damaged or could not be downloaded.

    Example:
        >>> load_task("digits").image_shape
        (1, 8, 8)
        >>> load_task("digts")
        Traceback (most recent call last):
        gradlab.errors.UsageError: Unknown task 'digts'. Did you mean 'digits'?
    """
    if name == "digits":
        from gradlab.tasks.digits import load_digits

        return load_digits(size=8 if size is None else size, augment=augment)
    if name == "cifar10":
        from gradlab.tasks.cifar10 import load_cifar10

        return load_cifar10(size=32 if size is None else size, data_dir=data_dir, augment=augment)
    raise unknown("task", name, TASK_NAMES)
