"""The forward pass and loss of several nets as one program of plain operators on stacked tensors."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from types import MethodType
from typing import Any, final

import torch
from torch import fx, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from gradlab.errors import UsageError

__all__ = ["Tensors", "batched_program"]

Tensors = dict[str, torch.Tensor]
Program = Callable[[Tensors, Tensors, torch.Tensor, torch.Tensor], torch.Tensor]

# Operators whose binding in `torch` takes the very arguments of the operator: called so, each costs half as much.
_BOUND = frozenset({
    "_log_softmax", "add", "baddbmm", "bmm", "clone", "convolution", "div", "exp", "gather", "mean", "mul",
    "ne", "neg", "permute", "relu", "scalar_tensor", "select", "sigmoid", "squeeze", "sub", "sum", "tanh", "transpose",
    "unsqueeze", "where",
})  # fmt: skip
_RESHAPING = frozenset({"view", "_unsafe_view", "reshape", "expand"})


def batched_program(
    model: nn.Module,
    params: Tensors,
    buffers: Tensors,
    criterion: Callable[..., torch.Tensor],
    x: torch.Tensor,
    y: torch.Tensor,
) -> Program:
    """Return what computes the losses of all nets, (S,), from stacked parameters, buffers, inputs and targets.

    The pass is batched by `torch.vmap` and its operators are written down once, for tensors of these shapes: going
    through vmap's own dispatch at each step would cost as much as it saves.

    Args:
        model: One of the nets; only its code is used.
        params: Parameters by name, each (S, ...).
        buffers: Buffers by name, each (S, ...); the program changes those that the nets change.
        criterion: Gives the loss of what a net returns and the targets.
        x: Inputs, (S, batch, ...).
        y: Targets, (S, batch, ...).

    Raises:
        UsageError: The nets draw random numbers, decide by values, or have an operator without a batched form.
    """
    shell = copy.deepcopy(model).to("meta")
    for module in shell.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_linear_forward, module)  # type: ignore[method-assign]

    def of_one(params: Tensors, buffers: Tensors, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return criterion(torch.func.functional_call(shell, (params, buffers), (x,)), y)

    held = {name: param.detach() for name, param in params.items()}
    changed = {name: buffer.clone() for name, buffer in buffers.items()}
    tape = _Tape([*held.values(), *changed.values(), x, y])
    try:
        with tape:
            losses = torch.vmap(of_one)(held, changed, x, y)
        run = tape.program(losses)
    except Exception as error:  # vmap raises what it likes
        reason = " ".join(str(error).split())[:160]
        raise UsageError(f"These nets cannot be trained at once ({reason}): train them one by one.") from error

    def program(params: Tensors, buffers: Tensors, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return run(*params.values(), *buffers.values(), x, y)  # type: ignore[no-any-return]

    return program


@final
class _Tape(TorchDispatchMode):
    """Writes down the operators that run below vmap. `make_fx` does too, at ten times the cost: it keeps metadata."""

    def __init__(self, inputs: list[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph, self._root = fx.Graph(), nn.Module()
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[torch.Tensor] = []  # an id means one tensor only as long as that lives
        for place, tensor in enumerate(inputs):
            self._keep(tensor, self._graph.placeholder(f"input_{place}"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and id(out) in self._nodes:  # in place
            self._call(func, args, kwargs)
        elif _changes_nothing(func, args, out):
            self._keep(out, self._node(args[0]))
        else:
            self._keep_all(out, self._call(func, args, kwargs))
        return out

    def program(self, out: torch.Tensor) -> Callable[..., Any]:
        """Return all that was written down as one function of the inputs."""
        self._graph.output(self._node(out))
        return fx.GraphModule(self._root, self._graph).forward

    def _call(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        name = func._schema.name.removeprefix("aten::")
        target = getattr(torch, name) if name in _BOUND else func
        named = tree_map_only(torch.Tensor, self._node, (args, kwargs))
        return self._graph.call_function(target, *named)

    def _node(self, tensor: torch.Tensor) -> fx.Node:
        if id(tensor) not in self._nodes:  # made before, and not an input: the same at every step
            name = f"constant_{len(self._alive)}"
            self._root.register_buffer(name, tensor)
            self._keep(tensor, self._graph.get_attr(name))
        return self._nodes[id(tensor)]

    def _keep(self, tensor: torch.Tensor, node: fx.Node) -> None:
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)

    def _keep_all(self, out: Any, node: fx.Node) -> None:
        if isinstance(out, torch.Tensor):
            self._keep(out, node)
        elif isinstance(out, (tuple, list)):
            for place, part in enumerate(out):
                if isinstance(part, torch.Tensor):
                    self._keep(part, self._graph.call_function(operator.getitem, (node, place)))


def _changes_nothing(func: Any, args: Any, out: Any) -> bool:
    name = func._schema.name.removeprefix("aten::")
    if name == "permute":
        return list(args[1]) == list(range(args[0].dim()))
    return name in _RESHAPING and args[0].shape == out.shape


class _Linear(torch.autograd.Function):
    """nn.functional.linear, batched over weights as one baddbmm; torch's own rule adds copies."""

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing: what `vmap` does is differentiated by torch."""

    @staticmethod
    def vmap(
        info: Any, dims: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, int]:
        x, weight, bias = (
            value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
            for value, dim in zip((x, weight, bias), dims, strict=True)
        )
        # Weight times columns: the weight's gradient comes out in the weight's own layout and is not copied.
        flat = x.flatten(1, -2) if x.dim() > 3 else x
        out = torch.baddbmm(bias.unsqueeze(2), weight, flat.transpose(1, 2)).transpose(1, 2)
        return (out.unflatten(1, x.shape[1:-1]) if x.dim() > 3 else out), 0


def _linear_forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    if x.dim() < 2 or self.bias is None:
        return linear(x, self.weight, self.bias)
    return _Linear.apply(x, self.weight, self.bias)  # type: ignore[no-any-return, no-untyped-call]
