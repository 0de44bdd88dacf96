# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The classification script on tiny data: what it writes, measures, resumes and refuses."""

import csv
import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from train_classification import ClassificationMetrics, main
from transformers import pipeline

from reformer_hf import ReformerHfForSequenceClassification

SMALL = "hidden_size=16,num_attention_heads=2,hidden_dropout_prob=0.0"
REFORMER = (
    f'{SMALL},attn_layers=["local","lsh"],attention_head_size=8,feed_forward_size=16,local_attn_chunk_length=8,'
    "lsh_attn_chunk_length=8"
)
OPTIONS = """
    --max_length 64 --num_train 40 --num_held_out 20 --min_tokens 10 --max_tokens 60 --max_steps 4 --eval_steps 2
    --save_steps 2 --logging_steps 1 --per_device_train_batch_size 8 --use_cpu --disable_tqdm true
"""


def run(output_dir, *options):
    return main([*OPTIONS.split(), "--output_dir", str(output_dir), *options])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("listops")
    return folder, *run(folder, "--config_overrides", REFORMER)


def test_folder(trained):
    folder, trainer, metrics = trained
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "curve.jsonl"} <= names
    for figure in ("confusion_matrix.png", "learning_curve.png"):
        assert (folder / figure).read_bytes().startswith(b"\x89PNG")
    model = ReformerHfForSequenceClassification.from_pretrained(folder)
    assert not model.config.is_decoder and model.config.id2label[9] == "9"
    found = trainer.predict(trainer.eval_dataset).predictions.argmax(-1)
    right = np.array(trainer.eval_dataset["labels"])
    assert metrics["eval_accuracy"] == (found == right).mean()
    assert json.loads((folder / "all_results.json").read_text())["eval_accuracy"] == metrics["eval_accuracy"]


def test_curve(trained):
    entries = [json.loads(line) for line in (trained[0] / "curve.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "eval_accuracy" in entry] == [2, 4]
    seconds = [entry["seconds"] for entry in entries]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_card(trained):
    card = ModelCard.load(trained[0] / "README.md")
    result = card.data.eval_results[0]
    assert (result.metric_type, result.metric_value) == ("accuracy", round(trained[2]["eval_accuracy"], 4))
    for part in ("confusion_matrix.png", "Accuracy of the best guess from the first operator", "pipeline("):
        assert part in card.text


def test_pipeline(trained):
    folder, trainer, _ = trained
    text = "[MAX 4 [MIN 8 2 ] 0 ]"
    found = pipeline("text-classification", str(folder))(text)[0]
    with torch.no_grad():
        logits = trainer.model.eval()(**trainer.processing_class(text, return_tensors="pt")).logits
    assert found["label"] == str(logits.argmax().item())


def test_csv_and_bert(tmp_path):
    """A file with names of classes, and the dense model."""
    with (tmp_path / "data.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["review", "stars"])
        rows.writerows([[f"Number {i} is fine.", ("bad", "good")[i % 2]] for i in range(40)])
    options = ["--data", str(tmp_path / "data.csv"), "--text_column", "review", "--label_column", "stars"]
    small = f"{SMALL},num_hidden_layers=1,intermediate_size=16"
    trainer, metrics = run(tmp_path / "out", *options, "--architecture", "bert", "--config_overrides", small)
    assert trainer.model.config.id2label == {0: "bad", 1: "good"}
    assert len(trainer.train_dataset) == 36 and len(trainer.eval_dataset) == 4
    assert 0 <= metrics["baseline_majority"] <= 1


def test_time_budget(tmp_path):
    """The run ends with its time, at a learning rate of zero."""
    options = [x for x in OPTIONS.split() if x not in ("--max_steps", "4")]
    budget = ["--max_minutes", "0.01", "--cpu_time", "true", "--config_overrides", REFORMER]
    trainer, _ = main([*options, "--output_dir", str(tmp_path), *budget])
    assert trainer.state.global_step > 1
    assert 0.6 <= trainer.curve.spent()["cpu_seconds"] < 12
    assert trainer.lr_scheduler.get_last_lr()[0] < 1e-4


BAD_OPTIONS = (
    (["--architecture", "gpt"], "`architecture` is 'gpt', but must be one of"),
    (["--data", "missing.csv"], "'missing.csv' does not exist"),
    (["--max_tokens", "100"], "`max_tokens` is 100 and `max_length` is 64"),
    (["--config_overrides", "width=3"], "each entry must be key=value"),
    (["--max_minutes", "1"], "give minutes above 0, no `max_steps`"),
)


def test_bad_options(tmp_path):
    for options, message in BAD_OPTIONS:
        with pytest.raises(ValueError, match=message):
            run(tmp_path, *options)
    (tmp_path / "data.csv").write_text("a,b\n" + "1,2\n" * 20)
    with pytest.raises(ValueError, match="have no column 'label'.*columns of \\['a', 'b'\\]"):
        run(tmp_path, "--data", str(tmp_path / "data.csv"))


def test_metrics():
    metric = ClassificationMetrics(keep_in_memory=True)
    found = metric.compute(predictions=[0, 0, 1, 2], references=[0, 1, 1, 1])
    # F1 of the classes 0, 1 and 2: 2/3, 1/2 and 0.
    assert found == {"accuracy": 0.5, "macro_f1": pytest.approx((2 / 3 + 1 / 2) / 3)}
