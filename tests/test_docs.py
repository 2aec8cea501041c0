"""The README and the guides tell the truth: their Python runs, their commands exist, their links lead somewhere."""

from __future__ import annotations

import csv
import importlib.util
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
    *sorted((ROOT / "docs").rglob("*.md")),
]
GOES_ON = {"tutorial.md", "read-the-tables.md"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "MLFLOW_DISABLE_TELEMETRY": "true"}


def blocks(language: str) -> list[tuple[str, str]]:
    """Return (page, text) of every fenced block of a language; Python that goes on from block to block is one text."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        texts = re.findall(rf"```{language}(?: [^\n]*)?\n(.*?)```", text, flags=re.DOTALL)
        if page.name in GOES_ON and language == "python":
            texts = ["\n".join(texts)]
        found += [(str(page.relative_to(ROOT)), match) for match in texts]
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


def generated() -> dict[Path, str]:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pages: dict[Path, str] = module.pages()
    return pages


def test_generated_pages_are_what_they_are_made_from() -> None:
    for path, text in generated().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.relative_to(ROOT)}: run python docs/generate.py"


def test_the_readme_counts_the_claims_of_the_committed_table() -> None:
    """Counted here anew, by hand, from the CSV."""
    with (ROOT / "figures" / "claims.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("<!-- claims: counts -->") : text.index("<!-- end -->")]
    shown = dict(re.findall(r"^\| ([a-z-]+) \| (\d+ \| \d+ \| \d+) \|$", section, re.MULTILINE))
    verdicts = ("reproduced", "not reproduced", "not decided")
    counted = {
        name: " | ".join(str(sum(r["experiment"] == name and r["verdict"] == v for r in rows)) for v in verdicts)
        for name in {row["experiment"] for row in rows}
    }
    assert shown == counted


def test_every_page_is_in_the_navigation() -> None:
    """A new guide needs its line in mkdocs.yml."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert f"{page.relative_to(ROOT / 'docs').as_posix()}\n" in text, page


def test_the_experiment_in_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from gradlab import catalog
    from gradlab.cli import main

    page = "docs/contributing/add-an-experiment.md"
    (code,) = (text for where, text in blocks("python") if where == page)
    (tmp_path / "scale_study.py").write_text(code, encoding="utf-8")
    info = tmp_path / "scale_study-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scale-study\nVersion: 1\n")
    (entry,) = (text for where, text in blocks("toml") if where == page)
    (info / "entry_points.txt").write_text("[gradlab.experiments]\nscale = scale_study:STUDY\n")
    assert 'scale = "scale_study:STUDY"' in entry
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    catalog._registered.cache_clear()
    try:
        result = CliRunner().invoke(main, ["run", "scale", "--workers", "0", "--strict"])
    finally:
        catalog._registered.cache_clear()
    assert result.exit_code == 0, result.output
    assert "1 reproduced, 0 not reproduced, 0 not decided." in result.output
    assert list((tmp_path / "runs" / "scale").glob("*/figures/ratio.png"))


def test_configuration_in_the_pages_can_be_read() -> None:
    import yaml

    for page, text in blocks("yaml"):
        assert isinstance(yaml.safe_load(text), dict), page
    for page, text in blocks("sbatch"):
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{page}: {done.stderr}"
