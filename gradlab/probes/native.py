"""The compiled parts: built by the machine's C compiler at first use, kept in the user's cache.

There are two. The kernel (`reduce.c`) reads a tensor once for all its statistics; any C compiler builds it. The hooks
(`hooks.c`, with the kernel inside) also need Python's headers. Without them the hooks are Python's and call the kernel;
without a compiler, or with GRADLAB_NATIVE=0 in the environment, reductions go through torch. GRADLAB_NATIVE=kernel
leaves out the hooks.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import OrderedDict
from functools import cache
from importlib import machinery, resources, util
from pathlib import Path
from typing import Any, Final, final

import torch

__all__ = ["Kernel", "hooks", "kernel", "status"]

_FLAGS: Final = (("-O3", "-march=native"), ("-O3",))  # the second for compilers that do not know this machine
_HOOK_SOURCES: Final = ("hooks.c", "updates.c", "outputs.c", "output_hook.c", "reduce.c")
_TIMEOUT = 60  # seconds; compiling takes one
_FAILURES = (OSError, RuntimeError, AttributeError, ImportError, subprocess.SubprocessError)
_Row = ctypes.c_double * 8


@final
class Kernel:
    """The functions of reduce.c, for dense float32 CPU tensors with at least one entry.

    They hold the interpreter's lock: a call is shorter than handing the lock over would take, but for huge tensors.
    """

    __slots__ = ("channel_max", "norm_at", "row_at")

    def __init__(self, path: Path) -> None:
        library = ctypes.PyDLL(str(path))
        pointer, length = ctypes.c_void_p, ctypes.c_int64
        #: (address of the entries, their number, with moments, address of the row)
        self.row_at = library.gradlab_row
        self.row_at.argtypes, self.row_at.restype = (pointer, length, ctypes.c_int32, pointer), None
        #: (address of a, address of b or None, number of entries, address of the row of a - b)
        self.norm_at = library.gradlab_norm
        self.norm_at.argtypes, self.norm_at.restype = (pointer, pointer, length, pointer), None

        #: (address of the entries, outer blocks, channels, inner entries, address of each channel's largest so far)
        self.channel_max = library.gradlab_channel_max
        self.channel_max.argtypes, self.channel_max.restype = (pointer, length, length, length, pointer), None

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


@cache
def hooks() -> Any | None:
    """Return the extension module with the hooks in C (Rows, CallGate, Outputs, OutputHook); None where it is not."""
    return _make_hooks()[0]


def status() -> str:
    """Return in words what of the compiled parts is in use."""
    built, text = _make()
    return text if built is None else f"{text}, {_make_hooks()[1]}"


def _wanted() -> str:
    return os.environ.get("GRADLAB_NATIVE", "1")


@cache
def _make() -> tuple[Kernel | None, str]:
    if _wanted() == "0":
        return None, "off by GRADLAB_NATIVE=0: the probes reduce through torch"
    try:
        built = Kernel(_library("reduce", ("reduce.c",)))
    except _FAILURES as error:
        return None, f"not available ({error}): the probes reduce through torch, which costs more"
    if not _right(built):
        return None, "gave wrong numbers on this machine: the probes reduce through torch"
    return built, "in use: one read of each tensor"


@cache
def _make_hooks() -> tuple[Any | None, str]:
    if kernel() is None or _wanted() == "kernel":
        return None, "hooks in Python"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):  # the extension's objects rely on the interpreter's lock
        return None, "hooks in Python (this Python has no interpreter lock)"
    include = sysconfig.get_paths()["include"]
    if not (Path(include) / "Python.h").is_file():
        return None, "hooks in Python (Python's headers are not installed)"
    flags = (f"-I{include}", *(("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()))
    try:
        module = _load(_library("hooks", _HOOK_SOURCES, *flags, about=sys.version))
    except _FAILURES as error:
        return None, f"hooks in Python ({error})"
    return (module, "hooks in C") if _hooks_right(module) else (None, "hooks in Python (those in C gave wrong numbers)")


def _load(library: Path) -> Any:
    """Import the extension module and hand it what it needs of torch."""
    loader = machinery.ExtensionFileLoader("gradlab_hooks", str(library))
    spec = util.spec_from_file_location("gradlab_hooks", library, loader=loader)
    assert spec is not None
    module: Any = util.module_from_spec(spec)
    loader.exec_module(module)
    module.setup(
        torch.Tensor, torch.nn.Parameter, torch.float32, torch.channels_last, OrderedDict,
        torch.is_grad_enabled, getattr(torch._C, "_current_graph_task_id", None),
    )  # fmt: skip
    return module


def _library(name: str, sources: tuple[str, ...], *flags: str, about: str = "") -> Path:
    """Return the shared library of some sources for this machine, compiling it if the cache has none."""
    texts = {source: resources.files(__package__).joinpath(source).read_bytes() for source in sources}
    # A cache may be shared by machines with different processors: code for one must not run on another.
    described = b"".join(texts.values()) + _processor().encode() + about.encode()
    made_for = hashlib.sha256(described).hexdigest()[:16]
    import pooch

    folder = Path(pooch.os_cache("gradlab")) / "native"
    library = folder / f"{name}-{made_for}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _compile(texts, sources[0], flags, library)
    return library


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        detail = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:  # not Linux
        detail = platform.processor()
    return f"{platform.system()} {platform.machine()} {detail}"


def _compile(texts: dict[str, bytes], main: str, extra: tuple[str, ...], library: Path) -> None:
    wanted = os.environ.get("CC", "cc gcc clang").split()
    compiler = next((found for name in wanted if (found := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError("no C compiler")
    with tempfile.TemporaryDirectory(dir=library.parent) as work:
        for source, text in texts.items():
            (Path(work) / source).write_bytes(text)
        for flags in _FLAGS:
            command = [compiler, *flags, *extra, "-shared", "-fPIC", "-o", "built.so", main, "-lm"]
            done = subprocess.run(command, cwd=work, capture_output=True, timeout=_TIMEOUT, check=False)  # noqa: S603
            if done.returncode == 0:
                # Processes that build it at the same moment each rename a whole file into place.
                (Path(work) / "built.so").replace(library)
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
    return good and math.isclose(tiny[0] * math.sqrt(tiny[2]), 1e-39, rel_tol=1e-4) and built.norm(x, x)[2] == 0.0


def _hooks_right(module: Any) -> bool:
    """Return whether the hooks' own reading of a tensor is the kernel's."""
    memory = torch.zeros(2, 8, dtype=torch.float64, device="cpu")
    x = torch.linspace(-1, 3, 1000, dtype=torch.float32, device="cpu")
    rows = module.Rows(lambda _: None)
    rows.place(memory.data_ptr(), 2)
    slots = [rows.reduce(x, 0), rows.difference(x, x), rows.reduce(x.double(), 0)]
    built = kernel()
    return (
        built is not None and slots == [0, 1, -1]
        and tuple(memory[0].tolist()) == built.row(x, moments=True) and memory[1, 2].item() == 0.0
    )  # fmt: skip
