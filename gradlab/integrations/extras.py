"""What is said where the package that an adapter is for is not installed."""

from __future__ import annotations

from gradlab.errors import UsageError

__all__ = ["missing"]


def missing(package: str, *, extra: str) -> UsageError:
    """Return the error for a package that cannot be imported, naming the extra that brings it.

    Args:
        package: The package, as it is imported.
        extra: The extra of gradlab that installs it.

    Example:
        >>> print(missing("wandb", extra="wandb"))
        gradlab.integrations.wandb needs the package wandb, which is not installed: pip install 'gradlab[wandb]'.
    """
    need = f"needs the package {package}, which is not installed: pip install 'gradlab[{extra}]'."
    return UsageError(f"gradlab.integrations.{extra} {need}")
