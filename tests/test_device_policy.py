# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Policies by type of device: that of CUDA, run on the CPU, gives what the CPU's own gives."""

import itertools
from dataclasses import fields

import pytest
import torch

from reformer_hf.attention_pattern import AttentionPattern
from reformer_hf.chunk_attention import chunk_attention, chunk_attention_weights
from reformer_hf.device_policy import CPU, CUDA, OTHER, policy_for, suitable_chunk_size
from reformer_hf.hashing import hash_vectors, random_rotations, sort_by_bucket

from .helpers import assert_close, gradients, random_model
from .policies import CUDA_ON_CPU, CUDA_UNFUSED, set_policy

FACTORS = [4, 8]
PATTERNS = {
    "window": AttentionPattern(64, chunks_before=2, causal=True, window=True, deduplicate_keys=True),
    "window-both-ways": AttentionPattern(64, chunks_before=1, chunks_after=1, window=True),
    "chunk": AttentionPattern(64, causal=True, same_bucket=True),
    "chunk-across": AttentionPattern(64, causal=True),
    "chunk-ring": AttentionPattern(64, chunks_after=1, ring_multiple=64),
    "local": AttentionPattern(64, causal=True, include_self=True),
}
POLICIES = {"fused": CUDA_ON_CPU, "unfused": CUDA_UNFUSED}


def _vectors(length, seed):
    return torch.randn(2, length, 3, 16, generator=torch.Generator().manual_seed(seed))


def _buckets(length):
    return hash_vectors(_vectors(length, 0), random_rotations(0, 3, 16, 2, FACTORS), FACTORS)


def _attention(name, length, padded):
    """Output, gradients and weights."""
    padding = (torch.arange(length) < torch.tensor([[0], [length // 3]])) if padded else None
    order = None if name == "local" else sort_by_bucket(_buckets(length), padding)
    query, value = (_vectors(length, seed).requires_grad_() for seed in (0, 1))
    key = _vectors(length, 2).requires_grad_() if name == "local" else None
    inputs = {"query": query, "key": key, "value": value}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    out = chunk_attention(query, key, value, PATTERNS[name], order, padding)
    seen = 1.0 if padding is None else ~padding[..., None, None]
    grads = torch.autograd.grad((out * seen * _vectors(length, 3)).sum(), list(inputs.values()))
    weights, positions = chunk_attention_weights(query, key, PATTERNS[name], order, padding)
    found = {"output": out * seen, "weights": weights}
    return found | {f"grad of {name}": grad for name, grad in zip(inputs, grads, strict=True)}, positions


def test_attention_of_cuda_policy(monkeypatch):
    lengths = ((29, True), (333, False), (333, True), (1024, False))
    for name, (length, padded) in itertools.product(PATTERNS, lengths):
        set_policy(monkeypatch, CPU)
        expected, expected_positions = _attention(name, length, padded)
        for kernel, policy in POLICIES.items():
            set_policy(monkeypatch, policy)
            found, positions = _attention(name, length, padded)
            of = f"{name}, {kernel}, length {length}, padded {padded}"
            assert torch.equal(positions, expected_positions), of
            for tensor in expected:
                assert_close(found[tensor], expected[tensor], 1e-5, f"{tensor}, {of}")


def test_buckets_of_cuda_policy(monkeypatch):
    lengths = (5, 333, 5000)
    expected = {length: _buckets(length) for length in lengths}
    set_policy(monkeypatch, CUDA_UNFUSED)
    for length in lengths:
        assert torch.equal(_buckets(length), expected[length]), length


def test_rotations_ignore_default_device():
    with torch.device("meta"):
        assert random_rotations(0, 3, 16, 2, FACTORS).device.type == "cpu"


@pytest.mark.parametrize(("lsh_pattern", "kernel"), [("window", "fused"), ("chunk", "unfused")])
def test_model_of_cuda_policy(lsh_pattern, kernel, monkeypatch):
    """A training step at a length that the CPU cuts into chunks of positions and groups of heads."""
    results = []
    for other in (CPU, POLICIES[kernel]):
        set_policy(monkeypatch, other, chunk_positions=100 if other is CPU else other.chunk_positions)
        model = random_model(torch.float64, attn_layers=["local", "lsh"], hash_seed=0, lsh_pattern=lsh_pattern).train()
        ids = torch.randint(1, 60, (2, 251), generator=torch.Generator().manual_seed(0))
        model(ids, labels=ids).loss.backward()
        results.append(gradients(model))
    for name, grad in results[1].items():
        assert_close(grad, results[0][name], 1e-10, name)


def test_sizes_of_policies():
    """More at a time on a GPU; windows of whole chunks there, and no other kernel than its own."""
    for field in fields(CPU):
        if field.type is int:
            assert getattr(CUDA, field.name) > getattr(CPU, field.name), field.name
    pattern = PATTERNS["window"]
    assert pattern.for_device(torch.device("cuda")) == pattern
    assert pattern.for_device(torch.device("cpu")).chunk_length == 32
    assert suitable_chunk_size(2, 1 << 20, "cuda") == 1 << 15
    assert suitable_chunk_size(2, 1 << 20, "cpu") == 1 << 9


def test_policy_by_device():
    for device, policy in (("cpu", CPU), ("cuda", CUDA), ("cuda:1", CUDA), ("mps", OTHER)):
        assert policy_for(device) is policy, device
        assert policy_for(torch.device(device)) is policy, device


def _takes(kernel, dtype=torch.float32, chunk=64, window=192, size=64, value_size=64):
    shapes = ((chunk, size), (window, size), (window, value_size))
    return kernel.takes(*(torch.empty(1, 1, *shape, dtype=dtype, device="meta") for shape in shapes))


def test_tiles_of_kernels():
    assert _takes(CPU.kernel) and _takes(CUDA.kernel) and _takes(CUDA.kernel, torch.bfloat16)
    assert _takes(CPU.kernel, chunk=5, window=7, size=3, value_size=3)
    assert not _takes(CPU.kernel, torch.bfloat16)
    assert not _takes(CPU.kernel, value_size=32)
    assert _takes(CUDA.kernel, value_size=32)
    # A mask in fp16 is not low enough, and fp64 has no kernel.
    assert not _takes(CUDA.kernel, torch.float16)
    assert not _takes(CUDA.kernel, torch.float64)
    for sizes in ({"chunk": 48}, {"window": 100}, {"size": 20}, {"value_size": 20}):
        assert not _takes(CUDA.kernel, **sizes)
