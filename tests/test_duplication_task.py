# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The experiment from which defaults were chosen: its data, its grid, and runs that are not done twice."""

import json
from contextlib import nullcontext

import torch

from benchmarks import duplication_task
from benchmarks.duplication_task import LENGTH, Run, first_below, grid, main, sequences, table, train


def test_sequences():
    input_ids, labels = sequences(3, torch.Generator().manual_seed(0))
    first, second = input_ids.chunk(2, dim=1)
    assert input_ids.shape == (3, LENGTH) and torch.equal(first, second)
    assert (first[:, 0] == 0).all() and (first[:, 1:] > 0).all()
    scored = labels != -100
    assert scored.sum(1).tolist() == [LENGTH // 2 - 1] * 3
    assert torch.equal(labels[scored], second[:, 1:].flatten())


def test_grid_has_no_run_twice():
    runs = grid(10, [0, 1], [1, 2])
    assert len(set(runs)) == len(runs) == 2 + 6 * 2 * 2 * 2
    assert all(run.num_buckets % 2 == 0 for run in runs if run.pattern != "full")


def test_first_below():
    assert first_below([1.0] * 12 + [0.0] * 10, 0.15) == 21
    assert first_below([1.0] * 30, 0.5) is None


def test_runs_are_resumed(tmp_path, monkeypatch):
    out, tab = tmp_path / "runs.jsonl", tmp_path / "runs.md"
    run = Run("window", window=32, num_buckets=8, num_hashes=2, steps=2)
    result = train(run)
    assert set(result["accuracy"]) == {"1", "2", "4", "8", "full"} and result["loss"] > 1
    out.write_text(json.dumps(result) + "\n")
    monkeypatch.setattr(duplication_task, "grid", lambda *args: [run])
    monkeypatch.setattr(duplication_task, "ProcessPoolExecutor", lambda *args, **kwargs: nullcontext())
    main(["--out", str(out), "--table", str(tab), "--steps", "2"])
    assert out.read_text().splitlines() == [json.dumps(result)]
    assert tab.read_text() == table([result])
    assert "| window | counted | 32 | 8 | 2 | 0 | 2 |" in tab.read_text()
