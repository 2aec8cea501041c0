"""The claims about the memory of gated nets: C5.5, and C5.6 as far as initialization goes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gradlab.analysis.claims import (
    About,
    Claim,
    decide_exact,
    decide_greater,
    decide_theory,
    decide_threshold,
    not_decided,
)
from gradlab.analysis.decay import fit_decay

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["cell_claims", "gains"]

_DERIVED = "derived; prototype of this project"
_JOZEFOWICZ = "Jozefowicz et al. 2015"
_CHRONO = "Tallec & Ollivier 2018, arXiv 1804.11188"
_HORIZON = 100  # steps over which a loss of gradient is stated


def gains(gradients: pd.DataFrame) -> pd.DataFrame:
    """Return the factor a step on the gradient norm, for each seed: of all paths, and along the memory alone.

    The slope of ln norm against lag, fitted from a twentieth to three quarters of the recorded lags: the first steps
    keep the shape of the noise they begin from.

    Args:
        gradients: Columns net, init, seed, lag, log_full, log_path.

    Returns:
        Columns net, init, seed, full, path.
    """
    rows = []
    for (net, init, seed), run in gradients.groupby(["net", "init", "seed"], sort=False):
        top = run["lag"].max()
        kept = run[run["lag"].between(top / 20, 0.75 * top)].sort_values("lag")
        fits = [fit_decay(kept["lag"].to_numpy(float), kept[name].to_numpy(float)) for name in ("log_full", "log_path")]
        rows.append((net, init, seed, fits[0].gain, fits[1].gain))
    return pd.DataFrame(rows, columns=["net", "init", "seed", "full", "path"])


def cell_claims(gradients: pd.DataFrame, means: pd.DataFrame) -> list[Claim]:
    """Decide what the memory of LSTM and GRU does for the gradient.

    Args:
        gradients: Columns net, init, seed, lag, log_full, log_path; empty where nothing was measured.
        means: Columns net, init, seed, path_error, gate_mean.
    """
    rates = gains(gradients) if len(gradients) else pd.DataFrame(columns=["net", "init", "seed", "full", "path"])
    return [
        _exact_path(means),
        *_openness(means),
        *_vanishing(rates),
        *_more_than_the_path(rates),
        *_horizon(gradients),
    ]


def _of(frame: pd.DataFrame, value: str, net: str, init: str) -> NDArray[np.float64]:
    if frame.empty:
        return np.empty(0)
    rows = frame[(frame["net"] == net) & (frame["init"] == init)].sort_values("seed")
    out: NDArray[np.float64] = rows[value].to_numpy(dtype=np.float64)
    return out


def _exact_path(means: pd.DataFrame) -> Claim:
    worst = float(means["path_error"].max()) if len(means) else math.nan
    return decide_exact(
        1.0 + worst,
        1.0,
        rel_tol=1e-10,
        id="C5.5 path",
        statement="Along the cell alone, dc_T/dc_t is exactly the product of the forget gates (a GRU's z gates).",
        source=_DERIVED,
        unit="1 + largest relative difference from autograd",
    )


def _openness(means: pd.DataFrame) -> list[Claim]:
    claims = []
    texts = {
        "default": "At torch's default initialization the forget gate is half open: 0.5",
        "bias 1": "A forget bias of 1 opens it to sigma(1) = 0.731",
    }
    for init, text in texts.items():
        about = About(id=f"C5.5 gate {init}", statement=f"{text}.", source=_JOZEFOWICZ, unit="mean of f")
        samples = _of(means, "gate_mean", "lstm", init)
        expected = 1 / (1 + math.exp(-float(init.rpartition(" ")[2] if "bias" in init else 0)))
        if len(samples):
            claims.append(decide_theory(samples, expected, rel_tol=0.02, within_se=None, **about))
        else:
            claims.append(not_decided("No finished cell measured this.", **about))
    return claims


def _vanishing(rates: pd.DataFrame) -> list[Claim]:
    claims = []
    for net in ("lstm", "gru"):
        about = About(
            id=f"C5.5 vanish {net}",
            statement=f"At torch's default initialization the gradient of the {net.upper()} vanishes all the same: the "
            "norm falls to less than 0.8 a step by all paths together.",
            source=f"{_DERIVED}; note N11",
            unit="a step",
        )
        samples = _of(rates, "full", net, "default")
        if len(samples):
            claims.append(decide_threshold(samples, threshold=0.8, direction="<", **about))
        else:
            claims.append(not_decided("No finished cell measured this.", **about))
    return claims


def _more_than_the_path(rates: pd.DataFrame) -> list[Claim]:
    claims = []
    for init in ("default", "bias 1", "bias 2", "bias 3"):
        full, path = (_of(rates, name, "lstm", init) for name in ("full", "path"))
        about = About(
            id=f"C5.5 rest {init}",
            statement="The other paths add to the gradient of an LSTM: by all paths it falls less a step than along "
            f"the cell alone ({init}).",
            source=_DERIVED,
            unit="a step",
        )
        if len(full):
            about["detail"] = f"All paths {full.mean():.3f}, cell alone {path.mean():.3f} a step."
            claims.append(decide_greater(full, path, paired=True, **about))
        else:
            claims.append(not_decided("No finished cell measured this.", **about))
    return claims


def _horizon(gradients: pd.DataFrame) -> list[Claim]:
    """Decide how much of the gradient is left after 100 steps: little by default, nearly all with chrono."""
    kept = gradients[gradients["lag"] == _HORIZON] if len(gradients) else gradients
    claims = []
    for init, threshold, direction, text in (
        ("default", -30.0, "<", "less than e^-30 of it is left at torch's default initialization"),
        ("chrono 200", -2.0, ">", "more than e^-2 of it is left with chrono initialization at 200 steps"),
    ):
        about = About(
            id=f"C5.6 {init}",
            statement=f"Of the gradient of an LSTM over {_HORIZON} steps, {text}.",
            source=_CHRONO if init != "default" else _DERIVED,
            unit="ln of the share left",
        )
        left, start = _of(kept, "log_full", "lstm", init), _of(_first(gradients), "log_full", "lstm", init)
        if len(left) and len(left) == len(start):
            claims.append(decide_threshold(left - start, threshold=threshold, direction=direction, **about))  # type: ignore[arg-type]
        else:
            claims.append(not_decided(f"No finished cell followed {_HORIZON} steps at this initialization.", **about))
    return claims


def _first(gradients: pd.DataFrame) -> pd.DataFrame:
    return gradients[gradients["lag"] == 0] if len(gradients) else gradients
