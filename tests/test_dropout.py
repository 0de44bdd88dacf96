# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Dropout masks: the share of kept elements, and their scale."""

import pytest
import torch

from reformer_hf.dropout import dropout


def test_dropout_rate():
    """As many elements as the rate says are zero, to five standard deviations; the others keep the mean."""
    tensor = torch.ones(4, 1000, 250)
    for rate in (1e-4, 0.003, 0.05, 0.1, 0.5, 0.9, 0.995):
        dropped = dropout(tensor, rate, torch.Generator().manual_seed(0))
        num_dropped, expected = (dropped == 0).sum().item(), rate * tensor.numel()
        # The rate itself is rounded, by at most 2 %.
        assert abs(num_dropped - expected) <= 0.02 * expected + 5 * (expected * (1 - rate)) ** 0.5, rate
        scales = dropped[dropped != 0].unique()
        assert len(scales) == 1, rate
        assert scales.item() == pytest.approx(1 / (1 - rate), rel=0.02), rate
