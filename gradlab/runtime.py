"""The machine a run happens on: device, seeds, memory errors in plain words, and the versions of everything."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gradlab.errors import ResourceError, UsageError, unknown

if TYPE_CHECKING:
    import torch

__all__ = [
    "PRECISIONS",
    "available_cores",
    "environment",
    "explain_memory",
    "free_memory",
    "resolve_device",
    "seed_everything",
]

#: How training computes: float32, or autocast to a 16-bit type.
PRECISIONS: Final = ("float32", "bf16", "fp16")
_DEVICES: Final = ("auto", "cpu", "cuda", "cuda:0", "mps")
_PACKAGES: Final = ("gradlab", "torch", "numpy", "scipy", "pandas", "pyarrow", "matplotlib", "seaborn")


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device that a name stands for.

    Args:
        name: "auto" (CUDA if there is one, else MPS, else the CPU), "cpu", "cuda", "cuda:<n>" or "mps".

    Raises:
        UsageError: An unknown name, or a device this machine does not have.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    import torch

    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        near = unknown("device", name, _DEVICES)
        # "gpu" is nearest to "cpu" letter by letter, which is not what anybody means by it.
        raise UsageError("Unknown device 'gpu'. Did you mean 'cuda'?") if name == "gpu" else near
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda:0")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UsageError("Device 'mps' is not available here: use 'auto' or 'cpu'.")
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(name.partition(":")[2] or 0)
        if index >= count:
            found = f"{count} CUDA device{'s' if count != 1 else ''}"
            raise UsageError(f"Device '{name}' is not available: torch sees {found} here; use 'auto' or 'cpu'.")
        return torch.device("cuda", index)
    return torch.device(name)


def seed_everything(seed: int) -> None:
    """Seed torch (all devices) and ask for deterministic kernels where torch has them.

    Runs repeat bit for bit on the CPU with the same number of threads. On CUDA they do where every kernel has a
    deterministic form; torch's warnings name the others.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when its first handle is made
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # else torch.empty fills


def explain_memory(error: BaseException, *, doing: str, lower: str, device: torch.device) -> ResourceError | None:
    """Return one sentence for an out-of-memory error of torch, or None if `error` is something else.

    cuBLAS fails to make its handle (CUBLAS_STATUS_ALLOC_FAILED) when the device is already full: it is the same
    trouble under another name.

    Args:
        error: What was raised.
        doing: What the program was about to do, with its size ("a step of plain-56 at batch_size=128").
        lower: The settings that would help, most effective first.
        device: Where it happened.
    """
    import torch

    text = str(error)
    known = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate memory", "out of memory",
             "not enough memory: you tried to allocate")  # fmt: skip
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(mark in text for mark in known):
        return None
    if not isinstance(error, RuntimeError | MemoryError):
        return None
    asked = re.search(r"(?:[Tt]ried|Unable) to allocate ([\d.]+ ?[KMGTP]?i?B|\d+ bytes)", text)
    wanted = f"it asked for {_readable(asked[1])}" if asked else "the amount asked for is not reported"
    if device.type == "cuda":
        try:
            free, total = torch.cuda.mem_get_info(device)
            room = f"{_gib(free)} of {_gib(total)} was free"
        except (RuntimeError, AssertionError):  # a device too full for its own context cannot even say how full
            room = "an unknown amount was free"
    else:
        room = f"{free_memory()} was free"
    return ResourceError(f"Out of memory on {device} in {doing}: {wanted} and {room}; lower {lower}.")


def _readable(amount: str) -> str:
    number, _, unit = amount.partition(" bytes")
    return _gib(int(number)) if unit == "" and number.isdigit() else amount


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def free_memory() -> str:
    """Return how much memory this process may still take, in words."""
    free = free_bytes()
    return _gib(free) if math.isfinite(free) else "an unknown amount"


def free_bytes() -> float:
    """Return how much memory this process may still take; inf where the system does not say.

    On Linux what is available without swapping, and no more than the control group (a container, a batch job) allows.
    """
    found = [math.inf]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found.append(float(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))) * 1024)
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        most, used = (float((group / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current"))
        found.append(max(0.0, most - used))
    return min(found)


def environment() -> dict[str, Any]:
    """Return what a reader needs to repeat a run: versions, platform, and the commit of a source checkout."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": available_cores(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "git_commit": _git_commit(Path(__file__).parent.parent),
    }


def available_cores() -> int:
    """Return how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS or Windows
        return os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit(folder: Path) -> str | None:
    """Return the checkout's commit, with "+changes" if files differ from it; None outside a checkout."""
    if not (folder / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()  # noqa: S603

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
