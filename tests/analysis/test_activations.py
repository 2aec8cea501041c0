"""Every named activation, and any function, against torch's own and against brute-force quadrature."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from gradlab.analysis.activations import ACTIVATIONS, Activation, gaussian_mean, named, root_mean_square
from gradlab.analysis.theory import fixed_point, gradient_gain, length_map
from gradlab.errors import UsageError
from gradlab.nets import activation_module
from gradlab.nets.names import ACTIVATIONS as NETS_KNOW

ALL = sorted(ACTIVATIONS)
PLACES = torch.tensor(
    [-30.0, -5.0, -1.5, -0.7, -1e-3, 1e-3, 0.3, 0.99, 1.01, 4.0, 18.0], dtype=torch.float64, requires_grad=True
)


def test_theory_knows_every_activation_of_the_nets():
    assert set(NETS_KNOW) <= set(ACTIVATIONS)


@pytest.mark.parametrize("name", ALL)
def test_values_and_slopes_are_torchs(name):
    y = activation_module(name)(PLACES)
    (slope,) = torch.autograd.grad(y.sum(), PLACES)
    found = ACTIVATIONS[name]
    places = PLACES.detach().tolist()
    assert [found.phi(x) for x in places] == pytest.approx(y.detach().tolist(), rel=1e-6, abs=1e-12)
    assert [found.derivative(x) for x in places] == pytest.approx(slope.tolist(), rel=1e-6, abs=1e-12)


def reference_mean(f, q):
    """E[f(sqrt(q) z)] by scipy's adaptive quadrature, cut into pieces of z and at the kinks of all activations."""
    scale = math.sqrt(q)
    edges = sorted(
        {*np.arange(-12.0, 12.5, 3.0), *(k / scale for k in (-64, -8, -1, 0, 1, 8, 64) if abs(k) < 12 * scale)}
    )
    weight = 1 / math.sqrt(2 * math.pi)
    return sum(
        quad(lambda z: f(scale * z) * math.exp(-z * z / 2) * weight, a, b, epsabs=1e-13, epsrel=1e-10, limit=200)[0]
        for a, b in itertools.pairwise(edges)
    )


@pytest.mark.parametrize(("weight_var", "bias_var"), [(0.8, 0.1), (1.7, 0.05)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_gains_agree_with_adaptive_quadrature_to_a_millionth(name, weight_var, bias_var):
    phi, q = ACTIVATIONS[name], fixed_point(name, weight_var, bias_var)
    if math.isinf(q):  # selu at the larger variance: its slopes are above 1
        assert all(length_map(name, 10.0**k, weight_var, bias_var) > 10.0**k for k in range(-3, 9))
    else:
        assert weight_var * reference_mean(lambda x: phi.phi(x) ** 2, q) + bias_var == pytest.approx(q, rel=1e-7)
        chi = weight_var * reference_mean(lambda x: phi.derivative(x) ** 2, q)
        assert gradient_gain(name, weight_var, bias_var) == pytest.approx(math.sqrt(chi), rel=1e-6)


@pytest.mark.parametrize("q", [1e-2, 0.3, 4.0, 1e5], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_lengths_agree_with_adaptive_quadrature_to_a_millionth(name, q):
    found = ACTIVATIONS[name]
    square = reference_mean(lambda x: found.phi(x) ** 2, q)
    assert length_map(name, q, 1.5, 0.2) == pytest.approx(1.5 * square + 0.2, rel=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_a_bare_function_is_as_good_as_a_name(name):
    phi = ACTIVATIONS[name].phi

    def bare(x):
        return phi(x)

    for pair in ((0.8, 0.1), (1.7, 0.05), (0.9, 0.0)):
        assert fixed_point(bare, *pair) == pytest.approx(fixed_point(name, *pair), rel=1e-6)
        assert gradient_gain(bare, *pair) == pytest.approx(gradient_gain(name, *pair), rel=1e-6)


def test_a_kink_away_from_0_in_a_bare_function():
    # phi = max(x - a, 0): E[phi'^2] = P(z > a / sqrt(q)).
    gain = gradient_gain(lambda x: max(x - 0.3, 0.0), 1.0, 1.0)
    q = fixed_point(lambda x: max(x - 0.3, 0.0), 1.0, 1.0)
    assert gain**2 == pytest.approx(0.5 * math.erfc(0.3 / math.sqrt(2 * q)), rel=1e-6)


@pytest.mark.parametrize("q", [0.01, 1.0, 30.0, 200.0], ids=str)
def test_fast_growth_in_closed_form(q):
    assert root_mean_square(math.exp, q) == pytest.approx(math.exp(q), rel=1e-9)
    assert root_mean_square(lambda x: x**5, q) == pytest.approx(math.sqrt(945 * q**5), rel=1e-9)
    assert root_mean_square(math.cosh, q) == pytest.approx(math.sqrt((math.exp(2 * q) + 1) / 2), rel=1e-9)
    assert length_map(math.sinh, q, 1.0) == pytest.approx(math.expm1(2 * q) / 2, rel=1e-9)


def test_weights_without_a_fixed_point_are_told_apart_and_never_loop():
    # q = w exp(2 q) has a solution below 1 up to w = 1 / (2 e); begun at 1, the length falls while w exp(2) < 1.
    q = fixed_point(math.exp, 0.1)
    assert q == pytest.approx(0.1 * math.exp(2 * q), rel=1e-10)
    assert fixed_point(math.exp, 0.2) == math.inf
    assert gradient_gain(math.exp, 0.2) == math.inf
    assert fixed_point(lambda x: x**3, 1.0) == math.inf
    assert fixed_point(lambda x: x**3, 1.0 / 16) == pytest.approx(0.0)


def test_a_mean_of_its_own():
    assert gaussian_mean(lambda x: x * x, 4.0, mean=3.0) == pytest.approx(13.0, rel=1e-12)
    assert gaussian_mean(lambda x: x * x, 0.0, mean=3.0) == 9.0
    assert gaussian_mean(math.exp, 2.0, mean=-50.0) == pytest.approx(math.exp(-49.0), rel=1e-9)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("tahn", "Unknown activation 'tahn'. Did you mean 'tanh'?"),
        ("swish", "Unknown activation 'swish'."),
        (3.0, "must be a name such as 'tanh'"),
        (lambda x: "text", "fails at 0.0 (ValueError)"),
        (lambda: 1.0, "fails at 0.0 (TypeError)"),
        (torch.relu, "fails at 0.0 (TypeError)"),
    ],
    ids=["near", "far", "number", "text", "no-argument", "tensors-only"],
)
def test_what_is_no_activation_is_one_sentence(given, says):
    with pytest.raises(UsageError) as told:
        named(given)
    assert says in str(told.value)


def test_an_activation_passes_through():
    own = Activation(name="own", phi=math.sin, derivative=math.cos)
    assert named(own) is own
