# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Rotary position embeddings of local layers."""

import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from reformer_hf import ReformerHfConfig, ReformerHfForCausalLM
from reformer_hf.local_attention import LocalSelfAttention
from reformer_hf.rotary import rotate, rotation_of
from reformer_hf.self_attention import AttentionCall

from .helpers import assert_close, assert_refused, random_model, tiny_config
from .reference import dense_attention, key_counts, rotated

LENGTH, THETA = 37, 100.0


def _positions(padding):
    """Positions that count tokens, not padding."""
    return ((~padding).long().cumsum(-1) - 1).clamp(min=0)


def test_scores_depend_on_the_distance():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 2, 8, dtype=torch.float64)

    def score(i, j):
        turned = (
            rotate(x, rotation_of(torch.tensor([[position]]), 8, THETA, x.dtype))
            for x, position in ((query, i), (key, j))
        )
        return (next(turned) * next(turned)).sum(-1)

    assert_close(score(1007, 1000), score(7, 0), 1e-12)
    assert_close(score(0, 0), (query * key).sum(-1), 1e-12)
    assert (score(7, 0) - score(6, 0)).abs().min() > 1e-3


def test_rotation_equals_complex_products():
    torch.manual_seed(0)
    x, positions = torch.randn(2, LENGTH, 3, 8, dtype=torch.float64), torch.randint(1000, (2, LENGTH))
    assert_close(rotate(x, rotation_of(positions, 8, THETA, x.dtype)), rotated(x, positions, THETA), 1e-12)


def test_local_layer_equals_dense_attention():
    """Outputs and all gradients."""
    for causal, padded in itertools.product((True, False), (True, False)):
        _assert_equals_dense_attention(causal, padded)


def _assert_equals_dense_attention(causal, padded):
    torch.manual_seed(0)
    config = tiny_config(attn_layers=["local"], is_decoder=causal, local_rope_theta=THETA)
    layer = LocalSelfAttention(config).double()
    padding = torch.zeros(2, LENGTH, dtype=torch.bool)
    if padded:
        padding[0, :5], padding[1, -6:] = True, True
    positions, real = _positions(padding), ~padding
    hidden, grad = torch.randn(2, 2, LENGTH, config.hidden_size, dtype=torch.float64)
    rotation = rotation_of(positions, config.attention_head_size, THETA, torch.float64)
    call = {"padding": padding if padded else None, "rotation": rotation}

    def fast(x):
        return layer(x, AttentionCall.on(x, **call))[0]

    def dense(x):
        query, key, value = layer.project(x, layer.all_heads)
        query, key = rotated(query, positions, THETA), rotated(key, positions, THETA)
        counts = torch.stack([key_counts(layer.pattern, [[0] * LENGTH], row.tolist()) for row in padding])
        return dense_attention(query, key, value, counts[:, None], own_value=False).flatten(2)

    results = []
    for attention in (fast, dense):
        x = hidden.clone().requires_grad_()
        layer.zero_grad()
        out = attention(x)
        (out * grad)[real].sum().backward()
        results.append([out[real], x.grad, *(parameter.grad for parameter in layer.parameters())])
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, 1e-9, f"causal {causal}, padded {padded}")


def test_model_knows_distances_only():
    """Without other position embeddings, a shift of all positions changes nothing, and a gap does."""
    outputs = {}
    for theta in (THETA, None):
        model = random_model(torch.float64, attn_layers=["local", "local"], local_rope_theta=theta)
        for weight in model.reformer.embeddings.position_embeddings.parameters():
            weight.data.zero_()
        ids = torch.randint(1, 60, (1, LENGTH), generator=torch.Generator().manual_seed(0))
        positions = torch.arange(LENGTH)[None]
        gap = positions + 9 * (positions >= 20)
        with torch.no_grad():
            outputs[theta] = [model(ids, position_ids=p).logits for p in (positions, positions + 11, gap)]
    at_0, shifted, with_gap = outputs[THETA]
    assert_close(shifted, at_0, 1e-9)
    assert_close(with_gap[:, :20], at_0[:, :20], 1e-9)
    assert (with_gap - at_0)[:, 20:].abs().max() > 1e-3
    assert_close(outputs[None][2], outputs[None][0], 1e-12)
    assert (at_0 - outputs[None][0]).abs().max() > 1e-3


def test_bad_base():
    said = "`local_rope_theta` is .*, but must be (finite|a number above 0)"
    bad = {str(theta): (theta, said) for theta in (0.0, -1.0, float("inf"), float("nan"))}
    assert_refused(lambda theta: tiny_config(local_rope_theta=theta), bad)


def test_odd_head_size():
    with pytest.raises(ValueError, match="`attention_head_size` is 7.*choose an even size, or set `local_rope_theta`"):
        tiny_config(attn_layers=["local"], attention_head_size=7)
    assert tiny_config(attn_layers=["lsh"], attention_head_size=7).attention_head_size == 7


def test_folder_of_version_0_1(tmp_path):
    """It has no rotary position embeddings, and does not get them."""
    model = random_model(attn_layers=["local"], local_rope_theta=None)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    del saved["local_rope_theta"]
    path.write_text(json.dumps(saved))
    ids = torch.arange(1, 30)[None]
    for cls in (AutoModelForCausalLM, ReformerHfForCausalLM):
        loaded = cls.from_pretrained(tmp_path)
        assert loaded.config.local_rope_theta is None
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert ReformerHfConfig.from_dict({"hidden_size": 32}).local_rope_theta == 10000.0
