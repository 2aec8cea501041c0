"""The timesteps table against recurrences written out by hand in float64, and against closed forms."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gradlab.errors import UsageError
from gradlab.probes import watch

NETS = {
    "tanh": (nn.RNN, {"nonlinearity": "tanh"}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "lstm_proj": (nn.LSTM, {"proj_size": 3}),
    "lstm_no_bias": (nn.LSTM, {"bias": False}),
}
T, BATCH, FEATURES, HIDDEN = 11, 4, 3, 5


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(12)


def build(kind, **options):
    cls, own = NETS[kind]
    return cls(FEATURES, HIDDEN, **own, **options)


def unroll(module, x, states=None, lengths=None):
    """The recurrence from its equations; every state of every level, direction and time keeps its gradient.

    x: (T, B, F). Returns output (T, B, *) with zeros after a sequence's end, final states, and {key: state}.
    """
    steps, batch = x.shape[:2]
    lengths = [steps] * batch if lengths is None else lengths
    alive = [torch.tensor([t < n for n in lengths]).unsqueeze(1) for t in range(steps)]
    found, finals, place = {}, [], 0
    out_size = module.proj_size or module.hidden_size
    weights = {name: value.detach().double() for name, value in module.named_parameters()}
    for level in range(module.num_layers):
        columns = []
        for direction in ("forward", "backward") if module.bidirectional else ("forward",):
            end = f"_l{level}" + ("_reverse" if direction == "backward" else "")
            w = {name.removesuffix(end): value for name, value in weights.items() if name.endswith(end)}
            w = {name: value for name, value in w.items() if not name.endswith("_reverse") or "reverse" in end}
            h = x.new_zeros(batch, out_size) if states is None else states[0][place].double()
            c = x.new_zeros(batch, HIDDEN)
            if states is not None and len(states) == 2:
                c = states[1][place].double()
            place += 1
            rows = [None] * steps
            for t in range(steps) if direction == "forward" else reversed(range(steps)):
                new_h, new_c = one_step(module, w, x[t], h, c)
                new_h.retain_grad()
                found[level, direction, "h", t] = new_h, alive[t]
                if new_c is not None:
                    new_c.retain_grad()
                    found[level, direction, "c", t] = new_c, alive[t]
                    c = torch.where(alive[t], new_c, c)
                h = torch.where(alive[t], new_h, h)
                rows[t] = torch.where(alive[t], new_h, torch.zeros_like(new_h))
            columns.append(torch.stack(rows))
            finals.append((h, c))
        x = torch.cat(columns, -1)
    last = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    return x, last, found


def one_step(module, w, x, h, c):
    def both(inputs, state):
        i, s = inputs @ w["weight_ih"].T, state @ w["weight_hh"].T
        return (i + w["bias_ih"], s + w["bias_hh"]) if module.bias else (i, s)

    given, recurrent = both(x, h)
    if isinstance(module, nn.RNN):
        return (torch.tanh if module.nonlinearity == "tanh" else torch.relu)(given + recurrent), None
    if isinstance(module, nn.LSTM):
        i, f, g, o = (given + recurrent).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        c.requires_grad_()  # the state of which the gradient is asked for
        h = torch.sigmoid(o) * torch.tanh(c)
        return (h @ w["weight_hr"].T if module.proj_size else h), c
    (ri, zi, ni), (rh, zh, nh) = given.chunk(3, 1), recurrent.chunk(3, 1)
    r, z = torch.sigmoid(ri + rh), torch.sigmoid(zi + zh)
    return (1 - z) * torch.tanh(ni + r * nh) + z * h, None


LOSSES = {
    "last_step": lambda out, _: out[-1].square().sum(),
    "all_steps": lambda out, _: (out * torch.linspace(-1, 2, len(out), dtype=out.dtype)[:, None, None]).sin().sum(),
    "final_states": lambda _, last: sum((state * (2 + place)).sin().sum() for place, state in enumerate(last)),
}


def expected(module, x, loss, states=None, lengths=None):
    out, last, found = unroll(module, x.detach().double().requires_grad_(), states, lengths)
    LOSSES[loss](out, last if isinstance(module, nn.LSTM) else last[:1]).backward()
    values = {}
    for key, (state, alive) in found.items():
        grad = torch.zeros_like(state) if state.grad is None else state.grad
        values[key] = ((state.detach() * alive).norm().item(), (grad * alive).norm().item())
    return values


def measured(module, x, loss, k, states=None, run=None, **options):
    """Watch one step; return {key: (norm, grad_norm)} and the trace."""
    with watch(module, timesteps=k, **options) as probe:
        out, last = run(module) if run else module(x, *([] if states is None else [states]))
        LOSSES[loss](out, last if isinstance(last, tuple) else (last,)).backward()
        probe.step()
    frame = probe.trace.timesteps
    keys = zip(frame["level"], frame["direction"], frame["state"], frame["t"], strict=True)
    return dict(zip(keys, zip(frame["norm"], frame["grad_norm"], strict=True), strict=True)), probe.trace


def check(got, want, k, rtol, steps=T):
    times = {*range(0, steps, int(k)), steps - 1}
    assert set(got) == {key for key in want if key[3] in times}
    for key, values in got.items():
        np.testing.assert_allclose(values, want[key], rtol=rtol, atol=1e-13, err_msg=str(key))


def initial(module):
    count = module.num_layers * (1 + module.bidirectional)
    h = torch.randn(count, BATCH, module.proj_size or HIDDEN, dtype=module.weight_ih_l0.dtype)
    return (h, torch.randn(count, BATCH, HIDDEN, dtype=h.dtype)) if isinstance(module, nn.LSTM) else h


def as_tuple(states):
    return states if isinstance(states, tuple) else (states,)


@pytest.mark.parametrize("k", [True, 4], ids=["every", "k4"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("levels", [1, 2], ids=["one_layer", "two_layers"])
@pytest.mark.parametrize("kind", NETS)
def test_norms_are_those_of_the_written_out_recurrence(kind, levels, loss, k):
    module, x = build(kind, num_layers=levels).double(), torch.randn(T, BATCH, FEATURES).double()
    got, trace = measured(module, x, loss, k)
    check(got, expected(module, x, loss), k, 1e-10)
    assert trace.info["not_seen"] == {}
    assert trace.info["time_not_watched"] == []
    np.testing.assert_allclose(trace.timesteps["log10_grad_norm"], np.log10(trace.timesteps["grad_norm"]), rtol=1e-12)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)], ids=["float32", "bf16"])
@pytest.mark.parametrize("levels", [1, 2], ids=["one_layer", "two_layers"])
@pytest.mark.parametrize("kind", NETS)
def test_lower_precision(kind, levels, dtype, rtol):
    module, x = build(kind, num_layers=levels).to(dtype), torch.randn(T, BATCH, FEATURES).to(dtype)
    got, _ = measured(module, x, "all_steps", True)
    check(got, expected(module, x, "all_steps"), True, rtol)


@pytest.mark.parametrize("k", [1, 3, 50], ids=["k1", "k3", "k50"])
@pytest.mark.parametrize("kind", NETS)
def test_bidirectional_two_layers_with_initial_states(kind, k):
    module, x = build(kind, num_layers=2, bidirectional=True).double(), torch.randn(T, BATCH, FEATURES).double()
    states = initial(module)
    got, _ = measured(module, x, "all_steps", k, states)
    check(got, expected(module, x, "all_steps", as_tuple(states)), k, 1e-10)


@pytest.mark.parametrize("k", [1, 2, 4], ids=["k1", "k2", "k4"])
@pytest.mark.parametrize("both", [False, True], ids=["one_way", "both_ways"])
@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru", "lstm_proj"])
@pytest.mark.parametrize("loss", ["all_steps", "final_states"])
def test_packed_sequences(kind, both, k, loss):
    module = build(kind, num_layers=2, bidirectional=both).double()
    x, lengths, states = torch.randn(T, BATCH, FEATURES).double(), [6, T, 1, 7], initial(module)

    def run(model):
        packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
        out, last = model(packed, states)
        return pad_packed_sequence(out)[0], last

    bare, bare_last = run(module)
    got, _ = measured(module, x, loss, k, run=run)
    check(got, expected(module, x, loss, as_tuple(states), lengths), k, 1e-10)
    with watch(module, timesteps=k):
        out, last = run(module)
    torch.testing.assert_close(out, bare, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(last, bare_last, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", NETS)
def test_batch_first_is_only_another_order(kind):
    module = build(kind, num_layers=2, batch_first=True).double()
    x = torch.randn(T, BATCH, FEATURES).double()

    def run(model):
        out, last = model(input=x.transpose(0, 1))
        assert out.shape[:2] == (BATCH, T)
        return out.transpose(0, 1), last

    got, _ = measured(module, x, "all_steps", 4, run=run)
    check(got, expected(module, x, "all_steps"), 4, 1e-10)


@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "initial"])
@pytest.mark.parametrize("kind", NETS)
def test_unbatched_input(kind, given, batch_first):
    module, x = build(kind, batch_first=batch_first).double(), torch.randn(T, FEATURES).double()
    states = tuple(s[:, 0] for s in as_tuple(initial(module))) if given else None

    def run(model):
        hx = [] if states is None else [states if isinstance(model, nn.LSTM) else states[0]]
        out, last = model(x, *hx)
        assert (out.dim(), as_tuple(last)[0].dim()) == (2, 2)
        return out.unsqueeze(1), tuple(s.unsqueeze(1) for s in as_tuple(last))

    got, _ = measured(module, x, "all_steps", 4, run=run)
    start = None if states is None else tuple(s.unsqueeze(1) for s in states)
    check(got, expected(module, x.unsqueeze(1), "all_steps", start), 4, 1e-10)


@pytest.mark.parametrize("steps", [1, 2, 9], ids=["T1", "T2", "T9"])
@pytest.mark.parametrize("kind", NETS)
def test_first_and_last_step_are_always_there(kind, steps):
    module, x = build(kind).double(), torch.randn(steps, BATCH, FEATURES).double()
    got, _ = measured(module, x, "last_step", 4)
    check(got, expected(module, x, "last_step"), 4, 1e-10, steps)
    assert sorted({key[3] for key in got}) == sorted({*range(0, steps, 4), steps - 1})


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_gradient_of_a_linear_rnn_falls_by_the_spectral_radius(activation):
    """W = rho Q with Q orthogonal, at an amplitude at which tanh is linear; relu with a permutation and h > 0."""
    rho, steps, width = 0.3, 150, 6
    model = nn.RNN(1, width, nonlinearity=activation, bias=False).double()
    turn = torch.eye(width).double().roll(1, 0)
    if activation == "tanh":
        turn = torch.linalg.qr(torch.randn(width, width).double())[0]
    with torch.no_grad():
        model.weight_hh_l0.copy_(rho * turn)
        model.weight_ih_l0.fill_(1e-8)
    with watch(model, timesteps=True) as probe:
        out, _ = model(torch.ones(steps, 1, 1).double())
        (out[-1, 0] @ torch.nn.functional.normalize(torch.rand(width).double(), dim=0)).backward()
        probe.step()
    frame = probe.trace.timesteps
    lag = steps - 1 - frame["t"].to_numpy()
    np.testing.assert_allclose(frame["log10_grad_norm"], lag * math.log10(rho), rtol=1e-10, atol=1e-12)
    assert frame["log10_grad_norm"].min() < -77  # float32 ends at -45


def test_nan_in_a_sequence_is_data():
    model, x = build("gru"), torch.randn(T, BATCH, FEATURES)
    x[6, 1, 0] = math.nan
    with watch(model, timesteps=True) as probe:
        model(x)[0].sum().backward()
        probe.step()
    frame = probe.trace.timesteps.set_index("t")
    assert frame.loc[:5, "norm"].notna().all()
    assert frame.loc[6:, "norm"].isna().all()
    assert frame.loc[: T - 2, "grad_norm"].isna().all()
    assert frame.loc[T - 1, "grad_norm"] == pytest.approx(math.sqrt(BATCH * HIDDEN))  # of a plain sum


def test_only_states_without_autograd():
    model, x = build("lstm", num_layers=2).double(), torch.randn(T, BATCH, FEATURES).double()
    with watch(model, timesteps=4, without_grad=True) as probe:
        with torch.no_grad():
            model(x)
        with torch.inference_mode():
            model(x)
        probe.step()
    frame = probe.trace.timesteps
    want = expected(model, x, "last_step")
    for row in frame.itertuples():
        assert row.norm == pytest.approx(want[row.level, row.direction, row.state, row.t][0], rel=1e-10)
    assert set(frame["call"]) == {0, 1}
    assert frame["grad_norm"].isna().all()


def test_calls_of_one_step_are_told_apart():
    model, x = build("gru").double(), torch.randn(2, T, BATCH, FEATURES).double()
    with watch(model, timesteps=4) as probe:
        first, last = model(x[0])
        second, _ = model(x[1], last)
        (first.sin().sum() + second[-1].square().sum()).backward()
        probe.step()
    frame = probe.trace.timesteps
    whole = {}
    joined = torch.cat([x[0], x[1]]).requires_grad_()
    out, _, found = unroll(model, joined)
    (out[:T].sin().sum() + out[-1].square().sum()).backward()
    for (_, _, _, t), (state, _) in found.items():
        whole[t] = state.grad.norm().item()
    for row in frame.itertuples():
        assert row.grad_norm == pytest.approx(whole[row.call * T + row.t], rel=1e-10)
    assert set(frame["call"]) == {0, 1}


def test_bad_timesteps_are_refused_with_one_sentence():
    for bad in (0, -3, 2.5, "all"):
        with pytest.raises(UsageError, match="timesteps="):
            watch(build("gru"), timesteps=bad)
    with pytest.raises(UsageError, match=r"no nn\.RNN"):
        watch(nn.Linear(2, 2), timesteps=True)
    model = nn.Sequential(nn.Linear(3, 3), build("gru"))
    with watch(copy.deepcopy(model)) as probe:
        pass
    assert probe.trace.info["time_not_watched"] == ["1"]
