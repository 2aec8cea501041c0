"""Every sample of PyTorch's module database, watched: outputs, gradients, buffers and random state stay the same."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import gradlab as gl

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_modules import module_db

INFOS = [pytest.param(info, id=info.name.removeprefix("nn.")) for info in module_db]
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, about samples that it warns of
FEWEST = 2000  # samples in torch 2.13; fewer would mean that this file no longer sees them
_seen: dict[str, int] = {}


def copied(value: object) -> object:
    """Copy nested inputs: leaves that require a gradient where the originals do."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return {key: copied(item) for key, item in value.items()} if isinstance(value, dict) else value


def tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def step(info, sample, *, training: bool, watched: bool):
    """Run a forward and a backward pass; return every tensor that training would see."""
    torch.manual_seed(0)
    made = sample.constructor_input
    module = info.module_cls(*made.args, **made.kwargs).train(training)
    inputs = sample.forward_input
    args, kwargs = copied(inputs.args), copied(inputs.kwargs)
    if any(is_lazy(value) for value in module.parameters()):
        with torch.no_grad():
            module(*copied(args), **copied(kwargs))
    probe = gl.watch(module) if watched else None
    torch.manual_seed(1)
    outputs = list(tensors(module(*args, **kwargs)))
    losses = [output.abs().sum() for output in outputs if output.requires_grad]
    if losses:
        sum(losses).backward()
    if probe is not None:
        probe.step()
        probe.close()
        check(probe.trace, outputs, bool(losses))
    leaves = [leaf for leaf in tensors([args, kwargs]) if leaf.is_leaf and leaf.requires_grad]
    grads = [leaf.grad for leaf in [*module.parameters(), *leaves]]
    return [*outputs, *grads, *module.buffers(), torch.get_rng_state()]


def check(trace: gl.Trace, outputs: list[torch.Tensor], backward: bool) -> None:
    """Each module that ran was recorded, or is listed as not seen; the last output's norm is right."""
    seen = set(trace.layers["layer"]) | set(trace.info["not_seen"]) | set(trace.never_ran)
    assert {name for name, _ in trace.info["layers"]} <= seen
    whole = trace.layers[(trace.layers["layer"] == "") & (trace.layers["output"] == "")]
    if len(whole) == 1 and len(outputs) == 1 and not outputs[0].is_complex():
        expected = outputs[0].detach().double().norm()
        assert whole["act_norm"].item() == pytest.approx(float(expected), rel=1e-4, nan_ok=True)
        if backward and outputs[0].requires_grad:  # the loss is a sum of absolute values
            count = float(outputs[0].sgn().abs().nansum()) ** 0.5  # torch takes the sign of NaN for 0
            assert whole["grad_norm"].item() == pytest.approx(count, rel=1e-4, nan_ok=True)


def same(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    first, second = (value.detach().to_dense() for value in (first, second))
    if first.is_floating_point() or first.is_complex():
        return torch.equal(first.isnan(), second.isnan()) and torch.equal(first.nan_to_num(), second.nan_to_num())
    return torch.equal(first, second)


@pytest.mark.parametrize("info", INFOS)
def test_every_sample_is_unchanged_by_watching(info):
    dtype = torch.float32 if torch.float32 in info.dtypes else next(iter(info.dtypes))
    if info.name.startswith("nn.FractionalMaxPool"):
        dtype = torch.float64  # as its samples' own random numbers are
    ran = 0
    for training in (True, False):
        torch.manual_seed(2)
        samples = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
        for sample in samples:
            if sample.forward_input is None:
                continue
            bare = step(info, sample, training=training, watched=False)
            watched = step(info, sample, training=training, watched=True)
            assert len(bare) == len(watched)
            assert all(same(*pair) for pair in zip(bare, watched, strict=True)), sample.desc
            ran += 1
    assert ran
    _seen[info.name] = ran


def test_all_samples_were_seen():
    if len(_seen) < len(INFOS):
        pytest.skip("only where the whole file runs")
    assert sum(_seen.values()) >= FEWEST


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU], ids=lambda kind: kind.__name__)
def test_samples_of_recurrent_modules_followed_through_time(kind):
    """The chunks sum weight gradients in another order; all else is the same to rounding."""
    info = next(info for info in module_db if info.module_cls is kind)
    torch.manual_seed(2)
    samples = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=True)
    for sample in samples:
        results = []
        for follow in (False, True):
            torch.manual_seed(0)
            made = sample.constructor_input
            module = kind(*made.args, **made.kwargs).double()
            args = copied(sample.forward_input.args)
            with gl.watch(module, timesteps=follow) as probe:
                output = list(tensors(module(*args)))
                sum(part.abs().sum() for part in output).backward()
                probe.step()
            results.append([*output, *(param.grad for param in module.parameters())])
        assert len(probe.trace.timesteps) or probe.trace.info["not_seen"]
        for first, second in zip(*results, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-11)
