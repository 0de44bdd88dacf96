# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Chunk attention against the dense definition: outputs, every gradient, masks, weights, limits and exact cases."""

import itertools
import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reformer_hf import attention_kernels
from reformer_hf.attention_kernels import merge
from reformer_hf.attention_pattern import AttentionPattern
from reformer_hf.chunk_attention import chunk_attention, chunk_attention_weights
from reformer_hf.hashing import hash_vectors, random_rotations, sort_by_bucket

from .helpers import assert_close, relative_rms
from .policies import set_policy
from .reference import dense_attention, full_attention_counts, key_counts, normalized_keys

C = 8
KINDS = ["bucket", "across", "window", "local", "local-sorted", "ring", "ring-far", "ring-local"]


def _pattern(kind, causal, deduplicate=False, chunk_length=C):
    """The pattern of one kind of layer."""
    fields = {"causal": causal, "deduplicate_keys": deduplicate, "chunks_after": 0 if causal else 1}
    if kind.startswith("ring"):
        # Longer by some chunks than it need be, as where the chunk length of another layer is.
        fields["ring_multiple"] = 2 * chunk_length
        fields["include_self"] = kind == "ring-local"
        if kind == "ring-far":
            fields["chunks_before"] = 5
    elif kind == "window":
        fields |= {"window": True, "chunks_before": 2}
    elif kind == "bucket":
        fields["same_bucket"] = True
    elif kind.startswith("local"):
        fields |= {"include_self": True, "chunks_before": 2}
    return AttentionPattern(chunk_length, **fields)


def _padding(batch_size, length, side):
    if side is None:
        return None
    padding = torch.zeros(batch_size, length, dtype=torch.bool)
    for b in range(batch_size):
        count = (3 * b + 1) % length
        if side == "left":
            padding[b, :count] = True
        elif side == "right":
            padding[b, length - count :] = True
        elif side == "middle":
            padding[b, length // 3 : length // 3 + count] = True
    if side == "whole-row":
        padding[-1] = True
    return padding


@dataclass
class _Case:
    """Inputs of the op, and what the oracle needs."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    pattern: AttentionPattern
    order: torch.Tensor | None
    padding: torch.Tensor | None
    count_keys: Callable[[], torch.Tensor]
    dropout: float = 0.0
    # Whether queries serve as keys.
    shared: bool = False

    @property
    def counts(self):
        """How often each query meets each key, `[B, H, L, L]`."""
        return self.count_keys()

    @property
    def real(self):
        """Where outputs mean something, `[B, L, 1, 1]`."""
        if self.padding is None:
            return torch.ones(*self.query.shape[:2], 1, 1, dtype=torch.bool)
        return ~self.padding[..., None, None]

    def op(self, dtype=torch.float64):
        """Output and gradients of the op."""
        rest = (self.pattern, self.order, self.padding, self.dropout, 7)
        return self._with_gradients(lambda q, k, v: chunk_attention(q, None if self.shared else k, v, *rest), dtype)

    def oracle(self):
        """Output and gradients of the definition in fp64, under the same dropout."""
        kept = self._kept_counts()
        own_value = not self.pattern.include_self
        return self._with_gradients(
            lambda q, k, v: dense_attention(
                q, normalized_keys(q) if self.shared else k, v, self.counts, own_value, kept
            ),
            torch.float64,
        )

    def _kept_counts(self):
        """What dropout keeps: queries of zero give equal weights, and one-hot values tell which of them are left."""
        if not self.dropout:
            return None
        batch_size, length, num_heads, _ = self.query.shape
        zeros = torch.zeros_like(self.query, dtype=torch.float64)
        one_hot = torch.eye(length, dtype=torch.float64)[None, :, None].expand(batch_size, length, num_heads, length)
        weights = chunk_attention(zeros, zeros, one_hot, self.pattern, self.order, self.padding, self.dropout, 7)
        return weights.transpose(1, 2) * self.counts.sum(-1, keepdim=True)

    def _with_gradients(self, function, dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (self.query, self.key, self.value)]
        out = function(*inputs)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        weight = weight.to(out.device)
        grads = torch.autograd.grad((out * (weight * self.real).to(dtype)).sum(), inputs, allow_unused=self.shared)
        names = ("output", "grad of query", "grad of key", "grad of value")
        found = dict(zip(names, (out.detach() * self.real, *grads), strict=True))
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def _case(
    kind, causal, deduplicate=False, shape=(2, 37, 2, 8, 5, 2), side=None, dropout=0.0, chunk_length=C, factors=(4, 2)
):
    """Random inputs `shape = (B, L, H, D, E, R)` that hash into buckets, and how often each query meets each key."""
    return replace(
        _case_without_dropout(kind, causal, deduplicate, shape, side, chunk_length, factors), dropout=dropout
    )


@lru_cache(maxsize=64)
def _case_without_dropout(kind, causal, deduplicate, shape, side, chunk_length, factors):
    batch_size, length, num_heads, head_size, value_size, num_hashes = shape
    generator = torch.Generator().manual_seed(length)
    query, key, value = (
        torch.randn(batch_size, length, num_heads, size, generator=generator, dtype=torch.float32).double()
        for size in (head_size, head_size, value_size)
    )
    pattern = _pattern(kind, causal, deduplicate, chunk_length)
    padding = _padding(batch_size, length, side)
    flags = torch.zeros(batch_size, length, dtype=torch.bool) if padding is None else padding
    local = "local" in kind
    if local:
        buckets = torch.zeros(batch_size, num_heads, 1, length, dtype=torch.int32)
        order = sort_by_bucket(buckets[:, :1], padding) if kind == "local-sorted" else None
    else:
        rotations = random_rotations(0, num_heads, head_size, num_hashes, list(factors))
        buckets = hash_vectors(query, rotations, list(factors))
        order = sort_by_bucket(buckets, padding)

    def counts(b, h):
        if local and order is None:
            # Padding stays where it is in the order of positions.
            return key_counts(pattern, buckets[b, h].tolist(), [False] * length) * ~flags[b]
        return key_counts(pattern, buckets[b, h].tolist(), flags[b].tolist())

    @cache
    def count_keys():
        heads = range(1 if local else num_heads)
        all_counts = torch.stack([torch.stack([counts(b, h) for h in heads]) for b in range(batch_size)])
        return all_counts.expand(-1, num_heads, -1, -1)

    return _Case(query, key, value, pattern, order, padding, count_keys)


def _assert_equals_oracle(case, limit=1e-10, dtype=torch.float64, of=""):
    expected = case.oracle()
    # Where queries hardly choose among keys, gradients of queries and keys are what rounding leaves of larger terms.
    size = 0.1 * expected["grad of value"].norm()
    for name, found in case.op(dtype).items():
        error = (found - expected[name]).norm() / max(expected[name].norm(), size)
        assert error <= limit or torch.equal(found, expected[name]), (
            f"{name} {of}: relative error {error:.3g} > {limit}"
        )


@contextmanager
def _tiles_of(chunks, pattern, batched_rounds=0):
    """Tiles of that many chunks; with None, those of the package."""
    with pytest.MonkeyPatch.context() as patch:
        if chunks:
            set_policy(patch, tile_scores=chunks * pattern.chunk_length * pattern.window_length)
        set_policy(patch, batched_rounds=batched_rounds)
        yield


def _shape_id(shape):
    return "B{}-L{}-H{}-D{}-E{}-R{}".format(*shape)


SHAPES = [
    (1, 1, 2, 4, 4, 2),
    (2, 2, 1, 4, 3, 1),
    (3, 7, 2, 4, 6, 4),
    (2, 63, 2, 8, 5, 2),
    (3, 101, 1, 8, 8, 1),
    (1, 257, 2, 8, 3, 2),
]
SIDES = [None, "left", "right", "middle", "whole-row"]
PATTERNS = [(kind, False) for kind in KINDS] + [(kind, True) for kind in ("bucket", "across", "window")]
each_pattern = pytest.mark.parametrize(
    ("kind", "deduplicate"),
    PATTERNS,
    ids=[f"{kind}{'-deduplicated' if deduplicate else ''}" for kind, deduplicate in PATTERNS],
)
# Patterns by the kind of layer that has them.
FAMILIES = {
    "lsh": [pattern for pattern in PATTERNS if pattern[0] in ("bucket", "across", "window")],
    "local": [pattern for pattern in PATTERNS if pattern[0] in ("local", "local-sorted")],
    "ring": [pattern for pattern in PATTERNS if pattern[0].startswith("ring")],
}
each_family = pytest.mark.parametrize("family", FAMILIES)
each_direction = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])

# Every padding side; dropout and shared queries and keys with and without each other.
PINNED = [
    (None, 0.0, False),
    (None, 0.3, True),
    ("left", 0.0, True),
    ("left", 0.3, False),
    ("right", 0.3, True),
    ("middle", 0.0, False),
    ("whole-row", 0.3, False),
    ("whole-row", 0.0, True),
]


@each_family
def test_equals_oracle(family):
    for (kind, deduplicate), causal, pinned in itertools.product(FAMILIES[family], (False, True), PINNED):
        side, dropout, shared = pinned
        case = replace(_case(kind, causal, deduplicate, (2, 37, 2, 8, 5, 3), side, dropout), shared=shared)
        of = f"{kind}, deduplicated {deduplicate}, causal {causal}, padding {side}, dropout {dropout}, shared {shared}"
        _assert_equals_oracle(case, of=of)


_kinds = st.sampled_from(PATTERNS)
_shapes = st.tuples(
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(1, 2),
    st.sampled_from([4, 8]),
    st.sampled_from([3, 4, 8]),
    st.integers(1, 4),
)


@given(
    kind=_kinds,
    causal=st.booleans(),
    shape=_shapes,
    side=st.sampled_from(SIDES),
    dropout=st.sampled_from([0.0, 0.3]),
    shared=st.booleans(),
    chunks=st.sampled_from([None, 3, 20]),
    limit=st.sampled_from([1e-10, 1e-5]),
)
@example(("bucket", True), True, SHAPES[0], None, 0.0, False, None, 1e-10)
@example(("ring", False), False, SHAPES[0], None, 0.0, False, None, 1e-10)
@example(("across", True), False, SHAPES[1], None, 0.0, False, None, 1e-10)
@example(("ring-far", False), True, SHAPES[2], None, 0.0, False, None, 1e-10)
@example(("window", True), False, SHAPES[3], None, 0.3, True, 3, 1e-5)
@example(("local", False), True, SHAPES[4], "middle", 0.0, False, None, 1e-5)
@example(("bucket", True), False, SHAPES[5], "left", 0.3, True, 30, 1e-5)
@example(("window", False), True, SHAPES[5], None, 0.0, False, 3, 1e-10)
def test_random_cases_equal_oracle(kind, causal, shape, side, dropout, shared, chunks, limit):
    """Any shape; keys that are queries; small tiles, or larger ones of all rounds; fp32, with the higher limit."""
    case = replace(_case(kind[0], causal, kind[1], shape, side, dropout), shared=shared)
    with _tiles_of(chunks, case.pattern, batched_rounds=1 << 20 if chunks == 20 else 0):
        _assert_equals_oracle(case, limit, torch.float64 if limit < 1e-6 else torch.float32)


def test_dropout_changes_output():
    for kind, deduplicate in PATTERNS:
        case = _case(kind, False, deduplicate, (2, 37, 2, 8, 5, 2), None, 0.3)
        whole = replace(case, dropout=0.0)
        for name, found in case.op().items():
            assert relative_rms(found, whole.op()[name]) > 0.1, (kind, deduplicate, name)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 1000, 2, 16, 8, 4), (1, 1023, 4, 8, 8, 2)], ids=_shape_id)
@each_direction
@each_pattern
def test_equals_oracle_long(kind, deduplicate, causal, shape):
    case = _case(kind, causal, deduplicate, shape, "middle", 0.3, chunk_length=16, factors=(8, 8))
    _assert_equals_oracle(case)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("side", SIDES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 37, 3, 16, 16, 4)], ids=_shape_id)
@each_direction
@each_pattern
def test_equals_oracle_grid(kind, deduplicate, causal, shape, side, dropout, shared):
    case = replace(_case(kind, causal, deduplicate, shape, side, dropout), shared=shared)
    for chunks in (None, 1, 3, 30):
        with _tiles_of(chunks, case.pattern):
            for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
                _assert_equals_oracle(case, limit, dtype, f"{dtype}, tiles of {chunks} chunks")


def test_half_precision():
    for kind, causal, side in itertools.product(KINDS, (False, True), (None, "whole-row")):
        case = _case(kind, causal, False, (2, 37, 2, 8, 5, 2), side)
        expected = case.oracle()
        # Four times the distance of two neighbours at 1; six times in fp16, whose range is small.
        for dtype, limit in ((torch.bfloat16, 0.016), (torch.float16, 0.002)):
            for name, found in case.op(dtype).items():
                assert found.dtype == dtype
                assert_close(found, expected[name], limit, f"{kind}, {name}, {dtype}, causal {causal}, {side}")


def test_padding_rows_finite():
    """What stands there means nothing, but a NaN would spread through what is multiplied by zero."""
    for kind, dtype in itertools.product(KINDS, (torch.bfloat16, torch.float16, torch.float32)):
        case = _case(kind, True, False, (2, 37, 2, 8, 5, 2), "whole-row")
        inputs = [x.to(dtype).requires_grad_() for x in (case.query, case.key, case.value)]
        out = chunk_attention(*inputs, case.pattern, case.order, case.padding)
        assert out.isfinite().all(), (kind, dtype)
        for grad in torch.autograd.grad(out.sum(), inputs):
            assert grad.isfinite().all(), (kind, dtype)


def test_large_scores():
    case = _case("bucket", False, False)
    # Whole numbers, whose products are exact: the softmax is a maximum then, with ties.
    key = case.key.round().abs() + 1
    for sign in (1, -1):
        query = sign * 4096 * (case.query.round().abs() + 1)
        # Rounds meet through their logsumexp, as exact as fp32 is at its size.
        largest = torch.einsum("bihd,bjhd->bhij", query, key).abs().max().item()
        limit = torch.finfo(torch.float32).eps * largest
        assert limit < 0.1
        large = replace(case, query=query, key=key, dropout=0.3)
        _assert_equals_oracle(large, limit, torch.float32, f"sign {sign}")


FUSED_SHAPES = [(2, 61, 2, 8, 8, 2), (1, 1, 1, 4, 4, 1), (2, 37, 3, 64, 64, 4), (3, 101, 2, 8, 8, 2)]


def _assert_fused_equals_plain(case, of=""):
    kernel_for, used = attention_kernels._kernel_for, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_kernels, "_kernel_for", lambda *args: used.append(kernel_for(*args)) or used[-1])
        fused = case.op(torch.float32)
        assert set(used) == {attention_kernels._CpuKernel}
        patch.setattr(attention_kernels, "_kernel_for", lambda *args: None)
        plain, expected = case.op(torch.float32), case.oracle()
    for name, found in fused.items():
        # A gradient that is zero but for rounding has no relative size.
        if expected[name].abs().max() > 1e-12:
            assert_close(found, plain[name], 1e-5, f"{name}, plain {of}")
            assert_close(found, expected[name], 1e-5, f"{name} {of}")


@each_family
def test_fused_equals_plain(family):
    """Queries without keys included: the first ones, and all of a bucket of one."""
    cases = (
        (True, FUSED_SHAPES[0], "whole-row"),
        (False, FUSED_SHAPES[0], "left"),
        (True, FUSED_SHAPES[0], None),
        (False, FUSED_SHAPES[1], None),
        (True, FUSED_SHAPES[2], "whole-row"),
    )
    for (kind, deduplicate), (causal, shape, side) in itertools.product(FAMILIES[family], cases):
        of = f"{kind}, deduplicated {deduplicate}, causal {causal}, {_shape_id(shape)}, padding {side}"
        _assert_fused_equals_plain(_case(kind, causal, deduplicate, shape, side), of)


@pytest.mark.slow
@pytest.mark.parametrize("shape", FUSED_SHAPES, ids=_shape_id)
@pytest.mark.parametrize("side", SIDES, ids=str)
@each_direction
@each_pattern
def test_fused_equals_plain_grid(kind, deduplicate, causal, side, shape):
    _assert_fused_equals_plain(_case(kind, causal, deduplicate, shape, side))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda():
    """With chunks of 32, which the fused kernel takes."""
    for kind, causal in itertools.product(KINDS, (False, True)):
        case = _case(kind, causal, False, (2, 203, 2, 16, 16, 2), "left", chunk_length=32)
        fields = {name: getattr(case, name) for name in ("query", "key", "value", "order", "padding")}
        moved = replace(case, **{name: x if x is None else x.cuda() for name, x in fields.items()})
        expected = case.oracle()
        for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 0.03)):
            for name, found in moved.op(dtype).items():
                assert_close(found.cpu(), expected[name], limit, f"{kind}, {name}, {dtype}, causal {causal}")


def test_shared_query_key_has_two_gradients():
    """Of queries, which are the keys too, and of values."""
    case = replace(_case("bucket", False), shared=True)
    assert set(case.op()) == set(case.oracle()) == {"output", "grad of query", "grad of value"}


@each_family
def test_small_tiles(family):
    for kind, deduplicate in FAMILIES[family]:
        for causal, side in ((False, None), (True, "left")):
            case = _case(kind, causal, deduplicate, (2, 45, 2, 8, 5, 2), side)
            expected = case.op()
            # One chunk; some chunks; some heads.
            for chunks, batched_rounds in itertools.product((1, 4, 20), (0, 1 << 20)):
                with _tiles_of(chunks, case.pattern, batched_rounds):
                    tiles = f"{kind}, deduplicated {deduplicate}, {chunks} chunks, {batched_rounds} rows batched"
                    for name, found in case.op().items():
                        assert_close(found, expected[name], 1e-12, f"{name}, causal {causal}, {tiles}")
        # What is dropped depends on the tiles, and is the same in the backward pass.
        for chunks, batched_rounds in itertools.product((4, 20), (0, 1 << 20)):
            with _tiles_of(chunks, case.pattern, batched_rounds):
                tiles = f"{kind}, deduplicated {deduplicate}, {chunks} chunks, {batched_rounds} rows batched"
                _assert_equals_oracle(replace(case, dropout=0.3), of=tiles)


@given(
    length=st.integers(1, 40),
    causal=st.booleans(),
    side=st.sampled_from([None, "left", "whole-row"]),
    deduplicate=st.booleans(),
    num_hashes=st.integers(1, 3),
    chunks=st.sampled_from([None, 1]),
)
@example(1, False, "whole-row", True, 3, None)
@example(1, True, None, False, 1, 1)
@example(2, False, "left", False, 3, None)
@example(29, True, "left", True, 3, 1)
@example(29, False, None, True, 3, 1)
@example(32, True, "whole-row", False, 3, None)
@example(32, False, "whole-row", True, 1, 1)
def test_one_bucket_is_full_attention(length, causal, side, deduplicate, num_hashes, chunks):
    """With a window as wide as the sequence."""
    case = _case("across", causal, False, (2, length, 2, 8, 5, 1), side)
    wide = math.ceil(length / C)
    pattern = AttentionPattern(C, wide, 0 if causal else wide, causal, window=True, deduplicate_keys=deduplicate)
    buckets = torch.zeros(2, 2, num_hashes, length, dtype=torch.int32)
    padding = torch.zeros(2, length, dtype=torch.bool) if case.padding is None else case.padding
    case = replace(
        case,
        pattern=pattern,
        order=sort_by_bucket(buckets, case.padding),
        count_keys=lambda: full_attention_counts(causal, padding).expand(-1, 2, -1, -1),
    )
    with _tiles_of(chunks, pattern):
        _assert_equals_oracle(case)


@each_direction
def test_many_rounds_are_full_attention(causal):
    """Duplicates left out, every pair meets in some round at last, and then the result is exact."""
    length = 23
    full = full_attention_counts(causal, torch.zeros(2, length, dtype=torch.bool)).expand(-1, 2, -1, -1)
    errors = {}
    for num_hashes in (1, 2, 4, 64):
        case = _case("bucket", causal, True, (2, length, 2, 8, 5, num_hashes), chunk_length=24, factors=(2,))
        exact = replace(case, count_keys=lambda: full).oracle()
        errors[num_hashes] = max(relative_rms(found, exact[name]) for name, found in case.op().items())
    assert torch.equal(case.counts, full)
    assert errors[1] > errors[2] > errors[4] > 0.1
    assert errors[64] <= 1e-10


def test_query_without_keys_takes_own_value():
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    for case in itertools.product(("bucket", "window"), dtypes, (1, 2), (0.0, 0.5)):
        kind, dtype, num_hashes, dropout = case
        torch.manual_seed(0)
        query, key, value = (torch.randn(2, 37, 2, 8).to(dtype).requires_grad_() for _ in range(3))
        # A bucket of its own for each.
        buckets = torch.arange(37, dtype=torch.int32).flip(0).expand(2, 2, num_hashes, 37).contiguous()
        out = chunk_attention(query, key, value, _pattern(kind, False), sort_by_bucket(buckets), None, dropout, 1)
        assert torch.equal(out, value), case
        weight = torch.randn_like(out)
        grads = torch.autograd.grad((out * weight).sum(), [query, key, value])
        assert not grads[0].any(), case
        assert not grads[1].any(), case
        assert torch.equal(grads[2], weight), case


def test_key_of_later_round_replaces_own_value():
    value = torch.randn(1, 2, 1, 4)
    buckets = torch.tensor([[[[0, 1], [0, 0]]]], dtype=torch.int32)
    query = torch.randn(1, 2, 1, 4)
    out = chunk_attention(query, query, value, _pattern("bucket", False), sort_by_bucket(buckets))
    assert_close(out, value.flip(1), 1e-6)


def test_first_causal_position_takes_own_value():
    case = _case("across", True)
    assert torch.equal(case.op()["output"][:, 0], case.value[:, 0])


@each_family
def test_weights(family):
    sides = (None, "left", "middle")
    for (kind, deduplicate), causal, side in itertools.product(FAMILIES[family], (False, True), sides):
        of = f"{kind}, deduplicated {deduplicate}, causal {causal}, padding {side}"
        _assert_weights(_case(kind, causal, deduplicate, (3, 37, 2, 8, 5, 2), side), of)


def _assert_weights(case, of):
    weights, positions = chunk_attention_weights(case.query, case.key, case.pattern, case.order, case.padding)
    num_hashes = 1 if case.order is None else case.order.shape[2]
    assert weights.shape == positions.shape == (3, 2, num_hashes, 37, case.pattern.window_length), of
    assert positions.dtype == torch.int32
    assert torch.equal(weights > 0, positions >= 0), of
    real = case.real[..., 0].transpose(1, 2).expand(-1, 2, -1)
    sums = weights.sum((2, 4))
    without_keys = case.counts.sum(-1) == 0
    if case.pattern.include_self:
        real = real & ~without_keys
    assert_close(sums[real], torch.ones_like(sums[real]), 1e-12, f"sum of weights, {of}")
    dense = _by_key(weights, positions)
    out = torch.einsum("bhij,bjhe->bihe", dense, case.value)
    assert_close(out * case.real, case.op()["output"], 1e-12, f"output of weights, {of}")
    expected = case.counts if case.pattern.include_self else case.counts + torch.eye(37) * without_keys[..., None]
    assert torch.equal(_by_key((positions >= 0).double(), positions)[real], expected[real]), of


def test_weights_under_autocast():
    case = _case("bucket", True)
    query = case.query.float()
    weights, positions = chunk_attention_weights(query, None, case.pattern, case.order)
    expected, expected_positions = chunk_attention_weights(query.double(), None, case.pattern, case.order)
    assert torch.equal(positions, expected_positions)
    assert_close(weights, expected, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(chunk_attention_weights(query, None, case.pattern, case.order)[0], weights)


def _by_key(weights, positions):
    """Sum of `weights` `[B, H, R, L, W]` by the position of the key, `[B, H, L, L]`."""
    batch_size, num_heads, num_hashes, length, window = weights.shape
    flat = positions.transpose(2, 3).flatten(3).long()
    out = torch.zeros(batch_size, num_heads, length, length + 1, dtype=weights.dtype)
    out.scatter_add_(-1, torch.where(flat < 0, length, flat), weights.transpose(2, 3).flatten(3))
    return out[..., :length]


@st.composite
def _random_pattern(draw):
    length = draw(st.integers(1, 14))
    num_hashes = draw(st.integers(1, 3))
    chunk_length = draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["bucket", "across", "window", "ring"]))
    pattern = AttentionPattern(
        chunk_length=chunk_length,
        chunks_before=draw(st.integers(0, 3)),
        chunks_after=draw(st.integers(0, 2)),
        causal=draw(st.booleans()),
        include_self=draw(st.booleans()),
        same_bucket=kind == "bucket",
        window=kind == "window",
        deduplicate_keys=kind != "ring" and draw(st.booleans()),
        ring_multiple=chunk_length * draw(st.integers(1, 3)) if kind == "ring" else None,
    )
    rows = [draw(st.lists(st.integers(0, 3), min_size=length, max_size=length)) for _ in range(num_hashes)]
    padding = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    tile = draw(st.sampled_from([1 << 19, 1]))
    return pattern, rows, padding, tile


@settings(max_examples=4 * settings().max_examples)
@given(_random_pattern())
def test_query_sees_keys_of_definition(drawn):
    pattern, buckets, padding, tile = drawn
    length = len(padding)
    order = sort_by_bucket(torch.tensor(buckets, dtype=torch.int32)[None, None], torch.tensor([padding]))
    query = torch.zeros(1, length, 1, 2)
    with pytest.MonkeyPatch.context() as patch:
        set_policy(patch, tile_scores=tile)
        _, positions = chunk_attention_weights(query, query, pattern, order, torch.tensor([padding]))
    seen = _by_key((positions >= 0).double(), positions)[0, 0]
    expected = key_counts(pattern, buckets, padding)
    if not pattern.include_self:
        expected += torch.diag((expected.sum(-1) == 0).double())
    real = ~torch.tensor(padding)
    assert torch.equal(seen[real], expected[real])


_scores = st.lists(
    st.sampled_from([attention_kernels.MASKED, -50.0, -1.0, 0.0, 0.5, 3.0, 60.0, 800.0]), min_size=1, max_size=5
)


@settings(max_examples=2 * settings().max_examples)
@given(st.lists(_scores, min_size=2, max_size=4))
def test_merge_is_one_softmax(rounds):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.tensor([row], dtype=torch.float64) for row in rounds]
    values = [torch.randn(row.shape[1], 3, generator=generator, dtype=torch.float64) for row in scores]

    def softmax(scores, values):
        return scores.softmax(-1) @ values, scores.logsumexp(-1)

    out, lse = softmax(scores[0], values[0])
    for other in zip(scores[1:], values[1:], strict=True):
        out, lse = merge(out, lse, *softmax(*other))
    expected_out, expected_lse = softmax(torch.cat(scores, -1), torch.cat(values))
    if expected_lse <= attention_kernels.NO_KEY:
        assert lse <= attention_kernels.NO_KEY and out.isfinite().all()
    else:
        assert_close(out, expected_out, 1e-12)
        # An error of a logsumexp is a relative one of the weights.
        assert (lse - expected_lse).abs() <= 1e-12 * expected_lse.abs().clamp(min=1)


@pytest.mark.parametrize("kind", ["bucket", "window", "local", "ring"])
def test_gradcheck(kind):
    for dropout in (0.0, 0.3):
        case = _case(kind, False, False, (1, 9, 1, 3, 2, 2), "left", dropout, chunk_length=2)

        def function(query, key, value, case=case):
            return chunk_attention(query, key, value, case.pattern, case.order, case.padding, case.dropout, 7)

        inputs = [x.clone().requires_grad_() for x in (case.query, case.key, case.value)]
        assert torch.autograd.gradcheck(function, inputs)


def test_strided_inputs():
    case = _case("bucket", False)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.query, case.key, case.value)]
    expected = case.op()
    for name, found in replace(case, query=strided[0], key=strided[1], value=strided[2]).op().items():
        assert_close(found, expected[name], 1e-14, name)


def test_dropout_seed():
    case = _case("bucket", False)
    inputs = (case.query, case.key, case.value, case.pattern, case.order, None, 0.3)
    before = torch.get_rng_state()
    first, again, other = (chunk_attention(*inputs, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert relative_rms(other, first) > 0.1


def test_autocast():
    case = _case("bucket", False)
    expected = case.op(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = case.op(torch.float32)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_saves_no_scores():
    for kind, dropout in itertools.product(("bucket", "across", "window", "local", "ring"), (0.0, 0.3)):
        case = _case(kind, True, False, (2, 257, 2, 8, 5, 2), "left", dropout, chunk_length=64)
        inputs = [x.float().requires_grad_() for x in (case.query, case.key, case.value)]
        out = chunk_attention(*inputs, case.pattern, case.order, case.padding, dropout, 7)
        saved = [tensor for tensor in out.grad_fn.saved_tensors if tensor is not None]
        rows = 2 * 257 * 2
        assert max(tensor.numel() for tensor in saved) <= rows * 8, (kind, dropout)
        # Queries and keys, values and output, logsumexp, the order of two rounds, padding.
        assert sum(tensor.numel() for tensor in saved) <= rows * (2 * 8 + 2 * 5 + 1 + 2 + 1) + 1, (kind, dropout)
        assert {tensor.dtype for tensor in saved} <= {torch.float32, torch.int32, torch.bool}, (kind, dropout)
        assert not [name for name, x in vars(out.grad_fn).items() if isinstance(x, torch.Tensor)], (kind, dropout)
