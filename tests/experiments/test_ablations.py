# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The models that the ablations compare are what they say."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from experiments.ablations import Run, build, grid

from ..helpers import assert_close

SIZES = {"length": 64, "width": 32, "depth": 2}


def test_separate_queries_and_keys():
    """One chunk as long as the sequence is full causal attention."""
    model = build(Run("separate", **SIZES))
    attention = model.reformer.encoder.layers[0].attention.self_attention
    hidden_states = torch.randn(2, 64, 32)
    query, key, value = (
        getattr(attention, name)(hidden_states).view(2, 64, 4, 8).transpose(1, 2) for name in attention.projections
    )
    expected = scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
    assert_close(attention(hidden_states)[0], expected, 1e-5)


def test_plain_layers():
    """A plain model has the weights of a reversible one, one residual stream, and trains all of them."""
    torch.manual_seed(0)
    reversible = build(Run("shared", **SIZES))
    torch.manual_seed(0)
    model = build(Run("shared", plain=True, **SIZES))
    assert all(map(torch.equal, reversible.parameters(), model.parameters()))
    input_ids = torch.randint(256, (2, 64))
    hidden = model.reformer(input_ids=input_ids, output_hidden_states=True).hidden_states
    for layer, x, y in zip(model.reformer.encoder.layers, hidden, hidden[1:], strict=False):
        x = x + layer.attention.output(layer.attention.self_attention(layer.attention.layer_norm(x))[0])
        assert_close(y, x + layer.feed_forward(x), 1e-5)
    loss = model(input_ids=input_ids, labels=input_ids).loss
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    assert not torch.equal(loss, reversible(input_ids=input_ids, labels=input_ids).loss)


def test_grid_compares_equals():
    """For each seed there is each pattern with each number of hashes, and nothing twice."""
    for seed in (0, 1):
        runs = [run for run in grid((0, 1)) if run.seed == seed]
        assert len(set(runs)) == len(runs) == 4 + 2 * 5 + 2, seed
        hashed = {(run.attention, run.hashes) for run in runs if run.hashes and not run.deduplicate}
        assert hashed == {(pattern, hashes) for pattern in ("window", "chunk") for hashes in (1, 2, 4, 8, 16)}, seed
