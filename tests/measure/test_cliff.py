"""The cliff map against its closed form, and gradient descent against a hand-written loop."""

import numpy as np
import pytest
import torch

from gradlab.errors import UsageError
from gradlab.measure.cliff import cliff_loss, cliff_surface, descend


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_one_step_is_the_closed_form():
    weight, bias = torch.tensor([2.0, 5.0], dtype=torch.float64), torch.tensor([-1.0, -2.5], dtype=torch.float64)
    want = (sigmoid(weight.numpy() * sigmoid(0.5) + bias.numpy()) - 0.7) ** 2
    np.testing.assert_allclose(cliff_loss(weight, bias, steps=1).numpy(), want, rtol=1e-14)


def test_gradient_equals_central_differences():
    surface = cliff_surface(weights=(3.0, 4.0), biases=(-2.0, -1.0), points=3, steps=10)

    def loss(w, b):
        h = 0.5
        for _ in range(10):
            h = w * sigmoid(h) + b
        return (sigmoid(h) - 0.7) ** 2

    e = 1e-6
    for i, b in enumerate(surface.bias):
        for j, w in enumerate(surface.weight):
            dw = (loss(w + e, b) - loss(w - e, b)) / (2 * e)
            db = (loss(w, b + e) - loss(w, b - e)) / (2 * e)
            assert surface.grad_norm[i, j] == pytest.approx(np.hypot(dw, db), rel=1e-6)
            assert surface.loss[i, j] == pytest.approx(loss(w, b), rel=1e-12)


def test_the_tabulated_median_and_percentile():
    norms = cliff_surface(points=200).grad_norm
    assert np.median(norms) == pytest.approx(0.045, rel=0.02)
    assert np.quantile(norms, 0.99) == pytest.approx(0.61, rel=0.02)


@pytest.mark.parametrize("clip", [0.0, 0.5], ids=["free", "clipped"])
def test_descent_equals_a_loop(clip):
    start = np.array([[5.1, -2.7], [3.0, -1.5]])
    got = descend(start, lr=0.1, clip=clip, updates=7, steps=20)
    for k, first in enumerate(start):
        point = torch.tensor(first, dtype=torch.float64, requires_grad=True)
        for update in range(7):
            loss = cliff_loss(point[0], point[1], steps=20)
            (grad,) = torch.autograd.grad(loss, point)
            norm = grad.norm().item()
            factor = min(1.0, clip / norm) if clip else 1.0
            assert got.loss[k, update] == pytest.approx(loss.item(), rel=1e-12)
            assert got.step[k, update] == pytest.approx(0.1 * norm * factor, rel=1e-12)
            point = (point - 0.1 * factor * grad).detach().requires_grad_()
        np.testing.assert_allclose(got.path[k, -1], point.detach().numpy(), rtol=1e-12)
    if clip:
        assert got.step.max() <= 0.1 * clip * (1 + 1e-12)


@pytest.mark.parametrize(
    "call",
    [lambda: cliff_surface(points=1), lambda: cliff_surface(steps=0), lambda: descend(np.zeros(2))],
    ids=["points", "steps", "starts"],
)
def test_bad_values_are_one_sentence(call):
    with pytest.raises(UsageError, match="must"):
        call()
