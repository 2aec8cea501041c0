"""A snapshot as lines of text: a bar a layer, on a log scale that all rows share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gradlab.live.snapshot import LayerGroup, Snapshot, fold

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["draw"]

_SOLID, _LIGHT = ("█", "░"), ("#", "-")  # with UTF-8, and without
_LEAST_DECADES = 2  # of the scale: less would make rounding look like a gradient that vanishes


def draw(snapshot: Snapshot, *, width: int, height: int, ascii_only: bool = False, left: str = "") -> list[Text]:
    """Return the lines that show a snapshot.

    Args:
        snapshot: What to show.
        width: Columns; no line is longer.
        height: Most lines; neighbouring layers share one where there are more layers than lines left for them.
        ascii_only: The terminal shows no block characters.
        left: What is said of the time to go.
    """
    from rich.text import Text

    solid, light = _LIGHT if ascii_only else _SOLID
    facts = _wrapped(_facts(snapshot, left, "|" if ascii_only else "·"), width)
    groups = list(snapshot.groups)
    for _ in range(2):  # the legend's length depends on whether layers share rows
        low, high = _scale(groups)
        legend = _wrapped(_legend(snapshot, groups, low, high, solid, light), width)
        groups = fold(snapshot.groups, height - len(facts) - len(legend))
    legend = _wrapped(_legend(snapshot, groups, low, high, solid, light), width)
    lines = [Text(line) for line in facts]
    names = [_name(group, ascii_only=ascii_only) for group in groups]
    numbers = [_number(group, wide=width >= 60, ascii_only=ascii_only) for group in groups]
    number_width = max(map(len, numbers), default=0)
    name_width = max(4, min(max(map(len, names), default=0), width * 2 // 5, width - number_width - 8))
    bar_width = max(1, width - name_width - number_width - 2)
    for group, name, number in zip(groups, names, numbers, strict=True):
        style = "bold red" if group.nonfinite else "cyan"
        most = _length(group.largest, low, high, bar_width)
        least = _length(group.smallest, low, high, bar_width)
        line = Text(no_wrap=True)
        line.append(
            _cut(name, name_width, ascii_only=ascii_only).ljust(name_width), "bold red" if group.nonfinite else ""
        )
        line.append(" ")
        line.append(solid * least + light * (most - least), style)
        line.append(" " * (bar_width - most + 1))
        line.append(number.rjust(number_width), style if group.nonfinite else "")
        line.truncate(width)
        lines.append(line)
    lines += [Text(line, style="dim") for line in legend]
    return lines


def _facts(snapshot: Snapshot, left: str, dot: str) -> list[str]:
    facts = [f"step {snapshot.step}"]
    if snapshot.has_loss:
        facts.append("loss NaN" if math.isnan(snapshot.loss) else f"loss {snapshot.loss:.4g}")
    facts.append(f"{snapshot.nonfinite} not finite" if snapshot.nonfinite else "all finite")
    if not math.isnan(snapshot.dead_fraction):
        facts.append(f"{100 * snapshot.dead_fraction:.3g}% dead units")
    if left:
        facts.append(left)
    return [*(f"{fact} {dot} " for fact in facts[:-1]), facts[-1]]


def _legend(snapshot: Snapshot, groups: list[LayerGroup], low: int, high: int, solid: str, light: str) -> list[str]:
    layers = f"{snapshot.layers} layer{'' if snapshot.layers == 1 else 's'}"
    parts = ["gradient norm ", "by layer, ", "input first, ", f"log scale 1e{low} to 1e{high}"]
    if not any(0 < group.largest < math.inf for group in groups):
        parts[-1] = "none finite and above 0"
    if len(groups) < len(snapshot.groups) or any(group.layers > 1 for group in groups):
        rows = f"{len(groups)} row{'' if len(groups) == 1 else 's'}"
        parts += ["; ", f"{layers} in {rows}: ", f"{solid} smallest, {light} largest"]
    return parts


def _wrapped(parts: list[str], width: int) -> list[str]:
    """Join parts to lines of at most `width` columns, breaking between parts."""
    lines = [""]
    for part in parts:
        if lines[-1] and len((lines[-1] + part).rstrip(" ·|;,")) > width:
            lines.append("")
        lines[-1] += part
    return [line.rstrip(" ·|")[:width] for line in lines]


def _scale(groups: list[LayerGroup]) -> tuple[int, int]:
    """Return the decades of the axis: whole ones, so that it stays put from step to step."""
    norms = [norm for group in groups for norm in (group.smallest, group.largest) if 0 < norm < math.inf]
    if not norms:
        return -_LEAST_DECADES, 0
    low, high = math.floor(math.log10(min(norms))), math.ceil(math.log10(max(norms)))
    return min(low, high - _LEAST_DECADES), high


def _length(norm: float, low: int, high: int, width: int) -> int:
    """Return a bar's length: 0 where the norm is 0 or not known, at least 1 where it is not."""
    if math.isnan(norm) or norm <= 0:
        return 0
    return max(1, min(width, round(width * (math.log10(norm) - low) / (high - low))))


def _number(group: LayerGroup, *, wide: bool, ascii_only: bool) -> str:
    if group.nonfinite:
        return f"{group.nonfinite} not finite" if wide else f"{_short(group.nonfinite)} NaN/Inf"
    if math.isnan(group.smallest):
        return "no gradient" if wide else "none"
    if wide and group.layers > 1 and f"{group.smallest:.1e}" != f"{group.largest:.1e}":
        return f"{group.smallest:.1e}{'..' if ascii_only else '…'}{group.largest:.1e}"
    return f"{group.smallest:.2e}" if wide else f"{group.smallest:.1e}"


def _short(count: int) -> str:
    return str(count) if count < 10_000 else f"{count:.0e}"


def _name(group: LayerGroup, *, ascii_only: bool) -> str:
    first, last = group.first or "(model)", group.last or "(model)"
    if group.layers == 1 or first == last:
        return first
    if first.rpartition(".")[0] == last.rpartition(".")[0]:  # "blocks.3…7": their common path once
        last = last.rpartition(".")[2]
    return f"{first}{'..' if ascii_only else '…'}{last}"


def _cut(name: str, width: int, *, ascii_only: bool) -> str:
    """Shorten a path in front: its end tells it from its neighbours."""
    if len(name) <= width:
        return name
    dots = ".." if ascii_only else "…"
    return dots + name[len(name) - width + len(dots) :]
