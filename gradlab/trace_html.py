"""What a notebook shows of a trace: a few lines and a small table, every text of the user's escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

__all__ = ["trace_html"]

_SHOWN = 8


def trace_html(tables: Mapping[str, pd.DataFrame], info: Mapping[str, Any]) -> str:
    """Return a trace as a short piece of HTML.

    Args:
        tables: Its tables by name.
        info: Its facts about the recording.

    Returns:
        Model, recorded steps and layers; the rows and columns of each table that has any; what was not seen.
    """
    rows = ""
    for name, frame in tables.items():
        columns = html.escape(", ".join(map(str, frame.columns)))
        rows += f"<tr><td>{html.escape(name)}</td><td>{len(frame)}</td><td>{columns}</td></tr>" if len(frame) else ""
    head = "<tr><th>table</th><th>rows</th><th>columns</th></tr>"
    body = f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>" if rows else "<p>no rows</p>"
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in _not_seen(info))
    listed = f"<p>Not recorded:</p><ul>{notes}</ul>" if notes else ""
    return f"<div><p><b>gradlab trace</b>{html.escape(_summary(tables, info))}</p>{body}{listed}</div>"


def _summary(tables: Mapping[str, pd.DataFrame], info: Mapping[str, Any]) -> str:
    """Return what was recorded in words: ' of Net: 3 recorded steps (0 to 20), 5 layers, 10 parameters'."""
    parts = []
    stepped = [frame["step"] for frame in tables.values() if "step" in frame and len(frame)]
    if stepped:
        steps = pd.concat(stepped).unique()
        parts.append(f"{_count(len(steps), 'recorded step')} ({steps.min()} to {steps.max()})")
    for table, column, what in (("layers", "layer", "layer"), ("params", "param", "parameter")):
        if table in tables and len(tables[table]):
            parts.append(_count(tables[table][column].nunique(), what))
    if "merged" in info:
        parts.insert(0, f"merged from {_count(len(info['merged']), 'run')}")
    model = f" of {info['model']}" if "model" in info else ""
    return f"{model}: {', '.join(parts)}" if parts else f"{model}: nothing recorded"


def _not_seen(info: Mapping[str, Any]) -> list[str]:
    reasons = dict(info.get("not_seen") or {})
    notes = [f"{name or '(the model itself)'}: {reason}" for name, reason in reasons.items()]
    more = len(notes) - _SHOWN
    notes = [*notes[:_SHOWN], *([f"and {more} more"] if more > 0 else [])]
    unwatched = info.get("time_not_watched") or ()
    if unwatched:
        notes.append(f"through time: {_names(unwatched)} (timesteps=True follows them)")
    never = [name for name in info.get("never_ran") or () if name not in reasons]
    if never:
        notes.append(f"never ran: {_names(never)}")
    if info.get("calls_without_grad"):
        notes.append(f"{_count(info['calls_without_grad'], 'call')} under no_grad (without_grad=True records them)")
    return [*notes, *map(str, info.get("notes") or ())]


def _names(names: Iterable[Any]) -> str:
    shown = [str(name) or "(the model itself)" for name in names]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
