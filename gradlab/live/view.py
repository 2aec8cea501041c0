"""The live view of one watched model: when it draws, where, and how the terminal is given back."""

from __future__ import annotations

import atexit
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar, final

from gradlab.errors import UsageError
from gradlab.live.drawing import draw
from gradlab.live.snapshot import Snapshot
from gradlab.live.streams import LinesAbove

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

__all__ = ["LiveView", "say_once"]

_PAUSE = 0.25  # seconds between two drawings
_SHARE = 100  # a drawing that took t is followed by no other for 100 t: at most a hundredth of the time

_said: set[str] = set()


def say_once(sentence: str) -> None:
    """Print a sentence on stderr, once a process."""
    if sentence not in _said and sys.stderr is not None:
        _said.add(sentence)
        print(f"gradlab: {sentence}", file=sys.stderr)


@final
class LiveView:
    """Draws the gradient norm of each layer in the terminal while a model trains: `watch(..., live=LiveView(...))`.

    A row is a layer, or neighbouring ones where there are more layers than rows; the layer nearest the input is on
    top. Bars share a log scale of whole decades; a row of several layers is solid to the smallest norm and light to the
    largest. Rows with NaN or Inf are red and give their count instead of a norm. Lines that are printed meanwhile go
    above it, and a progress bar such as tqdm's becomes its last line.

    Args:
        steps: How many steps are to come, where that is known: then the time to go is shown.
        console: Where to draw. Default: stdout if it is a terminal, else stderr if that is one; else nothing is drawn,
            and one sentence on stderr says so.

    Raises:
        UsageError: `steps` is no positive whole number.

    Note:
        It draws in the thread that trains, from numbers that were recorded anyway, at most four times a second and for
        about a hundredth of the time (measured: 1.1 to 1.7% of the CPU time, see benchmarks/README.md). No thread of
        its own, so that a process may be forked (a DataLoader's workers) at any time. One view is drawn at a time; a
        second one meanwhile is left out, with a sentence.

    Example:
        >>> LiveView(steps=1000).drawing
        False
    """

    _drawn_now: ClassVar[LiveView | None] = None

    def __init__(self, *, steps: int | None = None, console: Console | None = None) -> None:
        if steps is not None and not (isinstance(steps, int) and not isinstance(steps, bool) and steps > 0):
            raise UsageError(f"LiveView: steps={steps!r} must be a whole number of at least 1, or None.")
        self._steps, self._console = steps, console
        self._live: Live | None = None
        self._streams: list[tuple[str, LinesAbove]] = []
        self._snapshot: Snapshot | None = None
        self._begun = self._next = 0.0

    @property
    def drawing(self) -> bool:
        """Whether it has the terminal."""
        return self._live is not None

    def open(self) -> None:
        """Take the terminal, if there is one and nothing else of ours draws there; called by `watch`."""
        from rich.console import Console
        from rich.live import Live

        if self._live is not None or LiveView._drawn_now is not None:
            say_once("One live view is drawn at a time: a further model is recorded, and not shown.")
            return
        if self._console is None:
            streams = (sys.stdout, sys.stderr)
            terminal = next((s for s in streams if s is not None and not s.closed and s.isatty()), None)
            if terminal is None:
                say_once("live=True draws in a terminal, and there is none here: steps are recorded, and not shown.")
                return
            self._console = Console(file=terminal, force_jupyter=False)
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            say_once("This terminal cannot be drawn on (it is 'dumb'): steps are recorded, and not shown.")
            return
        self._live = Live(
            console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False,
            vertical_overflow="crop", get_renderable=self._renderable,
        )  # fmt: skip
        self._begun = time.monotonic()
        self._next = 0.0
        LiveView._drawn_now = self
        atexit.register(self.close)  # for a probe that nobody closes
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None and not stream.closed and stream.isatty():
                self._streams.append((name, LinesAbove(stream, self._print)))
                setattr(sys, name, self._streams[-1][1])

    def show(self, latest: Callable[[], Snapshot | None]) -> None:
        """Draw the latest recorded step, unless it is too early: called at each recorded step."""
        if self._live is not None and time.monotonic() >= self._next:
            self._draw(latest)

    def close(self, latest: Callable[[], Snapshot | None] = lambda: None) -> None:
        """Draw for the last time, leave that on the screen, and give the terminal back."""
        live, self._live = self._live, None
        if live is None:
            return
        try:
            if live.is_started and (snapshot := latest()) is not None:
                self._snapshot = snapshot
        finally:
            LiveView._drawn_now = None
            atexit.unregister(self.close)
            for name, stream in self._streams:
                if getattr(sys, name) is stream:  # else somebody has put another in its place, who keeps it
                    setattr(sys, name, stream.stream)
            with suppress(OSError, ValueError):  # the terminal is gone, or its stream is closed
                self._end(live)

    def _end(self, live: Live) -> None:
        left = [stream for _, stream in self._streams]
        self._streams = []
        try:
            for stream in left:
                self._live = live  # what is left goes above the last drawing
                stream.end()
        finally:
            self._live = None
            live.stop()

    def _draw(self, latest: Callable[[], Snapshot | None]) -> None:
        live, begun = self._live, time.monotonic()
        assert live is not None
        try:
            snapshot = latest()
            if snapshot is None:
                return
            self._snapshot = snapshot
            if not live.is_started:
                live.start()
            live.refresh()
        except Exception as error:  # a drawing that fails (the terminal is gone, say) must not end the training
            self.close()
            say_once(f"The live view was ended by {type(error).__name__} ({error}); steps are recorded, and not shown.")
        now = time.monotonic()
        self._next = now + max(_PAUSE, _SHARE * (now - begun))

    def _print(self, lines: str) -> None:
        """Print lines above the drawing, as they are: no markup, no wrapping, no cutting."""
        from rich.text import Text

        assert self._console is not None
        self._console.print(Text.from_ansi(lines), soft_wrap=True, highlight=False)

    def _renderable(self) -> Text:
        from rich.text import Text

        if self._snapshot is None or self._console is None:
            return Text()
        width, height = self._console.size
        bars = [bar for _, stream in self._streams for bar in stream.bars if bar]
        lines = draw(
            self._snapshot, width=width, height=height - 1 - len(bars), left=self._left(),
            ascii_only=not self._console.encoding.lower().startswith("utf"),
        )  # fmt: skip
        return Text("\n", no_wrap=True, overflow="crop").join([*lines, *(Text.from_ansi(bar) for bar in bars)])

    def _left(self) -> str:
        if self._steps is None or self._snapshot is None or self._snapshot.step < 1:
            return ""
        done = self._snapshot.step + 1
        if done >= self._steps:
            return ""
        seconds = (time.monotonic() - self._begun) * (self._steps - done) / done
        minutes, rest = divmod(math.ceil(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return (f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}") + " to go"
