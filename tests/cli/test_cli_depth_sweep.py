"""The real thing, from the command line to claims and figures."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import gradlab as gl
from gradlab.analysis.claims import claims_from_json
from gradlab.catalog import find_study
from gradlab.sweep.store import Run

Shell = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.slow
def test_the_smoke_preset_runs_end_to_end(shell: Shell, tmp_path: Path) -> None:
    done = shell("run", "depth-sweep", "--preset", "smoke", "--workers", "2", "--out", "out")
    assert (done.returncode, done.stderr) == (0, "")
    (folder,) = (tmp_path / "out" / "depth-sweep").iterdir()
    run, study = Run(folder), find_study("depth-sweep")

    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["command"][1:] == ["run", "depth-sweep", "--preset", "smoke", "--workers", "2", "--out", "out"]
    assert (manifest["study"], manifest["preset"]) == ("depth-sweep", "smoke")
    assert (manifest["settings"]["seeds"], manifest["settings"]["depth"]) == (2, [8, 14])
    assert manifest["device"].startswith(("cpu", "cuda", "mps"))
    assert {"gradlab", "torch", "numpy", "pandas"} <= set(manifest["environment"]["versions"])
    assert "git_commit" in manifest["environment"]
    assert {cell.key for cell in run.cells()} == run.planned
    assert set(run.table("losses", "train")["seed"]) == {0, 1}

    claims = claims_from_json((folder / "claims.json").read_text(encoding="utf-8"))
    assert len({claim.id for claim in claims}) == len(claims) > 10
    for claim in claims:
        assert claim.id in done.stdout

    trace = gl.load(folder)
    trained = trace.layers[trace.layers["part"] == "train"]
    assert set(trained["norm"]) == {"batch", "none"}
    assert set(trained["net"]) == {"plain", "residual"}
    assert set(trace.layers["cell"]) < run.planned

    drawn = [name for name in study.figures if (folder / "figures" / f"{name}.png").exists()]
    refused = [line for line in done.stdout.splitlines() if line.startswith("Not drawn: ")]
    assert len(drawn) + len(refused) == len(study.figures)
    for name in drawn:
        for suffix in ("png", "pdf", "csv"):
            assert (folder / "figures" / f"{name}.{suffix}").stat().st_size > 50

    for command in ("show", "claims", "figures"):
        again = shell(command, "depth-sweep", "--out", "out")
        assert again.returncode == 0, again.stderr
        assert "Traceback" not in again.stderr


@pytest.mark.parametrize("workers", ["0", "2"], ids=["in this process", "in two"])
def test_a_data_set_that_is_not_there_failed_cell_by_cell(workers: str, shell: Shell, tmp_path: Path) -> None:
    """Each cell looked for it, or tried to download it, for itself."""
    (tmp_path / "empty").mkdir()
    done = shell("run", "depth-sweep", "--preset", "cifar", "--workers", workers, "--data-dir", "empty")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("gradlab: The data folder empty holds neither ")
    assert not (tmp_path / "runs").exists()
