# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""A model that has learned to copy needs its LSH layer: neither random buckets nor the other layers replace it."""

import pytest
import torch
from copying import LENGTH, copies, main
from transformers import AutoModelForCausalLM


def test_copies():
    first, again = copies(3, seed=1), copies(3, seed=1)
    for row, other in zip(first, again, strict=True):
        half, copy = row["input_ids"].split(LENGTH // 2)
        assert torch.equal(half, copy) and half[0] == 0 and (half[1:] > 0).all()
        scored = row["labels"] != -100
        assert scored.nonzero()[:, 0].tolist() == list(range(LENGTH // 2 + 1, LENGTH))
        assert torch.equal(row["labels"][scored], copy[1:]) and torch.equal(row["input_ids"], other["input_ids"])
    assert len({tuple(row["input_ids"].tolist()) for row in first}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("lsh_pattern", ["chunk", "window"])
def test_lsh_layer_matters(lsh_pattern, tmp_path):
    results = main(["--output_dir", str(tmp_path), "--lsh_pattern", lsh_pattern])
    accuracy = {name: metrics["eval_accuracy"] for name, metrics in results.items()}
    assert accuracy["intact"] > 0.95 and accuracy["full"] > 0.95
    # What buckets contain at random.
    assert accuracy["random"] < 0.5
    # One of 127 symbols.
    assert accuracy["skip"] < 0.03
    assert results["skip"]["eval_loss"] > 4 > results["intact"]["eval_loss"] + 3
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.lsh_pattern == lsh_pattern
