"""A tensor to its statistics, in as few reads as eager torch allows.

Every reduction leaves one row of eight numbers (`ROW`). They are chosen so that the statistics of the tables follow
from them on the host, with norms right over the whole range of the dtype:

    norm = scale * sqrt(squares),  mean = scale * sum / n,  std = scale * sqrt(spread / n)

where spread is the sum of squares about the mean.

Three ways lead there. On the CPU, where reading a result is no synchronization, a compiled kernel reads a float32
tensor once (`native`); where it could not be built, and for other dtypes, a row takes three or four vectorized
reductions of torch. Either way the rare tensor that this would get wrong (squares that leave the range, NaN, Inf, a
mean far larger than the spread) is read again in float64. On every other device there is no branch on data and no
transfer: float16, bfloat16 and float32 are accumulated in float64, whose range holds their squares; float64 itself,
and every dtype on devices that have none, is scaled by the largest absolute entry first.
"""

from __future__ import annotations

import math
import sys
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from gradlab.probes import native

__all__ = [
    "ROW",
    "can_reduce",
    "cpu_row",
    "device_row",
    "flat_view",
    "has_memory",
    "is_dense",
    "is_distributed",
    "norm_of",
    "statistics",
]

#: Places in a row. A row holds NaN where a tensor was not reduced.
ROW: Final = ("scale", "sum", "squares", "spread", "min", "max", "zeros", "nonfinite")

_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_EMPTY = (1.0, 0.0, 0.0, 0.0, math.nan, math.nan, 0.0, 0.0)
_BLOCK = 1 << 16  # entries a slow-path block: its float64 copy stays in the second-level cache
_FEW = 1 << 13
_FAST_BLOCK = 1 << 20  # entries a fast-path block: keeps float32 accumulation error small on huge tensors
# Below, squares lost to underflow (each at most 1.4e-45) could matter among up to 1e14 entries.
_SAFE_SQUARES = {torch.float32: 1e-25, torch.float64: 1e-290}
# A variance that is a smaller share of the mean square than this has lost digits to cancellation.
_SAFE_VARIANCE = {torch.float32: 1e-3, torch.float64: 1e-10}


def can_reduce(x: torch.Tensor) -> bool:
    """Return whether `x` is a dense real tensor of a dtype that torch can reduce (float8, say, it cannot).

    What torch.func hands through a model (under vmap, grad, jvp) has no entries of its own to read; those of a
    DTensor lie on several ranks, which a hook must not wait for.
    """
    if x.dtype not in _DTYPES or x.layout is not torch.strided or x.is_nested or _is_transformed(x):
        return False
    return has_memory(x) or not is_distributed(x)


#: Private to torch; where it is missing, nothing is taken for transformed.
_is_transformed = getattr(getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", lambda _: False)


def has_memory(x: torch.Tensor) -> bool:
    """Return whether the address that `x` gives is that of its entries; a wrapper's (DTensor, say) is 0."""
    return type(x) in _PLAIN


_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


def is_distributed(x: torch.Tensor) -> bool:
    """Return whether `x` is a DTensor; where nobody has imported them yet, there are none."""
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and isinstance(x, package.DTensor)


def is_dense(x: torch.Tensor) -> bool:
    """Return whether the entries of `x` fill its memory without a gap, in the usual order or channels last."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def flat_view(x: torch.Tensor) -> torch.Tensor:
    """Return the entries of `x` in one contiguous dimension, in memory order where that needs no copy."""
    if x.is_contiguous():
        return x.view(-1)
    if (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)) or (
        x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)
    ):
        return x.as_strided((x.numel(),), (1,))
    return x.reshape(-1).contiguous()  # of an expanded tensor, such as the gradient of a sum, reshape is a view


def cpu_row(x: torch.Tensor, *, moments: bool = True, norm_only: bool = False) -> tuple[float, ...]:
    """Reduce a real floating-point CPU tensor to a row.

    Args:
        x: Any shape; no gradient is followed.
        moments: The row must give mean and std too, so their cancellation is watched.
        norm_only: Fill only what norm and nonfinite need; the other places are NaN. One read.
    """
    flat = flat_view(x)
    n = flat.numel()
    if n == 0:
        return _EMPTY
    if flat.dtype is torch.float32 and has_memory(flat) and (kernel := native.kernel()) is not None:
        return kernel.norm(flat) if norm_only else kernel.row(flat, moments=moments)
    if flat.dtype not in _SAFE_SQUARES:  # float16, bfloat16: widened block by block
        return _exact_row(flat)
    total = squares = zeros = 0.0
    low, high = math.inf, -math.inf
    for block in flat.split(_FAST_BLOCK) if n > _FAST_BLOCK else (flat,):
        squares += torch.dot(block, block).item()
        if norm_only:
            continue
        if moments:
            total += block.sum().item()
        least, most = torch.aminmax(block)
        low, high = min(low, least.item()), max(high, most.item())
        # torch counts one entry at a time: of few that is quickest, of many a vectorized comparison is.
        few = block.numel() <= _FEW
        zeros += (
            block.numel() - torch.count_nonzero(block).item()
            if few
            else torch.eq(block, 0, out=torch.empty_like(block)).sum().item()
        )
    safe = math.isfinite(squares) and squares >= _SAFE_SQUARES[flat.dtype]
    spread = squares - total * total / n if moments else math.nan
    if safe and moments and not norm_only:
        safe = spread > _SAFE_VARIANCE[flat.dtype] * squares  # False where total is not finite
    if not safe and not (low == high == 0.0):
        return _exact_row(flat) if moments and not norm_only else _scaled_row(flat)
    if norm_only:
        return (1.0, math.nan, squares, math.nan, math.nan, math.nan, math.nan, 0.0)
    return (1.0, total if moments else math.nan, squares, spread, low, high, zeros, 0.0)


def _scaled_row(flat: torch.Tensor) -> tuple[float, ...]:
    """Reduce without moments, each entry divided by the largest: squares stay in range however small or large."""
    least, most = torch.aminmax(flat)
    low, high = least.item(), most.item()  # NaN where any entry is
    top = max(abs(low), abs(high))
    if not (math.isfinite(top) and top > 0):
        return _exact_row(flat)
    squares = zeros = 0.0
    for block in flat.split(_FAST_BLOCK):
        scaled = block / top
        squares += torch.dot(scaled, scaled).item()
        zeros += torch.eq(block, 0, out=scaled).sum().item()
    return (top, math.nan, squares, math.nan, low, high, zeros, 0.0)


def _exact_row(flat: torch.Tensor) -> tuple[float, ...]:
    """Reduce in blocks of float64 about a pivot, scaled where float64 squares would leave the range."""
    low_tensor, high_tensor = torch.aminmax(flat)
    low, high = low_tensor.item(), high_tensor.item()  # NaN where any entry is
    top = max(abs(low), abs(high))
    scale = top if flat.dtype == torch.float64 and math.isfinite(top) and top > 0 else 1.0
    wide = torch.empty(min(flat.numel(), _BLOCK), dtype=torch.float64)
    n, zeros, nonfinite = flat.numel(), 0.0, 0.0
    pivot = flat[0].item() / scale
    pivot = pivot if math.isfinite(pivot) else 0.0
    total = squares = about_total = about_squares = 0.0
    for block in flat.split(_BLOCK):
        x = wide[: block.numel()].copy_(block)
        if scale != 1.0:
            x.div_(scale)
        zeros += torch.count_nonzero(x == 0).item()
        if not math.isfinite(top):
            nonfinite += block.numel() - torch.count_nonzero(torch.isfinite(x)).item()
        total += x.sum().item()
        squares += torch.dot(x, x).item()
        x.sub_(pivot)
        about_total += x.sum().item()
        about_squares += torch.dot(x, x).item()
    spread = about_squares - about_total**2 / n
    spread = 0.0 if spread < 0 else spread  # keeps NaN
    return (scale, total, squares, spread, low, high, zeros, nonfinite)


def device_row(x: torch.Tensor) -> torch.Tensor:
    """Reduce a real floating-point tensor to a float row on its own device, without a branch on data or a transfer.

    Runs on CUDA, MPS and the meta device; also on the CPU, where a test compares the two ways.
    """
    flat = flat_view(x)
    wide = torch.float32 if flat.device.type == "mps" else torch.float64
    if flat.numel() == 0:  # made on the device: a tensor made from a list would be copied there, and waited for
        return torch.stack([torch.full((), value, device=flat.device, dtype=wide) for value in _EMPTY])
    low, high = (end.to(wide) for end in torch.aminmax(flat))
    zeros = flat.numel() - torch.count_nonzero(flat)
    nonfinite = flat.numel() - torch.isfinite(flat).sum()
    if _range_holds_squares(flat.dtype, wide):
        scale = torch.ones((), device=flat.device, dtype=wide)
        total = flat.sum(dtype=wide)
        squares = torch.linalg.vector_norm(flat, dtype=wide).square()
        spread = (squares - total.square() / flat.numel()).clamp(min=0)  # float64 has digits to spare here
    else:
        top = torch.maximum(low.abs(), high.abs())
        scale = torch.where(torch.isfinite(top) & (top > 0), top, torch.ones_like(top))
        scaled = flat.to(wide) / scale
        total = scaled.sum()
        squares = scaled.square().sum()
        spread = (scaled - total / flat.numel()).square().sum()
    return torch.stack([scale, total, squares, spread, low, high, zeros.to(wide), nonfinite.to(wide)])


def _range_holds_squares(dtype: torch.dtype, wide: torch.dtype) -> bool:
    """Return whether `wide` holds the squares of `dtype`, with digits to spare for the spread about a mean."""
    return wide is torch.float64 and dtype is not torch.float64


def norm_of(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the L2 norm of each row (last axis: `ROW`)."""
    with np.errstate(invalid="ignore", over="ignore"):
        norms: npt.NDArray[np.float64] = rows[..., 0] * np.sqrt(rows[..., 2])
    return norms


def statistics(rows: npt.NDArray[np.float64], entries: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.float64]]:
    """Return the statistics that rows stand for.

    Args:
        rows: Shape (k, 8), places as in `ROW`.
        entries: Shape (k,), the number of entries each tensor had.

    Returns:
        mean, std (population), norm, abs_max, zero_fraction, nonfinite: each of shape (k,). Where a tensor holds a
        NaN or Inf, its moments are NaN or Inf as arithmetic has it, and `nonfinite` counts them.
    """
    scale, total, _, spread, low, high, zeros, nonfinite = rows.T
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        n = np.where(entries > 0, entries, np.nan)
        mean = scale * (total / n)  # the total alone may leave the range
        return {
            "mean": mean,
            "std": scale * np.sqrt(spread / n),
            "norm": norm_of(rows),
            "abs_max": np.maximum(np.abs(low), np.abs(high)),
            "zero_fraction": zeros / n,
            "nonfinite": nonfinite,
        }
