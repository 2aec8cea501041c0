"""Ctrl-C, signals, a terminal and a full disk, with real processes."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gradlab.sweep.store import FinishedCell, Run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc"),
]
Shell = Callable[..., subprocess.CompletedProcess[str]]
SLOW = ("--set", "value=1,2,3,4", "--set", "steps=40", "--set", "pace=0.02")


class Sweep:
    """A sweep in a session of its own."""

    def __init__(self, folder: Path, environment: dict[str, str], *words: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gradlab", "run", "toy", *words],
            env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    def wait_for(self, text: str) -> None:
        self.until(lambda: any(text in line for line in self.lines))

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited in vain; the sweep said {self.lines}"
            assert self.process.poll() is None or condition(), self.lines
            time.sleep(0.02)

    def interrupt(self) -> None:
        """Do what a terminal does on Ctrl-C: signal every process of the group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self, seconds: float = 30) -> tuple[int, str]:
        """Return exit code and stderr once the sweep has ended."""
        code = self.process.wait(seconds)
        assert self.process.stderr is not None
        errors = self.process.stderr.read()
        self.reader.join(5)
        return code, errors

    def members(self) -> list[int]:
        """Return the processes of the session that are alive."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid and fields[0] != "Z":
                found.append(int(stat.parent.name))
        return found

    @property
    def run(self) -> Run:
        return Run(next((self.folder / "runs" / "toy").iterdir()))


@pytest.fixture
def launch(tmp_path: Path, environment: dict[str, str]) -> Iterator[Callable[..., Sweep]]:
    sweeps: list[Sweep] = []

    def make(*words: str) -> Sweep:
        sweeps.append(Sweep(tmp_path, environment, *words))
        return sweeps[-1]

    yield make
    for sweep in sweeps:
        for pid in sweep.members():
            os.kill(pid, signal.SIGKILL)
        sweep.process.wait(10)
        for stream in (sweep.process.stdout, sweep.process.stderr):
            assert stream is not None
            stream.close()


def nothing_is_left(sweep: Sweep) -> bool:
    end = time.monotonic() + 15
    while sweep.members() and time.monotonic() < end:
        time.sleep(0.05)
    return not sweep.members()


def test_ctrl_c_keeps_what_is_finished_and_resume_does_the_rest(
    launch: Callable[..., Sweep], shell: Shell, tmp_path: Path
) -> None:
    sweep = launch("--workers", "2", *SLOW)
    sweep.wait_for("[2/8]")
    sweep.interrupt()
    code, errors = sweep.end()
    run = sweep.run
    finished = run.cells()
    assert code == 130
    assert errors == (
        f"gradlab: Stopped. {len(finished)} of 8 cells are finished and kept. "
        f"Go on with: gradlab resume {run.folder.relative_to(tmp_path)}\n"
    )
    assert sweep.lines[-1] == "Stopping: running cells end at their next step; Ctrl-C again ends them now.\n"
    assert 2 <= len(finished) < 8
    assert len(list((run.folder / "cells").iterdir())) == len(finished)  # nothing half-written
    assert nothing_is_left(sweep)

    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files(finished)}
    log = tmp_path / "log.txt"
    log.unlink()
    done = shell(*errors.split("Go on with: gradlab ")[1].split(), "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files(finished)}
    assert len(log.read_text().splitlines()) == 8 - len(finished)
    assert len(run.cells()) == 8


def files(cells: list[FinishedCell]) -> list[Path]:
    return [path for cell in cells for path in cell.folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("delay", [0.0, 0.4, 0.8, 1.6], ids=lambda value: f"{value} s")
def test_ctrl_c_while_workers_start_shows_no_traceback(launch: Callable[..., Sweep], delay: float) -> None:
    sweep = launch("--workers", "2", *SLOW)
    sweep.wait_for("Writing to")
    time.sleep(delay)
    sweep.interrupt()
    code, errors = sweep.end()
    assert code == 130
    assert re.fullmatch(r"gradlab: Stopped. \d of 8 cells are finished and kept. Go on with: .*\n", errors)
    assert nothing_is_left(sweep)


def test_ctrl_c_again_does_not_wait_for_a_long_step(launch: Callable[..., Sweep], tmp_path: Path) -> None:
    sweep = launch("--workers", "2", "--set", "trouble=hang", *SLOW)
    sweep.wait_for("[1/9]")
    sweep.interrupt()
    sweep.wait_for("Stopping")
    time.sleep(0.5)
    assert sweep.process.poll() is None  # it waits for the cell that hangs
    sweep.interrupt()
    code, errors = sweep.end(10)
    assert code == 130
    assert errors.startswith("gradlab: Stopped. ")
    assert errors.count("\n") == 1
    assert len(sweep.run.cells()) >= 1
    assert nothing_is_left(sweep)


def test_sigterm_stops_as_ctrl_c_does(launch: Callable[..., Sweep]) -> None:
    sweep = launch("--workers", "2", *SLOW)
    sweep.wait_for("[1/8]")
    sweep.process.terminate()
    code, errors = sweep.end()
    assert code == 143
    assert errors.startswith("gradlab: Stopped. ")
    assert 1 <= len(sweep.run.cells()) < 8
    assert nothing_is_left(sweep)


def test_a_killed_driver_leaves_no_worker_behind(launch: Callable[..., Sweep]) -> None:
    sweep = launch("--workers", "2", *SLOW)
    sweep.wait_for("[1/8]")
    sweep.process.kill()
    sweep.process.wait(10)  # not end(): a worker left behind would keep stderr open for ever
    assert nothing_is_left(sweep)
    assert 1 <= len(sweep.run.cells()) < 8  # read without an error, so each is whole


def test_ctrl_c_stops_a_sweep_without_workers(launch: Callable[..., Sweep]) -> None:
    sweep = launch("--workers", "0", *SLOW)
    sweep.wait_for("[1/8]")
    sweep.interrupt()
    code, errors = sweep.end()
    assert code == 130
    assert errors.count("\n") == 1
    assert nothing_is_left(sweep)


def test_a_worker_that_is_killed_costs_no_finished_cell(launch: Callable[..., Sweep]) -> None:
    sweep = launch("--workers", "2", *SLOW)
    sweep.wait_for("[1/8]")
    for pid in sweep.members():
        command = Path(f"/proc/{pid}/cmdline").read_text()
        if "spawn_main" in command:
            os.kill(pid, signal.SIGKILL)
            break
    else:
        pytest.fail("no worker found")
    code, errors = sweep.end(60)
    assert (code, errors) == (0, "")
    assert len(sweep.run.cells()) == 8


# -- a full disk ------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_sentence_and_what_is_finished_stays(tmp_path: Path, environment: dict[str, str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = 'mount -t tmpfs -o size=1m tmpfs disk && shift 0 && "$@"; code=$?; cp -r disk kept; exit $code'
    probe = subprocess.run(
        ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m tmpfs disk"],
        cwd=tmp_path, capture_output=True, check=False,
    ) if Path("/usr/bin/unshare").exists() else None  # fmt: skip
    if probe is None or probe.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    command = [sys.executable, "-m", "gradlab", "run", "toy", "--out", "disk", "--workers", "2", "--set", "rows=30000"]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *command],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert "No space left on device. Free some space or choose another folder. " in sentence
    (folder,) = (tmp_path / "kept" / "toy").iterdir()
    cells = Run(folder).cells()
    assert f"{len(cells) or 'None'} {'are' if len(cells) > 1 else 'is'} finished and kept" in sentence
    assert 1 <= len(cells) < 6
    assert len(Run(folder).table("numbers")) == 30000 * len(cells)  # each is whole
    assert len(list((folder / "cells").iterdir())) == len(cells)


def test_a_disk_that_became_read_only_is_one_sentence(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "disk").mkdir()
    begin = "mount -t tmpfs tmpfs disk"
    probe = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{begin} && mount -o remount,ro disk"],
        cwd=tmp_path, capture_output=True, check=False,
    ) if Path("/usr/bin/unshare").exists() else None  # fmt: skip
    if probe is None or probe.returncode:
        pytest.skip("mounting a disk is not permitted here")
    gradlab = shlex.join([sys.executable, "-m", "gradlab"])
    script = (
        f"{begin} && {gradlab} run toy --out disk --workers 0 --preset smoke && rm -r disk/toy/*/cells/*"
        f" && mount -o remount,ro disk && {gradlab} resume --out disk --workers 0"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("gradlab: Cannot write")
    assert "Read-only file system" in sentence


# -- a terminal -------------------------------------------------------------------------------------------------------


def screen(text: str) -> list[str]:
    """Return the lines a terminal shows after it was sent `text`."""
    lines, row, column = [""], 0, 0
    for code, letter in re.findall(r"\x1b\[([?\d;]*[A-Za-z])|(.|\n|\r)", text):
        if code == "2K":
            lines[row] = ""
        elif code.endswith("A"):
            row -= int(code[:-1] or 1)
        elif letter == "\r":
            column = 0
        elif letter == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif letter:
            lines[row] = lines[row].ljust(column)[:column] + letter + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def on_terminal(command: list[str], environment: dict[str, str], folder: Path, stop_at: str = "") -> tuple[int, str]:
    import pty

    terminal, side = pty.openpty()
    process = subprocess.Popen(
        command, env=environment, cwd=folder, stdin=side, stdout=side, stderr=side, start_new_session=True
    )
    os.close(side)
    text, begin = b"", time.monotonic()
    try:
        while time.monotonic() < begin + 60:
            try:
                chunk = os.read(terminal, 65536)
            except OSError:  # the other side is closed
                break
            if not chunk:
                break
            text += chunk
            if stop_at and stop_at.encode() in text:
                os.killpg(process.pid, signal.SIGINT)
                stop_at = ""
        return process.wait(20), text.decode()
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


@pytest.mark.parametrize("stop", [False, True], ids=["to the end", "Ctrl-C"])
def test_a_terminal_shows_bars_and_is_left_clean(tmp_path: Path, environment: dict[str, str], stop: bool) -> None:
    environment = {**environment, "TERM": "xterm", "LINES": "40", "COLUMNS": "100"}
    command = [sys.executable, "-m", "gradlab", "run", "toy", "--workers", "2", *SLOW]
    code, text = on_terminal(command, environment, tmp_path, "loss " if stop else "")
    assert code == (130 if stop else 0)
    plain = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", text)
    for part in ("all cells", "work 1 seed 0", "loss ", "/40", "/8"):
        assert part in plain
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is back
    left = [line for line in screen(text) if line]
    assert not any("all cells" in line or line.startswith("  work") for line in left)
    assert left[0].startswith("Writing to runs/toy/")
    if stop:
        assert left[1] == "Stopping: running cells end at their next step; Ctrl-C again ends them now."
        assert left[2].startswith("gradlab: Stopped. ")
    else:
        assert left[1] == "Claims"
        assert left[-1].startswith("Figure runs/toy/")
