# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The training script, run in this process on a small text: what it writes, measures, resumes and refuses."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from byte_data import PAD_ID, count_bytes
from huggingface_hub import ModelCard
from train_causal_lm import ModelArguments, build_config, main, sum_nll
from training_run import parse_overrides
from transformers import AutoModelForCausalLM, AutoTokenizer

from reformer_hf import ReformerHfByteTokenizer, ReformerHfConfig, ReformerHfForCausalLM
from reformer_hf.training import CausalCollator, MuonWithAdamW

from ..helpers import assert_refused

OPTIONS = """
    --sequence_length 64 --attn_layers local,lsh --hidden_size 16 --num_attention_heads 2 --attention_head_size 8
    --feed_forward_size 16 --local_attn_chunk_length 8 --lsh_attn_chunk_length 8 --num_buckets 4 --num_hashes 2
    --max_steps 4 --save_steps 2 --eval_steps 2 --logging_steps 1 --per_device_train_batch_size 2
    --validation_fraction 0.1 --sample_length 16 --use_cpu --disable_tqdm true
"""


def run(data: Path, output_dir: Path, *options: str):
    return main([*OPTIONS.split(), "--data", str(data), "--output_dir", str(output_dir), *options])


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "book.txt"
    path.write_text("".join(f"Line {i} says {i * i}.\n" for i in range(200)))
    return path


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("run")
    return output_dir, *run(text, output_dir)


def test_folder_is_complete(trained):
    output_dir, trainer, metrics = trained
    names = {path.name for path in output_dir.iterdir()}
    assert names >= {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "README.md",
        "loss_curve.png",
        "all_results.json",
        "checkpoint-2",
        "checkpoint-4",
    }
    assert (output_dir / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((output_dir / "all_results.json").read_text())
    for name in ("eval_bits_per_byte", "bigram_bits_per_byte", "train_loss"):
        assert results[name] == metrics[name]


def test_folder_loads(trained):
    output_dir, trainer, _ = trained
    model = AutoModelForCausalLM.from_pretrained(output_dir)
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    assert isinstance(model, ReformerHfForCausalLM)
    assert isinstance(tokenizer, ReformerHfByteTokenizer)
    assert model.generation_config.do_sample
    inputs = tokenizer("Line 7 says", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, trainer.model.eval()(**inputs).logits)


def test_model_card(trained):
    output_dir, trainer, metrics = trained
    card = ModelCard.load(output_dir / "README.md")
    (result,) = card.data.eval_results
    assert result.metric_value == round(metrics["eval_bits_per_byte"], 4)
    data = trainer.train_dataset, trainer.eval_dataset
    assert all(len(split) > 1 for split in data)
    for stated in (
        f"{metrics['eval_bits_per_byte']:.4f}",
        f"{metrics['bigram_bits_per_byte']:.4f}",
        "The file `book.txt`",
        "the last 10.0% of the stream",
        "| `num_hashes` | `2` |",
        "| `learning_rate` | `0.001` |",
        metrics["sample"],
    ):
        assert stated in card.text


def test_dense_model(text, tmp_path):
    """Trained by the same script, with the same number of layers."""
    trainer, metrics = run(text, tmp_path, "--architecture", "llama")
    assert len(trainer.model.model.layers) == 2 and trainer.model.config._attn_implementation == "sdpa"
    assert math.isfinite(metrics["eval_bits_per_byte"])
    assert "Llama" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="'reformer' or 'llama'"):
        run(text, tmp_path, "--architecture", "gpt")


def test_bits_per_byte(trained, text):
    _, trainer, metrics = trained
    held_out = trainer.eval_dataset["input_ids"][:]
    nats = 0.0
    for sequence in held_out:
        sequence = sequence[sequence != PAD_ID].long()[None]
        with torch.no_grad():
            log_probs = trainer.model.eval()(sequence).logits.double().log_softmax(-1)
        nats -= log_probs[0, :-1].gather(1, sequence[0, 1:, None]).sum().item()
    num_bytes = sum(count_bytes(sequence[1:].numpy()) for sequence in held_out)
    assert num_bytes == round(len(text.read_bytes()) * 0.1)
    assert metrics["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-4)


def test_resume(trained, text, tmp_path):
    output_dir, trainer, _ = trained
    shutil.copytree(output_dir / "checkpoint-2", tmp_path / "checkpoint-2")
    resumed, _ = run(text, tmp_path)
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3, 4]
    for (name, weight), expected in zip(resumed.model.named_parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(weight, expected), name


def test_resume_with_muon(text, tmp_path):
    options = ("--muon_learning_rate", "0.02", "--num_hashes", "1", "--eval_strategy", "no", "--sample_length", "0")
    whole, _ = run(text, tmp_path / "whole", *options)
    start = ReformerHfForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-2").state_dict()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed, _ = run(text, tmp_path / "resumed", *options)
    groups = resumed.optimizer.param_groups
    assert [group["initial_lr"] for group in groups] == [0.02] + [1e-3] * (len(groups) - 1)
    for (name, weight), expected in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(weight, expected), name
        assert not torch.equal(weight, start[name]), name
    assert sum(len(group["params"]) for group in groups) == len(list(whole.model.parameters()))
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "| `optimizer` | `MuonWithAdamW` |" in card and "| `learning_rates` | `(0.02, 0.001)` |" in card


def test_optimizer_by_default(trained, text, tmp_path):
    """Muon for a new model; AdamW for one that is fine-tuned, or that the options say so of."""
    short = ("--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no", "--sample_length", "0")
    runs = {
        "new": ((), MuonWithAdamW),
        "without": (("--muon_learning_rate", "0"), torch.optim.AdamW),
        "chosen": (("--optim", "adagrad"), torch.optim.Adagrad),
        "fine-tuned": (("--model_name_or_path", str(trained[0])), torch.optim.AdamW),
    }
    for name, (options, expected) in runs.items():
        trainer, _ = run(text, tmp_path / name, *short, *options)
        assert type(trainer.optimizer.optimizer) is expected, name
    trainer, _ = run(text, tmp_path / "deepspeed", *short)
    trainer.is_deepspeed_enabled, trainer.optimizer = True, None
    with pytest.raises(ValueError, match="DeepSpeed flattens weights"):
        trainer.create_optimizer()


def test_overwrite(trained, text, tmp_path):
    shutil.copytree(trained[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    anew, _ = run(text, tmp_path, "--overwrite_output_dir", "--max_steps", "1", "--save_strategy", "no")
    assert anew.state.global_step == 1
    assert not (tmp_path / "checkpoint-4").exists()


def test_fine_tuning(trained, text, tmp_path):
    output_dir, trainer, _ = trained
    options = ["--model_name_or_path", str(output_dir), "--learning_rate", "0", "--max_steps", "1"]
    tuned, _ = run(text, tmp_path, *options, "--num_hashes", "3")
    assert tuned.model.config.num_hashes == 3
    for weight, expected in zip(tuned.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(weight, expected)
    with pytest.raises(ValueError, match="reads at most 64"):
        run(text, tmp_path, *options, "--sequence_length", "128")


def test_sum_nll():
    torch.manual_seed(0)
    batch = CausalCollator(PAD_ID)([{"input_ids": ids} for ids in ([5, 6, 7, 8], [5, 6])])
    logits = torch.randn(2, 4, 260)
    log_probs = logits.log_softmax(-1)
    expected = [-(log_probs[0, 0, 6] + log_probs[0, 1, 7] + log_probs[0, 2, 8]), -log_probs[1, 0, 6]]
    torch.testing.assert_close(sum_nll((logits,), batch["labels"]), torch.stack(expected))


def test_config_from_options():
    config = build_config(
        ModelArguments(
            sequence_length=256,
            attn_layers="local, lsh",
            num_buckets="4,8",
            config_overrides="axial_pos_shape=[32,8],hidden_act=gelu,wrap_chunks=false",
        )
    )
    assert (config.attn_layers, config.num_buckets) == (("local", "lsh"), [4, 8])
    assert (config.axial_pos_shape, config.hidden_act, config.wrap_chunks) == ((32, 8), "gelu", False)
    assert (config.max_position_embeddings, config.is_decoder) == (256, True)


def test_bad_config_overrides():
    bad = {overrides: (overrides, "`config_overrides` contains") for overrides in ("no_such_field=1", "hidden_act")}
    assert_refused(lambda overrides: parse_overrides(overrides, ReformerHfConfig), bad)


def test_bad_input(text, tmp_path):
    with pytest.raises(ValueError, match="shorter than one sequence"):
        run(text, tmp_path, "--max_bytes", "60")
    with pytest.raises(ValueError, match="do not exist"):
        run(tmp_path / "missing.txt", tmp_path)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        run(text, tmp_path, "--resume_from_checkpoint", "last")
    with pytest.raises(ValueError, match="not a folder"):
        run(text, tmp_path, "--resume_from_checkpoint", str(tmp_path / "checkpoint-9"))
    with pytest.raises(ValueError, match="`attn_layers` holds 'dense'"):
        run(text, tmp_path, "--attn_layers", "dense")
