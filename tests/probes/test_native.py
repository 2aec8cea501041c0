"""The compiled kernel: built once, right, and never missed where it cannot be built."""

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from gradlab.probes import native
from gradlab.probes.buffer import StepBuffer
from gradlab.probes.reduce import cpu_row, norm_of

ASK = "from gradlab.probes import native; print(native.status()); print(native.kernel() is not None)"
needs_kernel = pytest.mark.skipif(native.kernel() is None, reason="no C compiler here")


def ask(tmp_path, **environment):
    """Ask a new process with an empty cache of its own."""
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)} | environment
    done = subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_can_be_switched_off(tmp_path):
    text, there = ask(tmp_path, GRADLAB_NATIVE="0")
    assert there == "False"
    assert "GRADLAB_NATIVE=0" in text
    assert not list(tmp_path.iterdir())


def test_no_compiler_is_said_and_survived(tmp_path):
    text, there = ask(tmp_path, CC="no-such-compiler")
    assert there == "False"
    assert "no C compiler" in text


def test_failing_compiler_is_said_and_survived(tmp_path):
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    text, there = ask(tmp_path, CC=str(broken))
    assert there == "False"
    assert "broken-cc failed" in text
    assert not list(tmp_path.rglob("*.so"))


def test_unwritable_cache_is_said_and_survived(tmp_path):
    (tmp_path / "gradlab").write_text("a file where the folder should be")
    text, there = ask(tmp_path)
    assert there == "False"
    assert "not available" in text


@needs_kernel
def test_is_built_once_and_a_damaged_one_does_no_harm(tmp_path):
    assert ask(tmp_path)[1] == "True"
    libraries = {path.name.partition("-")[0]: path for path in tmp_path.rglob("*.so")}
    before = [path.stat().st_mtime_ns for path in libraries.values()]
    assert ask(tmp_path)[1] == "True"
    assert [path.stat().st_mtime_ns for path in libraries.values()] == before
    if "hooks" in libraries:
        libraries["hooks"].write_bytes(b"not a library")
        text, there = ask(tmp_path)
        assert there == "True"
        assert "hooks in Python" in text
    libraries["reduce"].write_bytes(b"not a library")
    assert ask(tmp_path)[1] == "False"


@needs_kernel
@pytest.mark.parametrize("language", ["no C++ compiler", "another torch"])
def test_where_hooks_cannot_be_built_they_are_pythons(tmp_path, language):
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    if language == "no C++ compiler":
        change, said = "", "no C++ compiler"
        env["CXX"] = "no-such-compiler"
    else:  # whose header keeps a tensor in another way
        change, said = "native.Path.read_text = lambda *_, **__: 'at::Secret data;'\n", "in a way unknown here"
    code = "from gradlab.probes import native\n" + change + ASK
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    text, there = done.stdout.splitlines()
    assert there == "True"
    assert said in text
    assert [path.name.partition("-")[0] for path in tmp_path.rglob("*.so")] == ["reduce"]


@needs_kernel
def test_hooks_that_do_not_work_are_built_once_and_not_by_each_process(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\necho tried >> "$0.log"\nexit 1\n')
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "CXX": str(broken)}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True, check=True)
        text, there = done.stdout.splitlines()
        assert there == "True"
        assert "c++ failed" in text
        tried = Path(f"{broken}.log").read_text().count("tried")
    assert tried == len(native._STANDARDS)  # by the first process alone
    assert "delete" in text
    (failure,) = tmp_path.rglob("*.failed")
    failure.unlink()
    ask(tmp_path, CXX=str(broken))
    assert Path(f"{broken}.log").read_text().count("tried") == 2 * tried


@needs_kernel
def test_without_pythons_headers_the_hooks_are_pythons(tmp_path):
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    hidden = "from gradlab.probes import native; native.sysconfig.get_paths = lambda: {'include': '/nowhere'}\n"
    done = subprocess.run([sys.executable, "-c", hidden + ASK], env=env, capture_output=True, text=True, check=True)
    text, there = done.stdout.splitlines()
    assert there == "True"
    assert "headers are not installed" in text
    assert [path.name.partition("-")[0] for path in tmp_path.rglob("*.so")] == ["reduce"]


@needs_kernel
def test_a_kernel_that_computes_wrong_is_not_used(monkeypatch):
    class Wrong:
        def row(self, flat, *, moments):
            return (1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)

        def norm(self, flat, minus=None):
            return (1.0,) * 8

    assert not native._right(Wrong())
    assert native._right(native.kernel())


def difference(new, old):
    """Return the norm of new - old as the parameter probe gets it."""
    buffer, norms = StepBuffer(), []
    slot = buffer.reduce_difference(new, old)
    if slot < 0:
        (slot,) = buffer.norms([old.neg_().add_(new)])
    buffer.flush(lambda rows: norms.append(norm_of(rows[slot])))
    buffer.wait()
    return norms[0]


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 8191, 8193, 70_001], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-40, 1e30], ids=str)
def test_difference(size, scale):
    generator = torch.Generator().manual_seed(size)
    new, old = (torch.randn(size, generator=generator) * scale for _ in range(2))
    want = float((new.double() - old.double()).norm())
    assert difference(new, old.clone()) == pytest.approx(want, rel=2e-6)


def test_difference_of_other_layouts_and_dtypes():
    new, old = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    want = (new - old).norm().item()
    assert difference(new.t(), old.t().clone()) == pytest.approx(want)
    assert difference(new.float().t(), old.float().t()) == pytest.approx(want, rel=1e-5)


def test_expanded_gradient_is_not_read_past_its_memory():
    # The gradient of a sum is one number expanded: reshape(-1) of it is a view without strides.
    row = cpu_row(torch.ones(()).expand(20, 5), moments=False)
    assert row[0] * row[2] ** 0.5 == 10.0


@needs_kernel
def test_many_threads_at_once():
    tensors = [torch.full((50_000 + k,), float(k)) for k in range(32)]
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(cpu_row, tensors))
    assert [row[4] for row in rows] == [float(k) for k in range(32)]


@pytest.mark.parametrize("default", ["torch.set_default_device('meta')", "torch.set_default_dtype(torch.float64)"])
def test_first_watch_under_another_default_device_or_dtype_does_not_crash_or_lose_the_kernel(default: str) -> None:
    # The kernel's self-check once ran on the default device: on meta, a null pointer.
    code = (
        f"import torch; {default}\nimport gradlab as gl\nfrom gradlab.probes import native\n"
        "net = torch.nn.Linear(2, 2)\n"
        "with gl.watch(net) as probe:\n    net(torch.ones(1, 2)).sum().backward(); probe.step()\n"
        "assert len(probe.trace.layers) == 1\n"
        "print(native.status())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "wrong numbers" not in done.stdout
