"""How a command ends when something is wrong: one sentence on the error stream and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, Final

import click

from gradlab.errors import GradlabError

__all__ = ["EXIT_NOT_REPRODUCED", "fail", "plain_errors"]

EXIT_NOT_REPRODUCED: Final = 3
"""With --strict: a claim is not reproduced, or a diagnosis found something."""


def fail(error: GradlabError) -> None:
    """Print the error's sentence and end with its exit code."""
    click.echo(f"gradlab: {error}", err=True)
    sys.exit(error.exit_code)


def plain_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn what gradlab can explain into one sentence and an exit code; anything else is a bug and keeps its trace."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except GradlabError as error:
            fail(error)
        except KeyboardInterrupt:
            click.echo("gradlab: stopped.", err=True)
            sys.exit(130)
        except OSError as error:  # the machine's doing, no bug: a full disk, a pipe whose reader has gone
            if not isinstance(error, BrokenPipeError):
                place = f" ({error.filename})" if error.filename else ""
                click.echo(f"gradlab: The system says: {error.strerror or error}{place}.", err=True)
            _drop_output()
            sys.exit(1)

    return wrapped


def _drop_output() -> None:
    """Keep Python from trying again, at its end, to write what could not be written."""
    with suppress(OSError, ValueError):  # a stream that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
