"""Study: what an experiment file declares, and the cells, results and figures that pass between its parts.

Importing this module, and an experiment file that follows its pattern, loads neither torch nor pandas: listing the
studies takes a fraction of a second. An experiment imports what is heavy inside the functions it hands over.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gradlab.errors import StoreError, UsageError, unknown

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from matplotlib.figure import Figure

    from gradlab.analysis.claims import Claim
    from gradlab.checkpoint import Checkpoint
    from gradlab.trace import Trace

__all__ = [
    "Cell",
    "CellContext",
    "CellResult",
    "Drawing",
    "Preset",
    "Results",
    "Study",
    "parse_settings",
    "setting",
    "settings_from",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One unit of work of a sweep: it can run anywhere, alone, and its settings say all there is to know.

    Args:
        part: What kind of measurement it is; cells of one part leave tables of one form.
        label: Its name for people, in progress bars and messages.
        settings: Plain JSON values; they become columns of its tables.
        cost: Rough seconds on one core, so that long cells start first.
    """

    part: str
    label: str
    settings: Mapping[str, Any]
    cost: float = 1.0

    @property
    def key(self) -> str:
        """Hash of part and settings: equal cells have equal keys, in every process and version of Python."""
        content = json.dumps([self.part, dict(self.settings)], sort_keys=True, allow_nan=False)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(kw_only=True, slots=True)
class CellContext:
    """What a running cell is given.

    Args:
        device: Where to compute.
        data_dir: Where data sets lie, if the user said.
        progress: To be called with (steps done, steps in all, loss or None); raises when the sweep is being stopped.
        checkpoint: For `train` and `learn`, so that a long cell goes on where it was broken off; None to begin anew.
    """

    device: torch.device
    data_dir: Path | None
    progress: Callable[[int, int, float | None], None]
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CellResult:
    """What a cell measured.

    Args:
        trace: What probes recorded, if any.
        tables: Further tables by name; every row of a table belongs to this cell.
        status: "done", or "diverged", which is a result too.
        message: One sentence for people, if there is something to say.

    Raises:
        UsageError: A table has the name of one of the trace's.
    """

    trace: Trace | None = None
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    status: str = "done"
    message: str = ""

    def __post_init__(self) -> None:
        """Refuse what could not be told apart when it is read back."""
        from gradlab.trace import SCHEMA  # here, for it loads pandas, and listing studies must stay instant

        for name in self.tables:
            if name in SCHEMA:
                raise UsageError(f"A cell's table cannot be called '{name}': the trace has one of that name.")


class Results(Protocol):
    """What claims and figures are computed from: the tables of a run, read back from disk."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings the run was started with."""

    @property
    def preset(self) -> str:
        """The preset the run was started with."""

    def table(self, name: str, part: str | None = None) -> pd.DataFrame:
        """Return a table of all finished cells (of a part), with their settings, part, cell and status as columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """A figure, the numbers it shows, and what to say under it."""

    figure: Figure
    data: pd.DataFrame
    caption: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Values that replace a study's default settings.

    Args:
        summary: What it is for and what it costs.
        settings: Setting -> value; settings left out keep their default.
    """

    summary: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """An experiment: one question, a grid of cells, and what is concluded and drawn from their tables.

    Args:
        name: As on the command line.
        title: One line.
        question: What it answers, in a sentence or two.
        notes: Ids of the study notes' claims it tests.
        settings: A frozen dataclass made with `setting` fields; its defaults are the preset "default".
        presets: By name; "smoke" and "default" at least.
        plan: Settings -> cells.
        run: Runs one cell; a module-level function, since it is sent to other processes.
        claims: Results -> claims with verdicts.
        figures: Name -> function that draws it.
        run_seeds: Part -> function that runs cells of it at once that differ in their seed alone, and returns a result
            for each, equal to what `run` gives to rounding; used where the user asks for it.
        prepare: (settings, data folder if the user gave one): fetches what the cells need, once, before they run side
            by side; raises a `GradlabError` where that is missing.
    """

    name: str
    title: str
    question: str
    notes: tuple[str, ...]
    settings: type[Any]
    presets: Mapping[str, Preset]
    plan: Callable[[Any], Sequence[Cell]]
    run: Callable[[Cell, CellContext], CellResult]
    claims: Callable[[Results], Sequence[Claim]]
    figures: Mapping[str, Callable[[Results], Drawing]]
    run_seeds: Mapping[str, Callable[[Sequence[Cell], CellContext], Sequence[CellResult]]] = field(default_factory=dict)
    prepare: Callable[[Any, Path | None], None] = lambda _settings, _data_dir: None


def setting(
    default: Any, text: str, *, choices: Sequence[Any] = (), least: float | None = None, empty: bool = False
) -> Any:
    """Declare one field of a study's settings.

    Args:
        default: Value in the preset "default".
        text: What it means, with its unit.
        choices: All valid values; for a tuple, of its items.
        least: Smallest valid number; for a tuple, of its items.
        empty: A tuple may be empty.
    """
    return field(default=default, metadata={"text": text, "choices": tuple(choices), "least": least, "empty": empty})


def parse_settings(study: Study, preset: str = "default", overrides: Sequence[str] = ()) -> Any:
    """Return a study's settings from a preset and overrides of the form KEY=VALUE.

    Args:
        study: The study.
        preset: One of its presets.
        overrides: For example "depth=8,20,56"; items of a tuple are separated by commas.

    Raises:
        UsageError: Unknown preset or setting, a value of the wrong type or out of range; names the nearest valid one.
    """
    if preset not in study.presets:
        raise unknown("preset", preset, study.presets, f"'{study.name}' has these presets.")
    fields = {item.name: item for item in dataclasses.fields(study.settings)}
    hints = typing.get_type_hints(study.settings)
    values: dict[str, Any] = dict(study.presets[preset].settings)
    named: set[str] = set()
    for override in overrides:
        name, equals, text = override.partition("=")
        name = name.strip()
        if not equals:
            raise UsageError(f"--set takes KEY=VALUE; got '{override}'. For example: --set steps=100.")
        if name not in fields:
            raise unknown("setting", name, fields, f"'gradlab list {study.name}' shows all.")
        if name in named:
            raise UsageError(f"Setting '{name}' is given twice, the second time as '{text.strip()}': give it once.")
        named.add(name)
        values[name] = _parse(name, text.strip(), hints[name])
    for name, value in values.items():
        _check(name, value, fields[name].metadata)
    return study.settings(**values)


def _parse(name: str, text: str, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        parts = [part.strip() for part in text.split(",")] if text else []
        if "" in parts:
            raise UsageError(f"Setting '{name}' takes values with single commas between them; got '{text}'.")
        return tuple(_parse(name, part, item) for part in parts)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if text.lower() == "none":
            return None
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    if kind is bool:
        if text.lower() in ("true", "yes", "on", "1"):
            return True
        if text.lower() in ("false", "no", "off", "0"):
            return False
        raise UsageError(f"Setting '{name}' takes true or false; got '{text}'.")
    try:
        value = kind(text)
    except ValueError:
        raise UsageError(f"Setting '{name}' takes {_WORDS.get(kind, kind.__name__)}; got '{text}'.") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"Setting '{name}' takes a finite number; got '{text}'.")
    return value


_WORDS: Mapping[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _check(name: str, value: Any, rules: Mapping[str, Any]) -> None:
    items = value if isinstance(value, tuple) else (value,)
    if isinstance(value, tuple) and not value and not rules.get("empty"):
        raise UsageError(f"Setting '{name}' needs at least one value.")
    if isinstance(value, tuple) and len(set(value)) != len(value):
        raise UsageError(f"Setting '{name}' names a value twice: {', '.join(map(str, value))}.")
    for item in items:
        choices, least = rules.get("choices"), rules.get("least")
        if choices and item not in choices:
            raise unknown(f"{name} value", str(item), [str(choice) for choice in choices])
        if least is not None and item is not None and not item >= least:
            raise UsageError(f"Setting '{name}' must be at least {least}; got {item}.")


def settings_from(study: Study, stored: Mapping[str, Any]) -> Any:
    """Return a study's settings from the JSON form that a run's manifest keeps.

    Raises:
        UsageError: The manifest was written by a version of the study with other settings.
        StoreError: A stored value is of the wrong type.
    """
    fields = {item.name: item for item in dataclasses.fields(study.settings)}
    for name in stored:
        if name not in fields:
            raise unknown("setting", name, fields, "The run was made by another version of this experiment.")
    hints = typing.get_type_hints(study.settings)
    values = {
        name: tuple(value) if typing.get_origin(hints[name]) is tuple and isinstance(value, list) else value
        for name, value in stored.items()
    }
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise StoreError(f"The run's manifest is damaged: setting '{name}' cannot be {value!r:.60}.")
    for name, value in values.items():
        _check(name, value, fields[name].metadata)
    return study.settings(**values)


def _fits(value: Any, kind: Any) -> bool:
    """Say whether a value read from JSON is of a declared type: whole numbers are numbers too, true is none."""
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(item, typing.get_args(kind)[0]) for item in value)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(kind))
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if kind is float else kind)
