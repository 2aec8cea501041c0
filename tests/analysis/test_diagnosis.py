"""Diagnoses of hand-made traces: what each sickness looks like, what must not be taken for it, and what leads."""

import math

import numpy as np
import pandas as pd
import pytest

from gradlab import Trace, diagnose
from gradlab.errors import DataError, UsageError


def net(gradient, *, kind="ReLU", steps=6, signal=None, **columns):
    """A chain of layers with these log10 gradient norms, first to last, at every step."""
    gradient = np.asarray(gradient, dtype=float)
    count = len(gradient)
    signal = np.zeros(count) if signal is None else np.asarray(signal, dtype=float)
    rows = pd.DataFrame(
        {
            "step": np.repeat(np.arange(steps), count),
            "layer": [f"l{place}" for place in range(count)] * steps,
            "call": 0,
            "order": list(range(count)) * steps,
            "kind": kind,
            "entries": 100,
            "act_norm": np.tile(10 * 10.0**signal, steps),
            "act_abs_max": 3.0,
            "act_zero_fraction": 0.5,
            "act_nonfinite": 0.0,
            "grad_norm": np.tile(10.0**gradient, steps),
            "grad_nonfinite": 0.0,
        }
    )
    for name, value in columns.items():
        rows[name] = value
    return rows


def training(steps=6, **columns):
    table = pd.DataFrame({"step": range(steps), "loss": 1.0, "grad_norm": 1.0, "skipped": False, "learning_rate": 0.1})
    return table.assign(**columns)


def parameters(layers=("l0", "l1"), steps=6, **columns):
    count = len(layers)
    table = pd.DataFrame(
        {
            "step": np.repeat(np.arange(steps), count),
            "param": [f"{layer}.weight" for layer in layers] * steps,
            "layer": list(layers) * steps,
            "entries": 100, "weight_norm": 1.0, "grad_norm": 1.0, "update_norm": 0.1, "grad_nonfinite": 0.0,
        }
    )  # fmt: skip
    return table.assign(**columns)


def found(layers=None, info=None, **tables):
    tables = tables | ({} if layers is None else {"layers": layers})
    return diagnose(Trace(tables, info))


def test_a_flat_gradient_is_healthy_whatever_its_scale():
    for scale in (-30.0, 0.0, 30.0):  # a converged net, a summed loss
        assert found(net(np.full(12, scale))).healthy


def test_vanishing_names_the_layers_that_hardly_learn_and_the_slope():
    told = found(net(np.linspace(-8, 0, 17), kind="Sigmoid"))
    assert [item.title for item in told.findings] == ["vanishing through depth"]
    leading = told.leading
    assert leading.evidence[0].value == pytest.approx(0.5)
    assert leading.evidence[0].low == pytest.approx(0.5)
    assert leading.layers == tuple(f"l{place}" for place in range(10))  # three decades below the last ones
    assert "sigmoid" in leading.cause
    assert leading.steps == (0, 5)


def test_exploding_is_the_other_way():
    assert found(net(np.linspace(6, 0, 13))).leading.title == "exploding through depth"


def test_two_decades_are_no_finding():
    assert found(net(np.linspace(-2, 0, 13))).healthy


def test_one_odd_layer_is_no_finding():
    gradient = np.zeros(13)
    gradient[3] = -9
    assert found(net(gradient)).healthy


def test_a_sawtooth_of_branches_is_no_finding():
    assert found(net([0, -4] * 10)).healthy


def test_a_gradient_that_underflowed_to_zero_is_vanishing():
    layers = net(np.zeros(12))
    layers.loc[layers["order"] < 6, "grad_norm"] = 0.0
    told = found(layers)
    assert told.leading.title == "vanishing through depth"
    assert told.leading.evidence[0].value == pytest.approx(0.5)


def test_an_initialization_that_training_mended_at_once_is_healthy_unless_far_off():
    layers = net(np.zeros(12), steps=9)
    start = layers["step"] == 0
    layers.loc[start, "grad_norm"] = 10.0 ** np.linspace(-3.5, 0, 12)
    assert found(layers).healthy
    layers.loc[start, "grad_norm"] = 10.0 ** np.linspace(-6, 0, 12)
    assert found(layers).leading.steps == (0, 0)


def test_a_signal_that_grows_by_a_factor_a_layer_explodes_though_its_gradient_does_not():
    told = found(net(np.zeros(12), signal=np.linspace(0, 8, 12)))
    assert told.leading.title == "exploding through depth"
    assert "RMS" in told.leading.evidence[0].what


def test_micro_batches_are_passes_not_depth():
    first = net(np.zeros(8))
    second = first.assign(call=1, order=first["order"] + 8, grad_norm=1e-5)
    assert found(pd.concat([first, second])).healthy


# -- time -------------------------------------------------------------------------------------------------------------


def through_time(slope, times=60, state="h", direction="forward", steps=3):
    t = np.arange(times)
    lag = times - 1 - t if direction == "forward" else t
    one = pd.DataFrame({"layer": "rnn", "direction": direction, "state": state, "t": t, "log10_grad_norm": slope * lag})
    return pd.concat([one.assign(step=step) for step in range(steps)], ignore_index=True)


def rnn(kind="RNN"):
    return net([0.0], steps=3).assign(layer="rnn", kind=kind)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_vanishing_through_time_with_its_half_life(direction):
    told = found(rnn(), timesteps=through_time(-math.log10(2) / 4, direction=direction))
    assert told.leading.title == "vanishing through time"
    assert told.leading.evidence[0].value == pytest.approx(4.0)
    # Three decades are 39.9 steps, counted from the middle of the last three.
    assert told.leading.timesteps == ((0, 18) if direction == "forward" else (41, 59))


def test_exploding_through_time():
    told = found(rnn(), timesteps=through_time(0.2))
    assert told.leading.title == "exploding through time"
    assert "lip the gradient" in told.leading.advice


def test_one_state_that_carries_the_gradient_is_enough():
    both = pd.concat([through_time(-0.3), through_time(0.0, state="c")])
    assert found(rnn("LSTM"), timesteps=both).healthy
    both = pd.concat([through_time(-0.3), through_time(-0.2, state="c")])
    assert "forget gate" in found(rnn("LSTM"), timesteps=both).leading.cause


def test_time_that_was_not_watched_is_said():
    told = found(net(np.zeros(6)), info={"time_not_watched": ["rnn"]})
    assert told.healthy
    assert "Time was not watched: rnn" in told.notes[0]


def test_what_the_recording_could_not_know_is_passed_on():
    told = found(
        net(np.zeros(6)), info={"notes": ["A parameter was added later."], "not_seen": {"a": "it is a wrapper"}}
    )
    assert told.notes == ("A parameter was added later.", "Not seen: a (it is a wrapper).")


def test_a_cell_called_step_by_step_is_time_not_depth():
    calls = 40
    cell = pd.concat([net([slope], steps=3).assign(layer="cell", kind="LSTMCell", call=call, order=call, output="0")
                      for call, slope in enumerate(np.linspace(-9, 0, calls))])  # fmt: skip
    head = net([0.0], steps=3).assign(layer="head", order=calls)
    assert found(pd.concat([cell, head])).leading.title == "vanishing through time"


# -- units ------------------------------------------------------------------------------------------------------------


def test_half_zero_outputs_are_healthy_and_dead_units_are_not():
    layers = net(np.zeros(6))
    units = pd.DataFrame({"layer": ["l1", "l2"], "units": 64, "dead_fraction": [0.1, 0.0]})
    assert found(layers, units=units).healthy
    told = found(layers, units=units.assign(dead_fraction=[0.2, 0.9]))
    assert (told.leading.kind, told.leading.layers) == ("dead", ("l2",))


def test_dead_units_explain_a_gradient_that_ends_there():
    layers = net([-9.0] * 6 + [0.0] * 6)
    units = pd.DataFrame({"layer": ["l5"], "units": 64, "dead_fraction": [0.95]})
    assert found(layers, units=units).kinds == ("dead",)


def test_units_that_are_always_on_or_always_off_are_no_dead_ones():
    """Where the signal has vanished, biases alone decide: half the units are off, none died."""
    layers = net(np.linspace(-6, 0, 12), act_zero_fraction=0.6)
    units = pd.DataFrame({"layer": ["l5"], "units": 64, "dead_fraction": [0.6]})
    assert found(layers, units=units).kinds == ("vanishing",)


def test_units_that_died_in_between_are_found():
    layers = net(np.zeros(6), steps=12)
    layers.loc[(layers["step"] > 5) & (layers["layer"] == "l3"), "act_zero_fraction"] = 1.0
    units = pd.DataFrame({"layer": ["l3"], "units": 64, "dead_fraction": [0.0]})
    assert found(layers, units=units).leading.layers == ("l3",)


def test_an_output_activation_is_meant_to_saturate():
    layers = net(np.zeros(6), kind="Tanh")
    units = pd.DataFrame({"layer": ["l2", "l5"], "units": 64, "saturated_fraction": [0.9, 1.0]})
    told = found(layers, units=units, params=parameters(("l0", "l4")))
    assert (told.leading.kind, told.leading.layers) == ("saturated", ("l2",))
    assert found(layers, units=units[1:], params=parameters(("l0", "l4"))).healthy


# -- nonfinite --------------------------------------------------------------------------------------------------------


def test_all_nan_gradients_are_nonfinite_and_nothing_else():
    layers = net(np.full(6, np.nan), grad_nonfinite=100.0)
    told = found(layers, steps=training(), params=parameters(grad_norm=np.nan, grad_nonfinite=100.0))
    assert told.kinds == ("nonfinite",)
    assert (told.leading.layers, told.leading.steps) == (("l5",), (0, 0))  # the backward pass begins there
    assert "backward" in told.leading.evidence[1].what


def test_the_first_place_of_a_forward_nan_is_named():
    layers = net(np.zeros(6))
    bad = (layers["step"] >= 3) & (layers["order"] >= 2)
    layers.loc[bad, ["act_nonfinite", "act_abs_max"]] = [7.0, np.nan]
    layers.loc[layers["step"] >= 3, ["grad_norm", "grad_nonfinite"]] = [np.nan, 100.0]
    told = found(layers, steps=training(), params=parameters())
    assert (told.leading.layers, told.leading.steps) == (("l2",), (3, 3))
    assert "forward" in told.leading.evidence[1].what


def test_a_mask_of_minus_infinity_is_healthy():
    layers = net(np.zeros(6))
    layers.loc[layers["order"] == 2, ["act_nonfinite", "act_abs_max", "act_norm"]] = [7.0, np.inf, np.inf]
    assert found(layers, steps=training(), params=parameters()).healthy


def test_a_loss_that_was_never_told_is_not_nan():
    assert found(net(np.zeros(6)), steps=training(loss=np.nan), params=parameters()).healthy
    assert found(net(np.zeros(6)), steps=training(loss=[1.0, 1, np.nan, 1, 1, 1])).leading.steps == (2, 2)


def test_a_skipped_step_is_the_scaler_at_work():
    layers = net(np.zeros(6))
    layers.loc[layers["step"] == 1, ["grad_norm", "grad_nonfinite"]] = [np.inf, 3.0]
    skipped = [False, True, False, False, False, False]
    assert found(layers, steps=training(skipped=skipped)).healthy
    told = found(layers, steps=training(skipped=True))
    assert told.kinds == ("nonfinite",)
    assert told.leading.evidence[0].value == 1.0


# -- frozen -----------------------------------------------------------------------------------------------------------


def missing(param):
    table = parameters()
    table.loc[table["param"] == param, ["grad_norm", "grad_nonfinite", "update_norm"]] = np.nan
    return table


def test_a_parameter_without_gradient_is_frozen_unless_that_is_meant():
    layers = net(np.zeros(6))
    assert found(layers, params=parameters()).healthy
    told = found(layers, params=missing("l1.weight"))
    assert (told.kinds, told.leading.layers) == (("frozen",), ("l1.weight",))
    assert found(layers, params=missing("l1.weight"), info={"params_without_grad": ["l1.weight"]}).healthy
    unused = found(layers, params=missing("l1.weight"), info={"never_ran": ["l1"]})
    assert unused.leading.cause == "Their layers never ran."


def test_a_parameter_first_used_later_is_not_frozen():
    table = missing("l1.weight")
    table.loc[(table["param"] == "l1.weight") & (table["step"] > 3), ["grad_norm", "grad_nonfinite", "update_norm"]] = [
        1,
        0,
        1,
    ]
    assert found(net(np.zeros(6)), params=table).healthy


def test_parameters_never_updated():
    layers, still = net(np.zeros(6)), parameters(update_norm=0.0)
    assert "learning rate is 0" in found(layers, params=still, steps=training(learning_rate=0.0)).leading.cause
    half = {"params": [["l0.weight", [10, 10], "bfloat16"]]}
    assert "16-bit" in found(layers, params=still, steps=training(), info=half).leading.cause
    left = {"params_not_optimized": ["l1.weight"]}
    assert "does not hold" in found(layers, params=parameters(), steps=training(), info=left).leading.cause


def test_a_negligible_gradient_that_rounding_swallows_is_not_frozen():
    """A bias before BatchNorm has a gradient of rounding noise."""
    table = parameters()
    bias = table["param"] == "l1.weight"
    table.loc[bias, ["grad_norm", "update_norm"]] = [1e-8, 0.0]
    assert found(net(np.zeros(6)), params=table).healthy


# -- training ---------------------------------------------------------------------------------------------------------


def test_a_gradient_that_grows_with_the_loss_explodes_and_one_that_leaves_a_plateau_does_not():
    grown = 10.0 ** np.linspace(-4, 2, 20)
    layers = net(np.zeros(6), steps=20)
    diverging = training(20, grad_norm=grown, loss=10.0 ** np.linspace(0, 4, 20))
    assert found(layers, steps=diverging).leading.title == "exploding over training"
    leaving = training(20, grad_norm=grown, loss=np.linspace(2.3, 1.0, 20))
    assert found(layers, steps=leaving, params=parameters(steps=20)).healthy


def test_weights_gradient_and_loss_that_grow_together_explode_earlier():
    """Gradient ascent: a hundredfold gradient is enough where weights and loss grow too, whatever the loss's sign."""
    layers, steps = net(np.zeros(6), steps=20), 20
    growing = training(steps, grad_norm=10.0 ** np.linspace(0, 2.6, 20), loss=-(10.0 ** np.linspace(0, 5, 20)))
    weights = parameters(steps=steps, weight_norm=np.repeat(10.0 ** np.linspace(0, 2, 20), 2))
    assert found(layers, steps=growing, params=weights).leading.title == "exploding over training"
    assert found(layers, steps=growing, params=parameters(steps=steps)).healthy
    tiny_start = growing.assign(loss=np.linspace(2.3, 1.0, 20))
    assert found(layers, steps=tiny_start, params=weights).healthy


def test_gradients_zeroed_before_the_step_leave_everything_frozen():
    none = parameters(grad_norm=np.nan, grad_nonfinite=np.nan, update_norm=0.0)
    told = found(net(np.zeros(6)), params=none, steps=training(grad_norm=np.nan), info={"optimizer": "Adam"})
    assert told.kinds == ("frozen",)
    assert "zero_grad before backward" in told.leading.advice


# -- misuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        (lambda: diagnose({"layers": None}), UsageError, "takes a Trace"),
        (lambda: diagnose(Trace()), DataError, "empty"),
        (lambda: diagnose(Trace.merge([Trace(), Trace()], [{"seed": 0}, {"seed": 1}])), DataError, "one by one"),
        (lambda: diagnose(Trace({"steps": training()}), rules="gradlap"), UsageError, "Did you mean 'gradlab'"),
    ],
    ids=["dict", "empty", "merged", "rules"],
)
def test_what_cannot_be_diagnosed_is_refused_in_a_sentence(what, error, words):
    with pytest.raises(error, match=words):
        what()


def test_a_forward_pass_alone_is_said_to_have_no_gradient():
    told = found(net(np.full(6, np.nan), grad_nonfinite=np.nan))
    assert told.healthy
    assert "No gradient was recorded" in told.notes[0]
