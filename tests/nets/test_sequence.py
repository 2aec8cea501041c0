"""Whole sequence nets: shapes, the steps they can see (by gradient), seeds, the meta device, wrong input."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradlab.errors import UsageError
from gradlab.nets import CausalTransformer, GrowingContextNet, MarkovNet, SequenceNet, Unrolled, parameter_count

RECURRENT = {
    "rnn": {"core": "rnn"},
    "rnn-relu": {"core": "rnn", "nonlinearity": "relu"},
    "rnn-sigmoid": {"core": "rnn", "nonlinearity": "sigmoid"},
    "lstm": {"core": "lstm"},
    "gru": {"core": "gru"},
}
NETS = {
    **{
        name: (lambda kind=kind, **k: SequenceNet(input_size=3, hidden_size=6, outputs=2, layers=2, **kind, **k))
        for name, kind in RECURRENT.items()
    },
    "markov": lambda **k: MarkovNet(4, input_size=3, outputs=2, width=8, depth=2, **k),
    "growing": lambda **k: GrowingContextNet(7, input_size=3, outputs=2, width=8, **k),
    "transformer": lambda **k: CausalTransformer(
        input_size=3, outputs=2, max_length=9, width=8, layers=2, heads=2, **k
    ),
    "sinusoidal": lambda **k: CausalTransformer(
        input_size=3, outputs=2, max_length=9, width=8, positions="sinusoidal", **k
    ),
}
EVERY = ["rnn", "rnn-relu", "rnn-sigmoid", "lstm", "gru", "transformer", "sinusoidal"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NETS, ids=NETS.keys())
def test_tokens_are_one_hot_features(name: str) -> None:
    net = NETS[name](seed=0).double()
    x = tokens(5, 7)
    one_hot = (x[:, :, None] == torch.arange(3)).double()
    assert net(x).shape == (5, 2)
    assert torch.equal(net(x), net(one_hot))
    assert torch.equal(net(x), net(x.int()))


@pytest.mark.parametrize("name", EVERY, ids=str)
def test_a_head_on_every_step_ends_with_the_head_on_the_last(name: str) -> None:
    every, last = (NETS[name](head=head, seed=0).double() for head in ("every", "last"))
    x = normal(5, 7, 3)
    assert every(x).shape == (5, 7, 2)
    torch.testing.assert_close(every(x)[:, -1], last(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", EVERY, ids=str)
def test_no_output_depends_on_a_later_step_and_each_on_every_earlier_one(name: str) -> None:
    net = NETS[name](head="every", seed=0).double()
    x = normal(2, 7, 3).requires_grad_()
    y = net(x)
    for t in range(7):
        (gradient,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        norms = gradient.norm(dim=2)
        assert not norms[:, t + 1 :].any(), t
        assert (norms[:, : t + 1] > 0).all(), t


@pytest.mark.parametrize(("name", "seen"), [("markov", 4), ("growing", 7)], ids=["markov", "growing"])
def test_a_window_sees_its_last_steps_and_nothing_else(name: str, seen: int) -> None:
    net = NETS[name](seed=0).double()
    x = normal(64, 7, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(net(x).square().sum(), x)
    norms = gradient.norm(dim=(0, 2))
    assert not norms[: 7 - seen].any()
    assert (norms[7 - seen :] > 0).all()


@pytest.mark.parametrize("name", ["markov", "growing"], ids=str)
def test_a_short_sequence_is_padded_on_the_left_with_zeros(name: str) -> None:
    net = NETS[name](seed=0).double()
    x = normal(5, 2, 3)
    padded = torch.cat([torch.zeros(5, 5, 3, dtype=torch.float64), x], dim=1)
    assert torch.equal(net(x), net(padded))


def test_markov_is_the_mlp_of_its_window() -> None:
    net = MarkovNet(2, input_size=3, outputs=2, width=8, seed=0).double()
    x = normal(5, 7, 3)
    state = net.mlp.state_dict()
    hidden = (x[:, 5:].reshape(5, 6) @ state["stem.linear.weight"].T + state["stem.linear.bias"]).clamp(min=0)
    torch.testing.assert_close(net(x), hidden @ state["head.weight"].T + state["head.bias"])


@pytest.mark.parametrize("core", ["rnn", "lstm", "gru"], ids=str)
def test_cores_are_torchs_own_fused_modules(core: str) -> None:
    net = SequenceNet(core, input_size=3, hidden_size=6, outputs=2, seed=0).double()
    assert type(net.core) is {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[core]
    x = normal(5, 7, 3)
    expected = net.head(Unrolled.copy_of(net.core)(x)[0][:, -1])
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-12)
    assert torch.equal(net.features(x), net.core(x)[0])


def test_sigmoid_net_against_its_equation() -> None:
    net = SequenceNet("rnn", input_size=3, hidden_size=6, outputs=2, nonlinearity="sigmoid", seed=0).double()
    x, h = normal(5, 7, 3), torch.zeros(5, 6, dtype=torch.float64)
    p = {name.rsplit(".", 1)[1]: value for name, value in net.core.state_dict().items()}
    for step in range(7):
        z = x[:, step] @ p["weight_ih"].T + p["bias_ih"] + h @ p["weight_hh"].T + p["bias_hh"]
        h = 1 / (1 + (-z).exp())
    torch.testing.assert_close(net(x), h @ net.head.weight.T + net.head.bias)


def test_sizes_that_the_studies_print() -> None:
    recurrent = [
        parameter_count(SequenceNet(core, input_size=64, hidden_size=128, outputs=1).core)
        for core in ("rnn", "gru", "lstm")
    ]
    assert recurrent == [24_832, 3 * 24_832, 4 * 24_832] == [24_832, 74_496, 99_328]
    assert parameter_count(SequenceNet("rnn", input_size=4, hidden_size=32, outputs=2)) == 1282
    assert parameter_count(GrowingContextNet(64, input_size=4, outputs=2)) == 16_578
    assert parameter_count(MarkovNet(8, input_size=4, outputs=2)) == 32 * 64 + 64 + 130


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "identity"], ids=str)
def test_init_reaches_the_recurrent_weights(init: str) -> None:
    net = SequenceNet("rnn", input_size=3, hidden_size=40, outputs=2, init=init, gain=0.5, seed=0).double()
    weight = net.core.weight_hh_l0
    if init == "gaussian":
        assert weight.std().item() == pytest.approx(0.5 / 40**0.5, rel=0.1)
    else:
        torch.testing.assert_close(weight @ weight.T, 0.25 * torch.eye(40).double(), rtol=0, atol=1e-6)
    assert not net.core.bias_ih_l0.any()
    assert net.head.bias.any()


def test_default_gain_scales_torchs_own_weights() -> None:
    net = SequenceNet("gru", input_size=3, hidden_size=40, outputs=2, gain=3.0, seed=0)
    assert 2.9 / 40**0.5 < net.core.weight_hh_l0.abs().max().item() <= 3 / 40**0.5
    assert net.core.weight_ih_l0.abs().max().item() <= 1 / 40**0.5


@pytest.mark.parametrize("name", NETS, ids=NETS.keys())
def test_a_seed_fixes_every_weight_and_leaves_the_random_state_alone(name: str) -> None:
    state = torch.get_rng_state()
    nets = [NETS[name](seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(state, torch.get_rng_state())
    a, b, c = (dict(net.named_parameters()) for net in nets)
    assert all(torch.equal(a[key], b[key]) for key in a)
    different = [not torch.equal(a[key], c[key]) for key in a if "norm" not in key]
    # Some start at a constant: LayerNorm's weights.
    assert all(different)


@pytest.mark.parametrize("name", NETS, ids=NETS.keys())
def test_without_a_seed_the_global_generator_draws(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        a = NETS[name]()
        torch.manual_seed(1)
        b = NETS[name]()
    c = NETS[name](seed=1)
    for other in (b, c):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("seed", [None, 0], ids=["no-seed", "seed"])
@pytest.mark.parametrize("kind", ["tokens", "features"], ids=str)
@pytest.mark.parametrize("name", NETS, ids=NETS.keys())
def test_training_step_on_meta_needs_no_values(name: str, kind: str, seed: int | None) -> None:
    with torch.device("meta"):
        net = NETS[name](seed=seed)
        assert all(value.is_meta for value in [*net.parameters(), *net.buffers()])
        optimizer = torch.optim.Adam(net.parameters())
        x = torch.empty(5, 7, dtype=torch.long) if kind == "tokens" else torch.empty(5, 7, 3)
        loss = functional.cross_entropy(net(x), torch.empty(5, dtype=torch.long))
    loss.backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("name", NETS, ids=NETS.keys())
def test_training_step_on_a_gpu_never_waits_for_the_host(name: str) -> None:
    with torch.device("cuda"):
        net = NETS[name](seed=0)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        x, y = torch.zeros(5, 7, dtype=torch.long), torch.zeros(5, dtype=torch.long)
        functional.cross_entropy(net(x), y).backward()  # first calls may set up cuDNN
    torch.cuda.set_sync_debug_mode("error")
    try:
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    cpu = NETS[name](seed=0)
    assert all(p.device.type == "cuda" for p in net.parameters())
    assert parameter_count(cpu) == parameter_count(net)


@pytest.mark.parametrize("name", NETS, ids=NETS.keys())
@pytest.mark.parametrize(
    "x",
    [torch.zeros(2, 0, 3), torch.zeros(2, 0).long(), torch.zeros(2, 4, 5), torch.zeros(2, 4), torch.zeros(4).long()],
    ids=["no-step", "no-token", "five-features", "float-tokens", "one-dimension"],
)
def test_wrong_inputs_are_one_clear_error(name: str, x: Tensor) -> None:
    with pytest.raises(UsageError, match=r"integer tokens \(N, T\) below 3 or floating-point features \(N, T, 3\)"):
        NETS[name]()(x)


@pytest.mark.parametrize("token", [-1, 3], ids=str)
@pytest.mark.parametrize("name", NETS, ids=NETS.keys())
def test_a_token_that_does_not_exist_is_one_clear_error(name: str, token: int) -> None:
    x = torch.ones(2, 4).long()
    x[1, 2] = token
    with pytest.raises(UsageError, match="this net knows 0 to 2"):
        NETS[name]()(x)


@pytest.mark.parametrize(
    ("name", "words"),
    [("growing", "10 steps, but this net's context holds 7"), ("transformer", "10 steps, but this net has positions")],
    ids=["growing", "transformer"],
)
def test_a_sequence_longer_than_the_net_is_refused(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        NETS[name]()(torch.zeros(2, 10, 3))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"core": "GRU"}, "Unknown core 'GRU'"),
        ({"head": "first"}, "Unknown head 'first'"),
        ({"init": "identitty"}, "Did you mean 'identity'"),
        ({"nonlinearity": "elu"}, "Unknown nonlinearity 'elu'"),
        ({"core": "gru", "nonlinearity": "relu"}, "whose nonlinearities are fixed"),
        ({"gain": -1.0}, "The gain is -1.0"),
        ({"layers": 0}, "'layers' is 0"),
        ({"outputs": 0}, "'outputs' is 0"),
    ],
    ids=["core", "head", "init", "nonlinearity", "gated-relu", "gain", "layers", "outputs"],
)
def test_wrong_settings_are_one_clear_error(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        SequenceNet(**({"core": "rnn", "input_size": 3, "hidden_size": 6, "outputs": 2} | settings))


@pytest.mark.parametrize("make", [MarkovNet, GrowingContextNet], ids=["markov", "growing"])
def test_a_window_of_no_step_is_refused(make: type[nn.Module]) -> None:
    with pytest.raises(UsageError, match=r"'(k|length)' is 0"):
        make(0, input_size=3, outputs=2)


def test_the_names_of_the_settings_cost_no_import_of_torch() -> None:
    code = (
        "import sys, gradlab.nets as nets; assert nets.CORES == ('rnn', 'lstm', 'gru'); "
        "nets.NONLINEARITIES, nets.RECURRENT_INITIALIZATIONS, nets.HEADS, nets.POSITIONS; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
