"""What mean-field theory predicts for the nets of He et al. at initialization, block by block.

Source of the per-layer gains: `gradlab.analysis.theory`. The two residual recursions are derived here:

A unit's value on the skip path is a walk that cannot fall below 0, x_l = relu(x_{l-1} + s_l n_l), n_l Gaussian: each
block adds a branch whose sign is random. Backward, the squared gradient of a unit passes where x_l > 0, and the branch
adds c_l times the mean squared gradient to every unit. With BatchNorm s_l = 1 and c_l = (pi / (pi - 1)) / Var(x_{l-1});
with He's initialization alone s_l^2 = c_l E[x_{l-1}^2], c_l = 2; with SkipInit both are 0. A new stage adds units that
begin at 0 and lead nowhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gradlab.analysis.normalization_theory import batchnorm_gradient_gain
from gradlab.analysis.theory import gradient_gain

__all__ = ["BlockTheory", "block_theory"]

_PATHS = 1 << 14  # sample paths of the walk a stage: about 1 % of sampling error in a profile
_PLAIN_GAINS = {"He": 2.0, "torch default": 1 / 3}


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTheory:
    """Prediction for one net.

    Args:
        log10_ratio: log10 of the gradient norm at each block's output over that at the last, shape (blocks + 1,), the
            stem's first.
        branch_share: The branch's share of the squared gradient at each block's input, shape (blocks,); NaN for a
            plain net.
    """

    log10_ratio: NDArray[np.float64]
    branch_share: NDArray[np.float64]


@lru_cache(maxsize=64)
def block_theory(net: str, depth: int, size: int | None = None) -> BlockTheory | None:
    """Return what mean-field theory predicts for a net at initialization, or None where there is no prediction.

    Args:
        net: "plain" or "residual", a comma, and "BatchNorm", "He", "torch default" or "SkipInit".
        depth: Weight layers, 6k + 2.
        size: Side of the images in pixels: counts what zero padding loses, for plain nets without BatchNorm only.
            None is circular padding.

    Note:
        Wide nets, uncorrelated samples. Where padding is not counted, it makes the border differ from the middle: of
        nets with BatchNorm of width 48 and depth 56, log10 of the ratio is about 0.8 of the predicted one with zero
        padding and within 2 % with circular padding.

    Example:
        >>> found = block_theory("plain, BatchNorm", 20)
        >>> round(float(found.log10_ratio[1]), 3)  # 16 layers from the first block to the ninth
        1.331
    """
    kind, _, norm = net.partition(", ")
    blocks = (depth - 2) // 6
    if blocks < 1:
        return None
    if kind == "plain":
        if norm == "BatchNorm":
            gains = np.full(3 * blocks, 2 * math.log10(batchnorm_gradient_gain("relu")))
        elif norm in _PLAIN_GAINS:
            gain = gradient_gain("relu", weight_var=_PLAIN_GAINS[norm])
            gains = 2 * math.log10(gain) + _padding_losses(blocks, size)
        else:
            return None
        ratio = np.concatenate([np.cumsum(gains[::-1])[::-1], [0.0]])
        return BlockTheory(log10_ratio=ratio, branch_share=np.full(3 * blocks, np.nan))
    if kind != "residual" or norm not in ("BatchNorm", "He", "SkipInit"):
        return None
    return _walk(blocks, norm)


def _padding_losses(blocks: int, size: int | None) -> NDArray[np.float64]:
    """Return log10 of the factor by which zero padding lowers the gradient norm over each block.

    The expected squared gradient of a pixel is the mean of those of its 3x3 neighbours, and outside the image it is 0:
    it leaks out at the border and gathers in the middle. Rows and columns separate, so one dimension is followed, and
    its total stands for the norm of both. Deep in a stage of side n the factor is (1 + 2 cos(pi / (n + 1))) / 3 a
    layer.
    """
    if size is None:
        return np.zeros(3 * blocks)
    sides = [size, *(math.ceil(size / 2**stage) for stage in range(3) for _ in range(blocks))]
    energy = np.full(sides[-1], 1.0 / sides[-1])
    losses = np.empty(3 * blocks)
    for block in range(3 * blocks - 1, -1, -1):
        into, out = sides[block], sides[block + 1]
        stride = 2 if block in (blocks, 2 * blocks) else 1
        for side, step in ((out, 1), (into, stride)):
            reads = np.abs(np.arange(side)[:, None] - step * np.arange(len(energy))[None, :]) <= 1
            energy = reads @ energy / 3.0
        losses[block] = math.log10(energy.sum())
        energy /= energy.sum()
    return losses


def _walk(blocks: int, norm: str) -> BlockTheory:
    rng = np.random.default_rng(0)  # a fixed draw: the line is the same each time

    def steps() -> NDArray[np.float32]:
        return rng.standard_normal(_PATHS, dtype=np.float32)

    groups = [np.maximum(steps(), 0)]  # one a stage whose channels there are; each has as many as all before it
    weights = [np.array([1.0])]
    passes, branch_gains = [[groups[0] > 0]], []
    for block in range(3 * blocks):
        shares = weights[-1] / weights[-1].sum()
        second = float(sum(w * np.mean(np.square(x)) for w, x in zip(shares, groups, strict=True)))
        if norm == "BatchNorm":
            step = 1.0
            variance = float(sum(w * np.var(x) for w, x in zip(shares, groups, strict=True)))
            branch_gains.append(batchnorm_gradient_gain("relu") ** 2 / variance)
        else:
            gain = 2.0 if norm == "He" else 0.0
            step = math.sqrt(gain * second)
            branch_gains.append(gain)
        if block in (blocks, 2 * blocks):
            groups = [*groups, np.zeros(_PATHS, dtype=np.float32)]
            weights.append(np.append(weights[-1], weights[-1].sum()))
        else:
            weights.append(weights[-1])
        groups = [np.maximum(x + step * steps(), 0) if step else x for x in groups]
        if norm == "He":  # it grows exponentially, and only its shape matters
            root = math.sqrt(second)
            groups = [(x / np.float32(root)).astype(np.float32) for x in groups]
        passes.append([x > 0 for x in groups])
    energy = [np.ones(_PATHS) for _ in groups]
    logs, scale, shares_out = [0.0], 0.0, []
    start = float(weights[-1].sum())
    for block in range(3 * blocks, 0, -1):
        after, before = weights[block], weights[block - 1]
        open_energy = [e * mask for e, mask in zip(energy, passes[block], strict=True)]
        total = float(sum(w * e.mean() for w, e in zip(after, open_energy, strict=True)))
        branch = branch_gains[block - 1] * total
        skip = float(sum(w * e.mean() for w, e in zip(before, open_energy, strict=False)))
        shares_out.append(branch / (branch + skip))
        energy = [e + branch / before.sum() for e in open_energy[: len(before)]]
        here = branch + skip
        energy = [e / here for e in energy]  # kept near 1: the sum over a deep net leaves float64's range
        scale += math.log10(here)
        logs.append(0.5 * (scale - math.log10(start)))
    return BlockTheory(log10_ratio=np.array(logs[::-1]), branch_share=np.array(shares_out[::-1]))
