"""adjoint(): the norm of the backward signal at cuts through depth or time, far beyond the range of the dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from torch import nn

from gradlab.errors import UsageError, unknown
from gradlab.probes.hooks import recomputing, tensors_in
from gradlab.probes.rescale import down_by, exponent_of, norm_log2, square_sum, to_host
from gradlab.probes.time_sweep import Recurrent, TimeSweep, stock_kind
from gradlab.probes.watch import _watched

__all__ = ["adjoint"]

Loss = Callable[..., torch.Tensor]
_LOG10_2 = math.log10(2)


def adjoint(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    cuts: str | Sequence[str] | None = None,
    every: int = 1,
    per_sample: bool = False,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure log10 of the L2 norm of the gradient at each cut through depth or time, without under- or overflow.

    The backward pass is linear: at a cut through which all gradient flows, the cotangent g is replaced by g / 2^e and
    e is kept, so norms of 1e-3000 come out of a float32 model over 10,000 time steps or 1,000 layers.

    Args:
        model: Any module. If it is or holds one nn.RNN, nn.LSTM or nn.GRU the cuts go through time (its states), else
            through depth. It is used in the mode, dtype and device it is in, and left as it was: no parameter gets a
            gradient, and buffers (BatchNorm's running statistics) and the RNG keep their values.
        batch: The model's input; a tuple is (input, target), the target going to the loss.
        loss: loss(output) or loss(output, target), a tensor of one entry. Default: the inner product of the output
            with fixed Gaussian noise, which adds no softmax or batch size; for a bare recurrent module, of its last
            step's output.
        cuts: Through depth, dotted paths of the modules whose outputs are the cuts, in any order. Default: every
            child, with nn.Sequential and nn.ModuleList taken apart. Through time, the path of the recurrent module, to
            choose from several.
        every: Through time, a cut at every k-th step and at the last. Default 1. In between, gradients have the range
            of the dtype only.
        per_sample: Through time, a norm for each sample in place of the whole batch's. Default False.
        seed: Of the noise.

    Returns:
        Through depth: order (execution, from 1; 0 is the model's input if it is floating), layer (dotted path, "input"
        for the input), call, kind, log10_grad_norm, that of dL/d(output) over the whole batch as in `trace.layers`.
        Through time: layer, level (in the stack, 0 nearest the input), t (steps done: 0 is the initial state), state
        and log10_grad_norm; per sample also sample. State "h" and "c" are total gradients: that of c_t includes the
        path by h_t = o tanh(c_t). State "cut" is the gradient of (h_t, c_t) as the state the next step starts from,
        each entry with the others held fixed. -inf is a gradient of exactly 0, NaN and inf come from such in the net;
        on the meta device all are NaN.

    Raises:
        UsageError: A name or value that is not allowed; several recurrent modules and none chosen; gradient that flows
            around a cut (a skip); a cut that is not one floating-point tensor or did not run; a recurrent module that
            is bidirectional, reads packed sequences, or runs other than once.

    Note:
        Through depth memory is that of a training step; through time that of a few copies of all states, with the
        graph from one cut to the next. Each stacked layer runs alone, equal to the fused module to rounding; dropout
        between layers is drawn anew. Gradients of the part after the recurrent module are ordinary ones.

    Example:
        >>> net = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(1000)))
        >>> for layer in net:
        ...     _ = nn.init.constant_(layer.weight, 0.01)
        >>> table = adjoint(net, torch.ones(1, 2), loss=torch.sum)
        >>> log10 = table["log10_grad_norm"]
        >>> round(float(log10[0] - log10[1000]), 2)  # 1000 log10(.02)
        -1698.97

    Source:
        Linearity of the adjoint; rescaled products of Jacobians as in Benettin et al. 1980, Meccanica 15, part 2.
    """
    _check(model, every, cuts)
    model = getattr(model, "_orig_mod", model)  # a compiled model runs as the module it was compiled from
    inputs, targets = (batch[0], tuple(batch[1:])) if isinstance(batch, tuple | list) else (batch, ())
    if not isinstance(inputs, torch.Tensor):
        raise UsageError(f"The input of adjoint is a {type(inputs).__name__}, but must be a tensor: pad packed ones.")
    chosen = _recurrent(model, cuts)
    if chosen is None and (every != 1 or per_sample):
        raise UsageError("Settings every and per_sample are for cuts through time, but these cuts go through depth.")
    with _untouched(model, inputs), torch.enable_grad():

        def scalar(output: Any) -> torch.Tensor:
            return _scalar(output, loss, targets if loss is not None else (), seed)

        if chosen is not None:
            return _through_time(model, *chosen, inputs, scalar, every, loss is None, per_sample)
        return _through_depth(model, inputs, scalar, None if cuts is None else list(cuts))


def _check(model: object, every: object, cuts: object) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(f"adjoint needs a torch.nn.Module; got {type(model).__name__}.")
    if any(module in _watched for module in model.modules()):
        raise UsageError("This model is being watched and would record this pass as training: close its probe first.")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise UsageError(f"The setting 'every' is {every!r}, but must be a whole number of at least 1.")
    if cuts is None or isinstance(cuts, str):
        return
    if not isinstance(cuts, list | tuple) or not all(isinstance(name, str) for name in cuts):
        raise UsageError(f"The setting 'cuts' is {cuts!r:.60}, but must be a list of module paths or one path.")
    if not cuts:
        raise UsageError("The list of cuts is empty, but at least one is needed: name one or leave cuts out.")


@contextmanager
def _untouched(model: nn.Module, inputs: torch.Tensor) -> Iterator[None]:
    """Put buffers and random states back at the end, so that a measurement leaves no trace in the model."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [inputs.device] if inputs.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in kept:
                    buffer.copy_(value)


def _scalar(output: Any, loss: Loss | None, targets: tuple[Any, ...], seed: int) -> torch.Tensor:
    if loss is None:
        if not isinstance(output, torch.Tensor):
            raise UsageError(f"The model returns a {type(output).__name__}, not a tensor: say how to read it by loss=.")
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        return (output * noise.to(output)).sum()
    value = loss(output, *targets)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise UsageError(f"The loss must be a tensor of one entry, but is of {got}: reduce it by sum or mean.")
    return value


# -- depth ------------------------------------------------------------------------------------------------------


def _through_depth(
    model: nn.Module, inputs: torch.Tensor, scalar: Callable[[Any], torch.Tensor], cuts: list[str] | None
) -> pd.DataFrame:
    names = [("input", 0, "")]
    ends: list[torch.Tensor] = []  # what runs into each cut, and last the loss
    starts: list[torch.Tensor] = []  # what leaves each cut, leaves of a graph of their own
    calls: dict[str, int] = {}

    def cut(name: str, module: nn.Module, output: Any) -> Any:
        if recomputing() or not torch.is_grad_enabled():
            return None
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            raise UsageError(
                f"The output of '{name}' is no floating-point tensor, so it cannot be a cut: leave it out."
            )
        names.append((name, calls.setdefault(name, 0), type(module).__name__))
        calls[name] += 1
        ends.append(output)
        starts.append(output.detach().requires_grad_(True))
        return starts[-1].clone()  # an in-place operation may follow, and a leaf allows none

    if inputs.is_floating_point():
        starts.append(inputs.detach().requires_grad_(True))
        inputs = starts[0].clone()
    else:
        names.clear()
    handles = []
    try:
        for name, module in _cut_modules(model, cuts):
            handles.append(module.register_forward_hook(lambda module, _, output, name=name: cut(name, module, output)))
        ends.append(scalar(model(inputs)))
    finally:
        for handle in handles:
            handle.remove()
    for name in cuts or ():
        if name not in calls:
            raise UsageError(
                f"The cut '{name}' did not run under autograd, so no gradient is known there: leave it out."
            )
    if not calls:
        raise UsageError("None of the model's children ran as a module of its own: name the cuts by cuts=.")
    first = len(starts) - len(ends) + 1  # 1 if the input is a leaf too
    _check_all_flow([n[0] for n in names], starts, ends, first)
    return _depth_table(names, starts, ends, first)


def _depth_table(
    names: list[tuple[str, int, str]], starts: list[torch.Tensor], ends: list[torch.Tensor], first: int
) -> pd.DataFrame:
    (cotangent,) = torch.autograd.grad(ends.pop(), starts[-1])
    total = torch.zeros((), dtype=torch.float64, device=cotangent.device if cotangent.device.type != "mps" else "cpu")
    rows: list[torch.Tensor] = []
    for place in reversed(range(len(starts))):
        exponent = exponent_of(cotangent.reshape(1, -1))
        cotangent = down_by(cotangent.reshape(1, -1), exponent).reshape(cotangent.shape)
        total = total + exponent.to(total)[0]
        rows.append(torch.stack([square_sum(cotangent.reshape(1, -1)).to(total)[0], total]))
        if place > 1 - first:
            starts.pop()
            (cotangent,) = torch.autograd.grad(ends.pop(), starts[-1], cotangent)
    squares, exponents = to_host(torch.stack(rows[::-1], 1))
    columns = list(zip(*names, strict=True))
    return pd.DataFrame({
        "order": range(1 - first, len(names) + 1 - first),
        "layer": list(columns[0]),
        "call": list(columns[1]),
        "kind": list(columns[2]),
        "log10_grad_norm": norm_log2(squares, exponents) * _LOG10_2,
    })  # fmt: skip


def _cut_modules(model: nn.Module, cuts: list[str] | None) -> list[tuple[str, nn.Module]]:
    if cuts is not None:
        modules = dict(model.named_modules())
        for name in cuts:
            if name not in modules:
                raise unknown("module", name, [path for path in modules if path], "model.named_modules() shows all.")
        return [(name, modules[name]) for name in dict.fromkeys(cuts)]

    def taken_apart(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            if isinstance(child, nn.Sequential | nn.ModuleList) and len(child):
                yield from taken_apart(f"{prefix}{name}.", child)
            else:
                yield f"{prefix}{name}", child

    return list(taken_apart("", model))


def _check_all_flow(names: list[str], starts: list[torch.Tensor], ends: list[torch.Tensor], first: int) -> None:
    """Raise unless each cut (and the loss) is reached from the cut before it and from none further back."""
    place = {id(leaf): position for position, leaf in enumerate(starts)}
    readers = [*names[first:], "the loss"]
    for index, (end, reader) in enumerate(zip(ends, readers, strict=True)):
        before = index - 1 + first
        read = {place[id(leaf)] for leaf in _leaves(end) if id(leaf) in place}
        around = sorted(read - {before})
        if around:
            raise UsageError(
                f"Gradient flows from '{reader}' to '{names[around[0]]}' around the cut '{names[before]}', so its norm "
                "cannot be rescaled there: name by cuts= modules that all signal passes through."
            )
        if before >= 0 and not read:
            raise UsageError(
                f"No gradient flows from '{reader}' to the cut '{names[before]}': leave one of the two out."
            )


def _leaves(end: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the leaves that a tensor was computed from, by walking its graph."""
    pending, seen = [end.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # of an AccumulateGrad node
        if isinstance(leaf, torch.Tensor):
            yield leaf
        pending += [following for following, _ in node.next_functions]


# -- time -------------------------------------------------------------------------------------------------------


def _recurrent(model: nn.Module, cuts: str | Sequence[str] | None) -> tuple[str, Recurrent] | None:
    """Return the recurrent module through which the cuts go and its path, or None for cuts through depth."""
    if cuts is not None and not isinstance(cuts, str):
        return None
    stock = {name: module for name, module in model.named_modules() if isinstance(module, nn.RNNBase)}
    if cuts is None and not stock:
        return None
    if cuts is None and len(stock) > 1:
        raise UsageError(f"The model has {len(stock)} recurrent modules: choose one by cuts=, of {', '.join(stock)}.")
    name = next(iter(stock)) if cuts is None else cuts
    if name not in stock:
        raise unknown("recurrent module", name, stock, "A list of paths cuts through depth.")
    module = stock[name]
    if stock_kind(module) is None:
        raise UsageError(
            f"'{name}' is a {type(module).__name__} with a forward pass of its own, so its steps are not known: use "
            "nn.RNN, nn.LSTM or nn.GRU."
        )
    if module.bidirectional:
        raise UsageError(f"'{name}' is bidirectional, so no cut in time carries all gradient: use one direction.")
    assert isinstance(module, nn.RNN | nn.LSTM | nn.GRU)
    return name, module


def _through_time(
    model: nn.Module,
    name: str,
    module: Recurrent,
    inputs: torch.Tensor,
    scalar: Callable[[Any], torch.Tensor],
    every: int,
    last_step: bool,
    per_sample: bool,
) -> pd.DataFrame:
    sweep, leaves = TimeSweep(module, every), list[torch.Tensor]()
    label = f"'{name}'" if name else "the model"

    def forward(x: Any, state: Any = None) -> Any:
        if leaves:
            raise UsageError(f"The recurrent module {label} runs more than once, so no cut carries all gradient.")
        if not isinstance(x, torch.Tensor) or x.ndim not in (2, 3):
            raise UsageError(
                f"The input of {label} is packed or of a wrong shape: give a padded tensor (T, N, features)."
            )
        batched = x.ndim == 3
        x = x.unsqueeze(1) if not batched else x.transpose(0, 1) if module.batch_first else x
        if x.shape[0] < 1:
            raise UsageError(f"The sequence that {label} reads has length 0, but needs at least one step.")
        h0, c0 = _initial(module, x, state, batched=batched)
        leaves.extend(tensor.requires_grad_(True) for tensor in sweep.forward(x.detach(), h0, c0))
        # Copies: an in-place operation may follow, and a leaf allows none.
        output, *last = [leaf.clone() if batched else leaf.squeeze(1).clone() for leaf in leaves]
        if batched and module.batch_first:
            output = output.transpose(0, 1)
        return output, (tuple(last) if c0 is not None else last[0])

    vars(module)["forward"] = forward
    try:
        output = model(inputs)
        if last_step and model is module:
            output = output[0].select(1 if module.batch_first and inputs.ndim == 3 else 0, -1)
        value = scalar(output)
    finally:
        del vars(module)["forward"]
    if not leaves:
        raise UsageError(f"The recurrent module {label} did not run: choose another by cuts=.")
    if not value.requires_grad or not any(leaf is mine for leaf in _leaves(value) for mine in leaves):
        raise UsageError(f"The loss does not depend on the output of {label}, so there is no gradient to follow.")
    grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    norms = sweep.backward(grads[0], grads[1], grads[2] if len(grads) > 2 else None)
    frames = []
    for found in norms:
        log10 = found.log2(per_sample=per_sample) * _LOG10_2
        table: dict[str, Any] = {"layer": name, "level": found.level, "state": found.state}
        if per_sample:
            samples = log10.shape[1]
            table |= {"t": [t for t in sweep.cuts for _ in range(samples)]}
            table |= {"sample": list(range(samples)) * len(sweep.cuts)}
        else:
            table |= {"t": sweep.cuts}
        frames.append(pd.DataFrame(table | {"log10_grad_norm": log10.reshape(-1)}))
    return pd.concat(frames, ignore_index=True)


def _initial(
    module: Recurrent, x: torch.Tensor, state: Any, *, batched: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return h and c before the first step, (layers, N, size), zero where the caller gave none."""
    is_lstm = isinstance(module, nn.LSTM)
    given = [tensor.detach() for _, tensor in tensors_in(state)]
    if not given:
        sizes = [module.proj_size or module.hidden_size, module.hidden_size]
        given = [x.new_zeros(module.num_layers, x.shape[1], size) for size in sizes]
    elif not batched:
        given = [tensor.unsqueeze(1) for tensor in given]
    return given[0], given[1] if is_lstm else None
