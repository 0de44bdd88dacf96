# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Run cases: checks first, then measurements in turns. Each result is saved as soon as it is available."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .cases import Case, Entry
from .results import Results

Launch = Callable[[dict], dict]

ROOT = Path(__file__).resolve().parent.parent


def launch_process(task: dict) -> dict:
    """Perform a task in a separate process. Return `{"error": …}` if it fails."""
    command = [sys.executable, "-m", "benchmarks.worker", json.dumps(task)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.strip().splitlines() or ["no output"]
    return {"error": f"exit status {done.returncode}: {lines[-1]}"}


def launch_here(task: dict) -> dict:
    """Perform a task in this process, which is fast but makes memory values unreliable."""
    from .worker import perform

    try:
        return perform(task)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def count_measurements(entries: list[Entry], repeats: int) -> int:
    return repeats * sum(len(names) for _, names in entries)


def run_entries(
    entries: list[Entry],
    results: Results,
    repeats: int,
    once_above: float,
    launch: Launch,
    advance: Callable[[str], None],
) -> None:
    """
    Run all measurements that `results` does not contain yet.

    The implementations of a case take turns, so that a disturbance affects all of them. An implementation that fails
    its check is not measured.

    Args:
        once_above: A measurement that takes more seconds than this is not repeated.
        launch: Performs a task; see `benchmarks.worker`.
        advance: Called with the name of each measurement, before it runs or is skipped.
    """
    for case, names in entries:
        correct = {name for name in names if _is_correct(case, name, results, launch)}
        for repeat in range(repeats):
            for name in names:
                advance(f"{case.name} {name}")
                known = results.of(case.name, name)
                failed = results.failure(case.name, name) is not None
                slow = any(found["seconds"] > once_above for found in known)
                if name not in correct or failed or slow or len(known) > repeat:
                    continue
                found = launch(_task("measure", case, name, results))
                results.add_measurement(case, name, repeat, found)


def _is_correct(case: Case, name: str, results: Results, launch: Launch) -> bool:
    """Return whether the implementation passes its check, which runs once per shape and number of hash rounds."""
    found = results.check(case.shape_name, case.num_hashes, name)
    if found is None:
        found = launch(_task("check", case, name, results))
        results.add_check(case.shape_name, case.num_hashes, name, found)
    return found.get("ok", False)


def _task(kind: str, case: Case, name: str, results: Results) -> dict:
    return {
        "task": kind,
        "implementation": name,
        "case": case.to_dict(),
        "device": results.options["device"],
        "bf16": results.bf16,
        "threads": results.options["threads"],
    }
