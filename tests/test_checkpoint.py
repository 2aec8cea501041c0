"""Training that goes on from a checkpoint ends with the bits of training that was never broken off."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import gradlab as gl
from gradlab.checkpoint import Checkpoint, random_state, set_random_state
from gradlab.errors import UsageError
from gradlab.measure.learning import LearnSettings, learn, memory_net
from gradlab.nets import CifarNet, initialize
from gradlab.probes import log_spaced
from gradlab.tasks import AddingTask, load_digits
from gradlab.training import TrainResult, TrainSettings, train
from gradlab.training_steps import StepsResult, run_steps

CPU = torch.device("cpu")
Ended = tuple[Any, nn.Module]
Program = Callable[..., Ended]


class Crash(BaseException):
    pass


def crash_at(step: int) -> Callable[[int, float | None], None]:
    def on_step(done: int, _: float | None) -> None:
        if done == step:
            raise Crash

    return on_step


def images(*, steps: int = 7, **how: Any) -> Program:
    def program(**options: Any) -> Ended:
        torch.manual_seed(5)
        model = CifarNet(8, skip=True, norm="batch", width=4, in_channels=1)
        initialize(model, "he_normal", seed=1)
        task = load_digits(augment=True)
        settings = TrainSettings(**{"steps": steps, "batch_size": 16, "milestones": (4,), **how})
        return train(model, task, settings, device="cpu", every=log_spaced(steps, 5), **options), model

    return program


def dropout(**options: Any) -> Ended:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 10))
    return train(
        model, load_digits(), TrainSettings(steps=6, batch_size=16), device="cpu", layers="all", **options
    ), model


def sequences(optimizer: str = "adam", *, target: float = 0.0) -> Program:
    def program(**options: Any) -> Ended:
        torch.manual_seed(5)
        task = AddingTask(length=12)
        model = memory_net("lstm", task, hidden=8, horizon=12, seed=0)
        how = LearnSettings(
            steps=9, batch_size=8, evaluate_every=2, evaluation_size=20, clip_norm=0.5, optimizer=optimizer,
            target=target,
        )  # fmt: skip
        return learn(model, task, how, device=CPU, record_every=2, timesteps=4, **options), model

    return program


PROGRAMS: dict[str, tuple[Program, int]] = {
    "sgd, batchnorm, augmented": (images(), 7),
    "bf16": (images(precision="bf16", steps=4), 4),
    "clipped": (images(clip_norm=0.5, steps=4), 4),
    "dropout": (dropout, 6),
    "adam, lstm through time": (sequences(), 9),
    "rmsprop, lstm through time": (sequences("rmsprop"), 9),
    "solved early": (sequences(target=10.0), 2),
}


def assert_same(one: Ended, other: Ended) -> None:
    (a, of_a), (b, of_b) = one, other
    for field in ("losses", "train_losses", "steps"):
        if hasattr(a, field):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    for field in ("status", "diverged_at", "solved_at", "test_error"):
        if hasattr(a, field):
            np.testing.assert_equal(getattr(a, field), getattr(b, field))  # to which NaN equals NaN
    for (name, x), y in zip(of_a.state_dict().items(), of_b.state_dict().values(), strict=True):
        np.testing.assert_array_equal(x.numpy(), y.numpy(), err_msg=name)
    assert a.trace.tables.keys() == b.trace.tables.keys()
    for name, frame in a.trace.tables.items():
        timed = ["seconds"] if name == "steps" else []
        pd.testing.assert_frame_equal(frame.drop(columns=timed), b.trace.tables[name].drop(columns=timed))
    assert a.trace.info == b.trace.info


@pytest.mark.parametrize(("program", "steps"), PROGRAMS.values(), ids=PROGRAMS)
def test_training_broken_off_at_any_step_goes_on_bit_for_bit(program: Program, steps: int, tmp_path: Path) -> None:
    whole = program()
    for step in range(steps):
        folder = tmp_path / str(step)
        with pytest.raises(Crash):
            program(checkpoint=Checkpoint(folder), on_step=crash_at(step))
        kept = Checkpoint(folder)
        assert_same(whole, program(checkpoint=kept))
        assert kept.notes == [f"Went on from step {step + 1}."]


def test_training_broken_off_again_and_again_goes_on_bit_for_bit(tmp_path: Path) -> None:
    program, steps = PROGRAMS["adam, lstm through time"]
    for step in range(steps):
        with pytest.raises(Crash):
            program(checkpoint=Checkpoint(tmp_path / "kept"), on_step=crash_at(step))
    assert_same(program(), program(checkpoint=Checkpoint(tmp_path / "kept")))


def test_a_process_killed_between_two_states_goes_on_from_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, _ = PROGRAMS["sgd, batchnorm, augmented"]
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr("gradlab.checkpoint.time.monotonic", lambda: float(next(clock)))

    def killed(step: int, _: float | None) -> None:
        if step == 5:
            monkeypatch.setattr(torch, "save", lambda *_: pytest.fail("a killed process writes nothing"))
            raise Crash

    with pytest.raises(BaseException, match="killed process"):
        program(checkpoint=Checkpoint(tmp_path / "kept", every=25.0), on_step=killed)
    monkeypatch.undo()
    kept = Checkpoint(tmp_path / "kept")
    assert_same(program(), program(checkpoint=kept))
    assert kept.notes == ["Went on from step 3."]


def test_keeping_states_changes_nothing(tmp_path: Path) -> None:
    for name, (program, _) in PROGRAMS.items():
        assert_same(program(), program(checkpoint=Checkpoint(tmp_path / name, every=0)))


def test_a_run_that_was_complete_trains_nothing_again(tmp_path: Path) -> None:
    program, steps = PROGRAMS["solved early"]
    with pytest.raises(Crash):
        program(checkpoint=Checkpoint(tmp_path), on_step=crash_at(steps - 1))
    told: list[int] = []
    again = program(checkpoint=Checkpoint(tmp_path), on_step=lambda step, _: told.append(step))
    assert told == []
    assert_same(program(), again)


def test_a_diverged_run_stays_diverged(tmp_path: Path) -> None:
    program = images(lr=1e30, steps=6)
    whole = program()
    assert whole[0].diverged_at is not None
    with pytest.raises(Crash):
        program(checkpoint=Checkpoint(tmp_path), on_step=crash_at(whole[0].diverged_at))
    assert_same(whole, program(checkpoint=Checkpoint(tmp_path)))


def test_several_trainings_share_a_checkpoint_by_their_order(tmp_path: Path) -> None:
    def both(**second: Any) -> tuple[Ended, Ended]:
        kept = Checkpoint(tmp_path / "kept", every=0)
        return images(steps=3)(checkpoint=kept), images(steps=4, seed=1)(checkpoint=kept, **second)

    with pytest.raises(Crash):
        both(on_step=crash_at(1))
    first, second = both()
    assert_same(images(steps=3)(), first)
    assert_same(images(steps=4, seed=1)(), second)


def damage(content: bytes) -> dict[str, bytes]:
    middle = len(content) // 2
    return {
        "cut": content[:middle],
        "a bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "empty": b"",
        "other": b"not a checkpoint\nat all",
    }


@pytest.mark.parametrize("kind", ["cut", "a bit", "empty", "other"])
def test_a_damaged_checkpoint_is_not_used(kind: str, tmp_path: Path) -> None:
    program = images(steps=3)
    with pytest.raises(Crash):
        program(checkpoint=Checkpoint(tmp_path), on_step=crash_at(1))
    path = tmp_path / "0.pt"
    path.write_bytes(damage(path.read_bytes())[kind])
    kept = Checkpoint(tmp_path)
    assert_same(program(), program(checkpoint=kept))
    assert kept.notes == [f"The checkpoint {path} is damaged: training began anew."]


def test_a_checkpoint_executes_nothing(tmp_path: Path) -> None:
    import hashlib
    import io
    import pickle

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    buffer = io.BytesIO()
    torch.save({"about": {}, "state": Hostile()}, buffer, pickle_module=pickle)
    body = buffer.getvalue()
    path = tmp_path / "0.pt"
    path.write_bytes(b"gradlab checkpoint 1 " + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    kept = Checkpoint(tmp_path)
    images(steps=1)(checkpoint=kept)
    assert kept.notes == [f"The checkpoint {path} was not written by gradlab: training began anew."]
    assert not (tmp_path / "executed").exists()


OTHERS: dict[str, tuple[Mapping[str, Any], str, str]] = {
    "learning rate": ({"lr": 0.01}, "", "settings"),
    "steps": ({"steps": 5}, "", "settings|steps"),
    "data": ({}, "a new version of the data", "identity"),
}


@pytest.mark.parametrize(("how", "identity", "fact"), OTHERS.values(), ids=OTHERS)
def test_a_checkpoint_of_another_run_is_not_used(
    how: Mapping[str, Any], identity: str, fact: str, tmp_path: Path
) -> None:
    with pytest.raises(Crash):
        images(steps=4)(checkpoint=Checkpoint(tmp_path), on_step=crash_at(1))
    program = images(**{"steps": 4, **how})
    kept = Checkpoint(tmp_path, identity=identity)
    assert_same(program(), program(checkpoint=kept))
    (note,) = kept.notes
    assert any(f"is of another run ({one} is not the same)" in note for one in (*fact.split("|"), "optimizer"))


def test_other_initial_weights_are_another_run(tmp_path: Path) -> None:
    def program(seed: int, **options: Any) -> StepsResult:
        torch.manual_seed(seed)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batch = torch.ones(4, 3), torch.ones(4, 1)
        return run_steps(model, optimizer, lambda _: batch, nn.functional.mse_loss, steps=4, device=CPU, **options)

    with pytest.raises(Crash):
        program(0, checkpoint=Checkpoint(tmp_path), on_step=crash_at(2))
    kept = Checkpoint(tmp_path)
    np.testing.assert_array_equal(program(1, checkpoint=kept).losses, program(1).losses)
    assert "initial weights is not the same" in kept.notes[0]


def test_a_full_disk_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    kept = Checkpoint(tmp_path / "kept", every=0)
    assert_same(images(steps=3)(), images(steps=3)(checkpoint=kept))
    (note,) = kept.notes
    assert note.startswith("No checkpoint was written: Cannot write")
    assert "No space left on device" in note


def test_seconds_of_all_attempts_are_counted(tmp_path: Path) -> None:
    import time

    def slow(step: int, _: float | None) -> None:
        time.sleep(0.05)
        if step == 2:
            raise Crash

    with pytest.raises(Crash):
        images(steps=4)(checkpoint=Checkpoint(tmp_path), on_step=slow)
    result, _ = images(steps=4)(checkpoint=Checkpoint(tmp_path))
    assert isinstance(result, TrainResult)
    assert result.seconds > 0.15


def test_random_numbers_go_on_where_they_were() -> None:
    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
    random.gauss(0, 1), np.random.standard_normal()  # noqa: NPY002  # each keeps a second number for later
    state = random_state(CPU)

    def draw() -> list[float]:
        return [float(torch.rand(())), float(np.random.standard_normal()), random.gauss(0, 1), random.random()]  # noqa: NPY002

    first = draw()
    set_random_state(state, CPU)
    assert draw() == first


def test_nothing_is_written_on_meta(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 1)
        batch = torch.ones(4, 3), torch.ones(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    meta = torch.device("meta")
    kept = Checkpoint(tmp_path / "kept", every=0)
    run_steps(model, optimizer, lambda _: batch, nn.functional.mse_loss, steps=2, device=meta, checkpoint=kept)
    assert not (tmp_path / "kept").exists()


def test_a_negative_interval_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 0"):
        gl.Checkpoint("kept", every=-1)


def test_a_probe_goes_on_from_its_state() -> None:
    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1), nn.Tanh())
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    model, optimizer = build()
    with gl.watch(model, optimizer, every=2) as probe:
        steps(model, optimizer, 7)
    model, optimizer = build()
    with gl.watch(model, optimizer, every=2) as first:
        steps(model, optimizer, 4)
        state = first.state_dict()
    with gl.watch(model, optimizer, every=2) as second:
        second.load_state_dict(state)
        steps(model, optimizer, 3)
    assert second.step_number == 7
    for name, frame in probe.trace.tables.items():
        timed = ["seconds"] if name == "steps" else []
        pd.testing.assert_frame_equal(frame.drop(columns=timed), second.trace.tables[name].drop(columns=timed))
