"""The steps of a training run: any model on any batches, watched by probes, gone on with after a crash."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gradlab.checkpoint import Checkpoint, StateFile, Stateful, random_state, set_random_state
from gradlab.live import offered
from gradlab.probes import LayerSelection, Probe, Schedule, watch
from gradlab.trace import Trace

__all__ = ["StepsResult", "host_array", "run_steps", "until"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepsResult:
    """What `run_steps` ended with.

    Args:
        losses: As in `TrainResult`.
        diverged_at: As in `TrainResult`.
        trace: As in `TrainResult`.
        earlier_seconds: Wall time of the steps that a checkpoint spared.
        earlier_cpu_seconds: Process time of those.
    """

    losses: npt.NDArray[np.float64]
    diverged_at: int | None
    trace: Trace
    earlier_seconds: float = 0.0
    earlier_cpu_seconds: float = 0.0


def run_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    draw: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    criterion: Callable[..., torch.Tensor],
    *,
    steps: int,
    device: torch.device,
    rate: Callable[[int], float] | None = None,
    clip_norm: float = 0.0,
    precision: str = "float32",
    scaler: torch.amp.GradScaler | None = None,
    every: int | Schedule = 1,
    layers: LayerSelection = None,
    timesteps: bool | int = False,
    on_step: Callable[[int, float | None], None] | None = None,
    stop: Callable[[int], bool] | None = None,
    checkpoint: Checkpoint | None = None,
    stateful: Mapping[str, Stateful | torch.Generator] | None = None,
    about: Mapping[str, str] | None = None,
) -> StepsResult:
    """Run the training steps of any model on any batches: what `train` and `gradlab.measure.learning.learn` share.

    Args:
        model: On the device, in the mode to train in.
        optimizer: Of its parameters.
        draw: Gives the inputs and targets of a step, on the device.
        criterion: Gives the loss, a scalar, of what the model returns and the targets.
        steps: Updates at most.
        device: Where all of it lies.
        rate: Learning rate of a step. Default: as the optimizer has it.
        clip_norm: Largest norm of all gradients together; 0 does not clip.
        precision: "float32", or autocast to "bf16" or "fp16".
        scaler: Of "fp16"; its step is the optimizer's.
        every: Which steps the probes record; see `watch`.
        layers: Which layers; see `watch`.
        timesteps: Which time steps of recurrent modules; see `watch`.
        on_step: As in `train`.
        stop: Asked after each step with its number; True ends the training.
        checkpoint: Where the state is kept, and found again. Default: nowhere. On an accelerator each writing waits for
            the device; on meta nothing is written.
        stateful: What else changes while training and must go on as it was, by name: the generators that `draw` draws
            from, what `stop` and `on_step` gather.
        about: Facts that must be equal for a kept state to be used.

    Returns:
        Losses and trace; a loss that is not finite ends the training and is no exception.
    """
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    scaler = torch.amp.GradScaler(device.type, enabled=False) if scaler is None else scaler
    losses = torch.full((steps,), math.nan, device=device)
    on_host, done, ran, diverged_at, ended = device.type == "cpu", 0, 0, None, False
    scaled = scaler if scaler.is_enabled() else None
    probe = watch(model, optimizer, every=every, layers=layers, timesteps=timesteps, scaler=scaled)
    with probe, offered(probe.latest):
        kept = _Kept(model, optimizer, scaler, probe, losses, device, stateful or {})
        if checkpoint is not None and device.type != "meta":
            limits = {"steps": str(steps), "clip_norm": str(clip_norm), "precision": precision}
            ran, ended = kept.begin(checkpoint, limits | dict(about or {}))
        for step in range(ran, steps if not ended else 0):
            if rate is not None:
                for group in optimizer.param_groups:
                    group["lr"] = rate(step)
            recorded = probe.recording
            x, y = draw(step)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype=half) if half is not None else nullcontext():
                loss = criterion(model(x), y)
            scaler.scale(loss).backward()
            probe.log(loss=loss)
            if clip_norm > 0:
                scaler.unscale_(optimizer)
                total = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
                probe.log(clip=(total, clip_norm))
            losses[step] = loss.detach()
            scaler.step(optimizer)
            scaler.update()
            value, ran = None, step + 1
            if on_host or (recorded and device.type != "meta"):
                diverged_at = _first_nonfinite(losses, done, step)
                value, done = float(losses[step]), ran
            ended = diverged_at is not None or (stop is not None and stop(step))
            try:
                if on_step is not None:
                    on_step(step, value)
            except BaseException:
                kept.write(ran, ended=ended)  # between two steps: nothing done is lost
                raise
            if ended:
                break
            if kept.due:
                kept.write(ran, ended=False)
        if diverged_at is None and device.type != "meta":
            diverged_at = _first_nonfinite(losses, 0, ran - 1)
    whole = ran if diverged_at is None else diverged_at + 1
    return StepsResult(
        losses=host_array(losses)[:whole],
        diverged_at=diverged_at,
        trace=until(probe.trace, whole),
        earlier_seconds=kept.earlier_seconds,
        earlier_cpu_seconds=kept.earlier_cpu_seconds,
    )


class _Kept:
    """Everything that one training run changes, as one state to keep and to take back."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        probe: Probe,
        losses: torch.Tensor,
        device: torch.device,
        stateful: Mapping[str, Stateful | torch.Generator],
    ) -> None:
        self._model, self._optimizer, self._losses, self._device = model, optimizer, losses, device
        self._parts: dict[str, Any] = {"optimizer": optimizer, "scaler": scaler, "probe": probe}
        self._stateful = dict(stateful)
        self._file: StateFile | None = None
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self.earlier_seconds = self.earlier_cpu_seconds = 0.0

    def begin(self, checkpoint: Checkpoint, about: Mapping[str, str]) -> tuple[int, bool]:
        """Take back what the checkpoint kept; return how many steps it has done and whether they were the last."""
        facts = {"optimizer": repr(self._optimizer), "device": self._device.type, "initial weights": self._digest()}
        self._file = checkpoint.claim({**about, **facts})
        state = self._file.read()
        if state is None:
            return 0, False
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(state["tensors"][name])
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        for name, other in self._stateful.items():
            if isinstance(other, torch.Generator):
                other.set_state(state["stateful"][name])
            else:
                other.load_state_dict(state["stateful"][name])
        set_random_state(state["random"], self._device)
        self._losses[: state["ran"]] = state["losses"].to(self._device)
        self.earlier_seconds, self.earlier_cpu_seconds = state["seconds"]
        return state["ran"], state["ended"]

    @property
    def due(self) -> bool:
        return self._file is not None and self._file.due

    def write(self, ran: int, *, ended: bool) -> None:
        if self._file is None:
            return
        seconds = time.perf_counter() - self._wall, time.process_time() - self._cpu
        state: dict[str, Any] = {name: part.state_dict() for name, part in self._parts.items()}
        self._file.write({
            **state,
            "ran": ran,
            "ended": ended,
            "tensors": {name: tensor.detach() for name, tensor in self._tensors().items()},
            "stateful": {name: _state(other) for name, other in self._stateful.items()},
            "random": random_state(self._device),
            "losses": self._losses[:ran].clone(),  # else all of them would be written
            "seconds": (self.earlier_seconds + seconds[0], self.earlier_cpu_seconds + seconds[1]),
        })  # fmt: skip

    def _tensors(self) -> dict[str, torch.Tensor]:
        # Not the model's state_dict: that leaves out buffers that are not persistent.
        return {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}

    def _digest(self) -> str:
        """Return a hash of names, shapes, dtypes and values before the first step: another seed is another run."""
        digest = hashlib.sha256()
        for name, tensor in self._tensors().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _state(other: Stateful | torch.Generator) -> Any:
    return other.get_state() if isinstance(other, torch.Generator) else other.state_dict()


def _first_nonfinite(losses: torch.Tensor, start: int, stop: int) -> int | None:
    bad = (~torch.isfinite(losses[start : stop + 1])).cpu().nonzero()
    return start + int(bad[0]) if len(bad) else None


def host_array(losses: torch.Tensor) -> npt.NDArray[np.float64]:
    """Return losses on the host, NaN where they are on meta."""
    if losses.is_meta:
        return np.full(len(losses), np.nan)
    array: npt.NDArray[np.float64] = losses.cpu().double().numpy()  # MPS has no float64
    return array


def until(trace: Trace, stop: int) -> Trace:
    """Return the trace without the steps from `stop` on: after a loss that is not finite they hold nothing."""
    if not (trace.steps["step"] >= stop).any():
        return trace
    kept = {name: f[f["step"] < stop] if "step" in f else f for name, f in trace.tables.items() if len(f)}
    return Trace(kept, trace.info)
