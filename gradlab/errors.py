"""The errors gradlab raises on purpose, each one clear sentence and one exit code."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["DataError", "GradlabError", "ResourceError", "StoreError", "UsageError", "unknown"]


class GradlabError(Exception):
    """Something gradlab can explain in one sentence; the command line prints it and exits with `exit_code`."""

    exit_code = 1


class UsageError(GradlabError):
    """What was asked for does not exist or makes no sense: a name, a setting, a call out of order."""

    exit_code = 2


class DataError(GradlabError):
    """A data set is missing, damaged or not what it should be."""


class StoreError(GradlabError):
    """A run or trace on disk cannot be read or written."""


class ResourceError(GradlabError):
    """The machine has too little of something, device memory above all."""


def unknown(kind: str, got: str, allowed: Iterable[str], hint: str = "") -> UsageError:
    """Return the error for a name that is not one of `allowed`, naming the nearest valid one.

    Args:
        kind: What the name stands for, as the sentence should call it ("experiment", "setting").
        got: The name as given.
        allowed: The valid names.
        hint: One more sentence on where all of them can be seen.

    Example:
        >>> print(unknown("experiment", "depth-sweeep", ["depth-sweep"], "'gradlab list' shows all."))
        Unknown experiment 'depth-sweeep'. Did you mean 'depth-sweep'? 'gradlab list' shows all.
    """
    names = [str(name) for name in allowed]
    near = difflib.get_close_matches(str(got), names, n=1, cutoff=0.5)
    if near:
        advice = f"Did you mean '{near[0]}'?"
    elif len(names) <= 12:
        advice = f"Allowed: {', '.join(names) or 'none'}."
    else:
        advice = f"Allowed: {', '.join(names[:12])} and {len(names) - 12} more."
    return UsageError(" ".join(part for part in (f"Unknown {kind} '{got}'.", advice, hint) if part))
