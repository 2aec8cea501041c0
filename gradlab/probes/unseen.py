"""What a recording could not see, in words: layers without Python calls, parameters that came too late."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from torch import nn

__all__ = ["BlindSpots", "blind_spots"]

_COMPILED = (
    "it runs inside a graph of torch.compile, where hooks are not called: record it under "
    'torch.compiler.set_stance("force_eager")'
)
_NO_CALL = (
    "its parameters got gradients but no call of it was seen: its weights are used by another module or function, "
    'or it runs inside torch.compile (then record it under torch.compiler.set_stance("force_eager"))'
)


class BlindSpots(NamedTuple):
    """Watched layers without a recorded call, why layers were not seen, and notes on the model."""

    never_ran: Sequence[str]
    unseen: Mapping[str, str]
    notes: Sequence[str]


def blind_spots(
    model: nn.Module, never_ran: Sequence[str], with_grad: Collection[str], params: Collection[str]
) -> BlindSpots:
    """Return what a recording does not show of a model as it is now.

    Args:
        model: The watched model.
        never_ran: Watched layers without a recorded call.
        with_grad: Layers whose own parameters had gradients in a recorded step.
        params: Names of the parameters that are recorded.
    """
    return BlindSpots(never_ran, _unseen_layers(model, never_ran, with_grad), _notes_on(model, params))


def _unseen_layers(model: nn.Module, never_ran: Sequence[str], with_grad: Collection[str]) -> dict[str, str]:
    """Return why layers that took part in training had no call that a hook could see."""
    compiled = []
    for name, module in model.named_modules() if never_ran else ():
        inside = f"{name}." if name else ""
        owners = {owner for owner, part in model.named_modules() if f"{owner}.".startswith(inside) and part._parameters}
        # One that holds parameters without gradients did not run, compiled or not.
        if _is_compiled(module) and (not owners or not owners.isdisjoint(with_grad)):
            compiled.append(inside)
    reasons = {}
    for layer in never_ran:
        if any(f"{layer}.".startswith(inside) for inside in compiled):
            reasons[layer] = _COMPILED
        elif layer in with_grad:
            reasons[layer] = _NO_CALL
    return reasons


def _is_compiled(module: nn.Module) -> bool:
    """Return whether torch.compile runs the module, as a wrapper or in place."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    wrapper = dynamo is not None and isinstance(module, dynamo.OptimizedModule)
    return wrapper or getattr(module, "_compiled_call_impl", None) is not None


def _notes_on(model: nn.Module, known: Collection[str]) -> list[str]:
    """Return sentences about the model as it is now against what it was when the recording began."""
    late = [name for name, _ in model.named_parameters() if name not in set(known)]
    if not late:
        return []
    return [
        f"{len(late)} parameters were added to the model after watch was called and are not recorded, the first of "
        f"them '{late[0]}': watch the model when it is complete."
    ]
