# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Processes that tests start: Python, and scenarios of `tests.worker`, alone or as ranks of gloo."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_python(
    arguments: Sequence[str | Path], cwd: Path, env: Mapping[str, str], check: bool = True, timeout: float = 120
) -> subprocess.CompletedProcess:
    """
    Run Python to its end; `check` says whether it must succeed.

    The time is far above what it takes: a process that hangs fails the test, and does not hang it.
    """
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert not check or done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done


def run_worker(scenario: str, folder: Path, ranks: int = 1, check: bool = True, timeout: float = 300, **arguments):
    """Run a scenario of `tests.worker`."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"] if ranks > 1 else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    folder.mkdir(parents=True, exist_ok=True)
    options = json.dumps({"folder": str(folder), **arguments})
    return run_python(["-m", *launcher, "tests.worker", scenario, options], ROOT, env, check, timeout)
