"""Dead and saturated units, found exactly."""

import math

import pytest
import torch
from torch import nn

from gradlab.probes import watch


def units(model, *inputs):
    with watch(model) as probe:
        for x in inputs:
            model(x)
            probe.step()
    return probe.trace.units.set_index("layer")


SHAPES = {"2d": (8, 10), "3d": (4, 3, 10), "4d": (4, 10, 5, 3), "5d": (2, 10, 2, 3, 2)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [nn.ReLU, nn.ReLU6, lambda: nn.ReLU(inplace=True)], ids=["relu", "relu6", "in_place"])
def test_dead_units_are_found_exactly(shape, kind):
    x = torch.rand(SHAPES[shape]) + 0.1
    channel = 1 if x.dim() > 3 else x.dim() - 1
    x.select(channel, 3).neg_()
    x.select(channel, 7).zero_()
    x.select(channel, 8)[1:] = -1  # alive for the first sample only
    x.requires_grad_()
    row = units(nn.Sequential(nn.Identity(), kind()), x * 1).loc["1"]
    assert row["units"] == 10
    assert row["dead_fraction"] == pytest.approx(0.2)
    assert math.isnan(row["saturated_fraction"])


def test_channels_last():
    x = torch.rand(4, 10, 5, 3)
    x[:, [2, 5, 6]] = -1
    row = units(nn.Sequential(nn.ReLU()), x.to(memory_format=torch.channels_last)).loc["0"]
    assert row["dead_fraction"] == pytest.approx(0.3)
    x = torch.atanh(torch.full((4, 10, 5, 3), 0.5))
    x[:3, 4] = 10
    row = units(nn.Sequential(nn.Tanh()), x.to(memory_format=torch.channels_last)).loc["0"]
    assert row["saturated_fraction"] == pytest.approx(0.1)


def test_healthy_relu_has_half_its_entries_zero_and_no_dead_unit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU())
    for layer in (model[0], model[2]):
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    with watch(model) as probe:
        model(torch.randn(1000, 20))
        probe.step()
    assert probe.trace.layers.query("kind == 'ReLU'")["act_zero_fraction"].between(0.3, 0.7).all()
    assert probe.trace.units["dead_fraction"].tolist() == [0, 0]


def test_a_unit_alive_in_one_step_of_the_window_is_not_dead():
    first, second = -torch.ones(4, 3), -torch.ones(2, 3)
    first[0, 0] = second[1, 1] = 1
    assert units(nn.Sequential(nn.ReLU()), first, second).loc["0", "dead_fraction"] == pytest.approx(1 / 3)


def test_nan_is_not_dead():
    x = -torch.ones(4, 2)
    x[0, 0] = math.nan
    assert units(nn.Sequential(nn.ReLU()), x).loc["0", "dead_fraction"] == 0.5


@pytest.mark.parametrize(
    ("kind", "flat", "steep"),
    [
        (nn.Tanh, 3.1, 2.9),  # 1 - tanh^2 crosses 0.01 at atanh(sqrt(0.99)) = 2.993
        (nn.Sigmoid, 6.1, 5.9),  # s(1 - s) crosses 0.0025 at ln((1 + sqrt(.99))/(1 - sqrt(.99))) = 5.986
        (nn.Softsign, 9.1, 8.9),  # 1/(1 + x)^2 crosses 0.01 at 9
        (nn.Hardtanh, 1.01, 0.99),
        (nn.Hardsigmoid, 3.01, 2.99),
    ],
    ids=["tanh", "sigmoid", "softsign", "hardtanh", "hardsigmoid"],
)
def test_saturated_units(kind, flat, steep):
    x = torch.zeros(10, 4)
    x[:, 0] = flat
    x[:, 1] = steep
    x[:6, 2] = -flat  # most samples
    x[:5, 3] = -flat  # half of them
    row = units(nn.Sequential(kind()), x).loc["0"]
    assert row["units"] == 4
    assert row["saturated_fraction"] == 0.5
    assert math.isnan(row["dead_fraction"])


def test_saturation_is_counted_over_the_window():
    few, many = torch.zeros(4, 1), torch.full((6, 1), 50.0)
    assert units(nn.Sequential(nn.Tanh()), few, many).loc["0", "saturated_fraction"] == 1
    assert units(nn.Sequential(nn.Tanh()), many, few, few).loc["0", "saturated_fraction"] == 0


class Shared(nn.Module):
    """One ReLU used after two layers, as in the common residual block."""

    def __init__(self, widths):
        super().__init__()
        self.relu, self.widths = nn.ReLU(), widths

    def forward(self, x):
        for place, width in enumerate(self.widths):
            y = torch.ones(len(x), width)
            y[:, place] = -1  # another unit is dead in each place
            self.relu(y)
        return x


@pytest.mark.parametrize("widths", [(4, 4), (4, 12)], ids=["same_width", "other_width"])
def test_a_shared_activation_has_units_in_each_place(widths):
    row = units(Shared(widths), torch.ones(2, 1), torch.ones(3, 1)).loc["relu"]
    assert row["units"] == sum(widths)
    assert row["dead_fraction"] == pytest.approx(2 / sum(widths))


def test_a_cell_that_walks_through_time_has_its_units_once():
    row = units(Shared((12,) * 11), torch.ones(2, 1)).loc["relu"]
    assert row["units"] == 12
    assert row["dead_fraction"] == 0  # each unit is alive at some time


def test_micro_batches_of_one_step_are_one_window():
    model = nn.Sequential(nn.ReLU())
    with watch(model) as probe:
        model(torch.tensor([[1.0, -1.0, -1.0]]))
        model(torch.tensor([[-1.0, 1.0, -1.0]]))
        probe.step()
    assert probe.trace.units["units"].tolist() == [3]
    assert probe.trace.units["dead_fraction"][0] == pytest.approx(1 / 3)


def test_output_of_one_dimension_is_not_kept():
    model = nn.Sequential(nn.ReLU())
    with watch(model) as probe:
        y = model(torch.tensor([1.0, -1.0]))
        y.zero_()  # would kill every unit if the probe held the output itself
        probe.step()
    assert probe.trace.units["dead_fraction"].tolist() == [0.5]
