"""Readable recurrent cells: equal to torch's fused modules, and to the equations written out entry by entry."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from gradlab.errors import UsageError
from gradlab.nets import GRUCell, LSTMCell, RNNCell, Unrolled, parameter_count

KINDS = {
    "rnn-tanh": lambda **k: nn.RNN(3, 5, batch_first=True, **k),
    "rnn-relu": lambda **k: nn.RNN(3, 5, batch_first=True, nonlinearity="relu", **k),
    "lstm": lambda **k: nn.LSTM(3, 5, batch_first=True, **k),
    "gru": lambda **k: nn.GRU(3, 5, batch_first=True, **k),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def redraw(module: nn.Module, seed: int = 1) -> nn.Module:
    """Weights of a size at which every gate matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return module


def fused(kind: str, dtype: torch.dtype, **settings: object) -> nn.RNNBase:
    return redraw(KINDS[kind](**settings).to(dtype))


def start(kind: str, layers: int, dtype: torch.dtype) -> Tensor | tuple[Tensor, Tensor]:
    h, c = normal(2, layers, 4, 5, seed=7, dtype=dtype)
    return (h, c) if kind == "lstm" else h


@pytest.mark.parametrize("given_state", [True, False], ids=["state", "no-state"])
@pytest.mark.parametrize("layers", [1, 2], ids="layers{}".format)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=KINDS.keys())
def test_equals_torchs_fused_module(kind: str, dtype: torch.dtype, layers: int, given_state: bool) -> None:
    module = fused(kind, dtype, num_layers=layers)
    twin = Unrolled.copy_of(module)
    x = normal(4, 9, 3, dtype=dtype).requires_grad_()
    state = start(kind, layers, dtype) if given_state else None
    tolerance = {"rtol": 0, "atol": TOLERANCE[dtype]}
    results = []
    for net in (module, twin):
        output, last = net(x, state)
        cotangent = normal(*output.shape, seed=5, dtype=dtype)
        gradient = torch.autograd.grad((output * cotangent).sum(), [x, *net.parameters()])
        results.append((output, last, gradient))
    torch.testing.assert_close(results[1][0], results[0][0], **tolerance)
    torch.testing.assert_close(results[1][1], results[0][1], **tolerance)
    assert isinstance(results[1][1], tuple) == (kind == "lstm")
    # Gradients are sums over 36 terms of size 1.
    torch.testing.assert_close(results[1][2], results[0][2], rtol=0, atol=20 * TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"], ids=str)
def test_same_seed_gives_torchs_own_initial_weights(kind: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        ours = list(Unrolled(kind, 3, 5, layers=2).parameters())
        torch.manual_seed(3)
        theirs = list({"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[kind](3, 5, 2).parameters())
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(RNNCell, nn.RNNCell), (LSTMCell, nn.LSTMCell), (GRUCell, nn.GRUCell)],
    ids=["rnn", "lstm", "gru"],
)
def test_cells_load_torchs_cells(ours: type[nn.Module], theirs: type[nn.Module]) -> None:
    reference = redraw(theirs(3, 5).double())
    cell = ours(3, 5).double()
    cell.load_state_dict(reference.state_dict(), strict=True)
    h, c = normal(2, 4, 5)
    state = (h, c) if ours is LSTMCell else h
    torch.testing.assert_close(cell(normal(4, 3), state), reference(normal(4, 3), state), rtol=0, atol=1e-12)


def sigma(z: float) -> float:
    return 1 / (1 + math.exp(-z))


PHI = {"tanh": math.tanh, "relu": lambda z: max(z, 0.0), "sigmoid": sigma}


def affine(cell: nn.Module, row: int, x: list[float]) -> float:
    return sum(w * v for w, v in zip(cell.weight_ih[row].tolist(), x, strict=True)) + cell.bias_ih[row].item()


def recur(cell: nn.Module, row: int, h: list[float]) -> float:
    return sum(w * v for w, v in zip(cell.weight_hh[row].tolist(), h, strict=True)) + cell.bias_hh[row].item()


@pytest.mark.parametrize("nonlinearity", PHI, ids=PHI.keys())
def test_rnn_cell_entry_by_entry(nonlinearity: str) -> None:
    cell = redraw(RNNCell(3, 5, nonlinearity=nonlinearity).double())
    x, h = normal(3), normal(5, seed=1)
    expected = [PHI[nonlinearity](affine(cell, j, x.tolist()) + recur(cell, j, h.tolist())) for j in range(5)]
    assert cell(x[None], h[None])[0].tolist() == pytest.approx(expected, abs=1e-14)


def test_lstm_cell_entry_by_entry() -> None:
    cell = redraw(LSTMCell(3, 5).double())
    x, h, c = normal(3).tolist(), normal(5, seed=1).tolist(), normal(5, seed=2).tolist()
    hidden, memory = [], []
    for j in range(5):
        i, f, g, o = (affine(cell, 5 * block + j, x) + recur(cell, 5 * block + j, h) for block in range(4))
        memory.append(sigma(f) * c[j] + sigma(i) * math.tanh(g))
        hidden.append(sigma(o) * math.tanh(memory[-1]))
    row = lambda values: torch.tensor([values], dtype=torch.float64)  # noqa: E731
    h_new, c_new = cell(row(x), (row(h), row(c)))
    assert h_new[0].tolist() == pytest.approx(hidden, abs=1e-14)
    assert c_new[0].tolist() == pytest.approx(memory, abs=1e-14)


def test_gru_cell_entry_by_entry() -> None:
    cell = redraw(GRUCell(3, 5).double())
    x, h = normal(3).tolist(), normal(5, seed=1).tolist()
    hidden = []
    for j in range(5):
        r = sigma(affine(cell, j, x) + recur(cell, j, h))
        z = sigma(affine(cell, 5 + j, x) + recur(cell, 5 + j, h))
        n = math.tanh(affine(cell, 10 + j, x) + r * recur(cell, 10 + j, h))
        hidden.append((1 - z) * n + z * h[j])
    row = lambda values: torch.tensor([values], dtype=torch.float64)  # noqa: E731
    assert cell(row(x), row(h))[0].tolist() == pytest.approx(hidden, abs=1e-14)


def test_cutting_h_in_the_gates_leaves_the_product_of_forget_gates() -> None:
    cell = redraw(LSTMCell(3, 5).double())
    c0 = normal(4, 5, seed=1).requires_grad_()
    h, c, product = normal(4, 5, seed=2), c0, torch.ones(4, 5, dtype=torch.float64)
    for x in normal(20, 4, 3, seed=3):
        gates = cell.gates(x, h.detach())
        h, c = cell.next_state(gates, c)
        product = product * gates.forget.detach()
    (gradient,) = torch.autograd.grad(c.sum(), c0)
    torch.testing.assert_close(gradient, product, rtol=1e-13, atol=0)


@pytest.mark.parametrize("core", ["lstm", "gru"], ids=str)
def test_sigmoid_is_refused_where_gates_fix_it(core: str) -> None:
    with pytest.raises(UsageError, match=f"'sigmoid' was asked for with core '{core}'"):
        Unrolled(core, 3, 5, nonlinearity="sigmoid")


def test_parameters_are_one_to_three_to_four() -> None:
    counts = [parameter_count(Unrolled(core, 64, 128)) for core in ("rnn", "gru", "lstm")]
    assert counts == [24_832, 74_496, 99_328]
    stock = [parameter_count(module(64, 128)) for module in (nn.RNN, nn.GRU, nn.LSTM)]
    assert counts == stock


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"], ids=str)
def test_training_step_on_meta_needs_no_values(kind: str) -> None:
    with torch.device("meta"):
        net = Unrolled(kind, 3, 5, layers=2)
        optimizer = torch.optim.Adam(net.parameters())
        net(torch.empty(4, 6, 3))[0].square().mean().backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())


def test_copy_of_is_a_copy_that_leaves_the_random_state_alone() -> None:
    module = fused("gru", torch.float64)
    state = torch.get_rng_state()
    twin = Unrolled.copy_of(module)
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        module.weight_hh_l0.zero_()
    assert twin.cells[0].weight_hh.abs().min() > 0
    assert all(p.requires_grad and p.dtype == torch.float64 for p in twin.parameters())


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.GRU(3, 5, bidirectional=True), "A GRU with bidirectional has no unrolled twin"),
        (nn.LSTM(3, 5, proj_size=2), "A LSTM with proj_size"),
        (nn.LSTM(3, 5, num_layers=2, dropout=0.1, bias=False), "with dropout and bias=False"),
    ],
    ids=["bidirectional", "projection", "dropout-and-no-bias"],
)
def test_modules_without_a_twin_are_refused(module: nn.RNNBase, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Unrolled.copy_of(module)


@pytest.mark.parametrize("shape", [(2, 0, 3), (2, 4, 4), (4, 3)], ids=str)
def test_wrong_inputs_are_one_clear_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"takes \(N, T, 3\) with at least one step"):
        Unrolled("rnn", 3, 5)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"core": "ltsm"}, r"Unknown core 'ltsm'\. Did you mean 'lstm'"),
        ({"nonlinearity": "sigmoids"}, "Did you mean 'sigmoid'"),
        ({"layers": 0}, "'layers' is 0"),
        ({"hidden_size": 0}, "'hidden_size' is 0"),
    ],
    ids=["core", "nonlinearity", "layers", "hidden"],
)
def test_wrong_settings_are_one_clear_error(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Unrolled(**({"core": "rnn", "input_size": 3, "hidden_size": 5} | settings))


@pytest.mark.parametrize("cell", [RNNCell, LSTMCell, GRUCell], ids=["rnn", "lstm", "gru"])
def test_a_cell_of_no_unit_is_refused(cell: type[nn.Module]) -> None:
    with pytest.raises(UsageError, match="'hidden_size' is 0"):
        cell(3, 0)
