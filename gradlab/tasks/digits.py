"""Handwritten digits of 8x8 pixels: 1,797 real images, shipped with the package."""

from __future__ import annotations

import hashlib
import io
from importlib import resources

import numpy as np
import torch

from gradlab.errors import DataError
from gradlab.tasks.image import ImageTask, build_image_task, check_size

__all__ = ["DIGITS_SHA256", "load_digits"]

DIGITS_SHA256 = "4891c9927622d67e3e7971faf44e2b0ce282c7e5c458d215e9a1e92cdd3bfe29"

_TRAIN = 1400


def load_digits(*, size: int = 8, augment: bool = False) -> ImageTask:
    """Load the 1,797 handwritten digits: 1,400 to train on, 397 to test on, 10 classes, one channel.

    Args:
        size: Side in pixels: 8 (the default, the data's own), 4, 2 or 1, by box averaging.
        augment: Whether training batches are cropped and flipped (padding of 1 pixel). Default: no, since a mirrored
            digit is often no digit.

    Returns:
        The task, on the CPU in float32, normalized; `mean` and `std` are in units of the raw pixels, 0 to 16.

    Raises:
        UsageError: `size` does not divide 8.
        DataError: The file in the package is damaged.

    Note:
        The split is the one permutation stored in the data file (drawn once with numpy's default_rng(0)): the same
        everywhere, not stratified by class, and with the same 13 writers on both sides, so test accuracy says how
        well a net generalizes to new digits of known hands, not to new hands.

    Example:
        >>> task = load_digits()
        >>> task.train_images.shape, task.test_images.shape
        (torch.Size([1400, 1, 8, 8]), torch.Size([397, 1, 8, 8]))

    Source:
        E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998,
        doi 10.24432/C50P49 (its test part), CC BY 4.0; see data/ATTRIBUTION.md.
    """
    check_size(8, size)
    # Bytes rather than a path, so that it reads from a zipped package too.
    content = resources.files("gradlab.tasks").joinpath("data", "digits.npz").read_bytes()
    if hashlib.sha256(content).hexdigest() != DIGITS_SHA256:
        raise DataError(
            "The digits in gradlab/tasks/data/digits.npz are damaged: wrong SHA-256 sum; reinstall gradlab."
        )
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        order = arrays["order"].astype(np.int64)
        images = torch.from_numpy(arrays["images"][order, None])
        labels = torch.from_numpy(arrays["labels"][order])
    return build_image_task(
        name="digits",
        classes=10,
        train_pixels=images[:_TRAIN],
        train_labels=labels[:_TRAIN],
        test_pixels=images[_TRAIN:],
        test_labels=labels[_TRAIN:],
        size=size,
        augment=augment,
    )
