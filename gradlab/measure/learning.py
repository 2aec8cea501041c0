"""How long a sequence net takes to learn a task: steps to success, evaluated on a set of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gradlab.checkpoint import Checkpoint
from gradlab.errors import UsageError, unknown
from gradlab.nets import (
    CausalTransformer,
    GrowingContextNet,
    MarkovNet,
    SequenceNet,
    chrono_init,
    parameter_count,
    set_forget_bias,
)
from gradlab.probes import Schedule
from gradlab.tasks import SequenceTask, evaluation_set
from gradlab.trace import Trace
from gradlab.training_steps import run_steps

__all__ = ["LearnSettings", "Learned", "evaluate_loss", "learn", "memory_net", "own_baseline"]

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "rmsprop": torch.optim.RMSprop,
}
_RECURRENT: dict[str, dict[str, Any]] = {
    "tanh": {"core": "rnn"},
    "orthogonal": {"core": "rnn", "init": "orthogonal"},
    "irnn": {"core": "rnn", "nonlinearity": "relu", "init": "identity", "input_gain": 1e-3},
    "lstm": {"core": "lstm"},
    "lstm bias 1": {"core": "lstm"},
    "lstm chrono": {"core": "lstm"},
    "gru": {"core": "gru"},
}
_NEVER: Schedule = frozenset[int]().__contains__


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnSettings:
    """How a sequence net is trained and when it counts as having learned.

    Args:
        steps: Updates at most. Default 2,000.
        batch_size: Fresh sequences a step. Default 50.
        lr: Learning rate, constant. Default 5e-3.
        optimizer: "adam" (the default) or "rmsprop", both at torch's other defaults.
        clip_norm: Largest norm of all gradients together; 0 does not clip. Default 1.
        evaluate_every: Steps between evaluations. Default 50.
        evaluation_size: Sequences in the evaluation set. Default 1,000.
        target: Evaluation loss below which the net has learned and training ends; 0 trains to the end.
        seed: Of the training batches, and of the evaluation set.

    Raises:
        UsageError: A value out of range.
    """

    steps: int = 2000
    batch_size: int = 50
    lr: float = 5e-3
    optimizer: str = "adam"
    clip_norm: float = 1.0
    evaluate_every: int = 50
    evaluation_size: int = 1000
    target: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "evaluate_every", "evaluation_size"):
            value = getattr(self, name)
            if not isinstance(value, SupportsIndex) or not value >= 1:  # type: ignore[operator]  # ints compare
                raise UsageError(f"{name}={value!r} must be a whole number of at least 1.")
        for name in ("lr", "clip_norm", "target"):
            value = getattr(self, name)
            if not (isinstance(value, Real) and 0 <= float(value) < math.inf):
                raise UsageError(f"{name}={value!r} must be a finite number of at least 0.")
        if self.optimizer not in _OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, _OPTIMIZERS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """How a training run went.

    Args:
        status: "done", or "diverged" where the training loss became NaN or Inf.
        steps: Updates done at each evaluation, (E,).
        losses: Evaluation loss there, in units of the task's own baseline on the evaluation set times its value in
            theory (see `own_baseline`), (E,).
        train_losses: Mean training loss since the evaluation before, (E,).
        solved_at: Updates done when the evaluation loss was first below the target, or None.
        parameters: Trainable numbers of the net.
        trace: What the probes recorded; empty if they were not asked to.
        seconds: Wall time.
        cpu_seconds: Process time.
    """

    status: str
    steps: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float64]
    train_losses: npt.NDArray[np.float64]
    solved_at: int | None
    parameters: int
    trace: Trace
    seconds: float
    cpu_seconds: float


def memory_net(name: str, task: SequenceTask, *, hidden: int, horizon: float, seed: int) -> nn.Module:
    """Return a net that fits a task.

    Args:
        name: "tanh", "orthogonal" or "irnn" (vanilla nets); "lstm", "lstm bias 1" (forget bias 1), "lstm chrono",
            "gru"; "transformer" (one causal layer, one head, sinusoidal positions); "markov <k>" (an MLP on the last
            k steps) or "growing" (an MLP on all steps), which have 64 hidden units whatever `hidden` is.
        task: Gives input size, outputs, head and length.
        hidden: Units of the state, or width of the Transformer.
        horizon: Longest memory of the chrono initialization, in steps.
        seed: Of the weights.

    Raises:
        UsageError: An unknown name, a k below 1, or a task with targets at every step for a net that has one output.

    Example:
        >>> from gradlab.tasks import WriteQueryTask
        >>> task = WriteQueryTask()
        >>> [parameter_count(memory_net(name, task, hidden=32, horizon=64, seed=0)) for name in ("tanh", "growing")]
        [1282, 16578]

    Source:
        Tallec & Ollivier 2018 (chrono); Le, Jaitly & Hinton 2015 (IRNN); Jozefowicz et al. 2015 (forget bias 1).
    """
    sizes: dict[str, Any] = {"input_size": task.input_size, "outputs": task.outputs}
    kind, _, rest = name.partition(" ")
    if kind in ("markov", "growing"):
        if task.head != "last":
            raise UsageError(f"The net '{name}' has one output a sequence, but the task wants one at every step.")
        if name == "growing":
            return GrowingContextNet(task.steps, seed=seed, **sizes)
        if not (rest.isascii() and rest.isdigit() and int(rest) >= 1):
            raise UsageError(f"A Markov net needs a window of at least 1 step; got '{name}': write 'markov 4', say.")
        return MarkovNet(int(rest), seed=seed, **sizes)
    if name == "transformer":
        return CausalTransformer(
            max_length=task.steps, width=hidden, positions="sinusoidal", head=task.head, seed=seed, **sizes
        )
    if name not in _RECURRENT:
        raise unknown("net", name, (*_RECURRENT, "transformer", "growing", "markov 1"))
    net = SequenceNet(hidden_size=hidden, head=task.head, seed=seed, **_RECURRENT[name], **sizes)
    if name == "lstm bias 1":
        set_forget_bias(net, 1.0)
    elif name == "lstm chrono":
        chrono_init(net, horizon, seed=seed)
    return net


def own_baseline(task: SequenceTask, targets: torch.Tensor) -> float:
    """Return the loss on an evaluation set of the best constant predictor for that very set.

    For numbers (mean squared error) it is the variance of the targets, which on 1,000 sequences of the adding problem
    is anywhere within .0062 of 1/6: losses are compared with the set's own. For classes, which are uniform, guessing
    costs the task's baseline on every set.

    Args:
        task: The task.
        targets: Of the evaluation set.

    Example:
        >>> from gradlab.tasks import AddingTask
        >>> own_baseline(AddingTask(), torch.tensor([[0.5], [1.5]]))
        0.25
    """
    return float(targets.double().var(correction=0)) if targets.is_floating_point() else task.baseline


@torch.no_grad()
def evaluate_loss(
    model: nn.Module, task: SequenceTask, x: torch.Tensor, y: torch.Tensor, batch_size: int = 1000
) -> float:
    """Return the task's loss on given sequences, the mean over them, in evaluation mode.

    Args:
        model: On the task's device; its mode is given back.
        task: Gives the loss.
        x: Inputs, sequences first.
        y: Targets, sequences first.
        batch_size: Sequences at a time. Default 1,000.
    """
    was_training = model.training
    model.eval()
    try:
        parts = zip(x.split(batch_size), y.split(batch_size), strict=True)
        total = torch.stack([task.loss(model(inputs), targets) * len(inputs) for inputs, targets in parts]).sum()
    finally:
        model.train(was_training)
    return float(total) / len(x)


def learn(
    model: nn.Module,
    task: SequenceTask,
    settings: LearnSettings,
    *,
    device: torch.device,
    record_every: int = 0,
    timesteps: int = 0,
    on_step: Callable[[int, float | None], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Learned:
    """Train a net on fresh sequences until it has learned the task or its steps are spent.

    Args:
        model: Fits the task; moved to the device.
        task: A generated task; moved to the device.
        settings: How to train and when to stop.
        device: Where.
        record_every: The probes record every so many steps; 0 records nothing.
        timesteps: In recorded steps every so many time steps of the recurrent module are followed, see `watch`; 0
            follows none.
        on_step: Called after each step with its number and its loss (None on an accelerator); what it raises ends
            the training.
        checkpoint: Where the state is kept, and found again after a crash; see `gradlab.checkpoint.Checkpoint`.

    Returns:
        Losses against steps; a loss that is not finite ends the training as "diverged".

    Example:
        >>> from gradlab.tasks import RecallTask
        >>> task = RecallTask(length=2)
        >>> net = memory_net("gru", task, hidden=8, horizon=4, seed=0)
        >>> how = LearnSettings(steps=200, lr=0.02, target=0.1, evaluate_every=20, evaluation_size=100)
        >>> result = learn(net, task, how, device=torch.device("cpu"))
        >>> result.solved_at is not None and bool(result.losses[-1] < 0.1)
        True
    """
    wall, cpu = time.perf_counter(), time.process_time()
    on_meta = device.type == "meta"
    model.to(device).train()
    task = task.to(device)
    generator = None if on_meta else torch.Generator(device).manual_seed(settings.seed)
    optimizer = _OPTIMIZERS[settings.optimizer](model.parameters(), lr=settings.lr)
    x, y = (None, None) if on_meta else evaluation_set(task, settings.evaluation_size, seed=settings.seed)
    scale = 1.0 if y is None else task.baseline / own_baseline(task, y)
    course = _Course()

    def stop(step: int) -> bool:
        done = step + 1
        if x is None or y is None or (done % settings.evaluate_every and done != settings.steps):
            return False
        course.steps.append(done)
        course.losses.append(scale * evaluate_loss(model, task, x, y))
        return course.losses[-1] < settings.target

    run = run_steps(
        model,
        optimizer,
        lambda _: task.batch(settings.batch_size, generator),
        task.loss,
        steps=settings.steps,
        device=device,
        clip_norm=settings.clip_norm,
        every=record_every or _NEVER,
        timesteps=timesteps if record_every and timesteps else False,
        on_step=on_step,
        stop=stop,
        checkpoint=checkpoint,
        stateful={"course": course} | ({} if generator is None else {"batches": generator}),
        about={"settings": repr(settings), "task": repr(task)},
    )
    steps = course.steps
    ends = [0, *steps]
    return Learned(
        status="done" if run.diverged_at is None else "diverged",
        steps=np.array(steps, dtype=np.int64),
        losses=np.array(course.losses, dtype=np.float64),
        train_losses=np.array(
            [run.losses[start:end].mean() for start, end in zip(ends, steps, strict=False)], dtype=np.float64
        ),
        solved_at=steps[-1] if steps and course.losses[-1] < settings.target else None,
        parameters=parameter_count(model),
        trace=run.trace if record_every else Trace(),
        seconds=time.perf_counter() - wall + run.earlier_seconds,
        cpu_seconds=time.process_time() - cpu + run.earlier_cpu_seconds,
    )


class _Course:
    """The evaluations so far: what a checkpoint keeps beside the net."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self.steps), "losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.steps, self.losses = list(state["steps"]), list(state["losses"])
