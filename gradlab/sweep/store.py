"""A run on disk: one folder, in it a manifest and one folder for each finished cell. Needs no torch."""

from __future__ import annotations

import os
import re
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import pandas as pd

from gradlab.errors import StoreError, unknown
from gradlab.storage import atomic_folder, read_json, read_table, read_tables, write_json, write_table
from gradlab.trace import SCHEMA, Trace

if TYPE_CHECKING:
    from gradlab.study import Cell, CellResult

__all__ = ["Run", "create_run", "finished_cell", "load", "save_cell", "set_damaged_aside"]

RUN_VERSION = 1
_CELL_NAME = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedCell:
    """What `cell.json` says of a finished cell."""

    folder: Path
    key: str
    part: str
    label: str
    settings: Mapping[str, Any]
    status: str
    message: str


@final
class Run:
    """A run read back from disk: settings, finished cells and their tables.

    Args:
        folder: The run's folder.

    Raises:
        StoreError: No run is there, its manifest is damaged, or a newer gradlab wrote it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.manifest = read_json(self.folder / "manifest.json", what="run")
        version = self.manifest.get("run_version")
        if self.manifest.get("format") != "gradlab run" or not isinstance(version, int):
            raise StoreError(f"{self.folder} is not a gradlab run: its manifest.json does not say so.")
        if version > RUN_VERSION:
            raise StoreError(
                f"The run {self.folder} has version {version} and this gradlab reads up to {RUN_VERSION}: "
                "update gradlab to read it."
            )
        for name, kind in (("study", str), ("preset", str), ("settings", dict), ("cells", list)):
            if not isinstance(self.manifest.get(name), kind):
                raise StoreError(f"The manifest of {self.folder} is damaged: '{name}' is missing or of the wrong type.")
        if not all(isinstance(cell, dict) and isinstance(cell.get("key"), str) for cell in self.manifest["cells"]):
            raise StoreError(f"The manifest of {self.folder} is damaged: one of its cells has no key.")
        self._tables: dict[tuple[str, str | None], pd.DataFrame] = {}

    @property
    def study(self) -> str:
        """Name of the study."""
        return str(self.manifest["study"])

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings the run was started with."""
        settings: Mapping[str, Any] = self.manifest["settings"]
        return settings

    @property
    def preset(self) -> str:
        """The preset the run was started with."""
        return str(self.manifest["preset"])

    @property
    def planned(self) -> frozenset[str]:
        """Keys of all cells of the run, finished or not."""
        return frozenset(cell["key"] for cell in self.manifest["cells"])

    def cells(self) -> list[FinishedCell]:
        """Return the finished cells, in a fixed order."""
        root = self.folder / "cells"
        folders = sorted(root.iterdir()) if root.is_dir() else []
        # Any other name is a part-written folder: not finished.
        return [_read_cell(folder) for folder in folders if _CELL_NAME.fullmatch(folder.name)]

    def unfinished(self) -> frozenset[str]:
        """Return the keys of the cells that are planned and not finished, without reading any."""
        root = self.folder / "cells"
        return self.planned - ({folder.name for folder in root.iterdir()} if root.is_dir() else set())

    def table(self, name: str, part: str | None = None) -> pd.DataFrame:
        """Return a table of all finished cells (of a part), with their settings, part, cell and status as columns.

        Args:
            name: A table of the trace ("layers", "steps", ...) or one that the study's cells wrote.
            part: Only cells of this part.

        Returns:
            One frame; empty where no cell has the table.
        """
        if (name, part) not in self._tables:
            folder = "trace" if name in SCHEMA else "tables"
            pairs = [
                (cell.folder / folder / f"{name}.parquet", cell)
                for cell in self.cells()
                if part is None or cell.part == part
            ]
            self._tables[name, part] = _joined([(path, cell) for path, cell in pairs if path.exists()])
        return self._tables[name, part]

    def trace(self) -> Trace:
        """Return one trace of all finished cells, with their settings, part and key as columns."""
        cells = [cell for cell in self.cells() if (cell.folder / "trace").is_dir()]
        headers = [Trace.header(cell.folder / "trace") for cell in cells]
        tables = {}
        for name in SCHEMA:
            # Most tables of most cells are empty, and to open thousands of them takes its time.
            filled = [
                (cell.folder / "trace" / f"{name}.parquet", cell)
                for cell, header in zip(cells, headers, strict=True)
                if header["rows"].get(name)
            ]
            if filled:
                tables[name] = _joined(filled)
        return Trace(tables, {"merged": [header["info"] for header in headers]})


def finished_cell(run: Path, key: str) -> FinishedCell | None:
    """Return what a run keeps of one cell, or None if it is not finished.

    Raises:
        StoreError: It is damaged.
    """
    folder = run / "cells" / key
    return _read_cell(folder) if folder.is_dir() else None


def _read_cell(folder: Path) -> FinishedCell:
    about = read_json(folder / "cell.json", what="cell")
    try:
        text = {name: str(about[name]) for name in ("part", "label", "status", "message")}
        return FinishedCell(folder=folder, key=folder.name, settings=dict(about["settings"]), **text)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{folder / 'cell.json'} is damaged: {error} is missing or wrong.") from error


def _joined(pairs: Sequence[tuple[Path, FinishedCell]]) -> pd.DataFrame:
    """Return the tables of several cells in one, with each cell's settings, part, key and status as columns.

    Columns of the table itself win over settings of the same name: a study may mark the rows of a cell's trace (one
    net of several), and a name like "norm" is a setting here and a measured column there. A list becomes text.
    """
    frame, counts, columns = read_tables([path for path, _ in pairs])
    if not len(frame):
        return pd.DataFrame()
    marks = [
        {key: ",".join(map(str, value)) if isinstance(value, list) else value for key, value in cell.settings.items()}
        | {"part": cell.part, "cell": cell.key, "status": cell.status}
        for _, cell in pairs
    ]
    row_of = np.repeat(np.arange(len(pairs)), counts)
    added = {}
    for key in dict.fromkeys(key for mark, count in zip(marks, counts, strict=True) if count for key in mark):
        always = key in ("part", "cell", "status")
        values = pd.Series([mark.get(key, np.nan) for mark in marks]).iloc[row_of].reset_index(drop=True)
        own = np.array([key in names and not always for names in columns])[row_of]
        added[key] = values.mask(own, frame[key]) if own.any() else values
    return frame.assign(**added)


def load(path: str | os.PathLike[str]) -> Trace:
    """Read a trace from a folder that `Trace.save` wrote, or that a run wrote: then of all its cells. Needs no torch.

    Args:
        path: The trace's folder, or a run's (`runs/depth-sweep/<time>`).

    Returns:
        The trace, equal to the one saved. Of a run, the rows of all finished cells, with each cell's settings and its
        part, cell and status as further columns.

    Raises:
        StoreError: Neither is there, it is damaged, or a newer gradlab wrote it.

    Example:
        >>> import tempfile
        >>> trace = Trace({"steps": pd.DataFrame({"step": [0], "loss": [2.3]})})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     load(trace.save(f"{folder}/run.trace")) == trace
        True
    """
    folder = Path(path)
    if not folder.exists():
        raise StoreError(f"There is no trace or run at {folder}.")
    return Run(folder).trace() if (folder / "manifest.json").exists() else Trace.load(folder)


def create_run(out: Path, study: str, manifest: Mapping[str, Any], cells: Sequence[Cell]) -> Run:
    """Make a new run folder `<out>/<study>/<time>` with its manifest.

    Raises:
        StoreError: The folder cannot be written.
    """
    content = {
        "format": "gradlab run",
        "run_version": RUN_VERSION,
        "study": study,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        **manifest,
        "cells": [{"key": cell.key, "part": cell.part, "label": cell.label} for cell in cells],
    }
    stamp = datetime.now().astimezone().strftime("%Y-%m-%dT%H-%M-%S")
    for attempt in range(1, 100):
        folder = out / study / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        try:
            with atomic_folder(folder) as part:
                (part / "cells").mkdir()
                write_json(part / "manifest.json", content)
        except StoreError:
            if folder.is_dir() and attempt < 99:  # another run took the name, perhaps since we looked
                continue
            raise
        return Run(folder)
    raise AssertionError("unreachable")


def save_cell(run: Path, cell: Cell, result: CellResult, facts: Mapping[str, Any]) -> None:
    """Write a finished cell; it appears whole or not at all.

    Raises:
        StoreError: It cannot be written (disk full, no permission).
    """
    with atomic_folder(run / "cells" / cell.key) as folder:
        if result.trace is not None:
            result.trace.save(folder / "trace")
        (folder / "tables").mkdir()
        for name, frame in result.tables.items():
            write_table(frame, folder / "tables" / f"{name}.parquet")
        about = {"part": cell.part, "label": cell.label, "settings": dict(cell.settings)}
        about |= {"status": result.status, "message": result.message, "files": _checksums(folder)}
        write_json(folder / "cell.json", {**about, **facts})


def _checksums(folder: Path) -> dict[str, int]:
    """Return the CRC-32 of every file below a folder by its path: enough to notice damage, not meant against malice."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): zlib.crc32(path.read_bytes()) for path in files}


def set_damaged_aside(run: Run) -> list[str]:
    """Move finished cells whose files are not what was written out of the way, so that they run again.

    Returns:
        A sentence for each: which cell, and where it lies now.

    Raises:
        StoreError: A damaged cell cannot be moved.
    """
    root = run.folder / "cells"
    told = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if not _CELL_NAME.fullmatch(folder.name) or _whole(folder):
            continue
        aside = run.folder / "damaged" / f"{folder.name}-{uuid.uuid4().hex[:6]}"
        try:
            aside.parent.mkdir(exist_ok=True)
            folder.rename(aside)
        except OSError as error:
            raise StoreError(f"Cannot move the damaged cell {folder}: {error.strerror}.") from error
        told.append(f"Cell {folder.name} was damaged: it runs again, and what was left of it is in {aside}.")
    return told


def _whole(folder: Path) -> bool:
    try:
        _read_cell(folder)
        about = read_json(folder / "cell.json", what="cell")
        files = about.get("files")
        if files is None:  # written by an earlier gradlab
            return all(len(read_table(path)) >= 0 for path in folder.rglob("*.parquet"))
        found = {name: check for name, check in _checksums(folder).items() if name != "cell.json"}
        return bool(found == files)
    except (StoreError, OSError):
        return False


def find_run(text: str, out: Path, *, latest: bool = True) -> Path:
    """Return the run a person means: a folder, or "<study>/<time>" under `out`, or the latest of "<study>".

    Args:
        text: What the person wrote.
        out: Folder that holds runs.
        latest: Let a study's name stand for its latest run.

    Raises:
        StoreError: There is no such run.
    """
    for folder in (Path(text), out / text):
        if os.path.exists(folder / "manifest.json"):  # noqa: PTH110  # unlike Path.exists, never raises
            return folder
        runs = _runs_in(folder, "*") if latest else []
        if runs:
            return runs[-1]
    known = _runs_in(out, "*/*")
    if known:
        names = [*dict.fromkeys(path.parent.name for path in known), *map(str, reversed(known))]
        raise StoreError(str(unknown("run", text, names)))
    raise StoreError(f"There is no run at {text}: 'gradlab run depth-sweep' makes one under {out}.")


def latest_run(out: Path) -> Path:
    """Return the run that was begun last, of any study.

    Raises:
        StoreError: There is none.
    """
    runs = all_runs(out)
    if not runs:
        raise StoreError(f"There is no run under {out}: 'gradlab run depth-sweep' makes one.")
    return max(runs, key=lambda run: (_age(run)[1:], str(run)))


def all_runs(out: Path) -> list[Path]:
    """Return all runs under a folder, by study, the oldest of each first."""
    return _runs_in(out, "*/*")


def _runs_in(folder: Path, depth: str) -> list[Path]:
    """Return the runs below a folder, the oldest of a study first."""
    try:
        found = [path.parent for path in folder.glob(f"{depth}/manifest.json")]
    except OSError:  # a name too long for a file, a folder that may not be read
        return []
    # A dot begins the name of a run that was never written to its end.
    return sorted((path for path in found if not path.name.startswith(".")), key=_age)


def _age(run: Path) -> tuple[str, str, int]:
    stamp, _, place = run.name.partition("T")
    time, *again = place.rsplit("-", 1) if place.count("-") == 3 else [place]
    return str(run.parent), f"{stamp}T{time}", int(again[0]) if again and again[0].isdigit() else 1
