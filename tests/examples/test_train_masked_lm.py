# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Masked spans, and the script for masked language modeling on a small text."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from bits_per_byte import sum_nll, unigram_bits_per_byte
from byte_data import END_ID, PAD_ID
from huggingface_hub import ModelCard
from span_masking import SpanMaskingCollator, draw_spans
from train_masked_lm import main, masked_bytes
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from reformer_hf import ReformerHfByteTokenizer, ReformerHfForMaskedLM
from reformer_hf.training import MuonWithAdamW

REFORMER = (
    'attn_layers=["local","lsh"],hidden_size=16,num_attention_heads=2,attention_head_size=8,feed_forward_size=16,'
    "local_attn_chunk_length=8,lsh_attn_chunk_length=8"
)
OPTIONS = f"""
    --sequence_length 64 --config_overrides {REFORMER} --max_steps 4 --save_steps 2 --eval_steps 2 --logging_steps 1
    --per_device_train_batch_size 2 --validation_fraction 0.1 --use_cpu --disable_tqdm true
"""
TOKENIZER = ReformerHfByteTokenizer()


def run(data, output_dir, *options):
    return main([*OPTIONS.split(), "--data", str(data), "--output_dir", str(output_dir), *options])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "book.txt"
    path.write_text("".join(f"Line {i} says {i * i}.\n" for i in range(100)))
    return path


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    return folder, *run(text, folder)


def span_lengths(masked):
    edges = np.flatnonzero(np.diff(masked.astype(int), prepend=0, append=0))
    return edges[1::2] - edges[::2]


def examples(num_sequences, length):
    ids = torch.randint(2, 258, (num_sequences, length), generator=torch.Generator().manual_seed(0))
    ids[:, ::10] = END_ID
    return [{"input_ids": row} for row in ids]


def test_spans():
    """The share of masked tokens, also at the first position, and the geometric distribution of span lengths."""
    for share, mean in ((0.15, 3.0), (0.15, 1.0), (0.4, 10.0), (0.6, 1.5)):
        generator = torch.Generator().manual_seed(0)
        masked = draw_spans(torch.ones(8, 20000, dtype=torch.bool), share, mean, generator).numpy()
        assert masked.mean() == pytest.approx(share, rel=0.05)
        first = draw_spans(torch.ones(8000, 200, dtype=torch.bool), share, mean, generator)[:, 0]
        assert first.float().mean().item() == pytest.approx(share, rel=0.1)
        lengths = np.concatenate([span_lengths(row) for row in masked])
        assert lengths.mean() == pytest.approx(mean, rel=0.05)
        assert (lengths == 1).mean() == pytest.approx(1 / mean, rel=0.1)


def test_spans_of_short_sequences():
    """Every sequence with a maskable token gets a masked one, for a loss that is defined."""
    maskable = torch.zeros(500, 3, dtype=torch.bool)
    maskable[:, 1] = True
    maskable[0] = False
    masked = draw_spans(maskable, 0.15, 3.0, torch.Generator().manual_seed(0))
    assert torch.equal(masked, maskable)


def test_collator():
    rows = examples(4, 5000)
    ids = torch.stack([row["input_ids"] for row in rows])
    batch = SpanMaskingCollator(TOKENIZER)(rows)
    masked = batch["labels"] != -100
    assert torch.equal(batch["labels"][masked], ids[masked])
    assert torch.equal(batch["input_ids"][~masked], ids[~masked])
    assert not masked[ids == END_ID].any()
    assert masked[ids != END_ID].float().mean().item() == pytest.approx(0.15, rel=0.1)
    replaced = batch["input_ids"][masked] == TOKENIZER.mask_token_id
    assert replaced.float().mean().item() == pytest.approx(0.8, rel=0.05)
    kept = batch["input_ids"][masked] == ids[masked]
    assert kept.float().mean().item() == pytest.approx(0.1, rel=0.2)


def test_collator_repeats_masks():
    """The same masks whatever was drawn before, and others in the next epoch or with another seed."""
    rows = examples(2, 200)
    collator = SpanMaskingCollator(TOKENIZER)
    first = collator(rows)["labels"]
    torch.manual_seed(5)
    collator(examples(1, 50))
    assert torch.equal(collator(rows)["labels"], first)
    collator.epoch = 1
    assert not torch.equal(collator(rows)["labels"], first)
    assert not torch.equal(SpanMaskingCollator(TOKENIZER, seed=7)(rows)["labels"], first)


def test_collator_keeps_labels():
    """Examples that are masked already are padded only."""
    rows = [{"input_ids": [5, 259, 6], "labels": [-100, 9, -100]}, {"input_ids": [259], "labels": [4]}]
    batch = SpanMaskingCollator(TOKENIZER)(rows)
    assert batch["input_ids"].tolist() == [[5, 259, 6], [259, PAD_ID, PAD_ID]]
    assert batch["labels"].tolist() == [[-100, 9, -100], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_unigram():
    found = unigram_bits_per_byte(np.array([9, 2, 2, 3]), np.array([2, 3, 4]), alpha=1)
    expected = -(math.log2(3 / 259) + math.log2(2 / 259) + math.log2(1 / 259)) / 3
    assert found == pytest.approx(expected)


def test_folder(trained):
    folder, trainer, metrics = trained
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "curve.jsonl"} <= names
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    model = AutoModelForMaskedLM.from_pretrained(folder)
    assert isinstance(model, ReformerHfForMaskedLM) and not model.config.is_decoder
    assert isinstance(trainer.optimizer.optimizer, MuonWithAdamW)
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 64
    results = json.loads((folder / "all_results.json").read_text())
    for name in ("eval_bits_per_masked_byte", "unigram_bits_per_masked_byte", "train_loss"):
        assert results[name] == metrics[name]


def test_bits_per_masked_byte(trained):
    """The metric is that of the masked bytes alone, at every evaluation the same ones."""
    _, trainer, metrics = trained
    nats = num_masked = 0
    for example in trainer.eval_dataset:
        ids, labels = example["input_ids"][None], example["labels"][None]
        masked = labels != -100
        assert torch.equal(masked, ids == TOKENIZER.mask_token_id)
        with torch.no_grad():
            log_probs = trainer.model.eval()(ids).logits.double().log_softmax(-1)
        nats -= log_probs[masked].gather(1, labels[masked][:, None]).sum().item()
        num_masked += masked.sum().item()
    assert len(masked_bytes(trainer.eval_dataset)) == num_masked
    assert metrics["eval_bits_per_masked_byte"] == pytest.approx(nats / math.log(2) / num_masked, rel=1e-4)
    assert trainer.evaluate()["eval_bits_per_masked_byte"] == metrics["eval_bits_per_masked_byte"]


def test_masks_do_not_depend_on_the_run(trained, text, tmp_path):
    """With another seed, batch size and number of epochs, evaluation masks the same bytes."""
    options = ["--seed", "3", "--max_steps", "2", "--per_device_train_batch_size", "64"]
    other, _ = run(text, tmp_path, *options, "--per_device_eval_batch_size", "1")
    # One step for each epoch.
    assert other.data_collator.epoch == 1
    for found, expected in zip(other.eval_dataset, trained[1].eval_dataset, strict=True):
        assert torch.equal(found["labels"], expected["labels"])


def test_curve(trained):
    entries = [json.loads(line) for line in (trained[0] / "curve.jsonl").read_text().splitlines()]
    assert {entry["step"] for entry in entries if "eval_bits_per_masked_byte" in entry} == {2, 4}


def test_resume(trained, text, tmp_path):
    """A resumed run masks the same bytes as an uninterrupted one, and ends with the same weights."""
    folder, trainer, _ = trained
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    resumed, _ = run(text, tmp_path)
    for (name, weight), expected in zip(resumed.model.named_parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(weight, expected), name


def test_card(trained):
    folder, trainer, metrics = trained
    card = ModelCard.load(folder / "README.md")
    result = card.data.eval_results[0]
    assert card.data.pipeline_tag == result.task_type == "fill-mask"
    assert result.metric_value == round(metrics["eval_bits_per_masked_byte"], 4)
    for part in (f"{metrics['unigram_bits_per_masked_byte']:.4f}", "The file `book.txt`", "<mask>", "learning_curve"):
        assert part in card.text


def test_pipeline(trained):
    """The pipeline of the folder, and the card's sample, are what the model predicts."""
    folder, trainer, _ = trained
    card = (folder / "README.md").read_text()
    text = next(part for part in card.split("## Sample")[1].split("````") if "<mask>" in part)
    text = text.removeprefix("text\n").removesuffix("\n")
    guesses = pipeline("fill-mask", str(folder))(text, top_k=3)
    ids = trainer.processing_class(text, return_tensors="pt")["input_ids"]
    assert (ids == TOKENIZER.mask_token_id).sum() == 1
    with torch.no_grad():
        probs = trainer.model.eval()(ids).logits[ids == TOKENIZER.mask_token_id][0].softmax(-1)
    top = probs.topk(3)
    assert [guess["token"] for guess in guesses] == top.indices.tolist()
    assert [guess["score"] for guess in guesses] == pytest.approx(top.values.tolist(), rel=1e-4)
    for guess in guesses:
        assert f"{guess['token_str']!r} ({guess['score']:.3f})" in card


def test_fine_tuning(trained, text, tmp_path):
    folder, trainer, _ = trained
    options = ["--model_name_or_path", str(folder), "--learning_rate", "0", "--max_steps", "1"]
    tuned, _ = run(text, tmp_path, *options)
    for weight, expected in zip(tuned.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(weight, expected)


BAD_OPTIONS = (
    (["--masked_share", "0"], "`masked_share` is 0.0, but must be between 0 and 1"),
    (["--masked_share", "1"], "`masked_share` is 1.0, but must be between 0 and 1"),
    (["--mean_span", "0.5"], "`mean_span` is 0.5, but must be at least 1 "),
    (["--masked_share", "0.75", "--mean_span", "2"], "`mean_span` is 2.0, but must be at least 3 "),
    (["--sequence_length", "1"], "`sequence_length` is 1, but must be at least 2"),
    (["--config_overrides", "max_position_embeddings=32"], "the model reads at most 32 tokens"),
    (["--config_overrides", "width=3"], "each entry must be key=value"),
    (["--config_overrides", "is_decoder=true"], "is_decoder"),
    (["--max_bytes", "60"], "shorter than one sequence"),
    (["--data", "missing.txt"], "'missing.txt' do not exist"),
)


def test_bad_options(text, tmp_path):
    for options, message in BAD_OPTIONS:
        with pytest.raises(ValueError, match=message):
            run(text, tmp_path, *options)


def test_sum_nll_without_shift():
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 260)
    expected = -logits.log_softmax(-1)[0, 1, 7]
    torch.testing.assert_close(sum_nll(logits, torch.tensor([[-100, 7, -100]]), shift=False), expected[None])
