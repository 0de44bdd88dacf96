# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Experiments run each of their settings once, and a training that is killed ends as without."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from benchmarks.pages import write_tables
from experiments.records import append_record, read_records
from experiments.runner import (
    Experiment,
    execute,
    finished,
    label,
    override,
    run_all,
    scratch_of,
    write_report,
)
from experiments.training import FINAL

from ..processes import ROOT

# Trains a toy model with dropout, a checkpoint after each step, and prints what it found.
TRAIN = """
import json, sys, time
from pathlib import Path
import torch
from torch import nn
from experiments.training import Schedule, train

class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    def forward(self, x):
        time.sleep(0.01)
        self.loss = self.layers(x).square().mean()
        return self

def batches(step):
    return {"x": torch.randn(3, 4, generator=torch.Generator().manual_seed(step))}

torch.manual_seed(0)
model, schedule = Toy(), Schedule(steps=120, warmup=5, eval_every=10)
evaluate = lambda model: {"weight": -model.layers[0].weight.sum().item()}
found = train(model, batches, evaluate, schedule, Path(sys.argv[1]), checkpoint_seconds=0)
print(json.dumps([[x for name, x in entry.items() if name != "seconds"] for entry in found["curve"]]))
"""


@dataclass(frozen=True)
class Run:
    number: int
    seed: int = 0


def square(run, scratch):
    assert scratch.is_dir()
    return {"square": run.number**2}


def squares(records, folder):
    (folder / "figure.txt").write_text("drawn")
    return "".join(f"{record['settings']['number']}: {record['result']['square']}\n" for record in records)


EXPERIMENT = Experiment("squares", [Run(2), Run(3), Run(3, seed=1)], square, squares)


def test_records_survive_incomplete_lines(tmp_path):
    path = tmp_path / "records.jsonl"
    append_record(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2, "b')
    assert read_records(path) == [{"a": 1}]
    append_record(path, {"a": 3})
    assert read_records(path) == [{"a": 1}, {"a": 3}]
    assert read_records(tmp_path / "missing.jsonl") == []


def test_each_setting_runs_once(tmp_path):
    results, scratch = tmp_path / "squares.jsonl", tmp_path / "scratch"
    assert execute(EXPERIMENT, Run(3), results, scratch, threads=1)
    assert not execute(EXPERIMENT, Run(3), results, scratch, threads=1)
    run_all(EXPERIMENT, EXPERIMENT.runs, results, scratch, jobs=1, threads=1)
    records = read_records(results)
    assert sorted((r["settings"]["number"], r["settings"]["seed"], r["result"]["square"]) for r in records) == [
        (2, 0, 4),
        (3, 0, 9),
        (3, 1, 9),
    ]
    assert {"commit", "cpu", "torch", "threads"} <= records[0]["machine"].keys()
    assert len(finished(results)) == 3
    assert [label(run) for run in EXPERIMENT.runs] == ["number=2", "number=3", "number=3,seed=1"]


def test_a_claimed_setting_is_skipped(tmp_path):
    """Another process holds the lock of the run."""
    scratch = scratch_of("squares", Run(2), tmp_path)
    scratch.mkdir(parents=True)
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); "
    with subprocess.Popen(
        [sys.executable, "-c", hold + "time.sleep(60)", scratch / "lock"], stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        assert not execute(EXPERIMENT, Run(2), tmp_path / "squares.jsonl", tmp_path, threads=1)
        process.kill()
    assert execute(EXPERIMENT, Run(2), tmp_path / "squares.jsonl", tmp_path, threads=1)


def before(run):
    return Run(run.number - 1, run.seed) if run.number > 2 else None


def follow(run, scratch):
    (scratch / FINAL).touch()
    return {}


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_warm_starts_wait(jobs, tmp_path):
    """Each run follows the one before it, in whatever order they are listed. Without 4, only 5 and 6 fail."""
    runs = [Run(number, seed) for number in (6, 5, 3, 2) for seed in (0, 1)]
    experiment = Experiment("numbers", runs, follow, squares, warm_start=before)
    with pytest.raises(RuntimeError, match="4 runs failed.*number=6"):
        run_all(experiment, runs, tmp_path / "records.jsonl", tmp_path, jobs, threads=1)
    settings = [record["settings"] for record in read_records(tmp_path / "records.jsonl")]
    assert [each["number"] for each in sorted(settings, key=lambda each: each["seed"])] == [2, 3, 2, 3]
    with pytest.raises(FileNotFoundError, match="number=5 starts from the weights of number=4"):
        execute(experiment, Run(5), tmp_path / "records.jsonl", tmp_path, threads=1)


def test_changed_settings():
    assert override(Run(2), ["seed=3", "number=4"]) == Run(4, 3)
    with pytest.raises(ValueError, match="`--set sed=3` names no setting: .* number, seed"):
        override(Run(2), ["sed=3"])


def test_report_comes_from_records_alone(tmp_path):
    results = tmp_path / "squares.jsonl"
    assert write_report(EXPERIMENT, results, tmp_path / "report") is None
    append_record(results, {"settings": {"number": 5, "seed": 0}, "result": {"square": 25}})
    path = write_report(EXPERIMENT, results, tmp_path / "report")
    assert path.read_text() == "5: 25\n" and (path.parent / "figure.txt").exists()


def _start(folder):
    folder.mkdir()
    return subprocess.Popen([sys.executable, "-c", TRAIN, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_training_continues(tmp_path):
    """Killed in the middle, it has the same curve in the end as without, bit for bit."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    expected = json.loads(_start(undisturbed).communicate()[0])
    process = _start(killed)
    while not (killed / "checkpoint.pt").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "model.pt").exists()
    killed.rename(tmp_path / "moved")
    resumed = subprocess.run(
        [sys.executable, "-c", TRAIN, tmp_path / "moved"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert len(expected) == 12 and json.loads(resumed.stdout) == expected


def test_pages_show_the_tables(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- table 2 of x -->\nold\n<!-- end -->\nb\n<!-- table 1 of x -->\n<!-- end -->\n")
    for _ in range(2):
        write_tables(page, "x", "| 1 |\n\n| 2 |\n")
        expected = "a\n<!-- table 2 of x -->\n| 2 |\n<!-- end -->\nb\n<!-- table 1 of x -->\n| 1 |\n<!-- end -->\n"
        assert page.read_text() == expected
