"""Several optimizers, scalers, closures and replaced optimizers: each gradient as its own optimizer uses it."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from gradlab.errors import UsageError
from gradlab.probes import updates, watch


def norm(x):
    return x.detach().double().norm().item()


def gan():
    torch.manual_seed(4)
    return nn.ModuleDict({
        "g": nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)),
        "d": nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)),
    })  # fmt: skip


def adversarial_step(model, critic, generator, *, critics=1, scale=lambda loss: loss, step=None, seen=None):
    """One round of the two losses; `seen` gets each network's gradient norms as its optimizer uses them."""
    step = step or (lambda optimizer: optimizer.step())
    seen = {} if seen is None else seen
    for _ in range(critics):
        critic.zero_grad()
        fake = model["g"](torch.randn(6, 2)).detach()
        scale((model["d"](torch.randn(6, 3)) - 1).square().mean() + model["d"](fake).square().mean()).backward()
        seen["d"] = [norm(p.grad) for p in model["d"].parameters()]
        seen["d_before"] = [p.detach().clone() for p in model["d"].parameters()]
        step(critic)
        seen["d_update"] = [norm(p - b) for p, b in zip(model["d"].parameters(), seen["d_before"], strict=True)]
    generator.zero_grad()
    scale((model["d"](model["g"](torch.randn(6, 2))) - 1).square().mean()).backward()
    seen["g"] = [norm(p.grad) for p in model["g"].parameters()]
    step(generator)
    return seen


def test_two_optimizers_close_a_step_together_and_each_reads_its_own_gradients(bare_and_watched):
    want = []

    def train(start):
        model, left = gan(), []
        critic = torch.optim.Adam(model["d"].parameters(), lr=0.01)
        generator = torch.optim.SGD(model["g"].parameters(), lr=0.1, momentum=0.5)
        want.clear()
        with start(model, [critic, generator]):
            for _ in range(3):
                want.append(adversarial_step(model, critic, generator))
                left += [p.grad.clone() for p in model.parameters()]
        return [*left, *model.state_dict().values()]

    (trace,) = bare_and_watched(train)
    assert trace.steps["step"].tolist() == [0, 1, 2]
    assert trace.info["optimizer"] == "Adam, SGD"
    assert trace.info["notes"] == []
    for step, seen in enumerate(want):
        params = trace.params.query("step == @step").set_index("layer")
        # The generator's backward pass fills the critic's gradients again: those no optimizer ever uses.
        for net in "dg":
            got = params.loc[[f"{net}.0", f"{net}.2"], "grad_norm"]
            np.testing.assert_allclose(got, seen[net], rtol=1e-5)
        np.testing.assert_allclose(params.loc[["d.0", "d.2"], "update_norm"], seen["d_update"], rtol=1e-4)
        calls = trace.layers.query("step == @step").groupby("layer").size()
        assert calls[["g.0", "d.0"]].tolist() == [2, 3]
        total = math.hypot(*seen["d"], *seen["g"])
        assert trace.steps["grad_norm"][step] == pytest.approx(total, rel=1e-5)


def test_a_critic_of_several_updates_shows_its_last_and_says_so():
    model = gan()
    critic = torch.optim.SGD(model["d"].parameters(), lr=0.1)
    generator = torch.optim.SGD(model["g"].parameters(), lr=0.1)
    with watch(model, (critic, generator)) as probe:
        seen = adversarial_step(model, critic, generator, critics=3)
    trace = probe.trace
    assert trace.steps["step"].tolist() == [0]
    params = trace.params.set_index("layer")
    np.testing.assert_allclose(params.loc[["d.0", "d.2"], "grad_norm"], seen["d"], rtol=1e-5)
    np.testing.assert_allclose(params.loc[["d.0", "d.2"], "update_norm"], seen["d_update"], rtol=1e-4)
    assert "several updates" in trace.info["notes"][0]
    assert "Optimizer 0 (SGD)" in trace.info["notes"][0]


def test_an_optimizer_that_never_steps_is_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr(updates, "PATIENCE", 3)
    model = gan()
    critic = torch.optim.SGD(model["d"].parameters(), lr=0.1)
    generator = torch.optim.SGD(model["g"].parameters(), lr=0.1)

    def critic_only():
        critic.zero_grad()
        model["d"](torch.randn(6, 3)).square().mean().backward()
        critic.step()

    with watch(model, [critic, generator]) as probe:
        critic_only()
        critic_only()
        with pytest.warns(UserWarning, match=r"Optimizer 1 \(SGD\) made no update in 3"):
            critic_only()
        critic_only()
        critic_only()
        assert probe.step_number == 3  # three updates in the first step, then one in each
        adversarial_step(model, critic, generator)
        critic_only()
        assert probe.step_number == 5  # the generator is back; a step that it alone ended, and one still open
    rows = probe.trace.params.query("layer == 'g.0' and step < 3")
    assert rows[["grad_norm", "update_norm"]].isna().all(axis=None)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: [], "list of optimizers is empty"),
        (lambda m: [torch.optim.SGD(m.parameters(), lr=0.1)] * 2, "hold the same parameter"),
        (lambda m: [torch.optim.SGD(m.parameters(), lr=0.1), "adam"], "got str"),
        (
            lambda m: [torch.optim.SGD(m.parameters(), lr=0.1), torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)],
            "none of the model's parameters",
        ),
    ],
    ids=["empty", "twice", "text", "of_another_model"],
)
def test_wrong_lists_of_optimizers(make, words):
    model = gan()
    with pytest.raises(UsageError, match=words):
        watch(model, make(model))
    watch(model).close()


def test_scaler_that_changes_its_scale_between_two_optimizers(bare_and_watched):
    plain = {}

    def train_plain():
        model = gan()
        critic, generator = (torch.optim.SGD(model[net].parameters(), lr=0.1) for net in "dg")
        torch.manual_seed(1)
        with watch(model, [critic, generator]) as probe:
            for _ in range(2):
                adversarial_step(model, critic, generator)
        plain["trace"] = probe.trace

    def train(start):
        model = gan()
        critic, generator = (torch.optim.SGD(model[net].parameters(), lr=0.1) for net in "dg")
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)  # doubles at every update

        def step(optimizer):
            scaler.step(optimizer)
            scaler.update()

        torch.manual_seed(1)
        with start(model, [critic, generator], scaler=scaler):
            for _ in range(2):
                adversarial_step(model, critic, generator, scale=scaler.scale, step=step)
        assert "step" not in vars(scaler)
        return list(model.state_dict().values())

    train_plain()
    (trace,) = bare_and_watched(train)
    for table, column in [("layers", "grad_norm"), ("layers", "grad_abs_max"), ("params", "grad_norm")]:
        want = plain["trace"].tables[table][column]
        np.testing.assert_allclose(trace.tables[table][column], want, rtol=2e-4, err_msg=column)
    assert trace.steps["loss_scale"].tolist() == [128, 512]  # that of the last update of each step
    assert not trace.steps["skipped"].any()


@pytest.mark.parametrize("sick", ["d", "g"])
def test_skip_of_one_of_two_optimizers(sick):
    model = gan()
    critic, generator = (torch.optim.SGD(model[net].parameters(), lr=0.1) for net in "dg")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with watch(model, [critic, generator], scaler=scaler) as probe:
        for step in range(3):
            for net, optimizer in [("d", critic), ("g", generator)]:
                optimizer.zero_grad()
                x = model["g"](torch.randn(6, 2))
                loss = model["d"](x.detach() if net == "d" else x).square().mean()
                scaler.scale(loss * (math.inf if (step, net) == (1, sick) else 1.0)).backward()
                scaler.step(optimizer)
            scaler.update()
    trace = probe.trace
    assert trace.steps["skipped"].tolist() == [False, True, False]
    updates_made = trace.params.query("step == 1").groupby(trace.params["layer"].str[0])["update_norm"]
    assert updates_made.apply(lambda column: column.gt(0).all()).to_dict() == {sick: False, "dg".strip(sick): True}
    assert trace.steps["loss_scale"].tolist() == [64, 64, 32]


def test_unclosed_step_under_a_scaler_once_kept_scaled_gradients():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with watch(model, optimizer, scaler=scaler) as probe:
        scaler.scale(model(torch.ones(2, 3)).sum()).backward()
    assert probe.trace.layers["grad_norm"].tolist() == pytest.approx([2.0])
    assert probe.trace.steps["loss_scale"].tolist() == [1024]


def test_scaler_that_watch_was_not_given_is_noticed():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with watch(model, optimizer) as probe:
        scaler.scale(model(torch.ones(2, 3)).sum()).backward()
        with pytest.warns(UserWarning, match=r"scaler=scaler"):
            scaler.step(optimizer)
    assert "carry its loss scale" in probe.trace.info["notes"][0]


@pytest.mark.parametrize("first", [0, 1], ids=["first_closed_first", "last_closed_first"])
def test_two_probes_on_one_scaler_close_in_any_order(first):
    model = gan()
    critic, generator = (torch.optim.SGD(model[net].parameters(), lr=0.1) for net in "dg")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    probes = [watch(model[net], optimizer, scaler=scaler) for net, optimizer in (("d", critic), ("g", generator))]
    scaler.scale(model["d"](model["g"](torch.randn(6, 2))).sum()).backward()
    probes[first].close()
    for optimizer in (critic, generator):
        scaler.step(optimizer)
    probes[1 - first].close()
    assert "step" not in vars(scaler)
    assert probes[1 - first].trace.steps[["loss_scale", "skipped"]].values.tolist() == [[64.0, False]]
    assert probes[1 - first].trace.info.get("last_step_closed") is None


def test_clipping_told_for_one_optimizer_is_not_taken_for_the_other():
    model = gan()
    critic, generator = (torch.optim.SGD(model[net].parameters(), lr=0.1) for net in "dg")
    with watch(model, [critic, generator]) as probe:
        for net, optimizer in [("d", critic), ("g", generator)]:
            optimizer.zero_grad()
            model["d"](model["g"](torch.randn(6, 2))).square().mean().backward()
            if net == "d":
                raw = [norm(p.grad) for p in model["d"].parameters()]
                probe.log(clip=(nn.utils.clip_grad_norm_(model["d"].parameters(), 1e-3), 1e-3))
            optimizer.step()
    params = probe.trace.params.set_index("layer")
    np.testing.assert_allclose(params.loc[["d.0", "d.2"], "grad_norm_unclipped"], raw, rtol=1e-4)
    assert params.loc[["g.0", "g.2"], "grad_norm_unclipped"].isna().all()


def test_lbfgs_is_unchanged_in_every_bit(bare_and_watched):
    def train(start):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")
        x, y, left = torch.randn(8, 3), torch.randn(8, 1), []
        with start(model, optimizer):
            for _ in range(2):

                def closure():
                    optimizer.zero_grad()
                    loss = (model(x) - y).square().mean()
                    loss.backward()
                    left.append(loss.detach())
                    return loss

                left.append(optimizer.step(closure))
        return [*left, *model.state_dict().values()]

    (trace,) = bare_and_watched(train)
    assert trace.steps["step"].tolist() == [0, 1]
    assert trace.layers.query("layer == '0' and step == 0")["call"].max() >= 4  # one call for each evaluation


def test_replaced_optimizer_is_noticed_and_can_be_followed():
    model = nn.Linear(3, 2)
    old, new = (torch.optim.SGD(model.parameters(), lr=lr) for lr in (0.1, 0.2))

    def step(optimizer):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()

    with watch(model, old) as probe:
        step(old)
        with pytest.warns(UserWarning, match=r"probe\.follow\(optimizer\)"):
            step(new)
        assert probe.step_number == 1
        probe.follow(new)
        step(new)
        step(new)
        with pytest.raises(UsageError, match="none of the model's parameters"):
            probe.follow(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1))
    assert probe.trace.steps["learning_rate"].tolist() == pytest.approx([0.1, 0.2, 0.2])
    assert probe.trace.params["update_norm"].notna().all()
    with pytest.raises(UsageError, match="open probe"):
        probe.follow(old)
    step(new)  # nothing listens any more


def test_optimizer_inside_a_watched_one_is_a_part_of_it():
    class Wrapper(torch.optim.SGD):
        def __init__(self, params):
            params = list(params)
            super().__init__(params, lr=0.1)
            self.inner = torch.optim.Adam(params, lr=0.1)

        def step(self, closure=None):
            self.inner.step()

    model = nn.Linear(3, 2)
    optimizer = Wrapper(model.parameters())
    with watch(model, optimizer) as probe:
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
    assert probe.trace.info["notes"] == []
    assert probe.trace.params["update_norm"].gt(0).all()


def test_probe_that_is_never_closed_keeps_nothing_alive():
    from torch.optim.optimizer import _global_optimizer_post_hooks as everywhere

    gc.collect()
    before = len(everywhere)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    probe = watch(model, optimizer, scaler=scaler)
    assert len(everywhere) == before + 1
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    held = [weakref.ref(x) for x in (model, optimizer, probe, scaler)]
    del model, optimizer, probe, scaler
    gc.collect()
    assert [ref() for ref in held] == [None] * 4
    assert len(everywhere) == before


def test_model_deleted_while_watched_leaves_a_readable_trace():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = watch(model, optimizer)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    del model, optimizer
    gc.collect()
    probe.close()
    assert len(probe.trace.params) == 2
