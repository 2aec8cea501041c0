"""Batches, augmentation, order, resolution and normalization of image tasks."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from gradlab.errors import UsageError
from gradlab.tasks.image import ImageTask, allowed_sizes, batch_schedule, box_downsample, build_image_task


def make_task(count: int = 12, channels: int = 3, size: int = 8, augment: bool = False, pad: int = 2) -> ImageTask:
    """Return a task whose pixels are all different, so that every crop and flip is told apart."""
    pixels = torch.arange(1, count * channels * size * size + 1, dtype=torch.float32)
    images = pixels.view(count, channels, size, size)
    labels = torch.arange(count) % 10
    return ImageTask(
        name="toy",
        classes=10,
        image_shape=(channels, size, size),
        train_images=images,
        train_labels=labels,
        test_images=images[:4].clone(),
        test_labels=labels[:4].clone(),
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        augment=augment,
        pad=pad,
    )


def crops_and_flips(image: np.ndarray, pad: int) -> dict[tuple[int, int, bool], np.ndarray]:
    """Return every image that augmentation may make of `image`, by its offsets and flip."""
    size = image.shape[-1]
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
    out = {}
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = padded[:, top : top + size, left : left + size]
            out[top, left, False] = crop
            out[top, left, True] = crop[:, :, ::-1]
    return out


def draw_of(image: torch.Tensor, original: torch.Tensor, pad: int) -> tuple[int, int, bool]:
    found = [key for key, crop in crops_and_flips(original.numpy(), pad).items() if np.array_equal(crop, image.numpy())]
    assert len(found) == 1, "not exactly one valid crop or flip of the padded original"
    return found[0]


class TestBatch:
    def test_without_augmentation_gives_the_images_themselves(self):
        task = make_task()
        x, y = task.batch(torch.tensor([5, 0, 5]))
        assert torch.equal(x, torch.stack([task.train_images[i] for i in (5, 0, 5)]))
        assert y.tolist() == [5, 0, 5]
        assert y.dtype == torch.int64

    def test_is_the_callers_to_change(self):
        task = make_task()
        x, _ = task.batch(torch.arange(12))
        x.zero_()
        assert task.train_images.min() == 1

    @pytest.mark.parametrize("pad", [1, 2, 4], ids="pad{}".format)
    @pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
    def test_every_augmented_image_is_a_valid_crop_or_flip_of_its_own(self, pad, channels_last):
        task = make_task(augment=True, pad=pad).to("cpu", channels_last=channels_last)
        indices = torch.randint(12, (60,), generator=torch.Generator().manual_seed(1))
        x, y = task.batch(indices, torch.Generator().manual_seed(2))
        assert torch.equal(y, indices % 10)
        for image, index in zip(x, indices, strict=True):
            draw_of(image, task.train_images[index], pad)

    def test_draws_are_each_images_own_and_uniform(self):
        task = make_task(augment=True, pad=1, channels=1)
        count = 3600
        x, _ = task.batch(torch.zeros(count, dtype=torch.int64), torch.Generator().manual_seed(3))
        draws = [draw_of(image, task.train_images[0], 1) for image in x]
        _, counts = np.unique(np.array(draws), axis=0, return_counts=True)
        assert len(counts) == 18  # 3 x 3 places, each mirrored or not
        # Chi-square with 17 degrees of freedom: 99.9 % of fair draws lie below 40.8.
        assert ((counts - count / 18) ** 2 / (count / 18)).sum() < 40.8

    def test_same_seed_same_batch_and_another_seed_another(self):
        task = make_task(augment=True)
        first, again, other = (
            task.batch(torch.arange(12), torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_memory_order_changes_no_value(self):
        one, other = (
            make_task(augment=True)
            .to("cpu", channels_last=last)
            .batch(torch.arange(12), torch.Generator().manual_seed(0))[0]
            for last in (False, True)
        )
        assert torch.equal(one, other)

    @pytest.mark.parametrize("augment", [False, True], ids=["plain", "augment"])
    @pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
    def test_comes_in_the_memory_order_asked_for(self, augment, channels_last):
        task = make_task(augment=augment).to("cpu", channels_last=channels_last)
        x, _ = task.batch(torch.arange(6))
        order = torch.channels_last if channels_last else torch.contiguous_format
        assert task.train_images.is_contiguous(memory_format=order)
        assert x.is_contiguous(memory_format=order)

    @pytest.mark.parametrize("augment", [False, True], ids=["plain", "augment"])
    def test_needs_no_host_sync(self, augment):
        # On the meta device any .item(), bool() or mask index raises, and so does a CPU tensor mixed in.
        task = make_task(augment=augment).to("meta", torch.bfloat16, channels_last=True)
        x, y = task.batch(torch.arange(6, device="meta"))
        assert (x.device.type, x.dtype, tuple(x.shape)) == ("meta", torch.bfloat16, (6, 3, 8, 8))
        assert (y.device.type, tuple(y.shape)) == ("meta", (6,))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    def test_needs_no_host_sync_on_a_gpu(self):
        task = make_task(augment=True).to("cuda", channels_last=True)
        generator = torch.Generator("cuda").manual_seed(0)
        on_device, on_host = torch.arange(12, device="cuda"), torch.arange(12)
        torch.cuda.set_sync_debug_mode("error")
        try:
            x, _ = task.batch(on_device, generator)
            task.batch(on_host, generator)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for image, original in zip(x.cpu(), task.train_images.cpu(), strict=True):
            draw_of(image, original, 2)


class TestImageTask:
    def test_goes_to_another_precision_but_labels_stay_integers(self):
        task = make_task().to("cpu", torch.float64)
        assert task.train_images.dtype == task.test_images.dtype == torch.float64
        assert task.train_labels.dtype == task.test_labels.dtype == torch.int64

    def test_refuses_to_hold_images_as_integers(self):
        with pytest.raises(UsageError, match=r"torch.int32; give a floating-point dtype"):
            make_task().to("cpu", torch.int32)

    def test_survives_pickling_for_spawned_workers(self):
        task = make_task(augment=True)
        twin = pickle.loads(pickle.dumps(task))
        assert (twin.name, twin.pad, twin.augment) == (task.name, task.pad, task.augment)
        assert torch.equal(twin.train_images, task.train_images)

    def test_compares_by_identity_and_prints_no_pixels(self):
        task = make_task()
        assert task == task
        assert task != copy.copy(task)
        assert "tensor" not in repr(task)


class TestBatchSchedule:
    @pytest.mark.parametrize(("n", "batch_size"), [(12, 4), (13, 4), (5, 5), (7, 1)], ids=str)
    @pytest.mark.parametrize("steps", [0, 1, 10], ids="steps{}".format)
    def test_no_epoch_repeats_an_example(self, n, batch_size, steps):
        schedule = batch_schedule(n, batch_size, steps, seed=0)
        assert schedule.shape == (steps, batch_size)
        assert schedule.dtype == torch.int64
        for epoch in schedule.split(n // batch_size):
            seen = epoch.flatten().tolist()
            assert len(set(seen)) == len(seen)
            assert set(seen) <= set(range(n))

    def test_whole_epochs_cover_everything_in_an_order_of_their_own(self):
        first, second = batch_schedule(12, 4, 6, seed=0).split(3)
        assert sorted(first.flatten().tolist()) == sorted(second.flatten().tolist()) == list(range(12))
        assert not torch.equal(first, second)

    def test_what_an_epoch_drops_changes_from_epoch_to_epoch(self):
        assert set(batch_schedule(10, 3, 60, seed=0).flatten().tolist()) == set(range(10))

    def test_depends_on_the_seed_alone(self):
        state = torch.get_rng_state()
        torch.manual_seed(5)
        first = batch_schedule(50, 10, 7, seed=3)
        torch.manual_seed(6)
        assert torch.equal(first, batch_schedule(50, 10, 7, seed=3))
        assert not torch.equal(first, batch_schedule(50, 10, 7, seed=4))
        torch.set_rng_state(state)

    def test_more_steps_go_on_where_fewer_stopped(self):
        assert torch.equal(batch_schedule(20, 6, 4, seed=1), batch_schedule(20, 6, 9, seed=1)[:4])

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ((10, 11, 1), "batch of 11 cannot be drawn from 10"),
            ((10, 0, 1), "batch size of 0 is too small; give at least 1"),
            ((10, 2, -1), "number of steps of -1 is too small; give at least 0"),
        ],
        ids=["too-large", "zero", "negative-steps"],
    )
    def test_refuses_what_makes_no_schedule(self, arguments, words):
        with pytest.raises(UsageError, match=words):
            batch_schedule(*arguments, seed=0)


class TestBoxDownsample:
    @pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32], ids="to{}".format)
    def test_bytes_give_the_exact_mean(self, size):
        pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 32, 32), dtype=np.uint8)
        small = box_downsample(torch.from_numpy(pixels), size)
        assert small.dtype == torch.float32
        box = 32 // size
        for row in range(size):
            for column in range(size):
                under = pixels[:, :, row * box : (row + 1) * box, column * box : (column + 1) * box]
                assert np.array_equal(small[:, :, row, column].numpy(), under.astype(np.float64).mean((2, 3)))

    def test_white_stays_white(self):
        assert box_downsample(torch.full((1, 1, 256, 256), 255, dtype=torch.uint8), 1).item() == 255

    def test_a_box_of_three(self):
        pixels = torch.arange(36, dtype=torch.uint8).view(1, 1, 6, 6)
        expected = torch.tensor([[[[7.0, 10.0], [25.0, 28.0]]]])
        assert torch.equal(box_downsample(pixels, 2), expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_floats_keep_their_type(self, dtype):
        images = torch.rand(2, 3, 12, 12, dtype=dtype, generator=torch.Generator().manual_seed(0))
        small = box_downsample(images, 4)
        expected = torch.nn.functional.avg_pool2d(images.double(), 3)
        assert small.dtype == dtype
        torch.testing.assert_close(small.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0)

    @pytest.mark.parametrize("size", [0, -8, 3, 12, 64], ids="to{}".format)
    def test_names_the_allowed_sizes(self, size):
        with pytest.raises(UsageError, match=rf"size {size}; allowed sizes: 1, 2, 4, 8, 16, 32\.$"):
            box_downsample(torch.zeros(1, 1, 32, 32), size)

    def test_refuses_oblong_images(self):
        with pytest.raises(UsageError, match="not 4x6 ones"):
            box_downsample(torch.zeros(1, 1, 4, 6), 2)

    def test_allowed_sizes_are_the_divisors(self):
        assert allowed_sizes(12) == (1, 2, 3, 4, 6, 12)


class TestBuildImageTask:
    def build(self, train: np.ndarray, test: np.ndarray, size: int) -> ImageTask:
        return build_image_task(
            name="toy",
            classes=10,
            train_pixels=torch.from_numpy(train),
            train_labels=torch.zeros(len(train), dtype=torch.uint8),
            test_pixels=torch.from_numpy(test),
            test_labels=torch.zeros(len(test), dtype=torch.uint8),
            size=size,
            augment=True,
        )

    @pytest.mark.parametrize("size", [8, 4], ids="size{}".format)
    def test_normalizes_with_the_training_sets_population_statistics(self, size):
        rng = np.random.default_rng(1)
        # More images than one chunk of the code holds, and a test set of another mean.
        train = rng.integers(0, 256, (2100, 2, 8, 8), dtype=np.uint8)
        train[:, 1] //= 7
        test = rng.integers(100, 256, (30, 2, 8, 8), dtype=np.uint8)
        task = self.build(train, test, size)
        box = 8 // size

        def average(pixels: np.ndarray) -> np.ndarray:
            return pixels.astype(np.float64).reshape(len(pixels), 2, size, box, size, box).mean((3, 5))

        mean, std = average(train).mean((0, 2, 3)), average(train).std((0, 2, 3))
        np.testing.assert_allclose(task.mean, mean, rtol=1e-12)
        np.testing.assert_allclose(task.std, std, rtol=1e-12)
        for images, pixels in ((task.train_images, train), (task.test_images, test)):
            expected = (average(pixels) - mean[:, None, None]) / std[:, None, None]
            np.testing.assert_allclose(images.numpy(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("value", [0, 7, 255], ids="all{}".format)
    def test_a_constant_channel_becomes_zero_and_not_nan(self, value):
        train = np.random.default_rng(0).integers(0, 256, (1500, 3, 4, 4), dtype=np.uint8)
        train[:, 1] = value
        task = self.build(train, train[:5].copy(), 4)
        assert torch.equal(task.train_images[:, 1], torch.zeros(1500, 4, 4))
        assert task.std[1] == 1.0
        assert torch.isfinite(task.train_images).all()

    def test_leaves_the_raw_pixels_alone(self):
        train = np.random.default_rng(0).integers(0, 256, (20, 1, 4, 4), dtype=np.uint8)
        before = train.copy()
        self.build(train, train[:5], 4)
        assert np.array_equal(train, before)

    @pytest.mark.parametrize(("size", "pad"), [(32, 4), (16, 2), (8, 1), (4, 1)], ids=str)
    def test_padding_shrinks_with_the_image(self, size, pad):
        pixels = np.random.default_rng(0).integers(0, 256, (3, 1, 32, 32), dtype=np.uint8)
        task = self.build(pixels, pixels, size)
        assert task.pad == pad
        assert task.augment
        assert task.train_labels.dtype == task.test_labels.dtype == torch.int64
