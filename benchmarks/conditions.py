"""What a training step is timed with: nothing, gradlab, hooks as people write them, and other tools."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import nn

import gradlab as gl

__all__ = ["OWN", "PEERS", "Condition", "missing"]

#: Makes what watches: a context manager that gives what is called with the input after each backward pass, or None.
Watch = Callable[[nn.Module, torch.optim.Optimizer], AbstractContextManager[Any]]


class Condition(NamedTuple):
    """One way to watch, and the packages it needs, with commas between them."""

    watch: Watch
    package: str = ""
    period: int = 1  # steps that a timing must be a multiple of
    recurrent: bool = False  # only for nets that hold a stock recurrent module


@contextmanager
def gradlab(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Iterator[None]:
    """Watch with gradlab."""
    with gl.watch(model, optimizer, **options):
        yield None


@contextmanager
def naive(model: nn.Module, _: torch.optim.Optimizer) -> Iterator[None]:
    """Hooks as most people write them: a few statistics, each read back at once."""
    numbers: list[float] = []

    def forward(_m: nn.Module, _a: object, y: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        y = y if isinstance(y, torch.Tensor) else y[0]
        x = y.detach()
        numbers.extend([x.mean().item(), x.std().item(), x.abs().max().item(), (x == 0).float().mean().item()])
        if y.requires_grad:
            y.register_hook(lambda g: numbers.append(g.norm().item()))

    leaves = [m for m in model.modules() if next(m.children(), None) is None]
    handles: list[Any] = [m.register_forward_hook(forward) for m in leaves]
    handles += [
        p.register_post_accumulate_grad_hook(lambda p: numbers.extend([p.grad.norm().item(), p.detach().norm().item()]))
        for p in model.parameters()
    ]
    try:
        yield None
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def wandb_watch(model: nn.Module, _: torch.optim.Optimizer) -> Iterator[Callable[..., None]]:
    """wandb.watch of gradients and parameters at each step, offline."""
    import wandb

    logging.getLogger("wandb").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        run = wandb.init(mode="offline", dir=folder, project="overhead", settings=wandb.Settings(silent=True))
        run.watch(model, log="all", log_freq=1)
        try:
            yield lambda _: run.log({"loss": 0.0})
        finally:
            run.unwatch(model)
            run.finish()


@contextmanager
def tensorboard(model: nn.Module, _: torch.optim.Optimizer) -> Iterator[Callable[..., None]]:
    """TensorBoard histograms of each parameter and gradient."""
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:

        def record(_: torch.Tensor) -> None:
            for name, param in model.named_parameters():
                writer.add_histogram(name, param)
                if param.grad is not None:
                    writer.add_histogram(f"{name}.grad", param.grad)

        yield record


@contextmanager
def monitor(model: nn.Module, _: torch.optim.Optimizer) -> Iterator[Callable[..., None]]:
    """torch-module-monitor with norms of activations, gradients, parameters at each step."""
    from torch_module_monitor import ModuleMonitor

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x.norm()

    with ExitStack() as stack, redirect_stdout(StringIO()):
        watcher = ModuleMonitor(monitor_step_fn=lambda _: True)
        watcher.set_module(model)
        watcher.add_activation_metric("norm", norm)
        watcher.add_gradient_metric("norm", norm)
        watcher.add_parameter_metric("norm", norm)
        step = 0
        watcher.begin_step(step)
        stack.callback(watcher.activation_hooks.remove_all_hooks)

        def record(_: torch.Tensor) -> None:
            nonlocal step
            watcher.monitor_parameters()
            watcher.monitor_gradients()
            watcher.end_step()
            step += 1
            watcher.begin_step(step)

        yield record


@contextmanager
def torchlens(model: nn.Module, _: torch.optim.Optimizer) -> Iterator[Callable[..., None]]:
    """A torchlens trace of one forward pass more."""
    import torchlens as tl

    def record(x: torch.Tensor) -> None:
        tl.trace(model, x)

    yield record


@contextmanager
def traintools(model: nn.Module, _: torch.optim.Optimizer) -> Iterator[Callable[..., None]]:
    """The gradient-health report of traintools at each step."""
    from traintools import GradientHealthMonitor

    health, step = GradientHealthMonitor(max_grad_norm=1.0), count()
    yield lambda _: health.inspect(model, step=next(step), lr=1e-3)


@contextmanager
def torchdiag(model: nn.Module, _: torch.optim.Optimizer) -> Iterator[Callable[..., None]]:
    """torchdiag.check_gradients at each step, its printing thrown away."""
    import torchdiag as td

    def record(_: torch.Tensor) -> None:
        with redirect_stdout(StringIO()):
            td.check_gradients(model)

    yield record


@contextmanager
def nansense(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Callable[..., None]]:
    """Running statistics of every layer by nansense, without its user interface."""
    import nansense as ns

    session = ns.start(model, epochs=1, phases={"train": 1_000_000}, optimizer=optimizer)
    session.set_stats_scope("all")
    session.step_run()  # without a pause
    batch = session.batch(phase="train", epoch=0)
    batch.__enter__()

    def record(_: torch.Tensor) -> None:
        nonlocal batch
        batch.__exit__(None, None, None)
        batch = session.batch(phase="train", epoch=0)
        batch.__enter__()

    try:
        yield record
    finally:
        batch.__exit__(None, None, None)
        session.close()


#: gradlab's own ways, and what they are held against.
OWN: dict[str, Condition] = {
    "bare": Condition(lambda _m, _o: nullcontext()),
    "gradlab": Condition(gradlab),
    "gradlab every=10": Condition(lambda m, o: gradlab(m, o, every=10), period=10),
    "gradlab timesteps=16": Condition(lambda m, o: gradlab(m, o, timesteps=16), recurrent=True),
    "naive .item()": Condition(naive),
}
PEERS: dict[str, Condition] = {
    "wandb.watch": Condition(wandb_watch, "wandb"),
    "TensorBoard histograms": Condition(tensorboard, "tensorboard"),
    "torch-module-monitor": Condition(monitor, "torch_module_monitor"),
    "torchlens": Condition(torchlens, "torchlens,graphviz"),
    "traintools gradients": Condition(traintools, "traintools"),
    "torchdiag gradients": Condition(torchdiag, "torchdiag"),
    "nansense statistics": Condition(nansense, "nansense"),
}


def missing() -> list[str]:
    """Return the names of peers that are not installed here."""
    return [name for name, (_, needs, *_) in PEERS.items() if any(find_spec(part) is None for part in needs.split(","))]
