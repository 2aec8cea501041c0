"""The Hugging Face callback: what it records, when it lets go, and that training is the bare one's."""

import math

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

import gradlab as gl
from gradlab.errors import UsageError
from gradlab.integrations.huggingface import GradlabCallback, unwrapped


def tiny():
    torch.manual_seed(0)
    settings = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM"))


def sentences(count=16):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 20, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(model, folder, *callbacks, data=None, evaluated=None, trainer_class=Trainer, **options):
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 0.01}
    quiet = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "seed": 5}
    arguments = TrainingArguments(output_dir=str(folder / "out"), **settings | quiet | options)
    data = sentences() if data is None else data
    return trainer_class(
        model=model, args=arguments, train_dataset=data, eval_dataset=evaluated, callbacks=list(callbacks)
    )


def hooked(model):
    return [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]


def logged_losses(trained):
    return [row["loss"] for row in trained.state.log_history if "loss" in row]


def test_a_training_is_recorded_and_is_the_bare_one(tmp_path):
    bare, watched = tiny(), tiny()
    options = {"evaluated": sentences(4), "eval_strategy": "steps", "eval_steps": 2}
    first = trainer(bare, tmp_path, **options)
    first.train()
    state = torch.get_rng_state()
    callback = GradlabCallback()
    second = trainer(watched, tmp_path, callback, **options)
    second.train()
    assert torch.equal(torch.get_rng_state(), state)
    assert logged_losses(second) == logged_losses(first)
    assert all(
        torch.equal(a, b) for a, b in zip(bare.state_dict().values(), watched.state_dict().values(), strict=True)
    )
    trace = callback.trace
    assert trace.steps["step"].tolist() == [0, 1, 2, 3]
    assert trace.steps["loss"].tolist() == pytest.approx(logged_losses(first), abs=1e-4)
    assert trace.layers.groupby(["step", "layer"]).size().max() == 1  # evaluations are no calls of a step
    assert trace.params["update_norm"].gt(0).all()
    assert hooked(watched) == []


@pytest.mark.parametrize("normalized", [True, False], ids=["loss-over-all-tokens", "mean-of-batches"])
def test_accumulated_batches_are_one_step_with_the_trainers_loss(tmp_path, normalized):
    model = tiny()
    callback = GradlabCallback()
    trained = trainer(model, tmp_path, callback, gradient_accumulation_steps=2, max_steps=2, max_grad_norm=0.0)
    trained.model_accepts_loss_kwargs = normalized
    trained.train()
    trace = callback.trace
    assert trace.steps["loss"].tolist() == pytest.approx(logged_losses(trained), abs=1e-4)
    assert trace.layers[trace.layers["layer"] == "transformer.wte"]["call"].tolist() == [0, 1, 0, 1]
    norms = [row["grad_norm"] for row in trained.state.log_history if "grad_norm" in row]
    assert trace.steps["grad_norm"].tolist() == pytest.approx(norms, rel=1e-4)


def test_clipped_gradients_are_recorded_as_the_optimizer_uses_them(tmp_path):
    callback = GradlabCallback()
    trainer(tiny(), tmp_path, callback, max_grad_norm=1e-3).train()
    assert callback.trace.steps["grad_norm"].tolist() == pytest.approx([1e-3] * 4, rel=1e-2)


def test_a_nan_loss_that_the_trainers_log_hides_is_in_the_trace(tmp_path):
    class Broken(Trainer):
        def compute_loss(self, model, inputs, **_):
            loss = super().compute_loss(model, inputs)
            return loss * math.nan if self.state.global_step == 2 else loss

    callback = GradlabCallback()
    trained = trainer(tiny(), tmp_path, callback, trainer_class=Broken, max_steps=3)
    trained.train()
    assert all(math.isfinite(loss) for loss in logged_losses(trained))
    assert callback.trace.steps["loss"].isna().tolist() == [False, False, True]
    assert callback.trace.params.query("step == 2")["grad_nonfinite"].gt(0).all()


class Failing(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise RuntimeError("the user's own error")


def test_an_error_in_training_detaches_and_keeps_the_trace(tmp_path):
    model = tiny()
    with pytest.raises(RuntimeError, match="own error"), GradlabCallback(save_to=tmp_path / "run.trace") as callback:
        trainer(model, tmp_path, callback, Failing()).train()
    assert hooked(model) == []
    assert callback.trace.steps["step"].tolist() == [0, 1]
    assert gl.load(tmp_path / "run.trace") == callback.trace


def test_a_second_training_after_an_error_begins_anew(tmp_path):
    model = tiny()
    callback = GradlabCallback()
    with pytest.raises(RuntimeError, match="own error"):
        trainer(model, tmp_path, callback, Failing()).train()
    assert hooked(model)  # Trainer tells its callbacks of no error
    trainer(model, tmp_path, callback, max_steps=3).train()
    assert callback.trace.steps["step"].tolist() == [0, 1, 2]
    assert hooked(model) == []


def test_the_trace_is_saved_and_never_overwrites(tmp_path):
    trainer(tiny(), tmp_path, GradlabCallback(save_to=tmp_path / "run.trace", every=2)).train()
    assert gl.load(tmp_path / "run.trace").steps["step"].tolist() == [0, 2]
    model = tiny()
    with pytest.raises(UsageError, match="exists already"):
        trainer(model, tmp_path, GradlabCallback(save_to=tmp_path / "run.trace")).train()
    assert hooked(model) == []


class Classifier(nn.Module):
    """A model of plain torch, as Trainer takes them."""

    def __init__(self, form):
        super().__init__()
        self.linear, self.form = nn.Linear(3, 2), form

    def forward(self, x, labels):
        logits = self.linear(x)
        loss = nn.functional.cross_entropy(logits, labels)
        if self.form == "tuple":
            return loss, logits
        return {"loss": loss, "logits": logits} if self.form == "dict" else SequenceClassifierOutput(loss, logits)


@pytest.mark.parametrize(("form", "known"), [("dict", True), ("output", True), ("tuple", False)], ids=str)
def test_the_loss_of_a_models_output_is_found_or_missing(tmp_path, form, known):
    data = [{"x": torch.randn(3), "labels": torch.tensor(place % 2)} for place in range(16)]
    callback = GradlabCallback()
    trained = trainer(Classifier(form), tmp_path, callback, data=data)
    trained.train()
    losses = callback.trace.steps["loss"]
    assert losses.notna().tolist() == [known] * 4
    if known:
        assert losses.tolist() == pytest.approx(logged_losses(trained), abs=1e-4)


def test_torchs_optimizer_and_the_scaler_are_found_in_accelerates_wrapper():
    from accelerate import Accelerator

    Accelerator(cpu=True)  # the wrapper needs its state
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    scaler = torch.amp.GradScaler("cpu")
    assert unwrapped(AcceleratedOptimizer(optimizer, scaler=scaler)) == (optimizer, scaler)
    assert unwrapped(AcceleratedOptimizer(optimizer)) == (optimizer, None)
    assert unwrapped(optimizer) == (optimizer, None)
