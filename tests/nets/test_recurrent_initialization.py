"""Recurrent initialisations: moments and shapes by formula, gate biases read off the gates themselves."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from gradlab.errors import UsageError
from gradlab.nets import (
    GRUCell,
    LSTMCell,
    RNNCell,
    Unrolled,
    chrono_init,
    initialize_recurrent,
    set_forget_bias,
    set_update_bias,
)

MODULES = {
    "rnn": (lambda: nn.RNN(30, 200), 1),
    "lstm": (lambda: nn.LSTM(30, 200), 4),
    "gru": (lambda: nn.GRU(30, 200), 3),
    "own-lstm": (lambda: Unrolled("lstm", 30, 200).cells[0], 4),
    "torch-gru-cell": (lambda: nn.GRUCell(30, 200), 3),
}


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by name, without the layer's number."""
    return {name.removesuffix("_l0"): parameter.detach() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("kind", MODULES, ids=MODULES.keys())
def test_gaussian_has_the_variance_of_its_gain(kind: str) -> None:
    make, _ = MODULES[kind]
    found = weights(initialize_recurrent(make(), "gaussian", gain=1.5, input_gain=0.5, seed=0))
    for name, std in (("weight_hh", 1.5 / math.sqrt(200)), ("weight_ih", 0.5 / math.sqrt(30))):
        count = found[name].numel()
        assert found[name].std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * count))
        assert abs(found[name].mean().item()) < 4 * std / math.sqrt(count)
    assert not found["bias_ih"].any()
    assert not found["bias_hh"].any()


@pytest.mark.parametrize("kind", MODULES, ids=MODULES.keys())
def test_orthogonal_blocks_are_orthogonal_and_differ(kind: str) -> None:
    make, gates = MODULES[kind]
    blocks = weights(initialize_recurrent(make().double(), "orthogonal", gain=0.9, seed=0))["weight_hh"].chunk(gates)
    identity = torch.eye(200, dtype=torch.float64)
    for block in blocks:
        torch.testing.assert_close(block @ block.T, 0.81 * identity, rtol=0, atol=1e-12)
    assert all(not torch.allclose(a, b) for a, b in pairwise(blocks))


@pytest.mark.parametrize("kind", MODULES, ids=MODULES.keys())
def test_identity_blocks_are_the_identity(kind: str) -> None:
    make, gates = MODULES[kind]
    found = weights(initialize_recurrent(make(), "identity", seed=0))
    for block in found["weight_hh"].chunk(gates):
        assert torch.equal(block, torch.eye(200))
    assert found["weight_ih"].abs().min() > 0
    assert not found["bias_ih"].any()


def test_irnn_adds_up_its_inputs() -> None:
    irnn = initialize_recurrent(nn.RNN(3, 5, nonlinearity="relu", batch_first=True).double(), "identity", seed=0)
    x = torch.rand(2, 40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        irnn.weight_ih_l0.abs_()
        expected = (x @ irnn.weight_ih_l0.T).cumsum(1)
    torch.testing.assert_close(irnn(x)[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", MODULES, ids=MODULES.keys())
def test_default_is_torchs_uniform(kind: str) -> None:
    make, _ = MODULES[kind]
    found = weights(initialize_recurrent(make(), "default", gain=2.0, input_gain=3.0, seed=0))
    for name, factor in (("weight_hh", 2.0), ("weight_ih", 3.0), ("bias_ih", 1.0), ("bias_hh", 1.0)):
        values = found[name] * math.sqrt(200) / factor
        assert values.abs().max() <= 1 + 1e-6
        assert values.square().mean().item() == pytest.approx(1 / 3, rel=4 / math.sqrt(values.numel()))


@pytest.mark.parametrize("rho", [0.9, 1.0, 1.1], ids="rho{}".format)
def test_linear_regime_with_orthogonal_weights_has_gradients_rho_to_the_lag(rho: float) -> None:
    rnn = initialize_recurrent(nn.RNN(2, 6, nonlinearity="relu").double(), "orthogonal", gain=rho, seed=0)
    cell = RNNCell(2, 6, nonlinearity="relu").double()
    cell.load_state_dict({name: weights(rnn)[name] for name in cell.state_dict()})
    with torch.no_grad():
        cell.bias_ih.fill_(1e9)  # every unit stays in ReLU's linear half
    h0 = torch.ones(1, 6, dtype=torch.float64, requires_grad=True)
    h = h0
    for _ in range(30):
        h = cell(torch.zeros(1, 2, dtype=torch.float64), h)
        assert (h > 0).all()
        # Large values go on growing; only the slope matters here.
        h = h - h.detach()
    (gradient,) = torch.autograd.grad(h[0, 0], h0)
    assert gradient.norm().item() == pytest.approx(rho**30, rel=1e-10)


@pytest.mark.parametrize("scheme", ["default", "gaussian", "orthogonal", "identity"], ids=str)
def test_a_seed_fixes_the_weights_and_leaves_the_random_state_alone(scheme: str) -> None:
    state = torch.get_rng_state()
    build = lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True)  # noqa: E731
    a, b = build(), build()
    before = torch.get_rng_state()
    for module in (a, b):
        initialize_recurrent(module, scheme, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    changed = initialize_recurrent(build(), scheme, seed=6)
    assert not torch.equal(changed.weight_ih_l1_reverse, a.weight_ih_l1_reverse)
    torch.set_rng_state(state)


def test_without_a_seed_the_global_generator_draws() -> None:
    drawn = []
    with torch.random.fork_rng():
        for _ in range(2):
            module = nn.RNN(2, 3)
            torch.manual_seed(0)
            drawn.append(initialize_recurrent(module, "gaussian").weight_hh_l0.clone())
    assert torch.equal(*drawn)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_keeps_the_dtype_and_other_layers(dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"core": nn.GRU(2, 4), "head": nn.Linear(4, 1)}).to(dtype)
    head = model["head"].weight.clone()
    initialize_recurrent(model, "orthogonal", seed=0)
    chrono_init(model, 50, seed=0)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(head, model["head"].weight)


LSTMS = {
    "fused": lambda: nn.LSTM(3, 5),
    "two-layers-bidirectional": lambda: nn.LSTM(3, 5, num_layers=2, bidirectional=True),
    "torch-cell": lambda: nn.LSTMCell(3, 5),
    "own": lambda: Unrolled("lstm", 3, 5, layers=2),
    "inside": lambda: nn.ModuleDict({"core": nn.LSTM(3, 5), "head": nn.Linear(5, 1)}),
}
GRUS = {
    "fused": lambda: nn.GRU(3, 5),
    "two-layers-bidirectional": lambda: nn.GRU(3, 5, num_layers=2, bidirectional=True),
    "torch-cell": lambda: nn.GRUCell(3, 5),
    "own": lambda: Unrolled("gru", 3, 5, layers=2),
}


def bias_sums(module: nn.Module, gates: int) -> list[tuple[torch.Tensor, ...]]:
    """The sum of the two biases of every layer and direction, by gate."""
    named = dict(module.named_parameters())
    return [
        (bias + named[name.replace("bias_ih", "bias_hh")]).detach().chunk(gates)
        for name, bias in named.items()
        if "bias_ih" in name
    ]


@pytest.mark.parametrize("value", [0.0, 1.0, 2.0, -1.0, 3], ids=str)
def test_the_actual_forget_gate_opens_to_sigma_of_the_bias(value: float) -> None:
    lstm = set_forget_bias(nn.LSTM(3, 5, batch_first=True).double(), value)
    gates = Unrolled.copy_of(lstm).cells[0].gates(torch.zeros(2, 3).double(), torch.zeros(2, 5).double())
    torch.testing.assert_close(gates.forget, torch.full((2, 5), 1 / (1 + math.exp(-value))).double())
    # And by the fused module alone: with c_0 = a and then c_0 = 0, c_1 differs by f a.
    x, h = torch.zeros(1, 1, 3).double(), torch.zeros(1, 1, 5).double()
    kept = lstm(x, (h, torch.ones_like(h)))[1][1] - lstm(x, (h, h))[1][1]
    torch.testing.assert_close(kept.flatten(), torch.full((5,), 1 / (1 + math.exp(-value))).double())


@pytest.mark.parametrize("value", [0.0, 1.0, 2.0], ids=str)
def test_the_actual_update_gate_keeps_sigma_of_the_bias(value: float) -> None:
    gru = set_update_bias(nn.GRU(3, 5, batch_first=True).double(), value)
    with torch.no_grad():
        gru.weight_hh_l0.zero_()  # so that h acts through z h alone
    x, h = torch.zeros(1, 1, 3).double(), torch.zeros(1, 1, 5).double()
    kept = gru(x, torch.ones_like(h))[1] - gru(x, h)[1]
    torch.testing.assert_close(kept.flatten(), torch.full((5,), 1 / (1 + math.exp(-value))).double())


@pytest.mark.parametrize("kind", LSTMS, ids=LSTMS.keys())
def test_forget_bias_is_set_everywhere_and_nothing_else_is(kind: str) -> None:
    module = LSTMS[kind]()
    before = {name: p.clone() for name, p in module.named_parameters()}
    assert set_forget_bias(module, 1.25) is module
    for _, forget, _, _ in bias_sums(module, 4):
        assert torch.equal(forget, torch.full((5,), 1.25))
    for name, parameter in module.named_parameters():
        same = parameter == before[name]
        if "bias" in name and "head" not in name:
            same = torch.cat([same[:5], same[10:]])
        assert same.all(), name


@pytest.mark.parametrize("kind", LSTMS, ids=LSTMS.keys())
def test_chrono_lstm_biases(kind: str) -> None:
    module = LSTMS[kind]()
    before = [(g, o) for _, _, g, o in bias_sums(module, 4)]
    sums = bias_sums(chrono_init(module, 100, seed=0), 4)
    for (i, f, g, o), (g0, o0) in zip(sums, before, strict=True):
        assert torch.equal(i, -f)
        assert 0 <= f.min() <= f.max() <= math.log(99)
        assert torch.equal(g, g0)
        assert torch.equal(o, o0)
    forget = torch.stack([f for _, f, _, _ in sums])
    assert len(forget.unique()) == forget.numel()


@pytest.mark.parametrize("kind", GRUS, ids=GRUS.keys())
def test_chrono_gru_biases_keep_the_memory(kind: str) -> None:
    module = GRUS[kind]()
    before = [(r, n) for r, _, n in bias_sums(module, 3)]
    sums = bias_sums(chrono_init(module, 100, seed=0), 3)
    for (r, z, n), (r0, n0) in zip(sums, before, strict=True):
        assert 0 <= z.min() <= z.max() <= math.log(99)
        assert torch.equal(r, r0)
        assert torch.equal(n, n0)


@pytest.mark.parametrize(("cell", "gates"), [(LSTMCell, 4), (GRUCell, 3)], ids=["lstm", "gru"])
def test_chrono_draws_are_log_uniform(cell: type[nn.Module], gates: int) -> None:
    # Too many units for square weights: a bare holder of the biases is enough.
    t_max, holder = 50, cell(1, 1)
    holder.hidden_size = 20_000
    holder.bias_ih = nn.Parameter(torch.zeros(gates * 20_000, dtype=torch.float64))
    holder.bias_hh = nn.Parameter(torch.zeros(gates * 20_000, dtype=torch.float64))
    chrono_init(holder, t_max, seed=1)
    u = holder.bias_ih.detach().chunk(gates)[1].exp()
    # The empirical distribution against the uniform one on (1, 49): Kolmogorov's bound at level 1e-4.
    rank = torch.arange(1, 20_001, dtype=torch.float64) / 20_000
    assert ((u.sort().values - 1) / (t_max - 2) - rank).abs().max() < 2.23 / math.sqrt(20_000)


def test_chrono_takes_a_seed() -> None:
    state = torch.get_rng_state()
    a, b = LSTMCell(2, 6), LSTMCell(2, 6)
    before = torch.get_rng_state()
    chrono_init(a, 30, seed=3)
    chrono_init(b, 30, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a.bias_ih[:12], b.bias_ih[:12])
    chrono_init(b, 30, seed=4)
    assert not torch.equal(a.bias_ih[:12], b.bias_ih[:12])
    torch.set_rng_state(state)


def test_meta_weights_are_passed_over() -> None:
    with torch.device("meta"):
        for module in (nn.LSTM(2, 3), nn.GRU(2, 3)):
            initialize_recurrent(module, "orthogonal", seed=0)
            chrono_init(module, 30, seed=0)
        set_forget_bias(nn.LSTM(2, 3), 1.0)
        set_update_bias(nn.GRU(2, 3), 1.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: initialize_recurrent(nn.RNN(2, 3), "ortogonal"), "Did you mean 'orthogonal'"),
        (lambda: initialize_recurrent(nn.RNN(2, 3), "gaussian", gain=0), "The gain is 0"),
        (lambda: initialize_recurrent(nn.RNN(2, 3), "gaussian", input_gain=math.nan), "The input_gain is nan"),
        (lambda: initialize_recurrent(nn.Linear(2, 3), "gaussian"), "Linear holds no recurrent layer"),
        (lambda: initialize_recurrent(nn.LSTM(2, 3, proj_size=2), "identity"), "proj_size is 2"),
        (lambda: set_forget_bias(nn.GRU(2, 3), 1.0), "GRU holds no LSTM with biases"),
        (lambda: set_forget_bias(nn.LSTM(2, 3, bias=False), 1.0), "LSTM holds no LSTM with biases"),
        (lambda: set_forget_bias(nn.LSTM(2, 3), math.inf), "The bias is inf"),
        (lambda: set_update_bias(nn.LSTM(2, 3), 1.0), "LSTM holds no GRU with biases"),
        (lambda: chrono_init(nn.RNN(2, 3), 10), "RNN holds no LSTM or GRU with biases"),
        (lambda: chrono_init(nn.LSTM(2, 3), 2), "t_max is 2, but must be a finite number above 2"),
        (lambda: chrono_init(nn.LSTM(2, 3), math.nan), "t_max is nan"),
    ],
    ids=[
        "scheme", "gain", "input-gain", "no-recurrent", "projection", "forget-of-gru", "no-bias", "infinite",
        "update-of-lstm", "chrono-of-rnn", "t-max-2", "t-max-nan",
    ],
)  # fmt: skip
def test_wrong_settings_are_one_clear_error(call, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        call()
