"""whatif(): published remedies tried on copies of a model, with the gradient before and after: advice with evidence."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from gradlab.analysis.diagnosis import diagnose
from gradlab.analysis.finding import Diagnosis
from gradlab.analysis.trace_views import depth_profile, time_profiles, usable_steps
from gradlab.errors import GradlabError, UsageError, unknown
from gradlab.probes.watch import watch
from gradlab.surgery import REMEDIES, Anatomy, Remedy

if TYPE_CHECKING:
    from gradlab.trace import Trace

__all__ = ["Trial", "WhatIf", "call_model", "train_watched", "whatif"]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Loss = Callable[[Any, Any], torch.Tensor]
AS_IT_IS = "as it is"


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A model with one remedy, trained for a few steps under watch.

    Args:
        name: The remedy's name, or "as it is".
        text: What was changed, a few words.
        source: Of the remedy.
        changed: Modules changed.
        diagnosis: Of the trial's trace.
        depth_ratio: Gradient norm at the first layer over that at the last, at initialization; NaN where there are not
            two layers.
        time_ratio: Gradient norm at the first time step over that at the last, at initialization; NaN without time.
        loss_first: Loss of the first step.
        loss_last: Mean loss of the last tenth of steps.
        profile: At initialization: (layer, log10 of the gradient norm) from input to output.
        trace: What was recorded.
    """

    name: str
    text: str
    source: str
    changed: int
    diagnosis: Diagnosis
    depth_ratio: float
    time_ratio: float
    loss_first: float
    loss_last: float
    profile: tuple[tuple[str, float], ...]
    trace: Trace


@dataclass(frozen=True, kw_only=True, slots=True)
class WhatIf:
    """What remedies do to a model's gradient.

    Args:
        trials: The model as it is first, then one trial a remedy, in the order in which they were tried.
        skipped: Remedies that do not apply, and why.
    """

    trials: tuple[Trial, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def before(self) -> Trial:
        """The model as it is."""
        return self.trials[0]

    @property
    def best(self) -> Trial | None:
        """The trial to follow: of the healthy remedies the one with the lowest loss; None if the model is healthy.

        None, too, if no remedy heals it.
        """
        if self.before.diagnosis.healthy:
            return None
        healed = [trial for trial in self.trials[1:] if trial.diagnosis.healthy and math.isfinite(trial.loss_last)]
        return min(healed, key=lambda trial: trial.loss_last, default=None)

    def __str__(self) -> str:
        lines = [f"{'remedy':<18} {'verdict':<26} {'depth ratio':>11} {'time ratio':>11} {'loss':>17}"]
        for trial in self.trials:
            leading = trial.diagnosis.leading
            losses = f"{trial.loss_first:.3g} to {trial.loss_last:.3g}"
            lines.append(
                f"{trial.name:<18} {leading.title if leading else 'healthy':<26} {_ratio(trial.depth_ratio):>11} "
                f"{_ratio(trial.time_ratio):>11} {losses:>17}"
            )
        lines += [f"not tried: {name} ({why})" for name, why in self.skipped]
        if self.best is not None:
            lines.append(f"Try {self.best.name}: {self.best.text} ({self.best.source}).")
        elif not self.before.diagnosis.healthy:
            lines.append("No single remedy heals it.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data; numbers that JSON lacks are null."""
        keys = ("depth_ratio", "time_ratio", "loss_first", "loss_last")
        rows = [
            {"name": t.name, "text": t.text, "source": t.source, "changed": t.changed}
            | {key: _finite(getattr(t, key)) for key in keys}
            | {"profile": [[layer, _finite(value)] for layer, value in t.profile], "diagnosis": t.diagnosis.to_dict()}
            for t in self.trials
        ]
        best = self.best
        return {"trials": rows, "not_tried": [list(item) for item in self.skipped], "best": best and best.name}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _ratio(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2g}"


def whatif(
    build_model: Callable[[], nn.Module] | nn.Module,
    batch: Any,
    loss: Loss,
    *,
    optimizer: MakeOptimizer | None = None,
    steps: int = 20,
    remedies: Sequence[str] | None = None,
    seed: int = 0,
) -> WhatIf:
    """Try published remedies on copies of a model and show the gradient before and after.

    Each trial builds the model anew from one seed, changes one thing, and trains for a few steps under watch: the
    gradient's profile at initialization, the diagnosis and the loss say what it did. Your model is never touched.

    Args:
        build_model: Builds the model, or the model itself (copied for each trial).
        batch: (inputs, targets), on the model's device; inputs a tensor, or a tuple or dict of the model's arguments.
            Or a list of such batches, gone through in turn.
        loss: Takes (model's output, targets) and gives one number.
        optimizer: Takes parameters and gives the optimizer; default SGD with learning rate .01.
        steps: Training steps of each trial. Default 20.
        remedies: Names to try; default all of initialization, recurrent_weights, forget_bias, chrono, activation,
            batchnorm, skip, clipping, learning_rate that change something.
        seed: Of the model's initialization and of training.

    Returns:
        The trials; `print` it for a table.

    Raises:
        UsageError: An unknown remedy, fewer than 2 steps, a batch that is no pair, or a model that fails on it.

    Note:
        Only modules can be changed: activations called as functions stay, and a skip is put around single layers whose
        input and output have one shape. A few steps show whether a net begins to train, not where it ends.

    Example:
        >>> def build():
        ...     layers = [part for _ in range(12) for part in (nn.Linear(16, 16), nn.Sigmoid())]
        ...     return nn.Sequential(*layers, nn.Linear(16, 2))
        >>> x, y = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 2
        >>> tried = whatif(build, (x, y), nn.functional.cross_entropy, remedies=["activation"], steps=5)
        >>> tried.before.diagnosis.leading.title, tried.best.name
        ('vanishing through depth', 'activation')
    """
    if steps < 2:
        raise UsageError(f"whatif takes at least 2 steps, to see a loss change; got {steps}.")
    for name in remedies or ():
        if name not in {remedy.name for remedy in REMEDIES}:
            raise unknown("remedy", name, [remedy.name for remedy in REMEDIES])
    build = (lambda: copy.deepcopy(build_model)) if isinstance(build_model, nn.Module) else build_model
    batches = list(batch) if isinstance(batch, list) else [batch]
    make = optimizer or (lambda params: torch.optim.SGD(params, lr=0.01))
    keep = Remedy(name=AS_IT_IS, text="nothing", source="", apply=lambda *_: 1)
    trials, skipped = [], []
    for remedy in (keep, *(r for r in REMEDIES if remedies is None or r.name in remedies)):
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            trial = _try(remedy, build, batches, loss, make, steps, seed)
        if isinstance(trial, Trial):
            trials.append(trial)
        else:
            skipped.append((remedy.name, trial))
    return WhatIf(trials=tuple(trials), skipped=tuple(skipped))


def _try(
    remedy: Remedy,
    build: Callable[[], nn.Module],
    batches: list[Any],
    loss: Loss,
    make: MakeOptimizer,
    steps: int,
    seed: int,
) -> Trial | str:
    """Run one trial, or say why the remedy does not apply."""
    torch.manual_seed(seed)
    model = build()
    if not isinstance(model, nn.Module):
        raise UsageError(f"whatif: build_model must give a torch.nn.Module; it gave {type(model).__name__}.")
    inputs, _ = _pair(batches[0])
    try:
        changed = remedy.apply(model, Anatomy.of(model, lambda: call_model(model, inputs)))
    except GradlabError as error:
        return str(error)
    if not changed:
        return "nothing of the model for it to change"
    torch.manual_seed(seed)
    optimizer = make(model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * remedy.rate
    try:
        trace = train_watched(model, optimizer, batches, loss, steps=steps, clip=remedy.clip)
    except RuntimeError as error:
        if remedy.name == AS_IT_IS:
            raise
        return f"the changed model fails: {str(error).splitlines()[0]}"
    return _trial(remedy, changed, trace)


def train_watched(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    batches: Sequence[Any],
    loss: Loss,
    *,
    steps: int,
    clip: float = 0.0,
    timesteps: bool | int | None = None,
) -> Trace:
    """Train for some steps under watch, recording each, and return the trace.

    Args:
        model: The model, in training mode as it is given.
        optimizer: Its optimizer; None measures gradients without a step.
        batches: (inputs, targets) pairs, gone through in turn.
        loss: Takes (output, targets).
        steps: Training steps; it ends before them when the loss is not finite for the third time.
        clip: Gradient norm to clip at; 0 for none.
        timesteps: As `watch` takes it; None follows time if there is a recurrent layer.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    follow = recurrent if timesteps is None else timesteps
    bad = 0
    with watch(model, optimizer, timesteps=follow) as probe:
        for step in range(steps):
            inputs, targets = _pair(batches[step % len(batches)])
            model.zero_grad(set_to_none=True)
            value = loss(call_model(model, inputs), targets)
            if not isinstance(value, torch.Tensor) or value.numel() != 1:
                raise UsageError(f"The loss must be a tensor of one entry; got {_shape(value)}.")
            probe.log(loss=value)
            if not value.requires_grad:
                raise UsageError("The loss does not depend on any parameter that requires a gradient.")
            value.backward()
            if clip:
                norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
                probe.log(clip=(norm, clip))
            if optimizer is None:
                probe.step()
            else:
                optimizer.step()
            bad += not bool(torch.isfinite(value))
            if bad >= 3:
                break
    return probe.trace


def _shape(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise UsageError(f"A batch must be a pair (inputs, targets); got {_shape(batch)}.")
    return batch[0], batch[1]


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model on a tensor, or on a tuple or dict of its arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)


def _trial(remedy: Remedy, changed: int, trace: Trace) -> Trial:
    steps = usable_steps(trace)[:1]
    profile = depth_profile(trace, steps)
    times = [found for found in time_profiles(trace, steps) if len(found.y) > 1]
    losses = trace.steps["loss"].to_numpy()
    tenth = max(1, len(losses) // 10)
    y = np.empty(0) if profile is None else profile.y
    ratios = [found.y[-1] - found.y[0] if found.backward else found.y[0] - found.y[-1] for found in times]
    return Trial(
        name=remedy.name,
        text=remedy.text,
        source=remedy.source,
        changed=changed,
        diagnosis=diagnose(trace),
        depth_ratio=_power(y[0] - y[-1]) if len(y) > 1 else math.nan,
        time_ratio=_power(max(ratios)) if ratios else math.nan,
        loss_first=float(losses[0]) if len(losses) else math.nan,
        loss_last=float(losses[-tenth:].mean()) if len(losses) else math.nan,
        profile=tuple(zip(profile.places, map(float, y), strict=True)) if profile is not None else (),
        trace=trace,
    )


def _power(decades: float) -> float:
    return math.nan if math.isnan(decades) else 10.0**decades if decades < 300 else math.inf
