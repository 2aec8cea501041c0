"""Singular values of Jacobians against closed forms and against numpy's SVD of a Jacobian made by differences."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import gradlab as gl
from gradlab.errors import UsageError
from gradlab.measure.jacobian import jacobian_spectrum
from gradlab.nets import MLP, CifarNet, initialize


def generator(seed):
    return torch.Generator().manual_seed(seed)


def stack(depth, width, activation, scheme, *, gain=1.0):
    net = MLP(depth, width=width, in_features=width, classes=1, activation=activation, bias=False).double()
    return initialize(net, scheme, gain=gain, seed=0)


@pytest.mark.parametrize(("method", "k"), [("exact", None), ("exact", 5), ("lanczos", 5), ("auto", 7)], ids=str)
def test_a_deep_orthogonal_linear_net_is_an_isometry(method, k):
    net = stack(40, 24, "linear", "orthogonal")
    x = torch.randn(1, 24, dtype=torch.float64, generator=generator(1))
    found = jacobian_spectrum(net.features, x, k=k, method=method)
    assert found.shape == (k or 24,)
    np.testing.assert_allclose(found, 1.0, rtol=1e-12)


def test_orthogonal_weights_with_a_gain_are_a_power_of_it():
    net = stack(10, 12, "linear", "orthogonal", gain=1.1)
    np.testing.assert_allclose(jacobian_spectrum(net.features, torch.ones(1, 12).double()), 1.1**10, rtol=1e-12)


@pytest.mark.parametrize("method", ["exact", "lanczos"])
@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu"])
def test_equals_numpys_svd_of_a_jacobian_by_differences(activation, method):
    net = stack(4, 17, activation, "he_normal")
    x = torch.randn(17, dtype=torch.float64, generator=generator(2))
    step = 1e-6

    def hidden(values):
        return net.features(values[None])[0]

    with torch.no_grad():
        columns = [(hidden(x + step * e) - hidden(x - step * e)) / (2 * step) for e in torch.eye(17).double()]
    expected = np.linalg.svd(torch.stack(columns, 1).numpy(), compute_uv=False)
    found = jacobian_spectrum(hidden, x, k=6, method=method)
    np.testing.assert_allclose(found, expected[:6], rtol=1e-6)


def test_layer_to_layer_of_a_convolution_is_its_dense_matrix():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, padding=1, bias=False).double()
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        dense = torch.stack([layer(e.view(1, 2, 5, 5)).flatten() for e in torch.eye(50).double()], 1).numpy()
    expected = np.linalg.svd(dense, compute_uv=False)
    np.testing.assert_allclose(jacobian_spectrum(layer, x), expected, rtol=1e-10)
    np.testing.assert_allclose(jacobian_spectrum(layer, x, k=4, method="lanczos"), expected[:4], rtol=1e-8)


def test_the_largest_values_of_a_net_too_large_to_form_its_jacobian():
    net = CifarNet(8, width=4, in_channels=3).double().eval()
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64, generator=generator(3))
    exact = jacobian_spectrum(net.features, x, k=3, method="exact")
    np.testing.assert_allclose(jacobian_spectrum(net.features, x, k=3, method="lanczos"), exact, rtol=1e-7)


def test_an_operator_without_a_batching_rule_goes_row_by_row():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            if grad.shape != x.shape or torch._C._functorch.is_batchedtensor(grad):
                raise RuntimeError("no batching rule")
            return 2 * x * grad

    np.testing.assert_allclose(jacobian_spectrum(Square.apply, torch.tensor([1.0, -3.0]).double()), [6.0, 2.0])


def test_parameters_and_input_are_left_alone():
    net = stack(2, 5, "tanh", "he_normal")
    x = torch.ones(1, 5, dtype=torch.float64)
    with torch.no_grad():
        jacobian_spectrum(net.features, x, k=2, method="lanczos")
    assert x.grad is None
    assert not x.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())


def test_what_is_not_finite_is_nan_and_no_error():
    x = torch.zeros(3, dtype=torch.float64)
    assert np.isnan(jacobian_spectrum(lambda v: v.sqrt(), x)).all()
    assert np.isnan(jacobian_spectrum(lambda v: v.sqrt(), x, k=2, method="lanczos")).all()
    assert jacobian_spectrum(lambda v: 0.0 * v, x).tolist() == [0.0, 0.0, 0.0]


def test_the_public_name_is_lazy():
    assert gl.measure.jacobian_spectrum is jacobian_spectrum
    code = "import sys, gradlab.measure; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'jacobian_spectra'"):
        gl.measure.jacobian_spectra  # noqa: B018


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: jacobian_spectrum(torch.sin, torch.ones(2), method="exakt"), "Did you mean 'exact'"),
        (lambda: jacobian_spectrum(torch.sin, torch.ones(2, dtype=torch.int64)), "dtype torch.int64"),
        (lambda: jacobian_spectrum(lambda x: torch.ones(2), torch.ones(2)), "does not depend on x"),
        (lambda: jacobian_spectrum(lambda x: 3.0, torch.ones(2)), "does not depend on x"),
        (lambda: jacobian_spectrum(torch.sin, torch.ones(2), k=3), "k is 3, but the Jacobian has 2"),
        (lambda: jacobian_spectrum(torch.sin, torch.ones(2), k=True), "k is True"),
        (lambda: jacobian_spectrum(torch.sin, torch.ones(2), method="lanczos"), "fewer than all 2 values"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_values_are_told_in_one_sentence(call, says):
    with pytest.raises(UsageError) as told:
        call()
    assert says in str(told.value)
