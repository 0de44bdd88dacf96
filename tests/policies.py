# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Other device policies for the CPU: single sizes, and the policy of CUDA as far as a CPU can run it."""

from dataclasses import replace

import pytest

from reformer_hf.device_policy import CPU, CUDA, POLICIES

# What CUDA's policy says, with the fused kernel of the CPU in the place of CUDA's, or without one.
CUDA_ON_CPU = replace(CUDA, pin_uploads=False, kernel=CPU.kernel)
CUDA_UNFUSED = replace(CUDA, pin_uploads=False, kernel=None)


def set_policy(monkeypatch: pytest.MonkeyPatch, policy=None, **fields) -> None:
    """Let the CPU follow a policy, by default its own, with some fields changed."""
    monkeypatch.setitem(POLICIES, "cpu", replace(policy or POLICIES["cpu"], **fields))
