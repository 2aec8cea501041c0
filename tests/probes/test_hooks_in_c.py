"""What hooks in C must leave to Python, and what must not be lost between the two languages."""

import gc
import time

import pytest
import torch

from gradlab.probes import native

hooks = native.hooks()
pytestmark = pytest.mark.skipif(hooks is None, reason="no C++ compiler or no Python headers here")


def nothing(*_):
    return None


@pytest.fixture
def make():
    """Make a Rows with memory and an Outputs that records into it; the memory is kept as long as the test runs."""
    kept = []

    def build(slow_gradient=nothing):
        memory = torch.full((16, 8), float("nan"), dtype=torch.float64)
        rows, gate = hooks.Rows(nothing), hooks.CallGate(without_grad=False)
        rows.place(memory.data_ptr(), len(memory))
        outputs = hooks.Outputs(gate, rows, slow_gradient, nothing, nothing, lambda _: -1)
        hook = hooks.OutputHook(outputs, "layer", nothing, None)
        hook.know(object, 0)
        gate.recording = True
        kept.append(memory)
        return rows, outputs, hook, memory

    return build


def output():
    return torch.ones(100, requires_grad=True) * 2


def fails(error):
    def slow(*_):
        raise error

    return slow


def test_an_error_while_a_gradient_is_recorded_reaches_the_one_who_called_backward(make):
    _, _, hook, _ = make(fails(MemoryError("no room")))
    y = output()
    hook(object(), (), y)
    with pytest.raises(RuntimeError, match=r"could not record a gradient: MemoryError: no room"):
        y.sum().backward()  # the gradient of a sum is expanded: not one for C


def test_ctrl_c_while_a_gradient_is_recorded_is_not_lost(make):
    _, _, hook, _ = make(fails(KeyboardInterrupt()))
    y = output()
    hook(object(), (), y)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - it comes between two lines
        y.sum().backward()
        time.sleep(1)


def test_a_graph_that_outlives_what_recorded_it_does_no_harm(make):
    rows, outputs, hook, memory = make()
    y = output()
    hook(object(), (), y)
    assert memory[0, 2].item() == 400  # sum of squares of 100 times 2
    del rows, outputs, hook
    gc.collect()
    y.backward(torch.ones(100))
    assert torch.isnan(memory[1]).all()


def test_a_graph_run_twice_is_told_as_such_and_late_gradients_belong_to_no_step(make):
    _, outputs, hook, memory = make()
    y = output()
    hook(object(), (), y)
    y.backward(torch.full((100,), 3.0), retain_graph=True)
    outputs.take()
    y.backward(torch.full((100,), 5.0))
    assert memory[1, 2].item() == 900
    assert torch.isnan(memory[2]).all()


def test_tensors_that_are_not_what_lies_in_their_memory_are_left_to_python(make):
    rows, *_ = make()
    x = torch.arange(6.0)
    assert rows.reduce(x, 0) == 0
    for other in (torch._neg_view(x), x.to(torch.float64), x.expand(3, 6), x[::2], x[:0], x.to("meta"), x.to_sparse()):
        assert rows.reduce(other, 0) == -1
    seen = []
    torch.func.vmap(lambda row: seen.append(rows.reduce(row, 0)) or row)(torch.ones(2, 3))
    torch.func.grad(lambda row: (seen.append(rows.reduce(row, 0)), row.sum())[1])(x)
    assert seen == [-1, -1]


def test_a_freed_tensor_is_not_taken_for_the_next_one_in_its_place(make):
    rows, *_ = make()
    slots = []
    for value in range(6):
        x = torch.full((64,), float(value))  # where the one before lay, most likely
        slots.append(rows.reduce_shared(x))
        del x
    assert slots == list(range(6))


def test_a_changed_tensor_is_read_again_and_a_view_of_all_of_it_is_not(make):
    rows, *_ = make()
    x = torch.ones(4, 4)
    assert rows.reduce_shared(x) == rows.reduce_shared(x) == rows.reduce_shared(x.view(16)) == 0
    x.add_(1)
    assert rows.reduce_shared(x) == 1
    assert rows.reduce_shared(x[:2]) == 2
