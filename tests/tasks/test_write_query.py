"""The write/query series: Bayes losses against the exact table of all contexts, and by simulation."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
import torch

from gradlab.errors import UsageError
from gradlab.tasks import WriteQueryTask, evaluation_set, write_query_bayes_loss


def exact_loss(length: int, p: float, window: int, *, query: bool) -> float:
    """H(last letter | last `window` steps), from the probabilities of all series of this length."""
    table: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for series in itertools.product("-AB", repeat=length):
        if series[0] == "-":
            continue  # the first token is always a letter
        probability = 0.5
        for token in series[1:]:
            probability *= 1 - p if token == "-" else p / 2
        answer = [token for token in series if token != "-"][-1]
        shown = "".join(series) + ("Q" if query else "")
        table[shown[-window:]][answer] += probability
    loss = 0.0
    for answers in table.values():
        total = sum(answers.values())
        loss -= sum(joint * math.log(joint / total) for joint in answers.values())
    return loss


@pytest.mark.parametrize("query", [False, True], ids=["no-query", "query"])
@pytest.mark.parametrize("p", [0.05, 0.4, 0.9], ids="p{}".format)
@pytest.mark.parametrize("window", range(1, 10), ids="window{}".format)
def test_bayes_loss_is_the_entropy_in_the_exact_table(window: int, p: float, query: bool) -> None:
    task = WriteQueryTask(length=7, p_write=p, query=query)
    assert task.bayes_loss(window) == pytest.approx(exact_loss(7, p, window, query=query), abs=1e-12)


@pytest.mark.parametrize("p", [0.05, 0.4], ids="p{}".format)
@pytest.mark.parametrize("k", range(1, 7), ids="k{}".format)
def test_the_function_is_the_entropy_of_a_window_within_the_series(k: int, p: float) -> None:
    assert write_query_bayes_loss(k, p) == pytest.approx(exact_loss(7, p, k, query=False), rel=1e-12)


def test_known_values() -> None:
    found = [round(write_query_bayes_loss(k, 0.05), 4) for k in (1, 2, 4, 8, 16, 32, 64)]
    assert found == [0.6585, 0.6256, 0.5646, 0.4598, 0.3051, 0.1343, 0.026]


@pytest.mark.parametrize("query", [False, True], ids=["no-query", "query"])
@pytest.mark.parametrize("window", [1, 2, 8, 40, 41, 99], ids="window{}".format)
def test_looking_up_attains_the_bayes_loss_in_simulation(window: int, query: bool) -> None:
    task = WriteQueryTask(length=40, query=query)
    x, y = evaluation_set(task)
    likelihood = task.look_up(x, window).gather(1, y[:, None])
    assert (likelihood > 0).all()  # it is never sure of the wrong letter
    losses = -likelihood.double().log()
    error = losses.std().item() / math.sqrt(len(x))
    assert losses.mean().item() == pytest.approx(task.bayes_loss(window), abs=4 * error + 1e-12)


def test_look_up_entry_by_entry() -> None:
    task = WriteQueryTask(length=5)
    x = torch.tensor([[1, 0, 2, 0, 0], [1, 0, 0, 0, 0], [2, 1, 2, 2, 1]])
    assert task.look_up(x, 2).tolist() == [[0.5, 0.5], [0.5, 0.5], [1, 0]]
    assert task.look_up(x, 3).tolist() == [[0, 1], [0.5, 0.5], [1, 0]]
    assert task.look_up(x, 5).tolist() == [[0, 1], [1, 0], [1, 0]]


@pytest.mark.parametrize("query", [False, True], ids=["no-query", "query"])
def test_series_and_answer_written_out(query: bool) -> None:
    task = WriteQueryTask(length=12, p_write=0.3, query=query)
    x, y = task.batch(500, torch.Generator().manual_seed(0))
    assert x.shape == (500, task.steps) == (500, 12 + query)
    for series, answer in zip(x.tolist(), y.tolist(), strict=True):
        tokens = series[:12]
        assert series[12:] == [3] * query
        assert tokens[0] in (1, 2)
        assert set(tokens) <= {0, 1, 2}
        assert answer == [token for token in tokens if token][-1] - 1


def test_letters_come_with_their_probability() -> None:
    x, _ = WriteQueryTask(length=3, p_write=0.3).batch(40_000, torch.Generator().manual_seed(0))
    shares = [(x[:, t] == token).double().mean().item() for t in (0, 1, 2) for token in (0, 1, 2)]
    assert shares == pytest.approx([0, 0.5, 0.5, 0.7, 0.15, 0.15, 0.7, 0.15, 0.15], abs=0.01)


@pytest.mark.parametrize("p", [0, 1, -0.1, 1.5, math.nan, "half"], ids=str)
def test_a_probability_out_of_range_is_refused(p: object) -> None:
    for call in (lambda: write_query_bayes_loss(3, p), lambda: WriteQueryTask(p_write=p)):
        with pytest.raises(UsageError, match=r"'p_write' is .* strictly between 0 and 1"):
            call()


@pytest.mark.parametrize("k", [0, -2, 1.5], ids=str)
def test_a_window_of_no_token_is_refused(k: object) -> None:
    task = WriteQueryTask(length=5)
    for call in (
        lambda: write_query_bayes_loss(k, 0.1),
        lambda: task.bayes_loss(k),
        lambda: task.look_up(torch.ones(2, 5).long(), k),
    ):
        with pytest.raises(UsageError, match="must be a whole number of at least 1"):
            call()


@pytest.mark.parametrize("length", [0, 1], ids=str)
def test_a_series_of_one_token_is_refused(length: int) -> None:
    with pytest.raises(UsageError, match=f"'length' is {length}, but must be a whole number of at least 2"):
        WriteQueryTask(length=length)
