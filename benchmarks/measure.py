# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Measure time and peak memory of one case in the current process."""

import ctypes
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from .cases import Case
from .implementations import Implementation
from .workloads import Run

# If the first run takes at least this long, its time is the result. Otherwise it is a warm-up.
LONG_SECONDS = 15.0
MAX_RUNS = 5

Result = TypeVar("Result")


def measure(implementation: Implementation, case: Case, device: torch.device) -> dict:
    """
    Build the model of a case and run the workload.

    Returns:
        `seconds`, the median of `runs`; `peak_bytes`, the peak memory above `built_bytes`, the memory in use after the
        model is built.

    Raises:
        RuntimeError: If a run's result is not finite.
    """
    # Load libraries and start threads by running the same work at a small size, so that neither is measured.
    implementation.prepare(replace(case, length=min(case.length, case.shape.check_length)), device)()
    run = implementation.prepare(case, device)
    peak = PeakMemory(device)
    runs = time_runs(lambda: _run_and_synchronize(run, device), check_finite)
    return {
        "seconds": statistics.median(runs),
        "runs": runs,
        "peak_bytes": peak.above_built(),
        "built_bytes": peak.built_bytes,
    }


def time_runs(run: Callable[[], Result], check: Callable[[Result], None]) -> list[float]:
    """
    Return the seconds of each run: of one long run, or, after a warm-up, of the runs that fit into `LONG_SECONDS`.

    There are at most `MAX_RUNS` runs. `check` receives each result; its time is not included.
    """

    def seconds() -> float:
        start = time.perf_counter()
        result = run()
        elapsed = time.perf_counter() - start
        check(result)
        return elapsed

    first = seconds()
    if first >= LONG_SECONDS:
        return [first]
    return [seconds() for _ in range(min(max(int(LONG_SECONDS / first), 1), MAX_RUNS))]


def _run_and_synchronize(run: Run, device: torch.device) -> Tensor:
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result


def check_finite(result: Tensor) -> None:
    # The sum avoids a mask as large as the result.
    if not result.sum().isfinite():
        raise RuntimeError("The result is not finite.")


class PeakMemory:
    """Peak of CUDA's allocator or of resident memory, above the memory in use when this object is created."""

    def __init__(self, device: torch.device):
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.built_bytes = torch.cuda.memory_allocated(device)
            return
        _return_free_memory()
        _reset_host_peak()
        self.built_bytes = psutil.Process().memory_info().rss

    def above_built(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self.built_bytes
        return max(_host_peak() - self.built_bytes, 0)


def _return_free_memory() -> None:
    """Return freed memory to the system. If it were reused instead, the peak would not include it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _reset_host_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        # Only the peak since the process started is available. Building the model takes less memory than running it.
        pass


def _host_peak() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
