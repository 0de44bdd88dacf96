# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Benchmarks on a device: what runs there, what is compared with the CPU, and a clear refusal without one."""

import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("psutil")
pytest.importorskip("matplotlib")

from benchmarks import device as device_module  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.cases import SHAPES, SUITES  # noqa: E402
from benchmarks.device import CPU_ONLY, check_device, entries_for  # noqa: E402
from benchmarks.implementations import IMPLEMENTATIONS  # noqa: E402

ROOT = Path(__file__).parent.parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def test_entries_for_device():
    assert CPU_ONLY < set(IMPLEMENTATIONS)
    entries = SUITES["required"]
    assert entries_for(CPU, entries) == entries
    kept = entries_for(CUDA, entries)
    assert [case for case, _ in kept] == [case for case, _ in entries]
    for (_, names), (_, all_names) in zip(kept, entries, strict=True):
        assert set(names) == set(all_names) - CPU_ONLY


@pytest.mark.parametrize("name", sorted(device_module._COMPARABLE))
def test_check_device(name, monkeypatch):
    assert name in IMPLEMENTATIONS
    findings = check_device(name, SHAPES["quick"], 2, CPU)
    assert len(findings) == 2 and all(finding.value == 0 for finding in findings)
    build = device_module._COMPARABLE[name]

    monkeypatch.setitem(device_module._COMPARABLE, name, lambda *sizes: _Drifting(build(*sizes)))
    assert not any(finding.ok for finding in check_device(name, SHAPES["quick"], 2, CPU))


class _Drifting(torch.nn.Module):
    """A model that is another one for each copy."""

    copies = 0

    def __init__(self, model):
        super().__init__()
        self.model = model

    def __deepcopy__(self, memo):
        _Drifting.copies += 1
        for parameter in self.model.parameters():
            parameter.data.mul_(1.0 + 0.1 * _Drifting.copies)
        return self

    def forward(self, **inputs):
        self.model.zero_grad()
        return self.model(**inputs)


@without_cuda
def test_cuda_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "finds no CUDA device" in capsys.readouterr().err


@without_cuda
def test_make_gpu_is_refused():
    done = subprocess.run(["make", "gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "make gpu needs a CUDA device" in done.stderr
    assert "pytest" not in done.stdout
