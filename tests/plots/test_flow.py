from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from gradlab import plots
from gradlab.errors import DataError, UsageError
from gradlab.trace import Trace


def trace(norms: dict[int, list[float]], **columns: object) -> Trace:
    frames = [
        pd.DataFrame(
            {"step": step, "layer": [f"net.{i}" for i in range(len(row))], "order": range(len(row)), "grad_norm": row}
        )
        for step, row in norms.items()
    ]
    return Trace({"layers": pd.concat(frames, ignore_index=True).assign(**columns)})


def test_first_and_last_step_are_lines_in_order_of_execution() -> None:
    recorded = trace({0: [1.0, 0.1, 0.01], 3: [5.0, 5.0, 5.0], 9: [1e-9, 1e-6, 1e-3]})
    shuffled = Trace({"layers": recorded.layers.sample(frac=1, random_state=0)})
    ax = plots.gradient_flow(shuffled)
    first, last = ax.lines
    assert first.get_ydata().tolist() == [1.0, 0.1, 0.01]
    assert last.get_ydata().tolist() == [1e-9, 1e-6, 1e-3]
    assert [line.get_label() for line in ax.lines] == ["step 0", "step 9"]
    assert ax.get_yscale() == "log"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["net.0", "net.1", "net.2"]
    assert "gradient norm" in ax.get_ylabel()


def test_one_step_and_given_axes() -> None:
    _, given = plt.subplots()
    ax = plots.gradient_flow(trace({0: [1.0, 2.0], 3: [5.0, 6.0]}), step=3, ax=given)
    assert ax is given
    assert [line.get_ydata().tolist() for line in ax.lines] == [[5.0, 6.0]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0], ids=["NaN", "Inf", "zero"])
def test_what_has_no_place_on_a_log_axis_is_marked(bad: float) -> None:
    nonfinite = 0.0 if bad == 0 else 4.0
    ax = plots.gradient_flow(trace({0: [1.0, bad, 0.01]}, grad_nonfinite=[0.0, nonfinite, 0.0]))
    line, crosses = ax.lines
    assert np.isnan(line.get_ydata()[1])
    assert crosses.get_xdata().tolist() == [1]
    assert "zero or not finite" in str(crosses.get_label())
    ax.figure.canvas.draw()


def test_layers_that_no_gradient_reached_are_left_out() -> None:
    ax = plots.gradient_flow(trace({0: [np.nan, 1.0, 2.0]}))
    assert [label.get_text() for label in ax.get_xticklabels()] == ["net.1", "net.2"]


def test_many_layers_thin_their_names() -> None:
    ax = plots.gradient_flow(trace({0: [1.0] * 400}))
    names = [label.get_text() for label in ax.get_xticklabels()]
    assert len(names) <= 24
    assert (names[0], names[-1]) == ("net.0", "net.399")
    for tick, name in zip(ax.get_xticks(), names, strict=True):
        assert name == f"net.{tick:g}"


def test_calls_of_one_layer_are_told_apart() -> None:
    layers = pd.DataFrame({"step": 0, "layer": "rnn", "call": [0, 1], "order": [0, 1], "grad_norm": [1.0, 2.0]})
    ax = plots.gradient_flow(Trace({"layers": layers}))
    assert [label.get_text() for label in ax.get_xticklabels()] == ["rnn", "rnn (call 1)"]


def test_all_gradients_lost_still_draws() -> None:
    ax = plots.gradient_flow(trace({0: [0.0, 0.0]}))
    assert ax.lines[-1].get_xdata().tolist() == [0, 1]
    ax.figure.canvas.draw()


def test_no_gradient_is_a_data_error() -> None:
    with pytest.raises(DataError, match="no gradient"):
        plots.gradient_flow(Trace())


def test_a_step_that_was_not_recorded_is_named_with_those_that_were() -> None:
    with pytest.raises(UsageError, match="Step 2 was not recorded; recorded with gradients are 0, 3"):
        plots.gradient_flow(trace({0: [1.0], 3: [1.0]}), step=2)


def test_several_nets_in_one_trace_are_refused() -> None:
    one = trace({0: [1.0, 2.0]})
    with pytest.raises(UsageError, match="several nets"):
        plots.gradient_flow(Trace.merge([one, one], [{"cell": "a"}, {"cell": "b"}]))
