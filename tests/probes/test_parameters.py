"""Parameter gradients as the optimizer uses them, updates, AMP and clipping."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from gradlab.errors import UsageError
from gradlab.probes import watch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(6)


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def batch():
    return torch.randn(7, 4), torch.randn(7, 2)


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


def norms(values):
    return [value.double().norm().item() for value in values]


def params_of(probe, step=0):
    frame = probe.trace.params
    return frame[frame["step"] == step].set_index("param")


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum_decay": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "adamw_foreach": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=True),
    "adamw_fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "tensor_rate": lambda params: torch.optim.SGD(params, lr=torch.tensor(0.1)),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_norms_of_weights_gradients_and_updates(kind):
    model = mlp()
    optimizer = OPTIMIZERS[kind](model.parameters())
    want = []
    with watch(model, optimizer) as probe:
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(model, *batch()).backward()
            before = [p.detach().clone() for p in model.parameters()]
            grads = [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            updates = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
            want.append([norms(before), norms(grads), norms(updates)])
    rate = 0.01 if "adamw" in kind else 0.1
    assert probe.trace.steps["learning_rate"].tolist() == pytest.approx([rate] * 4)
    for step in range(4):
        frame = params_of(probe, step)
        assert frame.index.tolist() == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert frame["layer"].tolist() == ["0", "0", "2", "2"]
        assert frame["entries"].tolist() == [20, 5, 10, 2]
        for column, values in zip(["weight_norm", "grad_norm", "update_norm"], want[step], strict=True):
            np.testing.assert_allclose(frame[column], values, rtol=1e-6)
        assert frame["grad_nonfinite"].eq(0).all()
        assert (
            frame["grad_norm_unclipped"].tolist() == frame["grad_norm"].tolist()
            or frame["grad_norm_unclipped"].isna().all()
        )
        total = math.sqrt(sum(value**2 for value in want[step][1]))
        assert probe.trace.steps["grad_norm"][step] == pytest.approx(total, rel=1e-6)


def test_accumulated_gradient_not_that_of_the_last_micro_batch():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as probe:
        for _ in range(3):
            (loss_of(model, *batch()) / 3).backward()
        want = norms(p.grad for p in model.parameters())
        optimizer.step()
    np.testing.assert_allclose(params_of(probe)["grad_norm"], want, rtol=1e-6)


@pytest.mark.parametrize("told", [True, False], ids=["told", "not_told"])
@pytest.mark.parametrize("limit", [0.01, 1e6], ids=["clips", "leaves"])
def test_clipping(told, limit):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as probe:
        loss = loss_of(model, *batch())
        loss.backward()
        raw = norms(p.grad for p in model.parameters())
        total = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        used = norms(p.grad for p in model.parameters())
        if told:
            probe.log(loss=loss, clip=(total, limit))
        optimizer.step()
    frame, steps = params_of(probe), probe.trace.steps
    np.testing.assert_allclose(frame["grad_norm"], used, rtol=1e-5)
    if told:
        np.testing.assert_allclose(frame["grad_norm_unclipped"], raw, rtol=1e-5)
        assert steps["clip_coefficient"][0] == pytest.approx(min(1.0, limit / (total.item() + 1e-6)), rel=1e-6)
        assert steps["loss"][0] == pytest.approx(loss.item())
    else:
        assert frame["grad_norm_unclipped"].isna().all()
        assert steps["clip_coefficient"].isna().all()
        assert steps["loss"].isna().all()


@pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
def test_clipping_of_nonfinite_gradients(value):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as probe:
        loss_of(model, *batch()).backward()
        model[2].bias.grad[0] = value
        total = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        probe.log(clip=(total, 1.0))
        optimizer.step()
    steps, frame = probe.trace.steps, params_of(probe)
    assert steps["clip_coefficient"][0] == pytest.approx(0.0 if value == math.inf else math.nan, nan_ok=True)
    assert frame["grad_norm_unclipped"].isna().all()  # nothing can be told from 0 or NaN times the gradient
    assert frame.loc["2.bias", "grad_nonfinite"] > 0
    assert not math.isfinite(frame.loc["2.bias", "grad_norm"])


def test_nonfinite_gradients_are_counted():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as probe:
        (loss_of(model, *batch()) * math.nan).backward()
        optimizer.step()
    frame = params_of(probe)
    assert frame["grad_nonfinite"].tolist() == frame["entries"].tolist()
    assert frame["grad_norm"].isna().all()
    assert math.isnan(probe.trace.steps["grad_norm"][0])


def test_tied_parameter_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as probe:
        model(torch.randn(2, 3)).sum().backward()
        want = model[0].weight.grad.norm().item()
        optimizer.step()
    assert params_of(probe).index.tolist() == ["0.weight"]
    assert probe.trace.steps["grad_norm"][0] == pytest.approx(want, rel=1e-6)


def test_frozen_and_unreached_parameters_are_missing_not_zero():
    model = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(3)])
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as probe:
        model[2](model[0](torch.ones(1, 2))).sum().backward()
        want = model[2].weight.grad.norm().item()
        optimizer.step()
    frame = params_of(probe)
    assert frame["grad_norm"].isna().tolist() == [True, True, False]
    assert frame["grad_nonfinite"].isna().tolist() == [True, True, False]
    assert frame["update_norm"].tolist()[:2] == [0, 0]
    assert probe.trace.steps["grad_norm"][0] == pytest.approx(want, rel=1e-6)


def test_no_gradient_at_all():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as probe:
        optimizer.step()
    assert params_of(probe)["grad_norm"].isna().all()
    assert math.isnan(probe.trace.steps["grad_norm"][0])


def test_sparse_gradients():
    model = nn.Embedding(10, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    with watch(model, optimizer) as probe:
        model(torch.tensor([1, 1, 4])).square().sum().backward()
        assert not model.weight.grad.is_coalesced()
        want = model.weight.grad.to_dense().norm().item()
        optimizer.step()
        assert not model.weight.grad.is_coalesced()  # looked at, not changed
    assert params_of(probe)["grad_norm"].tolist() == pytest.approx([want])


def test_gradients_whose_squares_leave_float32():
    model = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer) as probe:
        model[0].weight.grad = torch.full((2, 2), 1e-30)
        model[1].weight.grad = torch.full((2, 2), 1e30)
        optimizer.step()
    np.testing.assert_allclose(params_of(probe)["grad_norm"], [2e-30, 2e30], rtol=1e-6)
    assert probe.trace.steps["grad_norm"][0] == pytest.approx(2e30, rel=1e-6)


def test_without_optimizer_updates_are_missing():
    model = mlp()
    with watch(model) as probe:
        loss_of(model, *batch()).backward()
        want = norms(p.grad for p in model.parameters())
        probe.step()
    frame = params_of(probe)
    np.testing.assert_allclose(frame["grad_norm"], want, rtol=1e-6)
    assert frame["update_norm"].isna().all()
    assert probe.trace.steps["learning_rate"].isna().all()


@pytest.mark.parametrize("named", [False, True], ids=["positional", "keyword"])
def test_closure_gradients_are_those_of_this_step(named):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    want, returned = [], []
    with watch(model, optimizer) as probe:
        for _ in range(3):
            x, y = batch()

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = loss_of(model, x, y)
                loss.backward()
                want.append(norms(p.grad for p in model.parameters()))
                return loss

            result = optimizer.step(closure=closure) if named else optimizer.step(closure)
            returned.append(result.item())
    assert len(want) == len(set(returned)) == 3
    np.testing.assert_allclose(probe.trace.params["grad_norm"], np.ravel(want), rtol=1e-6)
    assert probe.trace.params["update_norm"].gt(0).all()


def test_closure_called_many_times_records_the_first_gradient():
    model = mlp()
    x, y = batch()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    want = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        want.append(norms(p.grad for p in model.parameters()))
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    with watch(model, optimizer) as probe:
        optimizer.step(closure)
    assert len(want) > 1
    frame = params_of(probe)
    np.testing.assert_allclose(frame["grad_norm"], want[0], rtol=1e-6)
    np.testing.assert_allclose(
        frame["update_norm"], norms(p - old for p, old in zip(model.parameters(), before, strict=True)), rtol=1e-6
    )


@pytest.mark.parametrize("unscale", [False, True], ids=["plain", "unscaled_first"])
@pytest.mark.parametrize("kind", ["sgd", "adamw_fused"])
def test_scaler_gradients_are_recorded_unscaled(kind, unscale):
    model = mlp()
    x, y = batch()
    loss_of(model, x, y).backward()
    want = norms(p.grad for p in model.parameters())
    with watch(model) as probe:
        loss_of(model, x, y).backward()
        probe.step()
    layers = probe.trace.layers
    model.zero_grad()

    optimizer = OPTIMIZERS[kind](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with watch(model, optimizer, scaler=scaler) as probe:
        scaler.scale(loss_of(model, x, y)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    np.testing.assert_allclose(params_of(probe)["grad_norm"], want, rtol=1e-5)
    for column in ("grad_norm", "grad_abs_max"):
        np.testing.assert_allclose(probe.trace.layers[column], layers[column], rtol=1e-5)
    steps = probe.trace.steps
    assert steps["loss_scale"].tolist() == [1024]
    assert steps["skipped"].tolist() == [False]
    assert steps["grad_norm"][0] == pytest.approx(math.hypot(*want), rel=1e-5)


@pytest.mark.parametrize("kind", ["sgd", "adamw_fused"])
def test_skipped_steps_are_recorded_and_counted(kind):
    model = mlp()
    optimizer = OPTIMIZERS[kind](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    with watch(model, optimizer, scaler=scaler) as probe:
        for step in range(4):
            optimizer.zero_grad()
            loss = loss_of(model, *batch()) * (math.inf if step in (1, 2) else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    steps = probe.trace.steps
    assert steps["step"].tolist() == [0, 1, 2, 3]
    assert steps["skipped"].tolist() == [False, True, True, False]
    assert steps["loss_scale"].tolist() == [8, 8, 4, 2]
    assert np.isfinite(steps["grad_norm"]).tolist() == [True, False, False, True]
    assert probe.trace.layers.query("step in (1, 2) and kind == 'Linear'")["grad_nonfinite"].gt(0).all()
    assert params_of(probe, 1)["grad_nonfinite"].gt(0).all()
    assert not params_of(probe, 1)["update_norm"].gt(0).any()
    assert params_of(probe, 3)["update_norm"].gt(0).all()
    assert "step" not in vars(scaler)


def test_float16_with_scaler():
    model = nn.Linear(4, 3, bias=False)
    x = torch.randn(5, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with watch(model, optimizer, scaler=scaler) as probe:
        with torch.autocast("cpu", dtype=torch.float16):
            y = model(x)
        assert y.dtype == torch.float16
        scaler.scale(1e-3 * y.float().sum()).backward()
        scaler.step(optimizer)
    assert probe.trace.layers["grad_norm"][0] == pytest.approx(1e-3 * math.sqrt(15), rel=1e-3)


def test_scaler_without_optimizer_would_record_scaled_gradients():
    with pytest.raises(UsageError, match="scaler"):
        watch(mlp(), scaler=torch.amp.GradScaler("cpu"))


def test_disabled_scaler():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with watch(model, optimizer, scaler=scaler) as probe:
        scaler.scale(loss_of(model, *batch())).backward()
        scaler.step(optimizer)
        scaler.update()
    assert probe.trace.steps[["skipped", "loss_scale"]].values.tolist() == [[False, 1.0]]


def test_scaler_skips_with_every():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with watch(model, optimizer, scaler=scaler, every=2) as probe:
        for step in range(5):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, *batch()) * (math.inf if step == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert probe.trace.steps["step"].tolist() == [0, 2, 4]
    assert probe.trace.steps["loss_scale"].tolist() == [8, 4, 4]


def test_log_checks_what_it_gets():
    with watch(mlp()) as probe:
        with pytest.raises(UsageError, match="one entry"):
            probe.log(loss=torch.ones(2))
        probe.log(loss=torch.tensor([2.5]))
        probe.step()
        probe.log(loss=3.5)
        probe.step()
    assert probe.trace.steps["loss"].tolist() == [2.5, 3.5]


def test_update_of_another_optimizers_parameter_is_missing_not_zero():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with watch(model, optimizer) as probe:
        model(torch.randn(4, 2)).sum().backward()
        optimizer.step()
    updates = probe.trace.params.set_index("param")["update_norm"]
    assert updates[["0.weight", "0.bias"]].isna().all()
    assert (updates[["1.weight", "1.bias"]] > 0).all()


def test_info_tells_what_is_frozen_on_purpose_and_what_the_optimizer_lacks():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model[0].bias.requires_grad_(False)
    with watch(model, torch.optim.SGD([model[0].weight, model[1].bias], lr=0.1)) as probe:
        info = probe.trace.info
    assert info["params"][0] == ["0.weight", [3, 2], "float32"]
    assert info["params_without_grad"] == ["0.bias"]
    assert info["params_not_optimized"] == ["1.weight"]
    assert info["optimizer"] == "SGD"
    with watch(model) as probe:
        assert probe.trace.info["params_not_optimized"] == []
