from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradlab.errors import UsageError
from gradlab.nets import Add, Fork, OptionA, PlainBlock, ResidualBlock


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def branch(features: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, features), nn.Tanh(), nn.Linear(features, features)).double()


def test_fork_is_a_node_of_its_own_and_copies_nothing() -> None:
    x = normal(2, 3).requires_grad_()
    y = Fork()(x)
    assert y is not x
    assert y.grad_fn is not None
    assert y.data_ptr() == x.data_ptr()
    assert torch.equal(y, x)


@pytest.mark.parametrize("skipinit", [False, True], ids=["alpha1", "skipinit"])
@pytest.mark.parametrize("shortcut", [None, nn.Linear(5, 5).double()], ids=["identity", "projection"])
def test_gradients_at_the_forks_add_up_to_that_of_the_input(skipinit: bool, shortcut: nn.Module | None) -> None:
    block = ResidualBlock(branch(), shortcut, skipinit=skipinit, activation=nn.Tanh())
    if block.alpha is not None:
        block.double()
        nn.init.constant_(block.alpha, 0.7)
    grads: dict[str, Tensor] = {}
    for name in ("to_branch", "to_skip", "branch", "add"):
        getattr(block, name).register_forward_hook(
            lambda module, args, out, name=name: (
                out.register_hook(lambda g: grads.__setitem__(name, g.clone())) and None
            )
        )
    x, v = normal(4, 5).requires_grad_(), normal(4, 5, seed=1)
    block(x).backward(v)
    torch.testing.assert_close(grads["to_branch"] + grads["to_skip"], x.grad, rtol=1e-12, atol=1e-12)

    # Each path alone, by naive autograd: the block written out twice, with the other path's input detached.
    def gradient(through_branch: bool) -> Tensor:
        z = x.detach().requires_grad_()
        alpha = 1.0 if block.alpha is None else 0.7
        skip = z.detach() if through_branch else z
        y = alpha * block.branch(z if through_branch else z.detach()) + (skip if shortcut is None else shortcut(skip))
        return torch.autograd.grad((y.tanh() * v).sum(), z)[0]

    torch.testing.assert_close(grads["to_branch"], gradient(True), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads["to_skip"], gradient(False), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads["branch"], (0.7 if skipinit else 1.0) * grads["add"], rtol=1e-12, atol=1e-12)


def test_add_shows_the_response_before_the_activation() -> None:
    block = ResidualBlock(branch(), None, skipinit=False, activation=nn.ReLU())
    seen: list[Tensor] = []
    block.add.register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    x = normal(4, 5)
    y = block(x)
    torch.testing.assert_close(seen[0], x + block.branch(x), rtol=1e-14, atol=1e-14)
    assert (seen[0] < 0).any()
    assert torch.equal(y, seen[0].relu())
    assert isinstance(block.add, Add)


def test_skipinit_block_starts_as_its_shortcut_and_only_alpha_learns() -> None:
    block = ResidualBlock(branch(), None, skipinit=True, activation=nn.ReLU()).double()
    assert block.alpha is not None
    assert block.alpha.shape == ()
    x = normal(4, 5)
    y = block(x)
    assert torch.equal(y, x.relu())
    y.square().sum().backward()
    expected = (2 * x.relu() * block.branch(x)).sum().detach()  # dy^2/dalpha = 2 y branch(x) where the ReLU passes
    torch.testing.assert_close(block.alpha.grad, expected, rtol=1e-12, atol=1e-12)
    assert abs(float(expected)) > 0.01
    assert not any(p.grad.any() for p in block.branch.parameters())


def test_without_skipinit_there_is_no_alpha() -> None:
    block = ResidualBlock(branch(), None, skipinit=False, activation=None)
    assert block.alpha is None
    assert not any("alpha" in name for name in [*block.state_dict(), *dict(block.named_parameters())])


def test_plain_block_is_the_branch_alone_and_shares_its_names() -> None:
    plain = PlainBlock(branch(), nn.ReLU())
    residual = ResidualBlock(branch(), None, skipinit=False, activation=nn.ReLU())
    plain.load_state_dict(residual.state_dict(), strict=True)
    x = normal(4, 5)
    assert torch.equal(plain(x), residual.branch(x).relu())
    torch.testing.assert_close(residual(x), (plain.branch(x) + x).relu(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("activation", [None, nn.ReLU()], ids=["none", "relu"])
def test_activation_is_optional(activation: nn.Module | None) -> None:
    x = normal(4, 5)
    assert bool((PlainBlock(nn.Identity(), activation)(x) < 0).any()) == (activation is None)
    assert bool((ResidualBlock(nn.Identity(), None, activation=activation)(x) < 0).any()) == (activation is None)


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (1, 1)], ids=["even", "odd", "pixel"])
@pytest.mark.parametrize(("channels", "stride"), [((3, 6), 2), ((3, 3), 2), ((3, 4), 1), ((2, 5), 3)], ids=str)
def test_option_a_against_numpy(size: tuple[int, int], channels: tuple[int, int], stride: int) -> None:
    x = normal(2, channels[0], *size)
    rows, columns = (-(-side // stride) for side in size)
    expected = np.zeros((2, channels[1], rows, columns))
    for n, c, i, j in np.ndindex(2, channels[0], rows, columns):
        expected[n, c, i, j] = x[n, c, i * stride, j * stride]
    shortcut = OptionA(*channels, stride)
    assert np.array_equal(shortcut(x).numpy(), expected)
    assert not list(shortcut.parameters())


def test_option_a_refuses_to_drop_channels() -> None:
    with pytest.raises(UsageError, match="from 4 to 3"):
        OptionA(4, 3, 1)
    with pytest.raises(UsageError, match="'stride' is 0"):
        OptionA(3, 4, 0)
