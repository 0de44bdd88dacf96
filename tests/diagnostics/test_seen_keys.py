# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The keys that each head and round sees, against the dense definition."""

import pytest
import torch

from reformer_hf import ReformerHfForConditionalGeneration, ReformerHfForMaskedLM
from reformer_hf.diagnostics import seen_keys
from reformer_hf.hashing import hash_vectors, random_rotations
from reformer_hf.lsh_attention import factors_of

from ..helpers import assert_close, assert_refused, random_model
from ..reference import dense_attention, full_attention_counts, key_counts, normalized_keys

LENGTH = 41
IDS = torch.randint(3, 60, (1, LENGTH), generator=torch.Generator().manual_seed(0))
PADDING = torch.zeros(1, LENGTH, dtype=torch.bool)
PATTERNS = {
    "window": {},
    "chunk": {"lsh_pattern": "chunk", "num_buckets": [2, 4]},
    "number-of-buckets-from-length": {"num_buckets": None},
}


def _queries_of(model, layer_idx):
    """Queries of an LSH layer, `[1, L, H, D]`."""
    attention = model.reformer.encoder.layers[layer_idx].attention
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states[layer_idx]
        return attention.self_attention.project(attention.layer_norm(states), slice(0, 2))[0]


@pytest.mark.parametrize(
    ("name", "causal"),
    [("window", True), ("window", False), ("chunk", False), ("number-of-buckets-from-length", True)],
)
def test_equals_definition(name, causal):
    fields = {**PATTERNS[name], "attn_layers": ["local", "lsh"], "is_decoder": causal, "num_hashes": 3}
    classes = {} if causal else {"cls": ReformerHfForMaskedLM}
    model = random_model(torch.float64, **classes, **fields)
    query = _queries_of(model, 1)
    factors = factors_of(model.config, LENGTH)
    buckets = hash_vectors(query, random_rotations(0, 2, 16, 3, factors), factors)[0]
    full_counts = full_attention_counts(causal, PADDING).expand(1, 2, -1, -1)
    values = torch.eye(LENGTH, dtype=torch.float64)[None, :, None].expand(1, -1, 2, -1)
    weights = dense_attention(query, normalized_keys(query), values, full_counts, own_value=True)[0]

    found = seen_keys(model, IDS, layer=1)
    pattern = model.reformer.encoder.layers[1].attention.self_attention.pattern
    for head in range(2):
        assert_close(found.weights[head], weights[:, head], 1e-10, f"head {head}")
        for i in range(3):
            expected = key_counts(pattern, [buckets[head, i].tolist()], PADDING[0].tolist()) > 0
            # The first token of a causal layer has only itself to see.
            expected[0, 0] |= causal and i == 0
            assert torch.equal(found.seen[head, i], expected) and expected.any()
            same_bucket = found.buckets[head, i][:, None] == found.buckets[head, i]
            assert torch.equal(same_bucket, buckets[head, i][:, None] == buckets[head, i])
    assert found.visible.sum() == full_counts[0, 0].sum() + (1 if causal else 0)
    assert found.layer == "reformer.encoder.layers.1" and found.heads == (0, 1)


def test_some_heads_and_queries():
    model = random_model(attn_layers=["lsh"])
    everything = seen_keys(model, IDS, 0, num_hashes=4, num_buckets=4)
    some = seen_keys(model, IDS, "reformer.encoder.layers.0", [1], [40, 7], num_hashes=4, num_buckets=4)
    assert some.heads == (1,) and some.queries.tolist() == [40, 7]
    assert torch.equal(some.seen, everything.seen[1:, :, [40, 7]])
    assert torch.equal(some.buckets, everything.buckets[1:])
    assert torch.equal(some.visible, everything.visible[[40, 7]])
    assert_close(some.weights, everything.weights[1:, [40, 7]], 1e-6)
    assert everything.buckets.amax() < 4


def test_one_bucket_sees_everything():
    found = seen_keys(random_model(attn_layers=["lsh"], num_buckets=1, lsh_attn_chunk_length=64), IDS, 0)
    assert torch.equal(found.seen.any(1), found.visible.expand(2, -1, -1))
    assert torch.equal(found.seen[:, :, 1:], found.visible[1:].expand(2, 2, -1, -1))
    assert not found.buckets.any()


def test_refused():
    model = random_model(attn_layers=["lsh", "local"])
    cases = {
        "one axis": ({"input_ids": IDS[0]}, r"shape \(41,\), but must be one text"),
        "empty text": ({"input_ids": IDS[:, :0]}, r"shape \(1, 0\), but must be one text"),
        "head": ({"heads": [2]}, r"`heads` is \[2\], but the layer has 2 heads: give some from 0"),
        "no heads": ({"heads": []}, r"`heads` is \[\], but the layer has 2 heads"),
        "late query": ({"queries": [3, 41]}, r"`queries` is \[3, 41\], but the text has 41 tokens"),
        "negative query": ({"queries": [-1]}, r"`queries` is \[-1\], but"),
        "layer": ({"layer": 1}, "Layer 1 is not an LSH layer of the model"),
    }
    assert_refused(lambda options: seen_keys(model, **{"input_ids": IDS, "layer": 0, **options}), cases)


def test_both_stacks_refused():
    model = random_model(cls=ReformerHfForConditionalGeneration, attn_layers=["lsh"], decoder_attn_layers=["lsh"])
    with pytest.raises(ValueError, match="Layer 0 is one of .*: give a name"):
        seen_keys(model, IDS, 0)
