"""What theory says of normalized and residual nets: closed forms at initialization."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gradlab.analysis.activations import gaussian_mean, named
from gradlab.analysis.finite_batch import finite_batch_squared_gain
from gradlab.analysis.theory import _check_whole
from gradlab.errors import UsageError

if TYPE_CHECKING:
    from gradlab.analysis.activations import Activation

__all__ = ["batchnorm_gradient_gain", "residual_batchnorm_share", "residual_variance_growth"]

_CONSTANT = "Activation '{}' is constant, but BatchNorm needs one that varies; give another."


def batchnorm_gradient_gain(activation: str | Activation = "relu", batch_size: int | None = None) -> float:
    """Return the growth of the gradient norm per layer when BatchNorm stands before the activation.

    gain = sqrt(E[phi'(z)^2] / Var[phi(z)]), z ~ N(0, 1): for relu sqrt(pi / (pi - 1)) = 1.2112, for linear 1. The
    weight scale drops out. It is never below 1: with Hermite coefficients a_k its square is sum k a_k^2 / sum a_k^2,
    k >= 1.

    Args:
        activation: A name of `ACTIVATIONS` or an `Activation`. Default "relu", the case of the source.
        batch_size: Samples the statistics are taken over, at least 4. Default None: infinitely many. A finite batch
            has the larger gain: each channel is divided by a length that fluctuates.

    Returns:
        The gain of the norm; the squared norm grows by its square, 1.4669 for relu (1.5220 at a batch of 32).

    Raises:
        UsageError: An unknown activation, a constant one, or a batch of less than 4 (the mean of 1 / variance is
            infinite at 3).

    Note:
        The limit of infinite width. It holds for the gradient at the normalized tensor, and needs samples that are
        equally correlated: uncorrelated after centering, a stable state since Var[phi] >= E[phi']^2. With `batch_size`
        it needs a width well above it: at width 512 relu's squared gain was measured at 1.5216 for a batch of 32
        (1.5220 here), but at 1.466 for 128 (1.4797 here) and 1.448 for 512, where the infinite batch's 1.4669 is the
        nearer one by chance.

    Example:
        >>> round(batchnorm_gradient_gain(), 4), batchnorm_gradient_gain("linear")
        (1.2112, 1.0)
        >>> round(batchnorm_gradient_gain("linear", batch_size=8) ** 2, 4)  # (B - 2) / (B - 3)
        1.2

    Source:
        Yang et al. 2019 (arXiv 1902.08129); the closed form for any phi and the form at a finite batch are derived
        here.
    """
    phi = named(activation)
    if batch_size is not None:
        _check_whole("batch_size", batch_size, 4)
        square = finite_batch_squared_gain(phi, batch_size)
        if not math.isfinite(square):
            raise UsageError(_CONSTANT.format(phi.name))
        return math.sqrt(square)
    if phi.slopes is not None and phi.second_moment is not None:
        slope_square = phi.second_moment
        variance = slope_square - (phi.slopes[1] - phi.slopes[0]) ** 2 / (2 * math.pi)
    else:
        slope_square = gaussian_mean(lambda x: phi.derivative(x) ** 2, 1.0)
        size = math.sqrt(gaussian_mean(lambda x: phi.phi(x) ** 2, 1.0))
        mean = gaussian_mean(phi.phi, 1.0, absolute=1e-11 * size)
        variance = gaussian_mean(lambda x: (phi.phi(x) - mean) ** 2, 1.0)
    if not variance > 0.0:
        raise UsageError(_CONSTANT.format(phi.name))
    return math.sqrt(slope_square / variance)


def residual_batchnorm_share(block: int) -> float:
    """Return the residual branch's share of the variance at the output of a block, 1 / (block + 1).

    Args:
        block: Number of the block, counted from 1 at the input, in a net with BatchNorm on every residual branch.

    Raises:
        UsageError: `block` is not a whole number of at least 1.

    Note:
        Each normalized branch adds variance 1 to an input of variance 1, at initialization; good for block >= 10.

    Example:
        >>> residual_batchnorm_share(3)
        0.25

    Source:
        De & Smith 2020 (arXiv 2002.10444), section 3.
    """
    _check_whole("block", block, 1)
    return 1.0 / (block + 1)


def residual_variance_growth(blocks: int, *, normalized: bool = False, branch_scale: float = 1.0) -> float:
    """Return the variance after some residual blocks, relative to that before the first.

    (1 + alpha^2)^blocks without normalization (He's initialization: a branch keeps the variance of its input, so it
    doubles with every block); 1 + alpha^2 blocks with BatchNorm on each branch.

    Args:
        blocks: Number of blocks passed, at least 0.
        normalized: Whether each branch ends at variance 1. Default False.
        branch_scale: alpha, the factor on each branch. Default 1, a plain residual net; 0 is SkipInit's start.

    Raises:
        UsageError: A value is out of range.

    Note:
        Expected values at initialization. The squared gradient norm without normalization grows by the same factor.

    Example:
        >>> residual_variance_growth(10), residual_variance_growth(10, normalized=True)
        (1024.0, 11.0)

    Source:
        De & Smith 2020 (arXiv 2002.10444), sections 2 and 3.
    """
    _check_whole("blocks", blocks, 0)
    if not math.isfinite(branch_scale):
        raise UsageError(f"branch_scale is {branch_scale}, but it must be finite; give a number such as 1.")
    step = branch_scale**2
    return 1.0 + step * blocks if normalized else math.exp(blocks * math.log1p(step))
