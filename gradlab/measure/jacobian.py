"""Singular values of Jacobians: from layer to layer or from input to output, whole or only the largest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from gradlab.errors import UsageError, unknown

__all__ = ["jacobian_spectrum"]

_LARGEST_WHOLE = 1 << 22  # entries of a Jacobian that is computed whole: 32 MiB, and seconds for its SVD
_ROWS_AT_ONCE = 128

Function = Callable[[torch.Tensor], torch.Tensor]


def jacobian_spectrum(
    function: Function,
    x: torch.Tensor,
    *,
    k: int | None = None,
    method: Literal["auto", "exact", "lanczos"] = "auto",
    seed: int = 0,
) -> npt.NDArray[np.float64]:
    """Return the singular values of J = d f(x) / d x, the largest first.

    They say what the function does to small changes of its input, and to gradients, direction by direction: all 1 is
    dynamical isometry. For layer to layer, give a layer (or a slice of an `nn.Sequential`) and its input.

    Args:
        function: A module or any differentiable function of one tensor. It is called as it is: put a module in the
            mode you mean.
        x: Where; any shape, floating point. With a batch dimension where the function needs one; give one sample, as
            J mixes all entries of x with all entries of f(x).
        k: How many values. Default: all min(entries of x, entries of f(x)).
        method: "exact" computes J row by row and its SVD in float64; "lanczos" never forms J but multiplies with it and
            its transpose (ARPACK on J^T J), and finds the k largest, k below the number of all. Default "auto": exact
            for up to 4 million entries of J, or where all values are wanted.
        seed: Of the vector that "lanczos" starts from.

    Returns:
        Shape (k,), float64. All NaN where the Jacobian is not finite.

    Raises:
        UsageError: x is not floating point, f(x) does not depend on it, k is out of range, or an unknown method.

    Note:
        The accuracy is that of x's dtype: give float64 for values many orders below the largest. "lanczos" squares J,
        so its small values are uncertain by about 1e-8 of the largest.

    Example:
        >>> matrix = torch.tensor([[3.0, 0.0], [0.0, -2.0], [0.0, 0.0]])
        >>> jacobian_spectrum(lambda x: matrix @ x, torch.zeros(2)).round(6).tolist()
        [3.0, 2.0]

    Source:
        Saxe et al. 2014 (arXiv 1312.6120) and Pennington et al. 2017 (arXiv 1711.04735) for dynamical isometry.
    """
    if method not in ("auto", "exact", "lanczos"):
        raise unknown("method", method, ("auto", "exact", "lanczos"))
    if not x.is_floating_point():
        raise UsageError(f"x has dtype {x.dtype}, but a derivative needs floating point; give x.double(), say.")
    with torch.enable_grad():
        start = x.detach().requires_grad_(True)
        y = function(start)
    if not isinstance(y, torch.Tensor) or not y.requires_grad:
        raise UsageError("The function's output does not depend on x through torch; give a differentiable function.")
    most = min(x.numel(), y.numel())
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= most):
        raise UsageError(f"k is {k!r}, but the Jacobian has {most} singular values; give a whole number from 1 to it.")
    whole = k is None or k == most
    if method == "lanczos" and whole:
        raise UsageError(f"k is {k}, but method='lanczos' finds fewer than all {most} values; give k below it.")
    if method == "exact" or whole or (method == "auto" and x.numel() * y.numel() <= _LARGEST_WHOLE):
        matrix = _rows(y, start)
        if not np.isfinite(matrix).all():
            return np.full(k or most, np.nan)
        # torch's LAPACK: numpy's from PyPI takes ten times as long for 500 x 500.
        values: npt.NDArray[np.float64] = torch.linalg.svdvals(torch.from_numpy(matrix)).numpy()
        return values[:k]
    assert k is not None
    return _lanczos(y, start, k, seed)


def _rows(y: torch.Tensor, start: torch.Tensor) -> npt.NDArray[np.float64]:
    """Return the Jacobian, shape (entries of y, entries of x)."""
    outputs, inputs = y.numel(), start.numel()
    matrix = np.empty((outputs, inputs))
    for first in range(0, outputs, _ROWS_AT_ONCE):
        count = min(_ROWS_AT_ONCE, outputs - first)
        seeds = y.new_zeros((count, outputs))
        seeds[range(count), range(first, first + count)] = 1
        seeds = seeds.view(count, *y.shape)
        try:
            (found,) = torch.autograd.grad(y, start, seeds, retain_graph=True, is_grads_batched=True)
        except RuntimeError:  # an operator without a batching rule
            found = torch.stack([torch.autograd.grad(y, start, one, retain_graph=True)[0] for one in seeds])
        matrix[first : first + count] = found.reshape(count, inputs).double().cpu().numpy()
    return matrix


def _lanczos(y: torch.Tensor, start: torch.Tensor, k: int, seed: int) -> npt.NDArray[np.float64]:
    from scipy.sparse.linalg import LinearOperator, svds

    # The backward pass u -> J^T u is linear in u, so its own backward pass is v -> J v.
    u = torch.zeros_like(y, requires_grad=True)
    (back,) = torch.autograd.grad(y, start, u, create_graph=True)

    def as_tensor(vector: npt.NDArray[np.float64], like: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(vector)).to(like).view_as(like)

    def as_vector(tensor: torch.Tensor) -> npt.NDArray[np.float64]:
        out: npt.NDArray[np.float64] = tensor.detach().flatten().double().cpu().numpy()
        return out

    def forward(vector: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        if not back.requires_grad:  # J is constantly 0 in the direction of every u
            return np.zeros(y.numel())
        return as_vector(torch.autograd.grad(back, u, as_tensor(vector, start), retain_graph=True)[0])

    def backward(vector: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return as_vector(torch.autograd.grad(y, start, as_tensor(vector, y), retain_graph=True)[0])

    first = np.random.default_rng(seed).standard_normal(min(y.numel(), start.numel()))
    if not (np.isfinite(forward(np.ones(start.numel()))).all() and np.isfinite(backward(np.ones(y.numel()))).all()):
        return np.full(k, np.nan)
    operator = LinearOperator((y.numel(), start.numel()), matvec=forward, rmatvec=backward, dtype=np.float64)
    values = svds(operator, k=k, v0=first, return_singular_vectors=False, solver="arpack")
    largest: npt.NDArray[np.float64] = np.sort(np.asarray(values, dtype=np.float64))[::-1].copy()
    return largest
