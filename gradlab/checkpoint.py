"""Where a training run keeps its state from time to time, so that after a crash it goes on bit for bit."""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

import numpy as np
import torch

from gradlab.errors import StoreError, UsageError
from gradlab.storage import replace_file

__all__ = ["Checkpoint", "StateFile", "Stateful", "random_state", "set_random_state"]

_MAGIC = b"gradlab checkpoint 1 "


@runtime_checkable
class Stateful(Protocol):
    """What can hand out its state as plain data and tensors, and take it back: torch's own convention."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take a state."""


@final
class Checkpoint:
    """A folder in which training keeps its state, to go on from there when it is run again.

    Give the same folder to the same program: what it trained before a crash is not trained again, and it ends with
    the same bits. The state is weights, buffers, the optimizer, the gradient scaler, the state of all random numbers,
    the losses and what the probes recorded. It is written at most every so many seconds, and when training is broken
    off between two steps. Files hold plain data and tensors, are read by `torch.load(weights_only=True)`, and carry a
    SHA-256: a damaged one, or one of another run, is not used and training begins anew.

    Args:
        folder: Made when it is first written.
        every: Seconds between two states; 0 after each step.
        identity: What must be equal for a state to be used, beside what `run_steps` knows (torch's version, device,
            optimizer, initial weights, ...): a version of your data, say.

    Raises:
        UsageError: `every` is negative or no number.

    Note:
        A program that trains several nets one after the other can use one checkpoint for all: they are told apart by
        their order, which therefore must not change.

    Example:
        >>> import tempfile
        >>> from gradlab import train, TrainSettings
        >>> from gradlab.tasks import load_digits
        >>> def go(folder, stop_at=None):
        ...     def on_step(step, loss):
        ...         if step == stop_at:
        ...             raise KeyboardInterrupt
        ...     torch.manual_seed(0)
        ...     model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        ...     kept = Checkpoint(folder)
        ...     how = TrainSettings(steps=6, batch_size=32)
        ...     result = train(model, load_digits(), how, device="cpu", checkpoint=kept, on_step=on_step)
        ...     return result.losses, kept.notes
        >>> with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        ...     whole, _ = go(one)
        ...     try:
        ...         go(other, stop_at=3)
        ...     except KeyboardInterrupt:
        ...         again, notes = go(other)
        >>> bool((whole == again).all()), notes
        (True, ['Went on from step 4.'])
    """

    def __init__(self, folder: str | os.PathLike[str], *, every: float = 60.0, identity: str = "") -> None:
        if not every >= 0:
            raise UsageError(f"every={every!r} must be a number of seconds, at least 0.")
        self.folder, self.every, self.identity = Path(folder), every, identity
        #: Sentences on what became of it: where training went on, or why it began anew.
        self.notes: list[str] = []
        self._claimed = 0

    def claim(self, about: Mapping[str, str]) -> StateFile:
        """Return the place of the next training run; called by `run_steps`.

        Args:
            about: Facts that must be equal for a kept state to be used, by name.
        """
        path = self.folder / f"{self._claimed}.pt"
        self._claimed += 1
        facts = {**about, "identity": self.identity, "torch": str(torch.__version__)}
        return StateFile(path, facts, self.every, self.notes)

    def clear(self) -> None:
        """Remove what was kept; called when the results are safe elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)


class _UnfitError(Exception):
    """Why a state cannot be gone on from."""


@final
class StateFile:
    """The state of one training run on disk; made by `Checkpoint.claim`."""

    def __init__(self, path: Path, about: Mapping[str, str], every: float, notes: list[str]) -> None:
        self._path, self._about, self._every, self._notes = path, dict(about), every, notes
        self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time to write again."""
        return time.monotonic() - self._last >= self._every

    def read(self) -> dict[str, Any] | None:
        """Return the state kept, on the host, or None where there is none that fits: `Checkpoint.notes` says why."""
        try:
            state = self._read()
        except FileNotFoundError:
            return None
        except (OSError, _UnfitError) as error:
            reason = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
            self._notes.append(f"The checkpoint {self._path} {reason}: training began anew.")
            return None
        self._notes.append(f"Went on from step {state['ran']:,}.")
        return state

    def _read(self) -> dict[str, Any]:
        head, _, body = self._path.read_bytes().partition(b"\n")
        if head != _MAGIC + hashlib.sha256(body).hexdigest().encode():
            raise _UnfitError("is damaged")
        try:
            # On the host: the states of random numbers belong there, and tensors are copied to where they go.
            kept = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
            about, state = dict(kept["about"]), dict(kept["state"])
        except Exception as error:  # torch raises what it likes; whole as the bytes are, they are none of ours
            raise _UnfitError("was not written by gradlab") from error
        for name in sorted({*about, *self._about}):
            if about.get(name) != self._about.get(name):
                raise _UnfitError(f"is of another run ({name} is not the same)")
        return state

    def write(self, state: Mapping[str, Any]) -> None:
        """Keep a state; the one before stays until this is whole. A disk that is full ends no training."""
        buffer = io.BytesIO()
        torch.save({"about": self._about, "state": dict(state)}, buffer)
        body = buffer.getvalue()
        try:
            replace_file(self._path, _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        except StoreError as error:
            if (sentence := f"No checkpoint was written: {error}") not in self._notes:
                self._notes.append(sentence)
        self._last = time.monotonic()


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of the generators that a program uses without naming one: torch's, numpy's and Python's."""
    kind, numbers, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state()  # noqa: NPY002  # the one that others draw from
    state: dict[str, Any] = {
        "python": [kind, list(numbers), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(place), int(has_gauss), cached],
        "torch": torch.get_rng_state(),
    }
    if device.type not in ("cpu", "meta"):
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Take what `random_state` returned."""
    kind, numbers, gauss = state["python"]
    random.setstate((kind, tuple(numbers), gauss))
    name, keys, place, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), place, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)
