"""Watching through time leaves models as they were: outputs, gradients, forward, copies; and says what it cannot do."""

import copy
import gc
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

from gradlab.errors import UsageError
from gradlab.probes import watch

KINDS = {
    "tanh": lambda **o: nn.RNN(3, 5, **o),
    "relu": lambda **o: nn.RNN(3, 5, nonlinearity="relu", **o),
    "lstm": lambda **o: nn.LSTM(3, 5, **o),
    "gru": lambda **o: nn.GRU(3, 5, **o),
}
OPTIONS = {
    "plain": {},
    "two_layers": {"num_layers": 2},
    "both_ways": {"num_layers": 2, "bidirectional": True},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "dropout": {"num_layers": 3, "dropout": 0.5, "bidirectional": True},
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(3)


class Reader(nn.Module):
    """A recurrent module and a linear layer on its last output."""

    def __init__(self, recurrent):
        super().__init__()
        self.recurrent = recurrent
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.recurrent(x)[0][-1])


def one_step(module, x, *, watched, k=4):
    """Return output, final states, gradients of input and weights, and the state of the generator afterwards."""
    module, x = copy.deepcopy(module), x.clone().requires_grad_()
    torch.manual_seed(77)
    if watched:
        with watch(module, timesteps=k) as probe:
            out, last = module(x)
            out.sin().sum().backward()
            probe.step()
        assert len(probe.trace.timesteps)
    else:
        out, last = module(x)
        out.sin().sum().backward()
    last = last if isinstance(last, tuple) else (last,)
    return [out, *last], [x.grad, *(p.grad for p in module.parameters())], torch.get_rng_state()


@pytest.mark.parametrize("k", [True, 4], ids=["every", "k4"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_weight_gradients_are_those_of_the_bare_module(kind, options, k):
    """Dropout too: on the CPU its masks are drawn between whole layers, which is where they are drawn here."""
    module, x = KINDS[kind](**OPTIONS[options]).double(), torch.randn(10, 4, 3).double()
    bare, watched = (one_step(module, x, watched=watched, k=k) for watched in (False, True))
    for want, got in zip(bare[0], watched[0], strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)
    for want, got in zip(bare[1], watched[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
    assert torch.equal(bare[2], watched[2])


@pytest.mark.parametrize("kind", KINDS)
def test_float32_outputs_are_identical_bit_by_bit(kind):
    torch.manual_seed(5)
    module, x = KINDS[kind](num_layers=2), torch.randn(64, 16, 3)
    bare, watched = (one_step(module, x, watched=watched, k=16) for watched in (False, True))
    for want, got in zip(bare[0], watched[0], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_the_same_way(kind):
    losses = {}
    model = Reader(KINDS[kind](num_layers=2)).double()
    batches = torch.randn(6, 10, 4, 3).double()
    for timesteps in (False, 3):
        own = copy.deepcopy(model)
        optimizer = torch.optim.Adam(own.parameters(), lr=0.05)
        losses[timesteps] = []
        with watch(own, optimizer, timesteps=timesteps, every=2) as probe:
            for x in batches:
                optimizer.zero_grad()
                loss = own(x).square().mean()
                loss.backward()
                optimizer.step()
                losses[timesteps].append(loss.item())
        assert set(probe.trace.timesteps["step"]) == ({0, 2, 4} if timesteps else set())
        assert probe.trace.info["time_not_watched"] == ([] if timesteps else ["recurrent"])
    np.testing.assert_allclose(losses[3], losses[False], rtol=1e-10)


def test_forward_is_ours_only_while_a_recorded_step_is_open():
    model = Reader(KINDS["gru"]())
    with watch(model, timesteps=2, every=2) as probe:
        assert "forward" in vars(model.recurrent)
        probe.step()
        assert "forward" not in vars(model.recurrent)
        probe.step()
        assert "forward" in vars(model.recurrent)
    assert "forward" not in vars(model.recurrent)
    with pytest.raises(ZeroDivisionError), watch(model, timesteps=2):
        raise ZeroDivisionError
    assert "forward" not in vars(model.recurrent)
    with pytest.raises(UsageError):
        watch(model, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), timesteps=2)
    assert "forward" not in vars(model.recurrent)


@pytest.mark.parametrize("how", ["pickle", "save", "deepcopy"])
def test_copies_of_a_watched_model_run_their_own_weights(how):
    model, x = Reader(KINDS["lstm"]()), torch.randn(6, 2, 3)
    with watch(model, timesteps=2) as probe:
        if how == "pickle":
            other = pickle.loads(pickle.dumps(model))
        elif how == "save":
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            other = torch.load(buffer, weights_only=False)
        else:
            other = copy.deepcopy(model)
        with torch.no_grad():
            for param in other.parameters():
                param.zero_()
        other(x).sum().backward()
        probe.step()
    assert not len(probe.trace.timesteps)
    assert torch.equal(other(x), torch.zeros(2, 2))
    with watch(copy.deepcopy(other), timesteps=2) as probe:
        pass
    assert probe.trace.info["not_seen"] == {}
    assert torch.equal(model(x), model.head(model.recurrent(x)[0][-1]))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_on_the_meta_device_nothing_asks_the_host(kind, options):
    with torch.device("meta"):
        module, x = KINDS[kind](**OPTIONS[options]), torch.randn(9, 4, 3)
    with watch(module, timesteps=4) as probe:
        module(x)[0].sum().backward()
        probe.step()
    missed = probe.trace.info["not_seen"].get("", "")
    if options == "dropout":
        assert "dropout between its layers" in missed
        assert not len(probe.trace.timesteps)
    else:
        assert missed == ""
        assert len(probe.trace.timesteps)
    packed = pack_sequence([torch.randn(n, 3, device="meta") for n in (5, 3)])
    with watch(module.eval(), timesteps=4) as probe:
        module(packed)[0].data.sum().backward()
        probe.step()
    assert len(probe.trace.timesteps)


class OwnForward(nn.GRU):
    def forward(self, input, hx=None):
        return super().forward(input, hx)


def test_what_cannot_be_followed_is_listed_and_runs_as_ever():
    x = torch.randn(7, 2, 3)
    model = nn.ModuleDict({"own": OwnForward(3, 5), "stock": nn.GRU(3, 5), "replaced": nn.GRU(3, 5)})
    model["replaced"].forward = lambda given: nn.GRU.forward(model["replaced"], given)
    with watch(model, timesteps=True) as probe:
        for module in model.values():
            module(x)[0].sum().backward()
        probe.step()
    assert set(probe.trace.timesteps["layer"]) == {"stock"}
    assert set(probe.trace.info["not_seen"]) == {"own", "replaced"}
    assert "forward" in vars(model["replaced"])


def test_autocast_is_listed():
    model, x = KINDS["tanh"](), torch.randn(7, 2, 3)
    with watch(model, timesteps=True) as probe:
        with torch.autocast("cpu", torch.bfloat16):
            model(x)[0].float().sum().backward()
        probe.step()
    assert "autocast" in probe.trace.info["not_seen"][""]
    assert not len(probe.trace.timesteps)


@pytest.mark.parametrize(
    ("given", "hx"),
    [
        (torch.zeros(4, 2, 7), None),
        (torch.zeros(4), None),
        (torch.zeros(0, 2, 3), None),
        (torch.zeros(4, 2, 3), torch.zeros(1, 3, 5)),
        (torch.zeros(4, 2, 3).double(), None),
    ],
    ids=["features", "dimensions", "empty", "states", "dtype"],
)
def test_torch_refuses_bad_input_in_its_own_words(given, hx):
    model = KINDS["gru"]()
    with pytest.raises((RuntimeError, ValueError)) as bare:
        model(given, hx)
    with watch(model, timesteps=True), pytest.raises(type(bare.value)) as watched:
        model(given, hx)
    assert str(watched.value) == str(bare.value)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_checkpointing_is_recorded_once(reentrant):
    model, x = KINDS["lstm"](num_layers=2).double(), torch.randn(10, 4, 3).double().requires_grad_()
    tables = []
    for run in (model, lambda given: checkpoint(model, given, use_reentrant=reentrant)):
        with watch(model, timesteps=3) as probe:
            run(x)[0].sin().sum().backward()
            probe.step()
        tables.append(probe.trace.timesteps)
    assert (tables[0]["grad_norm"] > 0).all()
    keys = ["call", "level", "direction", "state", "t"]
    assert tables[0][keys].equals(tables[1][keys])
    for column in ("norm", "grad_norm"):
        np.testing.assert_allclose(tables[1][column], tables[0][column], rtol=1e-10)


def test_an_evaluation_between_steps_is_not_recorded_and_runs_untouched():
    model, x = KINDS["gru"](), torch.randn(6, 2, 3)
    with watch(model, timesteps=True) as probe:
        with torch.no_grad():
            model(x)
        model(x)[0].sum().backward()
        probe.step()
    assert len(probe.trace.timesteps) == 6


def test_a_state_that_nothing_depends_on_has_gradient_zero_and_no_backward_gives_nan():
    model, x = KINDS["gru"](), torch.randn(6, 2, 3)
    with watch(model, timesteps=True) as probe:
        model(x)[0][2].sum().backward()
        probe.step()
        model(x)
        probe.step()
    frame = probe.trace.timesteps.set_index(["step", "t"])
    assert (frame.loc[0].loc[:2, "grad_norm"] > 0).all()
    assert frame.loc[0].loc[3:, "grad_norm"].tolist() == [0.0] * 3
    assert frame.loc[0].loc[3:, "log10_grad_norm"].tolist() == [-np.inf] * 3
    assert frame.loc[1, "grad_norm"].isna().all()


def test_no_state_outlives_its_step_though_the_loss_does():
    model, x = KINDS["lstm"](), torch.randn(6, 2, 3)
    alive = []
    for timesteps in (False, True):
        model.zero_grad()
        with watch(model, timesteps=timesteps) as probe:
            loss = model(x)[0].sum()
            loss.backward()
            probe.step()
            probe._buffer.discard()  # memory that the next step would write to
            gc.collect()
            alive.append(sum(type(value) is torch.Tensor for value in gc.get_objects()))
        del loss
    assert alive[1] == alive[0]


def test_a_late_backward_of_an_older_step_is_not_taken_for_this_one():
    model, x = KINDS["gru"](), torch.randn(6, 2, 3)
    with watch(model, timesteps=True) as probe:
        late = model(x)[0].sum()
        probe.step()
        model(x)
        late.backward()
        probe.step()
    assert probe.trace.timesteps["grad_norm"].isna().all()


def test_loss_scale_is_taken_out():
    norms = []
    model, x = KINDS["gru"](), torch.randn(6, 2, 3)
    for scale in (1.0, 2.0**20):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with watch(model, optimizer, scaler=scaler, timesteps=True) as probe:
            scaler.scale(model(x)[0].sin().sum()).backward()
            scaler.step(optimizer)
        norms.append(probe.trace.timesteps[["grad_norm", "log10_grad_norm"]].to_numpy())
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's compiler looks at .grad of tensors in hooks
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_compiled_models_run_and_say_what_was_missed(kind):
    model, x = Reader(KINDS[kind]()), torch.randn(6, 2, 3)
    want = model(x)
    with watch(model, timesteps=True) as probe:
        got = torch.compile(model, backend="eager")(x)
        got.sum().backward()
        probe.step()
    torch.testing.assert_close(got, want)
    assert len(probe.trace.timesteps) or "recurrent" in probe.trace.info["not_seen"]
