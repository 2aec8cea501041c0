"""A real pseudo-terminal: what is on it when a script ends, fails, is interrupted, or runs an experiment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from gradlab.sweep.store import Run

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


def on_terminal(
    words: list[str], folder: Path, *, columns: int = 80, rows: int = 30, more: Mapping[str, str] | None = None
) -> tuple[int, bytes]:
    """Run a command on a pseudo-terminal and return its exit status and all that was written."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    keep = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        words, stdin=writer, stdout=writer, stderr=writer, cwd=folder, close_fds=True,
        env=keep | {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"} | dict(more or {}),
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


def test_run_live_shows_layers_of_running_cells(tmp_path: Path) -> None:
    toy = Path(__file__).parents[1] / "sweep" / "toy" / "toy_study.py"
    info = tmp_path / "toy_study-1.dist-info"
    info.mkdir()
    (tmp_path / "toy_study.py").write_bytes(toy.read_bytes())
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-study\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[gradlab.experiments]\ntoy = toy_study:STUDY\n")
    words = ["run", "toy", "--preset", "smoke", "--set", "train=12", "--set", "pace=0.1", "--live"]
    paths = os.pathsep.join(path for path in (str(tmp_path), os.environ.get("PYTHONPATH", "")) if path)
    status, written = on_terminal(
        [sys.executable, "-m", "gradlab", *words, "--workers", "1", "--device", "cpu"],
        tmp_path, columns=100, more={"PYTHONPATH": paths},
    )  # fmt: skip
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    assert status == 0, text[-2000:]
    drawings = re.findall(r"train\s+step (\d+) · loss [\d.]+ · all finite · [\d.]+% dead units", text)
    assert {int(step) % 3 for step in drawings} == {0}  # recorded steps: the study records every third
    (folder,) = (tmp_path / "runs" / "toy").glob("*-*")
    layers = Run(folder).table("layers", "train")
    for step in set(map(int, drawings)):
        for row in layers[layers.step == step].itertuples():
            known = row.grad_norm == row.grad_norm
            shown = "█+ +" + re.escape(f"{row.grad_norm:.2e}") if known else "no gradient"
            assert re.search(rf"\n{row.layer} +{shown}", text), row
    assert written.rindex(SHOW) > written.rindex(HIDE)
