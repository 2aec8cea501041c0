"""The toy study, importable here and in worker processes."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gradlab.study import parse_settings
from gradlab.sweep.driver import SweepReport, start_run, sweep
from gradlab.sweep.store import Run


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "toy"))
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "log.txt"))
    monkeypatch.setenv("TOY_ONCE", str(tmp_path / "once"))
    return importlib.import_module("toy_study")


@pytest.fixture
def ran(tmp_path: Path) -> Callable[[], list[str]]:
    """Return the labels of the cells that ran since the last call."""

    def read() -> list[str]:
        log = tmp_path / "log.txt"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    return read


@pytest.fixture
def start(toy: Any, tmp_path: Path) -> Callable[..., Run]:
    def make(*overrides: str, out: Path | None = None) -> Run:
        settings = parse_settings(toy.STUDY, "default", overrides)
        return start_run(toy.STUDY, "default", settings, out=out or tmp_path / "runs", device="cpu")

    return make


@pytest.fixture
def go(toy: Any) -> Callable[..., SweepReport]:
    def run(run: Run, *overrides: str, workers: int = 0, console: Console | None = None, **how: Any) -> SweepReport:
        settings = parse_settings(toy.STUDY, "default", overrides)
        console = console or Console(file=io.StringIO(), width=80)
        return sweep(toy.STUDY, settings, run, device="cpu", workers=workers, data_dir=None, console=console, **how)

    return run
