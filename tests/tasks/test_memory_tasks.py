"""Adding, copy and recall: the rule of each task written out anew, and its baseline attained by simulation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional

from gradlab.errors import UsageError
from gradlab.tasks import (
    AddingTask,
    CopyTask,
    RecallTask,
    adding_baseline,
    copy_baseline,
    evaluation_set,
    recall_baseline,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestAdding:
    @pytest.mark.parametrize("length", [2, 3, 7, 100], ids="T{}".format)
    def test_one_mark_in_each_half_and_the_sum_of_the_marked(self, length: int) -> None:
        x, y = AddingTask(length=length, dtype=torch.float64).batch(200, seeded())
        for numbers_and_marks, total in zip(x.tolist(), y.tolist(), strict=True):
            marked = [t for t, (_, mark) in enumerate(numbers_and_marks) if mark == 1]
            assert all(mark in (0, 1) for _, mark in numbers_and_marks)
            assert len(marked) == 2
            assert marked[0] < length // 2 <= marked[1]
            assert total == [numbers_and_marks[marked[0]][0] + numbers_and_marks[marked[1]][0]]
            assert all(0 <= number < 1 for number, _ in numbers_and_marks)

    def test_marks_are_uniform_over_each_half(self) -> None:
        x, _ = AddingTask(length=5).batch(30_000, seeded())
        share = x[..., 1].mean(0).tolist()
        assert share == pytest.approx([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3], abs=4 * math.sqrt(0.25 / 30_000))

    def test_baseline_is_the_variance_of_a_sum_of_uniforms(self) -> None:
        # Exactly: the mean over all pairs of an n-point grid tends to 1/6 (1 - 1/n^2).
        n = 200
        grid = [(k + 0.5) / n for k in range(n)]
        mean_square = sum((u + v - 1) ** 2 for u, v in itertools.product(grid, grid)) / n**2
        assert mean_square == pytest.approx(adding_baseline() * (1 - 1 / n**2), rel=1e-10)
        assert adding_baseline() == 1 / 6 == AddingTask().baseline

    def test_no_constant_does_better_in_simulation(self) -> None:
        x, y = evaluation_set(AddingTask(length=10))
        task = AddingTask(length=10)
        losses = {c: task.loss(torch.full_like(y, c), y).item() for c in (0.8, 1.0, 1.2)}
        assert min(losses, key=losses.__getitem__) == 1.0
        assert losses[1.0] == pytest.approx(1 / 6, abs=3 * 0.0014)
        # Remembering one of both halves the error: what remains is the other's variance.
        first = (x[:, :5, 0] * x[:, :5, 1]).sum(1, keepdim=True)
        assert task.loss(first + 0.5, y).item() == pytest.approx(1 / 12, abs=0.002)

    @pytest.mark.parametrize("length", [1, 0, -3, 2.0], ids=str)
    def test_refuses_a_length_without_two_halves(self, length: object) -> None:
        with pytest.raises(UsageError, match=r"'length' is .* at least 2"):
            AddingTask(length=length)

    def test_refuses_whole_numbers_to_add(self) -> None:
        with pytest.raises(UsageError, match=r"cannot be torch\.int64"):
            AddingTask(dtype=torch.int64)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_keeps_its_dtype(self, dtype: torch.dtype) -> None:
        assert {tensor.dtype for tensor in AddingTask(dtype=dtype).batch(2)} == {dtype}


class TestCopy:
    @pytest.mark.parametrize(("T", "remember", "symbols"), [(1, 1, 2), (4, 3, 5), (100, 10, 8)], ids=str)
    def test_layout_written_out(self, T: int, remember: int, symbols: int) -> None:
        task = CopyTask(T=T, remember=remember, symbols=symbols)
        x, y = task.batch(50, seeded())
        assert task.steps == T + 2 * remember
        for given, wanted in zip(x.tolist(), y.tolist(), strict=True):
            letters = given[:remember]
            assert set(letters) <= set(range(1, symbols + 1))
            assert given == letters + [0] * (T - 1) + [symbols + 1] + [0] * remember
            assert wanted == [0] * (T + remember) + letters

    def test_symbols_are_uniform_and_independent(self) -> None:
        x, _ = CopyTask(T=1, remember=2, symbols=3).batch(45_000, seeded())
        pairs = torch.bincount(3 * (x[:, 0] - 1) + x[:, 1] - 1, minlength=9) / 45_000
        assert pairs.tolist() == pytest.approx([1 / 9] * 9, abs=4 * math.sqrt(1 / 9 * 8 / 9 / 45_000))

    @pytest.mark.parametrize("T", [1, 20, 100], ids="T{}".format)
    def test_the_predictor_that_only_counts_attains_the_baseline(self, T: int) -> None:
        task = CopyTask(T=T)
        x, y = task.batch(300, seeded())
        # Blank until the delimiter has come, then 1/8 for each symbol: it looks at nothing but the delimiter.
        after = (x == 9).cumsum(1) - (x == 9).long()
        blank = torch.zeros(9, dtype=torch.float64)
        blank[0] = 1.0
        guess = torch.full((9,), 1 / 8, dtype=torch.float64)
        guess[0] = 0.0
        logits = torch.where(after[..., None] == 1, guess, blank).log().clamp(min=-1e4)
        loss = task.loss(logits, y).item()
        assert loss == pytest.approx(copy_baseline(T), rel=1e-10)
        assert copy_baseline(T) == pytest.approx(10 * math.log(8) / (T + 20), rel=1e-14)
        assert task.baseline == copy_baseline(T)

    def test_no_other_memoryless_guess_does_better(self) -> None:
        # At the recall steps: the frequencies themselves, fitted to the sample, gain no more than sampling noise.
        _, y = CopyTask(T=5).batch(20_000, seeded())
        recalled = y[:, 15:]
        share = torch.bincount(recalled.flatten(), minlength=9)[1:].double() / recalled.numel()
        entropy = -(share * share.log()).sum().item()
        assert entropy * 10 / 25 == pytest.approx(copy_baseline(5), rel=1e-4)

    def test_known_value(self) -> None:
        assert round(copy_baseline(100), 4) == 0.1733

    def test_loss_is_the_mean_over_all_steps(self) -> None:
        task = CopyTask(T=2, remember=2, symbols=3)
        _, y = task.batch(5, seeded())
        logits = torch.randn(5, 6, 4, generator=seeded(1), dtype=torch.float64)
        by_hand = [
            torch.logsumexp(logits[n, t], 0) - logits[n, t, y[n, t]] for n, t in itertools.product(range(5), range(6))
        ]
        torch.testing.assert_close(task.loss(logits, y), torch.stack(by_hand).mean())

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"T": 0}, "'T' is 0"),
            ({"remember": 0}, "'remember' is 0"),
            ({"symbols": 1}, "'symbols' is 1, but must be a whole number of at least 2"),
            ({"T": 1.5}, "'T' is 1.5"),
        ],
        ids=str,
    )
    def test_refuses_what_makes_no_task(self, settings: dict[str, object], words: str) -> None:
        with pytest.raises(UsageError, match=words):
            CopyTask(**settings)
        with pytest.raises(UsageError, match=words):
            copy_baseline(**({"T": 5} | settings))


class TestRecall:
    @pytest.mark.parametrize("distractors", [True, False], ids=["distractors", "blank"])
    def test_the_first_token_is_the_answer_and_the_others_are_none(self, distractors: bool) -> None:
        task = RecallTask(length=9, symbols=3, distractors=distractors)
        x, y = task.batch(3000, seeded())
        assert torch.equal(x[:, 0], y)
        assert set(y.tolist()) == {0, 1, 2}
        assert set(x[:, 1:].flatten().tolist()) == ({3, 4, 5} if distractors else {3})
        assert task.input_size == (6 if distractors else 4)

    def test_the_later_tokens_say_nothing_of_the_answer(self) -> None:
        x, y = RecallTask(length=3, symbols=2).batch(40_000, seeded())
        contexts = 4 * y + 2 * (x[:, 1] - 2) + (x[:, 2] - 2)
        share = torch.bincount(contexts, minlength=8) / 40_000
        assert share.tolist() == pytest.approx([1 / 8] * 8, abs=4 * math.sqrt(1 / 8 * 7 / 8 / 40_000))

    @pytest.mark.parametrize("symbols", [2, 5], ids=str)
    def test_a_uniform_guess_attains_the_baseline(self, symbols: int) -> None:
        task = RecallTask(symbols=symbols)
        _, y = task.batch(20, seeded())
        loss = task.loss(torch.zeros(20, symbols, dtype=torch.float64), y).item()
        assert loss == pytest.approx(recall_baseline(symbols), rel=1e-14)
        assert task.baseline == recall_baseline(symbols) == math.log(symbols)
        assert functional.cross_entropy(torch.eye(symbols)[y] * 100, y) < 1e-6

    @pytest.mark.parametrize("settings", [{"length": 1}, {"length": 0}, {"symbols": 1}], ids=str)
    def test_refuses_what_makes_no_task(self, settings: dict[str, int]) -> None:
        with pytest.raises(UsageError, match="at least 2"):
            RecallTask(**settings)
