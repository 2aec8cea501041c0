"""Scaled weights before BatchNorm: the identity, and eps's part in it, against formulas written out."""

import math

import pytest
import torch

from gradlab.errors import UsageError
from gradlab.measure.scale_invariance import layer_scale_response, net_scale_response, scale_hidden_weights
from gradlab.nets import MLP, initialize


def draws(seed=0, batch=12, width=7):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((width, width), (batch, width), (batch, width))
    ]


def net(norm="batch"):
    model = initialize(MLP(4, width=9, in_features=5, classes=3, norm=norm), "he_normal", seed=0)
    return model.double()


@pytest.mark.parametrize("scale", [1e-4, 0.3, 50.0])
def test_without_eps_the_identity_is_exact(scale):
    weight, x, cotangent = draws()
    found = layer_scale_response(weight, x, cotangent, scale=scale, eps=0.0)
    assert max(found.output_error, found.gradient_error) < 1e-12
    whole = net_scale_response(net(), draws()[1][:, :5], torch.arange(12) % 3, scale=scale, eps=0.0)
    assert max(whole.output_error, whole.gradient_error) < 1e-11


def test_eps_enters_as_written_out():
    weight, x, cotangent = draws()
    scale, eps = 1e-3, 1e-5
    found = layer_scale_response(weight, x, cotangent, scale=scale, eps=eps)

    def by_hand(a, epsilon):
        z = x @ (a * weight).T
        sd = (z.var(0, correction=0) + epsilon).sqrt()
        y = (z - z.mean(0)) / sd
        dz = (cotangent - cotangent.mean(0) - y * (cotangent * y).mean(0)) / sd
        return y, dz.T @ x

    (y0, g0), (y1, g1) = by_hand(1.0, 0.0), by_hand(scale, eps)
    assert found.output_error == pytest.approx(float((y1 - y0).norm() / y0.norm()), rel=1e-9)
    assert found.gradient_ratio == pytest.approx(float(scale * g1.norm() / g0.norm()), rel=1e-9)
    assert found.gradient_error == pytest.approx(float((scale * g1 - g0).norm() / g0.norm()), rel=1e-9)
    assert found.gradient_ratio < 0.9


def test_the_net_is_left_as_it_was():
    model = net().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = net_scale_response(model, draws()[1][:, :5], torch.arange(12) % 3, scale=1e-3, eps=1e-5)
    assert found.gradient_ratio < 0.9
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d)} == {1e-5}
    assert not any(module.training for module in model.modules())


def test_scaling_leaves_head_and_biases():
    model = net()
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    scale_hidden_weights(model, 0.5)
    for key, value in model.state_dict().items():
        factor = 0.5 if key.endswith("linear.weight") else 1.0
        assert torch.equal(value, factor * kept[key]), key


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": math.nan}, "scale is nan"),
        ({"eps": -1e-5}, "eps is -1e-05, but it must be finite and at least 0"),
        ({"batch": 1}, "needs at least 2 samples to take a variance of, got 1"),
    ],
    ids=["scale-0", "scale-nan", "eps", "batch-1"],
)
def test_bad_values_are_told_in_one_sentence(change, says):
    settings = {"scale": 0.1, "eps": 0.0, "batch": 12} | change
    weight, x, cotangent = draws(batch=settings.pop("batch"))
    with pytest.raises(UsageError, match=says):
        layer_scale_response(weight, x, cotangent, **settings)
    with pytest.raises(UsageError, match=says):
        net_scale_response(net(), x[:, :5], torch.arange(len(x)) % 3, **settings)


def test_a_net_without_batchnorm_is_refused():
    with pytest.raises(UsageError, match="no BatchNorm"):
        net_scale_response(net("none"), draws()[1][:, :5], torch.arange(12) % 3, scale=0.1, eps=0.0)
