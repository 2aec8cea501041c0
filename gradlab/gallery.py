"""The published gallery: figures of runs, the tables they are drawn from, and a check that both still agree.

A folder of the gallery holds, for each figure, PNG, PDF and the CSV that was drawn, the run's tables as far as figures
read them (Parquet), and `about.json` with settings and captions. Needs no torch.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import pandas as pd

from gradlab.errors import GradlabError, StoreError
from gradlab.storage import read_json, read_table, replace_file

if TYPE_CHECKING:
    from gradlab.study import Results, Study
    from gradlab.sweep.store import Run

__all__ = ["StoredResults", "check_folder", "gallery_folder", "gallery_folders", "gallery_readme", "publish"]

TOLERANCE: Final = 1e-9
"""Largest relative difference between a number that is drawn again and the one in the gallery's CSV."""


@final
class StoredResults:
    """What the figures of a folder of the gallery are drawn from: its tables, as `gradlab.study.Results`.

    Args:
        folder: A folder of the gallery.

    Raises:
        StoreError: It has no about.json, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about = _about(folder)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the run that was drawn."""
        settings: Mapping[str, Any] = self.about["settings"]
        return settings

    @property
    def preset(self) -> str:
        """Its preset."""
        return str(self.about["preset"])

    def table(self, name: str, part: str | None = None) -> pd.DataFrame:
        """Return a table that the figures read; empty where the run had none of that name."""
        path = self.folder / "tables" / f"{_table_name(name, part)}.parquet"
        return read_table(path) if path.exists() else pd.DataFrame()


@final
class _Recording:
    """A run that notes which of its tables are read."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.read: dict[str, pd.DataFrame] = {}

    @property
    def settings(self) -> Mapping[str, Any]:
        return self._run.settings

    @property
    def preset(self) -> str:
        return self._run.preset

    def table(self, name: str, part: str | None = None) -> pd.DataFrame:
        self.read[_table_name(name, part)] = self._run.table(name, part)
        return self.read[_table_name(name, part)]


def _table_name(name: str, part: str | None) -> str:
    return name if part is None else f"{name}.{part.replace(' ', '-')}"


def gallery_folder(gallery: Path, study: str, preset: str) -> Path:
    """Return where the gallery keeps a study's figures at a preset."""
    return gallery / (study if preset == "default" else f"{study}-{preset}")


def gallery_folders(gallery: Path) -> list[Path]:
    """Return the folders of a gallery, by name.

    Raises:
        StoreError: There is no gallery.
    """
    found = sorted(path.parent for path in gallery.glob("*/about.json"))
    if not found:
        raise StoreError(f"There is no gallery in {gallery}: it has no folder with an about.json.")
    return found


def publish(study: Study, run: Run, gallery: Path) -> tuple[Path, list[str]]:
    """Put a run's figures into a gallery, with the tables they are drawn from.

    Args:
        study: The run's study.
        run: A run whose figures have been drawn.
        gallery: Folder of the gallery.

    Returns:
        The folder, and a sentence for each figure that could not be drawn.

    Raises:
        StoreError: A file cannot be read or written.
    """
    recording = _Recording(run)
    folder = gallery_folder(gallery, study.name, run.preset)
    captions, missing = [], []
    for name in study.figures:
        try:
            data, caption = _drawn(study, name, recording)
        except StoreError:
            raise
        except GradlabError as error:
            missing.append(f"{name}: {error}")
            continue
        for suffix in ("png", "pdf"):
            source = run.folder / "figures" / f"{name}.{suffix}"
            if not source.exists():
                raise StoreError(f"{source} is missing: 'gradlab figures {run.folder}' draws it.")
            replace_file(folder / f"{name}.{suffix}", source.read_bytes())
        replace_file(folder / f"{name}.csv", data.to_csv(index=False).encode())
        captions.append({"name": name, "caption": caption})
    shutil.rmtree(folder / "tables", ignore_errors=True)
    for name, frame in recording.read.items():
        if len(frame):
            buffer = io.BytesIO()
            frame.to_parquet(buffer, index=False, compression="zstd", compression_level=19)
            replace_file(folder / "tables" / f"{name}.parquet", buffer.getvalue())
    about = {
        "study": study.name,
        "title": study.title,
        "preset": run.preset,
        "settings": dict(run.settings),
        "made": _made(run.manifest),
        "figures": captions,
    }
    replace_file(folder / "about.json", (json.dumps(about, indent=1, ensure_ascii=False) + "\n").encode())
    return folder, missing


def check_folder(study: Study, folder: Path) -> tuple[list[str], list[str]]:
    """Draw a folder's figures again from its tables and compare what is drawn with its CSVs.

    Args:
        study: The study.
        folder: A folder of the gallery.

    Returns:
        Names of the figures that agree within a relative difference of 1e-9, and a sentence for each other one; neither
        where about.json says "tables_kept": false.

    Raises:
        StoreError: A file is missing or damaged.
    """
    stored = StoredResults(folder)
    if stored.about.get("tables_kept") is False:  # said on purpose, of runs that take long and are not made anew
        return [], []
    if not (folder / "tables").is_dir():
        return [], [f"{folder} holds no tables: its figures cannot be drawn again."]
    good, wrong = [], []
    for figure in stored.about["figures"]:
        name = figure["name"]
        if name not in study.figures:
            wrong.append(f"{folder / name}: '{study.name}' has no such figure.")
            continue
        data, caption = _drawn(study, name, stored)
        difference = _difference(_through_csv(data), folder / f"{name}.csv")
        if not difference and caption != figure["caption"]:
            difference = "the caption is another"
        if difference:
            wrong.append(f"{folder / name}: {difference}.")
        else:
            good.append(name)
    return good, wrong


def _drawn(study: Study, name: str, results: Results) -> tuple[pd.DataFrame, str]:
    """Return the data and the caption of a figure."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    from gradlab.plots.style import paper_style

    try:
        with paper_style():
            drawing = study.figures[name](results)
        return drawing.data, drawing.caption
    finally:
        plt.close("all")


def _through_csv(frame: pd.DataFrame) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(frame.to_csv(index=False)))


def _difference(drawn: pd.DataFrame, path: Path) -> str:
    """Return in what a frame differs from a CSV; "" where in nothing."""
    try:
        stored = pd.read_csv(path)
    except OSError as error:
        raise StoreError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise StoreError(f"{path} is no CSV of a figure: {error}.") from error
    if list(drawn) != list(stored):
        return f"columns {', '.join(map(str, drawn))} are drawn and the CSV has {', '.join(map(str, stored))}"
    if len(drawn) != len(stored):
        return f"{len(drawn)} rows are drawn and the CSV has {len(stored)}"
    for name in stored:
        try:
            pd.testing.assert_series_equal(drawn[name], stored[name], check_dtype=False, rtol=TOLERANCE, atol=0)
        except AssertionError:
            return f"column '{name}' differs from the CSV"
    return ""


def _made(manifest: Mapping[str, Any]) -> str:
    """Return with what and when a run was made."""
    environment = manifest.get("environment")
    versions = environment.get("versions") if isinstance(environment, dict) else None
    torch = versions.get("torch", "?") if isinstance(versions, dict) else "?"
    return f"torch {torch} on {manifest.get('device', '?')}, {str(manifest.get('started', '?'))[:10]}"


def _about(folder: Path) -> dict[str, Any]:
    about = read_json(folder / "about.json", what="folder of the gallery")
    kinds = {"study": str, "title": str, "preset": str, "settings": dict, "made": str, "figures": list}
    for name, kind in kinds.items():
        if not isinstance(about.get(name), kind):
            raise StoreError(f"{folder / 'about.json'} is damaged: '{name}' is missing or of the wrong type.")
    return about


def gallery_readme(gallery: Path) -> str:
    """Return the gallery's README: every figure with its caption, its files, and the command that draws it.

    Raises:
        StoreError: There is no gallery, or a folder of it is damaged.
    """
    folders = gallery_folders(gallery)
    intro = (
        "Each figure as PNG, PDF, and the CSV that was drawn. A caption says what is shown, over how many seeds, which "
        "claims it bears on ([all claims](claims.md)) and, after its last semicolon, whom it follows. "
        "`gradlab figures --check` draws the figures again from the tables stored here and compares the data with the "
        "CSVs; `gradlab reproduce --publish figures` makes the whole gallery anew."
    )
    return "\n\n".join(["# Figures", intro, *(_section(_about(folder), folder.name) for folder in folders)]) + "\n"


def _section(about: Mapping[str, Any], place: str) -> str:
    preset = "" if about["preset"] == "default" else f" --preset {about['preset']}"
    command = about.get("command", f"gradlab run {about['study']}{preset}")
    lines = [f"## {place}", f"{about['title']}. Made by `{command}` ({about['made']})."]
    figures: Sequence[Mapping[str, str]] = about["figures"]
    for figure in figures:
        name, stem = figure["name"], f"{place}/{figure['name']}"
        lines += [f"### {name}", f"![{name}]({stem}.png)", figure["caption"], f"[PDF]({stem}.pdf), [CSV]({stem}.csv)"]
    return "\n\n".join(lines)
