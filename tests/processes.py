# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Processes that tests start: Python, and scenarios of `tests.worker`, alone or as ranks of gloo."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]

# What a process runs first in order not to see the package, which may be installed.
WITHOUT_PACKAGE = """
import sys

class NoPackage:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "reformer_hf":
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, NoPackage)
options = {"trust_remote_code": True}
"""


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


def link_packages(names: Sequence[str], folder: Path) -> Path:
    """
    Make a folder of links to packages and to all that they require, and to nothing else that is installed.

    With this folder as `PYTHONPATH`, `python -S` runs as in an environment where only they are installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting, done = list(names), set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in done:
            continue
        done.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            # Another platform's, as the CUDA libraries of torch.
            continue
        for top in {path.parts[0] for path in found.files if path.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))
        requirements = [Requirement(each) for each in found.requires or []]
        waiting += [each.name for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]
    return folder
