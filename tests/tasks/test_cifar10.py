"""CIFAR-10 from files to a task."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch

from gradlab.errors import DataError, UsageError
from gradlab.tasks import cifar10
from gradlab.tasks.cifar10 import load_cifar10


@pytest.fixture
def folder(tiny, tmp_path):
    return tiny.write(tmp_path / "cifar-10-batches-py")


def expected(tiny, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the training and test images, averaged and normalized naively in float64."""
    box = 32 // size

    def average(names: list[str]) -> np.ndarray:
        pixels = np.concatenate([tiny.pixels[name] for name in names]).astype(np.float64)
        return pixels.reshape(len(pixels), 3, size, box, size, box).mean((3, 5))

    train, test = average([f"data_batch_{k}" for k in range(1, 6)]), average(["test_batch"])
    mean, std = train.mean((0, 2, 3), keepdims=True), train.std((0, 2, 3), keepdims=True)
    return (train - mean) / std, (test - mean) / std


@pytest.mark.parametrize("size", [32, 16, 8], ids="size{}".format)
def test_loads_averages_and_normalizes(tiny, folder, size):
    task = load_cifar10(data_dir=folder, size=size)
    train, test = expected(tiny, size)
    np.testing.assert_allclose(task.train_images.numpy(), train, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(task.test_images.numpy(), test, rtol=1e-5, atol=1e-5)
    assert task.train_labels.tolist() == [label for k in range(1, 6) for label in tiny.labels[f"data_batch_{k}"]]
    assert task.test_labels.tolist() == tiny.labels["test_batch"]
    assert (task.name, task.classes, task.image_shape) == ("cifar10", 10, (3, size, size))
    assert (task.augment, task.pad) == (False, size // 8)
    assert task.train_images.dtype == torch.float32
    assert task.train_labels.dtype == torch.int64


def test_augments_on_any_device(folder):
    task = load_cifar10(data_dir=folder, augment=True)
    assert (task.augment, task.pad) == (True, 4)
    assert task.to("meta").batch(torch.arange(7, device="meta"))[0].shape == (7, 3, 32, 32)


def test_a_size_it_cannot_give_is_refused_before_anything_is_fetched(monkeypatch):
    monkeypatch.setattr(cifar10, "fetch_cifar10", lambda *_, **__: pytest.fail("fetched"))
    with pytest.raises(UsageError, match=r"size 24; allowed sizes: 1, 2, 4, 8, 16, 32\."):
        load_cifar10(size=24)


def test_a_damaged_file_is_named(folder):
    whole = (folder / "data_batch_2").read_bytes()
    (folder / "data_batch_2").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="data_batch_2 is damaged"):
        load_cifar10(data_dir=folder)


def test_a_hostile_file_is_not_run(folder, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'was-run'}",)

    (folder / "test_batch").write_bytes(pickle.dumps({b"data": Attack(), b"labels": []}))
    with pytest.raises(DataError, match=r"test_batch names '(posix|nt)\.system'"):
        load_cifar10(data_dir=folder)
    assert not (tmp_path / "was-run").exists()
