# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Details of `Trainer`: accumulation, evaluation, lengths, label smoothing, batch sizes that do not fit."""

import warnings

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from reformer_hf import ReformerHfForCausalLM
from reformer_hf.training import CausalCollator

from .helpers import assert_close, tiny_config

LAYERS = ["local", "lsh", "full"]
each_head = pytest.mark.parametrize("head_chunk", [0, 7], ids=["logits", "chunked-head"])


def _rows(num_rows=8):
    """Rows of many lengths, so that batches differ in what counts for the loss."""
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(1, 60, (5 + 7 * (i % 5),), generator=generator).tolist()} for i in range(num_rows)
    ]


def _trainer(folder, rows=None, model_fields=None, cls=Trainer, **arguments):
    set_seed(0)
    # Buckets do not depend on how far a row is padded.
    model = ReformerHfForCausalLM(tiny_config(**{"attn_layers": LAYERS, "hash_seed": 0, **(model_fields or {})}))
    defaults = {"max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "use_cpu": True}
    defaults |= {"report_to": [], "disable_tqdm": True, "seed": 0, "per_device_train_batch_size": 4}
    data = Dataset.from_list(_rows() if rows is None else rows)
    callbacks = arguments.pop("callbacks", [])
    trainer_arguments = {
        name: arguments.pop(name)
        for name in ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func")
        if name in arguments
    }
    return cls(
        model,
        TrainingArguments(output_dir=str(folder), **{**defaults, **arguments}),
        train_dataset=data,
        eval_dataset=data,
        data_collator=CausalCollator(0),
        callbacks=callbacks,
        **trainer_arguments,
    )


def _losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class _FirstGradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step, before they are clipped."""

    def __init__(self):
        self.grads = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.grads is None:
            self.grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@each_head
def test_accumulation(head_chunk, tmp_path):
    """Rows hold different numbers of labels: a mean of means would be another loss."""
    found = []
    for batch_size, accumulation in ((1, 4), (4, 1)):
        first = _FirstGradients()
        trainer = _trainer(
            tmp_path,
            model_fields={"chunk_size_lm_head": head_chunk},
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
            callbacks=[first],
        )
        trainer.train()
        found.append((_losses(trainer), first.grads))
    (losses, grads), (expected_losses, expected_grads) = found
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], 1e-5, name)


@each_head
def test_evaluation_during_training(head_chunk, tmp_path):
    """With metrics from all logits, and with the loss alone; both the loss of the formula."""

    def accuracy(prediction):
        targets = prediction.label_ids[:, 1:]
        right = (prediction.predictions[:, :-1].argmax(-1) == targets) & (targets != -100)
        return {"accuracy": right.sum() / (targets != -100).sum()}

    fields = {"chunk_size_lm_head": head_chunk}
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}
    trainer = _trainer(tmp_path, model_fields=fields, compute_metrics=accuracy, **evaluation)
    trainer.train()
    metrics = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(metrics) == 2
    batch = CausalCollator(0)(_rows())
    with torch.no_grad():
        logits = trainer.model.eval()(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert metrics[-1]["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    scored = batch["labels"][:, 1:] != -100
    right = (logits[:, :-1].argmax(-1) == batch["labels"][:, 1:])[scored].float().mean()
    assert metrics[-1]["eval_accuracy"] == pytest.approx(right.item(), rel=1e-5)

    alone = _trainer(tmp_path, model_fields=fields, prediction_loss_only=True, **evaluation)
    alone.train()
    assert [entry["eval_loss"] for entry in alone.state.log_history if "eval_loss" in entry] == pytest.approx(
        [entry["eval_loss"] for entry in metrics], rel=1e-6
    )


def test_predictions_with_attentions(tmp_path):
    """They are the logits alone, whatever else the model returns."""
    expected = _trainer(tmp_path).predict(Dataset.from_list(_rows())).predictions
    fields = {"output_attentions": True, "output_hidden_states": True}
    found = _trainer(tmp_path, model_fields=fields).predict(Dataset.from_list(_rows())).predictions
    assert found.shape == (8, 33, 60) and (found == expected).all()


def test_evaluation_changes_no_step(tmp_path):
    """A model that is evaluated, and trained again, does what it would have done. (Loaders draw a seed.)"""
    losses = []
    for evaluation in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        fields = {"hidden_dropout_prob": 0.0, "hash_seed": 0}
        trainer = _trainer(tmp_path, rows=_rows(16), model_fields=fields, max_steps=4, **evaluation)
        trainer.train()
        losses.append(_losses(trainer))
    assert losses[0] == losses[1]


def test_group_by_length(tmp_path):
    seen = []

    class Recording(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append(inputs["input_ids"].shape[1])
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = _trainer(
        tmp_path,
        rows=_rows(40),
        cls=Recording,
        train_sampling_strategy="group_by_length",
        per_device_train_batch_size=2,
        max_steps=20,
    )
    trainer.train()
    assert len(_losses(trainer)) == 20 and all(torch.tensor(_losses(trainer)).isfinite())
    # The longest come first; Transformers sorts groups of ten rows.
    assert seen[0] == max(seen)
    for first in range(5, 20, 5):
        group = seen[first : first + 5]
        assert group == sorted(group, reverse=True) and len(set(group)) > 1, seen


def test_gradient_checkpointing(tmp_path, caplog):
    """It changes no step, and says once that there is nothing to save."""
    transformers_logging.warning_once.cache_clear()
    expected = _trainer(tmp_path)
    expected.train()
    for _ in range(2):
        trainer = _trainer(tmp_path, activation_checkpointing=True)
        trainer.train()
        assert _losses(trainer) == _losses(expected)
    said = [record.message for record in caplog.records if "gradient_checkpointing" in record.message]
    assert len(said) == 1 and "reversible layers already recompute activations" in said[0]


def test_gradient_checkpointing_of_plain_layers(caplog):
    """Layers that store activations recompute them, until it is disabled; frozen models can have input gradients."""
    model = ReformerHfForCausalLM(
        tiny_config(reversible=False, attn_layers=["local"] * 12, max_kept_activations=None)
    ).train()
    model.requires_grad_(False)
    model.enable_input_require_grads()
    ids = torch.randint(0, 60, (1, 200), generator=torch.Generator().manual_seed(0))

    def step():
        """Return the size of what the forward pass stores, and the loss."""
        stored = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t.numel()) or t, lambda t: t):
            loss = model(ids, labels=ids).loss
        loss.backward()
        return sum(stored), loss

    plain, expected = step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed, loss = step()
    assert recomputed < plain / 3
    assert_close(loss, expected, 1e-6)
    model.activation_checkpointing_disable()
    assert step()[0] == plain
    assert not caplog.records


@each_head
def test_label_smoothing(head_chunk, tmp_path):
    trainer = _trainer(
        tmp_path, model_fields={"chunk_size_lm_head": head_chunk}, label_smoothing_factor=0.1, max_steps=1
    )
    batch = CausalCollator(0)(_rows())
    model = trainer.model.train()
    loss = trainer.compute_loss(model, dict(batch))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.1
    )
    assert_close(loss, expected, 1e-5)


def test_auto_classes_of_transformers():
    """The name of our causal model stands among theirs."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=1, vocab_size=9))
    assert type(model).__name__ == "GPT2LMHeadModel"
    ours = AutoModelForCausalLM.from_config(tiny_config())
    assert type(ours) is ReformerHfForCausalLM


def test_auto_find_batch_size(tmp_path):
    """A batch that does not fit becomes smaller until it does, and nothing of the failed one is left."""
    sizes = []

    class Tight(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            sizes.append(len(inputs["input_ids"]))
            loss = super().training_step(model, inputs, *args, **kwargs)
            if sizes[-1] > 2:
                raise RuntimeError("CUDA out of memory.")
            return loss

    trainer = _trainer(tmp_path, cls=Tight, auto_find_batch_size=True, per_device_train_batch_size=3)
    trainer.train()
    assert sizes == [3, 2, 2]
    fitting = _trainer(tmp_path, per_device_train_batch_size=2)
    fitting.train()
    assert len(_losses(fitting)) == 2 and _losses(trainer) == _losses(fitting)


def test_no_cache_in_training():
    model = ReformerHfForCausalLM(tiny_config(attn_layers=LAYERS)).train()
    ids = torch.randint(0, 60, (1, 20))
    output = model(ids, labels=ids, use_cache=True)
    assert "past_key_values" not in output and "cache" not in output
