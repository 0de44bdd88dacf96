# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Utilities for training: packing, callbacks, checkpoints, an optimizer, a memory estimate. No model needs them."""

from .callbacks import NonFiniteGradientsError, PushModelCode, SaveOnSigterm, StopOnNonFinite
from .checkpoints import find_corruption, last_intact_checkpoint
from .memory import MemoryEstimate, estimate_training_memory
from .muon import MuonWithAdamW
from .packing import CausalCollator, pack, pack_to_file

__all__ = [
    "CausalCollator",
    "MemoryEstimate",
    "MuonWithAdamW",
    "NonFiniteGradientsError",
    "PushModelCode",
    "SaveOnSigterm",
    "StopOnNonFinite",
    "estimate_training_memory",
    "find_corruption",
    "last_intact_checkpoint",
    "pack",
    "pack_to_file",
]
