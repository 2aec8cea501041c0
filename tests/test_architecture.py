"""The house keeps its order: imports go one way, some rooms never need torch, files stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gradlab"

# A room imports only from rooms of a lower number (and itself).
LEVELS = {
    "errors": 0,
    "storage": 1, "trace_html": 1, "cli_errors": 1,
    "trace": 2, "checkpoint": 2, "live": 2,
    "runtime": 3, "nets": 3, "tasks": 3, "probes": 3,
    "training_steps": 4, "surgery": 4, "seed_program": 4,
    "training": 5,
    "training_seeds": 6,
    "measure": 7,
    "analysis": 8,
    "plots": 9,
    "study": 10, "trial": 10,
    "sweep": 11, "catalog": 11, "claims_report": 11, "diagnosis_report": 11, "user_setup": 11,
    "experiments": 12, "benchmarks": 12, "doctor": 12, "run_comparison": 12, "cli_screen": 12,
    "reproduction": 12, "gallery": 12,
    "report": 13, "cli_bench": 13, "cli_diagnose": 13, "cli_run": 13, "cli_runs": 13,
    "cli_report": 14, "cli_reproduce": 14,
    "cli": 15,
    "integrations": 16,  # may import anything; of its own level, so that nothing below imports it
    "__main__": 16,
    "__init__": 17,
}  # fmt: skip
TORCH_FREE = (
    "errors", "storage", "trace", "live", "trace_html", "analysis", "plots", "study", "catalog", "claims_report",
    "report",
)  # fmt: skip


def modules() -> list[tuple[str, Path]]:
    """Return (room, file) of every source file."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        first = path.relative_to(PACKAGE).parts[0]
        found.append((first.removesuffix(".py"), path))
    found += [("experiments", path) for path in sorted((ROOT / "experiments").glob("*.py"))]
    found += [("benchmarks", path) for path in sorted((ROOT / "benchmarks").rglob("*.py"))]
    return found


def type_only(tree: ast.Module) -> set[ast.AST]:
    """Return the nodes under `if TYPE_CHECKING:`: they are never imported."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    return {node for block in blocks for statement in block.body for node in ast.walk(statement)}


def imported(path: Path, *, with_types: bool = True) -> set[str]:
    """Return the dotted names a file imports, also inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set() if with_types else type_only(tree)
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def rooms_of(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("gradlab.")} & LEVELS.keys()


@pytest.mark.parametrize(("room", "path"), modules(), ids=lambda value: getattr(value, "name", value))
def test_imports_go_one_way(room: str, path: Path) -> None:
    if room == "__init__":
        return  # the public page names everything, lazily
    for other in rooms_of(imported(path)) - {room}:
        assert LEVELS[other] < LEVELS[room], f"{path.relative_to(ROOT)} imports {other}, which is not below {room}"


@pytest.mark.parametrize(("room", "path"), modules(), ids=lambda value: getattr(value, "name", value))
def test_every_room_is_placed(room: str, path: Path) -> None:
    assert room in LEVELS, f"{path.relative_to(ROOT)} belongs to no room"


@pytest.mark.parametrize(
    "path", [path for room, path in modules() if room in TORCH_FREE], ids=lambda path: path.name
)  # fmt: skip
def test_room_needs_no_torch(path: Path) -> None:
    assert not any(name.split(".")[0] == "torch" for name in imported(path, with_types=False))


@pytest.mark.parametrize(("room", "path"), modules(), ids=lambda value: getattr(value, "name", value))
def test_files_stay_short(room: str, path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_experiments_never_import_each_other_or_by_the_root() -> None:
    for room, path in modules():
        for name in imported(path):
            assert name.split(".")[0] not in ("experiments", "benchmarks"), f"{path}: a second identity of each class"
            assert not (room == "experiments" and name.startswith("gradlab.experiments")), path


BLOCKED = """
import importlib, importlib.abc, pkgutil, sys

class NoTorch(importlib.abc.MetaPathFinder):  # as if it were not installed
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, NoTorch())
import gradlab as gl
for room in ("gradlab.analysis", "gradlab.plots", "gradlab.report"):
    package = importlib.import_module(room)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{room}.{module.name}")
import gradlab.trace, gradlab.study, gradlab.sweep.store, gradlab.catalog, gradlab.claims_report
gradlab.catalog.studies()
trace = gl.load(sys.argv[1])
assert len(trace.layers) == 2, trace
import matplotlib
matplotlib.use("agg")
gl.plots.gradient_flow(trace)
gl.report.write_diagnosis(trace, sys.argv[1] + ".html")
print("drawn")
"""


def test_a_laptop_without_torch_reads_and_draws_a_trace(tmp_path: Path) -> None:
    import pandas as pd

    from gradlab.trace import Trace

    layers = pd.DataFrame({
        "step": [0, 0], "layer": ["a", "b"], "call": [0, 0], "order": [0, 1], "kind": ["Linear", "ReLU"],
        "grad_norm": [1e-3, 1e-2],
    })  # fmt: skip
    Trace({"layers": layers}).save(tmp_path / "run.trace")
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(tmp_path / "run.trace")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "drawn"


def test_listing_loads_nothing_heavy() -> None:
    code = (
        "import sys; from gradlab.cli import main; main(['list'], standalone_mode=False);"
        "print(sorted({'torch', 'pandas', 'numpy', 'scipy', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "depth-sweep" in done.stdout
