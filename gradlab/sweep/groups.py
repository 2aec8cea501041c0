"""Cells that differ in their seed alone, run together as one unit of work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gradlab.study import Cell

__all__ = ["CellGroup", "group_by_seed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CellGroup(Cell):
    """Several cells that are run at once and stored each on its own; `settings` are those that they share.

    Args:
        cells: The cells, at least two.
    """

    cells: tuple[Cell, ...]

    @property
    def key(self) -> str:
        """Hash of the cells' keys."""
        return hashlib.sha256("".join(cell.key for cell in self.cells).encode()).hexdigest()[:16]


def group_by_seed(cells: Sequence[Cell], parts: Collection[str]) -> list[Cell]:
    """Return the cells with those of some parts grouped that are equal but for their seed.

    Args:
        cells: What is to run.
        parts: Parts whose seeds can be run at once.

    Example:
        >>> def cell(depth, seed):
        ...     return Cell(part="train", label=f"{depth} seed {seed}", settings={"depth": depth, "seed": seed})
        >>> units = group_by_seed([cell(8, 0), cell(8, 1), cell(14, 0)], ["train"])
        >>> [unit.label for unit in units]
        ['8 seed 0 and 1 more', '14 seed 0']
    """
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        shared = {name: value for name, value in cell.settings.items() if name != "seed"}
        seeded = cell.part in parts and "seed" in cell.settings
        groups.setdefault(json.dumps([cell.part, shared], sort_keys=True) if seeded else cell.key, []).append(cell)
    return [group[0] if len(group) == 1 else _group(group) for group in groups.values()]


def _group(cells: Sequence[Cell]) -> CellGroup:
    first = cells[0]
    return CellGroup(
        part=first.part,
        label=f"{first.label} and {len(cells) - 1} more",
        settings={name: value for name, value in first.settings.items() if name != "seed"},
        cost=sum(cell.cost for cell in cells),
        cells=tuple(cells),
    )
