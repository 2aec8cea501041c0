"""Learning runs against a naive loop; success, evaluation, and every net's watched step on the meta device."""

import math

import numpy as np
import pytest
import torch

from gradlab.errors import UsageError
from gradlab.measure.learning import LearnSettings, evaluate_loss, learn, memory_net, own_baseline
from gradlab.nets import parameter_count
from gradlab.tasks import AddingTask, CopyTask, RecallTask, WriteQueryTask, evaluation_set

CPU = torch.device("cpu")
RECURRENT = ("tanh", "orthogonal", "irnn", "lstm", "lstm bias 1", "lstm chrono", "gru")
ALL = (*RECURRENT, "transformer", "markov 3", "growing")


def naive(net, task, settings):
    """The same training written out: clipping, update, evaluation over single sequences."""
    generator = torch.Generator().manual_seed(settings.seed)
    kind = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}[settings.optimizer]
    optimizer = kind(net.parameters(), lr=settings.lr)
    x, y = evaluation_set(task, settings.evaluation_size, seed=settings.seed)
    train, evaluated = [], []
    for step in range(settings.steps):
        inputs, targets = task.batch(settings.batch_size, generator)
        loss = task.loss(net(inputs), targets)
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        total = float(torch.stack([g.norm() for g in gradients]).norm())
        for parameter, gradient in zip(net.parameters(), gradients, strict=True):
            parameter.grad = gradient * min(1.0, settings.clip_norm / (total + 1e-6))
        optimizer.step()
        train.append(float(loss.detach()))
        if (step + 1) % settings.evaluate_every == 0 or step + 1 == settings.steps:
            with torch.no_grad():
                losses = [float(task.loss(net(x[i : i + 1]), y[i : i + 1])) for i in range(len(x))]
            evaluated.append(np.mean(losses))
    return train, evaluated


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
@pytest.mark.parametrize(
    ("net", "task"),
    [("tanh", AddingTask(length=6)), ("lstm chrono", CopyTask(T=3)), ("gru", WriteQueryTask(length=6))],
    ids=["adding", "copy", "query"],
)
def test_equals_a_naive_loop(net, task, optimizer):
    how = LearnSettings(steps=7, batch_size=5, evaluate_every=3, evaluation_size=30, optimizer=optimizer, seed=3)
    ours, theirs = (memory_net(net, task, hidden=6, horizon=6, seed=1) for _ in range(2))
    result = learn(ours, task, how, device=CPU, record_every=2, timesteps=2)
    train, evaluated = naive(theirs, task, how)
    assert result.steps.tolist() == [3, 6, 7]
    _, targets = evaluation_set(task, 30, seed=3)
    scale = task.baseline / float(targets.double().var(correction=0)) if net == "tanh" else 1.0
    np.testing.assert_allclose(result.losses, scale * np.array(evaluated), rtol=1e-4)
    np.testing.assert_allclose(
        result.train_losses, [np.mean(train[:3]), np.mean(train[3:6]), np.mean(train[6:])], rtol=1e-4
    )
    assert result.parameters == parameter_count(theirs)
    assert result.trace.timesteps["step"].unique().tolist() == [0, 2, 4, 6]
    assert result.trace.timesteps["t"].max() == task.steps - 1


def test_watching_changes_the_run_by_rounding_only():
    task, how = AddingTask(length=12), LearnSettings(steps=5, evaluate_every=5, evaluation_size=50)
    watched, bare = (
        learn(memory_net("lstm", task, hidden=8, horizon=12, seed=0), task, how, device=CPU, **options)
        for options in ({"record_every": 1, "timesteps": 4}, {})
    )
    np.testing.assert_allclose(watched.losses, bare.losses, rtol=1e-5)
    assert len(bare.trace.timesteps) == len(bare.trace.layers) == 0


def test_recorded_gradients_are_autograds():
    task, how = AddingTask(length=5), LearnSettings(steps=1, batch_size=4, evaluation_size=2)
    net = memory_net("tanh", task, hidden=3, horizon=5, seed=0)
    w = {name: p.detach().clone() for name, p in net.named_parameters()}
    got = learn(net, task, how, device=CPU, record_every=1, timesteps=1).trace.timesteps.set_index("t")["grad_norm"]
    x, y = task.batch(4, torch.Generator().manual_seed(0))
    h, states = torch.zeros(4, 3), []
    for t in range(5):
        before = x[:, t] @ w["core.weight_ih_l0"].T + w["core.bias_ih_l0"] + w["core.bias_hh_l0"]
        h = torch.tanh(before + h @ w["core.weight_hh_l0"].T).requires_grad_(True)
        h.retain_grad()
        states.append(h)
    task.loss(h @ w["head.weight"].T + w["head.bias"], y).backward()
    assert got.tolist() == pytest.approx([float(state.grad.norm()) for state in states], rel=1e-4)


def test_training_ends_at_success_and_says_when():
    task = RecallTask(length=3)
    how = LearnSettings(steps=400, lr=0.02, target=0.05, evaluate_every=10, evaluation_size=100)
    told = []
    net = memory_net("gru", task, hidden=8, horizon=3, seed=0)
    result = learn(net, task, how, device=CPU, on_step=lambda *a: told.append(a))
    assert result.solved_at is not None
    assert result.solved_at == result.steps[-1] == len(told) < 400
    assert result.losses[-1] < 0.05 <= result.losses[:-1].min()


def test_without_success_the_cap_is_reached():
    task = AddingTask(length=20)
    how = LearnSettings(steps=4, target=1e-9, evaluate_every=3, evaluation_size=20)
    result = learn(memory_net("tanh", task, hidden=4, horizon=20, seed=0), task, how, device=CPU)
    assert (result.solved_at, result.steps.tolist(), result.status) == (None, [3, 4], "done")


def test_a_loss_that_is_not_finite_is_a_result():
    task = AddingTask(length=30)
    how = LearnSettings(steps=50, lr=1e20, clip_norm=0.0, evaluate_every=20, evaluation_size=20)
    result = learn(memory_net("irnn", task, hidden=4, horizon=30, seed=0), task, how, device=CPU)
    assert result.status == "diverged"
    assert len(result.losses) == 0


def test_evaluation_is_independent_of_the_batch_and_gives_the_mode_back():
    task = CopyTask(T=4)
    x, y = evaluation_set(task, 25)
    net = memory_net("gru", task, hidden=5, horizon=4, seed=0).train()
    whole = evaluate_loss(net, task, x, y)
    assert evaluate_loss(net, task, x, y, batch_size=7) == pytest.approx(whole, rel=1e-6)
    assert net.training


def test_own_baseline_is_the_best_constant_of_the_set():
    task = AddingTask(length=10)
    _, y = evaluation_set(task, 200)
    constants = torch.linspace(0.5, 1.5, 2001)
    best = min(float((y - constant).square().mean()) for constant in constants)
    assert own_baseline(task, y) == pytest.approx(best, rel=1e-4)
    copy = CopyTask(T=5)
    assert own_baseline(copy, evaluation_set(copy, 10)[1]) == copy.baseline


def test_chrono_and_bias_1_are_set_and_nothing_else():
    task = AddingTask(length=50)
    plain, bias, chrono = (
        memory_net(name, task, hidden=16, horizon=50, seed=4).core for name in ("lstm", "lstm bias 1", "lstm chrono")
    )
    for name in ("weight_ih_l0", "weight_hh_l0"):
        assert torch.equal(getattr(plain, name), getattr(bias, name))
        assert torch.equal(getattr(plain, name), getattr(chrono, name))
    forget = (bias.bias_ih_l0 + bias.bias_hh_l0)[16:32]
    assert torch.equal(forget, torch.ones(16))
    i, f, _, _ = (chrono.bias_ih_l0 + chrono.bias_hh_l0).chunk(4)
    assert torch.equal(i, -f)
    assert 0 <= f.min() < f.max() <= math.log(49)


def test_the_irnn_begins_as_the_identity():
    core = memory_net("irnn", AddingTask(), hidden=8, horizon=9, seed=0).core
    assert torch.equal(core.weight_hh_l0, torch.eye(8))
    assert core.nonlinearity == "relu"


@pytest.mark.parametrize("name", ALL, ids=str)
def test_a_watched_step_runs_on_meta_so_nothing_waits_for_the_device(name):
    task = WriteQueryTask(length=6) if name in ("transformer", "markov 3", "growing") else AddingTask(length=6)
    with torch.device("meta"):
        net = memory_net(name, task, hidden=4, horizon=6, seed=None)
    how = LearnSettings(steps=2, batch_size=3, evaluate_every=1, target=0.1)
    timesteps = 2 if name in RECURRENT else 0
    result = learn(net, task, how, device=torch.device("meta"), record_every=1, timesteps=timesteps)
    assert result.solved_at is None
    assert result.trace.info["steps_closed"] == 2


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: memory_net("elman", AddingTask(), hidden=4, horizon=9, seed=0), "Unknown net 'elman'"),
        (lambda: memory_net("markov 0", WriteQueryTask(), hidden=4, horizon=9, seed=0), "at least 1 step; got 'markov"),
        (lambda: memory_net("markov x", WriteQueryTask(), hidden=4, horizon=9, seed=0), "at least 1 step; got 'markov"),
        (lambda: memory_net("growing", CopyTask(), hidden=4, horizon=9, seed=0), "wants one at every step"),
        (lambda: memory_net("lstm chrono", AddingTask(), hidden=4, horizon=2, seed=0), "t_max is 2"),
        (lambda: LearnSettings(optimizer="adan"), "Unknown optimizer 'adan'. Did you mean 'adam'"),
        (lambda: LearnSettings(steps=0), "steps=0 must be a whole number of at least 1"),
        (lambda: LearnSettings(batch_size="3"), "batch_size='3' must be a whole number"),
        (lambda: LearnSettings(lr=math.nan), "lr=nan must be a finite number"),
        (lambda: LearnSettings(target=-1.0), "target=-1.0 must be a finite number"),
    ],
    ids=["net", "k=0", "k=x", "heads", "horizon", "optimizer", "steps", "batch", "lr", "target"],
)
def test_bad_input_is_one_sentence(call, text):
    with pytest.raises(UsageError, match=text):
        call()
