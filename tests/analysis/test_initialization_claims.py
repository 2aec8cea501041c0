"""Finite width, Glorot's singular values, stalled training and isometry, from tables whose outcome is known."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from gradlab.analysis.claims import Verdict
from gradlab.analysis.finite_width import finite_width_log_norm
from gradlab.analysis.initialization_claims import (
    finite_width_claims,
    glorot_claims,
    isometry_claims,
    stall_claims,
)


def verdicts(claims):
    return {claim.id: claim.verdict for claim in claims}


def log_norms(*, shift=0.0, stretch=1.0, nets=1000, dead=0):
    rng = np.random.default_rng(0)
    frames = []
    for width, depth in ((10, 10), (50, 20)):
        law = finite_width_log_norm(width, depth)
        drawn = rng.standard_normal(nets)
        drawn = (drawn - drawn.mean()) / drawn.std(ddof=1)
        values = law.mean + shift + stretch * math.sqrt(law.variance) * drawn
        values[:dead] = -math.inf
        frames.append(pd.DataFrame({"width": width, "depth": depth, "log_norm": values}))
    return pd.concat(frames, ignore_index=True)


def test_finite_width():
    good = {"C1.3 mean": Verdict.REPRODUCED, "C1.3 variance": Verdict.REPRODUCED}
    assert verdicts(finite_width_claims(log_norms())) == good
    assert verdicts(finite_width_claims(log_norms(dead=2))) == good
    assert verdicts(finite_width_claims(log_norms(shift=0.5)))["C1.3 mean"] is Verdict.NOT_REPRODUCED
    # 5 beta is 5 where the law says 8.67: far outside.
    assert verdicts(finite_width_claims(log_norms(stretch=0.76)))["C1.3 variance"] is Verdict.NOT_REPRODUCED
    assert "2 dead" not in finite_width_claims(log_norms())[0].detail
    assert "4 dead ones" in finite_width_claims(log_norms(dead=2))[0].detail


def singular(normalized=0.766, standard=0.489):
    return pd.DataFrame([
        {"scheme": scheme, "seed": seed, "layer": layer, "mean": value * (0.7 if layer == 1 else 1) + 1e-3 * seed}
        for scheme, value in (("normalized", normalized), ("standard", standard))
        for seed in range(3) for layer in (1, 2)
    ])  # fmt: skip


def test_glorots_range_is_that_of_the_last_layer():
    assert set(verdicts(glorot_claims(singular())).values()) == {Verdict.REPRODUCED}
    assert verdicts(glorot_claims(singular(normalized=0.9)))["C1.4 normalized"] is Verdict.NOT_REPRODUCED
    assert verdicts(glorot_claims(singular(standard=0.55)))["C1.4 standard"] is Verdict.NOT_REPRODUCED


def losses(he=0.5, xavier=2.29, default=2.302, seeds=3):
    return pd.DataFrame([
        {"init": init, "seed": seed, "step": step, "loss": 2.3 if step < 30 else value + 0.01 * seed}
        for init, value in (("he_normal", he), ("glorot_normal", xavier), ("default", default))
        for seed in range(seeds) for step in range(40)
    ])  # fmt: skip


def test_training_that_stalls():
    found = verdicts(stall_claims(losses(), depth=30, window=10))
    assert set(found.values()) == {Verdict.REPRODUCED}
    assert verdicts(stall_claims(losses(xavier=1.5), depth=30, window=10))["C1.6 Xavier"] is Verdict.NOT_REPRODUCED
    assert verdicts(stall_claims(losses(he=2.4), depth=30, window=10))["C1.6 He"] is Verdict.NOT_REPRODUCED
    diverged = verdicts(stall_claims(losses(he=math.nan), depth=30, window=10))
    assert diverged["C1.6 He"] is Verdict.NOT_DECIDED


def spectra(linear=0.0, orthogonal=1.0, gaussian=5.0):
    rows = []
    for seed in range(3):
        for rank in range(1, 6):
            fall = (rank - 3) * (1 + 0.01 * seed)
            rows += [
                ("linear", "orthogonal", seed, rank, 1 + linear),
                ("tanh", "orthogonal", seed, rank, math.exp(-orthogonal * fall)),
                ("tanh", "Gaussian", seed, rank, math.exp(-gaussian * fall)),
            ]
    return pd.DataFrame(rows, columns=["activation", "weights", "seed", "rank", "value"])


def test_isometry():
    assert set(verdicts(isometry_claims(spectra())).values()) == {Verdict.REPRODUCED}
    assert verdicts(isometry_claims(spectra(linear=1e-8)))["isometry linear"] is Verdict.NOT_REPRODUCED
    assert verdicts(isometry_claims(spectra(orthogonal=7.0)))["isometry tanh"] is Verdict.NOT_REPRODUCED


def test_nothing_measured_decides_nothing():
    nothing = pd.DataFrame()
    claims = [
        *finite_width_claims(nothing),
        *glorot_claims(nothing),
        *stall_claims(nothing, depth=30, window=10),
        *isometry_claims(nothing),
        *isometry_claims(spectra()[lambda rows: rows["activation"] == "relu"]),
    ]
    assert {claim.verdict for claim in claims} == {Verdict.NOT_DECIDED}
