"""What the doctor finds right and wrong."""

from __future__ import annotations

import builtins
import errno
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from gradlab import doctor
from gradlab.doctor import Check, checks


def report(data_dir: Path | None = None, out: Path = Path("runs")) -> dict[str, Check]:
    return {check.name: check for check in checks(data_dir, out)}


@pytest.fixture(autouse=True)
def empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRADLAB_DATA", raising=False)


def test_all_is_well_and_nothing_is_made(tmp_path: Path) -> None:
    found = report()
    assert all(check.good for check in found.values())
    assert found["out"].text == f"{tmp_path / 'runs'} can be written"
    assert list(tmp_path.iterdir()) == []


def test_an_old_python_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    check = report()["python"]
    assert not check.good
    assert check.text.endswith("needs 3.11 or newer")


@pytest.mark.parametrize("error", [ImportError("no module"), OSError("libtorch.so is missing")], ids=["none", "broken"])
def test_a_machine_without_torch_can_still_read_runs(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch" or name.startswith("torch."):
            raise error
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    found = report()
    assert not found["torch"].good
    assert found["torch"].text == f"cannot be imported ({error}); runs can still be read and redrawn"
    assert "devices" not in found
    assert found["memory"].good
    assert found["data"].good


def test_a_data_folder_that_is_not_there_is_told() -> None:
    check = report(Path("nowhere"))["data"]
    assert (check.good, check.text) == (False, "there is no folder nowhere: give another --data-dir")


def test_a_data_folder_without_data_is_told(tmp_path: Path) -> None:
    assert "cifar10 not found" in report(tmp_path)["data"].text


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check = report(out=tmp_path / "file" / "runs")["out"]
    assert not check.good
    assert check.text == f"{tmp_path / 'file' / 'runs'} cannot be written: Not a directory"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC], ids=lambda code: errno.errorcode[code])
def test_a_folder_that_refuses_is_told(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(**_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    found = report()
    assert (found["out"].good, found["temporary"].good) == (False, False)
    assert found["out"].text.endswith(f"cannot be written: {os.strerror(code)}")


def test_a_folder_that_may_not_be_looked_into_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    assert doctor._writable("out", Path("x")).text.endswith("cannot be written: Permission denied")
