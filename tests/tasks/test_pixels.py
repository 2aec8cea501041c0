"""Digits pixel by pixel: the right pixel at the right step, one fixed permutation, the test set apart."""

from __future__ import annotations

import math

import pytest
import torch

from gradlab.errors import UsageError
from gradlab.tasks import load_digits, load_pixel_digits


@pytest.mark.parametrize("size", [8, 4, 2], ids="size{}".format)
def test_pixels_come_row_by_row(size: int) -> None:
    task, images = load_pixel_digits(size=size), load_digits(size=size)
    x, y = task.test_set()
    assert x.shape == (397, size * size, 1)
    assert torch.equal(y, images.test_labels)
    for row in range(size):
        for column in range(size):
            assert torch.equal(x[:, row * size + column, 0], images.test_images[:, 0, row, column])
    assert (task.steps, task.input_size, task.outputs) == (size * size, 1, 10)
    assert task.baseline == math.log(10)


def test_permuted_pixels_are_the_same_pixels_in_one_other_order() -> None:
    plain, permuted = load_pixel_digits().test_set()[0], load_pixel_digits(permuted=True)
    order = permuted.order.tolist()
    assert sorted(order) == list(range(64))
    assert order != list(range(64))
    assert torch.equal(permuted.test_set()[0], plain[:, order])
    assert order == load_pixel_digits(permuted=True).order.tolist()
    assert order != load_pixel_digits(permuted=True, seed=1).order.tolist()
    state = torch.get_rng_state()
    load_pixel_digits(permuted=True)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("permuted", [False, True], ids=["plain", "permuted"])
def test_batches_are_training_images_with_their_labels(permuted: bool) -> None:
    task = load_pixel_digits(permuted=permuted)
    trained = task.sequences(task.images.train_images)[..., 0]
    x, y = task.batch(100, torch.Generator().manual_seed(0))
    for sequence, label in zip(x[..., 0], y, strict=True):
        places = (trained == sequence).all(1).nonzero().flatten()
        assert len(places) >= 1
        assert label in task.images.train_labels[places]


def test_draws_are_spread_over_the_training_set() -> None:
    task = load_pixel_digits()
    _, y = task.batch(20_000, torch.Generator().manual_seed(0))
    share = torch.bincount(y, minlength=10) / 20_000
    expected = torch.bincount(task.images.train_labels, minlength=10) / 1400
    assert share.tolist() == pytest.approx(expected.tolist(), abs=4 * math.sqrt(0.09 / 20_000))


def test_an_image_of_one_pixel_is_no_sequence() -> None:
    with pytest.raises(UsageError, match="sequences of one step: give a size of 2, 4 or 8"):
        load_pixel_digits(size=1)


def test_a_size_the_digits_do_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="allowed sizes"):
        load_pixel_digits(size=3)
