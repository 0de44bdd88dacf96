# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Perform one task in a separate process: `python -m benchmarks.worker JSON` writes one line of JSON.

The task is
`{"task": "check" or "measure", "implementation": …, "case": {…}, "device": …, "bf16": …, "threads": … or null}`.
"""

import json
import sys
import warnings

import torch
import transformers

from .cases import Case
from .device import check_device
from .implementations import IMPLEMENTATIONS
from .measure import measure


def perform(task: dict) -> dict:
    """Return the findings of a check, `{"ok": …, "findings": […]}`, or the result of `measure`."""
    if task["threads"] is not None:
        torch.set_num_threads(task["threads"])
    transformers.logging.set_verbosity_error()
    implementation, case = IMPLEMENTATIONS[task["implementation"]], Case(**task["case"])
    if case.workload not in implementation.workloads:
        raise ValueError(f"{task['implementation']!r} has no workload {case.workload!r}.")
    device = torch.device(task["device"])
    if task["task"] == "measure":
        with torch.autocast(device.type, torch.bfloat16, enabled=task["bf16"]):
            return measure(implementation, case, device)
    findings = implementation.check(case.shape, case.num_hashes)
    if device.type != "cpu":
        findings += check_device(task["implementation"], case.shape, case.num_hashes, device)
    return {
        "ok": all(finding.ok for finding in findings),
        "findings": [{"what": f.name, "value": f.value, "limit": f.limit} for f in findings],
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.stdout.write(json.dumps(perform(json.loads(sys.argv[1]))) + "\n")
