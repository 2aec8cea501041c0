"""Which cases rules were tuned on, and which were held out: assigned once, never changed.

Cases sorted by label, axis, family and the SHA-256 of their names were dealt in turn, so both halves have about as many
of each kind. Rules are tuned on the half "tune" alone; the number to quote is that of the half "held-out".
"""

from __future__ import annotations

from typing import Final, Literal

__all__ = ["HELD_OUT", "Half", "half_of"]

Half = Literal["tune", "held-out"]

HELD_OUT: Final = frozenset(
    {
        "adapters-on-transformer",
        "autoencoder-binary-sum",
        "autoencoder-bottleneck-2",
        "autoencoder-default-relu-24",
        "autoencoder-saturated-code",
        "autoencoder-variational",
        "conv-batchnorm-10",
        "conv-dead-layer",
        "conv-default-leaky-24",
        "conv-fine-tuned-eval",
        "conv-groupnorm-12",
        "conv-he-times-2-16",
        "conv-lenet",
        "conv-tiny-weights-8",
        "embedding-factors",
        "embedding-saturated-tanh",
        "frozen-argmax",
        "frozen-group-rate-0",
        "frozen-left-out-layer",
        "frozen-left-out-recurrent",
        "frozen-no-grad",
        "frozen-unused-layer",
        "frozen-unused-output",
        "gru-cell-loop",
        "lstm-bidirectional-mean",
        "lstm-default-6",
        "lstm-forget-bias-4",
        "lstm-words-100",
        "mixed-conv-lstm",
        "mixed-conv-lstm-120",
        "mixed-conv-mlp",
        "mixed-conv-rnn-explodes",
        "mixed-dead-conv",
        "mlp-accumulated",
        "mlp-batchnorm-90-default",
        "mlp-batchnorm-batch-4",
        "mlp-batchnorm-default-8",
        "mlp-clipped",
        "mlp-converged",
        "mlp-dead-bias-all-layers",
        "mlp-dead-first-layer",
        "mlp-dead-huge-step-before",
        "mlp-default-gelu-16",
        "mlp-default-relu-3",
        "mlp-default-relu-40",
        "mlp-default-sigmoid-10",
        "mlp-diverging-leaky",
        "mlp-diverging-linear",
        "mlp-diverging-momentum",
        "mlp-elu-he-8",
        "mlp-float64",
        "mlp-frozen-trunk",
        "mlp-he-relu-24",
        "mlp-he-times-1.5-sum-loss-tiny",
        "mlp-heads-in-turn",
        "mlp-leaky-relu-12",
        "mlp-linear-orthogonal-1.6",
        "mlp-orthogonal-half-24",
        "mlp-residual-30-gain-1.3",
        "mlp-saturated-middle",
        "mlp-saturated-sigmoid-bias",
        "mlp-saturated-tanh",
        "mlp-selu-lecun-20",
        "mlp-shared-weights",
        "mlp-sum-loss",
        "mlp-tanh-gain-3-40",
        "mlp-tanh-output",
        "mlp-tanh-xavier-10",
        "mlp-targets-1e6",
        "mlp-tiny-weights-relu-8",
        "mlp-tiny-weights-tanh-6",
        "mlp-vanishing-sum-loss",
        "mlp-warmup",
        "mlp-warmup-from-0",
        "mlp-weights-fp16",
        "nonfinite-all-steps-skipped",
        "nonfinite-gradient-alone",
        "nonfinite-image-later",
        "nonfinite-input-later",
        "nonfinite-log-of-zero",
        "nonfinite-log-of-zero-later",
        "nonfinite-sqrt-backward",
        "residual-batchnorm-10",
        "residual-fixup-30",
        "residual-zero-gamma-8",
        "rnn-default-relu-60",
        "rnn-identity-relu-80",
        "rnn-mean-of-steps",
        "rnn-orthogonal-40",
        "rnn-orthogonal-strong-inputs",
        "rnn-stacked-100",
        "rnn-stacked-every-step",
        "rnn-tanh-gain-4",
        "rnn-tanh-weak-inputs-1.5",
        "transformer-clipped-bf16",
        "transformer-dead-feedforward",
        "transformer-patches",
        "transformer-plain-8",
        "transformer-plain-explodes",
        "transformer-post-norm-3",
        "transformer-pre-norm-16",
    }
)


def half_of(name: str) -> Half:
    """Return the half that a case belongs to.

    Example:
        >>> half_of("adapters-on-transformer")
        'held-out'
    """
    return "held-out" if name in HELD_OUT else "tune"
