"""CIFAR-10: 60,000 colour photographs of 32x32 pixels in 10 classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gradlab.tasks.cifar10_batches import read_batches
from gradlab.tasks.cifar10_files import TEST_FILES, TRAIN_FILES, fetch_cifar10
from gradlab.tasks.image import ImageTask, build_image_task, check_size

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["load_cifar10"]


def load_cifar10(
    *,
    data_dir: str | PathLike[str] | None = None,
    size: int = 32,
    augment: bool = False,
    download: bool = True,
    url: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
) -> ImageTask:
    """Load CIFAR-10: 50,000 images to train on, 10,000 to test on, 10 classes, three channels.

    Args:
        data_dir: Where the files lie: the folder `cifar-10-batches-py`, the folder above it, or one that holds
            `cifar-10-python.tar.gz`. Default: $GRADLAB_DATA, then the user's cache, then a download to that cache.
        size: Side in pixels: 32 (the default, the data's own), 16, 8, 4, 2 or 1, by box averaging.
        augment: Whether training batches are cropped and flipped (padding of 4 pixels at size 32). Default: no.
        download: Whether a download is allowed when no `data_dir` is given and no files are found. Default: yes.
        url: Where to download from. Default: the authors' page.
        cache_dir: Where a download is kept. Default: the operating system's place for gradlab's cached files.

    Returns:
        The task, on the CPU in float32, normalized; `mean` and `std` are in units of the raw pixels, 0 to 255.

    Raises:
        UsageError: `size` does not divide 32.
        DataError: The files are missing, damaged or could not be downloaded.

    Note:
        At size 32 the task takes 740 MB, at 16 a quarter of that. The files are pickles: they are read by an
        unpickler that knows numpy arrays and nothing else, so that a forged one is refused and never run.

    Example:
        >>> load_cifar10(data_dir="no-such-folder")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        gradlab.errors.DataError: The data folder no-such-folder does not exist; give a folder that holds ...

    Source:
        A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009, chapter 3.
    """
    check_size(32, size)
    folder = fetch_cifar10(data_dir, download=download, url=url, cache_dir=cache_dir)
    train_pixels, train_labels = read_batches(folder, TRAIN_FILES)
    test_pixels, test_labels = read_batches(folder, TEST_FILES)
    return build_image_task(
        name="cifar10",
        classes=10,
        train_pixels=torch.from_numpy(train_pixels),
        train_labels=torch.from_numpy(train_labels),
        test_pixels=torch.from_numpy(test_pixels),
        test_labels=torch.from_numpy(test_labels),
        size=size,
        augment=augment,
    )
