"""What the weights of a recurrent net alone say about its gradient through time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from gradlab.errors import UsageError, unknown

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["PascanuBounds", "pascanu_bounds"]

#: Largest slope of each nonlinearity.
_SLOPES: Final = {"tanh": 1.0, "relu": 1.0, "linear": 1.0, "sigmoid": 0.25}


@dataclass(frozen=True, kw_only=True, slots=True)
class PascanuBounds:
    """The bound on the factor of the gradient per step, ||dh_{t+1}/dh_t|| <= sigma_max(W) gamma.

    Args:
        sigma_max: Largest singular value of W.
        spectral_radius: Largest modulus of an eigenvalue of W; for comparison only, the theorem does not use it.
        gamma: Largest slope of the nonlinearity.
        bound: sigma_max * gamma.
        must_vanish: Whether bound < 1: sufficient for the gradient to vanish, whatever the input.
        can_explode: Whether bound > 1: necessary for the gradient to explode, not sufficient.
    """

    sigma_max: float
    spectral_radius: float
    gamma: float
    bound: float
    must_vanish: bool
    can_explode: bool


def pascanu_bounds(weight: ArrayLike, nonlinearity: str) -> PascanuBounds:
    """Return what the recurrent weights alone say about the gradient of h_{t+1} = phi(W h_t + input).

    Each Jacobian is diag(phi') W, so its norm is at most sigma_max(W) gamma with gamma = max |phi'|. Below 1 gradients
    vanish at least as fast as bound^lag; above 1 they may explode, or vanish all the same.

    Args:
        weight: W, shape (hidden, hidden), as `weight_hh_l0` of nn.RNN.
        nonlinearity: "tanh", "relu" or "linear" (gamma 1), or "sigmoid" (gamma 1/4).

    Returns:
        The bound and its two consequences.

    Raises:
        UsageError: An unknown nonlinearity, or a weight that is not a finite square matrix.

    Note:
        Often quoted with the spectral radius in place of sigma_max, which is not the theorem: of a wide Gaussian W with
        spectral radius g, sigma_max is about 2 g.

    Example:
        >>> found = pascanu_bounds([[0.0, 3.0], [0.0, 0.0]], "sigmoid")
        >>> found.bound, found.spectral_radius, found.must_vanish, found.can_explode
        (0.75, 0.0, True, False)

    Source:
        Pascanu, Mikolov & Bengio 2013 (arXiv 1211.5063), section 2.1 and its proof.
    """
    if nonlinearity not in _SLOPES:
        raise unknown("nonlinearity", nonlinearity, _SLOPES)
    w = np.asarray(weight, dtype=np.float64)
    if w.ndim != 2 or w.shape[0] != w.shape[1] or not w.size or not np.isfinite(w).all():
        raise UsageError(
            f"The weight has shape {w.shape}, but must be a finite square matrix (hidden, hidden); give W of h_t."
        )
    gamma = _SLOPES[nonlinearity]
    sigma_max = float(np.linalg.norm(w, 2))
    bound = sigma_max * gamma
    return PascanuBounds(
        sigma_max=sigma_max,
        spectral_radius=float(np.abs(np.linalg.eigvals(w)).max()),
        gamma=gamma,
        bound=bound,
        must_vanish=bound < 1.0,
        can_explode=bound > 1.0,
    )
