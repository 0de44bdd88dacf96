# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The data of the experiments, and each experiment with its quick settings."""

import pytest
import torch

from experiments import ablations, duplication, lsh_patterns, quality, recall, text_defaults
from experiments.runner import main
from experiments.text import load_text

EXPERIMENTS = [module.EXPERIMENT for module in (ablations, duplication, lsh_patterns, quality, recall, text_defaults)]


def test_duplicated_sequences():
    run = duplication.Run(hashes=1, length=64)
    batch = duplication.draw(run, 3, seed=0)
    first, second = batch["input_ids"].chunk(2, dim=1)
    assert first.shape == (3, 32) and torch.equal(first, second)
    assert (first[:, 0] == 0).all() and (first[:, 1:] > 0).all()
    scored = batch["labels"] != -100
    assert torch.equal(batch["labels"][scored], second[:, 1:].flatten())


def test_stretched_positions():
    """The query of a symbol has the same symbol of the shorter sequence as the symbol itself."""
    table = torch.arange(16)[:, None]
    stretched = duplication.stretch_positions(table, 64).flatten()
    queries, originals = stretched[32:63], stretched[1:32]
    assert torch.equal(queries - 8, originals - 1) and set((originals - 1).tolist()) == set(range(7))
    assert stretched[0] == 0 and len(stretched) == 64
    longest = duplication.Run(1, length=16384, steps=300, seed=2)
    assert longest.shorter == duplication.Run(1, length=4096, seed=2)
    assert longest.shorter.shorter == duplication.Run(1, length=1024, seed=2)
    assert duplication.Run(1).shorter is None and duplication.Run(1, length=64).shorter is None


def test_recalled_pairs():
    for length in (64, 256):
        _assert_recalled_pairs(length)


def _assert_recalled_pairs(length):
    batch = recall.draw(recall.Run("reformer", length), 2, seed=0)
    num_ids = 2 * recall.NUM_PAIRS
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        pairs = dict(zip(ids[1:num_ids:2], ids[:num_ids:2], strict=True))
        assert len(ids) == length and len(pairs) == recall.NUM_PAIRS
        assert set(pairs) <= set(recall.KEYS) and set(pairs.values()) <= set(recall.VALUES)
        asked = [i for i, label in enumerate(labels) if label != -100]
        assert {ids[i - 1] for i in asked} == set(pairs)
        assert all(pairs[ids[i - 1]] == ids[i] == labels[i] for i in asked)
        assert set(ids[num_ids:-num_ids]) <= set(recall.FILLER)


def test_longer_recall():
    """A model with the weights of one for shorter sequences computes the same for them."""
    torch.manual_seed(0)
    short, long = recall.Run("local", 256, width=64), recall.Run("local", 1024, width=64)
    model, longer = recall.build(short).eval(), recall.build(long).eval()
    recall.load_shorter(longer, model.state_dict())
    ids = recall.draw(short, 1, seed=0)["input_ids"]
    torch.testing.assert_close(longer(input_ids=ids).logits, model(input_ids=ids).logits)


def test_text(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(100)))
    train, held_out = load_text(str(tmp_path / "text"))
    assert train.tolist() + held_out.tolist() == list(range(100)) and len(held_out) == 5
    with pytest.raises(ValueError, match="no such file"):
        load_text(str(tmp_path / "missing"))


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_quick(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.runner.SCRATCH", tmp_path)
    main(experiment, ["--quick", "--jobs", "1"])
    folder = tmp_path / "quick" / experiment.name / "report"
    lines = (folder / "report.md").read_text().splitlines()
    assert len(lines) >= 2 + len(experiment.quick) and all(line.startswith("|") for line in lines if line)
