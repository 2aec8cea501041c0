"""The zoo as a whole: enough cases of each kind, two fixed halves, runs that repeat."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
import torch

from gradlab.benchmarks.diagnosis.case import Case
from gradlab.benchmarks.diagnosis.split import HELD_OUT, half_of
from gradlab.benchmarks.diagnosis.zoo import cases, find_case, record
from gradlab.errors import UsageError
from gradlab.trace import Trace


def test_cases_are_many_distinct_and_about_half_healthy() -> None:
    names = [case.name for case in cases()]
    labels = Counter(case.label for case in cases())
    assert len(names) == len(set(names)) >= 200
    assert 0.4 < labels["healthy"] / len(names) < 0.6
    assert len(labels) == 7
    assert min(labels.values()) >= 9
    assert len({case.family for case in cases()}) == 10


def test_split_is_the_deal_that_its_docstring_tells() -> None:
    def place(case: Case) -> tuple[str, ...]:
        return case.label, case.axis, case.family, hashlib.sha256(case.name.encode()).hexdigest()

    dealt = sorted(cases(), key=place)
    assert {case.name for case in dealt[1::2]} == HELD_OUT


def test_halves_are_disjoint_and_have_every_label_and_axis() -> None:
    halves = [cases("tune"), cases("held-out")]
    assert len(halves[0]) + len(halves[1]) == len(cases())
    assert all(half_of(case.name) == "tune" for case in halves[0])
    first, second = (Counter((case.label, case.axis) for case in half) for half in halves)
    assert first.keys() == second.keys()
    assert all(abs(first[key] - second[key]) <= 1 for key in first)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Unknown split 'heldout'. Did you mean 'held-out'"):
        cases("heldout")


@pytest.mark.parametrize("name", ["mlp-dropout", "autoencoder-variational"], ids=str)
def test_a_run_repeats_and_leaves_the_generator_alone(name: str) -> None:
    before = torch.random.get_rng_state()
    first, second = (record(find_case(name)) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    seconds = ["seconds"]  # of wall time
    assert first.steps.drop(columns=seconds).equals(second.steps.drop(columns=seconds))
    assert first.layers.equals(second.layers)


def test_recurrent_cases_are_followed_through_time() -> None:
    trace = record(find_case("lstm-default-6"))
    assert isinstance(trace, Trace)
    assert set(trace.timesteps["t"]) == set(range(6))
    assert record(find_case("mlp-sigmoid-1")).timesteps.empty


def test_what_the_scaler_skips_is_recorded_as_such() -> None:
    skipped = record(find_case("mlp-scaler-skips")).steps["skipped"]
    assert 0 < skipped.sum() < len(skipped) / 2
    assert record(find_case("nonfinite-all-steps-skipped")).steps["skipped"].all()
