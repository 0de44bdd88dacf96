# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Heads in groups and positions in chunks: the same function as all at once, gradients too."""

import pytest
import torch
from torch import nn

from reformer_hf import self_attention
from reformer_hf.chunk_attention import chunk_attention_weights
from reformer_hf.self_attention import AttentionCall, SelfAttention

from .helpers import assert_close, gradients, random_model, relative_rms, tiny_config
from .policies import set_policy

LAYERS = ["local", "lsh", "full"]


@pytest.fixture
def small_chunks(monkeypatch):
    """Positions are read and written a few at a time, as those of a long input are."""
    set_policy(monkeypatch, chunk_positions=32)


def _model(num_parallel_heads, dtype=torch.float64, **fields):
    fields = {"attn_layers": LAYERS, "num_attention_heads": 3, "hash_seed": 0, **fields}
    return random_model(dtype, num_parallel_heads=num_parallel_heads, **fields).train()


def _inputs(padded):
    torch.manual_seed(1)
    inputs = {"input_ids": torch.randint(0, 60, (2, 77))}
    inputs["labels"] = inputs["input_ids"]
    if padded:
        inputs["attention_mask"] = torch.ones(2, 77, dtype=torch.long)
        inputs["attention_mask"][0, :30] = 0
    return inputs


def _step(model, padded, **arguments):
    torch.manual_seed(2)
    output = model(**_inputs(padded), **arguments)
    output.loss.backward()
    return output, gradients(model)


@pytest.mark.parametrize(
    ("padded", "reversible", "num_parallel_heads"),
    [(False, True, 1), (True, True, 2), (True, False, 1), (False, False, 2)],
    ids=["whole-reversible-1", "padded-reversible-2", "padded-plain-1", "whole-plain-2"],
)
def test_groups_equal_all_at_once(padded, reversible, num_parallel_heads, small_chunks):
    """With dropout of what is added, which is one for the sum over groups."""
    (output, grads), (expected, expected_grads) = (
        _step(_model(heads, reversible=reversible, hidden_dropout_prob=0.2), padded)
        for heads in (num_parallel_heads, 3)
    )
    assert_close(output.logits, expected.logits, 1e-12)
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], 1e-11, name)


@pytest.mark.parametrize("reversible", [True, False], ids=["reversible", "plain"])
def test_chunks_equal_all_at_once(reversible, monkeypatch):
    results = []
    for positions in (1 << 10, 32):
        set_policy(monkeypatch, chunk_positions=positions)
        results.append(_step(_model(2, reversible=reversible), padded=True))
    (output, grads), (expected, expected_grads) = results
    assert_close(output.logits, expected.logits, 1e-12)
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], 1e-11, name)


def test_reversible_equals_plain_in_chunks(small_chunks):
    """Dropout of the feed-forward layer is drawn chunk by chunk: both have the same chunks."""
    fields = {"chunk_size_feed_forward": 16, "hidden_dropout_prob": 0.1}
    (output, grads), (expected, expected_grads) = (
        _step(_model(1, reversible=reversible, **fields), padded=True) for reversible in (True, False)
    )
    assert_close(output.logits, expected.logits, 1e-12)
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], 1e-11, name)


def test_reversible_equals_plain_in_chunks_under_autocast(small_chunks):
    """Within the noise of the dtype: the sum over groups of heads rounds differently."""
    grads = []
    for reversible, autocast in ((True, True), (False, True), (False, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _, found = _step(_model(1, torch.float32, reversible=reversible), padded=False)
        grads.append(torch.cat([grad.flatten() for grad in found.values()]))
    reversible, plain, exact = grads
    assert_close(reversible, exact, 1.5 * relative_rms(plain, exact))


def test_attention_weights_of_all_groups():
    inputs = _inputs(padded=True)
    found, expected = (_model(heads).eval()(**inputs, output_attentions=True) for heads in (1, 3))
    for layer in range(len(LAYERS)):
        assert_close(found.attentions[layer], expected.attentions[layer], 1e-12)
        assert torch.equal(found.attention_positions[layer], expected.attention_positions[layer])


def test_backward_does_not_recompute_weights(monkeypatch):
    calls = []
    monkeypatch.setattr(
        self_attention, "chunk_attention_weights", lambda *args: (calls.append(1), chunk_attention_weights(*args))[1]
    )
    output, _ = _step(_model(1, attn_layers=["lsh", "local"]), padded=False, output_attentions=True)
    assert len(output.attentions) == 2
    assert len(calls) == 3 * 2


class _Doubled(nn.Linear):
    """More than a plain linear layer: a part of its weight gives no part of its output."""

    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("name", "how"),
    [("self_attention.query_key", "subclass"), ("self_attention.value", "hook"), ("output.dense", "hook")],
)
def test_what_is_more_than_a_linear_layer_computes_all_heads(name, how, small_chunks):
    results = []
    for reversible in (True, False):
        model = _model(1, attn_layers=["lsh"], reversible=reversible)
        projection = model.reformer.encoder.layers[0].attention.get_submodule(name)
        if how == "subclass":
            projection.__class__ = _Doubled
        else:
            projection.register_forward_hook(lambda module, args, out: 2 * out)
        results.append(_step(model, padded=False))
    doubled = _model(1, attn_layers=["lsh"])
    doubled.reformer.encoder.layers[0].attention.get_submodule(name).weight.data.mul_(2)
    expected = _step(doubled, padded=False)[0].logits
    (output, grads), (plain, plain_grads) = results
    assert_close(output.logits, expected, 1e-12)
    assert_close(plain.logits, expected, 1e-12)
    for parameter, grad in grads.items():
        assert_close(grad, plain_grads[parameter], 1e-11, parameter)


def test_hidden_states_that_somebody_holds_are_not_written_over():
    """The backward pass reuses the memory of streams that it made itself, and of no others."""
    model = _model(1, attn_layers=LAYERS * 2)
    held = []
    for layer in model.reformer.encoder.layers:
        layer.register_forward_hook(lambda module, args, out: held.extend(out[:2]))
    loss = model(**_inputs(padded=False), output_hidden_states=True).loss
    copies = [x.detach().clone() for x in held]
    loss.backward()
    assert len(held) == 12
    for x, copy in zip(held, copies, strict=True):
        assert torch.equal(x, copy)


def test_groups_by_device_and_length():
    attention = SelfAttention(tiny_config(num_attention_heads=8))
    output = nn.Linear(4, 4)
    for length, sizes in ((1 << 12, [8]), (1 << 14, [2] * 4), (1 << 20, [1] * 8)):
        groups = attention.head_groups(AttentionCall.on(torch.empty(1, length, 0)), output)
        assert [heads.stop - heads.start for heads in groups] == sizes
        assert [heads.start for heads in groups] == list(range(0, 8, sizes[0]))
    groups = SelfAttention(tiny_config(num_attention_heads=5, num_parallel_heads=2)).head_groups(
        AttentionCall.on(torch.empty(1, 1, 0)), output
    )
    assert groups == [slice(0, 2), slice(2, 4), slice(4, 5)]
