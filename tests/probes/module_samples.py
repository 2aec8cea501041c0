"""Run every sample of PyTorch's own module database bare and watched, and print what differed as JSON.

Run by test_module_db in a process of its own: importing the database changes settings of torch for the whole process.
"""

import copy
import json
import math
import sys
import warnings

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

import gradlab as gl

READ = 12  # samples of a module whose numbers are compared too: the tables take longer than the training


def samples(dtype=torch.float32, only=()):
    """Yield (name, info, sample, training) for every module in every mode in which torch tests it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about packages that only torch's own tests need
        from torch.testing._internal.common_modules import module_db
    for info in module_db:
        if only and info.name not in only:
            continue
        for training in (True, False) if info.train_and_eval_differ else (True,):
            torch.manual_seed(1)
            made = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
            for place, sample in enumerate(made):
                yield f"{info.name} {place} {'train' if training else 'eval'}", info, sample, training


def real(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def run(info, sample, training, options):
    """Run one step; return all that it leaves behind by name, norms of outputs and their gradients, and the probe.

    Options are those of watch, or None for a bare run, which alone gives the norms.
    """
    torch.manual_seed(2)
    module = info.module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs).train(training)
    given = (sample.forward_input.args, sample.forward_input.kwargs)
    args, named = tree_map_only(torch.Tensor, lambda x: x.detach().clone().requires_grad_(x.requires_grad), given)
    if info.is_lazy:
        module(*copy.deepcopy(args), **copy.deepcopy(named))  # only now have its parameters a shape
    probe = None if options is None else gl.watch(module, layers="all", **options)
    norms = []
    try:
        output = module(*args, **named)
        outputs = real(output)
        for y in outputs if probe is None else []:
            norms.append([y.detach().double().norm().item(), math.nan])
            if y.requires_grad:
                y.register_hook(lambda grad, of=norms[-1]: of.__setitem__(1, grad.double().norm().item()))
        loss = sum((y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in outputs)
        if isinstance(loss, torch.Tensor) and loss.requires_grad:
            loss.backward()
        if probe is not None:
            probe.step()
    finally:
        if probe is not None:
            probe.close()
    left = {f"output {place}": y.detach() for place, y in enumerate(tree_leaves(output)) if isinstance(y, torch.Tensor)}
    left |= {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    left |= {f"gradient of input {place}": x.grad for place, x in enumerate(real((args, named)))}
    left |= {f"buffer {name}": b for name, b in module.named_buffers()}
    return left | {"random state": torch.get_rng_state()}, norms, probe


def same(one, other):
    """Return whether two tensors, or two Nones, are equal in every bit."""
    if one is None or other is None:
        return one is other
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(torch.equal(*pair) for pair in [[x.contiguous().view(-1).view(torch.uint8) for x in (one, other)]])


def close(one, other):
    if one is None or other is None or not one.is_floating_point():
        return same(one, other)
    return torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)


def compare(name, info, sample, training):
    """Return what was wrong with a watched run of a sample that runs bare."""
    bare, norms, _ = run(info, sample, training, None)
    watched, _, probe = run(info, sample, training, {})
    wrong = [key for key in bare if not same(bare[key], watched.get(key))]
    if int(name.split()[1]) < READ:
        layers = probe.trace.layers
        got = layers.loc[layers["layer"] == "", ["act_norm", "grad_norm"]].to_numpy()
        want = torch.tensor(norms, dtype=torch.float64).view(-1, 2)
        if not torch.allclose(torch.as_tensor(got.copy()), want, rtol=1e-5, atol=0, equal_nan=True):
            wrong.append(f"norms {got.tolist()}, not {norms}")
    if issubclass(info.module_cls, nn.RNNBase):
        chunked, _, probe = run(info, sample, training, {"timesteps": True})
        wrong += [f"{key} with timesteps" for key in bare if not close(bare[key], chunked.get(key))]
        wrong += [] if len(probe.trace.timesteps) else [f"nothing through time: {probe.trace.info['not_seen']}"]
    return [f"{name}: {what}" for what in wrong]


def main():
    torch.set_num_threads(1)
    counts, refused, wrong = {"float32": 0, "float64": 0}, [], []

    def run_all(dtype, only=()):
        for name, info, sample, training in samples(dtype, only):
            try:
                run(info, sample, training, None)
            except Exception as error:
                refused.append((info.name, f"{name}: {error!r:.200}"))
                continue
            counts[str(dtype).removeprefix("torch.")] += 1
            try:
                wrong.extend(compare(name, info, sample, training))
            except Exception as error:
                wrong.append(f"{name}: {error!r:.300}")

    run_all(torch.float32)
    # The database draws the samples of some modules in float64 whatever it is asked for.
    only, refused[:] = {name for name, _ in refused}, []
    if only:
        run_all(torch.float64, only)
    json.dump({**counts, "refused": [text for _, text in refused], "wrong": wrong}, sys.stdout)


if __name__ == "__main__":
    main()
