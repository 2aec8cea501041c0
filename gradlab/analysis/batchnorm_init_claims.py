"""The claims about BatchNorm at initialization: C2.4, the explosion, and C3.4, growth along residual blocks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gradlab.analysis.claims import About, Claim, decide_greater, decide_theory, not_decided
from gradlab.analysis.decay import fit_decay
from gradlab.analysis.normalization_theory import batchnorm_gradient_gain, residual_variance_growth

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["explosion_claims", "growth_claims", "squared_gains"]

_ABSENT = "No finished cell measured this."
_YANG = "Yang et al. 2019, arXiv 1902.08129"
_DE_SMITH = "De & Smith 2020, arXiv 2002.10444"


def squared_gains(explosion: pd.DataFrame) -> pd.DataFrame:
    """Return the growth of the squared gradient norm per layer, fitted between an eighth and seven eighths of depth.

    Args:
        explosion: Columns activation, norm, batch_size, width, seed, place, log_grad_norm.

    Returns:
        Columns activation, norm, batch_size, width, seed, gain, r_squared.
    """
    by = ["activation", "norm", "batch_size", "width", "seed"]
    rows = []
    for key, run in explosion.groupby(by, sort=False) if len(explosion) else ():
        deep = run["place"].max()
        kept = run[run["place"].between(deep / 8, deep * 7 / 8)].sort_values("place")
        fit = fit_decay(kept["place"].to_numpy(float), kept["log_grad_norm"].to_numpy(float), backward=True)
        rows.append((*key, fit.gain**2, fit.r_squared))
    return pd.DataFrame(rows, columns=[*by, "gain", "r_squared"])


def explosion_claims(explosion: pd.DataFrame) -> list[Claim]:
    """Decide Yang's rate by batch size and activation, the finite batch's, and that BatchNorm is the worse choice."""
    gains = squared_gains(explosion)
    sizes = sorted(gains["batch_size"].unique()) or [128]
    middle = 128 if 128 in sizes else sizes[len(sizes) // 2]

    def of(activation: str, norm: str, size: int) -> NDArray[np.float64]:
        kept = gains[(gains["activation"] == activation) & (gains["norm"] == norm) & (gains["batch_size"] == size)]
        out: NDArray[np.float64] = kept.sort_values("seed")["gain"].to_numpy(dtype=np.float64)
        return out

    wide = bool(len(gains)) and int(gains["width"].iloc[0]) >= 256
    claims = [_rate("relu", size, of("relu", "batch", size), wide) for size in sizes]
    claims += [_rate(activation, middle, of(activation, "batch", middle), wide) for activation in ("tanh", "linear")]
    small = sizes[0]
    claims.append(
        decide_theory(
            of("relu", "batch", small),
            batchnorm_gradient_gain("relu", batch_size=small) ** 2 if small >= 4 else math.nan,
            rel_tol=0.02,
            within_se=None,
            id="C2.4 finite",
            unit="a layer, squared norm",
            source="derived in this project, after " + _YANG,
            statement=f"At the smallest batch, {small}, the rate is that of the finite batch.",
            detail="Infinite width; the theory of this project.",
        )
    )
    about = About(
        id="C2.4 worse",
        unit="a layer, squared norm",
        source=_YANG,
        statement="At initialization BatchNorm is the worse choice for a deep plain ReLU net: its gradient grows "
        "faster with depth than that of He's initialization without it.",
    )
    both = gains[(gains["activation"] == "relu") & (gains["batch_size"] == middle)]
    table = both.pivot_table(index="seed", columns="norm", values="gain").reindex(columns=["batch", "none"]).dropna()
    pair = table["batch"].to_numpy(), table["none"].to_numpy()
    if len(table):
        depth = int(explosion["place"].max())
        about["detail"] = (
            f"With {pair[0].mean():.4f}, without {pair[1].mean():.4f}: over {depth} layers the norm grows by "
            f"{pair[0].mean() ** (depth / 2):.3g} against {pair[1].mean() ** (depth / 2):.3g}."
        )
        claims.append(decide_greater(*pair, paired=True, **about))
    else:
        claims.append(not_decided(_ABSENT, **about))
    return claims


def _rate(activation: str, size: int, gains: NDArray[np.float64], wide: bool) -> Claim:
    expected = batchnorm_gradient_gain(activation) ** 2
    finite = batchnorm_gradient_gain(activation, batch_size=size) ** 2
    written = "pi/(pi-1) = 1.467" if activation == "relu" else f"{expected:.4g}"
    return decide_theory(
        gains,
        expected,
        rel_tol=0.02 if size >= 128 and wide else 0.05,
        within_se=None,
        id=f"C2.4 {activation} {size}",
        unit="a layer, squared norm",
        source=_YANG,
        statement=f"With a batch of {size}, each BatchNorm+{activation} layer multiplies the squared gradient norm by "
        f"{written}.",
        detail=f"Theory of a batch of {size} at infinite width: {finite:.4f}." if len(gains) else _ABSENT,
    )


def growth_claims(growth: pd.DataFrame) -> list[Claim]:
    """Decide how signal and gradient grow along residual blocks (columns kind, block, seed, signal, gradient)."""
    blocks = int(growth["block"].max()) if len(growth) else 50
    claims = []
    for column, text in (("signal", "mean square of the signal"), ("gradient", "mean square of the gradient")):
        rates = []
        for _, run in growth[growth["kind"] == "no norm"].groupby("seed") if len(growth) else ():
            kept = run[run["block"] >= 10].sort_values("block")
            fit = fit_decay(
                kept["block"].to_numpy(float), np.log(kept[column].to_numpy(float)), backward=column == "gradient"
            )
            rates.append(fit.gain)
        claims.append(
            decide_theory(
                rates,
                residual_variance_growth(1),
                rel_tol=0.03,
                within_se=None,
                id=f"C3.4 {column}",
                unit="a block",
                source=_DE_SMITH,
                statement=f"Without BatchNorm every residual block doubles the {text}.",
                detail=f"Fit from block 10 to {blocks}." if rates else _ABSENT,
            )
        )
    for block in (10, 25, 50):
        about = About(
            id=f"C3.4 linear {block}",
            unit="mean square over the input's",
            source=_DE_SMITH,
            statement=f"With BatchNorm on the branches it grows by 1 a block: {1 + block} after block {block}.",
        )
        if block > blocks:
            claims.append(not_decided(f"The net has {blocks} blocks.", **about))
            continue
        signal = _at(growth, "BatchNorm", block)
        expected = residual_variance_growth(block, normalized=True)
        about["detail"] = "" if len(signal) else _ABSENT
        claims.append(decide_theory(signal, expected, rel_tol=0.1, within_se=None, **about))
    scaled = _at(growth, "no norm, scaled", blocks)
    theory = residual_variance_growth(blocks, branch_scale=blocks**-0.5)
    claims.append(
        decide_theory(
            scaled,
            theory,
            rel_tol=0.1,
            within_se=None,
            id="C3.4 alpha",
            unit="mean square over the input's",
            source=_DE_SMITH,
            statement=f"alpha = 1/sqrt(L) on the branches, no BatchNorm, ends at (1 + 1/L)^L = {theory:.3f} (< e).",
            detail="" if len(scaled) else _ABSENT,
        )
    )
    return claims


def _at(growth: pd.DataFrame, kind: str, block: int) -> NDArray[np.float64]:
    if growth.empty:
        return np.empty(0)
    kept = growth[(growth["kind"] == kind) & (growth["block"] == block)]
    out: NDArray[np.float64] = kept.sort_values("seed")["signal"].to_numpy(dtype=np.float64)
    return out
