"""Arithmetic of architectures against published numbers."""

from __future__ import annotations

import pytest

from gradlab.analysis import architecture_theory as theory
from gradlab.errors import UsageError

FIELDS = {
    ("VGG-16", "conv5_3"): 196, ("VGG-16", "pool5"): 212, ("AlexNet", "conv5"): 163, ("AlexNet", "pool5"): 195,
    ("CIFAR-ResNet-20", "stage2_2"): 81, ("CIFAR-ResNet-56", "stage2_8"): 249, ("CIFAR-ResNet-110", "stage2_17"): 501,
}  # fmt: skip


@pytest.mark.parametrize(("place", "field"), FIELDS.items(), ids=[" ".join(place) for place in FIELDS])
def test_receptive_fields_are_the_known_ones(place: tuple[str, str], field: int) -> None:
    assert theory.receptive_fields(place[0])[place[1]] == field


@pytest.mark.parametrize(("count", "field"), [(0, 1), (1, 3), (2, 5), (3, 7), (10, 21)], ids=str)
def test_stacks_of_3x3(count: int, field: int) -> None:
    assert theory.receptive_field([(3, 1)] * count) == field


def test_a_stride_widens_what_comes_after_it_only() -> None:
    assert theory.receptive_field([(3, 2), (3, 1)]) == 7
    assert theory.receptive_field([(3, 1), (3, 2)]) == 5
    assert theory.receptive_field([(1, 4), (1, 1)]) == 1


@pytest.mark.parametrize("width", [1, 64, 512], ids=str)
def test_two_3x3_have_72_percent_of_a_5x5_and_three_55_of_a_7x7(width: int) -> None:
    def weights(kernel: int) -> int:
        return theory.conv_parameters(width, width, kernel)

    assert 2 * weights(3) / weights(5) == 0.72
    assert 3 * weights(3) / weights(7) == pytest.approx(27 / 49)


def test_inception_blocks() -> None:
    blocks = {"3a": (192, (64, 96, 128, 16, 32, 32)), "4a": (480, (192, 96, 208, 16, 48, 64))}
    found = {
        name: [theory.inception_parameters(*block, reduced=reduced) for reduced in (True, False)]
        for name, block in blocks.items()
    }
    assert found == {"3a": [163_696, 393_472], "4a": [376_176, 1_597_952]}
    five = [
        theory.inception_parameters(*blocks["3a"], reduced=reduced, five_only=True, bias=False)
        for reduced in (True, False)
    ]
    assert five == [15_872, 153_600]


def test_bottleneck() -> None:
    conv = theory.conv_parameters
    assert conv(256, 64, 1) + conv(64, 64, 3) + conv(64, 256, 1) == 69_632
    assert 2 * conv(256, 256, 3) == 1_179_648
    assert 2 * conv(64, 64, 3) == 73_728


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: theory.receptive_field([(0, 1)]), "'kernel' is 0"),
        (lambda: theory.receptive_field([(3, 0)]), "'stride' is 0"),
        (lambda: theory.conv_parameters(3, 4, 1, groups=2), "2 groups do not divide 3 input"),
        (lambda: theory.multiply_adds(3, 4, 1, 0), "'side' is 0"),
        (lambda: theory.inception_parameters(3, (1, 2)), "has 6 widths, but 2"),
        (lambda: theory.architecture_path("VGG-15"), "Unknown net 'VGG-15'. Did you mean 'VGG-1"),
        (lambda: theory.architecture_path("CIFAR-ResNet-21"), "Unknown net"),
        (lambda: theory.receptive_fields("Transformer"), "Unknown net 'Transformer'"),
    ],
    ids=["kernel", "stride", "groups", "side", "widths", "variant", "cifar", "net"],
)
def test_bad_input_is_one_sentence(call: object, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence.replace("(", r"\(")):
        call()  # type: ignore[operator]
