"""What the states of stock recurrent modules are at each time step, and the whole gradient that reaches them."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, cast, final

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from gradlab.errors import UsageError
from gradlab.probes.buffer import Rows, StepBuffer
from gradlab.probes.chunks import Cut, States, run_in_chunks
from gradlab.probes.gates import GateReader, has_gates
from gradlab.probes.hooks import CallGate, MethodHook, recomputing
from gradlab.probes.log import TableLog
from gradlab.probes.reduce import can_reduce, norm_of

__all__ = ["RecurrentProbe"]

_STOCK = (nn.RNN.forward, nn.LSTM.forward, nn.GRU.forward)


class _Entry:
    """One state at one time step: what it is, and where its rows lie."""

    __slots__ = ("facts", "grad_slot", "slot", "span")

    def __init__(self, facts: tuple[object, ...], slot: int) -> None:
        self.facts, self.slot = facts, slot  # level, direction, state, t
        self.grad_slot = -1
        self.span = 0


class _Slopes(dict[int, torch.Tensor]):
    """dh_t/dc_t of one call by the place of its entry: gone with the graph or the step, whichever ends first."""

    def keep(self, place: int, slope: torch.Tensor) -> None:
        self[place] = slope


class _Boundary(torch.autograd.Function):
    """Hand states through unchanged; on the way back show all of their gradients at once."""

    @staticmethod
    def forward(ctx: Any, read: Callable[..., None], *states: torch.Tensor) -> States:
        ctx.set_materialize_grads(False)
        ctx.read = read
        return states

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        with torch.no_grad():
            ctx.read(*grads)
        return None, *grads


@final
class RecurrentProbe:
    """Records h_t and c_t of stock nn.RNN, nn.LSTM and nn.GRU, and the total gradients dL/dh_t and dL/dc_t.

    While a recorded step is open, the modules run their own fused operators over chunks of the sequence (`chunks`).
    The gradient of h_t is then that of one tensor. c_t acts in two ways, through c_{t+1} and through
    h_t = o_t * tanh(c_t); the second lies inside the operator and is added here, with o_t computed again (`gates`).

    Args:
        model: The model, whose recurrent modules without a watch on time are listed.
        layers: Watched modules by dotted path; other kinds are passed over.
        buffer: Where rows go.
        timesteps: True for every time step, k for every k-th from 0 and the last, False for none.
        without_grad: Record forward calls made without autograd too.

    Raises:
        UsageError: `timesteps` is neither a bool nor a positive whole number, or there is nothing to follow.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[tuple[str, nn.Module]],
        buffer: StepBuffer,
        *,
        timesteps: bool | int,
        without_grad: bool,
    ) -> None:
        if not isinstance(timesteps, int) or (timesteps < 1 and timesteps is not False):
            raise UsageError(f"timesteps={timesteps!r} is none of False, True and a number k of steps, at least 1.")
        chosen = [(name, module) for name, module in layers if isinstance(module, nn.RNNBase)] if timesteps else []
        if timesteps and not chosen:
            raise UsageError(f"timesteps={timesteps!r}, but no nn.RNN, nn.LSTM or nn.GRU is watched: leave it out.")
        known = {id(module) for _, module in chosen}
        self.time_not_watched = [
            name for name, module in model.named_modules() if isinstance(module, nn.RNNBase) and id(module) not in known
        ]
        self.gate = CallGate(without_grad=without_grad)
        self.not_seen: dict[str, str] = {}
        parallel = any(isinstance(module, nn.DataParallel) for module in model.modules())
        self._layers: list[tuple[str, nn.RNNBase]] = []
        for name, module in chosen:
            reason = "DataParallel copies it to other devices" if parallel else _not_stock(module)
            if reason is None:
                self._layers.append((name, module))
            else:
                self._miss(name, reason)
        self._every, self._buffer = int(timesteps), buffer
        self._generation = 0
        self._entries: dict[int, tuple[str, list[_Entry]]] = {}  # by place in the order of execution
        self._gates: dict[int, list[tuple[tuple[object, ...], int]]] = {}  # likewise: facts and slots
        self._slopes: list[weakref.ref[_Slopes]] = []
        self._log = TableLog(
            ("layer", "call", "level", "direction", "state", "t"), ("norm", "grad_norm", "log10_grad_norm")
        )
        self._gate_log = TableLog(
            ("layer", "call", "level", "direction", "gate", "t"), ("mean", "closed_fraction", "open_fraction")
        )

    def _miss(self, layer: str, reason: str) -> None:
        self.not_seen.setdefault(layer, f"not followed through time: {reason}")

    def set_recording(self, recording: bool) -> None:
        """Open or end recording: only in between is the modules' forward ours."""
        if recording != self.gate.recording:
            for name, module in self._layers:
                if recording:
                    vars(module).pop("forward", None)  # a copy of a watched module may carry its own bound method
                    vars(module)["forward"] = MethodHook(self._forward(name, module), module, "forward")
                elif isinstance(vars(module).get("forward"), MethodHook):
                    del vars(module)["forward"]
        self.gate.recording = recording

    def let_go(self) -> None:
        """Keep no module: nothing is recorded any more."""
        self._layers = []

    def _forward(self, layer: str, module: nn.RNNBase) -> Callable[..., Any]:
        original = module.forward

        def forward(*args: Any, **named: Any) -> Any:
            if torch.compiler.is_compiling():
                self._miss(layer, "torch.compile traces it")
                return original(*args, **named)
            place = self.gate.admit(layer)
            # A repetition by checkpointing must save what the first run saved, so it takes the same way.
            if place is None and not (self.gate.recording and recomputing() and torch.is_grad_enabled()):
                return original(*args, **named)
            given = dict(zip(("input", "hx"), args, strict=False)) | named
            reason = _obstacle(module, given.get("input"), given.get("hx"))
            if reason is not None:
                result = original(*args, **named)  # raises where torch refuses the input
                self._miss(layer, reason)
                return result
            return self._run(module, given["input"], given.get("hx"), None if place is None else (layer, place))

        return forward

    def _run(self, module: nn.RNNBase, given: Any, hx: Any, call: tuple[str, int] | None) -> Any:
        """Do what the module's forward does, in chunks."""
        batch_sizes = order = back = None
        lone = False
        x: torch.Tensor = given
        if isinstance(given, PackedSequence):
            x, batch_sizes, order, back = given
            length, batch = len(batch_sizes), int(batch_sizes[0])
        else:
            lone = x.dim() == 2
            x = x.unsqueeze(1) if lone else x.transpose(0, 1) if module.batch_first else x
            length, batch = x.shape[:2]
        states = _initial(module, x, hx, batch, lone=lone)
        if order is not None:
            states = tuple(state.index_select(1, order) for state in states)
        times = sorted({*range(0, length, self._every), length - 1})
        observe, gates = (_unseen, None) if call is None else self._observer(module, *call)
        output: Any
        output, states = run_in_chunks(module, x, states, batch_sizes, times, observe)
        if call is not None and gates is not None:
            gates.flush()
            self._gates[call[1]] = gates.entries
        if back is not None:
            states = tuple(state.index_select(1, back) for state in states)
        if batch_sizes is not None:
            output = PackedSequence(output, batch_sizes, order, back)
        elif lone:
            output, states = output.squeeze(1), tuple(state.squeeze(1) for state in states)
        elif module.batch_first:
            output = output.transpose(0, 1)
        return output, states if isinstance(module, nn.LSTM) else states[0]

    def _observer(
        self, module: nn.RNNBase, layer: str, number: int
    ) -> tuple[Callable[[Cut, States], States], GateReader | None]:
        """Return what sees the states of one call, of the given number in the step's order, and what reads gates."""
        generation, projected = self._generation, bool(module.proj_size)
        entries: list[_Entry] = []
        self._entries[number] = (layer, entries)
        slopes = _Slopes()
        self._slopes.append(weakref.ref(slopes))
        gates = GateReader(module, self._buffer, slopes.keep) if has_gates(module) else None

        def observe(cut: Cut, states: States) -> States:
            place = len(entries)
            for name, state in zip("hc", states, strict=False):
                slot = self._buffer.reduce(state.detach(), norm_only=True)
                entries.append(_Entry((cut.level, cut.direction, name, cut.t), slot))
            follows = torch.is_grad_enabled() and any(state.requires_grad for state in states)
            if gates is not None:
                gates.add(place, cut, states[1] if follows and len(states) == 2 else None)
            if not follows:
                return states
            found = entries[place:]
            projection = cut.weights[-1].detach() if projected else None

            def read(of_h: torch.Tensor | None, of_c: torch.Tensor | None = None) -> None:
                # A graph may outlive its step; its late gradients belong to no open step.
                if not self.gate.recording or generation != self._generation:
                    return
                if found[0].grad_slot >= 0:
                    self._miss(layer, "several backward passes reached one state, of which the last is recorded")
                if of_h is not None and len(found) == 2:
                    through_h = (of_h if projection is None else of_h @ projection) * slopes[place]
                    of_c = through_h if of_c is None else through_h + of_c
                for entry, grad in zip(found, (of_h, of_c), strict=False):
                    if grad is None and of_c is not None:
                        grad = of_c.new_zeros(1)  # nothing depends on h where only the last c is used
                    if grad is not None:
                        entry.grad_slot, entry.span = self._buffer.reduce(grad, norm_only=True), self._buffer.span

            if len(states) == 1:  # a tensor hook costs a third of a node of the graph
                states[0].register_hook(read)
                return states
            return _Boundary.apply(read, *states)  # type: ignore[no-any-return, no-untyped-call]

        return observe, gates

    @property
    def has_gradients(self) -> bool:
        """Whether a backward pass reached any state of the open step."""
        return any(entry.grad_slot >= 0 for _, entries in self._entries.values() for entry in entries)

    def discard(self) -> None:
        """Forget the open step."""
        self._entries, self._gates = {}, {}
        for held in self._slopes:
            slopes = held()
            if slopes is not None:
                slopes.clear()
        self._slopes = []
        self.gate.close_step()
        self._generation += 1

    def close_step(self, step: int) -> Callable[[Rows, Sequence[float]], None]:
        """End the step; the function returned takes its rows, and the loss scale of each span, on the host."""
        if not self._every:
            return lambda _, _scales: None
        placed, gates = sorted(self._entries.items()), self._gates
        self.discard()
        calls: Counter[str] = Counter()
        keys: list[tuple[object, ...]] = []
        slots: list[tuple[int, int, int]] = []
        gate_keys: list[tuple[object, ...]] = []
        gate_slots: list[int] = []
        for number, (layer, entries) in placed:
            keys += [(layer, calls[layer], *entry.facts) for entry in entries]
            slots += [(entry.slot, entry.grad_slot, entry.span) for entry in entries]
            gate_keys += [(layer, calls[layer], *facts) for facts, _ in gates.get(number, [])]
            gate_slots += [slot for _, slot in gates.get(number, [])]
            calls[layer] += 1

        def deliver(rows: Rows, loss_scales: Sequence[float]) -> None:
            if not keys:
                return
            padded = np.vstack([rows, np.full((1, rows.shape[1]), np.nan)])  # slot -1: no gradient came
            of_state, of_grad, spans = np.array(slots).T
            loss_scale = np.array(loss_scales)[spans]
            grad = padded[of_grad]
            with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
                values = {
                    "norm": norm_of(padded[of_state]),
                    "grad_norm": norm_of(grad) / loss_scale,
                    # row: norm = scale * sqrt(squares)
                    "log10_grad_norm": np.log10(grad[:, 0]) + np.log10(grad[:, 2]) / 2 - np.log10(loss_scale),
                }
            self._log.append(step, keys, values)
            mean, closed, opened = rows[gate_slots, :3].T
            of_gates = {"mean": mean, "closed_fraction": closed, "open_fraction": opened}
            self._gate_log.append(step, gate_keys, of_gates)

        return deliver

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of the steps closed."""
        logs = {"log": self._log.state_dict(), "gates": self._gate_log.state_dict()}
        return {**logs, "not_seen": dict(self.not_seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self._log.load_state_dict(state["log"])
        self._gate_log.load_state_dict(state["gates"])
        self.not_seen = dict(state["not_seen"])

    def frame(self) -> Any:
        """Return `trace.timesteps` so far."""
        return self._log.frame()

    def gates_frame(self) -> Any:
        """Return `trace.gates` so far."""
        return self._gate_log.frame()


def _unseen(_: Cut, states: States) -> States:
    return states


def _initial(module: nn.RNNBase, x: torch.Tensor, hx: Any, batch: int, *, lone: bool) -> States:
    if hx is not None:
        states = tuple(hx) if isinstance(module, nn.LSTM) else (hx,)
        return tuple(state.unsqueeze(1) for state in states) if lone else states
    return tuple(
        torch.zeros(module.num_layers * (1 + module.bidirectional), batch, size, dtype=x.dtype, device=x.device)
        for size in _state_sizes(module)
    )


def _state_sizes(module: nn.RNNBase) -> tuple[int, ...]:
    of_h = module.proj_size or module.hidden_size
    return (of_h, module.hidden_size) if isinstance(module, nn.LSTM) else (of_h,)


def _not_stock(module: nn.RNNBase) -> str | None:
    """Return why the module's forward is not the one we know how to run in chunks."""
    if type(module).forward not in _STOCK:
        return f"{type(module).__name__} has a forward of its own"
    own = vars(module).get("forward")
    stock = own is None or (isinstance(own, MethodType) and own.__func__ in _STOCK and own.__self__ is module)
    return None if stock else "its forward was replaced by somebody else"


def _obstacle(module: nn.RNNBase, given: Any, hx: Any) -> str | None:
    """Return why this call cannot be followed exactly, or None."""
    x = given.data if isinstance(given, PackedSequence) else given
    if not isinstance(x, torch.Tensor) or not can_reduce(x) or not x.numel():
        return "its input holds no real dense numbers"
    if x.dim() not in ((2,) if isinstance(given, PackedSequence) else (2, 3)):
        return f"its input has {x.dim()} dimensions"
    if _transforming():
        return "it ran inside a torch.func transform"
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return "it ran under autocast, where states change their dtype between time steps"
    if module.dropout and module.training and module.num_layers > 1 and kind != "cpu":
        return f"dropout between its layers draws masks on {kind} that chunks cannot repeat"
    weight = cast(torch.Tensor, module.weight_ih_l0)
    if x.shape[-1] != module.input_size or x.dtype != weight.dtype or x.device != weight.device:
        return "its input does not fit its weights"
    if hx is None:
        return None
    states = hx if isinstance(module, nn.LSTM) else (hx,)
    sizes = _state_sizes(module)
    lone = x.dim() == 2 and not isinstance(given, PackedSequence)
    if lone:
        batch: tuple[int, ...] = ()
    elif isinstance(given, PackedSequence):
        batch = (int(given.batch_sizes[0]),)
    else:
        batch = (x.shape[0 if module.batch_first else 1],)
    shapes = [(module.num_layers * (1 + module.bidirectional), *batch, size) for size in sizes]
    fits = isinstance(states, tuple | list) and len(states) == len(sizes) and all(
        isinstance(state, torch.Tensor) and tuple(state.shape) == shape and state.dtype == x.dtype
        and state.device == x.device
        for state, shape in zip(states, shapes, strict=True)
    )  # fmt: skip
    return None if fits else "its initial states do not fit its input"


def _transforming() -> bool:
    """Return whether a torch.func transform is active; torch has no public way to ask."""
    peek = getattr(torch._C._functorch, "peek_interpreter_stack", None)
    return peek is not None and peek() is not None
