"""What finite width adds to mean-field theory: the exact law of the gradient norm in ReLU nets at He's init."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import digamma, gammaln, polygamma

from gradlab.analysis.theory import _check_whole

__all__ = ["LogNormLaw", "finite_width_log_norm"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LogNormLaw:
    """Mean and variance of ln ||J u||^2 over random nets, given that the net is alive.

    Args:
        mean: Of the natural logarithm.
        variance: Of the natural logarithm.
        alive: Probability that no layer is dead, (1 - 2^-width)^depth; ||J u|| is 0 in a dead net.
        beta: sum of 1 / width over layers: to leading order the mean is -5/2 beta and the variance 5 beta.
    """

    mean: float
    variance: float
    alive: float
    beta: float


def finite_width_log_norm(width: int, depth: int) -> LogNormLaw:
    """Return the law of ln ||J u||^2 for a ReLU net at He's initialization: J its Jacobian, u a fixed unit vector.

    ln ||J u||^2 = sum over layers of ln((2 / width) chi^2_K), K ~ Binomial(width, 1/2), exactly and at any width: half
    of the units are on by chance, and each that is on adds the square of a Gaussian. Gradients follow the same law.

    Args:
        width: Units of each layer, input included, at least 1.
        depth: Layers W and ReLU, at least 1.

    Raises:
        UsageError: A value is not a whole number of at least 1.

    Note:
        The variance exceeds 5 beta by 2 % at width 100 and by 70 % at width 10.

    Example:
        >>> law = finite_width_log_norm(100, 50)
        >>> round(law.mean, 2), round(law.variance, 2), law.beta
        (-1.27, 2.6, 0.5)

    Source:
        Hanin 2018 (arXiv 1801.03744) and Hanin & Nica 2018 (arXiv 1812.05994) for beta; the exact law is derived here.
    """
    _check_whole("width", width, 1)
    _check_whole("depth", depth, 1)
    on = np.arange(1, width + 1, dtype=np.float64)
    log_weight = gammaln(width + 1) - gammaln(on + 1) - gammaln(width - on + 1) - width * math.log(2)
    alive = -math.expm1(-width * math.log(2))
    weight = np.exp(log_weight) / alive
    log_mean = digamma(on / 2) + math.log(2) + math.log(2 / width)  # E ln chi^2_K = psi(K / 2) + ln 2
    mean = float(weight @ log_mean)
    variance = float(weight @ polygamma(1, on / 2) + weight @ (log_mean - mean) ** 2)
    return LogNormLaw(mean=depth * mean, variance=depth * variance, alive=alive**depth, beta=depth / width)
