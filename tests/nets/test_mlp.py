from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradlab.errors import UsageError
from gradlab.nets import ACTIVATIONS, MLP, activation_module, initialize, parameter_count

KINDS = {
    "plain": {},
    "plain-batch": {"norm": "batch"},
    "residual": {"skip": True},
    "residual-batch": {"skip": True, "norm": "batch"},
    "skipinit": {"skip": True, "skipinit": True},
    "no-bias": {"bias": False},
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def hidden_gradients(net: MLP, x: Tensor) -> list[Tensor]:
    """Gradients of (h_L * v).sum(), v random and fixed, at h_1 .. h_L."""
    outputs: list[Tensor] = []
    handles = [m.register_forward_hook(lambda m, a, out: outputs.append(out)) for m in (net.stem, *net.blocks)]
    features = net.features(x)
    for handle in handles:
        handle.remove()
    return list(torch.autograd.grad((features * normal(*features.shape, seed=9)).sum(), outputs))


@pytest.mark.parametrize("gain", [0.5, 0.97, 1.0, 1.3], ids=lambda g: f"gain{g}")
@pytest.mark.parametrize("seed", range(3), ids=lambda s: f"seed{s}")
def test_deep_linear_orthogonal_net_has_gradients_g_to_the_distance(seed: int, gain: float) -> None:
    depth = 30
    net = MLP(depth, width=12, in_features=12, classes=4, activation="linear").double()
    initialize(net, "orthogonal", gain=gain, seed=seed)
    norms = torch.stack([g.norm(dim=1) for g in hidden_gradients(net, normal(5, 12))])
    expected = gain ** torch.arange(depth - 1, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(norms / norms[-1], expected[:, None].expand_as(norms), rtol=1e-12, atol=0)


@pytest.mark.parametrize("skip", [True, False], ids=["residual", "plain"])
def test_deep_linear_gradients_are_products_of_dense_matrices(skip: bool) -> None:
    net = MLP(6, width=5, in_features=3, classes=2, activation="linear", skip=skip).double()
    initialize(net, "lecun_normal", seed=0)
    grads = hidden_gradients(net, normal(4, 3))
    expected = normal(4, 5, seed=9)
    for layer in range(5, -1, -1):
        torch.testing.assert_close(grads[layer], expected, rtol=1e-12, atol=1e-12)
        weight = net.state_dict()[f"blocks.{layer - 1}.branch.linear.weight"] if layer else torch.eye(5).double()
        expected = expected @ (weight + skip * torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS, ids=KINDS.keys())
@pytest.mark.parametrize("activation", ["relu", "tanh"], ids=["relu", "tanh"])
def test_forward_against_the_definition_written_out(activation: str, kind: str) -> None:
    settings = KINDS[kind]
    net = MLP(4, width=6, in_features=8, classes=3, activation=activation, **settings).double()
    initialize(net, "default", seed=1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "alpha" in name:
                parameter.fill_(0.3)
    state = net.state_dict()

    def layer(h: Tensor, prefix: str) -> Tensor:
        z = h @ state[f"{prefix}linear.weight"].T + state.get(f"{prefix}linear.bias", 0)
        if settings.get("norm") == "batch":
            z = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()
        return z.clamp(min=0) if activation == "relu" else z.tanh()

    x = normal(7, 2, 2, 2)
    h = layer(x.reshape(7, 8), "stem.")
    for block in range(3):
        y = layer(h, f"blocks.{block}.branch.")
        h = h + (0.3 if settings.get("skipinit") else 1.0) * y if settings.get("skip") else y
    torch.testing.assert_close(net.features(x), h, rtol=1e-11, atol=1e-11)
    logits = h @ state["head.weight"].T + state.get("head.bias", 0)
    torch.testing.assert_close(net(x), logits, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("norm", ["batch", "none"], ids=["batch", "none"])
def test_plain_and_residual_differ_in_the_skip_only(norm: str) -> None:
    nets = {}
    with torch.random.fork_rng():
        for skip in (True, False):
            torch.manual_seed(0)
            nets[skip] = MLP(4, width=6, in_features=8, classes=3, norm=norm, skip=skip)
    states = {skip: net.state_dict() for skip, net in nets.items()}
    assert list(states[True]) == list(states[False])
    assert all(torch.equal(states[True][name], states[False][name]) for name in states[True])
    nets[False].load_state_dict(initialize(nets[True], "he_normal", seed=1).state_dict(), strict=True)
    nets[True].load_state_dict(nets[False].state_dict(), strict=True)


def test_skipinit_net_starts_as_the_stem() -> None:
    net = MLP(5, width=6, in_features=8, classes=3, skip=True, skipinit=True).double()
    x = normal(4, 8)
    assert torch.equal(net.features(x), net.stem(x))


def test_depth_counts_hidden_layers() -> None:
    net = MLP(10, width=100, in_features=64, classes=10)
    assert sum(isinstance(m, nn.Linear) for m in net.modules()) == 11
    assert parameter_count(net) == 65 * 100 + 9 * 101 * 100 + 101 * 10
    assert parameter_count(MLP(1, width=7, in_features=4, classes=3, bias=False)) == 4 * 7 + 7 * 3
    assert parameter_count(MLP(3, width=7, in_features=4, classes=3, norm="batch")) == 35 + 2 * 56 + 24 + 3 * 14


@pytest.mark.parametrize("kind", KINDS, ids=KINDS.keys())
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=ACTIVATIONS)
def test_training_step_on_meta_needs_no_values(activation: str, kind: str) -> None:
    with torch.device("meta"):
        net = MLP(4, width=6, in_features=8, classes=3, activation=activation, **KINDS[kind])
        initialize(net, "orthogonal", seed=0)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        loss = functional.cross_entropy(net(torch.empty(5, 8)), torch.empty(5, dtype=torch.long))
    loss.backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())


@pytest.mark.parametrize("name", ACTIVATIONS, ids=ACTIVATIONS)
def test_activation_is_the_function_of_that_name(name: str) -> None:
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    function = (lambda z: z) if name == "linear" else getattr(functional, name)
    torch.testing.assert_close(activation_module(name)(x), function(x), rtol=1e-15, atol=1e-15)
    assert activation_module(name) is not activation_module(name)
    assert not getattr(activation_module(name), "inplace", False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "rellu"}, r"Unknown activation 'rellu'\. Did you mean 'relu'"),
        ({"norm": "layer"}, "Unknown norm 'layer'"),
        ({"skipinit": True}, "skip is False"),
        ({"depth": 0}, "'depth' is 0"),
        ({"width": -1}, "'width' is -1"),
    ],
    ids=["activation", "norm", "skipinit", "depth", "width"],
)
def test_wrong_settings_are_one_clear_error(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MLP(**({"depth": 1, "width": 4, "in_features": 4, "classes": 2} | settings))


@pytest.mark.parametrize("shape", [(2, 7), (8,), (2, 3, 3)], ids=str)
def test_wrong_inputs_are_one_clear_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"takes \(N, \.\.\.\) with 8 entries"):
        MLP(1, width=4, in_features=8, classes=2)(torch.zeros(shape))
