"""Image classification tasks as tensors on one device: batches, augmentation, order, resolution."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from gradlab.errors import UsageError

__all__ = ["ImageTask", "allowed_sizes", "batch_schedule", "box_downsample", "build_image_task", "check_size"]

# Images converted at a time: bounds the float64 copies to some 25 MB at 3x32x32.
_CHUNK = 1000


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageTask:
    """A labelled set of images, split into train and test, held whole on one device.

    Two tasks are equal only if they are the same object, since comparing tensors element by element has no one answer.

    Args:
        name: The task's name, one of `gradlab.tasks.TASK_NAMES` for the ones shipped.
        classes: Number of classes; labels run from 0 to classes - 1.
        image_shape: Channels, height, width.
        train_images: Normalized training images, floating point, shape (N, C, H, W).
        train_labels: Their labels, int64, shape (N,).
        test_images: Test images, normalized with the training set's statistics.
        test_labels: Their labels, int64.
        mean: Per-channel mean of the training pixels before normalization, in pixel units.
        std: Per-channel population standard deviation of the training pixels, in pixel units.
        augment: Whether `batch` crops and flips at random.
        pad: Pixels of zero padding on each side before the random crop; default 4, right for 32x32 (He et al. 2015).
        channels_last: Whether images lie in memory in N, H, W, C order.
    """

    name: str
    classes: int
    image_shape: tuple[int, int, int]
    train_images: Tensor = field(repr=False)
    train_labels: Tensor = field(repr=False)
    test_images: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool = False
    pad: int = 4
    channels_last: bool = False

    def to(
        self, device: torch.device | str, dtype: torch.dtype | None = None, channels_last: bool = False
    ) -> ImageTask:
        """Return the task on another device, in another precision or memory order; labels stay int64.

        Args:
            device: Where all four tensors go.
            dtype: Floating-point type of the images. Default: as they are.
            channels_last: Whether images are stored, and batches come, in torch.channels_last order. Default: no.

        Returns:
            A new task; what needs no change is shared with this one.

        Raises:
            UsageError: `dtype` is not a floating-point type.

        Example:
            >>> from gradlab.tasks import load_digits
            >>> load_digits().to("meta", torch.bfloat16).train_images.dtype
            torch.bfloat16
        """
        kind = self.train_images.dtype if dtype is None else dtype
        if not kind.is_floating_point:
            raise UsageError(f"Images cannot be held as {kind}; give a floating-point dtype such as torch.float32.")
        order = torch.channels_last if channels_last else torch.contiguous_format
        return replace(
            self,
            train_images=self.train_images.to(device, kind, memory_format=order),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device, kind, memory_format=order),
            test_labels=self.test_labels.to(device),
            channels_last=channels_last,
        )

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return the training images and labels at `indices`, cropped and flipped at random if the task augments.

        With augmentation each image is padded with `pad` zeros on every side, cut back to its size at a place drawn
        uniformly from the (2 pad + 1)^2 possible ones, and mirrored left to right with probability 1/2, each image
        on its own draw. All of it happens on the images' device without waiting for the host.

        Args:
            indices: Which training images, int64, shape (B,); best already on the task's device.
            generator: Source of randomness, on the task's device; without it torch's global one is used. Unused when
                the task does not augment.

        Returns:
            Images, shape (B, C, H, W), and labels, shape (B,). They share no memory with the task.

        Note:
            Padding is with zeros after normalization, so the border has the mean colour of the training set.

        Example:
            >>> from gradlab.tasks import load_digits
            >>> x, y = load_digits(augment=True).batch(torch.arange(5), torch.Generator().manual_seed(0))
            >>> x.shape, y.shape
            (torch.Size([5, 1, 8, 8]), torch.Size([5]))

        Source:
            K. He, X. Zhang, S. Ren, J. Sun, "Deep residual learning for image recognition", 2015, section 4.2.
        """
        # From pageable memory a plain copy to a GPU would make the host wait.
        indices = indices.to(self.train_images.device, non_blocking=True)
        images, labels = self.train_images[indices], self.train_labels[indices]
        if self.augment:
            images = _crop_and_flip(images, self.pad, generator)
        order = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.contiguous(memory_format=order), labels


def _crop_and_flip(images: Tensor, pad: int, generator: torch.Generator | None) -> Tensor:
    """Crop and mirror each image on its own draw, by index arithmetic alone, so that no host sync is needed."""
    count, _, height, width = images.shape
    device = images.device
    top, left = torch.randint(2 * pad + 1, (2, count, 1), generator=generator, device=device)
    mirrored = torch.randint(2, (count, 1), generator=generator, device=device)
    across = torch.arange(width, device=device)
    rows = top + torch.arange(height, device=device)
    # Mirrored images read their columns from the right: width - 1 - c in place of c.
    columns = left + across + mirrored * (width - 1 - 2 * across)
    padded = functional.pad(images, (pad, pad, pad, pad))
    which = torch.arange(count, device=device)
    # The slice between the index tensors moves channels last.
    return padded[which[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def batch_schedule(n: int, batch_size: int, steps: int, seed: int) -> Tensor:
    """Return which training examples each step sees: epochs of reshuffled indices, cut into whole batches.

    Every epoch is a fresh permutation of all n examples; what is left over after its last whole batch is dropped, so
    no batch mixes two epochs.

    Args:
        n: Number of training examples.
        batch_size: Examples in a batch, at most n.
        steps: Number of batches.
        seed: Seed of a CPU generator of its own, so that the order is the same whatever the device.

    Returns:
        Indices, int64, shape (steps, batch_size), on the CPU.

    Raises:
        UsageError: A number is too small, or `batch_size` exceeds n.

    Example:
        >>> order = batch_schedule(n=10, batch_size=4, steps=3, seed=0)
        >>> order.shape, len(set(order[:2].flatten().tolist()))
        (torch.Size([3, 4]), 8)
    """
    for what, value, least in (("batch size", batch_size, 1), ("number of steps", steps, 0)):
        if value < least:
            raise UsageError(f"A {what} of {value} is too small; give at least {least}.")
    if batch_size > n:
        raise UsageError(f"A batch of {batch_size} cannot be drawn from {n} training examples; give at most {n}.")
    generator = torch.Generator().manual_seed(seed)
    per_epoch = n // batch_size
    epochs = -(-steps // per_epoch)
    schedule = torch.empty(epochs * per_epoch, batch_size, dtype=torch.int64)
    for epoch in range(epochs):
        order = torch.randperm(n, generator=generator)[: per_epoch * batch_size]
        schedule[epoch * per_epoch : (epoch + 1) * per_epoch] = order.view(per_epoch, batch_size)
    return schedule[:steps]


def allowed_sizes(native: int) -> tuple[int, ...]:
    """Return the sides that a square image of side `native` can be box-averaged to.

    Example:
        >>> allowed_sizes(32)
        (1, 2, 4, 8, 16, 32)
    """
    return tuple(size for size in range(1, native + 1) if native % size == 0)


def check_size(native: int, size: int) -> None:
    """Raise a UsageError naming the allowed sizes unless images of side `native` can be box-averaged to `size`."""
    sizes = allowed_sizes(native)
    if size not in sizes:
        raise UsageError(
            f"Images of {native}x{native} pixels cannot be box-averaged to size {size}; "
            f"allowed sizes: {', '.join(map(str, sizes))}."
        )


def box_downsample(images: Tensor, size: int) -> Tensor:
    """Shrink square images by averaging boxes: each new pixel is the mean of the k x k old ones under it, k = H / size.

    Args:
        images: uint8 or floating point, shape (N, C, H, H).
        size: New side in pixels, a divisor of H.

    Returns:
        Images of shape (N, C, size, size): float32 for uint8 input, else the input's dtype. At size H the values
        are the input's own.

    Raises:
        UsageError: The images are not square, or `size` does not divide H.

    Note:
        For uint8 input the sums are exact, so each mean is the true one rounded once (not at all when k is a power
        of two).

    Example:
        >>> box_downsample(torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4), 2)
        tensor([[[[ 2.5000,  4.5000],
                  [10.5000, 12.5000]]]])
    """
    count, channels, height, width = images.shape
    if height != width:
        raise UsageError(f"Only square images can be box-averaged, not {height}x{width} ones.")
    check_size(height, size)
    box = height // size
    # A sum of k*k bytes is an integer below 2^24 for every k <= 256, hence exact in float32.
    values = images if images.is_floating_point() else images.to(torch.float32)
    if box == 1:
        return values
    return values.reshape(count, channels, size, box, size, box).sum(dim=(3, 5)) / (box * box)


def build_image_task(
    *,
    name: str,
    classes: int,
    train_pixels: Tensor,
    train_labels: Tensor,
    test_pixels: Tensor,
    test_labels: Tensor,
    size: int,
    augment: bool,
) -> ImageTask:
    """Make a task of raw pixels: box-average them to `size`, then normalize with the training set's statistics.

    Each channel becomes (x - mean) / std with the mean and the population standard deviation over all training
    images and places after the averaging. A channel that is constant is only centred.

    Args:
        name: The task's name.
        classes: Number of classes.
        train_pixels: Raw training images, uint8, shape (N, C, H, H).
        train_labels: Their labels, shape (N,).
        test_pixels: Raw test images.
        test_labels: Their labels.
        size: Side of the images wanted.
        augment: Whether training batches are cropped and flipped; the padding is one eighth of `size`, at least 1,
            which gives the 4 pixels of He et al. 2015 at 32x32.

    Returns:
        The task, on the CPU in float32.
    """
    train, test = _shrink(train_pixels, size), _shrink(test_pixels, size)
    mean, std = _channel_statistics(train)
    for images in (train, test):
        images.sub_(mean.to(images.dtype).view(1, -1, 1, 1)).div_(std.to(images.dtype).view(1, -1, 1, 1))
    return ImageTask(
        name=name,
        classes=classes,
        image_shape=(train.shape[1], size, size),
        train_images=train,
        train_labels=train_labels.to(torch.int64),
        test_images=test,
        test_labels=test_labels.to(torch.int64),
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        augment=augment,
        pad=max(1, size // 8),
    )


def _shrink(pixels: Tensor, size: int) -> Tensor:
    """Box-average in chunks into one new float32 tensor, so that no second full-size copy ever exists."""
    small = torch.empty(*pixels.shape[:2], size, size, dtype=torch.float32)
    for start in range(0, len(pixels), _CHUNK):
        small[start : start + _CHUNK] = box_downsample(pixels[start : start + _CHUNK], size)
    return small


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return each channel's mean and population standard deviation in float64, with 1 for a constant channel."""
    places = images.numel() // images.shape[1]
    # Two passes, because a mean of squares less a squared mean loses the digits that tell a constant channel.
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for chunk in torch.split(images, _CHUNK):
        total += chunk.double().sum(dim=(0, 2, 3))
    mean = total / places
    for chunk in torch.split(images, _CHUNK):
        squares += (chunk.double() - mean.view(1, -1, 1, 1)).square().sum(dim=(0, 2, 3))
    std = (squares / places).sqrt()
    # Below the resolution of float32 a spread is rounding, not signal.
    constant = std <= torch.finfo(torch.float32).eps * mean.abs()
    return mean, torch.where(constant, torch.ones_like(std), std)
