# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Heads: what they see, their losses and gradients, pooling, pipelines, adapters, and what they refuse."""

import copy

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from reformer_hf import (
    ReformerHfByteTokenizer,
    ReformerHfConfig,
    ReformerHfForMaskedLM,
    ReformerHfForMultipleChoice,
    ReformerHfForQuestionAnswering,
    ReformerHfForSequenceClassification,
    ReformerHfForTokenClassification,
)

from .helpers import DROPOUT, assert_close, assert_refused, gradients, random_model, tiny_config
from .processes import run_worker

LENGTH = 77
NUM_LABELS = 3
PATTERNS = {
    "window": {},
    "chunk": {"lsh_pattern": "chunk"},
    "in-tree": {"lsh_pattern": "chunk", "lsh_across_buckets": True, "wrap_chunks": True},
}
HEADS = (
    ReformerHfForMaskedLM,
    ReformerHfForSequenceClassification,
    ReformerHfForTokenClassification,
    ReformerHfForQuestionAnswering,
    ReformerHfForMultipleChoice,
)
each_head = pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__.removeprefix("ReformerHfFor"))


def _model(head, dtype=torch.float32, **fields):
    num_labels = 2 if head is ReformerHfForQuestionAnswering else NUM_LABELS
    return random_model(dtype, head, **{"is_decoder": False, "num_labels": num_labels, "pad_token_id": 0, **fields})


def _ids(*shape, seed=1):
    return torch.randint(1, 60, shape, generator=torch.Generator().manual_seed(seed))


def _inputs(model):
    """Inputs and labels of two examples for the head of a model."""
    ids, classes = _ids(2, LENGTH), torch.tensor([2, 0])
    if isinstance(model, ReformerHfForMultipleChoice):
        return {"input_ids": _ids(2, 3, LENGTH), "labels": classes}
    if isinstance(model, ReformerHfForQuestionAnswering):
        return {"input_ids": ids, "start_positions": torch.tensor([3, 70]), "end_positions": torch.tensor([9, 76])}
    if isinstance(model, ReformerHfForSequenceClassification):
        return {"input_ids": ids, "labels": classes}
    labels = ids if isinstance(model, ReformerHfForMaskedLM) else ids % NUM_LABELS
    return {"input_ids": ids, "labels": labels.masked_fill(_ids(2, LENGTH, seed=2) > 30, -100)}


def _logits(output):
    """The logits of a head, with the positions in the second axis if it has any."""
    return torch.stack([output.start_logits, output.end_logits], -1) if "start_logits" in output else output.logits


@pytest.mark.parametrize(
    ("head", "pattern"),
    [
        (ReformerHfForMaskedLM, "window"),
        (ReformerHfForSequenceClassification, "chunk"),
        (ReformerHfForTokenClassification, "in-tree"),
        (ReformerHfForQuestionAnswering, "chunk"),
        (ReformerHfForMultipleChoice, "window"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__.removeprefix("ReformerHfFor"),
)
def test_sees_both_sides(head, pattern):
    """Later tokens change earlier outputs, and the first position depends on tokens after it."""
    fields = {"lsh_num_chunks_after": 1, "local_num_chunks_after": 1} if pattern == "in-tree" else {}
    for layers in (["local"] * 4, ["lsh", "lsh"]):
        model = _model(head, attn_layers=layers, num_buckets=2, **fields, **PATTERNS[pattern])
        ids = _inputs(model)["input_ids"]
        changed = ids.clone()
        changed[..., -LENGTH // 2 :] = _ids(LENGTH // 2 + 1, seed=3)
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = _logits(model(inputs_embeds=embeds, attention_mask=torch.ones_like(ids)))
        other = _logits(model(changed))
        if logits.shape[: ids.dim()] == ids.shape:
            # Logits of each token: only those before the change.
            logits, other = logits[:, : LENGTH // 2], other[:, : LENGTH // 2]
            logits[:, 0].square().sum().backward()
        else:
            logits.square().sum().backward()
        assert not torch.allclose(logits, other, rtol=1e-5, atol=1e-6), layers
        assert embeds.grad[..., 1:, :].abs().sum(-1).gt(0).any(), layers


def test_default_is_bidirectional():
    config = ReformerHfConfig()
    assert not config.is_decoder
    for head in HEADS:
        with torch.device("meta"):
            model = head(config)
        for layer in model.reformer.encoder.layers:
            pattern = layer.attention.self_attention.pattern
            assert not pattern.causal and pattern.chunks_after == pattern.chunks_before > 0, head


@each_head
def test_gradients_equal_plain(head):
    fields = {"classifier_dropout": 0.1, **DROPOUT}
    models = [_model(head, torch.float64, **fields, reversible=reversible) for reversible in (True, False)]
    for model in models:
        torch.manual_seed(2)
        model.train()(**_inputs(model)).loss.backward()
    expected = gradients(models[1])
    for name, grad in gradients(models[0]).items():
        assert_close(grad, expected[name], 1e-5 if "lm_head" in name else 1e-9, name)
        assert grad.any(), name


def test_masked_loss_in_chunks():
    """In training, a chunked head gives the same loss and gradients without logits."""
    found = []
    for chunk_size in (0, 10):
        model = _model(ReformerHfForMaskedLM, chunk_size_lm_head=chunk_size).train()
        for items in (None, 50):
            output = model(**_inputs(model), **({} if items is None else {"num_items_in_batch": items}))
            assert (output.logits is None) == (chunk_size > 0)
            model.zero_grad()
            output.loss.backward()
            found.append((output.loss, gradients(model)))
    for (loss, grads), (expected, expected_grads) in zip(found[2:], found[:2], strict=True):
        assert_close(loss, expected, 1e-6)
        for name, grad in grads.items():
            assert_close(grad, expected_grads[name], 1e-5, name)


def test_tied_masked_lm(tmp_path):
    model = _model(ReformerHfForMaskedLM, tie_word_embeddings=True)
    assert model.lm_head.decoder.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = ReformerHfForMaskedLM.from_pretrained(tmp_path)
    ids = _ids(2, LENGTH)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_pooling_reads_no_padding():
    """Each sequence has the logits that it has alone, with padding on either side, masked or known by its id."""
    lengths = (30, 41)
    for pooling in (None, "first", "last", "mean"):
        for causal in (False, True) if pooling in (None, "last", "mean") else (False,):
            model = _model(ReformerHfForSequenceClassification, pooling=pooling, is_decoder=causal)
            alone = [_ids(1, length, seed=length) for length in lengths]
            expected = torch.cat([model(ids).logits for ids in alone])
            for right in (True, False):
                ids, mask = torch.zeros(2, 50, dtype=torch.long), torch.zeros(2, 50, dtype=torch.long)
                for row, sequence in enumerate(alone):
                    start = 0 if right else 50 - sequence.shape[1]
                    ids[row, start : start + sequence.shape[1]] = sequence
                    mask[row, start : start + sequence.shape[1]] = 1
                found = model(ids, attention_mask=mask).logits
                assert_close(found, expected, 1e-5, f"{pooling}, {causal}, {right}")
                # Without a mask, the model takes padding for tokens, but pools over none.
                encoded = model.reformer(ids).last_hidden_state
                without_mask = model.classifier(encoded, ids != 0)
                assert_close(model(ids).logits, without_mask, 1e-6)


def test_pooling_of_padding_alone():
    for pooling in ("first", "last", "mean"):
        model = _model(ReformerHfForSequenceClassification, pooling=pooling)
        mask = torch.ones(2, LENGTH, dtype=torch.long)
        mask[1] = 0
        assert model(_ids(2, LENGTH), attention_mask=mask).logits.isfinite().all()


def test_pooling_default():
    assert ReformerHfConfig().pooled_tokens == "first"
    assert ReformerHfConfig(is_decoder=True).pooled_tokens == "last"
    for fields, message in (
        ({"pooling": "max"}, "`pooling` is 'max', but must be one of"),
        ({"pooling": "first", "is_decoder": True}, "`pooling` is 'first', but the first token of a causal model"),
    ):
        with pytest.raises(ValueError, match=message):
            ReformerHfConfig(**fields)


def test_sequence_losses():
    """Each problem type has its loss; Transformers names it in the config with the first loss."""
    ids, numbers = _ids(2, LENGTH), torch.tensor([[0.5, 1.0, 0.0], [0.0, 0.25, 1.0]])
    multi_label = binary_cross_entropy_with_logits
    cases = (
        (3, None, torch.tensor([2, 0]), "single_label_classification", cross_entropy),
        (3, None, torch.tensor([[2], [0]]), "single_label_classification", lambda x, y: cross_entropy(x, y[:, 0])),
        (3, None, numbers, "multi_label_classification", multi_label),
        (
            3,
            "multi_label_classification",
            numbers.long(),
            None,
            lambda x, y: multi_label(x, y.float()),
        ),
        (3, "regression", 5 * numbers, None, mse_loss),
        (1, None, numbers[:, 0], "regression", lambda x, y: mse_loss(x[:, 0], y)),
        (1, None, torch.tensor([[4], [-7]]), "regression", lambda x, y: mse_loss(x, y.float())),
    )
    for num_labels, problem, labels, found, loss in cases:
        model = _model(ReformerHfForSequenceClassification, num_labels=num_labels, problem_type=problem)
        output = model(ids, labels=labels)
        assert_close(output.loss, loss(output.logits, labels), 1e-6, str(problem))
        assert model.config.problem_type == (found or problem)


def test_other_losses():
    model = _model(ReformerHfForTokenClassification)
    inputs = _inputs(model)
    output = model(**inputs)
    expected = cross_entropy(output.logits.flatten(0, 1), inputs["labels"].flatten())
    assert_close(output.loss, expected, 1e-6)
    model = _model(ReformerHfForMultipleChoice)
    inputs = _inputs(model)
    output = model(**inputs)
    assert output.logits.shape == (2, 3)
    assert_close(output.loss, cross_entropy(output.logits, inputs["labels"]), 1e-6)
    # The choices do not see each other.
    assert_close(model(inputs["input_ids"][:, 1:]).logits, output.logits[:, 1:], 1e-5)
    model = _model(ReformerHfForQuestionAnswering)
    inputs = _inputs(model)
    output = model(**inputs)
    ends = zip((output.start_logits, output.end_logits), list(inputs.values())[1:], strict=True)
    assert_close(output.loss, sum(cross_entropy(*each) for each in ends) / 2, 1e-6)
    # A span outside of a truncated input has no loss.
    outside = {"start_positions": torch.tensor([3, LENGTH + 5]), "end_positions": torch.tensor([9, LENGTH + 9])}
    alone = model(inputs["input_ids"][:1], **{name: ends[:1] for name, ends in outside.items()}).loss
    assert_close(model(inputs["input_ids"], **outside).loss, alone, 1e-5)


def test_labels_with_gaps():
    """Labels may be a slice, whose rows are not next to each other."""
    for head in (ReformerHfForMaskedLM, ReformerHfForTokenClassification):
        model, ids, labels = _model(head), _ids(2, 30), _ids(2, 40) % NUM_LABELS
        losses = [model(ids, labels=each).loss for each in (labels[:, :30], labels[:, :30].clone())]
        assert torch.equal(*losses), head


def test_dtypes_of_class_indices():
    for head in (ReformerHfForSequenceClassification, ReformerHfForMultipleChoice):
        model = _model(head)
        inputs, labels = _inputs(model), torch.tensor([1, 2])
        losses = [model(**{**inputs, "labels": labels.to(x)}).loss for x in (torch.long, torch.int32, torch.uint8)]
        assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2]), head


BAD_CALLS = (
    (ReformerHfForMaskedLM, {"labels": _ids(2, 5)}, r"`labels` has shape \(2, 5\), but must be \(2, 77\)"),
    (ReformerHfForMaskedLM, {"labels": _ids(2, LENGTH) + 60}, r"must be in \[0, 59\] \(`vocab_size` is 60\), or -100"),
    (ReformerHfForMaskedLM, {"labels": _ids(2, LENGTH).float()}, "dtype torch.float32, but must be torch.int64"),
    (ReformerHfForMaskedLM, {"labels": _ids(2, LENGTH).int()}, r"torch.int32, but must .*: pass `labels.long\(\)`"),
    (ReformerHfForTokenClassification, {"labels": _ids(2, LENGTH) * 0 + 3}, r"holds 3, .* \(`num_labels` is 3\)"),
    (ReformerHfForTokenClassification, {"labels": _ids(2, LENGTH) * 0 - 1}, "`labels` holds -1, but must be in"),
    (ReformerHfForSequenceClassification, {"labels": torch.tensor([0, 3])}, r"`labels` holds 3, .*`num_labels` is 3"),
    (ReformerHfForSequenceClassification, {"labels": torch.tensor([0])}, r"has shape \(1,\), but must be \(2,\)"),
    (ReformerHfForSequenceClassification, {"labels": torch.ones(2, 3).long()}, "set `problem_type='multi_label_class"),
    (
        ReformerHfForSequenceClassification,
        {"labels": torch.tensor([0.0, 1.0])},
        "'multi_label_classification' with",
    ),
    (ReformerHfForSequenceClassification, {"labels": torch.full((2, 3), 2.0)}, "needs numbers from 0 to 1"),
    (ReformerHfForQuestionAnswering, {"start_positions": torch.tensor([0, 1])}, "`end_positions` is missing"),
    (
        ReformerHfForQuestionAnswering,
        {"start_positions": torch.tensor([-100, 1]), "end_positions": torch.tensor([0, 1])},
        "`start_positions` holds -100, but indices of tokens start at 0",
    ),
    (
        ReformerHfForQuestionAnswering,
        {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([[0, 1]])},
        r"`end_positions` has shape \(1, 2\), but must be \(2,\)",
    ),
    (ReformerHfForMultipleChoice, {"labels": torch.tensor([0, 3])}, r"`labels` holds 3, .*`num_choices` is 3"),
    (ReformerHfForMultipleChoice, {"input_ids": _ids(2, LENGTH)}, r"needs \[B, C, L\], with an axis of choices"),
    (ReformerHfForMultipleChoice, {"attention_mask": _ids(2, LENGTH)}, r"must be \(2, 3, 77\), one entry for each"),
    (ReformerHfForMultipleChoice, {"input_ids": None}, "Give one of `input_ids` and `inputs_embeds`, not neither"),
)


def test_bad_calls():
    def call(head, bad):
        model = _model(head)
        model(**{"input_ids": _inputs(model)["input_ids"], **bad})

    assert_refused(call, {f"{head.__name__}, {message}": (head, bad, message) for head, bad, message in BAD_CALLS})


def test_bad_inputs():
    """What the base model refuses, each head refuses too."""
    for head in HEADS:
        model = _model(head)
        ids = _inputs(model)["input_ids"]
        in_tree_cache = {"input_ids": ids, "past_buckets_states": []}
        cases = {
            "ids": ({"input_ids": ids + 60}, "ids of this model must be in"),
            "length": ({"input_ids": ids.repeat_interleave(4, dim=-1)}, "at most 256"),
            "positions": ({"input_ids": ids, "position_ids": torch.full_like(ids, 256)}, "`position_ids` holds 256"),
            "cache": (in_tree_cache, "`past_buckets_states` is the cache of the in-tree Reformer"),
        }
        assert_refused(
            lambda inputs, model=model: model(**inputs), {f"{head.__name__}, {name}": x for name, x in cases.items()}
        )


def test_missing_pad_id():
    for head in (ReformerHfForSequenceClassification, ReformerHfForMultipleChoice):
        model = _model(head, pad_token_id=None)
        ids = _inputs(model)["input_ids"]
        with pytest.raises(ValueError, match=r"set `model.config.pad_token_id` .*, or pass an `attention_mask`"):
            model(ids)
        model(ids, attention_mask=torch.ones_like(ids))
        model(ids[:1, :1] if head is ReformerHfForMultipleChoice else ids[:1])


def test_bad_heads():
    with pytest.raises(ValueError, match="a masked language model needs attention in both directions"):
        ReformerHfForMaskedLM(tiny_config())
    with pytest.raises(ValueError, match="`num_labels` is 3, but a question answering model has 2 outputs"):
        ReformerHfForQuestionAnswering(tiny_config(is_decoder=False, num_labels=3))
    with pytest.raises(ValueError, match="`classifier_dropout` is 1.5, but a dropout rate"):
        tiny_config(classifier_dropout=1.5)


def test_causal_labels():
    """Labels of the causal model are checked too, other indices to ignore are not."""
    model, ids = random_model(), _ids(2, LENGTH)
    with pytest.raises(ValueError, match=r"`labels` holds -1, but must be in \[0, 59\] .*or -100 for no loss"):
        model(ids, labels=ids.masked_fill(ids > 30, -1))
    with pytest.raises(ValueError, match=r"`labels` has shape \(2, 5\)"):
        model(ids, labels=ids[:, :5])
    expected = model(ids, labels=ids.masked_fill(ids > 30, -100)).loss
    assert_close(model(ids, labels=ids.masked_fill(ids > 30, -1), ignore_index=-1).loss, expected, 1e-6)


def test_attention_outputs():
    for head in HEADS:
        model = _model(head)
        output = model(_inputs(model)["input_ids"], output_attentions=True, output_hidden_states=True)
        num_layers = len(model.config.attn_layers)
        assert len(output.attentions) == len(output.attention_positions) == num_layers, head
        assert len(output.hidden_states) == num_layers + 1, head
        values = model(_inputs(model)["input_ids"], return_dict=False)
        logits = _logits(output)[..., 0] if "start_logits" in output else output.logits
        assert torch.equal(values[0], logits), head


def test_pipelines(tmp_path):
    """The pipelines of Transformers 5 from a saved folder; question answering is not one of them any more."""
    torch.manual_seed(0)
    config = ReformerHfConfig(attn_layers=["local", "lsh"], hidden_size=32, num_labels=3, max_position_embeddings=64)
    text = "The needle."
    for head, task, options in (
        (ReformerHfForMaskedLM, "fill-mask", {}),
        (ReformerHfForSequenceClassification, "text-classification", {"top_k": None}),
        (ReformerHfForTokenClassification, "token-classification", {"ignore_labels": []}),
        (ReformerHfForSequenceClassification, "feature-extraction", {}),
    ):
        model = head(config).eval()
        model.save_pretrained(tmp_path / head.__name__)
        tokenizer = ReformerHfByteTokenizer(model_max_length=64)
        tokenizer.save_pretrained(tmp_path / head.__name__)
        run = pipeline(task, str(tmp_path / head.__name__))
        masked = text.replace("needle", "n<mask>edle")
        inputs = tokenizer(masked if task == "fill-mask" else text, return_tensors="pt")
        found = run(masked if task == "fill-mask" else [text, text + text[:3]], **options)
        with torch.no_grad():
            if task == "fill-mask":
                best = model(**inputs).logits[0, 5].softmax(-1).topk(5)
                assert [each["token"] for each in found] == best.indices.tolist()
                assert [each["score"] for each in found] == pytest.approx(best.values.tolist(), rel=1e-4)
            elif task == "text-classification":
                scores = model(**inputs).logits[0].softmax(-1)
                assert {x["label"]: x["score"] for x in found[0]} == pytest.approx(
                    {f"LABEL_{i}": score for i, score in enumerate(scores.tolist())}, rel=1e-4
                )
            elif task == "token-classification":
                scores = model(**inputs).logits[0].softmax(-1).max(-1)
                assert [x["score"] for x in found[0]] == pytest.approx(scores.values.tolist(), rel=1e-4)
            else:
                expected = model.reformer(**inputs).last_hidden_state
                assert_close(torch.tensor(found[0]), expected, 1e-4)
    assert AutoModel.from_pretrained(tmp_path / "ReformerHfForMaskedLM").config.num_labels == 3


def test_from_causal_checkpoint(tmp_path):
    """A causal checkpoint with a classification head reads the last token, and its encoder is the same."""
    causal = random_model(pad_token_id=0)
    causal.save_pretrained(tmp_path)
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=4, output_loading_info=True)
    assert info["missing_keys"] == {f"classifier.{x}.{y}" for x in ("dense", "out_proj") for y in ("weight", "bias")}
    assert model.config.is_decoder and model.config.pooled_tokens == "last"
    ids = _ids(2, LENGTH)
    encoded = causal.reformer(ids).last_hidden_state
    assert torch.equal(model.reformer(ids).last_hidden_state, encoded)
    assert torch.equal(model(ids).logits, model.classifier(encoded[:, -1:], None))


def _rows():
    """Examples of several lengths, with a label for each token and for the whole."""
    rows = [_ids(9 + 5 * (i % 4), seed=i) for i in range(8)]
    return [
        {"input_ids": row.tolist(), "labels": (row % NUM_LABELS).tolist(), "label": len(row) % NUM_LABELS}
        for row in rows
    ]


@pytest.mark.parametrize("head", [ReformerHfForTokenClassification, ReformerHfForSequenceClassification])
def test_accumulation(head, tmp_path):
    """Trainer gives the same weights for a batch of four and for four batches of one."""
    found = []
    of_tokens = head is ReformerHfForTokenClassification
    rows = [{name: x for name, x in row.items() if name != ("label" if of_tokens else "labels")} for row in _rows()]
    tokenizer = ReformerHfByteTokenizer()

    def collate(batch):
        if of_tokens:
            return DataCollatorForTokenClassification(tokenizer)(batch)
        padded = tokenizer.pad([{"input_ids": row["input_ids"]} for row in batch], return_tensors="pt")
        return {**padded, "labels": torch.tensor([row["label"] for row in batch])}

    for batch_size, accumulation in ((1, 4), (4, 1)):
        set_seed(0)
        model = head(tiny_config(is_decoder=False, num_labels=NUM_LABELS, pad_token_id=0, hash_seed=0))
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                max_steps=2,
                learning_rate=1e-3,
                optim="sgd",
                use_cpu=True,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=collate,
            compute_metrics=lambda found: {"shape": list(found.predictions.shape)},
        )
        trainer.train()
        assert trainer.evaluate()["eval_shape"][-1] == NUM_LABELS
        found.append(dict(model.named_parameters()))
    for name, parameter in found[0].items():
        assert_close(parameter, found[1][name], 1e-5, name)


def test_lora(tmp_path):
    """With every base weight frozen, adapters and the new head train; the adapter folder has both."""
    peft = pytest.importorskip("peft")
    models = []
    for reversible in (True, False):
        base = _model(ReformerHfForSequenceClassification, torch.float64, reversible=reversible, **DROPOUT)
        torch.manual_seed(4)
        config = peft.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False)
        models.append(peft.get_peft_model(base, config).to(torch.float64).train())
        torch.manual_seed(2)
        models[-1](**_inputs(base)).loss.backward()
    trained = {name: x.grad for name, x in models[1].named_parameters() if x.requires_grad}
    assert any("classifier" in name for name in trained) and any("lora_" in name for name in trained)
    for name, parameter in models[0].named_parameters():
        if name in trained:
            assert_close(parameter.grad, trained[name], 1e-9, name)
    models[0].eval().save_pretrained(tmp_path)
    base = _model(ReformerHfForSequenceClassification, torch.float64)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    ids = _ids(2, LENGTH)
    assert_close(again(input_ids=ids).logits, models[0](input_ids=ids).logits, 1e-12)


def test_bf16():
    """In bf16 weights, logits are those of fp32 to the precision of bf16, and gradients reach every parameter."""
    # In several buckets, rounding would move a query to another one.
    expected = _model(ReformerHfForSequenceClassification, num_buckets=1)
    model = copy.deepcopy(expected).to(torch.bfloat16)
    inputs = _inputs(model)
    output = model.train()(**inputs)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert_close(output.logits.float(), expected(**inputs).logits, 0.03)
    assert all(grad.isfinite().all() and grad.dtype == torch.bfloat16 for grad in gradients(model).values())


def test_ddp(tmp_path):
    """Two ranks have the gradients of one process."""
    from safetensors.torch import load_file

    from .worker import gradients as one_process

    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        folder.mkdir()
    one_process(str(folders[0]), "none", head="ReformerHfForSequenceClassification")
    run_worker("gradients", folders[1], ranks=2, wrap="ddp", head="ReformerHfForSequenceClassification")
    expected, found = (load_file(folder / "gradients.safetensors") for folder in folders)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert_close(tensor, expected[name], 1e-6, name)
