"""The causal Transformer against torch's own layers, and its position code against the formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from gradlab.errors import UsageError
from gradlab.nets import CausalSelfAttention, CausalTransformer, sinusoidal_positions


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def redraw(module: nn.Module) -> nn.Module:
    """Weights of which none is 0 or 1, so that no mistake in the order hides."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    return module


@pytest.mark.parametrize("heads", [1, 2, 4], ids="heads{}".format)
def test_attention_against_softmax_written_out(heads: int) -> None:
    attention = redraw(CausalSelfAttention(8, heads=heads).double())
    x = normal(3, 6, 8)
    q, k, v = (x @ attention.in_proj.weight.T + attention.in_proj.bias).split(8, dim=2)
    size = 8 // heads
    expected = torch.zeros(3, 6, 8, dtype=torch.float64)
    for sample in range(3):
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            for t in range(6):
                scores = torch.tensor(
                    [q[sample, t, part].dot(k[sample, s, part]).item() / math.sqrt(size) for s in range(t + 1)],
                    dtype=torch.float64,
                )
                weights = scores.exp() / scores.exp().sum()
                expected[sample, t, part] = weights @ v[sample, : t + 1, part]
    expected = expected @ attention.out_proj.weight.T + attention.out_proj.bias
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-12)
    reference = nn.MultiheadAttention(8, heads, batch_first=True).double()
    names = {"in_proj_weight": "in_proj.weight", "in_proj_bias": "in_proj.bias"}
    state = attention.state_dict()
    reference.load_state_dict({name: state[names.get(name, name)] for name in reference.state_dict()})
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
    torch.testing.assert_close(attention(x), reference(x, x, x, attn_mask=mask)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("layers", [1, 2], ids="layers{}".format)
@pytest.mark.parametrize("positions", ["learned", "sinusoidal"], ids=str)
def test_net_equals_torchs_pre_norm_layers(positions: str, layers: int) -> None:
    net = CausalTransformer(
        input_size=3, outputs=2, max_length=9, width=8, layers=layers, heads=2, positions=positions, head="every"
    )
    redraw(net.double())
    names = {
        "self_attn.in_proj_weight": "attention.branch.attention.in_proj.weight",
        "self_attn.in_proj_bias": "attention.branch.attention.in_proj.bias",
        "self_attn.out_proj.weight": "attention.branch.attention.out_proj.weight",
        "self_attn.out_proj.bias": "attention.branch.attention.out_proj.bias",
        "linear1.weight": "mlp.branch.up.weight",
        "linear1.bias": "mlp.branch.up.bias",
        "linear2.weight": "mlp.branch.down.weight",
        "linear2.bias": "mlp.branch.down.bias",
        "norm1.weight": "attention.branch.norm.weight",
        "norm1.bias": "attention.branch.norm.bias",
        "norm2.weight": "mlp.branch.norm.weight",
        "norm2.bias": "mlp.branch.norm.bias",
    }
    x = normal(4, 7, 3)
    hidden = x @ net.embed.weight.T + net.embed.bias + net.position[:7]
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    for block in net.blocks:
        layer = nn.TransformerEncoderLayer(
            8, 2, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        ).double()
        state = block.state_dict()
        layer.load_state_dict({theirs: state[ours] for theirs, ours in names.items()}, strict=True)
        hidden = layer(hidden, src_mask=mask)
    hidden = nn.functional.layer_norm(hidden, (8,), net.norm.weight, net.norm.bias)
    torch.testing.assert_close(net(x), hidden @ net.head.weight.T + net.head.bias, rtol=0, atol=1e-12)


def test_positions_tell_the_order_apart() -> None:
    for positions in ("learned", "sinusoidal"):
        net = CausalTransformer(
            input_size=3, outputs=2, max_length=9, width=8, layers=1, positions=positions, seed=0
        ).double()
        x = normal(2, 5, 3)
        swapped = x[:, [1, 0, 2, 3, 4]]
        assert not torch.allclose(net(x), net(swapped), rtol=0, atol=1e-8), positions


def test_sinusoidal_code_entry_by_entry() -> None:
    code = sinusoidal_positions(2000, 6)
    for t in (0, 1, 7, 1999):
        for j in range(3):
            angle = t / 10_000 ** (2 * j / 6)
            assert code[t, 2 * j].item() == pytest.approx(math.sin(angle), abs=1e-11)
            assert code[t, 2 * j + 1].item() == pytest.approx(math.cos(angle), abs=1e-11)


def test_sinusoidal_code_is_no_parameter_and_is_not_saved() -> None:
    net = CausalTransformer(input_size=3, outputs=2, max_length=9, width=8, positions="sinusoidal")
    assert "position" not in net.state_dict()
    assert dict(net.named_buffers())["position"].dtype == torch.float32


def test_layers_do_not_start_as_copies_of_each_other() -> None:
    net = CausalTransformer(input_size=3, outputs=2, max_length=9, width=8, layers=2, seed=0)
    first, second = (block.attention.branch.attention.in_proj.weight for block in net.blocks)
    assert not torch.equal(first, second)


def test_the_path_to_any_earlier_step_is_one_step_long() -> None:
    # The contrast with recurrence: the gradient falls like 1/T at worst, not exponentially with the lag.
    net = CausalTransformer(input_size=3, outputs=2, max_length=151, width=32, seed=0).double()
    x = normal(8, 151, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(net(x)[:, 0].sum(), x)
    norms = gradient.norm(dim=2).log().mean(0).flip(0)[10:]
    lags = torch.arange(10, 151, dtype=torch.float64)
    centred = lags - lags.mean()
    slope = (centred * norms).sum() / centred.square().sum()
    assert abs(slope) < 0.002


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"positions": "sinusoid"}, "Did you mean 'sinusoidal'"),
        ({"head": "first"}, "Unknown head 'first'"),
        ({"width": 8, "heads": 3}, "width of 8 cannot be shared by 3 heads"),
        ({"width": 7, "positions": "sinusoidal"}, "the width is 7: give an even one"),
        ({"max_length": 0}, "'max_length' is 0"),
        ({"layers": 0}, "'layers' is 0"),
        ({"expansion": 0}, "'expansion' is 0"),
    ],
    ids=["positions", "head", "heads", "odd-width", "max-length", "layers", "expansion"],
)
def test_wrong_settings_are_one_clear_error(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        CausalTransformer(**({"input_size": 3, "outputs": 2, "max_length": 9} | settings))
