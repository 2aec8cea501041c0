"""A user's own model, optimizer, data and loss, from a function in a Python file."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradlab.errors import GradlabError, UsageError
from gradlab.trial import train_watched

if TYPE_CHECKING:
    from gradlab.trace import Trace

__all__ = ["Setup", "load_setup", "rebuild_optimizer", "watch_setup"]

_PARTS = ("model", "optimizer", "data", "loss")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What a training step needs.

    Args:
        model: The model.
        optimizer: Its optimizer.
        make_optimizer: Makes one like it for other parameters.
        batches: (inputs, targets) pairs on the model's device, gone through in turn.
        loss: Takes (output, targets).
        where: The function it came from, for messages.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    batches: list[Any]
    loss: Callable[[Any, Any], torch.Tensor]
    where: str


def load_setup(what: str, *, seed: int = 0, device: str | None = None, batches: int = 20) -> Setup:
    """Call the function that `FILE.py:FUNCTION` names and check what it returns.

    Args:
        what: Path of a Python file, a colon, and the name of a function without arguments that returns
            (model, optimizer, data, loss), or a dict with these keys.
        seed: Set before the call.
        device: Where to train; None leaves the model where it is.
        batches: Batches to take from the data.

    Raises:
        UsageError: No such file or function, it fails, or it returns something else.
    """
    path, _, name = what.rpartition(":")
    if not path or not name:
        raise UsageError(f"'{what}' is neither a saved trace nor FILE.py:FUNCTION, such as train.py:make.")
    function = _function(Path(path), name)
    torch.manual_seed(seed)
    made = _call(function, what)
    parts = [made.get(part) for part in _PARTS] if isinstance(made, dict) else made
    if not isinstance(parts, tuple | list) or len(parts) != len(_PARTS):
        got = f"{len(parts)} things" if isinstance(parts, tuple | list) else type(made).__name__
        raise UsageError(f"{what} must return ({', '.join(_PARTS)}), or a dict with these keys; it returned {got}.")
    model, optimizer, data, loss = parts
    if not isinstance(model, nn.Module):
        raise UsageError(f"{what}: the model must be a torch.nn.Module; got {type(model).__name__}.")
    if not callable(loss):
        raise UsageError(f"{what}: the loss must be a function of (output, targets); got {type(loss).__name__}.")
    model, target = _placed(model, device)
    optimizer, make = _optimizer(model, optimizer, what)
    taken = [_to(batch, target) for batch in _batches(data, batches, what)]
    return Setup(model=model, optimizer=optimizer, make_optimizer=make, batches=taken, loss=loss, where=what)


def watch_setup(setup: Setup, *, steps: int) -> Trace:
    """Train under watch and return the trace.

    Raises:
        UsageError: The model or the loss fails on the data.
    """
    try:
        return train_watched(setup.model, setup.optimizer, setup.batches, setup.loss, steps=steps)
    except GradlabError:
        raise
    except Exception as error:
        raise UsageError(f"{setup.where}: training fails with {_told(error)}") from error


def _function(path: Path, name: str) -> Callable[[], Any]:
    if not path.is_file():
        raise UsageError(f"There is no file {path}: give FILE.py:FUNCTION, such as train.py:make.")
    module = _module(path)
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"Did you mean '{near[0]}'?" if near else f"It has {', '.join(names) or 'none'}."
        raise UsageError(f"{path} has no function '{name}'. {hint}")
    return function  # type: ignore[no-any-return]


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gradlab_user_{path.stem}", path.resolve())
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is no Python file: give FILE.py:FUNCTION, such as train.py:make.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for pickling, and for dataclasses in the file
    folder = str(path.resolve().parent)
    if folder not in sys.path:  # the file may import its neighbours, as it can when run as a script
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{path} cannot be imported: {_told(error)}") from error
    return module


def _call(function: Callable[[], Any], what: str) -> Any:
    try:
        return function()
    except Exception as error:
        raise UsageError(f"{what} fails with {_told(error)}") from error


def _told(error: Exception) -> str:
    """Return an error of the user's code in one sentence: its kind, first line, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and "gradlab" not in frame.filename]
    place = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}{place}."


def _placed(model: nn.Module, device: str | None) -> tuple[nn.Module, torch.device]:
    if device is not None:
        from gradlab.runtime import resolve_device

        model = model.to(resolve_device(device))
    first = next(model.parameters(), None)
    return model, first.device if first is not None else torch.device("cpu")


def _optimizer(model: nn.Module, given: Any, what: str) -> tuple[torch.optim.Optimizer, Callable[..., Any]]:
    if next(model.parameters(), None) is None:
        raise UsageError(f"{what}: the model has no parameters, so there is nothing to train.")
    if given is None:
        return torch.optim.SGD(model.parameters(), lr=0.01), lambda params: torch.optim.SGD(params, lr=0.01)
    if isinstance(given, torch.optim.Optimizer):
        return given, rebuild_optimizer(given)
    raise UsageError(f"{what}: the optimizer must be a torch.optim.Optimizer or None; got {type(given).__name__}.")


def rebuild_optimizer(optimizer: torch.optim.Optimizer) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    """Return a function that makes an optimizer of the same class and defaults for other parameters.

    Parameter groups with settings of their own are not carried over.
    """
    kind: Any = type(optimizer)
    known = inspect.signature(kind).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in known}
    return lambda params: kind(params, **options)


def _batches(data: Any, count: int, what: str) -> list[Any]:
    single = isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], torch.Tensor | dict | tuple)
    if single:
        return [data]
    try:
        batches = list(islice(iter(data), count))
    except TypeError:
        raise UsageError(
            f"{what}: data must be (inputs, targets) or an iterable of such pairs; got {type(data).__name__}."
        ) from None
    except Exception as error:
        raise UsageError(f"{what}: reading the data fails with {_told(error)}") from error
    if not batches:
        raise UsageError(f"{what}: the data hold no batch.")
    return batches


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_to(item, device) for item in value)
    return value
