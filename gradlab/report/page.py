"""From what a page shows to one HTML file: templates, Vega's JavaScript inside, and where it may be written."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gradlab.errors import StoreError, UsageError
from gradlab.storage import replace_file

if TYPE_CHECKING:
    from gradlab.report.charts import Chart

__all__ = ["check_target", "write_page"]

_MARK: Final = '<meta name="generator" content="gradlab'
_NEEDED: Final = {"jinja2": "Jinja2", "altair": "altair", "vl_convert": "vl-convert-python"}


def check_target(out: str | os.PathLike[str]) -> Path:
    """Return where a page goes, after everything that can be known beforehand has been looked at.

    A page is derived from a run or a trace, so an older one gives way; any other file stays.

    Raises:
        UsageError: The name does not end in .html, it is a folder, or a package of the extra `report` is missing.
        StoreError: The folder does not exist or cannot be written, or the file there is no page of gradlab's.
    """
    path = Path(out)
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"A report is an .html file; got '{path}': give a name such as report.html.")
    if path.is_dir():
        raise UsageError(f"{path} is a folder: give a file in it, such as {path / 'report.html'}.")
    if not path.parent.is_dir():
        raise StoreError(f"There is no folder {path.parent} for {path.name}: make it first, or choose another.")
    if not os.access(path.parent, os.W_OK):
        raise StoreError(f"The folder {path.parent} cannot be written to: choose another.")
    try:
        if path.exists() and _MARK.encode() not in path.read_bytes()[:2000]:
            raise StoreError(f"{path} exists and is no report of gradlab's, so it stays: choose another name.")
    except OSError as error:
        raise StoreError(f"Cannot read {path}, which is there already: {error.strerror}.") from error
    for module, package in _NEEDED.items():
        try:
            import_module(module)
        except ImportError:
            need = f"A report needs the package {package}, which is not installed"
            raise UsageError(f"{need}: pip install 'gradlab[report]'.") from None
    return path


def write_page(template: str, out: Path, *, charts: Sequence[Chart], **content: Any) -> Path:
    """Render a template and write the file, whole or not at all.

    Args:
        template: Name of a file in `templates`.
        out: Where to; as `check_target` returned it.
        charts: All charts of the page; without any, Vega stays out.
        **content: What the template shows; every string in it is escaped.

    Returns:
        The file.

    Raises:
        StoreError: It cannot be written (disk full, no permission).
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("gradlab.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template(template).render(
        content,
        version=version("gradlab"),
        style=_source("page.css"),
        script=_source("page.js"),
        vega=_vega() if charts else "",
        licence=_source("vega-licence.txt") if charts else "",
        specs={chart.name: _inert(chart.spec) for chart in charts},
    )
    replace_file(out, page.encode("utf-8"))
    return out


def _source(name: str) -> str:
    return files("gradlab.report").joinpath("templates", name).read_text(encoding="utf-8")


def _inert(data: object) -> str:
    """Return JSON that cannot end the script element it stands in, whatever a user's string holds."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _vega() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script; packing them takes some seconds, once a process."""
    import altair as alt
    import vl_convert

    schema = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    script: str = vl_convert.javascript_bundle(vl_version=schema)  # type: ignore[call-arg]  # its default is left out
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")
