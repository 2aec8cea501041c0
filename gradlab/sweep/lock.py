"""One driver a run: a file lock that the operating system lets go of when its process ends, however it ends."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

# At the top, before a run is announced: Ctrl-C while a module makes its dataclasses (an exec) sets a mark in Python
# 3.11 by which `python -m` ends as killed by the signal, whatever the exit code.
from filelock import FileLock, Timeout

from gradlab.errors import StoreError, UsageError

__all__ = ["hold_run"]

_OWNER = ".owner.json"


@contextmanager
def hold_run(folder: Path) -> Iterator[None]:
    """Keep every other driver off a run while the block runs.

    Args:
        folder: The run's folder.

    Raises:
        UsageError: Another process works on the run: says which, where, and since when.
        StoreError: The folder cannot be written.

    Note:
        On storage shared by machines the lock holds as far as its file system carries flock (NFS 4 does).
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UsageError(
            f"Another gradlab works on {folder} ({_owner(folder)}): wait for it, stop it, or start a new run."
        ) from error
    except OSError as error:
        raise StoreError(f"Cannot write {folder}: {error.strerror or error}. Choose another --out.") from error
    try:
        who = {"process": os.getpid(), "host": platform.node()}
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        with suppress(OSError):  # only for the sentence that another driver prints
            (folder / _OWNER).write_text(json.dumps({**who, "since": since}), encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            (folder / _OWNER).unlink()
        lock.release()


def _owner(folder: Path) -> str:
    try:
        told = json.loads((folder / _OWNER).read_text(encoding="utf-8"))
        return f"process {int(told['process'])} on {told['host']!s:.100} since {told['since']!s:.40}"
    except (OSError, ValueError, KeyError, TypeError):
        return "which left no name"
