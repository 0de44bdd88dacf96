# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The machine and the software versions of a run."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import psutil
import torch

_PACKAGES = ("torch", "transformers", "reformer-pytorch", "numpy")
# Records of experiments change while these run.
_CODE = ("reformer_hf", "benchmarks", "experiments", ":!experiments/results")


def describe_machine(threads: int | None, device: str) -> dict:
    """Return the processor, memory, versions, number of threads and commit."""
    described = {
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads() if threads is None else threads,
        "device": device,
        "commit": _commit(),
        **{name: _version(name) for name in _PACKAGES},
    }
    if torch.device(device).type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _commit() -> str | None:
    """Return the commit, marked if tracked files of the package, the benchmarks or the experiments have changed."""
    root = Path(__file__).resolve().parent.parent
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", *_CODE)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit} with changes" if changed else commit


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
