"""Remedies on copies: what each changes, that the gradient says so, and that the user's model is left alone."""

import copy

import pytest
import torch
from torch import nn

from gradlab import whatif
from gradlab.errors import UsageError
from gradlab.surgery import REMEDIES, Anatomy, Scaled

CROSS = nn.functional.cross_entropy


def deep(activation=nn.Sigmoid, depth=12, width=16):
    layers = [part for _ in range(depth) for part in (nn.Linear(width, width), activation())]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def batch(*shape, classes=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator), torch.arange(shape[0]) % classes


class Last(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = getattr(nn, kind)(3, 12, batch_first=True, **options)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def remedy(name):
    return next(remedy for remedy in REMEDIES if remedy.name == name)


def changed(name, model, x):
    count = remedy(name).apply(model, Anatomy.of(model, lambda: model(x)))
    return count, model


def test_a_sigmoid_net_is_healed_by_what_is_known_to_heal_it_and_not_by_clipping():
    tried = whatif(deep, batch(32, 16), CROSS, steps=6)
    verdict = {trial.name: trial.diagnosis.healthy for trial in tried.trials}
    assert not verdict["as it is"]
    assert verdict["activation"]
    assert verdict["batchnorm"]
    assert not verdict["clipping"]
    assert tried.best.name in ("activation", "batchnorm")
    # The ratio shown is that of plain autograd at the same initialization.
    torch.manual_seed(0)
    model, (x, y) = deep(), batch(32, 16)
    first, last = model[0](x), None
    first.retain_grad()
    last = model[1:](first)
    last.retain_grad()
    CROSS(last, y).backward()
    assert tried.before.depth_ratio == pytest.approx(float(first.grad.norm() / last.grad.norm()), rel=1e-4)
    assert tried.before.profile[0][0] == "0"
    assert "Try" in str(tried)


def test_chrono_gates_carry_a_gradient_through_a_long_sequence():
    tried = whatif(lambda: Last("LSTM"), batch(8, 120, 3), CROSS, steps=3, remedies=["forget_bias", "chrono"])
    assert tried.before.diagnosis.leading.title == "vanishing through time"
    by_name = {trial.name: trial for trial in tried.trials}
    assert by_name["as it is"].time_ratio < by_name["forget_bias"].time_ratio < by_name["chrono"].time_ratio
    assert tried.best.name == "chrono"


def test_a_smaller_learning_rate_heals_a_net_that_one_step_killed():
    tried = whatif(
        lambda: deep(nn.ReLU, 3), batch(32, 16), CROSS, steps=15, remedies=["learning_rate", "clipping"],
        optimizer=lambda params: torch.optim.SGD(params, lr=10.0),
    )  # fmt: skip
    assert tried.before.diagnosis.kinds == ("dead",)
    assert tried.best.name == "learning_rate"
    assert tried.best.trace.steps["learning_rate"].unique().tolist() == [1.0]


def test_clipping_is_recorded_as_such():
    tried = whatif(deep, batch(32, 16), lambda out, y: 1e3 * CROSS(out, y), steps=3, remedies=["clipping"])
    steps = tried.trials[1].trace.steps
    assert (steps["clip_coefficient"] < 1).all()
    assert steps["grad_norm"].to_list() == pytest.approx([1.0] * 3, rel=1e-4)


def test_a_healthy_model_gets_no_advice():
    tried = whatif(lambda: deep(nn.ReLU, 2), batch(32, 16), CROSS, steps=4, remedies=["batchnorm"])
    assert tried.before.diagnosis.healthy
    assert tried.best is None
    assert "Try" not in str(tried)


def test_the_given_model_is_left_alone():
    model = deep()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    whatif(model, batch(32, 16), CROSS, steps=2, remedies=["initialization", "skip"])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model._forward_hooks


# -- surgery ----------------------------------------------------------------------------------------------------------


def test_batchnorm_goes_behind_hidden_layers_only_and_where_none_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),
                          nn.Flatten(), nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 2))  # fmt: skip
    count, model = changed("batchnorm", model, torch.randn(4, 3, 6, 6))
    assert count == 2
    assert [type(model[0][1]), type(model[6][1])] == [nn.BatchNorm2d, nn.BatchNorm1d]
    assert isinstance(model[2], nn.Conv2d)
    assert isinstance(model[8], nn.Linear)


def test_a_skip_goes_around_layers_of_one_shape_scaled_by_their_number():
    count, model = changed("skip", deep(nn.ReLU, 4), torch.randn(4, 16))
    assert count == 4
    layer, x = model[2], torch.randn(4, 16)
    assert isinstance(layer, Scaled)
    assert torch.allclose(layer(x), x + layer.layer(x) / 2)


def test_the_outputs_activation_is_kept():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid())
    count, model = changed("activation", model, torch.randn(2, 4))
    assert count == 1
    assert isinstance(model[1], nn.ReLU)
    assert isinstance(model[3], nn.Sigmoid)


def test_a_shared_activation_is_replaced_under_each_of_its_names():
    act = nn.Tanh()
    model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 1))
    changed("activation", model, torch.randn(2, 4))
    assert isinstance(model[1], nn.ReLU)
    assert model[1] is model[3]


def test_the_anatomy_leaves_running_statistics_and_random_state_as_they_were():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 1))
    state, running = torch.get_rng_state(), model[1].running_mean.clone()
    anatomy = Anatomy.of(model, lambda: model(torch.randn(8, 3) + 5))
    assert [call.name for call in anatomy.calls] == ["0", "1", "2", "3"]
    assert torch.equal(model[1].running_mean, running)
    assert int(model[1].num_batches_tracked) == 0
    assert torch.equal(torch.get_rng_state(), state)


# -- misuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: whatif(deep, batch(8, 16), CROSS, steps=1), "at least 2 steps"),
        (lambda: whatif(deep, batch(8, 16), CROSS, remedies=["batchnrom"]), "Did you mean 'batchnorm'"),
        (lambda: whatif(deep, torch.randn(8, 16), CROSS), r"must be a pair \(inputs, targets\)"),
        (lambda: whatif(lambda: 3, batch(8, 16), CROSS), "must give a torch.nn.Module"),
        (lambda: whatif(deep, batch(8, 16), lambda out, y: out), "one entry"),
        (lambda: whatif(deep, batch(8, 16), lambda out, y: out.detach().sum()), "does not depend"),
    ],
    ids=["steps", "remedy", "batch", "model", "loss", "detached"],
)
def test_what_cannot_be_tried_is_refused_in_a_sentence(call, words):
    with pytest.raises(UsageError, match=words):
        call()


def test_a_remedy_that_does_not_apply_is_listed_with_the_reason():
    tried = whatif(lambda: Last("LSTM", bias=False), batch(4, 9, 3), CROSS, steps=2, remedies=["forget_bias", "skip"])
    assert [name for name, _ in tried.skipped] == ["forget_bias", "skip"]
