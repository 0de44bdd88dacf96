# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Which checkpoint is intact."""

import json

import pytest
import torch
from safetensors.torch import save_file

from reformer_hf.training import find_corruption, last_intact_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    """What `Trainer` writes, in small, next to an earlier one."""
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"weight": torch.zeros(9)}, folder / "model.safetensors")
        for name in ("optimizer.bin", "scheduler.pt", "rng_state.pth"):
            torch.save({"state": torch.zeros(9)}, folder / name)
        (folder / "trainer_state.json").write_text('{"global_step": 10}')
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    return tmp_path / "checkpoint-10"


def test_intact_checkpoint(checkpoint):
    assert find_corruption(checkpoint) is None
    assert last_intact_checkpoint(checkpoint.parent) == str(checkpoint)


def test_truncated_file(checkpoint):
    for name in ("model.safetensors", "optimizer.bin", "scheduler.pt", "rng_state.pth"):
        path = checkpoint / name
        content = path.read_bytes()
        for kept in (0, 40, -1):
            path.write_bytes(content[:kept])
            assert find_corruption(checkpoint) == f"`{name}` is truncated", kept
            assert last_intact_checkpoint(checkpoint.parent) == str(checkpoint.with_name("checkpoint-9")), name
        path.write_bytes(content)
        assert find_corruption(checkpoint) is None, name


def test_trainer_state_is_written_last(checkpoint):
    path = checkpoint / "trainer_state.json"
    for text in ('{"global_step":', "", None):
        path.unlink() if text is None else path.write_text(text)
        assert find_corruption(checkpoint) == "`trainer_state.json` is missing or truncated", text


def test_missing_shard(checkpoint):
    index = {"weight_map": {"weight": "model.safetensors", "other": "model-2.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_corruption(checkpoint) == "`model-2.safetensors` is missing"


def test_incomplete_checkpoint(checkpoint):
    (checkpoint / "checkpoint-is-incomplete.txt").touch()
    assert find_corruption(checkpoint) == "`checkpoint-is-incomplete.txt` exists"


def test_no_checkpoint(tmp_path):
    assert last_intact_checkpoint(tmp_path) is None
    assert last_intact_checkpoint(tmp_path / "nowhere") is None
