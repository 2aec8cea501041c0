"""A tiny CIFAR-10 in the official layout, so that no test needs the real one."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from pathlib import Path

NAMES = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]


@dataclass(frozen=True)
class TinyCifar:
    """Six batch files of a few images each, their contents, and the archive they make."""

    files: dict[str, bytes]
    pixels: dict[str, np.ndarray]
    labels: dict[str, list[int]]
    archive: bytes

    @property
    def md5(self) -> str:
        return hashlib.md5(self.archive).hexdigest()

    def write(self, folder: Path, leave_out: tuple[str, ...] = ()) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            if name not in leave_out:
                (folder / name).write_bytes(content)
        return folder


def make_archive(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture(scope="session")
def archive_of():
    return make_archive


@pytest.fixture(scope="session")
def tiny() -> TinyCifar:
    rng = np.random.default_rng(0)
    files, pixels, labels = {}, {}, {}
    for k, name in enumerate(NAMES):
        count = 3 + k  # batches may differ in length
        pixels[name] = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels[name] = rng.integers(0, 10, count).tolist()
        files[name] = pickle.dumps({b"data": pixels[name], b"labels": labels[name]}, protocol=4)
    files["batches.meta"] = pickle.dumps({b"label_names": [b"airplane"]}, protocol=4)
    archive = make_archive({f"cifar-10-batches-py/{name}": content for name, content in files.items()})
    return TinyCifar(files, pixels, labels, archive)
