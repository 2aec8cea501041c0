"""Rows of the live view against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from gradlab.live import LayerGroup, Snapshot
from gradlab.live.drawing import draw
from gradlab.live.snapshot import SENT_GROUPS, fold

NAN = math.nan


def layer(name: str, norm: float, nonfinite: int = 0) -> LayerGroup:
    return LayerGroup(first=name, last=name, layers=1, smallest=norm, largest=norm, nonfinite=nonfinite)


def deep(count: int) -> Snapshot:
    """Norms that grow from layer to layer, as a deep linear net's do."""
    return Snapshot(step=3, groups=tuple(layer(f"net.{k}", 10.0 ** (-6 + 6 * k / count)) for k in range(count)))


def text(snapshot: Snapshot, width: int = 80, height: int = 20, **how: object) -> list[str]:
    return [line.plain for line in draw(snapshot, width=width, height=height, **how)]  # type: ignore[arg-type]


def test_bars_are_proportional_to_the_decades_of_the_norm() -> None:
    norms = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    lines = text(
        Snapshot(step=7, loss=0.5, has_loss=True, groups=tuple(layer(f"l{k}", n) for k, n in enumerate(norms)))
    )
    assert lines[0] == "step 7 · loss 0.5 · all finite"
    lengths = [line.count("█") for line in lines[1:6]]
    width = lengths[-1]
    assert width > 40
    assert lengths == [1, round(width / 4), round(width / 2), round(3 * width / 4), width]
    assert [line.split()[0] for line in lines[1:6]] == ["l0", "l1", "l2", "l3", "l4"]  # nearest the input on top
    assert [float(line.split()[-1]) for line in lines[1:6]] == norms
    assert lines[6] == "gradient norm by layer, input first, log scale 1e-4 to 1e0"


@pytest.mark.parametrize("width", [12, 20, 40, 80, 120, 300])
@pytest.mark.parametrize("count", [0, 1, 5, 61, 5000])
@pytest.mark.parametrize("height", [6, 10, 24])
def test_no_line_is_too_long_and_all_layers_are_in_it(width: int, count: int, height: int) -> None:
    lines = text(deep(count), width, height, left="1:02:03 to go")
    assert max(map(len, lines)) <= width
    if width >= 40 and height >= 10:
        assert len(lines) <= height


@pytest.mark.parametrize("most", [1, 7, 64, 5000])
def test_folding_loses_no_layer_and_no_extreme(most: int) -> None:
    norms = [1.0 + (37 * k) % 5000 for k in range(5000)]
    groups = fold([layer(str(k), norm, nonfinite=k % 3 == 0) for k, norm in enumerate(norms)], most)
    assert len(groups) == most
    assert sum(group.layers for group in groups) == 5000
    assert max(group.layers for group in groups) - min(group.layers for group in groups) <= 1
    assert sum(group.nonfinite for group in groups) == sum(k % 3 == 0 for k in range(5000))
    begin = 0
    for group in groups:
        own = norms[begin : begin + group.layers]
        assert (group.first, group.last) == (str(begin), str(begin + group.layers - 1))
        assert (group.smallest, group.largest) == (min(own), max(own))
        begin += group.layers


def test_a_row_of_several_layers_shows_their_range_and_the_legend_says_so() -> None:
    lines = text(deep(60), height=12)
    first = lines[1]
    assert first.startswith("net.0…5 ")
    assert first.split()[-1] == f"{1e-6:.1e}…{10.0**-5.5:.1e}"
    assert 0 < first.count("█") < first.count("█") + first.count("░")
    assert " ".join(lines[-2:]).endswith("; 60 layers in 9 rows: █ smallest, ░ largest")


def test_what_is_not_finite_is_red_and_counted_and_the_others_keep_their_bars() -> None:
    groups = (layer("a", 1e-3), layer("b", NAN, 12), layer("c", 0.0), layer("d", NAN))
    lines = draw(Snapshot(step=0, groups=groups, loss=NAN, has_loss=True), width=80, height=20)
    assert lines[0].plain == "step 0 · loss NaN · 12 not finite"
    assert lines[2].plain.endswith("12 not finite")
    assert {str(span.style) for span in lines[2].spans} == {"bold red"}
    assert "█" in lines[1].plain
    assert "bold red" not in {str(span.style) for line in (lines[1], lines[3], lines[4]) for span in line.spans}
    assert lines[3].plain.endswith("0.00e+00")
    assert lines[4].plain.endswith("no gradient")
    assert all("█" not in line.plain for line in lines[2:5])
    narrow = text(Snapshot(step=0, groups=groups), width=40)
    assert any(line.endswith("12 NaN/Inf") for line in narrow)


def test_a_group_with_one_bad_layer_shows_it() -> None:
    groups = [layer(str(k), 1.0) for k in range(100)]
    groups[41] = layer("41", NAN, 5)
    (row,) = [line for line in text(Snapshot(step=0, groups=tuple(groups)), height=14) if "not finite" in line][1:]
    first, _, last = row.split()[0].partition("…")
    assert int(first) <= 41 <= int(last)


def test_without_utf8_only_ascii_is_drawn() -> None:
    lines = text(deep(60), height=12, ascii_only=True, left="0:10 to go")
    assert all(line.isascii() for line in lines)
    assert any("#" in line for line in lines)


def test_what_is_sent_has_a_flat_size() -> None:
    names = replace(deep(5000), groups=tuple(layer(f"{'block.' * 40}{k}", 1.0) for k in range(5000))).compact()
    assert len(names.groups) == SENT_GROUPS
    assert names.layers == 5000
    assert all(len(group.first) <= 48 for group in names.groups)
    assert names.groups[-1].last.endswith(".4999")
