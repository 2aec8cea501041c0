from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradlab.errors import UsageError
from gradlab.nets import CifarNet, initialize, parameter_count
from gradlab.nets.residual import OptionA, PlainBlock, ResidualBlock

# He et al. 2015, table 6, prints these rounded: 0.27, 0.46, 0.66, 0.85, 1.7 and 19.4 million.
COUNTS = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962, 1202: 19_421_274}

KINDS = {
    "plain": {"skip": False},
    "residual": {},
    "skipinit": {"skipinit": True},
    "plain-none": {"skip": False, "norm": "none"},
    "residual-none": {"norm": "none"},
    "skipinit-none": {"skipinit": True, "norm": "none"},
    "circular": {"padding_mode": "circular"},
    "replicate": {"padding_mode": "replicate"},
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("skip", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("depth", COUNTS, ids=str)
def test_parameter_count_is_the_paper_s(depth: int, skip: bool) -> None:
    with torch.device("meta"):
        net = CifarNet(depth, skip=skip)
    assert parameter_count(net) == COUNTS[depth]


def test_parameter_count_of_the_variants() -> None:
    assert parameter_count(CifarNet()) == COUNTS[20]
    channels = 16 + 6 * (16 + 32 + 64)  # one scale and one shift for each channel that a convolution of depth 20 writes
    assert parameter_count(CifarNet(norm="none")) == COUNTS[20] - 2 * channels
    assert parameter_count(CifarNet(skipinit=True)) == COUNTS[20] + 9
    assert parameter_count(CifarNet(in_channels=1, classes=100)) == COUNTS[20] - 2 * 9 * 16 + 90 * 65


@pytest.mark.parametrize("kind", KINDS, ids=KINDS.keys())
@pytest.mark.parametrize("depth", [8, 20, 56], ids=str)
def test_depth_counts_weight_layers(depth: int, kind: str) -> None:
    with torch.device("meta"):
        net = CifarNet(depth, **KINDS[kind])
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in net.modules()) == depth
    assert sum(isinstance(m, nn.ReLU) for m in net.modules()) == depth - 1  # each a module of its own
    assert not any(getattr(m, "inplace", False) for m in net.modules())
    assert [len(stage) for stage in net.stages] == [(depth - 2) // 6] * 3


def reference(net: CifarNet, x: Tensor, *, skip: bool, norm: bool, padding: str, alpha: float) -> Tensor:
    """Sec. 4.2 of the paper as one function of the state dict, sharing no code with the modules."""
    state = net.state_dict()

    def conv_norm(h: Tensor, prefix: str, index: str, stride: int = 1) -> Tensor:
        h = functional.pad(h, (1, 1, 1, 1), mode=padding)
        h = functional.conv2d(h, state[f"{prefix}conv{index}.weight"], stride=stride)
        if norm:
            mean, var = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), correction=0, keepdim=True)
            gamma, beta = (state[f"{prefix}norm{index}.{name}"][:, None, None] for name in ("weight", "bias"))
            h = gamma * (h - mean) / (var + 1e-5).sqrt() + beta
        return h

    h = conv_norm(x, "stem.", "").clamp(min=0)
    for stage in range(3):
        for block in range((net.depth - 2) // 6):
            prefix, stride = f"stages.{stage}.{block}.branch.", 2 if stage > 0 and block == 0 else 1
            y = conv_norm(conv_norm(h, prefix, "1", stride).clamp(min=0), prefix, "2")
            if skip:
                shortcut = torch.zeros_like(y)
                shortcut[:, : h.shape[1]] = h[:, :, ::stride, ::stride]
                y = alpha * y + shortcut
            h = y.clamp(min=0)
    return h.mean((2, 3)) @ state["head.linear.weight"].T + state["head.linear.bias"]


@pytest.mark.parametrize("size", [4, 7, 8], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=KINDS.keys())
def test_forward_against_the_paper_written_out(kind: str, size: int) -> None:
    settings = KINDS[kind]
    net = initialize(CifarNet(14, width=3, in_channels=2, classes=5, **settings).double(), "default", seed=7)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif "alpha" in name:
                parameter.fill_(0.3)
    x = normal(6, 2, size, size)
    expected = reference(
        net,
        x,
        skip=settings.get("skip", True),
        norm=settings.get("norm", "batch") == "batch",
        padding=settings.get("padding_mode", "constant"),
        alpha=0.3 if settings.get("skipinit") else 1.0,
    )
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-10)
    side = -(-size // 4)
    assert net.features(x).shape == (6, 12, side, side)


@pytest.mark.parametrize("norm", ["batch", "none"], ids=["batch", "none"])
def test_plain_and_residual_differ_in_the_skip_only(norm: str) -> None:
    nets = {}
    with torch.random.fork_rng():
        for skip in (True, False):
            torch.manual_seed(0)
            nets[skip] = CifarNet(14, width=4, skip=skip, norm=norm)
    states = {skip: net.state_dict() for skip, net in nets.items()}
    assert list(states[True]) == list(states[False])
    assert all(torch.equal(states[True][name], states[False][name]) for name in states[True])
    initialize(nets[True], "he_normal", seed=1)
    nets[False].load_state_dict(nets[True].state_dict(), strict=True)
    nets[True].load_state_dict(nets[False].state_dict(), strict=True)
    x = torch.ones(4, 3, 8, 8)
    assert not torch.equal(nets[True](x), nets[False](x))
    assert all(isinstance(b, ResidualBlock) for stage in nets[True].stages for b in stage)
    assert all(isinstance(b, PlainBlock) for stage in nets[False].stages for b in stage)


def test_only_the_first_blocks_of_stages_two_and_three_have_a_shortcut_module() -> None:
    net = CifarNet(14, width=4)
    shortcuts = [[block.shortcut for block in stage] for stage in net.stages]
    assert [[isinstance(s, OptionA) for s in stage] for stage in shortcuts] == [
        [False] * 2,
        [True, False],
        [True, False],
    ]
    assert [s for stage in shortcuts for s in stage if not isinstance(s, OptionA)] == [None] * 4


def test_skipinit_net_starts_with_every_block_at_its_shortcut() -> None:
    net = initialize(CifarNet(14, width=4, norm="none", skipinit=True).double(), "he_normal", seed=0)
    seen = 0

    def check(block: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        nonlocal seen
        assert isinstance(block, ResidualBlock)
        skip = args[0] if block.shortcut is None else block.shortcut(args[0])
        assert torch.equal(out, skip.relu())
        assert out.any()
        seen += 1

    for stage in net.stages:
        for block in stage:
            block.register_forward_hook(check)
    net(normal(2, 3, 8, 8))
    assert seen == 6


@pytest.mark.parametrize("kind", KINDS, ids=KINDS.keys())
def test_training_step_on_meta_needs_no_values(kind: str) -> None:
    with torch.device("meta"):
        net = initialize(CifarNet(20, **KINDS[kind]), "he_normal", seed=0)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        loss = functional.cross_entropy(net(torch.empty(8, 3, 16, 16)), torch.empty(8, dtype=torch.long))
    loss.backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())


def test_net_survives_pickling() -> None:
    net = CifarNet(8, width=2, skipinit=True)
    copy = pickle.loads(pickle.dumps(net))
    x = torch.ones(2, 3, 8, 8)
    assert torch.equal(copy.eval()(x), net.eval()(x))


@pytest.mark.parametrize(
    ("depth", "advice"),
    [(21, "take 20 or 26"), (19, "take 14 or 20"), (2, "take 8"), (-4, "take 8"), (7, "take 8"), (20.0, "such as 20")],
    ids=str,
)
def test_wrong_depth_names_the_nearest(depth: int, advice: str) -> None:
    with pytest.raises(UsageError, match=advice):
        CifarNet(depth)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "batchnorm"}, r"Unknown norm 'batchnorm'\. Did you mean 'batch'"),
        ({"padding_mode": "zero"}, r"Unknown padding mode 'zero'\. Did you mean 'zeros'"),
        ({"skip": False, "skipinit": True}, "skip is False"),
        ({"width": 0}, "'width' is 0"),
        ({"classes": 2.5}, r"'classes' is 2\.5"),
        ({"in_channels": True}, "'in_channels' is True"),
    ],
    ids=["norm", "padding", "skipinit", "width", "classes", "channels"],
)
def test_wrong_settings_are_one_clear_error(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CifarNet(8, **settings)


@pytest.mark.parametrize("shape", [(2, 3, 3, 8), (2, 1, 8, 8), (3, 8, 8), (2, 192)], ids=str)
def test_wrong_images_are_one_clear_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"takes \(N, 3, H, W\)"):
        CifarNet(8, width=2)(torch.zeros(shape))
