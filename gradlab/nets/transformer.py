"""A small causal Transformer: every step is one step away from every earlier one."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING, final

import torch
from torch import nn
from torch.nn import functional

from gradlab.errors import UsageError
from gradlab.nets.checks import check_member, check_positive
from gradlab.nets.names import HEADS, POSITIONS
from gradlab.nets.residual import ResidualBlock
from gradlab.nets.seeding import weights_from
from gradlab.nets.sequence import as_features

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CausalSelfAttention", "CausalTransformer", "sinusoidal_positions"]


@final
class CausalSelfAttention(nn.Module):
    """Multi-head attention of each step to itself and the steps before it.

        y_t = W_o sum_{s <= t} a_ts v_s,   a_t = softmax_s(q_t . k_s / sqrt(d)),   d = width / heads

    Attributes: `in_proj` (q, k and v in one `nn.Linear`) and `out_proj`, as in `nn.MultiheadAttention`, whose weights
    load after renaming.

    Args:
        width: Entries of a step.
        heads: Attention heads; a divisor of width. Default 1.

    Raises:
        UsageError: A count below 1, or a width that heads does not divide.

    Note:
        torch's fused `scaled_dot_product_attention`, which needs no T x T mask in memory.

    Example:
        >>> CausalSelfAttention(8, heads=2)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])

    Source:
        Vaswani et al. 2017 (arXiv 1706.03762), sec. 3.2.
    """

    def __init__(self, width: int, *, heads: int = 1) -> None:
        super().__init__()
        check_positive(width=width, heads=heads)
        if width % heads:
            raise UsageError(f"A width of {width} cannot be shared by {heads} heads: give a width they divide.")
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return y, (N, T, width), for x of the same shape."""
        q, k, v = self.in_proj(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (N, heads, T, d)
        read = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y: Tensor = self.out_proj(read.transpose(1, 2).flatten(2))
        return y


@final
class CausalTransformer(nn.Module):
    """A decoder-only Transformer with pre-norm, without dropout.

        u_0 = W x + position,   u' = u + attention(norm(u)),   u'' = u' + mlp(norm(u')),   y = head(norm(u))

    Attributes: `embed`, `blocks` (for each layer two `ResidualBlock`, `attention` and `mlp`), `norm` and `head`.

    Args:
        input_size: Features of a step, or number of different tokens, which are fed one-hot.
        outputs: Outputs of the head at one step.
        max_length: Longest sequence, in steps.
        width: Entries of a step inside the net. Default 64.
        layers: Default 1.
        heads: Attention heads. Default 1.
        expansion: Hidden units of the MLP over width. Default 4, the paper's.
        positions: "learned" (normal, standard deviation 0.02) or "sinusoidal" (fixed).
        head: "last" reads the last step only; "every" each step.
        seed: Seed of all weights, which leaves torch's global random state untouched; None draws from the global
            generator.

    Raises:
        UsageError: An unknown name, a count below 1, a width that heads does not divide, or an odd width with
            sinusoidal positions; on a call, inputs as in `SequenceNet` or longer than `max_length`.

    Example:
        >>> net = CausalTransformer(input_size=10, outputs=9, max_length=50, width=16, head="every", seed=0)
        >>> net(torch.zeros(4, 30).long()).shape
        torch.Size([4, 30, 9])

    Source:
        Vaswani et al. 2017 (arXiv 1706.03762); Xiong et al. 2020 (arXiv 2002.04745) (pre-norm); Radford et al. 2019
        (learned positions, GELU).
    """

    position: Tensor

    def __init__(
        self,
        *,
        input_size: int,
        outputs: int,
        max_length: int,
        width: int = 64,
        layers: int = 1,
        heads: int = 1,
        expansion: int = 4,
        positions: str = "learned",
        head: str = "last",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_member("position code", positions, POSITIONS)
        check_member("head", head, HEADS)
        check_positive(input_size=input_size, outputs=outputs, max_length=max_length, width=width, layers=layers)
        check_positive(heads=heads, expansion=expansion)
        self.input_size = input_size
        self.max_length = max_length
        self.every_step = head == "every"

        def block() -> nn.Sequential:
            attention = nn.Sequential(
                OrderedDict(norm=nn.LayerNorm(width), attention=CausalSelfAttention(width, heads=heads))
            )
            mlp = nn.Sequential(
                OrderedDict(
                    norm=nn.LayerNorm(width),
                    up=nn.Linear(width, expansion * width),
                    activation=nn.GELU(),
                    down=nn.Linear(expansion * width, width),
                )
            )
            return nn.Sequential(OrderedDict(attention=ResidualBlock(attention), mlp=ResidualBlock(mlp)))

        with weights_from(seed, self):
            self.embed = nn.Linear(input_size, width)
            if positions == "learned":
                self.position = nn.Parameter(torch.empty(max_length, width).normal_(0, 0.02))
            else:
                code = sinusoidal_positions(max_length, width).to(self.embed.weight)
                self.register_buffer("position", code, persistent=False)
            self.blocks = nn.Sequential(*(block() for _ in range(layers)))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, outputs)

    def features(self, x: Tensor) -> Tensor:
        """Return every step's vector after the last block and norm.

        Args:
            x: Tokens, int64, (N, T), or features, (N, T, input_size); T from 1 to `max_length`.

        Returns:
            Vectors, (N, T, width); that of step t depends on steps 1 to t only.

        Raises:
            UsageError: The inputs have another shape, more steps, or a token that does not exist.
        """
        vectors = as_features(x, self.input_size, self.embed.weight.dtype)
        length = vectors.shape[1]
        if length > self.max_length:
            raise UsageError(
                f"The inputs have {length} steps, but this net has positions for {self.max_length}: give a larger "
                "max_length."
            )
        states: Tensor = self.norm(self.blocks(self.embed(vectors) + self.position[:length]))
        return states

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, outputs) with head "last", (N, T, outputs) with "every", for inputs as in `features`."""
        states = self.features(x)
        y: Tensor = self.head(states if self.every_step else states[:, -1])
        return y


def sinusoidal_positions(length: int, width: int) -> Tensor:
    """Return the fixed position code of Vaswani et al.

        P[t, 2j] = sin(t / 10000^(2j / width)),   P[t, 2j + 1] = cos(t / 10000^(2j / width))

    Args:
        length: Positions, from 0.
        width: Entries of a position, even.

    Returns:
        The code, float64, (length, width), on the CPU.

    Raises:
        UsageError: A count below 1 or an odd width.

    Example:
        >>> sinusoidal_positions(2, 2)[0].tolist()
        [0.0, 1.0]

    Source:
        Vaswani et al. 2017 (arXiv 1706.03762), sec. 3.5.
    """
    check_positive(length=length, width=width)
    if width % 2:
        raise UsageError(f"Sinusoidal positions come in pairs, but the width is {width}: give an even one.")
    times = torch.arange(length, dtype=torch.float64, device="cpu")[:, None]
    rates = torch.exp(torch.arange(0, width, 2, dtype=torch.float64, device="cpu") * (-math.log(10_000) / width))
    return torch.stack([torch.sin(times * rates), torch.cos(times * rates)], dim=2).flatten(1)
