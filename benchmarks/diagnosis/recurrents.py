"""Recurrent nets: what reaches back through time, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradlab.benchmarks.diagnosis.batches import sequences, tokens
from gradlab.benchmarks.diagnosis.blocks import each_step, job
from gradlab.benchmarks.diagnosis.case import Case

__all__ = ["CASES", "Reader", "forget_bias", "recurrent_matrix"]


class Reader(nn.Module):
    """A stock recurrent module between an optional embedding and a linear head.

    Args:
        recurrent: With batch_first=True.
        reads: "last" output, "every" output, or their "mean".
        classes: Outputs of the head.
        words: Size of the vocabulary; 0 for inputs that are features.
    """

    def __init__(self, recurrent: nn.RNNBase, reads: str = "last", *, classes: int = 3, words: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, recurrent.input_size) if words else nn.Identity()
        self.recurrent, self.reads = recurrent, reads
        self.head = nn.Linear(recurrent.hidden_size * (1 + recurrent.bidirectional), classes)

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.recurrent(self.embedding(x))[0]
        read = outputs[:, -1] if self.reads == "last" else outputs.mean(1) if self.reads == "mean" else outputs
        scores: Tensor = self.head(read)
        return scores


class _CellLoop(nn.Module):
    """A cell called once a step, written out."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 24)
        scores = []
        for now in x.unbind(1):
            state = self.cell(now, state)
            scores.append(self.head(state))
        return torch.stack(scores, 1)


def forget_bias(lstm: nn.LSTM, value: float | None, *, longest: float = 100.0) -> nn.LSTM:
    """Set an LSTM's forget biases to a value, or to the logarithm of U(1, longest - 1) (chrono) if None."""
    n = lstm.hidden_size
    with torch.no_grad():
        for level in range(lstm.num_layers):
            bias = getattr(lstm, f"bias_ih_l{level}")
            getattr(lstm, f"bias_hh_l{level}")[n : 2 * n].zero_()
            bias[n : 2 * n] = torch.empty(n).uniform_(1, longest - 1).log() if value is None else value
            if value is None:
                bias[:n] = -bias[n : 2 * n]
    return lstm


def recurrent_matrix(rnn: nn.RNNBase, kind: str, gain: float = 1.0, *, inputs: float | None = None) -> nn.RNNBase:
    """Draw the recurrent matrices anew: "orthogonal", "identity", "gaussian" (radius 1) or "default", times gain.

    Args:
        rnn: The module, changed in place.
        kind: How to draw; each gate has a matrix of its own.
        gain: Factor on them.
        inputs: Standard deviation of the input weights; None leaves them.
    """
    n = rnn.hidden_size
    with torch.no_grad():
        for level in range(rnn.num_layers):
            weight = getattr(rnn, f"weight_hh_l{level}")
            for gate in weight.split(n):
                if kind == "orthogonal":
                    nn.init.orthogonal_(gate)
                elif kind == "identity":
                    nn.init.eye_(gate)
                elif kind == "gaussian":
                    nn.init.normal_(gate, std=n**-0.5)
            weight.mul_(gain)
            if kind != "default":
                for name in ("bias_ih", "bias_hh"):
                    getattr(rnn, f"{name}_l{level}").zero_()
        if inputs is not None:
            cast(Tensor, rnn.weight_ih_l0).normal_(std=inputs)
    return rnn


def _update_bias(gru: nn.GRU, longest: float) -> nn.GRU:
    n = gru.hidden_size
    with torch.no_grad():
        cast(Tensor, gru.bias_ih_l0)[n : 2 * n] = torch.empty(n).uniform_(1, longest - 1).log()
        cast(Tensor, gru.bias_hh_l0)[n : 2 * n] = 0.0
    return gru


def _rnn(kind: Callable[..., Any] = nn.RNN, size: int = 24, features: int = 4, **how: Any) -> Any:
    return kind(features, size, batch_first=True, **how)


def _case(name: str, label: Any, why: str, model: Callable[[], nn.Module], length: int, **how: Any) -> Case:
    sick = label in ("vanishing", "exploding")
    batches = how.pop("batches", partial(sequences, length=length))
    return Case(
        name=name,
        family="recurrent",
        label=label,
        why=why,
        axis="time" if sick else "",
        places=("*recurrent*",) if sick else (),
        build=lambda: job(model(), batches(), **{"steps": 8, **how}),
    )


_EVERY: dict[str, Any] = {"loss": each_step}


def _words(length: int, **how: Any) -> Any:
    return partial(tokens, 8, length, 30, **how)


CASES: tuple[Case, ...] = (
    _case("rnn-default-5", "healthy", "a short sequence", lambda: Reader(_rnn()), 5, lr=0.1),
    _case(
        "rnn-every-step",
        "healthy",
        "a loss at every step",
        lambda: Reader(_rnn(), "every"),
        60,
        batches=partial(sequences, length=60, every=True),
        lr=0.1,
        **_EVERY,
    ),
    _case(
        "rnn-orthogonal-40",
        "healthy",
        "an orthogonal matrix and weak inputs",
        lambda: Reader(recurrent_matrix(_rnn(), "orthogonal", inputs=0.05)),
        40,
        lr=0.01,
    ),
    _case(
        "rnn-identity-relu-80",
        "healthy",
        "the identity as recurrent matrix",
        lambda: Reader(recurrent_matrix(_rnn(nonlinearity="relu"), "identity", inputs=0.05)),
        80,
        lr=1e-3,
    ),
    _case("rnn-mean-of-steps", "healthy", "the mean over steps is read", lambda: Reader(_rnn(), "mean"), 50, lr=0.1),
    _case(
        "rnn-stacked-every-step",
        "healthy",
        "three levels, a loss at every step",
        lambda: Reader(_rnn(num_layers=3), "every"),
        30,
        batches=partial(sequences, length=30, every=True),
        lr=0.1,
        **_EVERY,
    ),
    _case("lstm-default-6", "healthy", "a short sequence", lambda: Reader(_rnn(nn.LSTM)), 6, lr=0.3),
    _case(
        "lstm-chrono-100",
        "healthy",
        "forget biases as long as the sequence",
        lambda: Reader(forget_bias(_rnn(nn.LSTM), None, longest=150)),
        100,
        lr=0.05,
    ),
    _case(
        "lstm-forget-bias-4",
        "healthy",
        "a large forget bias",
        lambda: Reader(forget_bias(_rnn(nn.LSTM), 4.0)),
        80,
        lr=0.05,
    ),
    _case(
        "lstm-every-step-words",
        "healthy",
        "a language model",
        lambda: Reader(_rnn(nn.LSTM, features=12), "every", classes=30, words=30),
        40,
        batches=_words(40),
        lr=0.5,
        **_EVERY,
    ),
    _case(
        "lstm-words-zipf",
        "healthy",
        "rare words",
        lambda: Reader(_rnn(nn.LSTM, features=12), "every", classes=200, words=200),
        24,
        batches=partial(tokens, 8, 24, 200, zipf=True),
        lr=0.01,
        optimizer="adam",
        **_EVERY,
    ),
    _case(
        "lstm-bidirectional-mean",
        "healthy",
        "both directions, their mean is read",
        lambda: Reader(_rnn(nn.LSTM, bidirectional=True), "mean"),
        30,
        lr=0.3,
    ),
    _case("gru-default-7", "healthy", "a short sequence", lambda: Reader(_rnn(nn.GRU)), 7, lr=0.1),
    _case(
        "gru-every-step",
        "healthy",
        "a loss at every step",
        lambda: Reader(_rnn(nn.GRU), "every"),
        40,
        batches=partial(sequences, length=40, every=True),
        lr=0.2,
        **_EVERY,
    ),
    _case(
        "gru-update-bias-80",
        "healthy",
        "update gates that keep",
        lambda: Reader(_update_bias(_rnn(nn.GRU), 120)),
        80,
        lr=0.1,
    ),
    _case(
        "gru-cell-loop",
        "healthy",
        "a cell called once a step",
        lambda: _CellLoop(nn.GRUCell(4, 24)),
        20,
        batches=partial(sequences, length=20, every=True),
        lr=0.1,
        **_EVERY,
    ),
    # vanishing through time
    _case(
        "rnn-default-100",
        "vanishing",
        "torch's default multiplies by about a half each step",
        lambda: Reader(_rnn()),
        100,
        lr=0.1,
    ),
    _case("rnn-default-relu-60", "vanishing", "torch's default", lambda: Reader(_rnn(nonlinearity="relu")), 60, lr=0.1),
    _case(
        "rnn-orthogonal-strong-inputs",
        "vanishing",
        "strong inputs flatten tanh",
        lambda: Reader(recurrent_matrix(_rnn(), "orthogonal", inputs=0.5)),
        120,
        lr=0.01,
    ),
    _case("rnn-stacked-100", "vanishing", "two levels", lambda: Reader(_rnn(num_layers=2)), 100, lr=0.1),
    _case("lstm-default-120", "vanishing", "forget gates half open", lambda: Reader(_rnn(nn.LSTM)), 120, lr=0.3),
    _case(
        "lstm-forget-bias-1-150",
        "vanishing",
        "a forget bias of one lasts a few steps",
        lambda: Reader(forget_bias(_rnn(nn.LSTM), 1.0)),
        150,
        lr=0.1,
    ),
    _case(
        "lstm-words-100",
        "vanishing",
        "forget gates half open, behind an embedding",
        lambda: Reader(_rnn(nn.LSTM, features=12), words=30),
        100,
        batches=_words(100, classes=3),
        lr=0.3,
    ),
    _case("gru-default-100", "vanishing", "update gates half open", lambda: Reader(_rnn(nn.GRU)), 100, lr=0.1),
    _case(
        "gru-sum-loss-100",
        "vanishing",
        "a loss times a million hides it from absolute bounds",
        lambda: Reader(_rnn(nn.GRU)),
        100,
        loss=lambda s, y: 1e6 * nn.functional.cross_entropy(s, y),
        lr=1e-3,
        optimizer="adam",
    ),
    # exploding through time
    _case(
        "rnn-relu-radius-1.5",
        "exploding",
        "He's matrix times 1.5",
        lambda: Reader(recurrent_matrix(_rnn(nonlinearity="relu"), "gaussian", 1.5 * 2**0.5, inputs=0.1)),
        60,
        lr=1e-6,
        optimizer="adam",
    ),
    _case(
        "rnn-relu-identity-1.4",
        "exploding",
        "the identity times 1.4",
        lambda: Reader(recurrent_matrix(_rnn(nonlinearity="relu"), "identity", 1.4, inputs=0.1)),
        50,
        lr=1e-6,
        optimizer="adam",
    ),
    _case(
        "rnn-tanh-gain-4",
        "exploding",
        "the gradient grows though the state is bounded",
        lambda: Reader(recurrent_matrix(_rnn(size=48), "gaussian", 4.0, inputs=0.1)),
        80,
        lr=1e-6,
        optimizer="adam",
    ),
    _case(
        "rnn-tanh-weak-inputs-1.5",
        "exploding",
        "a state near zero, where tanh is linear",
        lambda: Reader(recurrent_matrix(_rnn(), "orthogonal", 1.5, inputs=1e-9)),
        40,
        lr=1e-12,
        optimizer="adam",
    ),
    _case(
        "lstm-large-recurrent",
        "exploding",
        "recurrent weights ten times torch's",
        lambda: Reader(recurrent_matrix(forget_bias(_rnn(nn.LSTM, 32), 3.0), "default", 16.0)),
        120,
        lr=1e-6,
        optimizer="adam",
    ),
)
