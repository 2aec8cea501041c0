"""sys.stdout and sys.stderr while something is drawn below them: whole lines go above it, a progress bar into it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TextIO, final

__all__ = ["LinesAbove"]

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-LN-Za-ln-z]")  # all but colours, which end in m
_UP = "\x1b[A"


@final
class LinesAbove:
    """Stands in for a stream of the terminal: hands on whole lines, and keeps the line that is being rewritten.

    A progress bar such as tqdm's begins with a carriage return and ends without a newline; nested ones move down by
    newlines, write, and move up again. Such lines become `bars`, top one first, until a newline leaves the last as it
    is. Everything else of a text stream (isatty, fileno, encoding, ...) is the terminal's own.

    Args:
        stream: What it stands in for.
        above: Takes whole lines, without their last newline.
    """

    def __init__(self, stream: TextIO, above: Callable[[str], None]) -> None:
        self.stream, self.bars = stream, [""]
        self._above = above
        self._line = ""  # begun by somebody who writes a line in pieces
        self._place = self._moves = 0  # the bar on whose line the cursor was left; newlines since then

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Take text as the stream would."""
        if not text.strip("\n") and self.bars != [""] and not self._line:
            self._moves += len(text)  # the bar is left as it is, or a nested one comes below: what follows tells
        elif _UP in text and not _CONTROL.sub("", text).strip():
            self._place, self._moves = max(0, self._place + self._moves - text.count(_UP)), 0
        elif "\r" in text and "\n" not in text:
            if not self._moves:
                self._leave(self._place)  # a nested bar moves up again when it is written; this one did not
            self._place, self._moves = self._place + self._moves, 0
            self.bars += [""] * (self._place + 1 - len(self.bars))
            self.bars[self._place] = _CONTROL.sub("", text.rpartition("\r")[2]).rstrip()
        else:
            self._leave(self._place + self._moves)
            lines, newline, self._line = (self._line + text).rpartition("\n")
            if newline:
                self._above(lines.replace("\r\n", "\n"))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Take lines as the stream would."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Do nothing: what is drawn is always flushed, and a line begun is drawn when it ends."""

    def _leave(self, count: int) -> None:
        """Print the first bars as lines of their own: the cursor has gone on below them."""
        left = [bar for bar in self.bars[:count] if bar]
        self.bars = self.bars[count:] or [""]
        self._place = self._moves = 0
        if left:
            self._above("\n".join(left))

    def end(self) -> None:
        """Print what is left: bars, and a line without a newline."""
        self._leave(len(self.bars))
        if self._line:
            self._above(self._line)
            self._line = ""
