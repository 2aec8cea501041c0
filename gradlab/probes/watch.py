"""watch(): attach probes to a model, close steps, detach, and give the trace."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import pandas as pd
import torch
from torch import nn

from gradlab.errors import UsageError
from gradlab.live import LiveView
from gradlab.probes.admission import as_optimizers, check_model, check_owner, check_scaler
from gradlab.probes.batchnorm import BatchNormProbe
from gradlab.probes.buffer import Rows, StepBuffer
from gradlab.probes.hooks import HookSwitch, LayerHook
from gradlab.probes.latest import Latest, as_view
from gradlab.probes.layers import LayerProbe
from gradlab.probes.log import TableLog
from gradlab.probes.parameters import ParameterProbe, describe_parameters
from gradlab.probes.recurrent import RecurrentProbe
from gradlab.probes.schedule import Schedule, as_schedule
from gradlab.probes.selection import LayerSelection, select
from gradlab.probes.sharded import await_ranks
from gradlab.probes.units import UnitProbe
from gradlab.probes.unseen import BlindSpots, blind_spots
from gradlab.probes.updates import UpdateProbe
from gradlab.trace import Trace

__all__ = ["LayerSelection", "Probe", "watch"]

_STEP = ("loss", "seconds", "skipped", "loss_scale", "learning_rate", "clip_coefficient")
_ONE_ROW, _NO_ROWS, _NO_SLOTS = ((),), np.empty((0, 8)), np.empty((1, 0), dtype=np.int64)  # no key but its number
_watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def watch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    *,
    every: int | Schedule = 1,
    layers: LayerSelection = None,
    timesteps: bool | int = False,
    scaler: torch.amp.GradScaler | None = None,
    without_grad: bool = False,
    live: bool | LiveView = False,
) -> Probe:
    """Watch a model train: per-layer signal and gradient, parameters, BatchNorm. Training itself is bit-identical.

    Args:
        model: Any module. By default every module without children is watched, and every one that owns parameters.
        optimizer: Its step hooks close the steps. Of several (a list), a step closes when each has made an update; a
            parameter's gradient is read when its own optimizer is about to use it. Without one, call `probe.step()`
            after backward, before gradients are zeroed.
        every: Record every k-th step, or a schedule such as `log_spaced(steps, count)`; step 0 is the first.
        layers: "all" adds containers (a residual block's output); a glob or several ("stages.*.relu") or a predicate
            on (dotted path, module) choose from all modules.
        timesteps: Follow each watched nn.RNN, nn.LSTM and nn.GRU through time: True for every time step, k for 0, k,
            2k, ... and the last. In recorded steps they then run in chunks: weight gradients are equal to rounding.
        scaler: The GradScaler of AMP training: gradients are recorded unscaled, and skipped updates as such.
        without_grad: Record forward calls under no_grad too; by default an evaluation between steps is not recorded.
        live: Draw the gradient norm of each layer in the terminal meanwhile, from what is recorded anyway; a
            `gradlab.live.LiveView` knows more, such as the time to go. Without a terminal one sentence says so.

    Returns:
        A probe: a context manager whose `trace` has the tables. Use it with `with`, or call `close()`.

    Raises:
        UsageError: Not a module, already watched, not materialized (lazy), a selection that matches nothing, an
            optimizer of another model, a scaler without an optimizer, `timesteps` without a recurrent module, a sharded
            model that other ranks do not watch, FullyShardedDataParallel (use fully_shard).

    Note:
        `trace.layers.grad_norm` is the L2 norm over the whole batch of dL/d(output), so it scales with the loss's
        reduction. Recording reads every tensor once more; see benchmarks/ for what it costs.

        With gradient accumulation each micro-batch is a call of its own in `trace.layers`, while `trace.params` has the
        gradient accumulated over all of them, once. In a distributed run `trace.layers` shows this rank's batch and
        `trace.params` what the optimizer uses, the same on all ranks; of sharded parameters (fully_shard) it is the
        norm of the whole tensor, for which all ranks must watch, and record the same steps.

        A forward hook of yours that was registered before watch has changed the output when it is recorded. Inside
        torch.compile no layer is seen, only parameters are; under `torch.compiler.set_stance("force_eager")` all are.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with watch(model, optimizer) as probe:
        ...     loss = model(torch.randn(16, 4)).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        >>> probe.trace.layers[["step", "layer", "kind"]].values.tolist()
        [[0, '0', 'Linear'], [0, '1', 'ReLU'], [0, '2', 'Linear']]
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"watch needs a torch.nn.Module; got {type(model).__name__}.")
    if model in _watched:
        raise UsageError("This model is watched already: close the other probe first.")
    check_model(model)
    optimizers = as_optimizers(optimizer)
    check_scaler(scaler, optimizers)
    chosen = select(model, layers)
    schedule = as_schedule(every)
    probe = Probe(model, optimizers, chosen, schedule, scaler, timesteps=timesteps, without_grad=without_grad)
    try:
        await_ranks(model.parameters(), [every if isinstance(every, int) else "a schedule", len(optimizers)])
        probe._live = as_view(live)
    except BaseException:
        probe.close()
        raise
    return probe


@final
class Probe:
    """Watches one model; made by `watch`. Each step: forward, backward, then it is closed and its numbers are kept."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: tuple[torch.optim.Optimizer, ...],
        layers: list[tuple[str, nn.Module]],
        schedule: Schedule,
        scaler: torch.amp.GradScaler | None,
        *,
        timesteps: bool | int,
        without_grad: bool,
    ) -> None:
        params = list(model.named_parameters())
        check_owner(params, optimizers)
        self._model: Any = model  # until the probe is closed
        self._schedule, self._step = schedule, 0
        self._buffer = StepBuffer()
        self._units = UnitProbe(layers)
        self._layers = LayerProbe(layers, self._buffer, without_grad=without_grad, units=self._units)
        self._batchnorm = BatchNormProbe(layers, self._buffer, without_grad=without_grad)
        self._recurrent = RecurrentProbe(model, layers, self._buffer, timesteps=timesteps, without_grad=without_grad)
        self._params = ParameterProbe(model, self._buffer)
        self._updates = UpdateProbe(
            optimizers, scaler, self._params, self._buffer,
            forward_calls=lambda: self._layers.gate.calls, close=self._close_step,
        )  # fmt: skip
        self._parts: dict[str, Any] = {  # by the table each fills
            "layers": self._layers, "units": self._units, "params": self._params, "batchnorm": self._batchnorm,
            "timesteps": self._recurrent,
        }  # fmt: skip
        self._steps = TableLog((), _STEP, lambda _, facts: dict(zip(_STEP, facts.T, strict=True)))
        #: Returns the latest recorded step whose numbers have arrived as a `gradlab.live.Snapshot`, or None.
        self.latest = Latest(self._buffer, self._layers, self._units, self._steps)
        self._live: LiveView | None = None
        self._layer_names = [name for name, _ in layers]
        self._info: dict[str, Any] = {
            "model": type(model).__name__,
            "layers": [[name, type(module).__name__] for name, module in layers],
            **describe_parameters(params, optimizers),
        }
        self._handles: list[Any] = []
        self._switch = HookSwitch([])
        self._trace: Trace | None = None
        self._blind_spots: BlindSpots | None = None  # when the probe was closed
        self._open, self._recording, self._clock = True, False, time.perf_counter()
        self._attach()

    # -- life ---------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        _watched.add(self._model)
        try:
            # BatchNorm's pre-hooks must see the state before the call, and its hook the output before any other's.
            self._handles += self._layers.attach() + self._batchnorm.attach()
            if self._units:
                self._handles.append(self._model.register_forward_pre_hook(LayerHook(self._layers.begin_pass)))
            self._switch = HookSwitch(self._handles)
            self._updates.attach()
            self._set_recording(bool(self._schedule(self._step)))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove every hook; the trace stays readable. A step whose backward pass ran is kept though not closed."""
        if not self._open:
            return
        self._open = False
        try:
            if self._recording and any(p.has_gradients for p in (self._layers, self._batchnorm, self._recurrent)):
                self._info["last_step_closed"] = False
                self._params.discard()  # what was read of an update that failed; other ranks may not wait for us
                self._close_step()
            for part in (self._buffer, self._layers, self._batchnorm, self._recurrent, self._updates):
                part.discard()
        finally:  # whatever failed (a device that is gone, say), the model is let go
            self._set_recording(False)
            self._trace = None
            for handle in self._handles:
                handle.remove()
            self._switch.forget()
            # Neither model nor optimizer is kept: what a closed probe kept alive would be memory lost.
            self._handles, self._blind_spots = [], self._see_blind_spots()
            self._updates.let_go()
            self._recurrent.let_go()
            _watched.discard(self._model)
            self._model = None
            if self._live is not None:
                self._live.close(self.latest)

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what the user calls ------------------------------------------------------------------------------------

    @property
    def recording(self) -> bool:
        """Whether the open step is being recorded."""
        return self._recording

    @property
    def step_number(self) -> int:
        """Number of the open step, from 0."""
        return self._step

    def step(self) -> None:
        """Close the step: call after backward (and after optimizer.step), before gradients are zeroed.

        Raises:
            UsageError: The probe has an optimizer, whose own hooks close the steps; or it is closed.
        """
        if self._updates.optimizers:
            raise UsageError("This probe closes its steps by the optimizer's step hooks: do not call probe.step().")
        if not self._open:
            raise UsageError("This probe is closed: it records no further step.")
        if self._recording:
            self._updates.read_now()
        self._close_step()

    def skip(self) -> None:
        """Close an open step that is not recorded, though its optimizer has not stepped: it was made in another way."""
        if self._recording or not self._open:
            raise UsageError("Only an open step that is not recorded can be skipped.")
        self._close_step()

    def follow(self, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> None:
        """Close the steps by another optimizer, or others, from now on: the watched one was replaced.

        Args:
            optimizer: As for `watch`.

        Raises:
            UsageError: The probe was made without an optimizer or is closed, or the optimizer is of another model.
        """
        if not (self._open and self._updates.optimizers):
            raise UsageError("Only an open probe that was given an optimizer can follow another one.")
        optimizers = as_optimizers(optimizer)
        check_owner(list(self._model.named_parameters()), optimizers)
        self._updates.follow(optimizers)

    def tap(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Record a tensor that no module puts out (a functional activation), and return it unchanged.

        Args:
            tensor: Any floating-point tensor in the forward pass.
            name: Its name in `trace.layers`; not that of a watched module.

        Raises:
            UsageError: A watched module has this name, it is no text, or `tensor` is no tensor.
        """
        if not (isinstance(tensor, torch.Tensor) and isinstance(name, str)):
            raise UsageError(f"tap takes a tensor and its name, a text; got {type(tensor).__name__} and {name!r}.")
        if name in self._layer_names:
            raise UsageError(f"tap: '{name}' is the name of a watched module; choose another.")
        if not torch.compiler.is_compiling():
            self._layers.tap(tensor, name)
        return tensor

    def log(
        self, *, loss: torch.Tensor | float | None = None, clip: tuple[torch.Tensor | float, float] | None = None
    ) -> None:
        """Tell the open step what only the training loop knows; nothing is copied to the host before the step closes.

        Args:
            loss: The loss, one entry.
            clip: (total norm that `clip_grad_norm_` returned, its max_norm), told before the optimizer steps. Then
                `params.grad_norm_unclipped` and `steps.clip_coefficient` are known; without it a clipped gradient is
                recorded as the optimizer uses it. Of several optimizers it is for those that step before the next
                forward call.

        Raises:
            UsageError: A loss or norm that is not one number, or a `clip` that is no pair.
        """
        if clip is not None and not (isinstance(clip, tuple | list) and len(clip) == 2):
            raise UsageError(f"log: clip takes a pair (total norm, max_norm); got {type(clip).__name__}.")
        if not self._recording:
            return
        if loss is not None:
            self._updates.tell_loss(self._buffer.scalar(loss, "loss"))
        if clip is not None:
            self._updates.tell_clip(
                self._buffer.scalar(clip[0], "total norm"), self._buffer.scalar(clip[1], "max_norm")
            )

    @property
    def trace(self) -> Trace:
        """The trace of all steps closed so far."""
        self._buffer.wait()
        if self._trace is None:
            tables = {name: part.frame() for name, part in self._parts.items()}
            tables |= {"gates": self._recurrent.gates_frame(), "steps": self._steps_frame()}
            blind = self._blind_spots or self._see_blind_spots()
            not_seen = dict(blind.unseen)
            for part in (self._layers, self._batchnorm, self._recurrent, self._params):
                not_seen |= part.not_seen
            info = self._info | {
                "never_ran": list(blind.never_ran),
                "not_seen": not_seen,
                "notes": [*self._updates.notes, *blind.notes],
                "time_not_watched": self._recurrent.time_not_watched,
                "calls_without_grad": self._layers.gate.calls_without_grad,
                "steps_closed": self._step,
            }
            self._trace = Trace({name: frame for name, frame in tables.items() if len(frame)}, info)
        return self._trace

    def _see_blind_spots(self) -> BlindSpots:
        never_ran = [name for name in self._layer_names if name not in self._layers.ran] if self._step else []
        return blind_spots(self._model, never_ran, self._params.with_grad, self._params.names)

    def state_dict(self) -> dict[str, Any]:
        """Return what was recorded of the steps closed so far, as plain data and tensors: for a checkpoint."""
        self._buffer.wait()
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        notes, without = list(self._updates.notes), self._layers.gate.calls_without_grad
        return {**parts, "steps": self._steps.state_dict(), "notes": notes, "without_grad": without, "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what an open probe on an equal model had recorded; the open step is given up."""
        self._buffer.wait()  # into the tables that are given up
        for part in (self._buffer, self._layers, self._batchnorm, self._recurrent, self._updates):
            part.discard()
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self._steps.load_state_dict(state["steps"])
        self._updates.notes = dict.fromkeys(state["notes"])
        self._layers.gate.calls_without_grad = state["without_grad"]
        self._trace, self._step, self._clock = None, state["step"], time.perf_counter()
        self._begin_step()

    # -- steps --------------------------------------------------------------------------------------------------

    def _begin_step(self) -> None:
        if (recording := bool(self._schedule(self._step))) is not self._recording:
            self._set_recording(recording)

    def _set_recording(self, recording: bool) -> None:
        self._recording = self._updates.recording = recording
        self._layers.gate.recording = self._batchnorm.gate.recording = recording
        self._switch.on() if recording else self._switch.off()
        self._recurrent.set_recording(recording)

    def _close_step(self) -> None:
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        if self._recording:
            self._deliver_later(self._step, seconds)
        else:
            self._updates.skip()
        self._trace = None
        self._step += 1
        if self._open:
            self._begin_step()

    def _deliver_later(self, step: int, seconds: float) -> None:
        updates, layers = self._updates.close_step(step), self._layers.close_step(step)
        batchnorm, recurrent = self._batchnorm.close_step(step), self._recurrent.close_step(step)

        def deliver(rows: Rows) -> None:
            told = updates(rows)
            layers(rows, told.loss_scales)
            batchnorm(rows)
            recurrent(rows, told.loss_scales)
            last_scale = told.loss_scales[-2:][0]  # that of the last update; the one after it was not used yet
            row = (told.loss, seconds, told.skipped, last_scale, told.learning_rate, told.clip)
            self._steps.append_rows(step, _ONE_ROW, _NO_ROWS, _NO_SLOTS, row)

        self._buffer.flush(deliver)
        if self._live is not None:
            self._live.show(self.latest)

    def _steps_frame(self) -> pd.DataFrame:
        frame = self._steps.frame()
        if len(frame):
            frame = frame.astype({"skipped": bool})
            frame.insert(6, "grad_norm", [self._params.total(step) for step in frame["step"]])
        return frame
