# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The experiment from which defaults were chosen."""

from experiments.lsh_patterns import EXPERIMENT, grid, report
from experiments.records import read_records
from experiments.runner import execute


def test_grid_has_no_run_twice():
    runs = grid(10, (0, 1), (1, 2))
    assert len(set(runs)) == len(runs) == 2 + 6 * 2 * 2 * 2
    assert all(run.num_buckets % 2 == 0 for run in runs if run.pattern != "full")


def test_row(tmp_path):
    (run,) = EXPERIMENT.quick
    assert execute(EXPERIMENT, run, tmp_path / "records.jsonl", tmp_path, threads=1)
    (record,) = read_records(tmp_path / "records.jsonl")
    assert set(record["result"]["accuracy"]) == {"1", "2", "4", "8", "full"}
    table = report([record], tmp_path)
    assert "| window | counted | 32 | 8 | 2 | 0 | 3 |" in table
