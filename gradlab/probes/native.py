"""The compiled parts: built by the machine's C compiler at first use, kept in the user's cache.

There are two. The kernel (`reduce.c`) reads a tensor once for all its statistics; any C compiler builds it. The hooks
(`hooks.c`, with the kernel inside) also need a C++ compiler and Python's headers, and fit one version of torch. Without
them the hooks are Python's and call the kernel; without a compiler, or with GRADLAB_NATIVE=0 in the environment,
reductions go through torch. GRADLAB_NATIVE=kernel leaves out the hooks.
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
from collections.abc import Callable
from functools import cache
from importlib import machinery, resources, util
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch

__all__ = ["Kernel", "hooks", "kernel", "status"]

_FLAGS: Final = (("-O3", "-march=native"), ("-O3",))  # the second for compilers that do not know this machine
_STANDARDS: Final = ("-std=c++20", "-std=c++17")  # which one torch's headers need depends on its version
_HOOK_SOURCES: Final = (
    "hooks.c", "updates.c", "outputs.c", "output_hook.c", "reduce.c", "torch_side.h", "torch_side.cpp"
)  # fmt: skip
_TIMEOUT = 120  # seconds; compiling takes one, the hooks seven
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
        built = Kernel(_library("reduce", ("reduce.c",), _build_kernel))
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
    try:
        module = _load(_library("hooks", _HOOK_SOURCES, _build_hooks, about=f"{sys.version} {torch.__version__}"))
    except _FAILURES as error:
        return None, f"hooks in Python ({error})"
    return (module, "hooks in C") if _hooks_right(module) else (None, "hooks in Python (those in C gave wrong numbers)")


def _load(library: Path | str) -> Any:
    """Import the extension module and hand it what it needs of torch."""
    loader = machinery.ExtensionFileLoader("gradlab_hooks", str(library))
    spec = util.spec_from_file_location("gradlab_hooks", library, loader=loader)
    assert spec is not None
    module: Any = util.module_from_spec(spec)
    loader.exec_module(module)
    module.setup(torch.Tensor, torch.nn.Parameter)
    return module


def _library(name: str, sources: tuple[str, ...], build: Callable[[Path], None], about: str = "") -> Path:
    """Return the shared library of some sources for this machine, building it if the cache has none.

    Args:
        name: Its name.
        sources: What it is made of.
        build: Takes a folder with the sources and makes "built.so" in it.
        about: What else it depends on.
    """
    texts = {source: resources.files(__package__).joinpath(source).read_bytes() for source in sources}
    # A cache may be shared by machines with different processors: code for one must not run on another.
    described = b"".join(texts.values()) + _processor().encode() + about.encode()
    made_for = hashlib.sha256(described).hexdigest()[:16]
    import pooch

    folder = Path(pooch.os_cache("gradlab")) / "native"
    library = folder / f"{name}-{made_for}.so"
    failure = library.with_suffix(".failed")
    if not library.exists():
        if failure.exists():
            raise RuntimeError(f"{failure.read_text(encoding='utf-8')}; to try again, delete {failure}")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            for source, text in texts.items():
                (Path(work) / source).write_bytes(text)
            try:
                build(Path(work))
            except _BuildError as error:  # after many seconds: not to be lost again by each process to come
                failure.write_text(str(error), encoding="utf-8")
                raise
            # Processes that build it at the same moment each rename a whole file into place.
            (Path(work) / "built.so").replace(library)
    return library


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        detail = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:  # not Linux
        detail = platform.processor()
    return f"{platform.system()} {platform.machine()} {detail}"


class _BuildError(RuntimeError):
    """The hooks cannot be built, or do not work, on this machine with this torch."""


def _build_kernel(work: Path) -> None:
    _compile(work, *(("reduce.c", *flags, "-shared", "-o", "built.so", "-lm") for flags in _FLAGS))


def _build_hooks(work: Path) -> None:
    """Build the hooks, and try them in a process of their own: what does not fit torch may end the process it is in."""
    python, package = f"-I{sysconfig.get_paths()['include']}", Path(torch.__file__).parent
    _notice(f"gradlab: building its hooks for torch {torch.__version__}, once; it takes some ten seconds.")
    header = (package / "include/torch/csrc/autograd/python_variable.h").read_text(encoding="utf-8")
    layout = {"c10::MaybeOwned<at::Tensor> cdata;": ("-DMAYBE_OWNED",), "at::Tensor cdata;": ()}
    known = next((how for text, how in layout.items() if text in header), None)
    if known is None:
        raise RuntimeError(f"torch {torch.__version__} keeps its tensors in a way unknown here")
    _compiler("CXX")  # before anything is compiled
    try:
        _link_hooks(work, python, package, *known)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        raise _BuildError(str(error)) from error


def _link_hooks(work: Path, python: str, package: Path, *known: str) -> None:
    _compile(work, *(("-c", "hooks.c", *flags, python, "-o", "hooks.o") for flags in _FLAGS))
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    of_torch = ("-c", "torch_side.cpp", "-O2", *known, abi, python, f"-I{package / 'include'}", "-o", "torch_side.o")
    _compile(work, *((standard, *of_torch) for standard in _STANDARDS), language="CXX")
    link = ("-shared", "hooks.o", "torch_side.o", "-o", "built.so", f"-L{package / 'lib'}")
    libraries = ("-lc10", "-ltorch_cpu", "-ltorch_python", "-lm")
    lookup = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()
    _compile(work, (*link, *libraries, *lookup), language="CXX")
    trial = (
        "import sys\nfrom gradlab.probes.native import _hooks_right, _load\n"
        "sys.exit(not _hooks_right(_load(sys.argv[1])))"
    )
    command = [sys.executable, "-c", trial, str(work / "built.so")]
    here = str(Path(__file__).parents[2])  # a checkout that is not installed is found too
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(  # noqa: S603
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, timeout=_TIMEOUT, check=False
    )
    if done.returncode:
        raise RuntimeError(f"those built for torch {torch.__version__} do not work")


def _notice(sentence: str) -> None:
    """Tell somebody who waits at a terminal why."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(sentence, file=sys.stderr)


def _compiler(language: str) -> str:
    names = {"CC": "cc gcc clang", "CXX": "c++ g++ clang++"}[language]
    wanted = os.environ.get(language, names).split()
    compiler = next((found for name in wanted if (found := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError(f"no {'C' if language == 'CC' else 'C++'} compiler")
    return compiler


def _compile(work: Path, *attempts: tuple[str, ...], language: str = "CC") -> None:
    """Run the compiler with the arguments of the first attempt that succeeds."""
    compiler = _compiler(language)
    for arguments in attempts:
        command = [compiler, "-fPIC", *arguments]
        done = subprocess.run(command, cwd=work, capture_output=True, timeout=_TIMEOUT, check=False)  # noqa: S603
        if done.returncode == 0:
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
    """Return whether the hooks' own reading of a tensor is the kernel's, and of a gradient that of the tensor."""
    memory = torch.zeros(4, 8, dtype=torch.float64, device="cpu")
    x = torch.linspace(-1, 3, 1000, dtype=torch.float32, device="cpu")
    rows = module.Rows(lambda _: None)
    rows.place(memory.data_ptr(), len(memory))
    gate, found = module.CallGate(without_grad=False), []
    outputs = module.Outputs(gate, rows, *[lambda *_: None] * 4)
    hook = module.OutputHook(outputs, "layer", lambda *args: found.append(args), None)
    hook.know(object, 0)
    gate.recording = True
    with torch.enable_grad():
        y = x.clone().requires_grad_() * 2
        hook(object(), (), y)
        y.backward(x)
    slots = [rows.reduce(x, 0), rows.difference(x, x), rows.reduce(x.double(), 0)]
    built, taken = kernel(), np.frombuffer(outputs.take()[1], dtype=np.int64).tolist()
    read = [tuple(row.tolist()) for row in memory]
    return (
        built is not None and not found and taken == [1000, 0, 1, 0] and slots == [2, 3, -1]
        and read[0] == built.row(y.detach(), moments=True) and read[2] == built.row(x, moments=True)
        and read[1][2] == read[2][2] and read[3][2] == 0.0
    )  # fmt: skip
