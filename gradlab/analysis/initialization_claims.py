"""The claims about finite width and about what an initialization leaves of the signal: C1.3, C1.4, C1.6, isometry."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gradlab.analysis.claims import (
    About,
    Claim,
    decide_exact,
    decide_greater,
    decide_theory,
    decide_threshold,
    not_decided,
)
from gradlab.analysis.finite_width import finite_width_log_norm
from gradlab.analysis.gain_claims import ABSENT, groups

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

__all__ = ["finite_width_claims", "glorot_claims", "isometry_claims", "stall_claims"]

_HANIN = "Hanin 2018, arXiv 1801.03744; Hanin & Nica 2018, arXiv 1812.05994; the exact law is derived"


def finite_width_claims(log_norms: pd.DataFrame) -> list[Claim]:
    """Decide C1.3: fluctuations of ReLU nets follow the exact law, not its leading order.

    Args:
        log_norms: Columns width, depth and log_norm (of ||J u||^2), one row a net.
    """
    scores: dict[str, list[tuple[float, str]]] = {"mean": [], "variance": []}
    dead = 0
    for (width, depth), rows in groups(log_norms, ["width", "depth"]):
        values = rows["log_norm"].to_numpy(float)
        dead += int(np.isneginf(values).sum())
        values, law = values[np.isfinite(values)], finite_width_log_norm(width, depth)
        size, where = len(values), f"{width} wide, {depth} deep"
        if size < 2:
            continue
        mean, variance = float(values.mean()), float(values.var(ddof=1))
        scores["mean"].append(
            ((mean - law.mean) / math.sqrt(law.variance / size), f"{where} {mean:.3f} ({law.mean:.3f})")
        )
        # A sample variance is the law's times chi^2 over its degrees of freedom, as of a normal law.
        z = (variance / law.variance - 1) / math.sqrt(2 / (size - 1))
        scores["variance"].append((z, f"{where} {variance:.2f} ({law.variance:.2f}; 5 beta {5 * law.beta:.2f})"))
    texts = {
        "mean": "The mean of ln ||J u||^2 over He-initialized ReLU nets is that of the exact law of finite width.",
        "variance": "Its variance is that of the exact law too: depth over width decides it, 5 beta to leading order.",
    }
    claims = []
    for name, text in texts.items():
        about = About(id=f"C1.3 {name}", statement=text, source=_HANIN, unit="largest |z|")
        if scores[name]:
            nets = int(log_norms.groupby(["width", "depth"]).size().min())
            about["detail"] = (
                f"{nets} nets a size, {dead} dead ones left out. Measured (exact): "
                f"{', '.join(words for _, words in scores[name])}."
            )
            largest = max(abs(z) for z, _ in scores[name])
            claims.append(decide_threshold([largest], threshold=3.0, direction="<", min_samples=1, **about))
        else:
            claims.append(not_decided(ABSENT, **about))
    return claims


def glorot_claims(singular: pd.DataFrame) -> list[Claim]:
    """Decide C1.4, Glorot and Bengio's mean singular value of the last layer (columns scheme, seed, layer, mean)."""
    claims = []
    for scheme, (low, high), said in (
        ("normalized", (0.72, 0.85), "is around 0.8"),
        ("standard", (0.45, 0.50), "drops down to 0.5"),
    ):
        about = About(
            id=f"C1.4 {scheme}",
            statement=f"The mean singular value of the last layer's Jacobian in an untrained tanh net {said} with the "
            f"{scheme} initialization: between {low:g} and {high:g}.",
            source="Glorot & Bengio 2010, section 4.2.1; the range is this project's",
            unit="last layer",
        )
        rows = singular[singular["scheme"] == scheme] if len(singular) else singular
        if rows.empty:
            claims.append(not_decided(ABSENT, **about))
            continue
        by_layer = rows.groupby("layer")["mean"].mean()
        about["detail"] = f"By layer: {', '.join(f'{value:.3f}' for value in by_layer)}."
        last = rows[rows["layer"] == rows["layer"].max()].sort_values("seed")["mean"].to_numpy(float)
        middle = (low + high) / 2
        claims.append(decide_theory(last, middle, rel_tol=(high - low) / 2 / middle, within_se=None, **about))
    return claims


def _last_losses(losses: pd.DataFrame, init: str, window: int) -> NDArray[np.float64]:
    """Return the mean training loss over the last steps, by seed; inf where a run diverged."""
    if losses.empty:
        return np.empty(0)
    rows = losses[losses["init"] == init]
    rows = rows[rows["step"] > rows["step"].max() - window]
    found: NDArray[np.float64] = rows.groupby("seed")["loss"].mean().to_numpy(float)
    return np.where(np.isfinite(found), found, np.inf)


def stall_claims(losses: pd.DataFrame, *, depth: int, window: int) -> list[Claim]:
    """Decide C1.6: He's initialization trains a deep ReLU net on which Xavier's and torch's default stall.

    Args:
        losses: Columns init, seed, step and loss.
        depth: Hidden layers of the nets.
        window: Steps at the end over which losses are averaged.
    """
    he, xavier, default = (_last_losses(losses, init, window) for init in ("he_normal", "glorot_normal", "default"))
    source = "He et al. 2015b, arXiv 1502.01852, section 2.2; sizes and threshold of this project"
    what = f"a {depth}-layer ReLU net"
    trains = About(
        id="C1.6 He", source=source, unit="training loss",
        statement=f"He's initialization trains {what} to a lower loss than Xavier's in as many steps.",
    )  # fmt: skip
    claims = []
    if len(he) and len(xavier):
        trains["detail"] = f"Last losses: He {he.mean():.3f}, Xavier {xavier.mean():.3f}."
        finite = [np.where(np.isinf(ends), np.nan, ends) for ends in (xavier, he)]
        claims.append(decide_greater(*finite, paired=False, **trains))
    else:
        claims.append(not_decided(ABSENT, **trains))
    for key, name, ends in (("Xavier", "Xavier's initialization", xavier), ("default", "torch's default", default)):
        about = About(
            id=f"C1.6 {key}", source=source, unit="training loss",
            statement=f"With {name} the training of {what} stalls: its loss stays above 2.2 (guessing has 2.303).",
        )  # fmt: skip
        if len(ends):
            claims.append(decide_threshold(ends, threshold=2.2, direction=">", **about))
        else:
            claims.append(not_decided(ABSENT, **about))
    return claims


def isometry_claims(spectra: pd.DataFrame) -> list[Claim]:
    """Decide what orthogonal weights do to the singular values of a deep net's input-output Jacobian.

    Args:
        spectra: Columns activation, weights ("orthogonal" or "Gaussian"), seed, rank and value.
    """
    saxe = "Saxe et al. 2014, arXiv 1312.6120"
    pennington = "Pennington et al. 2017, arXiv 1711.04735"
    linear = About(
        id="isometry linear",
        statement="Every singular value of a deep linear net with orthogonal weights is exactly 1.",
        source=saxe,
        unit="1 + largest |value - 1|",
    )
    tanh = About(
        id="isometry tanh",
        statement="Of a deep tanh net at sigma_w^2 = 1 the singular values spread less with orthogonal weights than "
        "with Gaussian ones.",
        source=pennington,
        unit="ln of largest over median",
    )
    if spectra.empty:
        return [not_decided(ABSENT, **linear), not_decided(ABSENT, **tanh)]

    def spreads(weights: str) -> NDArray[np.float64]:
        rows = spectra[(spectra["activation"] == "tanh") & (spectra["weights"] == weights)]
        runs = rows.groupby("seed")["value"]  # not their spread as a whole: the smallest are rounding of the largest
        found: NDArray[np.float64] = (runs.max() / runs.median()).to_numpy(float)
        return np.log(found)

    exact = spectra[(spectra["activation"] == "linear") & (spectra["weights"] == "orthogonal")]["value"]
    gaussian, orthogonal = spreads("Gaussian"), spreads("orthogonal")
    claims = []
    if len(exact):
        claims.append(decide_exact(1.0 + float((exact - 1).abs().max()), 1.0, rel_tol=1e-10, **linear))
    else:
        claims.append(not_decided(ABSENT, **linear))
    if len(gaussian) and len(orthogonal):
        tanh["detail"] = f"Gaussian {gaussian.mean():.3f}, orthogonal {orthogonal.mean():.3f}."
        claims.append(decide_greater(gaussian, orthogonal, paired=False, **tanh))
    else:
        claims.append(not_decided(ABSENT, **tanh))
    return claims
