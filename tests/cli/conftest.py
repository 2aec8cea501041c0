"""The command line in this process and in others, with a toy study that another package seems to have registered."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gradlab import catalog
from gradlab.cli import main

TOY = Path(__file__).parents[1] / "sweep" / "toy"


@pytest.fixture(scope="session")
def toy_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that makes an installed package of the toy study when it is on sys.path."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "toy_study.py").write_bytes((TOY / "toy_study.py").read_bytes())
    info = folder / "toy_study-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-study\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[gradlab.experiments]\ntoy = toy_study:STUDY\n")
    return folder


@pytest.fixture
def registered(toy_package: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(toy_package))
    catalog._registered.cache_clear()
    yield
    catalog._registered.cache_clear()


@pytest.fixture
def cli(registered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Call the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> Result:
        result = CliRunner().invoke(main, list(words), prog_name="gradlab")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture
def environment(toy_package: Path, tmp_path: Path) -> dict[str, str]:
    paths = os.pathsep.join(path for path in (str(toy_package), os.environ.get("PYTHONPATH", "")) if path)
    return {**os.environ, "PYTHONPATH": paths, "TOY_LOG": str(tmp_path / "log.txt"), "COLUMNS": "140"}


@pytest.fixture
def shell(environment: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Call the command line in a process of its own."""

    def call(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "gradlab", *words],
            env=environment | more, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    return call
