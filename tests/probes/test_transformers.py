"""Randomly initialized models of Hugging Face's transformers, watched: unchanged, and every gradient norm right."""

from __future__ import annotations

import math
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from torch import nn
from torch.utils._pytree import tree_leaves

import gradlab as gl

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def text(vocabulary: int = 50) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def pictures(size: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(2, 3, size, size, generator=generator), "labels": torch.tensor([0, 1])}


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50, **SMALL)), text()


def gpt2():
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config), text()


def llama():
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, max_position_embeddings=16, **SMALL)
    return transformers.LlamaForCausalLM(config), text()


def t5():
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), text()


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=2
    )
    return transformers.ResNetForImageClassification(config), pictures()


def vit():
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=2, **SMALL)
    return transformers.ViTForImageClassification(config), pictures()


def convnext():
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, num_labels=2)
    return transformers.ConvNextForImageClassification(config), pictures()


BUILDERS = {build.__name__: build for build in (bert, gpt2, llama, t5, resnet, vit, convnext)}


def step(build, *, watched: bool):
    torch.manual_seed(0)
    model, batch = build()
    model.train()
    probe = gl.watch(model) if watched else None
    torch.manual_seed(1)  # dropout
    output = model(**batch)
    output.loss.backward()
    if probe is not None:
        probe.step()
        probe.close()
    grads = [param.grad for param in model.parameters()]
    return [output.loss, output.logits, *grads, *model.buffers(), torch.get_rng_state()], probe


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_watching_changes_nothing(build):
    bare, _ = step(build, watched=False)
    watched, probe = step(build, watched=True)
    for first, second in zip(bare, watched, strict=True):
        assert (first is None and second is None) or torch.equal(first, second)
    assert len(probe.trace.layers) > 10


def retained(build, layers):
    """Return, by layer, the output tensors of a bare step, each with its gradient retained."""
    torch.manual_seed(0)
    model, batch = build()
    model.train()
    kept: dict[str, list[torch.Tensor]] = {}

    def keep(name: str):
        def hook(module: nn.Module, args: object, output: object) -> None:
            for leaf in tree_leaves(output):
                if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                    if leaf.requires_grad:
                        leaf.retain_grad()
                    kept.setdefault(name, []).append(leaf)

        return hook

    for name in layers:
        model.get_submodule(name).register_forward_hook(keep(name))
    torch.manual_seed(1)
    model(**batch).loss.backward()
    return kept


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_every_gradient_norm_is_that_of_a_retained_gradient(build):
    _, probe = step(build, watched=True)
    rows = probe.trace.layers.sort_values("order").groupby("layer")["grad_norm"].apply(list).to_dict()
    kept = retained(build, [name for name, _ in probe.trace.info["layers"]])
    wanted = {
        name: [math.nan if leaf.grad is None else float(leaf.grad.double().norm()) for leaf in leaves]
        for name, leaves in kept.items()
    }
    assert rows.keys() == wanted.keys()
    assert set(wanted) | set(probe.trace.never_ran) == {name for name, _ in probe.trace.info["layers"]}
    for name, norms in wanted.items():
        assert rows[name] == pytest.approx(norms, rel=1e-4, abs=0, nan_ok=True), name
    assert sum(not math.isnan(norm) for norms in wanted.values() for norm in norms) > 10
