"""`gradlab report`: a page of runs or of a trace, and one sentence where there is none to write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from click.testing import Result

from gradlab.trace import Trace

Cli = Callable[..., Result]
TOY = ("run", "toy", "--workers", "0", "--set", "value=1", "--seeds", "1")


def save_trace(path: Path) -> None:
    rows = [(step, f"{n}", n, 10.0 ** (n - 9)) for step in (0, 1) for n in range(10)]
    Trace({"layers": pd.DataFrame(rows, columns=["step", "layer", "order", "grad_norm"])}).save(path)


def test_runs_and_traces(cli: Cli, tmp_path: Path) -> None:
    cli(*TOY)
    result = cli("report", "toy", "--out", "toy.html")
    assert (result.exit_code, result.stdout) == (0, "Report toy.html\n")
    page = (tmp_path / "toy.html").read_text(encoding="utf-8")
    assert "see [bold]x[/bold]" in page  # a claim's detail
    save_trace(tmp_path / "run.trace")
    assert cli("report", "run.trace", "--out", "net.html").exit_code == 0
    assert "vanishing through depth" in (tmp_path / "net.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("tyo", "--out", "a.html"), 1, "Did you mean 'toy'?"),
        (("toy", "--out", "a.txt"), 2, "A report is an .html file; got 'a.txt'"),
        (("toy", "--out", "none/a.html"), 1, "There is no folder none for a.html"),
        (("toy", "run.trace", "--out", "a.html"), 2, "name it alone"),
        (("toy", "toy", "--out", "a.html"), 2, "is named twice"),
        (("toy", "--rules", "gradlab", "--out", "a.html"), 2, "--rules judges a saved trace"),
        (("run.trace", "--rules", "gradlba", "--out", "a.html"), 2, "Unknown rules 'gradlba'"),
        (("broken.trace", "--out", "a.html"), 1, "is no gradlab trace, or damaged"),
    ],
    ids=["misspelt", "suffix", "folder", "mixed", "twice", "rules of a run", "rules", "damaged"],
)
def test_one_sentence(cli: Cli, tmp_path: Path, words: tuple[str, ...], code: int, sentence: str) -> None:
    cli(*TOY)
    save_trace(tmp_path / "run.trace")
    (tmp_path / "broken.trace").mkdir()
    (tmp_path / "broken.trace" / "header.json").write_text("{}")
    result = cli("report", *words)
    assert result.exit_code == code
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "a.html").exists()
