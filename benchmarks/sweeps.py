"""What running a sweep costs beside its cells: overhead, ten thousand cells, Ray against local, the driver's memory.

    .venv/bin/python benchmarks/sweeps.py [overhead] [many] [ray] [memory]

Cells of `overhead` and `ray` sleep, so that their own time does not depend on who else uses the machine; what they
measure is written, checked and read back as that of any cell.
"""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from gradlab.study import Cell, CellContext, CellResult, Preset, Study, setting

ROUNDS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the cells are."""

    cells: int = setting(40, "how many", least=1)
    pace: float = setting(1.0, "seconds each", least=0)


def plan(settings: Settings) -> list[Cell]:
    """Lay out the cells."""
    return [
        Cell(part="cell", label=f"cell {number}", settings={"number": number, "pace": settings.pace})
        for number in range(settings.cells)
    ]


def run(cell: Cell, context: CellContext) -> CellResult:
    """Take the time and write a small table."""
    import pandas as pd

    from gradlab.trace import Trace

    time.sleep(cell.settings["pace"])
    context.progress(1, 1, None)
    steps = pd.DataFrame({"step": range(4), "loss": float(cell.settings["number"])})
    return CellResult(trace=Trace({"steps": steps}), tables={"numbers": steps})


STUDY = Study(
    name="bench",
    title="Nothing",
    question="What does a sweep cost?",
    notes=(),
    settings=Settings,
    presets={"default": Preset(summary="Sleep.")},
    plan=plan,
    run=run,
    claims=lambda _: [],
    figures={},
)


def swept(out: Path, settings: Settings, *, workers: int, engine: Any = None) -> tuple[float, float, float, Any]:
    """Run a sweep; return seconds until the first cell ended and the last, CPU seconds of the driver, and the run."""
    from gradlab.sweep.driver import start_run, sweep
    from gradlab.sweep.engine import run_cells

    ends: list[float] = []

    def timed(*args: Any, **how: Any) -> Any:
        for outcome in (engine or run_cells)(*args, **how):
            ends.append(time.perf_counter())
            yield outcome

    run_ = start_run(STUDY, "default", settings, out=out, device="cpu")
    begin, cpu = time.perf_counter(), time.process_time()
    report = sweep(
        STUDY, settings, run_, device="cpu", workers=workers, data_dir=None, console=Console(file=io.StringIO()),
        engine=timed,
    )  # fmt: skip
    assert not report.failed
    return ends[0] - begin, ends[-1] - begin, time.process_time() - cpu, run_


def overhead(out: Path) -> None:
    """Print what two workers cost over the cells' own time."""
    settings, shares, starts, busy = Settings(cells=40, pace=1.0), [], [], []
    for _ in range(ROUNDS):
        first, last, cpu, run_ = swept(out, settings, workers=2)
        own = [float(cell["seconds"]) for cell in _facts(run_)]
        # From the first end on both workers are busy: what is beyond the cells' own time is the sweep's.
        shares.append(2 * (last - first) / (sum(own) - 2 * own[0]) - 1)
        starts.append(first - own[0])
        busy.append(cpu / last)
    print(f"overhead, 2 workers, 40 cells of 1 s: {_percent(shares)}; start-up {_spread(starts)} s (two processes that")
    print(f"load torch); the driver is busy {_percent(busy)} of the time")


def _facts(run_: Any) -> list[dict[str, Any]]:
    return [json.loads((cell.folder / "cell.json").read_text()) for cell in run_.cells()]


def many(out: Path) -> None:
    """Print how long the handling of 10,000 stored cells takes; all but one are copies of the one that was run."""
    import gradlab as gl
    from gradlab.cli import main
    from gradlab.sweep.driver import start_run, sweep
    from gradlab.sweep.store import Run

    settings = Settings(cells=10_000, pace=0.0)
    took: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = call()
        took[name] = time.perf_counter() - begin
        return result

    cells = timed("plan", lambda: plan(settings))
    (stored,) = (swept(out / "one", Settings(cells=1, pace=0.0), workers=0)[3].folder / "cells").iterdir()
    run_ = timed("begin", lambda: start_run(STUDY, "default", settings, out=out, device="cpu"))
    about = json.loads((stored / "cell.json").read_text())
    for cell in cells:
        folder = shutil.copytree(stored, run_.folder / "cells" / cell.key)
        text = json.dumps(about | {"label": cell.label, "settings": cell.settings}, indent=1)
        (folder / "cell.json").write_text(text + "\n")
    with redirect_stdout(io.StringIO()):
        timed("gradlab ls", lambda: main(["ls", "--out", str(out)], standalone_mode=False))
    quiet = Console(file=io.StringIO())
    timed("resume, nothing left", lambda: sweep(
        STUDY, settings, Run(run_.folder), device="cpu", workers=0, data_dir=None, console=quiet
    ))  # fmt: skip
    timed("gradlab.load", lambda: gl.load(run_.folder))
    timed("one table", lambda: Run(run_.folder).table("numbers"))
    print("10,000 cells, seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in took.items()))


def ray(out: Path) -> None:
    """Print the time of a sweep on Ray against the local engine, after start-up, in turn."""
    from gradlab.sweep.ray_engine import RayEngine

    settings, ratios, starts = Settings(cells=40, pace=0.5), [], []
    for _ in range(ROUNDS):
        first, last, *_ = swept(out, settings, workers=2)
        ray_first, ray_last, *_ = swept(out, settings, workers=2, engine=RayEngine())
        ratios.append((ray_last - ray_first) / (last - first))
        starts.append(ray_first - 0.5)
    print(f"Ray / local, 2 workers, 40 cells of 0.5 s, after start-up: {_spread(ratios)}; start-up {_spread(starts)} s")


def memory(out: Path) -> None:
    """Print the driver's peak memory against the number of cells."""
    found = []
    for count in (100, 1000, 10_000):
        code = (
            f"import runpy, sys; sys.argv = ['sweeps.py', 'peak', {str(out)!r}, '{count}']; "
            f"runpy.run_path({__file__!r}, run_name='__main__')"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found.append(f"{count:,} cells {done.stdout.strip()} MB")
    print("peak memory of the driver, 2 workers: " + ", ".join(found))


def peak(out: Path, count: int) -> None:
    """Run a sweep of tiny cells and print this process's peak memory."""
    swept(out, Settings(cells=count, pace=0.0), workers=2)
    print(round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def _percent(values: list[float]) -> str:
    return f"{100 * statistics.median(values):.1f} % [{100 * min(values):.1f}, {100 * max(values):.1f}]"


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if sys.argv[1:2] == ["peak"]:
        peak(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        parts = {"overhead": overhead, "many": many, "ray": ray, "memory": memory}
        for name in sys.argv[1:] or parts:
            with tempfile.TemporaryDirectory() as folder:
                parts[name](Path(folder))
