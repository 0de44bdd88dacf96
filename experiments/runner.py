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

A run that starts from the final weights of another one waits for it: `Experiment(…, warm_start=…)`.
"""

import argparse
import fcntl
import fnmatch
import hashlib
import json
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from benchmarks.machine import describe_machine
from benchmarks.pages import write_tables

from .records import Record, append_record, read_records
from .training import FINAL

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
        warm_start: Returns the settings of the run whose final weights a run starts from, or `None`. A function of a
            module, so that other processes find it.
    """

    name: str
    runs: list[Any]
    train_and_evaluate: Callable[[Any, Path], dict[str, Any]]
    report: Callable[[list[Record], Path], str]
    quick: list[Any] = field(default_factory=list)
    warm_start: Callable[[Any], Any] | None = None

    def needs(self, run: Any) -> Any:
        """Return the run whose weights a run starts from, or `None`."""
        return None if self.warm_start is None else self.warm_start(run)


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
    # Opening must not empty the file, which holds the process id of the owner of the lock.
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            logger.warning("Process %s has locked %s: its run is skipped here.", file.read() or "unknown", folder)
            yield False
        else:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield True


def execute(
    experiment: Experiment, run: Any, results: Path, scratch_root: Path, threads: int, device: str = "cpu"
) -> bool:
    """
    Run one of the settings, unless it is recorded or another process runs it, and append its record.

    Returns:
        Whether it ran.

    Raises:
        FileNotFoundError: If the weights that it starts from do not exist.
    """
    scratch = scratch_of(experiment.name, run, scratch_root)
    with _claim(scratch) as free:
        if not free or _key(asdict(run)) in finished(results):
            return False
        before = experiment.needs(run)
        if before is not None and not (weights := scratch_of(experiment.name, before, scratch_root) / FINAL).exists():
            raise FileNotFoundError(
                f"{label(run)} starts from the weights of {label(before)}, but {weights} does not exist: run that "
                "first. If it is recorded but its weights were deleted, delete its record as well."
            )
        torch.set_num_threads(threads)
        # Attention weights that are almost zero slow a CPU down, more and more as attention becomes sharper.
        torch.set_flush_denormal(True)
        # The device of `experiments.training.train`.
        PartialState(cpu=device == "cpu")
        started = time.perf_counter()
        found = experiment.train_and_evaluate(run, scratch)
        record = {
            "settings": asdict(run),
            "result": found,
            "last_session_seconds": round(time.perf_counter() - started, 1),
            "date": date.today().isoformat(),
            "machine": describe_machine(threads, device),
        }
        append_record(results, record)
        return True


def run_all(
    experiment: Experiment,
    runs: Iterable[Any],
    results: Path,
    scratch: Path,
    jobs: int,
    threads: int,
    device: str = "cpu",
) -> None:
    """
    Run the settings that are not recorded, several at a time, each after the run whose weights it starts from.

    Raises:
        RuntimeError: After all others, if runs failed.
    """
    done = finished(results)
    waiting = [run for run in runs if _key(asdict(run)) not in done]
    failed: list[str] = []
    with tqdm(total=len(waiting), desc=experiment.name) as progress, _pool(jobs) as submit:
        running: dict[Future, Any] = {}
        while waiting or running:
            unfinished = {_key(asdict(run)) for run in (*waiting, *running.values())}
            ready = [run for run in waiting if _key_or_none(experiment.needs(run)) not in unfinished]
            for run in ready:
                waiting.remove(run)
                running[submit(execute, experiment, run, results, scratch, threads, device)] = run
                if jobs == 1:
                    break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                progress.update()
                if (error := future.exception()) is not None:
                    logger.error("%s failed.", label(run), exc_info=error)
                    failed.append(label(run))
    if failed:
        raise RuntimeError(f"{len(failed)} runs failed: {'; '.join(failed)}. The log has the reasons.")


@contextmanager
def _pool(jobs: int) -> Iterator[Callable[..., Future]]:
    """Open a pool of processes, or none for one job: this process then runs it."""
    if jobs > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, initializer=_end_with_parent) as pool:
            yield pool.submit
        return

    def call(function: Callable, *arguments: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    yield call


def _end_with_parent() -> None:
    """End this process when its parent is killed; otherwise it would wait for the next run forever."""

    def wait_for_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


def _key_or_none(run: Any) -> str | None:
    return None if run is None else _key(asdict(run))


def override(run: Any, assignments: Iterable[str]) -> Any:
    """
    Return settings with other values.

    Args:
        run: The settings.
        assignments: Such as `seed=3`; values are JSON, or else strings.

    Raises:
        ValueError: If there is no such setting.
    """
    values = {}
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        if name not in run.__dataclass_fields__:
            names = ", ".join(run.__dataclass_fields__)
            raise ValueError(f"`--set {assignment}` names no setting: use NAME=VALUE with one of {names}.")
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            values[name] = value
    return replace(run, **values)


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
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change settings of all runs")
    parser.add_argument("--list", action="store_true", help="list the labels of all settings, and whether they ran")
    parser.add_argument("--report", action="store_true", help="only draw the report of the records")
    parser.add_argument("--jobs", type=int, default=2, help="number of runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="number of threads of each run")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device of the models")
    options = parser.parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    quick = SCRATCH / "quick" / experiment.name
    results = quick / "records.jsonl" if options.quick else RESULTS / f"{experiment.name}.jsonl"
    runs = experiment.quick if options.quick else experiment.runs
    # Runs that the change makes equal run once.
    runs = list(dict.fromkeys(override(run, options.set) for run in runs))
    runs = [run for run in runs if any(fnmatch.fnmatchcase(label(run), glob) for glob in options.only)]
    if options.list:
        done = finished(results)
        for run in runs:
            print("done   " if _key(asdict(run)) in done else "missing", label(run))
        return
    if not options.report:
        scratch = quick if options.quick else SCRATCH
        run_all(experiment, runs, results, scratch, options.jobs, options.threads, options.device)
    path = write_report(experiment, results, quick / "report" if options.quick else REPORTS / experiment.name)
    if path is not None:
        logger.info("Report: %s", path)
        if not options.quick:
            for page in (ROOT / "README.md", *REPORTS.parent.glob("*.md")):
                write_tables(page, experiment.name, path.read_text(encoding="utf-8"))
