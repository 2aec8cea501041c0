"""The shipped digits: what the file holds, how it is split, and that it is what its attribution says."""

from __future__ import annotations

import hashlib
from importlib import resources

import numpy as np
import pytest
import torch

from gradlab.errors import DataError, UsageError
from gradlab.tasks import digits
from gradlab.tasks.digits import DIGITS_SHA256, load_digits

DATA = resources.files("gradlab.tasks").joinpath("data")


def raw_pixels(task) -> torch.Tensor:
    """Undo the normalization: all images of a task in the data file's own units."""
    images = torch.cat([task.train_images, task.test_images]).double()
    return images * torch.tensor(task.std).view(1, -1, 1, 1) + torch.tensor(task.mean).view(1, -1, 1, 1)


def test_shapes_types_and_split():
    task = load_digits()
    assert (task.name, task.classes, task.image_shape, task.augment) == ("digits", 10, (1, 8, 8), False)
    assert task.train_images.shape == (1400, 1, 8, 8)
    assert task.test_images.shape == (397, 1, 8, 8)
    assert task.train_images.dtype == torch.float32
    assert task.train_labels.dtype == torch.int64


def test_holds_as_many_of_each_digit_as_the_data_set_documents():
    task = load_digits()
    labels = torch.cat([task.train_labels, task.test_labels])
    # Class counts of optdigits.tes, from the data set's own description.
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_pixels_are_the_integers_from_0_to_16():
    pixels = raw_pixels(load_digits())
    assert (pixels - pixels.round()).abs().max() < 1e-4
    assert set(pixels.round().unique().tolist()) == set(range(17))


def test_first_image_of_the_file_is_the_well_known_zero():
    with DATA.joinpath("digits.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        assert arrays["images"][0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
        assert arrays["labels"][:10].tolist() == list(range(10))
        order = arrays["order"]
    assert sorted(order.tolist()) == list(range(1797))
    task = load_digits()
    place = order.tolist().index(0)
    assert raw_pixels(task)[place, 0, 0].round().tolist() == [0, 0, 5, 13, 9, 1, 0, 0]


def test_images_still_belong_to_their_labels():
    # A nearest-class-mean classifier is right on nine of ten digits, on a shuffled labelling on one of ten.
    task = load_digits()
    means = torch.stack([task.train_images[task.train_labels == k].mean(0).flatten() for k in range(10)])
    nearest = torch.cdist(task.test_images.flatten(1), means).argmin(1)
    assert (nearest == task.test_labels).double().mean() > 0.85


def test_is_normalized_on_the_training_part():
    images = load_digits().train_images.double()
    assert abs(images.mean()) < 1e-6
    assert abs(images.std(correction=0) - 1) < 1e-6


@pytest.mark.parametrize("size", [8, 4, 2, 1], ids="size{}".format)
def test_comes_in_every_divisor_of_8(size):
    task = load_digits(size=size, augment=True)
    assert task.train_images.shape == (1400, 1, size, size)
    assert task.pad == 1
    expected = torch.nn.functional.avg_pool2d(raw_pixels(load_digits()), 8 // size)
    torch.testing.assert_close(raw_pixels(task), expected, rtol=0, atol=1e-4)


def test_refuses_another_size():
    with pytest.raises(UsageError, match=r"size 16; allowed sizes: 1, 2, 4, 8\."):
        load_digits(size=16)


def test_attribution_names_source_licence_and_sum():
    text = DATA.joinpath("ATTRIBUTION.md").read_text(encoding="utf-8")
    for words in ("E. Alpaydin", "C. Kaynak", "10.24432/C50P49", "CC BY 4.0", DIGITS_SHA256):
        assert words in text
    assert hashlib.sha256(DATA.joinpath("digits.npz").read_bytes()).hexdigest() == DIGITS_SHA256


def test_a_damaged_file_is_refused(monkeypatch):
    monkeypatch.setattr(digits, "DIGITS_SHA256", "0" * 64)
    with pytest.raises(DataError, match=r"digits.npz are damaged: wrong SHA-256 sum; reinstall gradlab\.$"):
        load_digits()
