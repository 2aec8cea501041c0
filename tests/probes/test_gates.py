"""The gates table against the gate equations written out in float64."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from gradlab.probes import watch

T, BATCH, FEATURES, HIDDEN = 9, 4, 3, 6
ORDER = {"lstm": {"i": 0, "f": 1, "o": 3}, "gru": {"r": 0, "z": 1}}
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(3)


def build(kind, **options):
    module = KINDS[kind](FEATURES, HIDDEN, **options).double()
    with torch.no_grad():
        for param in module.parameters():
            param.mul_(6)  # gates that close and open
    return module


def written_out(kind, module, x, lengths, level=0, direction="forward"):
    """{(gate, t): (mean, share < 0.1, share > 0.9)} of one level and direction, from torch's equations."""
    end = f"_l{level}" + ("_reverse" if direction == "backward" else "")
    w = {name.removesuffix(end): p.detach() for name, p in module.named_parameters() if name.endswith(end)}
    out_size = getattr(module, "proj_size", 0) or HIDDEN
    h, c = torch.zeros(BATCH, out_size).double(), torch.zeros(BATCH, HIDDEN).double()
    found, outputs = {}, {}
    for t in range(T) if direction == "forward" else reversed(range(T)):
        alive = torch.tensor([t < n for n in lengths])
        given = x[t] @ w["weight_ih"].T + (w["bias_ih"] if module.bias else 0)
        recurrent = h @ w["weight_hh"].T + (w["bias_hh"] if module.bias else 0)
        blocks = (given + recurrent).chunk(4 if kind == "lstm" else 3, 1)
        gates = {name: torch.sigmoid(blocks[place]) for name, place in ORDER[kind].items()}
        for name, gate in gates.items():
            own = gate[alive].numpy()
            found[name, t] = own.mean(), (own < 0.1).mean(), (own > 0.9).mean()
        if kind == "lstm":
            new_c = gates["f"] * c + gates["i"] * torch.tanh(blocks[2])
            new_h = gates["o"] * torch.tanh(new_c)
            new_h = new_h @ w["weight_hr"].T if module.proj_size else new_h
            c = torch.where(alive[:, None], new_c, c)
        else:
            n = torch.tanh(given.chunk(3, 1)[2] + gates["r"] * recurrent.chunk(3, 1)[2])
            new_h = (1 - gates["z"]) * n + gates["z"] * h
        h = torch.where(alive[:, None], new_h, h)
        outputs[t] = torch.where(alive[:, None], new_h, torch.zeros_like(new_h))
    return found, torch.stack([outputs[t] for t in range(T)])


def recorded(trace, level=0, direction="forward"):
    own = trace.gates[(trace.gates["level"] == level) & (trace.gates["direction"] == direction)]
    keys = zip(own["gate"], own["t"], strict=True)
    return dict(zip(keys, own[["mean", "closed_fraction", "open_fraction"]].to_numpy(), strict=True))


def check(got, want, k):
    times = {*range(0, T, int(k)), T - 1}
    assert set(got) == {key for key in want if key[1] in times}
    for key, values in got.items():
        np.testing.assert_allclose(values, want[key], rtol=1e-6, err_msg=str(key))


@pytest.mark.parametrize("k", [True, 4], ids=["every", "k4"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"proj_size": 2}], ids=["plain", "no bias", "projection"])
@pytest.mark.parametrize("kind", KINDS)
def test_gates_are_those_of_the_equations(kind, options, k):
    if kind == "gru" and "proj_size" in options:
        pytest.skip("only an LSTM projects")
    module, x = build(kind, **options), torch.randn(T, BATCH, FEATURES).double()
    want, _ = written_out(kind, module, x, [T] * BATCH)
    assert any(closed > 0 and opened > 0 for _, closed, opened in want.values())
    with watch(module, timesteps=k) as probe:
        module(x)[0].sum().backward()
        probe.step()
    check(recorded(probe.trace), want, k)


@pytest.mark.parametrize("kind", KINDS)
def test_each_level_and_direction_has_its_own_gates(kind):
    module, x = build(kind, num_layers=2, bidirectional=True), torch.randn(T, BATCH, FEATURES).double()
    with watch(module, timesteps=True) as probe:
        module(x)[0].sum().backward()
        probe.step()
    for level in (0, 1):
        outputs = []
        for direction in ("forward", "backward"):
            want, output = written_out(kind, module, x, [T] * BATCH, level, direction)
            check(recorded(probe.trace, level, direction), want, True)
            outputs.append(output)
        x = torch.cat(outputs, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_batch_counts_running_sequences_only(kind):
    module, x, lengths = build(kind), torch.randn(T, BATCH, FEATURES).double(), [9, 7, 4, 1]
    want, _ = written_out(kind, module, x, lengths)
    with watch(module, timesteps=True) as probe:
        module(pack_padded_sequence(x, lengths))[0].data.sum().backward()
        probe.step()
    check(recorded(probe.trace), want, True)


@pytest.mark.parametrize("kind", KINDS)
def test_many_cuts_are_worked_on_in_parts(kind, monkeypatch):
    monkeypatch.setattr("gradlab.probes.gates._BATCH", 3 * BATCH * 2 * HIDDEN)
    test_gates_are_those_of_the_equations(kind, {}, True)


def test_an_evaluation_without_autograd_has_gates_too():
    module, x = build("lstm"), torch.randn(T, BATCH, FEATURES).double()
    with watch(module, timesteps=2, without_grad=True) as probe, torch.no_grad():
        module(x)
        probe.step()
    check(recorded(probe.trace), written_out("lstm", module, x, [T] * BATCH)[0], 2)


def test_a_gate_that_is_nan_is_neither_closed_nor_open():
    module, x = build("gru"), torch.randn(T, BATCH, FEATURES).double()
    x[5] = float("nan")
    with watch(module, timesteps=True) as probe:
        module(x)[0].sum().backward()
        probe.step()
    late = probe.trace.gates["t"] >= 5
    assert probe.trace.gates.loc[late, ["mean", "closed_fraction", "open_fraction"]].isna().all(axis=None)
    assert probe.trace.gates.loc[~late, ["mean", "closed_fraction", "open_fraction"]].notna().all(axis=None)


def test_a_vanilla_net_has_no_gates():
    module = nn.RNN(FEATURES, HIDDEN)
    with watch(module, timesteps=True) as probe:
        module(torch.randn(T, BATCH, FEATURES))[0].sum().backward()
        probe.step()
    assert len(probe.trace.gates) == 0
    assert len(probe.trace.timesteps) == T


@pytest.mark.parametrize("lengths", [None, [9, 7, 4, 1]], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_gates_wait_for_no_device(kind, lengths):
    with torch.device("meta"):
        module, x = KINDS[kind](FEATURES, HIDDEN), torch.randn(T, BATCH, FEATURES)
    if lengths is not None:  # packing needs lengths on the host and data on a device that has some
        packed = pack_padded_sequence(torch.zeros(T, BATCH, FEATURES), lengths)
        x = nn.utils.rnn.PackedSequence(packed.data.to("meta"), packed.batch_sizes)
    with watch(module, timesteps=2) as probe:
        output = module(x)[0]
        (output if lengths is None else output.data).sum().backward()
        probe.step()
    assert len(probe.trace.gates) == 5 * len(ORDER[kind])
    assert probe.trace.gates["mean"].isna().all()
