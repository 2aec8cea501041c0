"""Hooks that a watched model can carry through pickle, copy and save."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch

__all__ = ["CallGate", "Hook", "HookSwitch", "LayerHook", "MethodHook", "OutputLayerHook", "recomputing", "tensors_in"]

_REMEMBERED_CALLS = 64  # of a layer in a step: bounds what a long evaluation between two steps leaves behind


def _inert(*_: object, **__: object) -> None:
    """Stand in for a probe's hook in a pickled or copied model: does nothing."""


def _make_inert() -> Callable[..., None]:
    return _inert


class Hook:
    """A callable that pickles and copies as one that does nothing.

    torch.save and copy.deepcopy walk a module's hooks; a probe's own hooks hold live state that has no meaning
    outside this process.
    """

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_inert, ()

    def __deepcopy__(self, _: object) -> Callable[..., None]:
        return _inert


class LayerHook(Hook):
    """A hook on a module's call. torch.compile would trace it into its graph, or break the graph there.

    Neither leaves the compiled run as it is without a watch, so inside torch.compile the hook does nothing.
    """

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if torch.compiler.is_compiling() else self._call(*args, **kwargs)


class OutputLayerHook(LayerHook):
    """A forward hook that takes no named arguments, without the price of packing them: the one of every layer."""

    __slots__ = ()

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        return None if torch.compiler.is_compiling() else self._call(module, args, output)


class HookSwitch:
    """Takes hooks off their modules while nothing is recorded, and puts them back where they were.

    A module without hooks takes torch's short way through its call. Where somebody else's hooks are on a module too,
    ours stay: their order could not be kept.

    Args:
        handles: Handles of module hooks, in order of registration.
    """

    def __init__(self, handles: Sequence[Any]) -> None:
        self._ours: dict[int, tuple[OrderedDict[int, Any], set[int]]] = {}
        for handle in handles:
            hooks = handle.hooks_dict_ref()
            self._ours.setdefault(id(hooks), (hooks, set()))[1].add(handle.id)
        self._off: list[tuple[OrderedDict[int, Any], list[tuple[int, Any]]]] = []

    def off(self) -> None:
        """Take the hooks off."""
        if not self._off:
            for hooks, ours in self._ours.values():
                if hooks and ours.issuperset(hooks):
                    self._off.append((hooks, list(hooks.items())))
                    hooks.clear()

    def on(self) -> None:
        """Put the hooks back, before those that came meanwhile."""
        off, self._off = self._off, []
        for hooks, items in off:
            later = list(hooks)
            hooks.update(items)
            for key in later:
                hooks.move_to_end(key)

    def forget(self) -> None:
        """Hold no hook any longer: those that are off stay so."""
        self._ours, self._off = {}, []


class MethodHook(Hook):
    """A hook that stands in for a method on one object; a pickled or copied object has its own method again."""

    __slots__ = ("_name", "_owner")

    def __init__(self, call: Callable[..., Any], owner: object, name: str) -> None:
        super().__init__(call)
        self._owner, self._name = owner, name

    def __reduce__(self) -> Any:
        return getattr, (self._owner, self._name)

    def __deepcopy__(self, memo: Any) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(copy.deepcopy(self._owner, memo), self._name)
        return method


class CallGate:
    """Decides which forward calls of a step are recorded, and says where in its order of execution each stands.

    Activation checkpointing runs a part of the forward pass twice. Its non-reentrant kind builds the graph in the
    first run, so that run is recorded and the repetition is not. Its reentrant kind makes the first run without
    autograd, so the repetition is recorded, in the place that the first run had. A repetition is matched with the
    layer's latest call that has not been repeated, as backward passes go.

    Args:
        without_grad: Record calls made without autograd too.
    """

    def __init__(self, *, without_grad: bool) -> None:
        self.recording = False
        self.calls_without_grad = 0
        self._without_grad = without_grad
        self._lock = threading.Lock()
        self._calls = 0
        self._first_runs: dict[str, deque[tuple[int, bool]]] = {}

    @property
    def calls(self) -> int:
        """Forward calls in the open step so far."""
        return self._calls

    @property
    def remembered(self) -> int:
        """Calls of the open step that are kept to match repetitions with."""
        return sum(map(len, self._first_runs.values()))

    def admit(self, layer: str) -> int | None:
        """Return the place of a call that begins now in the order of execution, or None if it is not recorded."""
        if not self.recording:
            return None
        with self._lock:
            runs = self._first_runs.get(layer)
            if runs is None:
                runs = self._first_runs[layer] = deque(maxlen=_REMEMBERED_CALLS)
            with_grad = torch.is_grad_enabled()
            if recomputing():
                return self._admit_again(runs, with_grad)
            place = self._calls
            self._calls = place + 1
            runs.append((place, with_grad))
            if with_grad or self._without_grad:
                return place
            self.calls_without_grad += 1
            return None

    def _admit_again(self, runs: deque[tuple[int, bool]], with_grad: bool) -> int | None:
        place, had_graph = runs.pop() if runs else (-1, True)
        if had_graph or not with_grad:
            return None
        self.calls_without_grad -= not self._without_grad
        return place

    def close_step(self) -> None:
        """Forget the calls of the step."""
        self._calls = 0
        self._first_runs.clear()


def recomputing() -> bool:
    """Return whether a forward pass runs inside a backward pass: activation checkpointing repeating itself.

    torch has no public way to ask; without the private one nothing is ever taken for a repetition.
    """
    current = getattr(torch._C, "_current_graph_task_id", None)
    return current is not None and current() != -1


def tensors_in(output: object, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in nested tuples, lists, mappings and dataclasses, with its dotted path.

    Example:
        >>> a, b = torch.zeros(1), torch.ones(1)
        >>> [(path, t.item()) for path, t in tensors_in((a, {"state": [b]}))]
        [('0', 0.0), ('1.state.0', 1.0)]
    """
    if isinstance(output, torch.Tensor):
        yield path, output
        return
    items: Iterator[tuple[Any, Any]]
    if isinstance(output, Mapping):
        items = iter(output.items())
    elif isinstance(output, tuple | list):
        items = iter(zip(getattr(output, "_fields", range(len(output))), output, strict=True))
    elif is_dataclass(output) and not isinstance(output, type):
        items = ((field.name, getattr(output, field.name)) for field in fields(output))
    else:
        return
    for key, value in items:
        yield from tensors_in(value, f"{path}.{key}" if path else str(key))
