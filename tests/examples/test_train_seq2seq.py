# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The sequence-to-sequence script and its tasks on tiny data: what it writes, measures, resumes and refuses."""

import json
import math
import shutil
import socket
import sys

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from sequence_tasks import LETTERS, GeneratedExamples, draw_capitals, draw_reverse
from train_seq2seq import (
    IGNORED,
    TASKS,
    GenerationMetrics,
    Pairs,
    encode_pair,
    main,
    parse_stages,
    token_accuracy,
    write_card,
)
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from reformer_hf import ReformerHfByteTokenizer
from reformer_hf.encoder_decoder import ReformerHfForConditionalGeneration

TINY = "hidden_size=16,num_attention_heads=2,attention_head_size=8,feed_forward_size=16,lsh_attn_chunk_length=8"
OPTIONS = f"""
    --config_overrides {TINY},local_attn_chunk_length=8 --max_steps 4 --eval_steps 2 --save_steps 2 --logging_steps 1
    --per_device_train_batch_size 2 --per_device_eval_batch_size 4 --use_cpu --disable_tqdm true
"""
CAPITALS = "--task capitals --max_source_length 128 --stages 64:4,128:8 --num_held_out 6".split()


def run(output_dir, *options):
    return main([*OPTIONS.split(), "--output_dir", str(output_dir), *options])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("capitals")
    return folder, *run(folder, *CAPITALS)


def test_draw_reverse():
    rng = np.random.default_rng(0)
    pairs = [draw_reverse(rng, 64) for _ in range(300)]
    assert all(target == source[::-1] for source, target in pairs)
    assert {len(source) for source, _ in pairs} == set(range(16, 65))


def test_draw_capitals():
    rng = np.random.default_rng(0)
    for length in (52, 127, 4095):
        source, target = draw_capitals(rng, length)
        first, text = source[:26], source[26:]
        assert len(source) == length and sorted(first) == sorted(LETTERS)
        assert sorted(target) == sorted(filter(str.isalpha, text)) and target.lower() == first
        assert not target.islower() and not target.isupper()


def test_examples_are_determined_by_seed_and_index():
    def texts(seed, stages=((20, 3), (40, 2))):
        examples = GeneratedExamples(draw_reverse, stages, seed)
        return [examples[i]["source"] for i in range(len(examples))]

    assert texts(0) == texts(0) and not set(texts(0)) & set(texts(1))
    assert [len(text) < 20 for text in texts(0)[:3]] == [True] * 3
    assert len({*texts(0)}) == 5
    with pytest.raises(IndexError, match="there are 5"):
        GeneratedExamples(draw_reverse, ((20, 3), (40, 2)), 0)[5]


def test_tasks_fit_their_lengths():
    tokenizer = ReformerHfByteTokenizer(add_eos_token=True)
    for task in TASKS.values():
        source, target = max(
            (task.draw(np.random.default_rng(seed), task.max_length - 1) for seed in range(500)),
            key=lambda pair: len(pair[0]),
        )
        encoded = encode_pair(source, target, tokenizer, 10000, 10000)
        assert len(encoded["input_ids"]) == task.max_length and len(encoded["labels"]) == task.max_target_length
        assert max(length for length, _ in task.stages) <= task.max_length


def test_encode_pair():
    for tokenizer in (ReformerHfByteTokenizer(), ReformerHfByteTokenizer(add_eos_token=True)):
        encoded = encode_pair("abcdef", "xy", tokenizer, 4, 8)
        assert encoded["input_ids"] == [*tokenizer.encode_bytes(b"abc"), tokenizer.eos_token_id]
        assert encoded["labels"] == [*tokenizer.encode_bytes(b"xy"), tokenizer.eos_token_id]
        assert encoded["attention_mask"] == [1] * 4


def test_metrics():
    labels = np.array([[5, 6, 1], [7, 1, IGNORED]])
    assert token_accuracy(np.array([[5, 9, 1, 0], [7, 1, 3, 3]]), labels) == 4 / 5
    assert token_accuracy(np.array([[5], [7]]), labels) == 2 / 5
    scores = GenerationMetrics(keep_in_memory=True).compute(predictions=["ab", "c"], references=["ab", "d"])
    assert scores["exact_match"] == 0.5


def test_chrf():
    pytest.importorskip("sacrebleu")
    metric = GenerationMetrics(keep_in_memory=True)
    assert metric.compute(predictions=["some text"], references=["some text"])["chrf"] == 100
    assert metric.compute(predictions=["some text"], references=["quiz"])["chrf"] == 0


# The part of sacrebleu that the script uses, with its shapes of texts and references.
SACREBLEU = """
from types import SimpleNamespace

class CHRF:
    def corpus_score(self, hypotheses, references):
        (only,) = references
        assert len(only) == len(hypotheses) and all(isinstance(text, str) for text in (*only, *hypotheses))
        return SimpleNamespace(score=12.345)
"""


@pytest.mark.parametrize("installed", [True, False], ids=["sacrebleu", "none"])
def test_chrf_needs_sacrebleu(trained, installed, tmp_path, monkeypatch):
    """chrF is in metrics and model card if the package is there, and only then; no metric needs a network."""

    def refuse(*args):
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("sacrebleu", "sacrebleu.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    if installed:
        del sys.modules["sacrebleu"], sys.modules["sacrebleu.metrics"]
        (tmp_path / "sacrebleu").mkdir()
        (tmp_path / "sacrebleu" / "__init__.py").touch()
        (tmp_path / "sacrebleu" / "metrics.py").write_text(SACREBLEU)
        monkeypatch.syspath_prepend(tmp_path)
    folder, trainer, metrics = trained
    shutil.copy(folder / "learning_curve.png", tmp_path)
    monkeypatch.setattr(trainer.args, "output_dir", str(tmp_path))
    found = trainer.evaluate()
    assert found.get("eval_chrf") == (12.345 if installed else None)
    assert found["eval_exact_match"] == metrics["eval_exact_match"]
    write_card(trainer, Pairs(trainer.train_dataset, trainer.eval_dataset, "Letters."), found, [], None)
    assert ("chrF, held out" in (tmp_path / "README.md").read_text()) == installed


def test_folder(trained):
    folder, trainer, metrics = trained
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "curve.jsonl"} <= names
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert predictions == metrics["predictions"] and len(predictions) == 6
    assert all(example["source"][:26].islower() for example in predictions)
    equal = [example["prediction"] == example["target"] for example in predictions]
    assert metrics["eval_exact_match"] == np.mean(equal)
    assert json.loads((folder / "all_results.json").read_text())["eval_loss"] == metrics["eval_loss"]
    curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in curve if "eval_token_accuracy" in entry][:2] == [2, 4]


def test_folder_generates(trained):
    folder, trainer, metrics = trained
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, ReformerHfForConditionalGeneration)
    example = metrics["predictions"][0]
    inputs = tokenizer(example["source"], return_tensors="pt")
    assert inputs["input_ids"][0, -1] == tokenizer.eos_token_id
    generated = model.generate(**inputs)
    assert tokenizer.decode(generated[0], skip_special_tokens=True) == example["prediction"]


def test_card(trained):
    _, trainer, metrics = trained
    card = ModelCard.load(trained[0] / "README.md")
    assert card.data.eval_results[0].metric_value == round(metrics["eval_exact_match"], 4)
    assert metrics["predictions"][0]["source"][:20] in card.text and "AutoModelForSeq2SeqLM" in card.text


def test_resume(trained, tmp_path):
    resumed, metrics = run(tmp_path, *CAPITALS, "--max_steps", "2")
    assert resumed.state.global_step == 2
    resumed, metrics = run(tmp_path, *CAPITALS)
    assert resumed.state.global_step == 4
    # The learning rate of the first steps followed from their number.
    assert math.isfinite(metrics["eval_loss"])


def test_own_data(tmp_path):
    rows = [{"question": f"{i} plus {i}", "answer": str(2 * i)} for i in range(30)]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ["--data", str(data), "--source_column", "question", "--target_column", "answer"]
    lengths = ["--max_source_length", "16", "--max_target_length", "4"]
    smoothed = ["--label_smoothing_factor", "0.1", "--generation_num_beams", "2"]
    trainer, metrics = run(tmp_path / "sums", *columns, *lengths, *smoothed)
    assert trainer.label_smoother is not None and trainer.args.train_sampling_strategy == "random"
    assert {example["target"] for example in metrics["predictions"]} <= {row["answer"] for row in rows}
    assert len(metrics["predictions"]) == 3

    tuned, _ = run(tmp_path / "tuned", *columns, *lengths, "--model_name_or_path", str(tmp_path / "sums"))
    assert tuned.model.config.hidden_size == 16
    with pytest.raises(ValueError, match="`max_source_length` is 17.*16 positions"):
        run(tmp_path / "long", *columns, "--max_source_length", "17", "--model_name_or_path", str(tmp_path / "sums"))


def test_label_smoothing_is_not_shifted(trained):
    """The loss of `Seq2SeqTrainer` with label smoothing is that of the labels in their places."""
    from transformers.trainer_pt_utils import LabelSmoother

    folder, trainer, _ = trained
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(2)])
    outputs = trainer.model.eval()(**batch)
    smoothed = LabelSmoother(epsilon=0.0)({"logits": outputs.logits}, batch["labels"])
    assert torch.isclose(smoothed, outputs.loss, rtol=1e-5)


BAD_OPTIONS = (
    (["--task", "riddle"], "`task` is 'riddle'"),
    (["--task", "capitals", "--stages", "64"], "`stages` is '64'"),
    (["--task", "capitals", "--stages", "64:2,8192:1"], "from 2 to 4096"),
    (["--predict_with_generate", "false"], "the metrics need generated targets"),
    (["--data", "missing.csv"], "does not exist"),
    (["--config_overrides", "axis=1"], "field of `ReformerHfEncoderDecoderConfig`"),
)


def test_bad_options(tmp_path):
    for options, message in BAD_OPTIONS:
        with pytest.raises(ValueError, match=message):
            run(tmp_path, *options)
    (tmp_path / "data.csv").write_text("a,b\n" + "1,2\n" * 20)
    with pytest.raises(ValueError, match="have no column 'source'.*columns of \\['a', 'b'\\]"):
        run(tmp_path, "--data", str(tmp_path / "data.csv"))


def test_parse_stages():
    assert parse_stages("64:2, 128:1", 128) == ((64, 2), (128, 1))
    for text in ("64:2,", "1:5", "64:0", "x:1"):
        with pytest.raises(ValueError, match="must be length:examples"):
            parse_stages(text, 128)


def test_capitals_need_room():
    with pytest.raises(ValueError, match="at least 52"):
        draw_capitals(np.random.default_rng(0), 51)
