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
import threading
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from gradlab.probes import native

__all__ = [
    "PLAIN",
    "ROW",
    "SAFE_EXPONENTS",
    "SAFE_SQUARES",
    "SAFE_VARIANCE",
    "address_of",
    "can_reduce",
    "cpu_row",
    "device_row",
    "device_rows",
    "exact_row",
    "flat_view",
    "has_memory",
    "is_dense",
    "is_distributed",
    "narrow_dtype",
    "norm_of",
    "range_holds_squares",
    "spread_of",
    "statistics",
    "wide_dtype",
]

#: Places in a row. A row holds NaN where a tensor was not reduced.
ROW: Final = ("scale", "sum", "squares", "spread", "min", "max", "zeros", "nonfinite")

_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_EMPTY = (1.0, 0.0, 0.0, 0.0, math.nan, math.nan, 0.0, 0.0)
_BLOCK = 1 << 16  # entries a slow-path block: its float64 copy stays in the second-level cache
_FEW = 1 << 13
_FAST_BLOCK = 1 << 17  # entries a fast-path block: it stays in the cache, and float32 sums of it keep their digits
#: Below, squares lost to underflow (each at most 1.4e-45) could matter among up to 1e14 entries.
SAFE_SQUARES: Final = {torch.float32: 1e-25, torch.float64: 1e-290}
#: A variance that is a smaller share of the mean square than this has lost digits to cancellation.
SAFE_VARIANCE: Final = {torch.float32: 1e-3, torch.float64: 1e-10}
#: Exponents of the largest entry between which no square that counts leaves the range, and the largest of a scale.
SAFE_EXPONENTS: Final = {torch.float32: (-20, 30, 126), torch.float64: (-400, 400, 1000)}


def can_reduce(x: torch.Tensor) -> bool:
    """Return whether `x` is a dense real tensor of a dtype that torch can reduce (float8, say, it cannot).

    What torch.func hands through a model (under vmap, grad, jvp) has no entries of its own to read; those of a
    DTensor lie on several ranks, which a hook must not wait for.
    """
    if x.dtype not in _DTYPES or x.layout is not torch.strided or x.is_nested or _is_transformed(x):
        return False
    return type(x) in PLAIN or not is_distributed(x)


#: Private to torch; where it is missing, nothing is taken for transformed.
_is_transformed = getattr(getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", lambda _: False)


def has_memory(x: torch.Tensor) -> bool:
    """Return whether the address that `x` gives is that of its entries; a wrapper's (DTensor, say) is 0."""
    return type(x) in PLAIN


#: Classes of tensors that are no wrappers.
PLAIN: Final = frozenset({torch.Tensor, torch.nn.Parameter})


def is_distributed(x: torch.Tensor) -> bool:
    """Return whether `x` is a DTensor; where nobody has imported them yet, there are none."""
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and isinstance(x, package.DTensor)


def is_dense(x: torch.Tensor) -> bool:
    """Return whether the entries of `x` fill its memory without a gap, in the usual order or channels last."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def address_of(x: torch.Tensor) -> int:
    """Return where the entries of `x` lie without a gap and as they are, or 0 where they do not.

    What torch negates only as it reads, and zeros that it keeps in no memory at all, are not there.
    """
    return x.data_ptr() if type(x) in PLAIN and is_dense(x) and not x.is_neg() else 0


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
    if flat.numel() == 0:
        return _EMPTY
    if flat.dtype is torch.float32 and address_of(flat) and (kernel := native.kernel()) is not None:
        return kernel.norm(flat) if norm_only else kernel.row(flat, moments=moments)
    return _norm_row(flat) if norm_only else _row(flat, moments=moments)


def narrow_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that entries are added up in on the CPU, block by block: float32, or float64 for float64."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _blocks(flat: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the entries in blocks that vectorized operations read well."""
    dtype = narrow_dtype(flat.dtype)
    for block in flat.split(_FAST_BLOCK) if flat.numel() > _FAST_BLOCK else (flat,):
        yield block if block.dtype is dtype else block.to(dtype)


_VIEWS = 64  # sizes of blocks that are known at a time
_kept = threading.local()


def _scratch(like: torch.Tensor) -> torch.Tensor:
    """Return memory for one block, the same for all blocks of a thread: fresh pages would cost more than a read."""
    views: dict[tuple[torch.dtype, int], torch.Tensor] | None = getattr(_kept, "views", None)
    if views is None or len(views) > _VIEWS:
        views = _kept.views = {}
    key, whole = (like.dtype, like.numel()), (like.dtype, _FAST_BLOCK)
    if key not in views:  # cutting one costs as much as some reductions
        with torch.inference_mode(mode=False):  # what is made in that mode cannot be written to outside of it
            if whole not in views:
                views[whole] = torch.empty(_FAST_BLOCK, dtype=like.dtype, device="cpu")
            views[key] = views[whole][: key[1]]
    return views[key]


def _norm_row(flat: torch.Tensor) -> tuple[float, ...]:
    """Reduce as far as a norm needs: one read where all squares are in range."""
    squares = sum(torch.dot(block, block).item() for block in _blocks(flat))
    scale, nonfinite = 1.0, 0.0
    if not (math.isfinite(squares) and squares >= SAFE_SQUARES[narrow_dtype(flat.dtype)]):
        scale, _, squares, *_, nonfinite = _row(flat, moments=False, count=False)
    return (scale, math.nan, squares, math.nan, math.nan, math.nan, math.nan, nonfinite)


def _row(flat: torch.Tensor, *, moments: bool, count: bool = True) -> tuple[float, ...]:
    """Reduce with a power of two for a scale, told by the largest entry: so no square leaves the range.

    Zeros are counted where that is asked for.

    A block with a larger entry than those before it takes a smaller power, and so do the sums from then on.
    """
    n, dtype = flat.numel(), narrow_dtype(flat.dtype)
    least_exponent, most_exponent, largest = SAFE_EXPONENTS[dtype]
    by = math.ldexp(1.0, largest)
    total = squares = zeros = 0.0
    low, high = math.inf, -math.inf
    for block in _blocks(flat):
        ends = torch.aminmax(block)
        least, most = ends.min.item(), ends.max.item()  # NaN where any entry is
        top = max(-least, most)
        if not math.isfinite(top):
            return exact_row(flat)
        low, high = min(low, least), max(high, most)
        scratch = _scratch(block)
        # torch counts one entry at a time: of few that is quickest, of many a vectorized comparison is.
        if count and block.numel() <= _FEW:
            zeros += block.numel() - torch.count_nonzero(block).item()
        elif count:
            zeros += torch.eq(block, 0, out=scratch).sum().item()
        if top == 0:
            continue
        exponent = math.frexp(top)[1]
        safe = least_exponent < exponent < most_exponent
        wanted = 1.0 if safe else math.ldexp(1.0, max(-largest, min(-exponent, largest)))
        if wanted < by:
            total, squares, by = total * (wanted / by), squares * (wanted / by) * (wanted / by), wanted
        x = block if by == 1 else torch.mul(block, by, out=scratch)
        if moments:
            total += x.sum().item()
        # Tiny entries have so few digits that a plain loop's rounding errors go the same way: those are added in pairs.
        squares += torch.dot(x, x).item() if by == 1 else x.square_().sum().item()
    spread = squares - total * total / n
    if moments and squares > 0 and spread <= SAFE_VARIANCE[dtype] * squares:
        return exact_row(flat)
    scale = 1 / by if squares > 0 else 1.0
    return (scale, total if moments else math.nan, squares, spread if moments else math.nan, low, high, zeros, 0.0)


def exact_row(flat: torch.Tensor) -> tuple[float, ...]:
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
    """Reduce a real floating-point tensor to a float row on its own device; see `device_rows`."""
    return device_rows(flat_view(x).unsqueeze(0))[0]


def device_rows(block: torch.Tensor) -> torch.Tensor:
    """Reduce each row of a tensor, shape (k, n), to a float row on its own device, shape (k, 8).

    There is no branch on data and no transfer. Runs on CUDA, MPS and the meta device; also on the CPU, where a test
    compares the two ways.
    """
    (count, n), wide = block.shape, wide_dtype(block.device)
    if n == 0:  # made on the device: a tensor made from a list would be copied there, and waited for
        return torch.stack([torch.full((count,), value, device=block.device, dtype=wide) for value in _EMPTY], 1)
    low, high = (end.to(wide) for end in torch.aminmax(block, dim=1))
    zeros = (block == 0).sum(1)
    nonfinite = n - torch.isfinite(block).sum(1)
    if range_holds_squares(block.dtype, wide):
        total = block.sum(1, dtype=wide)
        squares = torch.linalg.vector_norm(block, dim=1, dtype=wide).square()
        scale, spread = torch.ones_like(total), spread_of(total, squares, n)
    else:
        top = torch.maximum(low.abs(), high.abs())
        scale = torch.where(torch.isfinite(top) & (top > 0), top, torch.ones_like(top))
        scaled = block.to(wide) / scale.unsqueeze(1)
        total = scaled.sum(1)
        squares = scaled.square().sum(1)
        spread = (scaled - (total / n).unsqueeze(1)).square().sum(1)
    return torch.stack([scale, total, squares, spread, low, high, zeros.to(wide), nonfinite.to(wide)], 1)


def spread_of(total: torch.Tensor, squares: torch.Tensor, n: int | torch.Tensor) -> torch.Tensor:
    """Return the sum of squares about the mean, of float64 sums: they have digits to spare for what cancels."""
    return (squares - total.square() / n).clamp(min=0)


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the widest dtype of floats that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def range_holds_squares(dtype: torch.dtype, wide: torch.dtype) -> bool:
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
