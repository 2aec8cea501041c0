"""What all sequence tasks promise: one interface, seeds, the meta device, clear refusals."""

from __future__ import annotations

import math

import pytest
import torch

from gradlab.errors import UsageError
from gradlab.nets import CausalTransformer, GrowingContextNet, MarkovNet, SequenceNet
from gradlab.tasks import (
    EVALUATION_SEQUENCES,
    AddingTask,
    CopyTask,
    RecallTask,
    WriteQueryTask,
    evaluation_set,
    load_pixel_digits,
)

GENERATED = {
    "adding": AddingTask(length=8),
    "adding-shortest": AddingTask(length=2),
    "copy": CopyTask(T=5, remember=3),
    "copy-shortest": CopyTask(T=1, remember=1, symbols=2),
    "write-query": WriteQueryTask(length=8, p_write=0.3),
    "write-query-token": WriteQueryTask(length=8, p_write=0.3, query=True),
    "recall": RecallTask(length=8, symbols=3),
    "recall-blank": RecallTask(length=2, distractors=False),
}
TASKS = {
    **GENERATED,
    "pixels": load_pixel_digits(size=4),
    "permuted": load_pixel_digits(size=4, permuted=True),
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", TASKS, ids=TASKS.keys())
def test_a_generator_fixes_the_batch_and_the_random_state_stays(name: str) -> None:
    task = TASKS[name]
    state = torch.get_rng_state()
    a, b, c = (task.batch(64, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], c[0])


@pytest.mark.parametrize("name", TASKS, ids=TASKS.keys())
def test_one_generator_goes_on_with_other_sequences(name: str) -> None:
    generator = seeded(0)
    first, second = (TASKS[name].batch(64, generator)[0] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", TASKS, ids=TASKS.keys())
def test_without_a_generator_the_global_one_draws(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        x, y = TASKS[name].batch(6)
    expected = TASKS[name].batch(6, seeded(5))
    assert torch.equal(x, expected[0])
    assert torch.equal(y, expected[1])


@pytest.mark.parametrize("name", TASKS, ids=TASKS.keys())
def test_shapes_and_types_are_what_the_task_says(name: str) -> None:
    task = TASKS[name]
    x, y = task.batch(6, seeded(0))
    assert x.shape[:2] == (6, task.steps)
    if x.is_floating_point():
        assert x.shape[2] == task.input_size
    else:
        assert x.dtype == torch.int64
        assert 0 <= x.min() <= x.max() < task.input_size
    if y.is_floating_point():
        assert y.shape == (6, task.outputs)
    else:
        assert y.dtype == torch.int64
        assert y.shape == ((6,) if task.head == "last" else (6, task.steps))
        assert 0 <= y.min() <= y.max() < task.outputs


MODELS = {
    "rnn": lambda task: SequenceNet(
        "rnn", input_size=task.input_size, hidden_size=6, outputs=task.outputs, head=task.head
    ),
    "sigmoid": lambda task: SequenceNet(
        "rnn", input_size=task.input_size, hidden_size=6, outputs=task.outputs, head=task.head, nonlinearity="sigmoid"
    ),
    "lstm": lambda task: SequenceNet(
        "lstm", input_size=task.input_size, hidden_size=6, outputs=task.outputs, head=task.head
    ),
    "gru": lambda task: SequenceNet(
        "gru", input_size=task.input_size, hidden_size=6, outputs=task.outputs, head=task.head
    ),
    "transformer": lambda task: CausalTransformer(
        input_size=task.input_size, outputs=task.outputs, max_length=task.steps, width=8, head=task.head
    ),
    "markov": lambda task: MarkovNet(2, input_size=task.input_size, outputs=task.outputs),
    "growing": lambda task: GrowingContextNet(task.steps, input_size=task.input_size, outputs=task.outputs),
}
PAIRS = [
    (name, model)
    for name, task in TASKS.items()
    for model in MODELS
    if task.head == "last" or model not in ("markov", "growing")
]


@pytest.mark.parametrize(("name", "model"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_training_step_on_meta_never_reads_a_value(name: str, model: str) -> None:
    task = TASKS[name].to("meta")
    with torch.device("meta"):
        net = MODELS[model](task)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x, y = task.batch(4, torch.Generator())  # on the meta device nothing is drawn
    assert x.is_meta
    assert y.is_meta
    loss = task.loss(net(x), y)
    assert loss.shape == ()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize(("name", "model"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_training_step_with_values_is_finite(name: str, model: str) -> None:
    task = TASKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = MODELS[model](task)
    x, y = task.batch(4, seeded(0))
    loss = task.loss(net(x), y)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_look_up_on_meta_never_reads_a_value() -> None:
    task = WriteQueryTask(length=8, device="meta")
    assert task.look_up(task.batch(4)[0], 3).shape == (4, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("name", TASKS, ids=TASKS.keys())
def test_a_batch_on_a_gpu_never_waits_for_the_host(name: str) -> None:
    task = TASKS[name].to("cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    task.batch(4, generator)
    torch.cuda.set_sync_debug_mode("error")
    try:
        x, y = task.batch(4, generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    again = [task.batch(4, torch.Generator("cuda").manual_seed(0))[0] for _ in range(2)]
    assert torch.equal(*again)
    assert x.is_cuda
    assert y.is_cuda


@pytest.mark.parametrize("n", [0, -1, 2.5, True], ids=str)
@pytest.mark.parametrize("name", TASKS, ids=TASKS.keys())
def test_a_batch_of_nothing_is_refused(name: str, n: object) -> None:
    with pytest.raises(UsageError, match=r"'n' is .*must be a whole number of at least 1"):
        TASKS[name].batch(n)


@pytest.mark.parametrize("name", GENERATED, ids=GENERATED.keys())
def test_a_generator_on_another_device_is_one_clear_error(name: str) -> None:
    with pytest.raises(UsageError, match=r"The generator is on cpu, but the task on cuda"):
        GENERATED[name].to("cuda").batch(2, torch.Generator())


@pytest.mark.parametrize("name", GENERATED, ids=GENERATED.keys())
def test_tasks_are_frozen_and_compare_by_value(name: str) -> None:
    task = GENERATED[name]
    assert task.to("cpu") == task
    assert task.to("meta") != task
    with pytest.raises(AttributeError):
        task.device = "meta"


class TestEvaluationSet:
    @pytest.mark.parametrize("name", GENERATED, ids=GENERATED.keys())
    def test_depends_on_the_seed_alone(self, name: str) -> None:
        state = torch.get_rng_state()
        a, b, c = (evaluation_set(GENERATED[name], 64, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(state, torch.get_rng_state())
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
        assert not torch.equal(a[0], c[0])

    def test_holds_20_000_sequences(self) -> None:
        assert EVALUATION_SEQUENCES == 20_000
        assert evaluation_set(AddingTask(length=2))[0].shape == (20_000, 2, 2)

    @pytest.mark.parametrize("seed", range(5), ids="seed{}".format)
    def test_holds_no_sequence_of_training_with_the_same_seed(self, seed: int) -> None:
        task = AddingTask(length=4)
        x, _ = evaluation_set(task, 2000, seed=seed)
        trained = task.batch(2000, seeded(seed))[0]
        both = torch.cat([x, trained])[..., 0]
        assert len(both.unique(dim=0)) == 4000

    def test_lies_on_the_tasks_device(self) -> None:
        x, y = evaluation_set(CopyTask(T=3, device="meta"), 5)
        assert x.is_meta
        assert y.is_meta

    def test_its_size_bounds_the_standard_error_of_the_adding_baseline(self) -> None:
        squared = (evaluation_set(AddingTask(length=2))[1].double() - 1).square()
        # sd of d^2 for d triangular on [-1, 1]: sqrt(1/15 - 1/36) = .1972
        assert squared.std().item() == pytest.approx(math.sqrt(7 / 180), rel=0.03)
        assert math.sqrt(7 / 180 / EVALUATION_SEQUENCES) == pytest.approx(0.0014, abs=5e-5)
        assert squared.mean().item() == pytest.approx(1 / 6, abs=3 * 0.0014)

    def test_refuses_digits_whose_batches_are_training_images(self) -> None:
        with pytest.raises(UsageError, match=r"evaluate on its test_set\(\)"):
            evaluation_set(TASKS["pixels"])

    def test_refuses_an_empty_set(self) -> None:
        with pytest.raises(UsageError, match="'n' is 0"):
            evaluation_set(AddingTask(), 0)
