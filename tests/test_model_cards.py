# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Model cards say what a run was, with metadata that the Hub reads."""

from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import Trainer, TrainingArguments

from reformer_hf import ReformerHfConfig, ReformerHfForCausalLM
from reformer_hf.hub import EVAL_RESULTS, Metric, RunReport, write_model_card

REPORT = RunReport(
    summary="A small model.",
    pipeline_tag="text-generation",
    data="Numbers from 0 to 9.",
    metric=Metric("bits_per_byte", "Bits per byte", 1.5),
    results={"Baseline": "3.0"},
    usage='AutoModel.from_pretrained("{model_id}")',
    command="python train.py --steps 2",
    sample="0 1 2",
)


@pytest.fixture
def trainer(tmp_path):
    config = ReformerHfConfig(
        attn_layers=["local"], hidden_size=16, num_attention_heads=2, attention_head_size=8, vocab_size=11,
        is_decoder=True, max_position_embeddings=16, local_attn_chunk_length=4, bos_token_id=None, eos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    args = TrainingArguments(
        tmp_path / "my-model", hub_model_id="me/my-model", max_steps=2, learning_rate=0.125, use_cpu=True
    )
    data = [{"input_ids": list(range(10)), "labels": list(range(10))}] * 2
    trainer = Trainer(ReformerHfForCausalLM(config), args, train_dataset=data)
    trainer.train()
    return trainer


def test_card_of_a_run(trainer, tmp_path):
    path = write_model_card(trainer, REPORT)
    assert path == tmp_path / "my-model" / "README.md"
    card = ModelCard.load(path)
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("bits_per_byte", 1.5, "validation")
    assert "| Bits per byte, held out | 1.5000 |\n| Baseline | 3.0 |\n| Training steps | 2 |" in card.text
    number = f"{trainer.model.num_parameters():,}"
    for said in (
        f"It has {number} parameters and reads at most 16 tokens. Trained from random weights.",
        "| Minutes of training | 0.",
        "| Peak memory | ",
        "Numbers from 0 to 9.",
        "python train.py --steps 2",
        "| `learning_rate` | `0.125` |",
        "| `attn_layers` | `('local',)` |",
        'AutoModel.from_pretrained("me/my-model")',
        "Its output may be wrong, offensive",
        "0 1 2",
    ):
        assert said in card.text
    assert not (path.parent / EVAL_RESULTS).exists()


def test_results_on_a_dataset_of_the_hub(trainer):
    path = write_model_card(trainer, replace(REPORT, dataset_id="me/numbers", base_model="you/base", seconds=90))
    card = ModelCard.load(path)
    assert card.data.datasets == ["me/numbers"] and card.data.base_model == "you/base"
    assert "Fine-tuned from `you/base`." in card.text and "| Minutes of training | 1.5 |" in card.text
    (entry,) = yaml.safe_load((path.parent / EVAL_RESULTS).read_text())
    assert entry["dataset"] == {"id": "me/numbers", "task_id": "default"} and entry["value"] == 1.5


def test_missing_figure(trainer):
    with pytest.raises(ValueError, match=r"\['curve.png'\]"):
        write_model_card(trainer, replace(REPORT, figures={"Curve": "curve.png"}))
