"""Checks of the settings that the nets share, each raising one clear sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradlab.errors import UsageError, unknown

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["check_member", "check_positive", "check_skipinit"]


def check_positive(**counts: int) -> None:
    """Raise unless every given count is a whole number of at least 1.

    Args:
        **counts: Setting name = value.

    Raises:
        UsageError: A value is no int or below 1; the sentence names the setting.

    Example:
        >>> check_positive(width=16, classes=10)
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"The setting '{name}' is {value!r}, but must be a whole number of at least 1.")


def check_member(kind: str, name: str, allowed: Iterable[str]) -> None:
    """Raise unless `name` is one of `allowed`.

    Args:
        kind: What the name stands for ("norm", "activation").
        name: The name as given.
        allowed: The valid names.

    Raises:
        UsageError: The name is not allowed; the sentence gives the nearest one.

    Example:
        >>> check_member("norm", "batch", ("batch", "none"))
    """
    allowed = tuple(allowed)
    if name not in allowed:
        raise unknown(kind, name, allowed)


def check_skipinit(*, skip: bool, skipinit: bool) -> None:
    """Raise where SkipInit is asked for in a net without skips.

    Args:
        skip: Whether the net has skip connections.
        skipinit: Whether its branches are to be scaled by SkipInit.

    Raises:
        UsageError: SkipInit without skips: the net's output would be constant, as every branch starts at 0.

    Example:
        >>> check_skipinit(skip=True, skipinit=True)
    """
    if skipinit and not skip:
        raise UsageError("SkipInit scales residual branches, but skip is False: set skip=True or leave skipinit out.")
