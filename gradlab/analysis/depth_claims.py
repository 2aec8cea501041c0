"""The claims about depth: C1.5, C2.1 to C2.6 and C3.4's residual share, each decided by a rule fixed beforehand.

Each function takes tidy tables and returns claims; which cells made the tables is not its business. A table may be
empty, or lack seeds, where cells are missing: then its claims are not decided. Numbers that were expected are the
published or derived ones, given with their source.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gradlab.analysis.claims import (
    About,
    Claim,
    Verdict,
    decide_exact,
    decide_greater,
    decide_theory,
    decide_threshold,
    not_decided,
)
from gradlab.analysis.decay import fit_decay
from gradlab.analysis.normalization_theory import batchnorm_gradient_gain, residual_batchnorm_share
from gradlab.analysis.samples import mean_interval
from gradlab.analysis.theory import vgg_b_he_ratio

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "counts_claim",
    "degradation_claims",
    "explosion_claim",
    "profile_claims",
    "response_claims",
    "share_claims",
    "shattering_claims",
    "test_error_claim",
    "unnormalized_claims",
    "vgg_claim",
]

_HE = "He et al. 2015, arXiv 1512.03385"
#: Exact parameters of He's CIFAR nets, width 16; the paper rounds them to .27M ... 19.4M.
_COUNTS = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962, 1202: 19_421_274}
#: Table 6 of the paper: test error of the residual nets, percent.
_TABLE_6 = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.43}
_ABSENT = "No finished cell measured this."


def _by_seed(frame: pd.DataFrame, value: str, **where: object) -> pd.Series[float]:
    """Return one column by seed, in order, of the rows where the other columns have given values."""
    if frame.empty:
        return pd.Series(dtype=np.float64)
    for column, wanted in where.items():
        frame = frame[frame[column] == wanted]
    return frame.set_index("seed")[value].astype(np.float64).sort_index()


def _paired(*groups: pd.Series[float]) -> list[NDArray[np.float64]]:
    """Return groups side by side, the same seeds in the same order; a seed that a group lacks is NaN in it."""
    table = pd.concat(groups, axis=1).sort_index()
    return [table.iloc[:, place].to_numpy(dtype=np.float64) for place in range(len(groups))]


def _mean(values: NDArray[np.float64] | pd.Series[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def counts_claim(counts: pd.DataFrame) -> Claim:
    """Decide whether the nets are He's, by their parameter counts (columns depth, parameters)."""
    found = {} if counts.empty else dict(zip(counts["depth"], counts["parameters"], strict=True))
    listed = ", ".join(f"{depth}: {count:,}" for depth, count in found.items())
    return decide_exact(
        float(sum(found.get(depth) == count for depth, count in _COUNTS.items())) if found else math.nan,
        float(len(_COUNTS)),
        rel_tol=1e-10,
        id="C2.1 size",
        statement="The nets of six depths have exactly the published numbers of parameters.",
        unit="depths",
        source=f"{_HE}, Table 6, exact counts derived",
        detail=f"{listed}." if found else _ABSENT,
    )


def test_error_claim(ends: pd.DataFrame, *, full_recipe: bool) -> list[Claim]:
    """Decide Table 6 of the paper from test errors (columns net, norm, depth, seed, test_error)."""
    listed = ", ".join(f"{depth}: {error}" for depth, error in _TABLE_6.items())
    whole = About(
        id="C2.1 error",
        statement=f"Residual nets reach Table 6's test error within 0.5 points: {listed}",
        source=f"{_HE}, Table 6",
        unit="% test error",
    )
    if not full_recipe:
        reason = "Needs the paper's recipe: 64,000 steps on CIFAR-10 at 32x32 (preset 'paper', on a GPU)."
        return [not_decided(reason, **whole)]
    claims = []
    for depth, expected in _TABLE_6.items():
        errors = _by_seed(ends, "test_error", net="residual", norm="batch", depth=depth)
        if len(errors):
            about = whole | About(
                id=f"C2.1 error {depth}",
                statement=f"ResNet-{depth} reaches {expected} % within 0.5.",
                source=whole["source"],
            )
            claims.append(decide_theory(errors, expected, rel_tol=0.5 / expected, within_se=None, **about))
    return claims or [not_decided(_ABSENT, **whole)]


def degradation_claims(losses: pd.DataFrame) -> list[Claim]:
    """Decide whether depth hurts plain nets and skips cure it (columns net, norm, depth, seed, loss)."""
    texts = {
        "C2.2a": "With BatchNorm, the deep plain net trains worse than the shallow one (degradation).",
        "C2.2b": "At the larger depth, the residual net trains better than the plain one.",
        "C2.2c": "Depth costs the plain net more than the residual one (difference of the two gaps).",
        "C2.2d": "The deeper residual net trains better than the shallow one.",
    }
    source = f"{_HE}, Fig. 6; sizes and rule of this project"
    about = {key: About(id=key, statement=text, source=source, unit="training loss") for key, text in texts.items()}
    normed = losses if losses.empty else losses[losses["norm"] == "batch"]
    depths = [] if normed.empty else sorted(normed["depth"].unique())
    if len(depths) < 2 or set(normed["net"]) < {"plain", "residual"}:
        reason = "Needs BatchNorm nets of both kinds at two depths at least."
        return [not_decided(reason, **words) for words in about.values()]
    shallow, deep = depths[0], depths[-1]
    places = [("plain", shallow), ("plain", deep), ("residual", shallow), ("residual", deep)]
    found = _paired(*(_by_seed(normed, "loss", net=net, depth=depth) for net, depth in places))
    # Missing and diverged runs alike leave a pair undecided; how many there are is the decider's to say.
    values = [np.where(np.isinf(ends), np.nan, ends) for ends in found]
    plain, residual = (values[0], values[1]), (values[2], values[3])
    means = ", ".join(f"{net}-{depth} {group.mean():.3g}" for (net, depth), group in zip(places, values, strict=True))
    pairs = {
        "C2.2a": (plain[1], plain[0], 0.01),
        "C2.2b": (plain[1], residual[1], 0.05),
        "C2.2c": (plain[1] - plain[0], residual[1] - residual[0], 0.05),
        "C2.2d": (residual[0], residual[1], 0.05),
    }
    return [
        decide_greater(
            worse,
            better,
            paired=True,
            alpha=alpha,
            **(about[key] | {"detail": f"Mean losses: {means}." if key == "C2.2a" else ""}),
        )
        for key, (worse, better, alpha) in pairs.items()
    ]


def unnormalized_claims(losses: pd.DataFrame, depth: int) -> list[Claim]:
    """Decide what training does without BatchNorm at a depth; a diverged run has loss Inf."""
    claims = []
    for net, how in (("plain", "the loss stays near ln 10"), ("residual", "it diverges or dies")):
        samples = _by_seed(losses, "loss", norm="none", depth=depth, net=net)
        about = About(
            id=f"C2.3 {net}",
            source="derived; prototype of this project",
            unit="training loss",
            statement=f"Without BatchNorm the {net} net of depth {depth} does not learn: {how}.",
        )
        if len(samples):
            about["detail"] = (
                f"{int(np.isinf(samples).sum())} of {len(samples)} diverged, which counts as a loss of Inf."
            )
            claims.append(decide_threshold(samples, threshold=2.2, direction=">", **about))
        else:
            claims.append(not_decided("No such net was trained.", **about))
    return claims


#: C2.3: the gradient norm at the first block over that at the last, CIFAR-10 at 16x16, width 16, batch 64.
_TABULATED = {
    "plain, BatchNorm": {20: 24.0, 56: 8.9e3, 110: 1.0e7},
    "plain, He": {20: 0.142, 56: 9.6e-3, 110: 4.3e-4},
    "plain, torch default": {20: 2.9e-8, 56: 4.1e-23, 110: 4.1e-46},
    "residual, BatchNorm": {20: 8.2, 56: 31.0, 110: 53.0},
    "residual, He": {20: 5.9, 56: 2.3e3, 110: 2.3e7},
    "residual, SkipInit": {20: 0.33, 56: 0.37, 110: 0.37},
}


def profile_claims(ratios: pd.DataFrame, *, as_tabulated: bool) -> list[Claim]:
    """Decide how the gradient at initialization depends on depth (columns net, depth, seed, log10_ratio).

    Args:
        ratios: log10 of the gradient norm at the first block over that at the last.
        as_tabulated: Data, size and width are those of the tabulated ratios, so their order of magnitude is tested.
    """
    depths = [] if ratios.empty else sorted(ratios["depth"].unique())
    shallow, deep = (depths[0], depths[-1]) if depths else (math.nan, math.nan)
    name = f"plain-{deep}" if depths else "the deepest plain net"
    source = "He et al. 2015, sec. 4.1; Yang et al. 2019; De & Smith 2020; ratios derived"
    per_layer = 1.0 / (deep - 2)

    def at(net: str, depth: float) -> pd.Series[float]:
        return _by_seed(ratios, "log10_ratio", net=net, depth=depth)

    def about(key: str, unit: str, statement: str) -> About:
        return About(id=f"C2.3 {key}", source=source, unit=unit, statement=statement, detail="" if depths else _ABSENT)

    claims = [
        decide_threshold(
            10 ** (at("plain, torch default", deep) * per_layer),
            threshold=0.6,
            direction="<",
            **about(
                "vanish",
                "a layer",
                f"Without BatchNorm, at torch's default init, the gradient of {name} vanishes: the norm "
                "falls to less than 0.6 a layer (theory sqrt(1/6) = 0.41, at the border less).",
            ),
        ),
        decide_threshold(
            10 ** (at("plain, BatchNorm", deep) * per_layer),
            threshold=1.1,
            direction=">",
            **about(
                "explode",
                "a layer",
                f"With BatchNorm the gradient of {name} explodes at init: more than 1.1 a layer (theory "
                "1.211 for wide layers).",
            ),
        ),
    ]
    power = about(
        "power",
        "exponent",
        "With skips and BatchNorm it grows like a small power of depth, not exponentially: exponent below 2"
        + (f" between depths {shallow} and {deep}." if len(depths) > 1 else "."),
    )
    if len(depths) > 1:
        first, last = _paired(at("residual, BatchNorm", shallow), at("residual, BatchNorm", deep))
        exponent = (last - first) / math.log10(deep / shallow)
        claims.append(decide_threshold(exponent, threshold=2.0, direction="<", **power))
    else:
        claims.append(not_decided("Needs two depths at least.", **power))
    flat = np.max(np.abs(_paired(*(at("residual, SkipInit", depth) for depth in depths))), axis=0) if depths else []
    text = "With SkipInit and no BatchNorm it is flat: within a factor of 10 at every depth."
    claims.append(decide_threshold(flat, threshold=1.0, direction="<", **about("flat", "decades", text)))
    return claims + (_tabulated_claims(ratios) if as_tabulated and depths else [])


def _tabulated_claims(ratios: pd.DataFrame) -> list[Claim]:
    claims = []
    for net, table in _TABULATED.items():
        depths = [depth for depth in table if (ratios["depth"] == depth).any()]
        found = [_by_seed(ratios, "log10_ratio", net=net, depth=depth).mean() for depth in depths]
        wrong = [value - math.log10(table[depth]) for depth, value in zip(depths, found, strict=True)]
        listed = ", ".join(f"{d}: {10**v:.2g} ({table[d]:.2g})" for d, v in zip(depths, found, strict=True))
        claims.append(
            decide_threshold(
                [float(np.max(np.abs(wrong)))] if wrong else [],
                threshold=1.0,
                direction="<",
                min_samples=1,
                id=f"C2.3 {net}",
                unit="decades off",
                detail=f"Measured (tabulated) {listed}.",
                source="prototype of this project, CIFAR-10 at 16x16, width 16",
                statement="First over last gradient norm has the tabulated order of magnitude at each depth.",
            )
        )
    return claims


def explosion_claim(explosion: pd.DataFrame, width: int) -> Claim:
    """Decide Yang's rate from ln gradient norms at normalized tensors (columns seed, place, log_grad_norm)."""
    gains, detail = np.empty(0), _ABSENT
    if not explosion.empty:
        middle = explosion[explosion["place"].between(5, 35)]
        table = middle.pivot_table(index="seed", columns="place", values="log_grad_norm")
        fit = fit_decay(table.columns.to_numpy(dtype=float), table.to_numpy(), backward=True)
        gains = np.exp(-2 * np.array(fit.slopes))
        detail = f"Fit over layers 5 to 35 of 40, R^2 = {fit.r_squared:.4f}, width {width}, batch 128."
    return decide_theory(
        gains,
        batchnorm_gradient_gain("relu") ** 2,
        rel_tol=0.02 if width >= 256 else 0.05,
        within_se=None,
        id="C2.4",
        unit="a layer, squared norm",
        source="Yang et al. 2019, arXiv 1902.08129",
        statement="Each BatchNorm+ReLU layer multiplies the squared gradient norm by pi/(pi-1) = 1.467 (the norm "
        "by 1.211).",
        detail=detail,
    )


def shattering_claims(shattering: pd.DataFrame) -> list[Claim]:
    """Decide Balduzzi's shattering from autocorrelations (columns kind, draw, lag, autocorrelation)."""

    def draws(kind: str) -> NDArray[np.float64]:
        if shattering.empty:
            return np.empty(0)
        first = shattering[(shattering["lag"] == 1) & (shattering["kind"] == kind)]
        return first.sort_values("draw")["autocorrelation"].to_numpy(dtype=np.float64)

    source = "Balduzzi et al. 2017, arXiv 1702.08591; thresholds of this project"
    plain, residual = draws("plain-24"), draws("residual-50 beta=0.1")
    mean, low, high = mean_interval(plain)
    nearest, farthest = max(low, -high, 0.0), max(abs(low), abs(high))  # NaN where there is no interval
    decided = Verdict.REPRODUCED if farthest < 0.1 else Verdict.NOT_REPRODUCED if nearest >= 0.1 else None
    wide = "The interval is too wide: more draws are needed."
    white = not_decided(
        (f"{len(plain)} draws." if decided else wide) if len(plain) else _ABSENT,
        rule="(R) Reproduced if the 95 % interval of the mean over draws lies within 0.1 of zero, not reproduced if it "
        "lies beyond.",
        expected="within 0.1 of 0",
        n=len(plain),
        id="C2.5a",
        unit="autocorrelation",
        source=source,
        statement="A plain BatchNorm net of 24 layers has gradients like white noise: autocorrelation at lag 1 "
        "within 0.1 of zero.",
    )
    white = replace(white, measured=mean, low=low, high=high, verdict=decided or Verdict.NOT_DECIDED)
    other = draws("residual-50 beta=1")
    smooth = decide_greater(
        residual,
        np.full(len(residual), 0.8),
        paired=True,
        id="C2.5b",
        unit="above 0.8",
        source=source,
        statement="A residual BatchNorm net of 50 layers with beta = 0.1 keeps them smooth: autocorrelation at lag 1 "
        "above 0.8.",
        detail=f"Mean {_mean(residual):.3f}; with beta = 1 it is {_mean(other):.3f}: beta is part of the claim."
        if len(residual)
        else _ABSENT,
    )
    return [white, smooth]


def response_claims(responses: pd.DataFrame) -> list[Claim]:
    """Decide Fig. 7 from responses after training (columns net, depth, seed, second, std)."""
    about = About(id="C2.6", statement="", unit="std", source=f"{_HE}, Fig. 7")
    smaller = "After training, residual responses are smaller than plain ones at "
    order = about | {"id": "C2.6 order", "statement": "The deeper residual net has the smaller responses."}
    if responses.empty:
        about["statement"] = f"{smaller}equal depth."
        return [not_decided(_ABSENT, **about), not_decided(_ABSENT, **order)]
    second = responses[responses["second"]]
    medians = second.groupby(["net", "depth", "seed"])["std"].median().reset_index()
    depths = sorted(medians["depth"].unique())
    claims = []
    for depth in depths:
        pair = [_by_seed(medians, "std", net=net, depth=depth) for net in ("plain", "residual")]
        about["id"] = f"C2.6 {depth}"
        about["statement"] = f"{smaller}depth {depth} (median over blocks of the second BatchNorm's std)."
        about["detail"] = f"Plain {_mean(pair[0]):.3f}, residual {_mean(pair[1]):.3f}."
        claims.append(decide_greater(*_paired(*pair), paired=True, **about))
    if len(depths) < 2:
        return [*claims, not_decided("Needs two depths at least.", **order)]
    ends = _paired(*(_by_seed(medians, "std", net="residual", depth=depth) for depth in (depths[0], depths[-1])))
    return [*claims, decide_greater(*ends, paired=True, **order)]


def share_claims(shares: pd.DataFrame) -> list[Claim]:
    """Decide the residual branch's share of variance (columns seed, block, share)."""
    return [
        decide_theory(
            _by_seed(shares, "share", block=block),
            residual_batchnorm_share(block),
            rel_tol=0.1,
            within_se=None,
            id=f"C3.4 block {block}",
            unit="of the variance",
            source="De & Smith 2020, arXiv 2002.10444",
            statement=f"BatchNorm downscales the branch of block {block} to 1/{block + 1} of the block's variance.",
            detail=_ABSENT if shares.empty else "",
        )
        for block in (10, 25, 50)
    ]


def vgg_claim(quotient: float) -> Claim:
    """Decide He's 1/1.7e4 from the measured quotient of gradients; NaN where it was not measured."""
    return decide_exact(
        quotient,
        vgg_b_he_ratio(),
        rel_tol=1e-4,
        id="C1.5",
        statement="With std 0.01 the gradient of VGG-B shrinks 1.7e4 times more from conv10 to conv2 than "
        "with He's initialization.",
        unit="quotient",
        source="He et al. 2015b, arXiv 1502.01852, sec. 2.2; exact product 16,728.76",
    )
