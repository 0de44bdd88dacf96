# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Hashing: rotations, buckets and their number as in-tree and as the plain definition, and the sorted order."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention as InTreeLSHSelfAttention

from reformer_hf.hashing import (
    both_signs,
    bucket_factors,
    hash_few,
    hash_vectors,
    invert_order,
    projections_of,
    random_rotations,
    sort_by_bucket,
    unpack_order,
)

from .policies import set_policy

FACTORS = [[2], [16], [4, 8], [2, 6, 4]]


def _plain_buckets(vectors, rotations, factors):
    """`argmax([xR; -xR])`, part by part, the first factor's digit the lowest."""
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    projected = torch.einsum("blhd,hdrn->bhrln", vectors.to(dtype), rotations.to(dtype))
    buckets, stride = 0, 1
    for factor, part in zip(factors, projected.split([factor // 2 for factor in factors], dim=-1), strict=True):
        buckets = buckets + stride * torch.cat([part, -part], dim=-1).argmax(-1)
        stride *= factor
    return buckets


def _in_tree_layer(**fields):
    defaults = {"attn_layers": ["lsh"], "num_attention_heads": 3, "attention_head_size": 8, "hidden_size": 24}
    return InTreeLSHSelfAttention(ReformerConfig(**{**defaults, **fields}))


def test_rotations_equal_in_tree():
    for seed, factors in itertools.product((0, 1234), FACTORS):
        torch.manual_seed(seed)
        expected = torch.randn(3, 8, 4, sum(factors) // 2)
        torch.manual_seed(99)
        before = torch.get_rng_state()
        assert torch.equal(random_rotations(seed, 3, 8, 4, factors), expected), (seed, factors)
        assert torch.equal(torch.get_rng_state(), before)


def test_rotations_ignore_default_dtype():
    expected = random_rotations(0, 2, 8, 2, [4])
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(random_rotations(0, 2, 8, 2, [4]), expected), dtype
        finally:
            torch.set_default_dtype(torch.float32)


def test_rotations_differ():
    rotations = random_rotations(0, 2, 8, 2, [4])
    assert not torch.equal(rotations, random_rotations(1, 2, 8, 2, [4]))
    assert not torch.equal(rotations[0], rotations[1])
    assert not torch.equal(rotations[:, :, 0], rotations[:, :, 1])


def test_buckets_are_argmax():
    """In tiles of one vector, of some, and in one tile."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for factors, dtype in itertools.product(FACTORS, dtypes):
        rotations = random_rotations(5, 3, 8, 4, factors)
        torch.manual_seed(0)
        vectors = torch.randn(2, 101, 3, 8).to(dtype)
        expected = _plain_buckets(vectors, rotations, factors)
        for tile in (None, 1, 500):
            with pytest.MonkeyPatch.context() as patch:
                if tile:
                    set_policy(patch, hash_tile_elements=tile)
                buckets = hash_vectors(vectors, rotations, factors)
            assert buckets.dtype == torch.int32
            assert torch.equal(buckets.long(), expected), (factors, dtype, tile)


def test_buckets_equal_in_tree():
    torch.manual_seed(0)
    vectors = torch.randn(2, 77, 3, 8)
    for factors in FACTORS:
        layer = _in_tree_layer(hash_seed=7, num_buckets=factors if len(factors) > 1 else factors[0])
        num_buckets = torch.tensor(factors).prod()
        # In-tree wants heads before positions, and numbers the buckets of all rounds through.
        expected = layer._hash_vectors(vectors.transpose(1, 2), 4, None).unflatten(-1, (4, 77))
        expected = expected - num_buckets * torch.arange(4)[:, None]
        buckets = hash_vectors(vectors, random_rotations(7, 3, 8, 4, factors), factors)
        assert torch.equal(buckets.long(), expected), factors


def test_hash_few_equals_hash_vectors():
    """One vector and several, zeros among them, also under autocast."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for factors, dtype, length in itertools.product(([1], *FACTORS), dtypes, (1, 7)):
        rotations = random_rotations(5, 3, 8, 4, factors)
        torch.manual_seed(0)
        vectors = torch.randn(2, length, 3, 8).to(dtype)
        vectors[1, -1, 0] = 0
        signed = both_signs(projections_of(rotations, factors, dtype, vectors.device), 4)
        expected = hash_vectors(vectors, rotations, factors).transpose(2, 3).long()
        assert torch.equal(hash_few(signed, vectors, 4), expected), (factors, dtype, length)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(hash_few(signed, vectors, 4), expected), (factors, dtype, length)


def test_projections_on_device():
    rotations = random_rotations(0, 3, 8, 4, [2, 4])
    for projection in projections_of(rotations, [2, 4], torch.float32, torch.device("meta")):
        assert projection.device.type == "meta"


def test_every_bucket_is_used():
    torch.manual_seed(0)
    vectors = torch.randn(1, 4096, 1, 8)
    for factors in FACTORS:
        buckets = hash_vectors(vectors, random_rotations(0, 1, 8, 1, factors), factors)
        assert buckets.unique().tolist() == list(range(torch.tensor(factors).prod()))


def test_one_bucket():
    vectors = torch.randn(2, 5, 3, 8)
    assert not hash_vectors(vectors, random_rotations(0, 3, 8, 2, [1]), [1]).any()


def test_zero_vectors_take_first_bucket():
    vectors = torch.zeros(1, 3, 2, 8)
    vectors[0, 1] = -0.0
    for factors in FACTORS:
        assert not hash_vectors(vectors, random_rotations(0, 2, 8, 4, factors), factors).any(), factors


def test_hashing_in_fp64():
    vectors = torch.tensor([[[[1.0, 1.0 + 1e-12]]]], dtype=torch.float64)
    rotations = torch.eye(2).view(1, 2, 1, 2)
    assert hash_vectors(vectors, rotations, [4]).item() == 1


def test_bucket_depends_on_direction_alone():
    torch.manual_seed(0)
    vectors = torch.randn(2, 50, 3, 8, dtype=torch.float64)
    rotations = random_rotations(0, 3, 8, 2, [16])
    buckets = hash_vectors(vectors, rotations, [16])
    assert torch.equal(hash_vectors(vectors * 1024, rotations, [16]), buckets)
    assert torch.equal(hash_vectors(vectors[1:, 20:30], rotations, [16]), buckets[1:, ..., 20:30])


def test_buckets_without_autocast_and_gradient():
    torch.manual_seed(0)
    vectors = torch.randn(1, 500, 2, 8, requires_grad=True)
    rotations = random_rotations(0, 2, 8, 2, [64])
    with torch.autocast("cpu", torch.bfloat16):
        buckets = hash_vectors(vectors, rotations, [64])
    assert torch.equal(buckets, hash_vectors(vectors.detach(), rotations, [64]))


def test_buckets_no_longer_than_window():
    lengths = (1, 2, 16, 17, 100, 101, 255, 256, 257, 4096, 65536)
    for window_length, length in itertools.product((1, 16, 100, 128), lengths):
        num_buckets = math.prod(bucket_factors(None, length, 64, 65536, window_length))
        assert length <= num_buckets * window_length
        assert num_buckets == 1 or num_buckets * window_length < 2 * length


def test_bucket_factors_equal_in_tree():
    for chunk_length, longest in ((4, 4096), (16, 1024), (64, 4096), (64, 65536)):
        layer = _in_tree_layer(num_buckets=None, lsh_attn_chunk_length=chunk_length, max_position_embeddings=longest)
        lengths = {*range(chunk_length, longest, 61), *range(chunk_length, 4 * chunk_length)}
        lengths |= {chunk_length * 2**i + j for i in range(20) for j in (-1, 0, 1)} | {longest}
        for length in sorted(length for length in lengths if chunk_length <= length <= longest):
            layer._set_num_buckets(length)
            expected = layer.num_buckets if isinstance(layer.num_buckets, list) else [layer.num_buckets]
            found = bucket_factors(None, length, chunk_length, longest)
            assert found == expected, (length, chunk_length, longest)


def test_short_inputs_have_two_buckets():
    for length in (1, 2, 63, 64, 127):
        assert bucket_factors(None, length, 64, 4096) == [2], length


def test_given_buckets():
    assert bucket_factors(6, 1000, 64, 4096) == [6]
    given_factors = [4, 8]
    factors = bucket_factors(given_factors, 1000, 64, 4096)
    factors[0] = 2
    assert given_factors == [4, 8]


@st.composite
def _buckets_and_padding(draw):
    batch_size, num_heads, num_hashes = (draw(st.integers(1, 2)) for _ in range(3))
    length = draw(st.integers(1, 12))
    size = batch_size * num_heads * num_hashes * length
    buckets = draw(st.lists(st.integers(0, draw(st.sampled_from([0, 3, 20]))), min_size=size, max_size=size))
    padding = None
    if draw(st.booleans()):
        flags = draw(st.lists(st.booleans(), min_size=batch_size * length, max_size=batch_size * length))
        padding = torch.tensor(flags).view(batch_size, length)
    return torch.tensor(buckets, dtype=torch.int32).view(batch_size, num_heads, num_hashes, length), padding


@settings(max_examples=2 * settings().max_examples)
@given(_buckets_and_padding())
def test_order_is_stable_sort(case):
    buckets_BHRL, padding_BL = case
    length = buckets_BHRL.shape[-1]
    positions_BHRL, starts_BHRL = unpack_order(sort_by_bucket(buckets_BHRL, padding_BL))
    assert positions_BHRL.dtype == torch.int32
    for b in range(buckets_BHRL.shape[0]):
        padding = [False] * length if padding_BL is None else padding_BL[b].tolist()
        for buckets, positions, starts in zip(
            buckets_BHRL[b].flatten(0, 1).tolist(),
            positions_BHRL[b].flatten(0, 1).tolist(),
            starts_BHRL[b].flatten(0, 1).tolist(),
            strict=True,
        ):
            # Padding is one bucket more, whatever its vectors hash to.
            def bucket(i, padding=padding, buckets=buckets):
                return padding[i], 0 if padding[i] else buckets[i]

            assert positions == sorted(range(length), key=lambda i: (bucket(i), i))  # noqa: B023
            begins = [s == 0 or bucket(positions[s]) != bucket(positions[s - 1]) for s in range(length)]
            assert starts == begins


@given(_buckets_and_padding())
def test_order_unpacks_and_inverts(case):
    order = sort_by_bucket(*case)
    positions, starts = unpack_order(order)
    assert torch.equal(torch.where(starts, ~positions, positions), order)
    slots = invert_order(positions)
    everyone = torch.arange(order.shape[-1], dtype=torch.int32).expand_as(order)
    assert torch.equal(positions.gather(-1, slots.long()), everyone)
    assert torch.equal(slots.gather(-1, positions.long()), everyone)
    assert torch.equal(invert_order(slots), positions)


def test_sort_copies_buckets():
    buckets = torch.tensor([[[[1, 0, 1]]]], dtype=torch.int32)
    kept = buckets.clone()
    sort_by_bucket(buckets, torch.tensor([[True, False, False]]))
    assert torch.equal(buckets, kept)
