"""Rows of numbers with a power of two split off, so that no product of many steps leaves the range of the dtype.

A row is kept as r * 2^e with the largest entry of r in [1/2, 1). Powers of two are exact, so rescaling never rounds.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["down_by", "exponent_of", "norm_log2", "square_sum", "to_host"]

_BEYOND = 2200.0  # no float64 survives a factor 2^-2200: larger shifts need not be told apart


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64


def exponent_of(rows: torch.Tensor) -> torch.Tensor:
    """Return e, one for each row of the last dimension: the smallest with all |entries| < 2^e.

    Args:
        rows: Shape (..., N).

    Returns:
        Shape (...), floating; -inf for a row of zeros, 0 for one with an entry that is not finite.

    Example:
        >>> exponent_of(torch.tensor([[3.0, -4.0], [0.0, 0.0]])).tolist()
        [3.0, -inf]
    """
    top = rows.abs().amax(-1).to(_wide(rows))
    exponent = torch.frexp(top).exponent.to(top.dtype)
    return exponent.masked_fill(~top.isfinite(), 0.0).masked_fill(top == 0, -math.inf)


def down_by(rows: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """Return rows * 2^-exponent, rounded only where entries underflow; an exponent that is not finite changes nothing.

    Args:
        rows: Shape (..., N).
        exponent: Whole numbers, shape (...).

    Example:
        >>> down_by(torch.tensor([[3.0, -4.0]]), torch.tensor([3.0])).tolist()
        [[0.375, -0.5]]
    """
    shift = exponent.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(-_BEYOND, _BEYOND)
    # In two halves: 2^149, which lifts the smallest float32, is no float32 itself.
    half = (shift / 2).floor()
    factors = torch.exp2(torch.stack([-half, half - shift])).to(rows.dtype)
    return rows * factors[0].unsqueeze(-1) * factors[1].unsqueeze(-1)


def square_sum(rows: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of each row in float64, whose range holds the squares of every narrower type."""
    return rows.to(_wide(rows)).square().sum(-1)


def to_host(x: torch.Tensor) -> npt.NDArray[np.float64]:
    """Return a tensor as a float64 array; on the meta device, which holds no numbers, NaN of the same shape."""
    if x.is_meta:
        return np.full(tuple(x.shape), math.nan)
    array: npt.NDArray[np.float64] = x.detach().cpu().to(torch.float64).numpy()
    return array


def norm_log2(
    squares: npt.NDArray[np.float64], exponent: npt.NDArray[np.float64], *, axis: int | None = None
) -> npt.NDArray[np.float64]:
    """Return log2 of norms that are kept as a sum of squares and an exponent: exponent + log2(squares) / 2.

    Args:
        squares: Sums of squares of the scaled rows.
        exponent: Their exponents, of the same shape; that of a zero row does not matter.
        axis: Join the rows along it into one norm. Default None: a norm for each row.

    Returns:
        log2 of the norms; -inf for 0, NaN and inf where an entry was.

    Example:
        >>> round(float(norm_log2(np.array([16.0, 48.0]), np.array([4000.0, 4000.0]), axis=0)), 6)
        4003.0
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs: Any = np.where(squares == 0, -math.inf, exponent + np.log2(squares) / 2)
        if axis is not None:
            top = np.max(np.where(np.isfinite(logs), logs, -math.inf), axis=axis, keepdims=True)
            top = np.where(np.isfinite(top), top, 0.0)
            logs = top.squeeze(axis) + np.log2(np.exp2(2 * (logs - top)).sum(axis)) / 2
    joined: npt.NDArray[np.float64] = logs
    return joined
