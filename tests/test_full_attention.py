# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Full shared query-key attention against the dense definition: outputs, gradients, queries without keys, weights."""

import itertools

import pytest
import torch

from reformer_hf.full_attention import FullSelfAttention, _causal_attention, _masked_attention, or_itself
from reformer_hf.self_attention import AttentionCall

from .helpers import assert_close, relative_rms, tiny_config
from .reference import dense_attention, full_attention_counts, normalized_keys

each_direction = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
SIDES = [None, "left", "right", "middle", "whole-row"]


def _layer(causal, **fields):
    torch.manual_seed(0)
    return FullSelfAttention(tiny_config(is_decoder=causal, **fields)).double()


def _inputs(length, side, batch_size=3):
    """Hidden states and padding, none in the first row."""
    torch.manual_seed(length)
    hidden_states = torch.randn(batch_size, length, 32, dtype=torch.float64)
    if side is None:
        return hidden_states, None
    padding = torch.zeros(batch_size, length, dtype=torch.bool)
    count = min(7, length - 1)
    padded = {"left": slice(0, count), "right": slice(length - count, None), "middle": slice(count, 2 * count)}
    padding[1:, padded.get(side, slice(0, 0))] = True
    if side == "whole-row":
        padding[-1] = True
    return hidden_states, padding


def _definition(layer, hidden_states, padding):
    query, value = layer.project(hidden_states, layer.all_heads)
    no_padding = torch.zeros(hidden_states.shape[:2], dtype=torch.bool)
    counts = full_attention_counts(layer.config.is_decoder, no_padding if padding is None else padding)
    return dense_attention(query, normalized_keys(query), value, counts, own_value=True).flatten(2)


def _assert_equals_definition(causal, side, length):
    layer = _layer(causal)
    hidden_states, padding = _inputs(length, side)
    hidden_states.requires_grad_()
    real = torch.ones(3, length, 1) if padding is None else ~padding[..., None]
    weight = torch.randn(3, length, 32, dtype=torch.float64) * real
    tensors = {"hidden states": hidden_states, **dict(layer.named_parameters())}
    results = []
    for out in (
        layer(hidden_states, AttentionCall.on(hidden_states, padding=padding))[0],
        _definition(layer, hidden_states, padding),
    ):
        grads = torch.autograd.grad((out * weight).sum(), list(tensors.values()), allow_unused=True)
        results.append((out * real, dict(zip(tensors, grads, strict=True))))
    (out, grads), (expected, expected_grads) = results
    assert_close(out, expected, 1e-12)
    for name, grad in grads.items():
        if name == "query_key.weight" and length <= 2:
            # A single key has all the weight, whatever the query is.
            assert grad is None or grad.norm() <= 1e-12 * expected_grads["value.weight"].norm()
        else:
            assert_close(grad, expected_grads[name], 1e-12, name)


@each_direction
def test_equals_definition(causal):
    for side, length in itertools.product(SIDES, (1, 2, 7, 64, 101)):
        _assert_equals_definition(causal, side, length)


def test_padding_changes_nothing():
    """Neither what stands at padding nor that it is there."""
    for causal in (False, True):
        layer, of = _layer(causal), f"causal {causal}"
        hidden_states, padding = _inputs(40, "left")
        out, _ = layer(hidden_states, AttentionCall.on(hidden_states, padding=padding))
        other = torch.where(padding[..., None], 100.0, hidden_states)
        found, _ = layer(other, AttentionCall.on(other, padding=padding))
        assert_close(found[~padding], out[~padding], 1e-14, f"other padding, {of}")
        assert_close(layer(hidden_states[1:, 7:])[0], out[1:, 7:], 1e-14, f"no padding, {of}")


def test_later_positions_change_nothing():
    layer = _layer(causal=True)
    hidden_states, _ = _inputs(40, None)
    other = hidden_states.clone()
    other[:, 20:] += 1
    assert_close(layer(other)[0][:, :20], layer(hidden_states)[0][:, :20], 1e-14)


@each_direction
def test_dropout_keeps_own_values(causal):
    layer = _layer(causal, lsh_attention_probs_dropout_prob=0.9).train()
    hidden_states, _ = _inputs(9, None)
    padding = torch.zeros(3, 9, dtype=torch.bool)
    # Row 0 holds one position that is not padding; row 1 begins at position 4.
    padding[0], padding[0, 5], padding[1, :4] = True, False, True
    out, _ = layer(hidden_states, AttentionCall.on(hidden_states, padding=padding))
    value = layer.value(hidden_states)
    assert torch.equal(out[0, 5], value[0, 5])
    if causal:
        assert torch.equal(out[1, 4], value[1, 4])
        assert torch.equal(layer(hidden_states)[0][:, 0], value[:, 0])
    whole, _ = layer.eval()(hidden_states, AttentionCall.on(hidden_states, padding=padding))
    assert relative_rms(out[2], whole[2]) > 0.1


@each_direction
def test_dropout_keeps_mean(causal):
    length, rate = 64, 0.25
    query = torch.zeros(1, 4, length, 8)
    one_hot = torch.eye(length).expand(1, 4, length, length)
    torch.manual_seed(0)
    if causal:
        weights = _causal_attention(query, query, one_hot, rate)[:, :, 1:]
        seen = torch.ones(length, length).tril(-1)[1:]
    else:
        visible = ~torch.eye(length, dtype=torch.bool)
        weights = _masked_attention(query, query, one_hot, visible, rate)
        seen = visible.float()
    expected = (seen / seen.sum(-1, keepdim=True) / (1 - rate)).expand_as(weights)
    kept = weights != 0
    assert_close(weights[kept], expected[kept], 1e-6)
    share = kept.sum() / (4 * seen.sum())
    assert abs(share - (1 - rate)) < 0.02


def test_weights():
    for causal, side in itertools.product((False, True), SIDES):
        _assert_weights(causal, side)


def _assert_weights(causal, side):
    layer, of = _layer(causal), f"causal {causal}, padding {side}"
    hidden_states, padding = _inputs(23, side)
    call = AttentionCall.on(hidden_states, padding=padding, output_attentions=True)
    out, found = layer.attend(layer.project(hidden_states, layer.all_heads), call, layer.all_heads)
    out, (weights, positions) = out.flatten(2), found.weights
    assert weights.shape == positions.shape == (3, 2, 1, 23, 23)
    assert not weights.requires_grad
    assert_close(weights.sum((2, 4)), torch.ones(3, 2, 23), 1e-12, f"sum of weights, {of}")
    value = layer.value(hidden_states).unflatten(-1, (2, 16))
    real = torch.ones(3, 23, dtype=torch.bool) if padding is None else ~padding
    reproduced = torch.einsum("bhij,bjhe->bihe", weights[:, :, 0], value).flatten(2)
    assert_close(reproduced[real], out[real], 1e-12, f"output, {of}")
    counts = full_attention_counts(causal, ~real) > 0
    seen = or_itself(counts, torch.arange(23))
    own = torch.arange(23, dtype=torch.int32).expand_as(positions)
    assert torch.equal(positions, torch.where(seen[:, :, None], own, -1)), of
    assert torch.equal(weights > 0, positions >= 0), of


def test_padding_rows_finite():
    layer = _layer(causal=True).bfloat16()
    hidden_states, padding = _inputs(9, "whole-row")
    hidden_states = hidden_states.bfloat16().requires_grad_()
    out, _ = layer(hidden_states, AttentionCall.on(hidden_states, padding=padding))
    assert out.isfinite().all()
    for grad in torch.autograd.grad(out.sum(), [hidden_states, *layer.parameters()]):
        assert grad.isfinite().all()
