"""Lines and progress bars that others write while something is drawn below."""

from __future__ import annotations

import io
import time

import pytest

from gradlab.live.streams import LinesAbove


def make() -> tuple[LinesAbove, list[str]]:
    above: list[str] = []
    return LinesAbove(io.StringIO(), above.append), above


def test_whole_lines_go_above_however_they_are_written() -> None:
    stream, above = make()
    print("one", file=stream)
    print("two", "three", end="", file=stream)
    assert above == ["one"]
    stream.writelines([" four\n", "five\nsix\n"])
    print("left", end="", file=stream)
    stream.end()
    assert above == ["one", "two three four", "five\nsix", "left"]


def test_a_bar_is_kept_until_a_newline_and_text_goes_above_it() -> None:
    stream, above = make()
    for done in range(3):
        stream.write(f"\r{done}/2")
        stream.flush()
    print("text", file=stream)
    assert (stream.bars, above) == (["2/2"], ["text"])
    stream.write("\n")
    stream.write("\r0/9")
    stream.write("\r1/9")  # no nested bar: it never moves up
    assert (stream.bars, above) == (["1/9"], ["text", "2/2"])


@pytest.mark.parametrize("leave", [True, False], ids=["left", "cleared"])
def test_nested_bars_of_tqdm(leave: bool) -> None:
    tqdm = pytest.importorskip("tqdm")
    stream, above = make()
    most = 0
    with tqdm.tqdm(range(2), desc="outer", file=stream, ncols=60, mininterval=0) as outer:
        for _ in outer:
            for _ in tqdm.tqdm(range(3), desc="inner", file=stream, ncols=60, mininterval=0, leave=leave):
                time.sleep(0.001)
                most = max(most, len(stream.bars))
                assert stream.bars[0].startswith("outer")
                assert stream.bars[1].startswith("inner")
            tqdm.tqdm.write("said", file=stream)
    stream.end()
    assert most == 2
    kinds = [line.split(":")[0] for text in above for line in text.splitlines()]
    assert kinds.count("said") == 2
    assert kinds.count("inner") == (2 if leave else 0)
    assert kinds.count("outer") == 1
    assert "100%" in above[-1]


def test_the_rest_is_the_streams_own() -> None:
    stream, _ = make()
    assert stream.isatty() is False
    with pytest.raises(io.UnsupportedOperation):
        stream.fileno()
