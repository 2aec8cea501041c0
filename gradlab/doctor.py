"""What `gradlab doctor` checks on a machine."""

from __future__ import annotations

import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gradlab.errors import GradlabError

__all__ = ["Check", "checks"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the doctor's report; not good means that something will not work."""

    name: str
    good: bool
    text: str


def checks(data_dir: Path | None, out: Path, address: str | None = None) -> Iterator[Check]:
    """Look at Python, torch, devices, memory, data, the folders gradlab writes to, and Ray."""
    good = sys.version_info >= (3, 11)
    yield Check(name="python", good=good, text=platform.python_version() + ("" if good else ", needs 3.11 or newer"))
    yield from _torch()
    yield _memory()
    yield _data(data_dir)
    yield _writable("out", out)
    yield _writable("temporary", Path(tempfile.gettempdir()))
    yield _ray(address)


def _torch() -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its shared libraries
        yield Check(name="torch", good=False, text=f"cannot be imported ({error}); runs can still be read and redrawn")
        return
    yield Check(name="torch", good=True, text=f"{torch.__version__}, {torch.get_num_threads()} CPU threads")
    from gradlab.probes import native

    yield Check(name="kernel", good=True, text=native.status())
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    yield Check(name="devices", good=True, text="cpu" + "".join(f", {name}" for name in names))


def _memory() -> Check:
    from gradlab.runtime import available_cores, free_memory

    return Check(name="memory", good=True, text=f"{free_memory()} free, {available_cores()} cores")


def _data(data_dir: Path | None) -> Check:
    from gradlab.tasks import find_cifar10

    if data_dir is not None and not data_dir.expanduser().is_dir():
        return Check(name="data", good=False, text=f"there is no folder {data_dir}: give another --data-dir")
    try:
        place = find_cifar10(data_dir)
    except GradlabError as error:
        return Check(name="data", good=False, text=str(error))
    where = f"cifar10 at {place}" if place else "cifar10 not found: it is downloaded when first needed"
    return Check(name="data", good=True, text=f"digits shipped with gradlab; {where}")


def _ray(address: str | None) -> Check:
    if address is None:
        from importlib.util import find_spec

        installed = find_spec("ray") is not None
        text = "installed; --address ADDRESS looks at a cluster" if installed else "not installed (gradlab[ray])"
        return Check(name="ray", good=True, text=f"{text}; only --engine ray needs it")
    from gradlab.sweep.ray_engine import cluster_facts

    try:
        return Check(name="ray", good=True, text=cluster_facts(address))
    except GradlabError as error:
        return Check(name="ray", good=False, text=str(error))


def _writable(name: str, folder: Path) -> Check:
    try:
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Check(name=name, good=False, text=f"{folder.absolute()} cannot be written: {error.strerror}")
    return Check(name=name, good=True, text=f"{folder.absolute()} can be written")
