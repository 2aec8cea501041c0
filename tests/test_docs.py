"""The README and the guides tell the truth: their Python runs, their commands exist, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "figures" / "README.md",
    *sorted((ROOT / "docs" / "how-to").glob("*.md")),
]
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "MLFLOW_DISABLE_TELEMETRY": "true"}


def blocks(language: str) -> list[tuple[str, str]]:
    """Return (page, text) of every fenced block of a language."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found += [
            (str(page.relative_to(ROOT)), match)
            for match in re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
        ]
    return found


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning")
@pytest.mark.parametrize(
    ("page", "code"), blocks("python"), ids=[f"{page}-{number}" for number, (page, _) in enumerate(blocks("python"))]
)
def test_python_blocks_run(page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib as mpl
    import torch

    mpl.use("agg")
    monkeypatch.chdir(tmp_path)
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    if "wandb" in sys.modules:  # it keeps the folder in which another test used it first
        sys.modules["wandb"].teardown()
    torch.manual_seed(0)
    exec(compile(code, page, "exec"), {"__name__": "__main__"})


def test_readme_opens_with_exactly_two_commands() -> None:
    first, second = (text.strip() for page, text in blocks("bash") if page == "README.md" and ".venv" in text)
    assert first.endswith("gradlab run depth-sweep")
    assert second.endswith("pytest -n 2 --dist loadfile")
    for command in (first, second):
        assert "\n" not in command
        assert "constraints.txt" in command


def test_commands_in_the_pages_exist() -> None:
    from gradlab.cli import main

    for page, text in blocks("bash"):
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            for place, word in enumerate(words[:-1]):
                if Path(word).name == "gradlab":
                    assert words[place + 1] in main.commands, f"{page}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_local_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_configuration_in_the_pages_can_be_read() -> None:
    import yaml

    for page, text in blocks("yaml"):
        assert isinstance(yaml.safe_load(text), dict), page
    for page, text in blocks("sbatch"):
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{page}: {done.stderr}"
