"""Write what the documentation takes from elsewhere: the command line's help, and claims from figures/claims.csv.

Run it as `python docs/generate.py`; a test holds the committed pages to what it gives. In README.md and
docs/science/*.md it fills what stands between `<!-- claims: NAME -->` and `<!-- end -->`: the claims of the
experiment NAME, or for the name `counts` how many claims of each experiment have each verdict.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import pandas as pd

from gradlab.catalog import studies
from gradlab.claims_report import measured_text
from gradlab.cli import main
from gradlab.reproduction import claims_from_table, counts_table

ROOT = Path(__file__).parent.parent
SECTION = re.compile(r"(<!-- claims: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
NONE = "Not in the committed table: the default run of this experiment is not in it. `gradlab reproduce` adds it."


def cli_page() -> str:
    """Return the reference of the command line: the help of every command."""
    lines = ["# Command line", "", "Written by `python docs/generate.py` from `gradlab --help`.", ""]

    def add(command: click.Command, name: str, parent: click.Context | None) -> None:
        shape: dict[str, Any] = {"terminal_width": 100, "max_content_width": 100, **command.context_settings}
        context = click.Context(command, info_name=name, parent=parent, **shape)
        lines.extend([f"## {context.command_path}", "", "```text", command.get_help(context), "```", ""])
        if isinstance(command, click.Group):
            for child in command.list_commands(context):
                add(command.commands[child], child, context)

    add(main, "gradlab", None)
    return "\n".join(lines).rstrip() + "\n"


def filled(text: str, claims: pd.DataFrame) -> str:
    """Return a page with its sections of claims written anew."""
    return SECTION.sub(lambda found: f"{found[1]}\n{_section(found[2], claims)}\n\n{found[3]}", text)


def _section(name: str, claims: pd.DataFrame) -> str:
    if name == "counts":
        rows = ["| experiment | reproduced | not reproduced | not decided |", "|---|---|---|---|"]
        counts = counts_table(claims)
        rows += ["| " + " | ".join(map(str, row)) + " |" for row in counts.itertuples(index=False)]
        missing = [study for study in studies() if study not in set(claims["experiment"])]
        told = f"\n\nNot in the table, since their default run is not: {', '.join(missing)}." if missing else ""
        return "\n".join(rows) + told
    found = claims_from_table(claims[claims["experiment"] == name])
    if not found:
        return NONE
    rows = ["| id | claim | expected | measured | source | verdict |", "|---|---|---|---|---|---|"]
    for claim in found:
        words = (
            claim.id,
            claim.statement,
            claim.expected or "-",
            measured_text(claim),
            claim.source,
            str(claim.verdict),
        )
        rows.append("| " + " | ".join(" ".join(word.split()).replace("|", "\\|") for word in words) + " |")
    return "\n".join(rows)


def pages() -> dict[Path, str]:
    """Return every page that is written here, by its path."""
    claims = pd.read_csv(
        ROOT / "figures" / "claims.csv",
        keep_default_na=False,
        na_values={"measured": "", "low": "", "high": "", "p_value": ""},
    )
    found = {ROOT / "docs" / "reference" / "cli.md": cli_page()}
    for path in [ROOT / "README.md", *sorted((ROOT / "docs" / "science").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        if SECTION.search(text):
            found[path] = filled(text, claims)
    return found


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
