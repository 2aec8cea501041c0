"""The claims about who learns what at which distance: C5.7 to C5.9, C6, and notes N7, N10 and N13."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gradlab.analysis.claims import About, Claim, decide_exact, decide_theory, decide_threshold, not_decided
from gradlab.analysis.survival import decide_sooner

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ADDING_SOLVED", "LATENT_SOLVED", "PAPER_STEPS", "memory_claims"]

ADDING_SOLVED = 0.01
"""Mean squared error below which the adding problem counts as solved; the best constant has .1667."""

LATENT_SOLVED = 0.02
"""Loss, in nats, below which the write/query series is solved."""

PAPER_STEPS = 50_000
"""Training steps of the papers whose claims about long runs are not decided by shorter ones."""

_TALLEC = "Tallec & Ollivier 2018, arXiv 1804.11188"
_DERIVED = "derived here; prototype of this project"
_ABSENT = "No finished cell measured this."
_LATENT = {"tanh": "tanh RNN", "gru": "GRU", "lstm": "LSTM"}
_COPY_TOLERANCE = 0.03
_TABULATED_LENGTH = 100


def memory_claims(adding: pd.DataFrame, copying: pd.DataFrame, query: pd.DataFrame, table: pd.DataFrame) -> list[Claim]:
    """Decide who learns what; tables may be empty.

    Args:
        adding: A row a run of the adding problem: net, length, seed, steps (the cap), solved_at (NaN if not), best and
            last (evaluation loss), parameters.
        copying: The same of copy memory, and baseline: the loss without memory.
        query: The same of the write/query series, net also "markov <k>", "growing" and "transformer"; bayes: the least
            loss that what the net sees allows.
        table: A row a window and seed of the exact look-up table: window, seed, loss, bayes.
    """
    return [*_adding(adding), *_copying(copying), *_never_here(), *_windows(query, table), *_latent(query)]


def _of(frame: pd.DataFrame, net: str, column: str) -> NDArray[np.float64]:
    """Return a column of one net's runs in the order of seeds; empty where there are none."""
    if frame.empty:
        return np.empty(0)
    out: NDArray[np.float64] = frame[frame["net"] == net].sort_values("seed")[column].to_numpy(dtype=np.float64)
    return out


def _adding(adding: pd.DataFrame) -> list[Claim]:
    longest = int(adding["length"].max()) if len(adding) else 0
    runs = adding[adding["length"] == longest] if len(adding) else adding
    cap = int(runs["steps"].max()) if len(runs) else 0
    at = f"at T = {longest or _TABULATED_LENGTH}"
    too_short = 0 < longest < _TABULATED_LENGTH
    claims = []
    pairs = (
        (
            "C5.7 chrono", "lstm chrono", "lstm", f"Chrono initialization makes the LSTM solve adding sooner {at}.",
            _TALLEC,
        ),
        (
            "C5.7 chrono, bias 1", "lstm chrono", "lstm bias 1",
            f"It does so against a forget bias of 1 too, the paper's baseline, {at}.", _TALLEC,
        ),
        (
            "C5.7 bias 1", "lstm bias 1", "lstm", f"A forget bias of 1 makes the LSTM solve adding sooner {at}.",
            "Jozefowicz et al. 2015, sec. 3.4, on other tasks",
        ),
        (
            "C5.7 GRU", "gru", "lstm", f"The GRU, with fewer parameters, solves adding sooner than the LSTM {at}.",
            "note N10; prototype of this project",
        ),
    )  # fmt: skip
    for name, fast, slow, statement, source in pairs:
        about = About(id=name, statement=statement, source=source)
        groups = [_of(runs, net, "solved_at") for net in (fast, slow)]
        if too_short:
            claims.append(not_decided(_short(longest), **about))
        elif not all(len(group) for group in groups):
            claims.append(not_decided(_ABSENT, **about))
        else:
            sizes = [int(_of(runs, net, "parameters")[0]) for net in (fast, slow)]
            about["detail"] = f"{sizes[0]:,} and {sizes[1]:,} parameters." if sizes[0] != sizes[1] else ""
            claims.append(decide_sooner(*groups, cap=cap, **about))
    tanh = About(
        id="C5.7 tanh", statement=f"The tanh RNN does not solve adding {at}: its error stays above {ADDING_SOLVED}.",
        source=_DERIVED, unit="lowest mean squared error",
        detail=f"Up to {cap:,} steps; the constant predictor has 0.1667.",
    )  # fmt: skip
    lowest = _of(runs, "tanh", "best")
    if too_short or not len(lowest):
        claims.append(not_decided(_short(longest) if too_short else _ABSENT, **tanh | {"detail": ""}))
    else:
        claims.append(decide_threshold(lowest, threshold=ADDING_SOLVED, direction=">", **tanh))
    return [*claims, _seven(runs, longest), *_long_runs(runs, longest, cap)]


def _short(longest: int) -> str:
    return f"The claim is about T = {_TABULATED_LENGTH} and more, and the longest here is {longest}."


def _seven(runs: pd.DataFrame, longest: int) -> Claim:
    """Return the factor of the paper, which is measured here and not decided."""
    about = About(
        id="C5.7 factor 7", statement="Chrono initialization is 7 times as fast as a forget bias of 1 at T = 750.",
        source=_TALLEC, unit="mean steps with bias 1 over those with chrono",
    )  # fmt: skip
    told = ""
    groups = [_of(runs, net, "solved_at") for net in ("lstm bias 1", "lstm chrono")]
    if all(len(group) for group in groups):
        bias, chrono = (np.nan_to_num(group, nan=float(runs["steps"].max())).mean() for group in groups)
        told = f" At T = {longest} the factor is {bias / chrono:.3g}, runs without success counted at the cap."
    return not_decided(f"It needs T = 750, {PAPER_STEPS:,} steps and a tolerance: a GPU's work.{told}", **about)


def _long_runs(runs: pd.DataFrame, longest: int, cap: int) -> list[Claim]:
    claims = []
    for net, name in (("irnn", "IRNN"), ("orthogonal", "orthogonal tanh RNN")):
        about = About(
            id=f"C5.7 {name}", statement=f"The {name} solves adding where the tanh RNN does not.",
            source="Le, Jaitly & Hinton 2015, arXiv 1504.00941, sec. 4.1" if net == "irnn" else "Arjovsky et al. 2016",
            unit="lowest mean squared error",
        )  # fmt: skip
        lowest = _of(runs, net, "best")
        solved = len(lowest) and bool((lowest < ADDING_SOLVED).all())
        if longest >= _TABULATED_LENGTH and len(lowest) and (solved or cap >= PAPER_STEPS):
            claims.append(decide_threshold(lowest, threshold=ADDING_SOLVED, direction="<", **about))
        else:
            told = f" Lowest here {lowest.min():.3g} in {cap:,} steps." if len(lowest) else ""
            claims.append(not_decided(f"Not reached at CPU scale: the papers' runs are far longer.{told}", **about))
    return claims


def _copying(copying: pd.DataFrame) -> list[Claim]:
    source = "Arjovsky, Shah & Bengio 2016, arXiv 1511.06464, sec. 4.1"
    plateau = About(
        id="C5.8 plateau",
        statement="On copy memory the tanh RNN learns to guess and no more: its loss is 10 ln 8 / (T + 20).",
        source=source, unit="loss over the baseline",
    )  # fmt: skip
    beats = About(
        id="C5.8 beats baseline", statement="The chrono LSTM learns to copy: its loss falls below the baseline.",
        source=_TALLEC, unit="loss over the baseline",
    )  # fmt: skip
    ratio = copying.assign(ratio=copying["last"] / copying["baseline"]) if len(copying) else copying
    vanilla, chrono = _of(ratio, "tanh", "ratio"), _of(ratio, "lstm chrono", "ratio")
    cap = int(copying["steps"].max()) if len(copying) else 0
    means = copying.groupby("net", sort=False)["last"].mean() if len(copying) else pd.Series(dtype=float)
    told = ", ".join(f"{net} {mean:.4f}" for net, mean in means.items())
    if len(vanilla):
        plateau["detail"] = (
            f"Baseline {copying['baseline'].iloc[0]:.4f}; after {cap:,} steps {told}. Training ends a little above the "
            "least loss, by more than seeds differ."
        )
        claims = [decide_theory(vanilla, 1.0, rel_tol=_COPY_TOLERANCE, within_se=None, **plateau)]
    else:
        claims = [not_decided(_ABSENT, **plateau)]
    below = len(chrono) and bool((chrono < 1 - _COPY_TOLERANCE).all())
    if len(chrono) and (below or cap >= PAPER_STEPS):
        claims.append(decide_threshold(chrono, threshold=1 - _COPY_TOLERANCE, direction="<", **beats))
    else:
        reason = f"Not reached at CPU scale: the paper trains for {PAPER_STEPS:,} steps."
        ratios = f" Here {chrono.mean():.3f} of the baseline after {cap:,}." if len(chrono) else ""
        claims.append(not_decided(reason + ratios, **beats))
    return claims


def _never_here() -> list[Claim]:
    return [
        not_decided(
            "Not measured: the 64 steps of the digits that ship with gradlab are too short to tell nets apart, and 397 "
            "test images leave a standard error of .02; the paper reads 784 pixels on a GPU.",
            id="C5.9 pixels",
            statement="On digits read pixel by pixel the IRNN does better than the LSTM.",
            source="Le, Jaitly & Hinton 2015, sec. 4.2",
        ),
        not_decided(
            "Not measured: without short gaps to learn from it takes long runs for every net; a matter for a GPU.",
            id="C5.9 recall",
            statement="An LSTM recalls the first of 100 tokens and a tanh RNN does not.",
            source="Bengio, Simard & Frasconi 1994, sec. 2",
        ),
    ]


def _windows(query: pd.DataFrame, table: pd.DataFrame) -> list[Claim]:
    claims = []
    for name in sorted(_windows_of(query)):
        if name <= 8:
            own = query[query["net"] == f"markov {name}"].sort_values("seed")
            claims.append(
                decide_theory(
                    own["last"].to_numpy(dtype=np.float64), float(own["bayes"].iloc[0]), rel_tol=0.03, within_se=None,
                    id=f"C6 Markov {name}", source=_DERIVED, unit="nats",
                    statement=f"A net that sees the last {name} tokens has the Bayes loss ln 2 (1 - p)^{name}.",
                )
            )  # fmt: skip
    if not claims:
        statement = "A net that sees the last k tokens has the Bayes loss ln 2 (1 - p)^k."
        claims.append(not_decided(_ABSENT, id="C6 Markov", statement=statement, source=_DERIVED))
    about = About(
        id="C6 table", source=_DERIVED, unit="loss over Bayes loss, at the window farthest off",
        statement="The exact look-up table has the Bayes loss at every window.",
    )  # fmt: skip
    if len(table):
        ratios = table.assign(ratio=table["loss"] / table["bayes"])
        worst = (ratios.groupby("window")["ratio"].mean() - 1).abs().idxmax()
        about["detail"] = f"Window {worst} of {ratios['window'].nunique()}."
        samples = ratios.loc[ratios["window"] == worst, "ratio"].to_numpy(dtype=np.float64)
        claims.append(decide_theory(samples, 1.0, rel_tol=0.03, within_se=None, **about))
    else:
        claims.append(not_decided(_ABSENT, **about))
    return claims


def _windows_of(query: pd.DataFrame) -> set[int]:
    names = query["net"].unique() if len(query) else ()
    return {int(str(net).removeprefix("markov ")) for net in names if str(net).startswith("markov ")}


def _latent(query: pd.DataFrame) -> list[Claim]:
    counts = query.groupby("net")["parameters"].first() if len(query) else pd.Series(dtype=float)
    claims = []
    for net, name in _LATENT.items():
        about = About(
            id=f"C6 latent {name}", source="note N7; " + _DERIVED, unit="nats",
            statement=f"A latent net, the {name}, sums up the past in its state: its loss falls below {LATENT_SOLVED}.",
        )  # fmt: skip
        about["detail"] = "It has many short gaps to learn from: a matter of memory, not of vanishing gradients."
        claims.append(_below(query, net, about if net == "tanh" else about | {"detail": ""}))
    attention = About(
        id="C6 Transformer", source="note N13", unit="nats",
        statement=f"So does a causal Transformer of one layer, which keeps the whole past: below {LATENT_SOLVED}.",
    )  # fmt: skip
    claims.append(_below(query, "transformer", attention))
    above = About(
        id="N7 growing", source="note N7; prototype of this project", unit="nats",
        statement="An MLP on the whole past, which loses nothing, does not get there in its steps.",
    )  # fmt: skip
    last = _of(query, "growing", "last")
    if len(last):
        steps = int(query.loc[query["net"] == "growing", "steps"].iloc[0])
        above["detail"] = f"{counts['growing']:,.0f} parameters for {query['length'].iloc[0]} tokens; {steps:,} steps."
        claims.append(decide_threshold(last, threshold=LATENT_SOLVED, direction=">", **above))
    else:
        claims.append(not_decided(_ABSENT, **above))
    return [*claims, _growth(counts)]


def _below(query: pd.DataFrame, net: str, about: About) -> Claim:
    last = _of(query, net, "last")
    if not len(last):
        return not_decided(_ABSENT, **about)
    when = _of(query, net, "solved_at")
    steps = f" {np.nanmean(when):.0f} steps on average." if np.isfinite(when).all() else ""
    told = f"{int(_of(query, net, 'parameters')[0]):,} parameters.{steps}"
    about["detail"] = f"{told} {about.get('detail', '')}".strip()
    return decide_threshold(last, threshold=LATENT_SOLVED, direction="<", **about)


def _growth(counts: pd.Series[float]) -> Claim:
    """Return whether each further token of context costs as many weights as its one-hot code times the first layer."""
    windows = sorted(int(str(net).split()[1]) for net in counts.index if str(net).startswith("markov "))
    found = [float(counts[f"markov {k}"]) for k in windows]
    slopes = np.diff(found) / np.diff(windows)
    off = float(np.abs(slopes / slopes[0] - 1).max()) if len(slopes) else math.nan
    return decide_exact(
        1.0 + off,
        1.0,
        id="N7 weights",
        statement="The weights of a net on a window grow with it, by as many for each token; a latent net's do not.",
        source="counted; note N7",
        unit="1 + largest relative difference",
        detail=f"{slopes[0]:.0f} weights a token." if len(slopes) else _ABSENT,
    )
