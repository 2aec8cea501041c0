"""A watched training that is drawn: what is drawn, that training does not notice, and how the terminal is left."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import gradlab as gl
from gradlab.errors import UsageError
from gradlab.live import LiveView, view
from gradlab.live.snapshot import Snapshot


@pytest.fixture(autouse=True)
def _first_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "_said", set())


def console(width: int = 80, height: int = 30, **how: object) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, **how)  # type: ignore[arg-type]


def screen(drawn_on: Console) -> str:
    assert isinstance(drawn_on.file, io.StringIO)
    return drawn_on.file.getvalue()


def last(drawn_on: Console) -> list[str]:
    """Return the lines of the last drawing, without escapes."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen(drawn_on).replace("\r", ""))
    return text[text.rindex("step ") :].rstrip().splitlines()


def train(
    live: bool | LiveView, *, depth: int = 6, steps: int = 4, then: Callable[[int], object] = lambda _: None
) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.1))))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    with gl.watch(model, optimizer, live=live) as probe:
        for step in range(steps):
            optimizer.zero_grad()
            loss = (model(torch.randn(16, 8)) - 1).square().mean()
            loss.backward()
            probe.log(loss=loss)
            optimizer.step()
            losses.append(loss.item())
            then(step)
    return losses, [p.detach().clone() for p in model.parameters()], torch.get_rng_state(), probe


def test_what_is_drawn_last_is_the_last_row_of_the_trace() -> None:
    drawn_on = console()
    losses, _, _, probe = train(LiveView(console=drawn_on))
    layers = probe.trace.layers.query("step == 3").sort_values("order")
    head, *rows, legend = last(drawn_on)
    units = probe.trace.units
    dead = 100 * (units.dead_fraction * units.units).sum() / units.units.sum()
    assert head == f"step 3 · loss {losses[-1]:.4g} · all finite · {dead:.3g}% dead units"
    assert [row.split()[0] for row in rows] == layers.layer.tolist()
    assert [row.split()[-1] for row in rows] == [f"{norm:.2e}" for norm in layers.grad_norm]
    assert legend.startswith("gradient norm by layer, input first")


def test_a_layer_called_twice_and_one_without_a_gradient() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.aside = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.aside(x)
            return self.shared(self.shared(x))

    drawn_on, model = console(), Net()
    with gl.watch(model, live=LiveView(console=drawn_on)) as probe:
        model(torch.randn(8, 4)).square().sum().backward()
        probe.step()
        snapshot = probe.latest()
    norms = probe.trace.layers.query("layer == 'shared'").grad_norm
    assert snapshot is not None
    aside, shared = snapshot.groups
    assert (shared.smallest, shared.largest) == (norms.min(), norms.max())
    assert snapshot.layers == 2
    assert last(drawn_on)[1].split()[0] == "aside"
    assert last(drawn_on)[1].endswith("no gradient")
    assert aside.nonfinite == 0
    assert "loss" not in last(drawn_on)[0]  # nobody told it


def test_training_is_bit_identical_with_the_view() -> None:
    bare, drawn = train(live=False), train(LiveView(console=console()))
    assert bare[0] == drawn[0]
    assert all(torch.equal(a, b) for a, b in zip(bare[1], drawn[1], strict=True))
    assert torch.equal(bare[2], drawn[2])
    assert bare[3].trace.layers.equals(drawn[3].trace.layers)


def test_a_net_of_thousands_of_layers_fits_the_terminal() -> None:
    drawn_on = console(width=40, height=16)
    train(LiveView(console=drawn_on), depth=700, steps=1)
    lines = last(drawn_on)
    assert len(lines) <= 15
    assert max(map(len, lines)) <= 40
    assert any("2100 layers in" in line for line in lines)


def test_nan_is_drawn_and_ends_nothing() -> None:
    drawn_on = console()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gl.watch(model, optimizer, live=LiveView(console=drawn_on)) as probe:
        for step in range(2):
            if step:
                with torch.no_grad():
                    model[1].weight.fill_(float("nan"))
            optimizer.zero_grad()
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            probe.log(loss=loss)
            optimizer.step()
    rows = probe.trace.layers.query("step == 1")
    count = int((rows.act_nonfinite + rows.grad_nonfinite).sum())
    assert count > 32
    assert last(drawn_on)[0] == f"step 1 · loss NaN · {count} not finite"
    assert "\x1b[1;31m" in screen(drawn_on)  # bold red


def test_no_color_draws_without_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    drawn_on = console()
    train(LiveView(console=drawn_on))
    assert "█" in screen(drawn_on)
    assert not re.search(r"\x1b\[[0-9;]*3\dm", screen(drawn_on))


def test_it_draws_no_more_than_four_times_a_second_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr(view.time, "monotonic", lambda: clock)
    taken: list[float] = []

    def latest() -> Snapshot:
        taken.append(clock)
        return Snapshot(step=len(taken), groups=())

    shown = LiveView(console=console())
    shown.open()
    for _ in range(1000):
        shown.show(latest)
        clock += 0.01
    assert len(taken) <= 41
    assert min(b - a for a, b in pairwise(taken)) >= 0.25
    shown.close(latest)
    assert taken[-1] == clock  # the last step is not lost


def test_a_slow_terminal_is_drawn_on_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr(view.time, "monotonic", lambda: clock)
    taken = []

    def slow() -> Snapshot:
        nonlocal clock
        taken.append(clock)
        clock += 0.1
        return Snapshot(step=0, groups=())

    shown = LiveView(console=console())
    shown.open()
    while clock < 130:
        shown.show(slow)
        clock += 0.01
    shown.close()
    assert len(taken) == 3  # a hundredth of the time


def test_the_time_to_go_is_what_the_steps_so_far_took(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr(view.time, "monotonic", lambda: clock)
    drawn_on = console()
    shown = LiveView(steps=1000, console=drawn_on)
    shown.open()
    clock += 50
    shown.show(lambda: Snapshot(step=99, groups=()))
    assert last(drawn_on)[0].endswith("7:30 to go")  # 900 steps of half a second
    shown.close()


def test_without_a_terminal_one_sentence_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    streams = sys.stdout, sys.stderr
    train(live=True)
    train(live=True)
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "gradlab: live=True draws in a terminal, and there is none here: steps are recorded, and not shown."
    ]
    assert (sys.stdout, sys.stderr) == streams


def test_a_dumb_terminal_is_not_drawn_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERM", "dumb")
    drawn_on = console()
    train(LiveView(console=drawn_on))
    assert screen(drawn_on) == ""
    assert "'dumb'" in capsys.readouterr().err


def test_a_second_view_meanwhile_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = console(), console()
    train(LiveView(console=first), then=lambda _: train(LiveView(console=second), steps=1))
    assert capsys.readouterr().err.count("One live view is drawn at a time") == 1
    assert screen(second) == ""
    assert last(first)[0].startswith("step 3")
    train(LiveView(console=second))  # and when the first has ended there is room again
    assert last(second)[0].startswith("step 3")


def test_a_drawing_that_fails_ends_the_view_and_not_the_training(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    losses, *_ = train(LiveView(console=Console(file=Broken(), force_terminal=True, width=80, height=20)))
    assert losses == train(live=False)[0]
    assert "The live view was ended by OSError" in capsys.readouterr().err
    assert LiveView._drawn_now is None


@pytest.mark.parametrize("bad", [1, "yes", None], ids=repr)
def test_live_takes_a_bool_or_a_view(bad: object) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="live takes True, False or a gradlab"):
        gl.watch(model, live=bad)  # type: ignore[arg-type]
    gl.watch(model).close()  # it was let go


@pytest.mark.parametrize("bad", [0, -1, 2.5, True, "9"], ids=repr)
def test_steps_is_a_count(bad: object) -> None:
    with pytest.raises(UsageError, match="must be a whole number"):
        LiveView(steps=bad)  # type: ignore[arg-type]
