# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Two ranks (gloo) against one process with the same global batch: losses, gradients, training, checkpoints."""

import json
import signal
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from reformer_hf import ReformerHfConfig, ReformerHfForCausalLM
from reformer_hf.training import last_intact_checkpoint

from .helpers import assert_close, random_model
from .processes import ROOT, run_worker
from .worker import LAYERS, data, gradients

CONFIGS = sorted((ROOT / "examples" / "accelerate_configs").glob("*.yaml"))


def _gradients(folder: Path, **arguments):
    run_worker("gradients", folder, ranks=2, **arguments)
    return load_file(folder / "gradients.safetensors")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Loss and gradients of one process, by the options of the model."""
    found = {}

    def of(**fields):
        key = tuple(fields.items())
        if key not in found:
            folder = tmp_path_factory.mktemp("one")
            gradients(str(folder), "none", **fields)
            found[key] = load_file(folder / "gradients.safetensors")
        return found[key]

    return of


def _equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        # Transformers computes the loss in fp32.
        assert_close(tensor, expected[name], 1e-6, name)


def test_ddp_gradients(expected, tmp_path):
    _equal(_gradients(tmp_path, wrap="ddp"), expected())


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp-unused", "fully_shard", "plan"])
@pytest.mark.parametrize("fields", [{}, {"tied": True}, {"head_chunk": 16}], ids=["plain", "tied", "chunked-head"])
def test_gradients(wrap, fields, expected, tmp_path):
    _equal(_gradients(tmp_path, wrap=wrap, **fields), expected(**fields))
    if wrap == "plan":
        # Saved by two ranks, each with its shard, loaded by one process.
        model = random_model(
            torch.float64,
            attn_layers=LAYERS,
            hash_seed=0,
            tie_word_embeddings=fields.get("tied", False),
            chunk_size_lm_head=fields.get("head_chunk", 0),
        )
        loaded = ReformerHfForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64)
        ids = data(2)
        with torch.no_grad():
            assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def _train(folder, ranks=1, **arguments):
    run_worker("train", folder, ranks, **arguments)
    return json.loads((folder / "losses.json").read_text()), load_file(folder / "weights.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrap", "muon"), [("ddp", False), ("ddp-unused", False), ("plan", False), ("ddp", True), ("plan", True)]
)
def test_trainer_equals_one_process(wrap, muon, tmp_path):
    """Steps with gradients clipped, of the same rows in the same batches."""
    # Muon gives directions with almost no gradient the same length as others: what is rounding there grows.
    steps = 2 if muon else 6
    log, weights = _train(tmp_path / "one", max_steps=steps, batch_size=4, dropout=False, muon=muon)
    options = {
        "ddp": {"ddp_find_unused_parameters": False},
        "ddp-unused": {"ddp_find_unused_parameters": True},
        # Transformers saves no optimizer state of models that it sharded at load time.
        "plan": {"save_only_model": True},
    }
    found_log, found = _train(
        tmp_path / "two", 2, max_steps=steps, batch_size=2, dropout=False, wrap=wrap, muon=muon, **options[wrap]
    )
    # It multiplies matrices in bf16, sharded ones in another order.
    assert found_log["losses"] == pytest.approx(log["losses"], rel=3e-4 if muon else 1e-4)
    for name, weight in found.items():
        # Adam divides by the size of the gradient: where that is rounding, so is the step.
        assert_close(weight, weights[name], 0.15 if muon else 2e-3, name)
    if wrap == "plan":
        checkpoint = last_intact_checkpoint(tmp_path / "two")
        loaded = ReformerHfForCausalLM.from_pretrained(checkpoint)
        for name, weight in loaded.named_parameters():
            assert torch.equal(weight, found[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(stage, tmp_path, monkeypatch):
    """ZeRO-2, and ZeRO-3 without recomputation, against one process."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    options = {"max_steps": 6, "dropout": False, "reversible": stage < 3}
    log, weights = _train(tmp_path / "one", batch_size=4, **options)
    config = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
    config |= {"gradient_accumulation_steps": "auto", "zero_allow_untested_optimizer": True}
    found_log, found = _train(tmp_path / "two", 2, batch_size=2, deepspeed=config, save_strategy="no", **options)
    assert found_log["losses"] == pytest.approx(log["losses"], rel=1e-4)
    for name, weight in found.items():
        assert_close(weight, weights[name], 2e-3, name)


def test_partitioned_parameters():
    """Marked as DeepSpeed marks them."""
    ids = torch.ones(1, 9, dtype=torch.long)
    for fields in ({}, {"reversible": False, "chunk_size_lm_head": 4}, {"reversible": False}):
        model = random_model(**fields).train()
        model.reformer.encoder.layer_norm.weight.ds_id = 0
        if fields == {"reversible": False}:
            model(ids, labels=ids).loss.backward()
            continue
        with pytest.raises(ValueError, match="DeepSpeed ZeRO-3.*use ZeRO-2 or FSDP2, or set `reversible=False`"):
            model(ids, labels=ids)
        with torch.no_grad():
            model(ids)


@pytest.mark.slow
def test_two_ranks_resume(tmp_path):
    log, weights = _train(tmp_path / "whole", 2, max_steps=6)
    _train(tmp_path / "parts", 2, max_steps=6, stop_at=4)
    found_log, found = _train(tmp_path / "parts", 2, max_steps=6, resume=True)
    assert found_log == log
    for name, weight in found.items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.slow
def test_sigterm_stops_both_ranks(tmp_path):
    _train(tmp_path, 2, max_steps=9, kill_at=2, kill_rank=1, signum=signal.SIGTERM)
    assert json.loads((tmp_path / "losses.json").read_text())["steps"] == 3
    assert last_intact_checkpoint(tmp_path).endswith("checkpoint-3")
    assert {path.name for path in (tmp_path / "checkpoint-3").glob("rng_state_*.pth")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }


def test_time_budget(tmp_path):
    """The clock of the first rank decides for all: learning rates and the last step are the same."""
    run_worker("time_budget", tmp_path, 2)
    first, second = (json.loads((tmp_path / f"decisions-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert [share for share, _ in first] == pytest.approx([30 / 60, 59 / 60, 61 / 60])
    assert [stops for _, stops in first] == [False, False, True]


@pytest.mark.slow
def test_killed_rank(tmp_path):
    done = run_worker("train", tmp_path, 2, check=False, timeout=120, max_steps=50, kill_at=5, kill_rank=1)
    assert done.returncode != 0
    checkpoint = last_intact_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.endswith("checkpoint-4")
    assert ReformerHfForCausalLM.from_pretrained(checkpoint).config.attn_layers == tuple(LAYERS)


def test_launch_configs():
    assert [path.stem for path in CONFIGS] == ["ddp", "deepspeed_zero2", "fsdp2"]
    for path in CONFIGS:
        config = load_config_from_file(str(path))
        assert config.num_processes == 2, path
        options = yaml.safe_load(path.read_text())
        wrapped = options.get("fsdp_config", {}).get("fsdp_transformer_layer_cls_to_wrap")
        if wrapped is not None:
            model = ReformerHfForCausalLM(ReformerHfConfig(attn_layers=["lsh"], is_decoder=True))
            assert wrapped in {type(module).__name__ for module in model.modules()}, path


def test_sharding_plan_names_modules():
    for tied in (False, True):
        model = random_model(attn_layers=LAYERS, tie_word_embeddings=tied)
        for name in model._fsdp_plan:
            model.get_submodule(name.replace("*", "0"))
        assert ("lm_head" in model._fsdp_plan) is not tied
