"""Which modules of a model are watched."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from gradlab.errors import UsageError, unknown

__all__ = ["LayerSelection", "select"]

#: "all", a glob or several over dotted paths, or a predicate on (path, module).
LayerSelection = str | Sequence[str] | Callable[[str, nn.Module], bool] | None


def select(model: nn.Module, layers: LayerSelection) -> list[tuple[str, nn.Module]]:
    """Return the chosen modules by dotted path, in registration order, a shared one once.

    Args:
        model: The model to choose from.
        layers: None for every module without children and every one that owns parameters, else a `LayerSelection`.

    Raises:
        UsageError: Nothing is chosen, a glob matches no path, `layers` is of another kind, or the model is scripted.
    """
    modules = list(model.named_modules())
    if any(isinstance(module, torch.jit.ScriptModule) for _, module in modules):
        raise UsageError("A scripted or traced module (torch.jit) takes no hooks: watch the model it was made from.")
    if layers is None:
        return [
            (name, module)
            for name, module in modules
            if next(module.children(), None) is None or next(module.parameters(recurse=False), None) is not None
        ]
    if callable(layers):
        chosen = [(name, module) for name, module in modules if layers(name, module)]
        if not chosen:
            raise UsageError(f"layers={layers!r} chose none of the model's {len(modules)} modules.")
        return chosen
    patterns = [layers] if isinstance(layers, str) else list(layers) if isinstance(layers, Iterable) else [layers]
    for pattern in patterns:
        if not isinstance(pattern, str):
            kind = type(pattern).__name__
            raise UsageError(f"layers takes 'all', globs over dotted paths or a predicate; got a {kind}.")
    if patterns == ["all"]:
        return modules
    if not patterns:
        raise UsageError("layers is empty and chooses nothing: leave it out for the default, or give globs.")
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in modules):
            raise unknown(
                "layer", pattern, [name for name, _ in modules if name], "Globs over dotted paths are allowed."
            )
    return [(name, module) for name, module in modules if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
