# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Processes that tests start: scenarios of `tests.worker`, alone or as ranks of gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_worker(scenario: str, folder: Path, ranks: int = 1, check: bool = True, timeout: float = 300, **arguments):
    """Run a scenario to its end; `check` says whether it must succeed."""
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    command = [*launcher, "tests.worker", scenario, json.dumps({"folder": str(folder), **arguments})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    if check and done.returncode != 0:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return done
