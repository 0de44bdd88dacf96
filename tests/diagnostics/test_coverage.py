# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Coverage, errors and buckets of LSH attention against the dense definition."""

import json
import math

import pytest
import torch

from reformer_hf import (
    ReformerHfEncoderDecoderConfig,
    ReformerHfForConditionalGeneration,
    ReformerHfForMaskedLM,
    ReformerHfForSequenceClassification,
)
from reformer_hf.diagnostics import attention_coverage, coverage
from reformer_hf.hashing import hash_vectors, random_rotations
from reformer_hf.lsh_attention import factors_of

from ..helpers import assert_close, assert_refused, memory_of, random_model
from ..reference import dense_attention, full_attention_counts, key_counts, normalized_keys

LAYERS = ["local", "lsh", "full", "lsh"]
VALUES = ("coverage", "visible_keys", "error", "largest_bucket", "bucket_entropy")
PATTERNS = {
    "window": {},
    "window-deduplicated": {"lsh_deduplicate_keys": True},
    "chunk": {"lsh_pattern": "chunk", "num_buckets": [2, 4]},
    "across": {"lsh_pattern": "chunk", "lsh_across_buckets": True},
    "ring": {"lsh_pattern": "chunk", "lsh_across_buckets": True, "wrap_chunks": True},
    "number-of-buckets-from-length": {"num_buckets": None},
}


def _model(causal=True, **fields):
    fields = {"attn_layers": LAYERS, "is_decoder": causal, "bos_token_id": 2, **fields}
    return (
        random_model(torch.float64, **fields)
        if causal
        else random_model(torch.float64, ReformerHfForMaskedLM, **fields)
    )


def _inputs(side=None, length=37):
    input_ids = torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(length))
    if side is None:
        return {"input_ids": input_ids}
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, slice(0, 9) if side == "left" else slice(length - 9, None)] = 0
    return {"input_ids": input_ids, "attention_mask": mask}


class _Dense:
    """One LSH layer on some inputs, by the definitions: values of each query `[B, H, L]`, and of heads `[H]`."""

    def __init__(self, model, layer_idx, inputs, num_hashes):
        attention = model.reformer.encoder.layers[layer_idx].attention
        lsh = attention.self_attention
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states[layer_idx]
            query, value = lsh.project(attention.layer_norm(states), lsh.all_heads)
        self.padding = inputs.get("attention_mask", torch.ones(query.shape[:2])) == 0
        factors = factors_of(model.config, query.shape[1])
        rotations = random_rotations(0, lsh.num_heads, lsh.head_size, num_hashes, factors)
        self.buckets, self.num_buckets = hash_vectors(query, rotations, factors), math.prod(factors)
        counts = torch.stack(
            [
                torch.stack([key_counts(lsh.pattern, of_head, padding) for of_head in of_row])
                for of_row, padding in zip(self.buckets.tolist(), self.padding.tolist(), strict=True)
            ]
        )
        full_counts = full_attention_counts(lsh.pattern.causal, self.padding).expand_as(counts)
        key = normalized_keys(query)
        self.lsh = dense_attention(query, key, value, counts, own_value=True)
        self.full = dense_attention(query, key, value, full_counts, own_value=True)
        one_hot = torch.eye(query.shape[1]).to(value)[None, :, None].expand(*query.shape[:3], -1)
        weights = dense_attention(query, key, one_hot, full_counts, own_value=True).transpose(1, 2)
        seen, visible = (_or_itself(counts > 0), _or_itself(full_counts > 0))
        self.coverage = (weights * seen).sum(-1)
        self.visible_keys = (seen & visible).double().sum(-1) / visible.sum(-1)
        self.output = attention.output

    def expected(self):
        tokens = ~self.padding
        lsh, full = self.lsh[tokens], self.full[tokens]
        balance = torch.tensor(
            [
                [[_balance(of_round[of_tokens], self.num_buckets) for of_round in of_head] for of_head in of_row]
                for of_row, of_tokens in zip(self.buckets, tokens, strict=True)
            ],
            dtype=torch.float64,
        ).mean((0, 2))
        return {
            "coverage": self.coverage.transpose(1, 2)[tokens].mean(0),
            "visible_keys": self.visible_keys.transpose(1, 2)[tokens].mean(0),
            "error": (lsh - full).norm(dim=(0, 2)) / full.norm(dim=(0, 2)),
            "layer_error": self.output(lsh.flatten(1) - full.flatten(1)).norm() / self.output(full.flatten(1)).norm(),
            "largest_bucket": balance[:, 0],
            "bucket_entropy": balance[:, 1],
        }


def _or_itself(seen):
    return seen | (torch.eye(seen.shape[-1], dtype=torch.bool) & ~seen.any(-1, keepdim=True))


def _balance(buckets, num_buckets):
    """The largest bucket over the mean, and the entropy over its maximum."""
    shares = [(buckets == bucket).double().mean().item() for bucket in range(num_buckets)]
    entropy = -sum(share * math.log(share) for share in shares if share)
    return [max(shares) * num_buckets, entropy / math.log(min(num_buckets, len(buckets)))]


@pytest.mark.parametrize(
    ("name", "causal"),
    [
        ("window", True),
        ("window-deduplicated", False),
        ("chunk", False),
        ("across", True),
        ("ring", False),
        ("number-of-buckets-from-length", True),
    ],
)
def test_equals_definition(name, causal):
    model = _model(causal, **PATTERNS[name])
    for side in (None, "left", "right"):
        inputs = _inputs(side)
        found = attention_coverage(model, **inputs, num_hashes=(1, 3))
        assert found.layers == ("reformer.encoder.layers.1", "reformer.encoder.layers.3")
        assert found.num_queries == (74 if side is None else 65,) * 2
        for i, layer_idx in enumerate((1, 3)):
            for j, num_hashes in enumerate((1, 3)):
                expected = _Dense(model, layer_idx, inputs, num_hashes).expected()
                for value, tensor in expected.items():
                    assert_close(
                        getattr(found, value)[i, j], tensor, 1e-10, f"{value}, layer {i}, {num_hashes} hashes"
                    )


def test_one_bucket_is_full_attention():
    for pattern in ("window", "chunk"):
        model = random_model(lsh_pattern=pattern, num_buckets=1, lsh_attn_chunk_length=64)
        found = attention_coverage(model.bfloat16(), **_inputs(), num_hashes=2)
        assert (found.coverage == 1).all() and (found.visible_keys == 1).all(), pattern
        assert (found.largest_bucket == 1).all() and (found.bucket_entropy == 1).all(), pattern
        # Queries and values of all dtypes are compared in fp32.
        assert (found.error < 1e-5).all() and (found.layer_error < 1e-5).all(), pattern


@pytest.mark.parametrize("pattern", ["window", "chunk"])
def test_hashes_add_coverage(pattern):
    model = _model(lsh_pattern=pattern)
    found = attention_coverage(model, **_inputs(length=200), num_hashes=(1, 2, 4, 8, 64))
    coverage = found.coverage.mean((0, 2))
    assert (coverage.diff() > 0.05).all() and coverage[-1] > 0.8
    assert (found.error.mean((0, 2)).diff() < 0).all()
    # Hashing finds more than random keys would.
    assert (found.coverage > found.visible_keys).all()


def test_sampled_queries():
    """Each has the coverage that it has among all, and padding is never drawn."""
    model, inputs = _model(attn_layers=["local", "lsh"]), _inputs("left")
    row = {name: tensor[1:] for name, tensor in inputs.items()}
    of_all = _Dense(model, 1, row, 2).coverage[0, 0, 9:]
    drawn = [attention_coverage(model, **row, num_hashes=2, num_queries=1, seed=seed) for seed in range(12)]
    values = torch.stack([found.coverage[0, 0, 0] for found in drawn])
    assert all(((of_all - value).abs() < 1e-12).any() for value in values) and len(values.unique()) > 4
    again = attention_coverage(model, **row, num_hashes=2, num_queries=1, seed=3)
    assert torch.equal(again.coverage, drawn[3].coverage)
    assert attention_coverage(model, **inputs, num_queries=30).num_queries == (58,)


def test_blocks_bound_memory(monkeypatch):
    """No tensor is as large as the attention matrix of a head, and blocks change nothing."""
    length = 1500
    model = random_model(attn_layers=["lsh"], max_position_embeddings=2048, num_buckets=None)
    inputs = _inputs(length=length)
    expected = attention_coverage(model, **inputs, num_hashes=1)
    monkeypatch.setattr(coverage, "_BLOCK_SCORES", 1 << 16)
    results = []
    peak = memory_of(lambda: results.append(attention_coverage(model, **inputs, num_hashes=1)))[1]
    assert peak < 4 * length**2
    for name in VALUES:
        assert_close(getattr(results[0], name), getattr(expected, name), 1e-5, name)


def test_heads_and_encoder_decoder():
    classifier = random_model(cls=ReformerHfForSequenceClassification, attn_layers=["lsh"])
    assert attention_coverage(classifier, **_inputs("left")).layers == ("reformer.encoder.layers.0",)
    both = random_model(
        cls=ReformerHfForConditionalGeneration, attn_layers=["local", "lsh"], decoder_attn_layers=["lsh"]
    )
    assert isinstance(both.config, ReformerHfEncoderDecoderConfig)
    inputs = _inputs()
    found = attention_coverage(both, **inputs, decoder_input_ids=inputs["input_ids"][:, :20])
    assert found.layers == ("model.encoder.encoder.layers.1", "model.decoder.encoder.layers.0")
    assert found.num_queries == (74, 40)
    alone = attention_coverage(both.get_encoder(), **inputs)
    assert alone.layers == ("encoder.layers.1",)
    assert torch.equal(alone.coverage[0], found.coverage[0])


def test_leaves_model_alone():
    """Its modes, its hooks and the global generator."""
    model = random_model(attn_layers=["lsh", "local"]).train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    attention_coverage(model, **_inputs(), num_queries=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_table():
    found = attention_coverage(random_model(attn_layers=["lsh", "lsh"]), **_inputs(), num_hashes=(1, 2))
    rows = json.loads(json.dumps(found.rows()))
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        i, j = found.layers.index(row["layer"]), found.num_hashes.index(row["num_hashes"])
        assert all(row[name] == getattr(found, name)[i, j, row["head"]] for name in VALUES)
    lines = found.to_markdown().splitlines()
    assert lines[0] == "| layer | head | hashes | coverage | keys | error | largest bucket | entropy |"
    assert len(lines) == 2 + len(rows) and f"| {rows[0]['coverage']:.3f} |" in lines[2]
    (first, *_), lines = found.rows(per_head=False), found.to_markdown(per_head=False).splitlines()
    assert first["error"] == found.layer_error[0, 0] and len(lines) == 2 + 4
    assert first["coverage"] == pytest.approx(found.coverage[0, 0].mean().item())


def test_refused():
    model, local = random_model(), random_model(attn_layers=["local"])
    documents = {"position_ids": torch.arange(37)[None] % 20}
    cases = {
        "no LSH layer": (local, {}, "has no LSH layer.*`attn_layers` include 'lsh'"),
        "zero hashes": (model, {"num_hashes": (1, 0)}, "`num_hashes` is .1, 0., but must be"),
        "no hashes": (model, {"num_hashes": ()}, "one or more numbers"),
        "no queries": (model, {"num_queries": 0}, "`num_queries` is 0, but must be at least 1"),
        "cache": (model, {"use_cache": True}, "a KV cache, but diagnostics need whole texts"),
        "documents": (model, documents, "several documents in a row, but diagnostics need"),
    }

    def call(model, options):
        try:
            attention_coverage(model, **_inputs(), **options)
        finally:
            assert not any(module._forward_pre_hooks for module in model.modules()), options

    assert_refused(call, cases)
