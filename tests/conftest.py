# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Profiles of Hypothesis: few examples by default, many with `--hypothesis-profile thorough`.

What fails is printed as a `@reproduce_failure` line, and tried first the next time.
"""

import gc

import pytest
from hypothesis import settings
from transformers.models.reformer import modeling_reformer

from .in_tree import TorchWithRotationsOfFp32

settings.register_profile("quick", deadline=None, max_examples=40, print_blob=True)
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=1000)
settings.load_profile("quick")


def pytest_collection_finish():
    """Leave what imports made out of garbage collections: there are many, each a quarter of a second with it."""
    gc.freeze()


@pytest.fixture
def rotations_of_fp32(monkeypatch):
    """In-tree models draw the hash rotations of ours in every dtype."""
    monkeypatch.setattr(modeling_reformer, "torch", TorchWithRotationsOfFp32())
