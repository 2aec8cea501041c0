"""The room's front door: names, lazy imports and load_task."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import gradlab.tasks
from gradlab.errors import DataError, UsageError
from gradlab.tasks import TASK_NAMES, load_digits, load_task


def test_listing_the_tasks_imports_neither_torch_nor_numpy():
    code = (
        "import sys, gradlab.tasks; dir(gradlab.tasks); assert gradlab.tasks.TASK_NAMES == ('digits', 'cifar10'); "
        "assert not {'torch', 'numpy', 'pooch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("name", gradlab.tasks.__all__)
def test_every_public_name_resolves_and_is_listed(name):
    assert getattr(gradlab.tasks, name) is not None
    assert name in dir(gradlab.tasks)


def test_a_name_it_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'load_mnist'"):
        gradlab.tasks.load_mnist  # noqa: B018


@pytest.mark.parametrize("size", [None, 4], ids=["own-size", "size4"])
def test_loads_digits_and_ignores_the_data_folder(size):
    task = load_task("digits", size=size, data_dir="no-such-folder", augment=True)
    own = load_digits(size=size or 8, augment=True)
    assert torch.equal(task.train_images, own.train_images)
    assert (task.augment, task.pad) == (True, 1)


@pytest.mark.parametrize(("size", "side"), [(None, 32), (16, 16)], ids=["own-size", "size16"])
def test_loads_cifar10_from_the_data_folder(tiny, tmp_path, size, side):
    tiny.write(tmp_path / "cifar-10-batches-py")
    task = load_task("cifar10", size=size, data_dir=tmp_path, augment=True)
    assert task.image_shape == (3, side, side)
    assert task.augment


def test_cifar10_without_its_files_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="holds neither"):
        load_task("cifar10", data_dir=tmp_path)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_a_size_the_task_cannot_give_is_a_usage_error(name):
    with pytest.raises(UsageError, match="size 7; allowed sizes: 1, 2, 4, 8"):
        load_task(name, size=7)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match=r"^Unknown task 'cifar-10'\. Did you mean 'cifar10'\?$"):
        load_task("cifar-10")
