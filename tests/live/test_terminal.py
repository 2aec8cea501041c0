"""A real pseudo-terminal: what is on it when a script ends, fails, is interrupted, or runs an experiment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

pty = pytest.importorskip("pty")
fcntl, struct, termios = (pytest.importorskip(name) for name in ("fcntl", "struct", "termios"))

SCRIPT = """
import os, signal, sys, torch
from torch import nn
import gradlab as gl

how = sys.argv[1]
model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
probe = gl.watch(model, optimizer, live=True)

def train():
    for step in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        print("printed", step)
        if step == 3 and how == "error":
            raise RuntimeError("boom")
        if step == 3 and how == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
if how == "unclosed":
    train()
else:
    with probe:
        train()
"""
HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"


def on_terminal(words: list[str], folder: Path, *, columns: int = 80, rows: int = 30) -> tuple[int, bytes]:
    """Run a command on a pseudo-terminal and return its exit status and all that was written."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    import subprocess

    keep = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        words, stdin=writer, stdout=writer, stderr=writer, cwd=folder, close_fds=True,
        env=keep | {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    os.close(writer)
    parts = []
    while True:
        try:
            part = os.read(reader, 1 << 16)
        except OSError:  # Linux: all have closed the other side
            break
        if not part:
            break
        parts.append(part)
    os.close(reader)
    return process.wait(60), b"".join(parts)


@pytest.mark.parametrize(
    ("how", "code"), [("error", 1), ("interrupt", -2), ("unclosed", 0)], ids=lambda value: str(value)
)
def test_the_terminal_is_given_back(how: str, code: int, tmp_path: Path) -> None:
    status, written = on_terminal([sys.executable, "-c", SCRIPT, how], tmp_path)
    assert status == code, written.decode()
    assert HIDE in written
    assert written.rindex(SHOW) > written.rindex(HIDE)
    text = written.decode()
    for step in range(5 if code == 0 else 4):
        assert f"printed {step}\r\n" in text
    assert "█" in text
    if code:
        told = text[text.rindex("Traceback (most recent call last)") :]
        assert "in train" in told
        assert ("RuntimeError: boom" if how == "error" else "KeyboardInterrupt") in told
        assert written.rindex(SHOW) < written.rindex(b"Traceback")
        assert "█" not in told  # nothing is drawn over it


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_run_live_shows_layers_of_running_cells(workers: int, tmp_path: Path) -> None:
    words = ["run", "depth-sweep", "--preset", "smoke", "--set", "depth=8", "--set", "profile_depth=8", "--live"]
    words += ["--workers", str(workers), "--out", str(tmp_path)]
    status, written = on_terminal([sys.executable, "-m", "gradlab", *words], tmp_path, columns=100)
    text = written.decode()
    assert status == 0, text[-2000:]
    assert "stages.0.0" in text
    assert "gradient norm by layer, input first" in text
    assert written.rindex(SHOW) > written.rindex(HIDE)
