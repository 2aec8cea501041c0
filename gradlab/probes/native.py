"""The compiled one-read kernel: built by the machine's C compiler at first use, kept in the user's cache.

Without a compiler, or with GRADLAB_NATIVE=0 in the environment, there is no kernel and reductions go through torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Final, final

import torch

__all__ = ["Kernel", "kernel", "status"]

_FLAGS: Final = (("-O3", "-march=native"), ("-O3",))  # the second for compilers that do not know this machine
_TIMEOUT = 60  # seconds; compiling takes a quarter of one
_Row = ctypes.c_double * 8


@final
class Kernel:
    """The two functions of reduce.c, for dense float32 CPU tensors with at least one entry.

    They hold the interpreter's lock: a call is shorter than handing the lock over would take, but for huge tensors.
    """

    __slots__ = ("norm_at", "row_at")

    def __init__(self, path: Path) -> None:
        library = ctypes.PyDLL(str(path))
        pointer, length = ctypes.c_void_p, ctypes.c_int64
        #: (address of the entries, their number, with moments, address of the row)
        self.row_at = library.gradlab_row
        self.row_at.argtypes, self.row_at.restype = (pointer, length, ctypes.c_int32, pointer), None
        #: (address of a, address of b or None, number of entries, address of the row of a - b)
        self.norm_at = library.gradlab_norm
        self.norm_at.argtypes, self.norm_at.restype = (pointer, pointer, length, pointer), None

    def row(self, flat: torch.Tensor, *, moments: bool) -> tuple[float, ...]:
        """Return the row of a tensor."""
        out = _Row()
        self.row_at(flat.data_ptr(), flat.numel(), moments, ctypes.addressof(out))
        return tuple(out)

    def norm(self, flat: torch.Tensor, minus: torch.Tensor | None = None) -> tuple[float, ...]:
        """Return the row, filled as far as a norm needs, of a tensor or of the difference of two."""
        out = _Row()
        other = None if minus is None else minus.data_ptr()
        self.norm_at(flat.data_ptr(), other, flat.numel(), ctypes.addressof(out))
        return tuple(out)


@cache
def kernel() -> Kernel | None:
    """Return the kernel, building it if this machine has not yet; None where that is not possible."""
    return _make()[0]


def status() -> str:
    """Return in words whether the kernel is in use."""
    return _make()[1]


@cache
def _make() -> tuple[Kernel | None, str]:
    if os.environ.get("GRADLAB_NATIVE", "1") == "0":
        return None, "off by GRADLAB_NATIVE=0: the probes reduce through torch"
    try:
        built = Kernel(_library())
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        return None, f"not available ({error}): the probes reduce through torch, which costs more"
    if not _right(built):
        return None, "gave wrong numbers on this machine: the probes reduce through torch"
    return built, "in use: one read of each tensor"


def _library() -> Path:
    """Return the shared library for this machine, compiling it if the cache has none."""
    source = resources.files(__package__).joinpath("reduce.c").read_bytes()
    # A cache may be shared by machines with different processors: code for one must not run on another.
    made_for = hashlib.sha256(source + _processor().encode()).hexdigest()[:16]
    import pooch

    folder = Path(pooch.os_cache("gradlab")) / "native"
    library = folder / f"reduce-{made_for}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _compile(source, library)
    return library


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        detail = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:  # not Linux
        detail = platform.processor()
    return f"{platform.system()} {platform.machine()} {detail}"


def _compile(source: bytes, library: Path) -> None:
    wanted = os.environ.get("CC", "cc gcc clang").split()
    compiler = next((found for name in wanted if (found := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError("no C compiler")
    with tempfile.TemporaryDirectory(dir=library.parent) as work:
        (Path(work) / "reduce.c").write_bytes(source)
        for flags in _FLAGS:
            command = [compiler, *flags, "-shared", "-fPIC", "-o", "reduce.so", "reduce.c", "-lm"]
            done = subprocess.run(command, cwd=work, capture_output=True, timeout=_TIMEOUT, check=False)  # noqa: S603
            if done.returncode == 0:
                # Processes that build it at the same moment each rename a whole file into place.
                (Path(work) / "reduce.so").replace(library)
                return
    raise RuntimeError(f"{Path(compiler).name} failed")


def _right(built: Kernel) -> bool:
    """Return whether the kernel gets a case with a known answer right: a compiler or flag may have broken it."""
    # Named, since the default device and dtype are the user's: on meta there is no memory behind a pointer.
    x = torch.arange(-20_000, 20_000, dtype=torch.float32, device="cpu")
    row = built.row(x, moments=True)
    n = x.numel()
    squares = n * (n * n + 2) / 12  # of -n/2 ... n/2 - 1
    good = math.isclose(row[2], squares, rel_tol=1e-5) and row[1] == -n / 2 and row[4:] == (-n / 2, n / 2 - 1, 1.0, 0.0)
    tiny = built.norm(torch.full((100,), 1e-40, dtype=torch.float32, device="cpu"))
    return good and math.isclose(math.sqrt(tiny[2]), 1e-39, rel_tol=1e-4) and built.norm(x, x)[2] == 0.0
