"""Devices, memory errors in plain words, the environment of a run, and seeds."""

from __future__ import annotations

import math
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from gradlab import runtime
from gradlab.errors import ResourceError, UsageError
from gradlab.runtime import (
    available_cores,
    environment,
    explain_memory,
    free_bytes,
    free_memory,
    resolve_device,
    seed_everything,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


# -- devices ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """Pretend to have so many CUDA devices, and MPS or not."""

    def pretend(cuda=0, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("name", "cuda", "mps", "expected"),
    [
        ("auto", 0, False, "cpu"),
        ("auto", 0, True, "mps"),
        ("auto", 2, False, "cuda:0"),
        ("auto", 2, True, "cuda:0"),
        ("cpu", 2, True, "cpu"),
        ("mps", 0, True, "mps"),
        ("cuda", 1, False, "cuda:0"),
        ("cuda:1", 2, False, "cuda:1"),
    ],
)
def test_a_device_by_name(machine, name, cuda, mps, expected):
    machine(cuda, mps)
    assert resolve_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    ("name", "cuda", "message"),
    [
        ("cuda", 0, "Device 'cuda' is not available: torch sees 0 CUDA devices here; use 'auto' or 'cpu'."),
        ("cuda:1", 1, "Device 'cuda:1' is not available: torch sees 1 CUDA device here; use 'auto' or 'cpu'."),
        ("cuda:7", 2, "Device 'cuda:7' is not available: torch sees 2 CUDA devices here; use 'auto' or 'cpu'."),
        ("mps", 2, "Device 'mps' is not available here: use 'auto' or 'cpu'."),
        ("cdua", 2, "Unknown device 'cdua'. Did you mean 'cuda'?"),
        ("cuda:", 2, "Unknown device 'cuda:'. Did you mean 'cuda:0'?"),
        ("cuda:-1", 2, "Unknown device 'cuda:-1'. Did you mean 'cuda:0'?"),
        ("meta", 2, "Unknown device 'meta'. Allowed: auto, cpu, cuda, cuda:0, mps."),
        ("", 2, "Unknown device ''. Allowed: auto, cpu, cuda, cuda:0, mps."),
    ],
)
def test_a_device_that_is_not_there_is_one_sentence(machine, name, cuda, message):
    machine(cuda)
    with pytest.raises(UsageError) as error:
        resolve_device(name)
    assert str(error.value) == message


# -- memory -----------------------------------------------------------------------------------------------------------


def explain(error, device=CPU):
    return explain_memory(error, doing="a step", lower="batch_size", device=device)


@pytest.fixture
def full_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**29, 80 * 2**30))


OOM = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.50 GiB is free."
)
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (OOM, "it asked for 2.00 GiB"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), "it asked for 20.00 MiB"),
        (CUBLAS, "the amount asked for is not reported"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "the amount asked for is not reported"),
        (RuntimeError("CUDA error: out of memory"), "the amount asked for is not reported"),
    ],
    ids=["torch", "small", "cublas", "cudnn", "driver"],
)
def test_cuda_out_of_memory(full_card, error, wanted):
    told = explain(error, CUDA)
    assert isinstance(told, ResourceError)
    assert str(told) == (
        f"Out of memory on cuda:0 in a step: {wanted} and 1.50 GiB of 80.00 GiB was free; lower batch_size."
    )


def test_a_card_too_full_to_say_how_full(monkeypatch):
    def fails(device):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fails)
    assert "and an unknown amount was free; lower" in str(explain(OOM, CUDA))


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                "to allocate 3221225472 bytes. Error code 12 (Cannot allocate memory)"
            ),
            "it asked for 3.00 GiB",
        ),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 3221225472 bytes."),
            "it asked for 3.00 GiB",
        ),
        (MemoryError(), "the amount asked for is not reported"),
        (MemoryError("Unable to allocate 7.28 TiB for an array with shape (1000,)"), "it asked for 7.28 TiB"),
    ],
    ids=["torch", "torch on Windows", "python", "numpy"],
)
def test_host_out_of_memory(monkeypatch, error, wanted):
    monkeypatch.setattr(runtime, "free_memory", lambda: "4.00 GiB")
    assert str(explain(error)) == f"Out of memory on cpu in a step: {wanted} and 4.00 GiB was free; lower batch_size."


def test_the_real_allocators_are_understood():
    with pytest.raises(RuntimeError) as torch_error:
        torch.empty(2**50, dtype=torch.uint8)
    with pytest.raises(MemoryError) as numpy_error:
        np.empty(2**50, dtype=np.uint8)
    assert "it asked for 1048576.00 GiB" in str(explain(torch_error.value))
    assert "it asked for 1.00 PiB" in str(explain(numpy_error.value))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        ValueError("out of memory"),
        KeyboardInterrupt(),
    ],
    ids=["shapes", "cublas", "not of torch", "interrupt"],
)
def test_other_errors_are_left_alone(error):
    assert explain(error) is None


def test_free_memory_is_in_words():
    assert re.fullmatch(r"\d+\.\d\d GiB|an unknown amount", free_memory())


def test_free_memory_where_the_system_does_not_say(monkeypatch):
    def fails(self, **options):
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", fails)
    assert free_memory() == "an unknown amount"
    assert free_bytes() == math.inf


def test_a_control_group_bounds_the_memory(monkeypatch):
    files = {"meminfo": "MemTotal: 9 kB\nMemAvailable: 8388608 kB\n", "memory.max": "3e9\n", "memory.current": "1e9\n"}
    monkeypatch.setattr(Path, "read_text", lambda self, **options: files[self.name])
    assert free_bytes() == 2e9
    files["memory.max"] = "max\n"  # no limit
    assert free_bytes() == 8 * 2**30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_real_cuda_out_of_memory():
    with pytest.raises(torch.OutOfMemoryError) as error:
        torch.empty(2**50, dtype=torch.uint8, device="cuda:0")
    assert re.search(
        r"it asked for 1048576\.00 GiB and [\d.]+ GiB of [\d.]+ GiB was free", str(explain(error.value, CUDA))
    )


# -- environment ------------------------------------------------------------------------------------------------------


def test_the_environment_says_what_a_reader_needs():
    import json
    import platform

    facts = environment()
    assert set(facts) == {"python", "platform", "processor", "cores", "versions", "git_commit"}
    assert facts["python"] == platform.python_version()
    assert facts["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert {"gradlab", "torch", "numpy", "scipy", "pandas"} <= set(facts["versions"])
    assert facts["cores"] == available_cores() >= 1
    json.dumps(facts)


@pytest.fixture
def checkout(tmp_path):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", "-C", tmp_path, *who, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    return tmp_path, git("rev-parse", "HEAD")


def test_the_commit_of_a_checkout(checkout):
    folder, commit = checkout
    assert runtime._git_commit(folder) == commit
    (folder / "untracked").write_text("2")
    assert runtime._git_commit(folder) == commit
    (folder / "file").write_text("2")
    assert runtime._git_commit(folder) == commit + "+changes"


def test_no_commit_outside_a_checkout(tmp_path, monkeypatch):
    assert runtime._git_commit(tmp_path) is None
    (tmp_path / ".git").mkdir()  # no repository: git fails
    assert runtime._git_commit(tmp_path) is None
    monkeypatch.setenv("PATH", "")  # no git at all
    assert runtime._git_commit(tmp_path) is None


# -- seeds ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _globals(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.usefixtures("_globals")
def test_a_seed_repeats():
    def draw(seed):
        seed_everything(seed)
        return torch.randn(5)

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.usefixtures("_globals")
@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "cuda"])
def test_deterministic_kernels_are_asked_for_where_there_is_cuda(monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    seed_everything(0)
    assert torch.are_deterministic_algorithms_enabled() is cuda
    assert torch.is_deterministic_algorithms_warn_only_enabled() is cuda


@pytest.mark.usefixtures("_globals")
def test_a_workspace_chosen_by_the_user_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    seed_everything(0)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
