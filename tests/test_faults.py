# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Runs that are killed, that fill the disk, whose loss is not finite: what is left, and that it resumes from there."""

import json
import shutil
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file

from reformer_hf import ReformerHfForCausalLM
from reformer_hf.training import NonFiniteGradientsError, find_corruption, last_intact_checkpoint

from .processes import run_worker

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of seven steps, with dropout and hashing that differ from step to step."""
    folder = tmp_path_factory.mktemp("unbroken")
    run_worker("train", folder, max_steps=7)
    return folder


def _assert_resumes(folder, unbroken):
    """From its last intact checkpoint to the same weights and losses, to the bit."""
    run_worker("train", folder, max_steps=7, resume=True)
    assert (folder / "losses.json").read_text() == (unbroken / "losses.json").read_text()
    found, expected = (load_file(path / "weights.safetensors") for path in (folder, unbroken))
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name


def test_sigkill(unbroken, tmp_path):
    done = run_worker("train", tmp_path, check=False, max_steps=7, kill_at=5)
    assert done.returncode == -signal.SIGKILL
    assert last_intact_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    _assert_resumes(tmp_path, unbroken)


def test_sigterm(unbroken, tmp_path):
    """The step is finished first, whether or not a checkpoint is due."""
    run_worker("train", tmp_path, max_steps=7, kill_at=4, signum=signal.SIGTERM)
    assert json.loads((tmp_path / "losses.json").read_text())["steps"] == 5
    assert last_intact_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    _assert_resumes(tmp_path, unbroken)


def test_truncated_checkpoint(unbroken, tmp_path):
    for step in (4, 6):
        shutil.copytree(unbroken / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    weights = tmp_path / "checkpoint-6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert find_corruption(tmp_path / "checkpoint-6") == "`model.safetensors` is truncated"
    assert last_intact_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    _assert_resumes(tmp_path, unbroken)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits of file sizes")
def test_full_disk(unbroken, tmp_path):
    """A file that may not grow fails as one on a full disk does."""
    shutil.copytree(unbroken / "checkpoint-4", tmp_path / "checkpoint-4")
    done = run_worker("train", tmp_path, check=False, max_steps=7, resume=True, file_limit=50_000)
    assert done.returncode != 0 and "File too large" in done.stderr
    assert (tmp_path / "checkpoint-6").is_dir()
    assert last_intact_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    _assert_resumes(tmp_path, unbroken)


def test_non_finite_loss(unbroken, tmp_path):
    done = run_worker("train", tmp_path, check=False, max_steps=7, spoil_at=5)
    assert done.returncode == 1
    assert (
        NonFiniteGradientsError.__name__ in done.stderr
        and "step 6" in done.stderr
        and "`learning_rate`" in done.stderr
    )
    checkpoint = last_intact_checkpoint(tmp_path)
    assert checkpoint == str(tmp_path / "checkpoint-4")
    assert all(weight.isfinite().all() for weight in ReformerHfForCausalLM.from_pretrained(checkpoint).parameters())
    _assert_resumes(tmp_path, unbroken)
