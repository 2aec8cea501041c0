"""Claims about the cliff from hand-made outcomes."""

import pandas as pd
import pytest

from gradlab.analysis.cliff_claims import cliff_claims, ends


def descents(successes, *, starts=20, steps=None):
    """A table with so many successes at each threshold."""
    rows = []
    for clip, won in successes.items():
        for start in range(starts):
            length = (steps or {}).get(clip, 0.05)
            rows.append((clip, start, 0, 0.5, length))
            rows.append((clip, start, 1, 1e-6 if start < won else 0.4, float("nan")))
    return pd.DataFrame(rows, columns=["clip", "start", "update", "loss", "step_length"])


def surface(top):
    return pd.DataFrame({"loss": 0.1, "grad_norm": [0.1] * 99 + [top]})


def verdicts(*tables):
    return {claim.id: str(claim.verdict) for claim in cliff_claims(*tables)}


def test_ends_takes_the_last_loss_and_the_longest_update():
    table = ends(descents({0.0: 3}, starts=4, steps={0.0: 7.0}))
    assert table["solved"].tolist() == [True, True, True, False]
    assert table["longest"].tolist() == [7.0] * 4


def test_the_published_counts_reproduce():
    claims = cliff_claims(surface(500.0), descents({0.0: 3, 1.0: 14, 0.1: 2}, steps={0.0: 772.0}))
    assert {str(claim.verdict) for claim in claims} == {"reproduced"}
    clip = next(claim for claim in claims if claim.id == "C5.3 clip")
    assert clip.p_value == pytest.approx(0.0005, rel=0.3)  # Fisher exact, 14/20 against 3/20


def test_no_difference_decides_nothing_and_the_reverse_is_not_reproduced():
    assert verdicts(surface(500.0), descents({0.0: 10, 1.0: 11, 0.1: 10}))["C5.3 clip"] == "not decided"
    found = verdicts(surface(5.0), descents({0.0: 20, 1.0: 2, 0.1: 19}))
    assert found["C5.3 clip"] == found["C5.3 slow"] == found["C5.3 cliff"] == found["C5.3 step"] == "not reproduced"


@pytest.mark.parametrize(
    "tables",
    [
        (pd.DataFrame(), pd.DataFrame()),
        (pd.DataFrame(), descents({0.0: 3})),
        (pd.DataFrame(), descents({1.0: 3})),
    ],
    ids=["nothing", "free-only", "clipped-only"],
)
def test_missing_parts_decide_nothing(tables):
    assert set(verdicts(*tables).values()) == {"not decided"}
