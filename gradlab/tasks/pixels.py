"""Digits read one pixel at a time, in reading order or in a fixed random order."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from gradlab.errors import UsageError
from gradlab.tasks.digits import load_digits
from gradlab.tasks.image import ImageTask
from gradlab.tasks.sequence_draws import check_draw

__all__ = ["PixelTask", "load_pixel_digits"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PixelTask:
    """Image classification with one pixel a step: T = H W steps of C features, and the class at the last step.

    Two tasks are equal only if they are the same object, as with `ImageTask`.

    Args:
        images: The images; `augment` is not used.
        order: The pixel that each step shows, int64, (H W,), row by row from 0, on the images' device.
    """

    images: ImageTask
    order: Tensor

    @property
    def input_size(self) -> int:
        """Features of a step: the channels."""
        return self.images.image_shape[0]

    @property
    def outputs(self) -> int:
        """Classes."""
        return self.images.classes

    @property
    def head(self) -> str:
        """Where the target stands."""
        return "last"

    @property
    def steps(self) -> int:
        """Steps of the input."""
        return self.order.numel()

    @property
    def device(self) -> torch.device:
        """Where the images lie."""
        return self.order.device

    @property
    def baseline(self) -> float:
        """Loss of a guess among equally likely classes, in nats."""
        return math.log(self.images.classes)

    def to(self, device: torch.device | str) -> PixelTask:
        """Return the task on another device."""
        return replace(self, images=self.images.to(device), order=self.order.to(device))

    def sequences(self, images: Tensor) -> Tensor:
        """Return images, (N, C, H, W), as sequences, (N, H W, C), in this task's order."""
        return images.flatten(2)[:, :, self.order].transpose(1, 2).contiguous()

    def batch(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw n training images at random, with replacement, without waiting for the host.

        Args:
            n: Sequences, at least 1.
            generator: Source of randomness, on the task's device; without it torch's global one is used.

        Returns:
            Pixels, normalized, (n, H W, C), and labels, int64, (n,).

        Raises:
            UsageError: n is below 1, or the generator is on another device.
        """
        generator = check_draw(n, generator, self.device)
        count = len(self.images.train_labels)
        which = torch.randint(count, (n,), generator=generator, device=self.device)
        return self.sequences(self.images.train_images[which]), self.images.train_labels[which]

    def test_set(self) -> tuple[Tensor, Tensor]:
        """Return all test images as sequences, and their labels.

        Note:
            397 of the shipped digits: an accuracy of .8 has a standard error of .02, too much to rank nets that are
            a few points apart.
        """
        return self.sequences(self.images.test_images), self.images.test_labels

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats of logits (n, classes) and labels (n,)."""
        return functional.cross_entropy(outputs, targets)


def load_pixel_digits(*, permuted: bool = False, size: int = 8, seed: int = 0) -> PixelTask:
    """Load the digits as sequences of pixels: 64 steps of one feature.

    Args:
        permuted: Whether the pixels come in one fixed random order instead of row by row, so that what belongs
            together lies far apart.
        size: Side of the images: 8 (the default), 4 or 2, so 64, 16 or 4 steps.
        seed: Seed of the permutation, of a CPU generator of its own; unused without `permuted`.

    Returns:
        The task, on the CPU in float32.

    Raises:
        UsageError: `size` does not divide 8, or is 1, which leaves a sequence of one step.
        DataError: The file in the package is damaged.

    Example:
        >>> x, y = load_pixel_digits().batch(5, torch.Generator().manual_seed(0))
        >>> x.shape, y.shape
        (torch.Size([5, 64, 1]), torch.Size([5]))

    Source:
        Le, Jaitly & Hinton 2015 (arXiv 1504.00941), sec. 4.2, with 784-step MNIST.
    """
    if size == 1:
        raise UsageError("Images of size 1 make sequences of one step: give a size of 2, 4 or 8.")
    images = load_digits(size=size)
    steps = size * size
    order = torch.randperm(steps, generator=torch.Generator().manual_seed(seed)) if permuted else torch.arange(steps)
    return PixelTask(images=images, order=order)
