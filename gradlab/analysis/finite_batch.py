"""BatchNorm's gradient explosion at a finite batch: means over a channel that is uniform on a sphere."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import eigh_tridiagonal

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from gradlab.analysis.activations import Activation

__all__ = ["finite_batch_squared_gain"]

_NODES = 128


def finite_batch_squared_gain(phi: Activation, batch_size: int) -> float:
    """Return the growth of the squared gradient norm per layer, BatchNorm over B samples before phi, in a wide net.

    At the fixed point all samples have one variance and one correlation, so a normalized channel z is sqrt(B) times a
    uniform unit vector among those that sum to zero. With P the projection that takes the mean off and
    D = diag(phi'(z)), the gradient at the next layer has covariance proportional to P, and

        gain^2 = B / (B - 3) * E[tr(P D (P - z z^T / B) D P)] / E[|P phi(z)|^2].

    The first factor is the mean of 1 / chi^2, B - 1 degrees of freedom: the length of a channel before it is
    normalized. All else are means over one or two entries of z, which are correlated by -1 / (B - 1).

    Args:
        phi: The activation.
        batch_size: B, at least 4.

    Returns:
        The squared gain; (B - 2) / (B - 3) for the identity; inf or NaN where phi is constant.
    """
    B = float(batch_size)
    one, pair = _homogeneous(phi, B) if phi.slopes is not None else _by_quadrature(phi, B)
    # P D P D P has the trace (1 - 2/B) sum D_i^2 + (sum D_i)^2 / B^2; z is orthogonal to what P takes off.
    slopes = (B - 2) * one["slope"] + (one["slope"] + (B - 1) * pair["slope"]) / B
    along_z = (B - 1) * (one["scale"] - pair["scale"]) / B
    spread = (B - 1) * (one["value"] - pair["value"])
    if not spread > 0.0:
        return math.inf
    return B / (B - 3) * (slopes - along_z) / spread


_Means = dict[str, float]


def _homogeneous(phi: Activation, B: float) -> tuple[_Means, _Means]:
    """Return the means of squares and of products of two entries, of phi' ("slope"), phi ("value") and z phi'."""
    assert phi.slopes is not None
    low, high = phi.slopes
    even, odd = ((high - low) / 2) ** 2, ((high + low) / 2) ** 2
    rho = -1 / (B - 1)
    # Of two Gaussians of correlation rho: a sphere's differ by the length, whose mean square is that of z.
    sizes = 2 / math.pi * (math.sqrt(1 - rho**2) + rho * math.asin(rho))
    signs = 2 / math.pi * math.asin(rho)
    value = odd * rho + even * sizes
    total = odd + even
    return (
        {"slope": total, "value": total, "scale": total},
        {"slope": odd + even * signs, "value": value, "scale": value},
    )


def _by_quadrature(phi: Activation, B: float) -> tuple[_Means, _Means]:
    """Return the same for any phi: Gauss quadrature, exact to rounding if smooth, to about 1e-3 where phi' jumps."""
    n = B - 1
    t, first = _sphere_nodes(n)
    u, second = _sphere_nodes(n - 1)
    rho = -1 / n
    x = math.sqrt(n) * t
    across = math.sqrt(1 - rho**2) * np.sqrt(1 - t[:, None] ** 2) * u
    y = math.sqrt(n) * (rho * t[:, None] + across)
    weights = first[:, None] * second
    functions: dict[str, Callable[[float], float]] = {
        "slope": phi.derivative,
        "value": phi.phi,
        "scale": lambda z: z * phi.derivative(z),
    }
    one, pair = {}, {}
    for name, scalar in functions.items():
        function = np.vectorize(scalar, otypes=[np.float64])
        at_x = function(x)
        one[name] = float(first @ at_x**2)
        pair[name] = float(np.sum(weights * at_x[:, None] * function(y)))
    return one, pair


def _sphere_nodes(n: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return Gauss nodes and weights for one coordinate of a uniform unit vector in n dimensions, n >= 2.

    Its density is proportional to (1 - t^2)^((n - 3) / 2): the Gegenbauer polynomials' weight, by Golub and Welsch.
    """
    k = np.arange(1, _NODES, dtype=np.float64)
    rise = (n - 2) / 2
    squares = np.empty_like(k)
    squares[0] = 1 / n
    later = k[1:]
    squares[1:] = later * (later + 2 * rise - 1) / (4 * (later + rise) * (later + rise - 1))
    nodes, vectors = eigh_tridiagonal(np.zeros(_NODES), np.sqrt(squares))
    return np.asarray(nodes, dtype=np.float64), np.asarray(vectors[0], dtype=np.float64) ** 2
