"""The claims about activations and weight scales in wide nets: C1.1 and C1.2, notes N1 and N12."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gradlab.analysis.activations import ACTIVATIONS, piecewise_linear
from gradlab.analysis.claims import (
    About,
    Claim,
    Verdict,
    decide_exact,
    decide_theory,
    decide_threshold,
    not_decided,
)
from gradlab.analysis.correlations import correlation_fixed_point, depth_scale
from gradlab.analysis.decay import DecayFit, fit_decay
from gradlab.analysis.theory import fixed_point, gain_profile, gradient_gain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from gradlab.analysis.activations import Activation

__all__ = [
    "ABSENT",
    "activation_of",
    "activation_title",
    "chaos_claims",
    "fitted_gains",
    "gain_claims",
    "groups",
    "steepest_slope",
    "variances_of",
    "worst",
]

ABSENT = "No finished cell measured this."
_POOLE = "Poole et al. 2016, arXiv 1606.05340; Schoenholz et al. 2017, arXiv 1611.01232"
_WEIGHT_VARS = {"default": 1 / 3, "lecun_normal": 1.0, "glorot_normal": 1.0, "glorot_uniform": 1.0, "he_normal": 2.0,
                "orthogonal": 1.0}  # fmt: skip
_CRITICAL = 1e-6  # |gain - 1| of a cell at criticality
_ORDER = (Verdict.REPRODUCED, Verdict.NOT_DECIDED, Verdict.NOT_REPRODUCED)


def activation_of(name: str) -> Activation:
    """Return the activation that a cell's setting names: one of torch's, or two slopes such as "0.2:1.5"."""
    below, colon, above = name.partition(":")
    return piecewise_linear(float(below), float(above)) if colon else ACTIVATIONS[name]


def activation_title(name: str) -> str:
    """Return what to call an activation in a sentence."""
    return name if ":" not in name else f"piecewise linear ({name.replace(':', ', ')})"


def steepest_slope(name: str) -> float:
    """Return the largest slope of an activation."""
    phi = activation_of(name)
    return round(max(phi.derivative(x) for x in np.linspace(-8, 8, 641).tolist()), 9)


def variances_of(init: str, width: int) -> tuple[float, float]:
    """Return sigma_w^2 and sigma_b^2 of square layers at an initialization, by name or sigma_w^2 as a number."""
    weight_var = _WEIGHT_VARS[init] if init in _WEIGHT_VARS else float(init)
    # torch's default draws biases of variance 1 / (3 fan_in): little, but tanh at .5762 a layer has .5774 without.
    return weight_var, 1 / (3 * width) if init == "default" else 0.0


def groups(frame: pd.DataFrame, by: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    """Yield (values of the columns `by`, the rows that have them) in the order of their first row; none if empty."""
    if len(frame):
        yield from frame.groupby(list(by), sort=False)


def _middle(profile: pd.DataFrame) -> pd.DataFrame:
    """Return the layers that rates are fitted over: 10 to 40 of 50."""
    depth = profile["layer"].max()
    return profile[profile["layer"].between(depth / 5, 4 * depth / 5)]


def _fit(rows: pd.DataFrame) -> DecayFit:
    return fit_decay(rows["layer"].to_numpy(float), rows["log_grad_norm"].to_numpy(float), backward=True)


def fitted_gains(profiles: pd.DataFrame) -> pd.DataFrame:
    """Return measured and predicted gain of the gradient norm a layer, for each net.

    Args:
        profiles: Columns activation, init, depth, width, seed, layer and log_grad_norm.

    Returns:
        Columns activation, init, depth, width, seed, gain, r_squared, theory (sqrt(chi_1); where the length falls to 0
        as a power of depth, the theory's own gains fitted over the same layers), critical (whether that is so) and
        chi_gain (sqrt(chi_1) itself).
    """
    keys = ["activation", "init", "depth", "width", "seed"]
    known: dict[tuple[Any, ...], tuple[float, float, bool]] = {}
    rows = []
    for key, net in groups(profiles, keys):
        fit, cell = _fit(_middle(net)), key[:4]
        if cell not in known:
            known[cell] = _predict(*cell)
        rows.append((*key, fit.gain, fit.r_squared, *known[cell]))
    found = pd.DataFrame(rows, columns=[*keys, "gain", "r_squared", "theory", "chi_gain", "critical"])
    return found.sort_values(["activation", "depth", "chi_gain", "init", "seed"], ignore_index=True)


def _predict(name: str, init: str, depth: int, width: int) -> tuple[float, float, bool]:
    phi, (weight_var, bias_var) = activation_of(name), variances_of(init, width)
    gain = gradient_gain(phi, weight_var, bias_var)
    critical = phi.slopes is None and abs(gain - 1) < _CRITICAL and fixed_point(phi, weight_var, bias_var) == 0.0
    if not critical:
        return gain, gain, False
    return _fit(_middle(_predicted_profile(phi, weight_var, bias_var, depth))).gain, gain, True


def _predicted_profile(phi: Activation, weight_var: float, bias_var: float, depth: int) -> pd.DataFrame:
    """Return ln of the gradient norm by layer at finite depth, as a net with inputs of variance 1 has it."""
    gains = np.log(gain_profile(phi, weight_var, bias_var, depth=depth, start=weight_var + bias_var))
    # The gradient enters at the last pre-activations, and gains[l - 1] lies between layers l and l + 1.
    log_norm = np.append(np.cumsum(gains[:-1][::-1])[::-1], 0.0)
    return pd.DataFrame({"layer": np.arange(1, depth + 1), "log_grad_norm": log_norm})


def worst(cells: list[tuple[str, Claim]], about: About) -> Claim:
    """Return one claim for many cells: the numbers of the cell that is worst, and the worst verdict.

    Args:
        cells: Label and claim of each cell, each about a ratio to theory, expected to be 1.
        about: What the claim says, in place of the cells' own.
    """
    label, claim = max(
        cells, key=lambda item: (_ORDER.index(item[1].verdict), abs(np.nan_to_num(item[1].measured, nan=0.0) - 1))
    )
    detail = " ".join(part for part in (about.get("detail", ""), f"Farthest off: {label}.", claim.detail) if part)
    return replace(claim, id=about["id"], statement=about["statement"], source=about["source"], detail=detail)


# -- C1.1 -------------------------------------------------------------------------------------------------------------


def gain_claims(profiles: pd.DataFrame) -> list[Claim]:
    """Decide C1.1 and the notes N1 and N12.

    Args:
        profiles: As `fitted_gains` takes them; empty where nothing was measured.
    """
    columns = ["activation", "init", "depth", "width", "seed", "gain", "r_squared", "theory", "chi_gain", "critical"]
    fits = fitted_gains(profiles) if len(profiles) else pd.DataFrame(columns=columns)
    return [*_rates(fits), *_power_law(profiles, fits), *_notes(fits)]


def _rates(fits: pd.DataFrame) -> list[Claim]:
    claims = []
    for (name,), own in groups(fits, ["activation"]):
        cells, listed = [], []
        for (init, depth), cell in groups(own, ["init", "depth"]):
            gain, theory = cell["gain"].mean(), cell["theory"].iloc[0]
            listed.append(f"{init} {gain:.4f} ({theory:.4f}{'*' if cell['critical'].iloc[0] else ''})")
            if not cell["critical"].iloc[0]:
                cells.append((f"{init}, depth {depth}", _rate(cell, depth)))
        about = About(
            id=f"C1.1 {name}",
            statement=f"The gradient norm of wide {activation_title(name)} nets changes by sqrt(chi_1) a layer at "
            "every initialization.",
            source=f"{_POOLE}; finite width lowers the mean log by about 5 / (4 width) a layer",
            detail=f"Measured (theory): {', '.join(listed)}."
            + (" * critical: the theory's own profile." if own["critical"].any() else ""),
        )
        if cells:
            claims.append(worst(cells, about))
        else:
            claims.append(not_decided("Only critical cells were measured.", **about))
    if not claims:
        text = "The gradient norm of wide nets changes by sqrt(chi_1) a layer."
        claims.append(not_decided(ABSENT, id="C1.1", statement=text, source=_POOLE))
    return claims


def _rate(cell: pd.DataFrame, depth: int) -> Claim:
    theory, width = float(cell["theory"].iloc[0]), int(cell["width"].iloc[0])
    claim = decide_theory(
        cell["gain"].to_numpy(float) / theory,
        1.0,
        rel_tol=0.01 if width >= 256 else 0.05,
        within_se=None,
        id="C1.1",
        statement="",
        source="",
        unit="of sqrt(chi_1)",
    )
    rule = f"{claim.rule[:-1]}; and, where the norm changes by more than a factor e, R^2 of the exponential above .99."
    changes = abs(math.log(theory)) * 0.6 * depth > 1
    least = float(cell["r_squared"].min())
    if changes and not least > 0.99 and claim.verdict is Verdict.REPRODUCED:
        return replace(claim, rule=rule, verdict=Verdict.NOT_REPRODUCED, detail=f"{claim.detail} R^2 is {least:.4f}.")
    return replace(claim, rule=rule)


def _power_law(profiles: pd.DataFrame, fits: pd.DataFrame) -> list[Claim]:
    claims = []
    critical = fits[fits["critical"].astype(bool)] if len(fits) else fits
    for (name, init, depth, width), _ in groups(critical, ["activation", "init", "depth", "width"]):
        rows = profiles
        for column, value in (("activation", name), ("init", init), ("depth", depth)):
            rows = rows[rows[column] == value]
        whole, rows = rows, rows[rows["layer"] >= depth / 10]
        found = [_fit(net) for _, net in groups(rows, ["seed"])]
        predicted = _predicted_profile(activation_of(name), *variances_of(init, width), depth)
        theory = _fit(predicted[predicted["layer"] >= depth / 10])
        exponents = np.array([fit.exponent for fit in found])
        about = About(
            id=f"C1.1 {name} {init}",
            statement=f"At criticality ({name}, {init}, depth {depth}) the gradient norm changes as a power of depth, "
            "not exponentially, as fit_decay tells them apart.",
            source=_POOLE,
            unit="share of seeds called a power law",
            detail=f"Called {', '.join(sorted({fit.best for fit in found}))}. Exponent {exponents.mean():.3f}, theory "
            f"over the same layers {theory.exponent:.3f} (.5 in the limit of great depth). R^2 "
            f"{np.mean([fit.power_r_squared for fit in found]):.4f} against "
            f"{np.mean([fit.r_squared for fit in found]):.4f} of the exponential. Total over all layers "
            f"{math.exp(_total(whole)):.3f}.",
        )
        called = [float(fit.best == "power law") for fit in found]
        claims.append(decide_threshold(called, threshold=0.5, direction=">", **about))
    if not claims:
        text = "At criticality the gradient norm of tanh nets changes as a power of depth, not exponentially."
        claims.append(not_decided(ABSENT, id="C1.1 critical", statement=text, source=_POOLE))
    return claims


def _total(rows: pd.DataFrame) -> float:
    by_layer = rows.groupby("layer")["log_grad_norm"].mean()
    return float(by_layer.iloc[0] - by_layer.iloc[-1])


# -- notes N1 and N12 -------------------------------------------------------------------------------------------------


def _cell(fits: pd.DataFrame, activation: str, init: str) -> NDArray[np.float64]:
    if fits.empty:
        return np.empty(0)
    kept = fits[(fits["activation"] == activation) & (fits["init"] == init) & (fits["depth"] == fits["depth"].max())]
    out: NDArray[np.float64] = kept.sort_values("seed")["gain"].to_numpy(float)
    return out


def _notes(fits: pd.DataFrame) -> list[Claim]:
    claims = []
    for key, activation, init, threshold, direction, text in (
        ("N1 sigmoid", "sigmoid", "he_normal", 0.5, "<", "A sigmoid net loses more than half of the gradient norm a "
         "layer, at He's initialization too: its slope is at most 1/4."),
        ("N1 relu", "relu", "default", 0.5, "<", "ReLU alone does not overcome it: at torch's default initialization "
         "a ReLU net loses more than half of the gradient norm a layer."),
        ("N12 relu explodes", "relu", "4", 1.0, ">", "A ReLU net, whose slope never exceeds 1, explodes at "
         "sigma_w^2 = 4."),
        ("N12 tanh explodes", "tanh", "4", 1.0, ">", "A tanh net, whose slope never exceeds 1, explodes at "
         "sigma_w^2 = 4."),
        ("N12 slope 1.5 vanishes", "1.5:1.5", "default", 1.0, "<", "A net of slope 1.5 everywhere vanishes at torch's "
         "default initialization."),
    ):  # fmt: skip
        source = f"note {key.partition(' ')[0]}; derived from {_POOLE}"
        about = About(id=key, statement=text, source=source, unit="gain a layer")
        samples = _cell(fits, activation, init)
        if len(samples):
            about["detail"] = f"Over 50 layers: a factor {float(np.mean(samples)) ** 50:.2g}."
            claims.append(decide_threshold(samples, threshold=threshold, direction=direction, **about))  # type: ignore[arg-type]
        else:
            claims.append(not_decided(ABSENT, **about))
    return [*claims, *_which_rule_tells(fits)]


def _which_rule_tells(fits: pd.DataFrame) -> list[Claim]:
    """Decide which rule foretells whether the gradient grows: the slope alone, or slope and weight scale together."""
    slope = About(
        id="N12 as noted",
        statement="The gradient explodes where the activation's slope exceeds 1, and only there.",
        source="note N12",
        unit="counterexamples",
    )
    both = About(
        id="N12 corrected",
        statement="Slope and weight scale act only together: the gradient explodes where chi_1 = sigma_w^2 E[phi'^2] "
        "exceeds 1 and vanishes where it is below, in every cell off criticality.",
        source=_POOLE,
        unit="cells foretold",
    )
    if fits.empty:
        return [not_decided(ABSENT, **slope), not_decided(ABSENT, **both)]
    against, right, total = [], 0, 0
    for (name, init), cell in groups(fits, ["activation", "init"]):
        grows, falls = bool((cell["gain"] > 1).all()), bool((cell["gain"] < 1).all())
        expected = float(cell["chi_gain"].iloc[0])
        if abs(math.log(expected)) < 0.02:  # about the finite-width bias: neither direction is foretold
            continue
        total += 1
        right += grows if expected > 1 else falls
        if (grows and steepest_slope(name) <= 1) or (falls and steepest_slope(name) > 1):
            against.append(f"{activation_title(name)} {init} {cell['gain'].mean():.3f}")
    slope["detail"] = f"Of {total} cells off criticality. Against it: {', '.join(against) or 'none'}."
    return [
        decide_threshold([float(len(against))], threshold=1.0, direction="<", min_samples=1, **slope),
        decide_exact(float(right), float(total), **both) if total else not_decided(ABSENT, **both),
    ]


# -- C1.2 -------------------------------------------------------------------------------------------------------------


def chaos_claims(profiles: pd.DataFrame) -> list[Claim]:
    """Decide C1.2, order and chaos of tanh nets with biases.

    Args:
        profiles: Columns weight_var, bias_var, width, depth, seed, layer, log_grad_norm and correlation; empty where
            nothing was measured.
    """
    gain = About(
        id="C1.2 gain",
        statement="On both sides of the line from order to chaos, and on it, the gradient norm of tanh nets changes by "
        "sqrt(chi_1) a layer.",
        source=_POOLE,
        unit="of sqrt(chi_1)",
    )
    far = About(
        id="C1.2 correlation",
        statement="In tanh nets deeper than 5 correlation scales, the correlation of two inputs is within .02 of c*.",
        source=_POOLE,
        unit="1 + distance from c*",
    )
    train = not_decided(
        "Needs a grid of trained nets, depth 10 to 300 by sigma_w^2, which no preset lays out yet.",
        id="C1.2 trainable",
        statement="Nets train up to a depth of about 6 correlation scales.",
        source="Schoenholz et al. 2017, Fig. 5: observed, not derived",
    )
    if profiles.empty:
        return [not_decided(ABSENT, **gain), not_decided(ABSENT, **far), train]
    cells, listed, distances, found = [], [], [], []
    for pair, rows in groups(profiles.sort_values(["weight_var", "layer"]), ["weight_var", "bias_var"]):
        weight_var, width, theory = pair[0], int(rows["width"].iloc[0]), gradient_gain("tanh", *pair)
        gains = np.array([_fit(_middle(net)).gain for _, net in groups(rows, ["seed"])])
        claim = decide_theory(gains / theory, 1.0, rel_tol=0.005 if width >= 500 else 0.05, within_se=None, **gain)
        cells.append((f"sigma_w^2 = {weight_var:g}", claim))
        listed.append(f"{weight_var:g} {gains.mean() / theory:.4f}")
        scale, depth = depth_scale("tanh", *pair).correlation, int(rows["layer"].max())
        if depth > 5 * scale:
            # All layers that deep: a net's correlation wanders about c* from layer to layer.
            deep = rows[rows["layer"] > 5 * scale].groupby("seed")["correlation"].mean().to_numpy(float)
            c = correlation_fixed_point("tanh", *pair)
            found.append(f"{weight_var:g} {deep.mean():.4f} ({c:.4f})")
            claim = decide_theory(1.0 + deep - c, 1.0, rel_tol=0.02, within_se=None, **far)
            distances.append((f"sigma_w^2 = {weight_var:g}", claim))
    if distances:
        far["detail"] = f"sigma_w^2, mean over seeds and layers that deep (c*): {', '.join(found)}."
        decided = worst(distances, far)
    else:
        decided = not_decided("No net is deeper than 5 correlation scales.", **far)
    gain["detail"] = f"sigma_w^2 and ratio: {', '.join(listed)}."
    return [worst(cells, gain), decided, train]
