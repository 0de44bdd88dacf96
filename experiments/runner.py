# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Run the settings of an experiment, each of them once.

An experiment is a module with settings (frozen dataclasses, seed included), a function that runs one of them, and a
function that draws figures and writes a table from the records alone:

    @dataclass(frozen=True)
    class Run:
        hashes: int
        seed: int = 0

    def train_and_evaluate(run: Run, scratch: Path) -> dict:
        …  # `experiments.training.train` continues from its last checkpoint in `scratch`

    def report(records: list[Record], folder: Path) -> str:
        …  # draws figures into the folder and returns Markdown

    EXPERIMENT = Experiment("hashes", [Run(1), Run(2)], train_and_evaluate, report, quick=[Run(1)])

    if __name__ == "__main__":
        main(EXPERIMENT)

`python -m experiments.hashes` then runs what is missing in `experiments/results/hashes.jsonl`, and draws the report
anew. A run that was killed continues from its last checkpoint.
"""

import argparse
import fcntl
import fnmatch
import hashlib
import json
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.machine import describe_machine

from .records import Record, append_record, read_records

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
REPORTS = ROOT / "docs" / "results"
SCRATCH = ROOT / "outputs" / "experiments"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experiment:
    """
    An experiment.

    Args:
        name: Name of the module, of the file of records and of the folder of the report.
        runs: The settings, in the order in which they run: those that others are warm-started from come first.
        train_and_evaluate: Runs one of the settings and returns what it found, in types of JSON.
        report: Draws figures of all records into a folder and returns Markdown.
        quick: Settings that take a minute in total, for `--quick`.
    """

    name: str
    runs: list[Any]
    train_and_evaluate: Callable[[Any, Path], dict[str, Any]]
    report: Callable[[list[Record], Path], str]
    quick: list[Any] = field(default_factory=list)


def label(run: Any) -> str:
    """Return the settings of a run that differ from their defaults, such as `hashes=2,seed=1`."""
    defaults = {name: each.default for name, each in run.__dataclass_fields__.items()}
    changed = {name: value for name, value in asdict(run).items() if value != defaults[name]}
    return ",".join(f"{name}={value}" for name, value in changed.items()) or "default"


def scratch_of(experiment: str, run: Any, root: Path = SCRATCH) -> Path:
    """Return the folder of the checkpoints of a run; equal settings have the same one."""
    return root / experiment / hashlib.sha256(_key(asdict(run)).encode()).hexdigest()[:16]


def _key(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def finished(path: Path) -> set[str]:
    """Return the settings of the records in a file, as JSON."""
    return {_key(record["settings"]) for record in read_records(path)}


@contextmanager
def _claim(folder: Path) -> Iterator[bool]:
    """Try to lock a folder, until the end of the block or of the process, and tell whether it was free."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def execute(experiment: Experiment, run: Any, results: Path, scratch_root: Path, threads: int) -> bool:
    """
    Run one of the settings, unless it is recorded or another process runs it, and append its record.

    Returns:
        Whether it ran.
    """
    scratch = scratch_of(experiment.name, run, scratch_root)
    with _claim(scratch) as free:
        if not free or _key(asdict(run)) in finished(results):
            return False
        torch.set_num_threads(threads)
        started = time.perf_counter()
        found = experiment.train_and_evaluate(run, scratch)
        record = {
            "settings": asdict(run),
            "result": found,
            "last_session_seconds": round(time.perf_counter() - started, 1),
            "date": date.today().isoformat(),
            "machine": describe_machine(threads, "cpu"),
        }
        append_record(results, record)
        return True


def run_all(
    experiment: Experiment, runs: Iterable[Any], results: Path, scratch: Path, jobs: int, threads: int
) -> None:
    """Run the settings that are not recorded, several at a time."""
    done = finished(results)
    missing = [run for run in runs if _key(asdict(run)) not in done]
    if jobs == 1:
        for run in tqdm(missing, desc=experiment.name):
            execute(experiment, run, results, scratch, threads)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(execute, experiment, run, results, scratch, threads) for run in missing]
        for future in tqdm(as_completed(futures), total=len(futures), desc=experiment.name):
            future.result()


def write_report(experiment: Experiment, results: Path, folder: Path) -> Path | None:
    """Draw figures and write the table of an experiment from its records. Returns the file, if there are records."""
    records = read_records(results)
    if not records:
        logger.warning("%s holds no records: nothing to report.", results)
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.md"
    path.write_text(experiment.report(records, folder), encoding="utf-8")
    return path


def main(experiment: Experiment, argv: list[str] | None = None) -> None:
    """Run the command line of an experiment."""
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{experiment.name}")
    parser.add_argument("--quick", action="store_true", help="run for a minute, with results in `outputs`")
    parser.add_argument("--only", nargs="+", default=["*"], help="run settings whose label matches one of these globs")
    parser.add_argument("--list", action="store_true", help="list the labels of all settings, and whether they ran")
    parser.add_argument("--report", action="store_true", help="only draw the report of the records")
    parser.add_argument("--jobs", type=int, default=2, help="number of runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="number of threads of each run")
    options = parser.parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    quick = SCRATCH / "quick" / experiment.name
    results = quick / "records.jsonl" if options.quick else RESULTS / f"{experiment.name}.jsonl"
    runs = experiment.quick if options.quick else experiment.runs
    runs = [run for run in runs if any(fnmatch.fnmatchcase(label(run), glob) for glob in options.only)]
    if options.list:
        done = finished(results)
        for run in runs:
            print("done   " if _key(asdict(run)) in done else "missing", label(run))
        return
    if not options.report:
        scratch = quick if options.quick else SCRATCH
        run_all(experiment, runs, results, scratch, options.jobs, options.threads)
    path = write_report(experiment, results, quick / "report" if options.quick else REPORTS / experiment.name)
    if path is not None:
        logger.info("Report: %s", path)
