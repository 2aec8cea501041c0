"""What optimizers and the gradient scaler tell of a step: its end, skipped updates, the scale of its gradients."""

from __future__ import annotations

import math
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from gradlab.probes.admission import held
from gradlab.probes.arithmetic import Foreteller, SgdGroup
from gradlab.probes.buffer import Rows, StepBuffer
from gradlab.probes.hooks import Hook, MethodHook
from gradlab.probes.parameters import ParameterProbe, ReadScale, clip_coefficient

__all__ = ["StepNumbers", "UpdateProbe"]

#: Updates of one optimizer in an open step after which another that made none is waited for no longer.
PATIENCE = 128
_STEP_CODE = getattr(torch.amp.GradScaler, "_maybe_opt_step", torch.amp.GradScaler.step).__code__
_LOOKS = (
    16  # recorded steps in which an unknown scaler is looked for: frames are dear, and one that comes is there early
)
_FRAMES = 12  # between an optimizer's hook and the scaler that called it, with room for wrappers


class StepNumbers(NamedTuple):
    """A step's numbers on the host; `loss_scales` has one for each span between updates, and one after them."""

    loss: float
    loss_scales: list[float]
    skipped: float
    learning_rate: float
    clip: float


@final
class UpdateProbe:
    """Reads parameters around each optimizer's step, and closes the step when all optimizers have made one.

    Where an optimizer makes several updates before the last one makes its first (a critic's five against its
    generator's one), its parameters' rows are those of its latest update. One that makes none during `PATIENCE`
    updates of another is not waited for until it does.

    Args:
        optimizers: Whose steps close a step; none where the user closes them.
        scaler: The gradient scaler, if there is one.
        params: What reads the parameters.
        buffer: Where rows go.
        forward_calls: Gives the number of forward calls in the open step.
        close: Closes the step.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler | None,
        params: ParameterProbe,
        buffer: StepBuffer,
        *,
        forward_calls: Callable[[], int],
        close: Callable[[], None],
    ) -> None:
        self.recording = False
        self.notes: dict[str, None] = {}  # sentences about what these numbers cannot show, each once
        self._optimizers, self._scaler = tuple(optimizers), scaler
        self._params, self._buffer = params, buffer
        self._forward_calls, self._close = forward_calls, close
        self._handles: list[Any] = []
        self._idle: set[int] = set()  # ids of optimizers that are not waited for
        # Other optimizers that were looked at, each with the sizes of its groups then.
        self._strangers: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[int]] = weakref.WeakKeyDictionary()
        self._updates: Counter[int] = Counter()
        self._foretellers: dict[int, Foreteller] = {}  # by id of the optimizer
        self._in_scaler = self._stepped = False
        self._looks = _LOOKS
        self.discard()

    def skip(self) -> None:
        """End a step that is not recorded."""
        self._updates.clear()
        self._stepping = False

    def discard(self) -> None:
        """Forget the open step."""
        self._loss: int | float = math.nan
        self._clip: tuple[int | float, int | float] = (math.nan, math.nan)
        self._last_clip, self._clip_calls = self._clip, -1
        self._loss_scales: list[int | float] = []
        self._found: list[int | float] = []
        self._updates.clear()
        self._stepping = False  # whether a step of one of our optimizers runs now
        self._params.discard()

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizers that are followed."""
        return self._optimizers

    # -- life ---------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Hook the optimizers and the scaler."""
        for optimizer in self._optimizers:
            before = optimizer.register_step_pre_hook(Hook(_uncompiled(self._before_step)))
            after = optimizer.register_step_post_hook(Hook(_uncompiled(self._after_step)))
            self._handles += [before, after]
            self._foretellers[id(optimizer)] = Foreteller(optimizer, before.id, after.id)
        if self._optimizers:
            # The process keeps this hook: it must not keep the probe, and the model, alive.
            of_others = weakref.WeakMethod(self._after_others_step)
            handle = register_optimizer_step_post_hook(lambda *args: (call := of_others()) and call(*args))
            self._handles.append(handle)
            weakref.finalize(self, handle.remove)
        if self._scaler is not None:
            _listen(self._scaler, self)

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._foretellers = [], {}
        if self._scaler is not None:
            _leave(self._scaler, self)

    def let_go(self) -> None:
        """Remove every hook and keep no optimizer."""
        self.detach()
        self._optimizers, self._scaler = (), None
        self._params.let_go()

    def follow(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Follow other optimizers from now on, which take the place of those before."""
        self.detach()
        self._optimizers = tuple(optimizers)
        self._idle.clear()
        self._updates.clear()
        self._strangers.clear()
        self.attach()

    # -- what is told -------------------------------------------------------------------------------------------

    def tell_loss(self, loss: int | float) -> None:
        """Take the step's loss: a number, or the slot that holds it."""
        self._loss = loss

    def tell_clip(self, norm: int | float, most: int | float) -> None:
        """Take what clipping was told, for the updates that follow without a forward call in between."""
        self._clip = self._last_clip = (norm, most)
        self._clip_calls = self._forward_calls()

    # -- around a step of an optimizer --------------------------------------------------------------------------

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        self._stepping = True
        if not self.recording:
            return None
        self._looks -= self._looks > 0
        if self._looks and self._scaler is None and _called_by_scaler(optimizer):
            self._note(
                "A GradScaler that watch was not given steps the optimizer: gradients of layers carry its loss scale "
                "and skipped updates are not seen; give it as watch(..., scaler=scaler)."
            )
        if self._scales_losses and not self._in_scaler:
            self._end_span(1.0)
        # With a closure the gradients come only when the optimizer calls it; its first result is what it uses.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if callable(closure):
            wrapped = self._read_after(closure, optimizer)
            if "closure" in kwargs:
                return args, {**kwargs, "closure": wrapped}
            return (args[0], wrapped, *args[2:]), kwargs
        foretold = self._foretellers[id(optimizer)].groups() if self._buffer.foretells else None
        self._read(optimizer, updated=True, groups=foretold)
        return None

    def _read_after(self, closure: Callable[[], Any], optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        first = True

        def wrapped() -> Any:
            nonlocal first
            result = closure()
            if first:
                first = False
                self._read(optimizer, updated=True)
            return result

        return wrapped

    def _read(
        self, optimizer: torch.optim.Optimizer, *, updated: bool, groups: Sequence[SgdGroup] | None = None
    ) -> None:
        # A fused optimizer unscales inside its kernel: until then its gradients carry the loss scale.
        inside, found = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        scale = 1.0 if inside is None else self._buffer.values([inside])
        if found is not None:
            self._found.append(self._buffer.values([found]))
        clip = self._clip if self._clip_calls == self._forward_calls() else (math.nan, math.nan)
        others: set[int] = set()
        if len(self._optimizers) > 1:
            others = {param for one in self._optimizers if one is not optimizer for param in held(one)}
            others -= held(optimizer)
        keep = partial(held, optimizer) if updated else ()
        self._params.before_update(ReadScale(scale, *clip), but=others, keep=keep, groups=groups)

    def read_now(self) -> None:
        """Read all parameters where no optimizer is known."""
        self._params.before_update(ReadScale(1.0, *self._clip))

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._stepping, self._stepped = False, True
        if self.recording:
            self._params.after_update()
        self._count(optimizer)

    def _count(self, optimizer: torch.optim.Optimizer) -> None:
        """Count an update, made or skipped, and close the step if it was the last one waited for."""
        if len(self._optimizers) == 1:
            self._close()
            return
        self._updates[id(optimizer)] += 1
        self._idle.discard(id(optimizer))
        updates = self._updates[id(optimizer)]
        if updates == 2 and self.recording:
            self._note(
                f"{self._name(optimizer)} made several updates in one step, before all optimizers had made one: "
                "trace.params shows the last of them.", warn=False,
            )  # fmt: skip
        missing = [one for one in self._optimizers if not self._updates[id(one)]]
        if updates >= PATIENCE:
            for one in missing:
                self._idle.add(id(one))
                self._note(f"{self._name(one)} made no update in {PATIENCE} of another: steps do not wait for it.")
        if all(id(one) in self._idle for one in missing):
            self._close()

    def _name(self, optimizer: torch.optim.Optimizer) -> str:
        place = next(place for place, one in enumerate(self._optimizers) if one is optimizer)
        return f"Optimizer {place} ({type(optimizer).__name__})"

    def _after_others_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._stepping or any(optimizer is one for one in self._optimizers):
            return  # one that steps inside ours is a part of it
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        if self._strangers.get(optimizer) == sizes:
            return
        self._strangers[optimizer] = sizes
        theirs = held(optimizer)
        if any(not theirs.isdisjoint(held(one)) for one in self._optimizers):
            self._note(
                f"Another {type(optimizer).__name__} than the watched optimizer updates its parameters, and closes no "
                "step: if it took the other's place, say so with probe.follow(optimizer)."
            )

    def _note(self, sentence: str, *, warn: bool = True) -> None:
        if sentence not in self.notes:
            self.notes[sentence] = None
            if warn:
                warnings.warn(sentence, UserWarning, stacklevel=3)

    # -- around a step of the scaler ----------------------------------------------------------------------------

    def scaler_steps(self, optimizer: torch.optim.Optimizer, step: Callable[[], Any]) -> Any:
        """Make a step of the scaler; an update that it skips calls no hook of the optimizer."""
        if not self._scales_losses or not any(optimizer is one for one in self._optimizers):
            return step()
        if self.recording:
            self._end_span(self._scale())
        self._in_scaler, self._stepped = True, False
        try:
            result = step()
        finally:
            self._in_scaler = False
        if not self._stepped:
            if self.recording:
                self._found.append(1.0)
                self._read(optimizer, updated=False)
            self._count(optimizer)
        return result

    @property
    def _scales_losses(self) -> bool:
        return self._scaler is not None and self._scaler.is_enabled()

    def _scale(self) -> int | float:
        """Return the slot of the scaler's scale; 1 where it has none yet."""
        scale = getattr(self._scaler, "_scale", None)  # private, but the public way waits for the device
        return self._buffer.values([scale]) if isinstance(scale, torch.Tensor) else 1.0

    def _end_span(self, scale: int | float) -> None:
        """Keep the scale of the gradients that came since the update before; scaler.update() may change it now."""
        self._loss_scales.append(scale)
        self._buffer.end_span()

    # -- steps --------------------------------------------------------------------------------------------------

    def close_step(self, step: int) -> Callable[[Rows], StepNumbers]:
        """End the step; the function returned takes its rows and gives its numbers."""
        # Gradients after the last update, of a step that ended without its own, are scaled all the same.
        scales = [*self._loss_scales, self._scale() if self._scales_losses else 1.0]
        groups = self._optimizers[0].param_groups if self._optimizers else []
        lr = groups[0].get("lr", math.nan) if groups else math.nan
        rate = self._buffer.values([lr]) if isinstance(lr, torch.Tensor) else float(lr)
        loss, clip, found = self._loss, self._last_clip, self._found
        params = self._params.close_step(step)
        self.discard()

        def deliver(rows: Rows) -> StepNumbers:
            params(rows)

            def number(value: int | float) -> float:
                return float(rows[value, 0]) if isinstance(value, int) else value

            return StepNumbers(
                loss=number(loss),
                loss_scales=[number(scale) for scale in scales],
                skipped=float(any(number(one) > 0 for one in found)),
                learning_rate=number(rate),
                clip=clip_coefficient(number(clip[0]), number(clip[1])),
            )

        return deliver


def _uncompiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that a compiled optimizer calls as it is; where nobody compiles yet, loading that takes seconds."""
    if "torch._dynamo" not in sys.modules:
        return hook
    apart = torch.compiler.disable(hook)  # costs several microseconds a call, for nothing where nothing is compiled
    return lambda *args: apart(*args) if torch.compiler.is_compiling() else hook(*args)


def _called_by_scaler(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a GradScaler makes this step; asked of the callers, since a scaler leaves no mark."""
    if getattr(optimizer, "grad_scale", None) is not None:
        return True
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame.f_back is None:
            return False
        frame = frame.f_back
        if frame.f_code is _STEP_CODE:
            return True
    return False


@final
class _ScalerStep(MethodHook):
    """Stands in for a scaler's step as long as probes listen, in whatever order they come and go.

    It lies on the scaler and holds the probes, so that all of them go when nobody holds one.
    """

    __slots__ = ("listeners",)

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.listeners: list[UpdateProbe] = []
        original = scaler.step

        def step(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            call = partial(original, optimizer, *args, **kwargs)
            for listener in list(self.listeners):
                call = partial(listener.scaler_steps, optimizer, call)
            return call()

        super().__init__(step, scaler, "step")


def _listen(scaler: torch.amp.GradScaler, probe: UpdateProbe) -> None:
    hook = vars(scaler).get("step")
    if not isinstance(hook, _ScalerStep):
        vars(scaler)["step"] = hook = _ScalerStep(scaler)
    hook.listeners.append(probe)


def _leave(scaler: torch.amp.GradScaler, probe: UpdateProbe) -> None:
    hook = vars(scaler).get("step")
    if isinstance(hook, _ScalerStep):
        hook.listeners = [listener for listener in hook.listeners if listener is not probe]
        if not hook.listeners:
            del vars(scaler)["step"]
