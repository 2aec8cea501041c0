"""What is packaged is what there is: package list, data, pinned dependencies, licences."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_package_list_equals_the_folders() -> None:
    folders = {path.parent for path in (ROOT / "gradlab").rglob("__init__.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"gradlab.experiments"}
    benchmarks = {path.parent.relative_to(ROOT) for path in (ROOT / "benchmarks").rglob("__init__.py")}
    found |= {".".join(("gradlab", *folder.parts)) for folder in benchmarks}
    assert sorted(found) == PROJECT["tool"]["setuptools"]["packages"]
    places = {"gradlab.experiments": "experiments", "gradlab.benchmarks": "benchmarks"}
    assert places.items() <= PROJECT["tool"]["setuptools"]["package-dir"].items()


def test_every_data_file_is_matched() -> None:
    data = [path for path in (ROOT / "gradlab").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    for path in data:
        folder = ".".join(path.parent.relative_to(ROOT).parts)
        owners = [(package, glob) for package, globs in patterns.items() for glob in globs]
        assert any(
            (folder == package and path.match(glob)) or path.parent.match(f"{package.replace('.', '/')}/{glob}"[:-2])
            for package, glob in owners
        ), path


def test_every_dependency_is_pinned_to_a_tested_version() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    wanted = list(PROJECT["project"]["dependencies"])
    for extra in PROJECT["project"]["optional-dependencies"].values():
        wanted += extra
    names = {re.split(r"[\[<>=!~ ;]", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    assert names - {"gradlab"} <= pins  # an extra may name others of gradlab's
    assert "torch==2.13.0" in lines


def test_changelog_knows_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {PROJECT['project']['version']}" in text or "## Unreleased" in text


def test_the_data_shipped_has_its_attribution() -> None:
    text = (ROOT / "gradlab" / "tasks" / "data" / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert "CC BY 4.0" in text
    assert "Alpaydin" in text
