"""Training code as people have it, bare and watched: equal in every bit, and the numbers against an own reference."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset


def norm(x):
    return x.detach().double().norm().item()


def grads(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(6, 2))


def test_gradient_accumulation_has_a_call_for_each_micro_batch_and_one_accumulated_gradient(bare_and_watched):
    want = {}

    def train(start):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        outputs, left = [], []
        with start(model, optimizer):
            for step in range(2):
                for _ in range(3):
                    y = model(torch.randn(5, 4))
                    y.retain_grad()
                    outputs.append(y)
                    (y.square().mean() / 3).backward()
                left += grads(model)
                want[step] = [norm(p.grad) for p in model.parameters()]
                want["calls", step] = [norm(y.grad) for y in outputs[-3:]]
                optimizer.step()
                optimizer.zero_grad()
        return [*left, *model.state_dict().values()]

    (trace,) = bare_and_watched(train)
    for step in range(2):
        params = trace.params.query("step == @step")
        np.testing.assert_allclose(params["grad_norm"], want[step], rtol=1e-6)
        layers = trace.layers.query("step == @step and layer == '4'")
        assert layers["call"].tolist() == [0, 1, 2]
        np.testing.assert_allclose(layers["grad_norm"], want["calls", step], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(bare_and_watched, dtype):
    seen = {}

    def train(start):
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        left = []
        with start(model, optimizer):
            for _ in range(2):
                with torch.autocast("cpu", dtype=dtype):
                    y = model(torch.randn(5, 4))
                    loss = functional.mse_loss(y.float(), torch.zeros(5, 2))
                y.retain_grad()
                loss.backward()
                assert y.dtype is dtype
                seen["out"], seen["grad"] = norm(y), norm(y.grad)
                seen["params"] = [norm(p.grad) for p in model.parameters()]
                left += [loss, *grads(model)]
                optimizer.step()
                optimizer.zero_grad()
        return [*left, *model.state_dict().values()]

    (trace,) = bare_and_watched(train)
    row = trace.layers.query("step == 1 and layer == '2'").iloc[0]
    assert (row["act_norm"], row["grad_norm"]) == pytest.approx((seen["out"], seen["grad"]), rel=1e-6)
    np.testing.assert_allclose(trace.params.query("step == 1")["grad_norm"], seen["params"], rtol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_checkpointing_with_dropout_and_accumulation(bare_and_watched, reentrant):
    want = []

    def train(start):
        stem, block, head = nn.Linear(4, 6), mlp_block(), nn.Linear(6, 2)
        model = nn.ModuleList([stem, block, head])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        want.clear()
        with start(model, optimizer):
            for _ in range(2):
                z = stem(torch.randn(5, 4))
                y = checkpoint(block, z, use_reentrant=reentrant)
                y.retain_grad()
                (head(y).square().mean() / 2).backward()
                want.append((norm(y), norm(y.grad)))
            left = grads(model)
            optimizer.step()
        return [*left, *model.state_dict().values()]

    (trace,) = bare_and_watched(train)
    rows = trace.layers.query("layer == '1.2'")
    assert rows["call"].tolist() == [0, 1]
    np.testing.assert_allclose(rows[["act_norm", "grad_norm"]], want, rtol=1e-6)


def mlp_block():
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.4))


class Tied(nn.Module):
    """A language model in small: the head shares the embedding's weight, one block is used twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        z = self.embed(x)
        out = self.block(z)
        out += z
        return self.head(functional.relu_(self.block(out.tanh_())))


def test_tied_weights_a_shared_block_and_in_place_operations(bare_and_watched):
    want = {}

    def train(start):
        model = Tied()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        x = torch.randint(7, (3, 5))
        with start(model, optimizer):
            loss = functional.cross_entropy(model(x).flatten(0, 1), x.flatten())
            loss.backward()
            left = [loss, *grads(model)]
            want.update({name: norm(p.grad) for name, p in model.named_parameters()})
            optimizer.step()
        return [*left, *model.state_dict().values()]

    (trace,) = bare_and_watched(train)
    assert list(want) == ["embed.weight", "block.weight", "block.bias"]
    assert trace.params.set_index("param")["grad_norm"].to_dict() == pytest.approx(want, rel=1e-6)
    assert trace.layers["layer"].tolist() == ["embed", "block", "block", "head"]
    assert trace.layers["call"].tolist() == [0, 0, 1, 0]


@dataclass
class Result:
    logits: torch.Tensor
    extra: dict
    nothing: None = None


class Structured(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        y = self.a(x)
        return Result(y, {"parts": (self.b(x), None), "count": 3})


def test_model_that_returns_a_dataclass_of_everything(bare_and_watched):
    want = []

    def train(start):
        model = Structured()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with start(model, optimizer, layers="all"):
            out = model(torch.randn(5, 4))
            other = out.extra["parts"][0]
            for y in (out.logits, other):
                y.retain_grad()
            (out.logits.square().sum() + other.sum()).backward()
            want[:] = [norm(out.logits.grad), norm(other.grad)]
            left = grads(model)
            optimizer.step()
        return [*left, *model.state_dict().values()]

    (trace,) = bare_and_watched(train)
    rows = trace.layers.query("layer == ''")
    assert rows["output"].tolist() == ["logits", "extra.parts.0"]
    np.testing.assert_allclose(rows["grad_norm"], want, rtol=1e-6)


class Lora(nn.Module):
    """A frozen linear layer and a trained update of low rank."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_lora_has_missing_gradients_where_frozen_and_a_zero_one_where_the_update_starts_at_zero(bare_and_watched):
    want = {}

    def train(start):
        model = nn.Sequential(Lora(nn.Linear(4, 6)), nn.Tanh(), Lora(nn.Linear(6, 2)))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        with start(model, optimizer):
            model(torch.randn(5, 4)).square().mean().backward()
            want.update({n: math.nan if p.grad is None else norm(p.grad) for n, p in model.named_parameters()})
            left = grads(model)
            optimizer.step()
        return [*left, *model.state_dict().values()]

    (trace,) = bare_and_watched(train)
    params = trace.params.set_index("param")
    assert params["grad_norm"].to_dict() == pytest.approx(want, rel=1e-6, nan_ok=True)
    assert math.isnan(want["0.base.weight"])
    assert want["0.down.weight"] == params.loc["0.down.weight", "grad_norm"] == 0
    assert params["update_norm"].isna().tolist() == ["base" in name for name in params.index]
    assert trace.info["params_without_grad"] == [name for name in params.index if "base" in name]
    assert trace.info["params_not_optimized"] == []
    # The gradient passes through the frozen layer: its output has one, though its weight has none.
    assert trace.layers.query("layer == '2.base'")["grad_norm"].gt(0).all()
    assert trace.layers.query("layer == '0.base'")["grad_norm"].isna().all()  # nothing before it is trained


def test_parameters_first_used_later_are_missing_until_then(bare_and_watched):
    def train(start):
        model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with start(model, optimizer):
            for step in range(3):
                y = model[0](torch.randn(2, 3))
                (model[1](y) if step == 2 else y).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        return list(model.state_dict().values())

    (trace,) = bare_and_watched(train)
    late = trace.params.query("param == '1.weight'")
    assert late["grad_norm"].isna().tolist() == [True, True, False]
    assert late["weight_norm"].notna().all()
    assert trace.never_ran == ()
    assert trace.layers.query("layer == '1'")["step"].tolist() == [2]


def test_unfreezing_by_a_new_parameter_group_shows_its_updates(bare_and_watched):
    def train(start):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        model[0].requires_grad_(False)
        optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
        with start(model, optimizer):
            for step in range(2):
                if step == 1:
                    model[0].requires_grad_(True)
                    optimizer.add_param_group({"params": list(model[0].parameters())})
                model(torch.randn(4, 3)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        return list(model.state_dict().values())

    (trace,) = bare_and_watched(train)
    rows = trace.params.query("param == '0.weight'")
    assert rows["update_norm"].isna().tolist() == [True, False]
    assert rows["update_norm"].iloc[1] == pytest.approx(0.1 * rows["grad_norm"].iloc[1], rel=1e-5)


def test_train_and_eval_switches_and_frozen_batchnorm(bare_and_watched):
    def train(start):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        left = []
        with start(model, optimizer):
            for step in range(4):
                model.train()
                model[1].train(step % 2 == 0)
                model(torch.randn(5, 4)).square().mean().backward()
                left += grads(model)
                optimizer.step()
                optimizer.zero_grad()
                model.eval()
                with torch.no_grad():
                    left.append(model(torch.randn(3, 4)))
        return [*left, *model.state_dict().values()]

    (trace,) = bare_and_watched(train)
    assert trace.batchnorm["training"].tolist() == [True, False, True, False]
    assert trace.layers.groupby("step").size().tolist() == [5] * 4


class Ensemble(nn.Module):
    """Per-sample work through torch.func in the midst of an ordinary model."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.func.vmap(self.inner)(x).tanh())


def test_vmap_inside_forward_is_said_and_the_rest_is_right(bare_and_watched):
    want = []

    def train(start):
        model = Ensemble()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with start(model, optimizer):
            y = model(torch.randn(5, 4))
            y.retain_grad()
            y.square().sum().backward()
            want[:] = [norm(y.grad), *(norm(p.grad) for p in model.parameters())]
            left = grads(model)
            optimizer.step()
        return [*left, *model.state_dict().values()]

    (trace,) = bare_and_watched(train)
    assert list(trace.info["not_seen"]) == ["inner"]
    assert trace.layers["layer"].tolist() == ["head"]
    np.testing.assert_allclose([*trace.layers["grad_norm"], *trace.params["grad_norm"]], want, rtol=1e-6)


def test_data_loader_workers(bare_and_watched):
    def train(start):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data = TensorDataset(torch.randn(12, 4))
        left = []
        with start(model, optimizer):
            for (x,) in DataLoader(data, batch_size=4, shuffle=True, num_workers=2):
                model(x).square().mean().backward()
                left += [x, *grads(model)]
                optimizer.step()
                optimizer.zero_grad()
        return [*left, *model.state_dict().values()]

    (trace,) = bare_and_watched(train)
    assert trace.steps["step"].tolist() == [0, 1, 2]
