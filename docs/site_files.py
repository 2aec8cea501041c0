"""mkdocs hook: takes the gallery, which lies outside docs/, into the site, and turns links to it into the site's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: Any) -> Files:
    """Add figures and their captions, and the table of all claims."""
    for path in sorted((ROOT / "figures").rglob("*")):
        if path.suffix in {".png", ".pdf", ".csv", ".md"}:
            files.append(
                File(path.relative_to(ROOT).as_posix(), str(ROOT), config["site_dir"], config["use_directory_urls"])
            )
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links from docs/ to the gallery lead to its place in the site; drop those to other files outside."""
    depth = page.file.src_uri.count("/")
    if page.file.src_uri.startswith("figures/"):
        return markdown
    markdown = re.sub(r"\]\((?:\.\./)+figures/", f"]({'../' * depth}figures/", markdown)
    outside = re.compile(rf"\[([^\]]+)\]\((?:\.\./){{{depth + 1}}}[^)]*\)")
    return outside.sub(r"\1", markdown)
