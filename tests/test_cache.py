# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""KV cache: new tokens get the logits of a parallel pass, whatever was done to the cache before."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging as transformers_logging

from reformer_hf import ReformerHfForCausalLM, local_cache, lsh_cache
from reformer_hf import cache as cache_module
from reformer_hf.cache import SLACK, AttentionCacheLayer
from reformer_hf.full_cache import FullCacheLayer
from reformer_hf.local_cache import LocalCacheLayer
from reformer_hf.lsh_attention import factors_of
from reformer_hf.lsh_cache import LSHCacheLayer, LSHChunkCacheLayer
from reformer_hf.self_attention import AttentionCall

from .helpers import assert_close, assert_refused, random_model, relative_rms, tiny_config

KINDS = {
    "local": {"attn_layers": ["local", "local"]},
    "full": {"attn_layers": ["full", "full"]},
    "lsh": {"attn_layers": ["lsh", "lsh"]},
    "mixed": {},
}
CHUNKS = {
    "in-tree": {"lsh_pattern": "chunk", "lsh_across_buckets": True, "wrap_chunks": True},
    "across-buckets": {"lsh_pattern": "chunk", "lsh_across_buckets": True},
    "same-bucket": {"lsh_pattern": "chunk"},
    "deduplicated": {"lsh_pattern": "chunk", "lsh_deduplicate_keys": True},
    "two-before": {"lsh_pattern": "chunk", "lsh_across_buckets": True, "lsh_num_chunks_before": 2},
    "none-before": {"lsh_pattern": "chunk", "lsh_across_buckets": True, "lsh_num_chunks_before": 0},
}

each_kind = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
each_cache = pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])


def _new_cache(model, static=False, length=256):
    if static:
        return StaticCache(config=model.config, max_cache_len=length)
    return DynamicCache(config=model.config)


class Decoding:
    """A sequence that grows and shrinks with its KV cache, and the logits that each token got."""

    def __init__(self, model, cache, batch_size=3, seed=0):
        self.model, self.cache = model, cache
        self._generator = torch.Generator().manual_seed(seed)
        self.ids = torch.zeros(batch_size, 0, dtype=torch.long)
        self.mask = torch.zeros(batch_size, 0, dtype=torch.long)
        dtype = model.lm_head.decoder.weight.dtype
        self.logits = torch.zeros(batch_size, 0, model.config.vocab_size, dtype=dtype)

    @property
    def length(self):
        return self.ids.shape[1]

    @torch.no_grad()
    def take(self, num_new, padding=None, new=None):
        """New tokens, random unless they are given, `padding` of them per row at the beginning."""
        if new is None:
            new = torch.randint(1, 60, (self.ids.shape[0], num_new), generator=self._generator)
        mask = torch.ones_like(new)
        for row, num_padding in enumerate(padding or ()):
            mask[row, :num_padding] = 0
        ids, mask = torch.cat([self.ids, new], dim=1), torch.cat([self.mask, mask], dim=1)
        logits = self.model(new, attention_mask=mask, cache=self.cache).logits
        self.ids, self.mask, self.logits = ids, mask, torch.cat([self.logits, logits], dim=1)
        return self

    def crop(self, num_removed):
        self.cache.crop(-num_removed)
        kept = slice(0, self.length - num_removed)
        self.ids, self.mask, self.logits = (x[:, kept] for x in (self.ids, self.mask, self.logits))

    def map_rows(self, change, rows):
        change(self.cache)
        self.ids, self.mask, self.logits = (x[rows] for x in (self.ids, self.mask, self.logits))

    @torch.no_grad()
    def expected(self):
        return self.model(self.ids, attention_mask=self.mask).logits

    def check(self, limit=1e-12):
        assert self.cache.get_seq_length() == self.length
        tokens = self.mask.bool()
        assert_close(self.logits[tokens], self.expected()[tokens], limit)


@pytest.mark.parametrize(
    ("kind", "static"),
    [("local", True), ("full", True), ("lsh", True), ("mixed", False)],
    ids=["local-static", "full-static", "lsh-static", "mixed-dynamic"],
)
def test_steps_equal_parallel_pass(kind, static):
    fields = KINDS[kind]
    hashes = "lsh" in fields.get("attn_layers", ["lsh"])
    for num_hashes, once in ((1, False), (2, True), (4, False), (4, True)) if hashes else ((1, False),):
        model = random_model(torch.float64, num_hashes=num_hashes, lsh_deduplicate_keys=once, **fields)
        decoding = Decoding(model, _new_cache(model, static)).take(20, padding=[0, 9, 3])
        while decoding.length < 100:
            decoding.take(1)
        decoding.check()
        # They depend on what was before, so that a cache that forgot it would be noticed.
        other = decoding.ids.clone()
        other[:, 50] = 59 - other[:, 50]
        with torch.no_grad():
            changed = model(other, attention_mask=decoding.mask).logits
        assert relative_rms(changed[:, 52:66], decoding.logits[:, 52:66]) > 1e-4


def test_steps_without_padding():
    """Through several rounds of a local layer's ring buffer of 106 slots."""
    model = random_model(torch.float64, local_attn_chunk_length=7)
    decoding = Decoding(model, _new_cache(model), batch_size=1).take(20)
    while decoding.length < 240:
        decoding.take(1)
    decoding.check()


@pytest.mark.slow
@each_kind
@pytest.mark.parametrize("num_hashes", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
def test_2000_positions(dtype, limit, num_hashes, fields):
    """At every position, from prompts of all kinds of lengths, in one piece and in several."""
    if "lsh" not in fields.get("attn_layers", ["lsh"]) and num_hashes > 1:
        pytest.skip("There is no hashing.")
    sizes = {"local_attn_chunk_length": 64, "lsh_attn_chunk_length": 64, "max_position_embeddings": 2048}
    model = random_model(dtype, num_hashes=num_hashes, num_buckets=16, **sizes, **fields)
    prompts = {1: [1], 5: [5], 63: [63], 64: [64], 65: [65], 1000: [1000]}
    pieces = {"in-pieces": [1, 62, 1, 200, 500, 36, 200], "in-two": [64, 936]}
    for prompt in (*prompts.values(), *pieces.values()):
        decoding = Decoding(model, _new_cache(model), seed=1)
        for at, piece in enumerate(prompt):
            decoding.take(piece, padding=[0, piece // 2, piece // 3] if at == 0 else None)
        while decoding.length < 2000:
            decoding.take(1)
        tokens, expected = decoding.mask.bool(), decoding.expected()
        difference = (decoding.logits - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert difference[tokens].max() <= limit, (prompt, difference[tokens].max())


@each_cache
def test_pieces_of_any_size(static):
    model = random_model(torch.float64)
    for pieces in ([1, 1, 1], [7, 3, 20, 1, 64, 65, 1, 30], [90, 100], [3, 150, 2, 90]):
        decoding = Decoding(model, _new_cache(model, static))
        for at, piece in enumerate(pieces):
            decoding.take(piece, padding=[0, piece // 2, 0] if at < 2 else None)
        decoding.check()


@each_cache
def test_padding_anywhere(static):
    """On the right of a prompt, in a step, a whole row of it, and none but padding at first."""
    model = random_model(torch.float64)
    decoding = Decoding(model, _new_cache(model, static))
    for padding in ([5, 0, 2], [3, 5, 0], [0, 5, 5], [1, 0, 1]):
        decoding.take(5, padding)
    for padding in ([1, 0, 0], [0, 1, 1], None, None):
        decoding.take(1, padding)
    decoding.take(70, [70, 0, 65])
    for _ in range(20):
        decoding.take(1)
    decoding.check()


def test_append_stores_buckets_of_prefill():
    model = random_model(torch.float64, attn_layers=["lsh"], num_hashes=3, num_buckets=[2, 4])
    padding = [0, 4, 9]
    prefilled = Decoding(model, _new_cache(model)).take(30, padding)
    appended = Decoding(model, _new_cache(model)).take(1, [0, 1, 1], prefilled.ids[:, :1])
    for position in range(1, 30):
        new = prefilled.ids[:, position : position + 1]
        appended.take(1, [int(position < num) for num in padding], new)
    expected, found = prefilled.cache.layers[0], appended.cache.layers[0]
    assert torch.equal(found.buckets[:, :, :30], expected.buckets[:, :, :30])
    assert torch.equal(found.buckets[:, 0, :30, 0] == 8, prefilled.mask == 0)
    assert torch.equal(found.counts, expected.counts)
    assert found.num_padding.tolist() == expected.num_padding.tolist() == padding


OPERATIONS = st.one_of(
    st.tuples(st.just("take"), st.integers(1, 12)),
    st.tuples(st.just("take"), st.integers(1, 90)),
    st.tuples(st.just("crop"), st.integers(0, 70)),
    st.tuples(st.just("reorder"), st.lists(st.integers(0, 2), min_size=3, max_size=3)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 2), min_size=1, max_size=3)),
    st.tuples(st.just("repeat"), st.just(2)),
    st.tuples(st.just("copy"), st.just(0)),
)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    static=st.booleans(),
    prompt=st.integers(1, 100),
    operations=st.lists(OPERATIONS, min_size=1, max_size=8),
)
def test_random_operations(kind, static, prompt, operations):
    model = random_model(torch.float64, **KINDS[kind])
    decoding = Decoding(model, _new_cache(model, static)).take(prompt, padding=[0, prompt // 2, prompt - 1])
    longest = 0
    for name, value in operations:
        rows, longest = len(decoding.ids), max(longest, decoding.length)
        if name == "take" and decoding.length + value <= 250:
            decoding.take(value)
        elif name == "crop" and value < decoding.length:
            try:
                decoding.crop(value)
            except ValueError:
                # Not within what is promised; and the cache is unchanged.
                assert longest - decoding.length + value > SLACK
        elif name in ("reorder", "select"):
            index = torch.tensor([row for row in value if row < rows] or [0])
            if name == "reorder":
                index = torch.nn.functional.pad(index, (0, max(rows - len(index), 0)))[:rows]
                decoding.map_rows(lambda cache, index=index: cache.reorder_cache(index), index)
            else:
                decoding.map_rows(lambda cache, index=index: cache.batch_select_indices(index), index)
        elif name == "repeat" and rows <= 3:
            index = torch.arange(rows).repeat_interleave(2)
            decoding.map_rows(lambda cache: cache.batch_repeat_interleave(2), index)
        elif name == "copy":
            decoding.cache = copy.deepcopy(decoding.cache)
    decoding.take(1).take(1)
    decoding.check()


@settings(max_examples=30, deadline=None)
@given(
    layers=st.sampled_from([["lsh", "lsh"], ["local", "local"], ["local", "lsh"]]),
    num_hashes=st.sampled_from([1, 2]),
    prompt=st.integers(20, 90),
    operations=st.lists(
        st.one_of(
            st.tuples(st.just("take"), st.integers(1, 4)),
            st.tuples(st.just("take"), st.integers(5, 130)),
            st.tuples(st.just("crop"), st.integers(1, 4)),
            st.tuples(st.just("crop"), st.integers(0, 60)),
            st.tuples(st.sampled_from(["record", "restore"]), st.just(0)),
        ),
        min_size=4,
        max_size=10,
    ),
)
# Dropped after a crop, then cropped twice; dropped while the past is recorded; lost by a ring that grew and shrank.
@example(["lsh", "lsh"], 1, 53, [("crop", 4), ("take", 5), ("crop", 1), ("crop", 4), ("crop", 1)])
@example(["lsh", "lsh"], 1, 49, [("record", 0), ("take", 1), ("take", 1), ("take", 60), ("restore", 0)])
@example(["local", "local"], 1, 90, [("record", 0), ("take", 124), ("restore", 0), ("crop", 30)])
def test_crop_after_drop(layers, num_hashes, prompt, operations):
    """With little slack, LSH layers of two buckets drop tokens from about 50 per round on, and local layers too."""
    slack, longest, recorded = 4, 0, None
    sizes = {"num_buckets": 2, "lsh_num_chunks_before": 1, "num_hashes": num_hashes, "max_position_embeddings": 2048}
    model = random_model(torch.float64, attn_layers=layers, **sizes)
    with pytest.MonkeyPatch.context() as patch:
        for module in (cache_module, local_cache, lsh_cache):
            patch.setattr(module, "SLACK", slack)
        patch.setattr(AttentionCacheLayer, "append_limit", slack)
        decoding = Decoding(model, _new_cache(model), batch_size=2).take(prompt, padding=[0, prompt // 3])
        for name, value in operations:
            longest, target = max(longest, decoding.length), decoding.length - value
            if name == "take":
                decoding.take(value)
            elif name == "record":
                decoding.cache.activate_past_recording()
                decoding.crop(0)
                recorded = decoding.length
            elif name == "restore" and recorded is not None:
                decoding.crop(decoding.length - recorded)
            elif name == "crop" and target > 0:
                try:
                    decoding.crop(value)
                    recorded = recorded and target
                except ValueError:
                    # Not within what is promised; and the cache is unchanged.
                    assert longest - target > slack and (recorded is None or target < recorded)
        decoding.take(1).take(30).take(1)
        decoding.check()


@pytest.mark.parametrize(
    ("name", "static"),
    [
        ("in-tree", True),
        ("across-buckets", False),
        ("same-bucket", True),
        ("deduplicated", False),
        ("two-before", True),
        ("none-before", False),
    ],
)
@torch.no_grad()
def test_chunk_step_equals_last_row(name, static, monkeypatch):
    """In one layer, where nothing comes before it that a new token could change."""
    pattern = CHUNKS[name]
    # Rings so small that those of two buckets lose the first tokens, which other tokens see.
    monkeypatch.setattr(lsh_cache, "SLACK", 2)
    for kind, num_buckets, prompt, lengths in (
        ("lsh", 8, 3, range(4, 30)),
        ("lsh", 2, 13, range(45, 65)),
        ("local", 8, 7, range(8, 40)),
    ):
        model = random_model(torch.float64, attn_layers=[kind], num_hashes=3, num_buckets=num_buckets, **pattern)
        decoding = Decoding(model, _new_cache(model, static)).take(2).take(prompt - 2, padding=[0, prompt // 2, 1])
        while decoding.length < lengths.stop:
            decoding.take(1)
            if decoding.length in lengths:
                last = decoding.expected()[:, -1]
                assert_close(decoding.logits[:, -1], last, 1e-12, f"{kind}, prompt {prompt}, {decoding.length} tokens")


@pytest.mark.parametrize("name", ["in-tree", "deduplicated", "none-before"])
def test_chunk_steps_of_several_tokens(name):
    model = random_model(torch.float64, num_hashes=3, **CHUNKS[name])
    one, several = (Decoding(model, _new_cache(model)).take(20) for _ in range(2))
    several.take(15)
    for position in range(20, 35):
        one.take(1, new=several.ids[:, position : position + 1])
    assert_close(several.logits, one.logits, 1e-12)
    # So do their attention weights.
    new, wanted = several.ids[:, :15], {"output_attentions": True}
    with torch.no_grad():
        together = model(new, cache=several.cache, **wanted)
        apart = [model(token, cache=one.cache, **wanted) for token in new.split(1, dim=1)]
    for layer in range(3):
        found = _by_position(together.attentions[layer], together.attention_positions[layer], 50)
        expected = [_by_position(out.attentions[layer], out.attention_positions[layer], 50) for out in apart]
        assert_close(found, torch.cat(expected, dim=2), 1e-12, f"layer {layer}")


@pytest.mark.parametrize("fields", [{"attn_layers": ["local", "lsh"]}, {}], ids=["bounded", "mixed"])
def test_drops_what_no_ring_holds(fields):
    """Small rings, and more tokens than they hold: the cache stops growing and the logits are right all the same."""
    model = random_model(
        torch.float64, num_buckets=2, lsh_num_chunks_before=1, num_hashes=2, max_position_embeddings=2048, **fields
    )
    decoding = Decoding(model, _new_cache(model), batch_size=2).take(400, padding=[0, 5])
    sizes = []
    while decoding.length < 1600:
        decoding.take(1 if len(sizes) % 50 else 40)
        sizes.append((decoding.length, _elements(decoding.cache)))
    decoding.check()
    if "full" not in model.config.attn_layers:
        assert len({size for length, size in sizes if length > 800}) == 1
        assert all(getattr(layer, "_num_dropped", 1) for layer in decoding.cache.layers)
    # What was long ago does not come back, and to ask for it changes nothing.
    if "full" not in model.config.attn_layers:
        with pytest.raises(ValueError, match=f"1600 tokens to 1200.*cropped by {SLACK} tokens from"):
            decoding.crop(400)
    decoding.crop(SLACK - 10)
    decoding.take(20)
    decoding.check()
    # The tokens that are left keep their cache positions.
    last_token = decoding.ids[:, -1:]
    last = {"attention_mask": decoding.mask, "output_attentions": True}
    with torch.no_grad():
        whole = model(decoding.ids, **last)
        decoding.crop(1)
        step = model(last_token, cache=decoding.cache, **last)
    _assert_same_attentions(step, whole)


def _elements(cache):
    tensors = [getattr(layer, name) for layer in cache.layers for name in layer.tensors]
    return sum(tensor.numel() for tensor in tensors if tensor is not None)


def test_piece_after_drop():
    """
    A parallel pass, in groups of heads, over new tokens and rows that hold other tokens in each head, some of them
    padding.
    """
    sizes = {"num_buckets": 2, "lsh_num_chunks_before": 1, "num_hashes": 2, "max_position_embeddings": 2048}
    heads = {"num_attention_heads": 4, "num_parallel_heads": 2}
    model = random_model(torch.float64, attn_layers=["lsh", "lsh"], **heads, **sizes)
    decoding = Decoding(model, _new_cache(model), batch_size=2).take(400, padding=[0, 5])
    for step in range(12):
        decoding.take(60, padding=[7 * step % 20, 11 * step % 30])
    assert all(layer._num_dropped for layer in decoding.cache.layers)
    decoding.take(150, padding=[3, 0]).take(70).take(1)
    decoding.check()
    # The cache positions of rows that a parallel pass read, and of those that it wrote.
    ids, mask = decoding.ids, decoding.mask
    for num_new in (90, 1):
        new = decoding.ids[:, :num_new]
        ids, mask = torch.cat([ids, new], dim=1), torch.cat([mask, torch.ones_like(new)], dim=1)
        with torch.no_grad():
            step = model(new, attention_mask=mask, cache=decoding.cache, output_attentions=True)
            whole = model(ids, attention_mask=mask, output_attentions=True)
        _assert_same_attentions(step, whole)


def test_piece_that_drops():
    """In a parallel pass, the rows that were sorted with the new tokens are no longer those that are kept."""
    sizes = {"num_buckets": 2, "lsh_num_chunks_before": 1, "num_hashes": 2, "max_position_embeddings": 2048}
    model = random_model(torch.float64, attn_layers=["lsh", "lsh"], num_attention_heads=4, **sizes)
    decoding = Decoding(model, _new_cache(model), batch_size=2).take(400, padding=[0, 5])
    layer, drops = decoding.cache.layers[1], []
    while decoding.length < 1300:
        before = layer._num_dropped
        decoding.take(100, padding=[2, 0])
        drops.append(layer._num_dropped > before)
        decoding.take(1)
    decoding.check()
    assert sum(drops) >= 2 and not all(drops)


class _LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.size = max(self.size, out.numel())
        return out


def test_full_layer_piece_memory():
    """A second piece of a prompt makes no scores of all new and cached tokens."""
    model = random_model(attn_layers=["full"], max_position_embeddings=4096)
    decoding, length = Decoding(model, _new_cache(model), batch_size=1), 2048
    sizes = []
    for _ in range(2):
        with _LargestTensor() as largest:
            decoding.take(length)
        sizes.append(largest.size)
    assert sizes[1] <= 256 * 2 * length < length * length / 2
    decoding.check(1e-5)


def test_crop_to_prompt():
    """Further than the slack, as long as nothing was dropped that would be needed."""
    # The ring of local layers has 112 slots.
    for kind, num_new in (("lsh", 150), ("full", 150), ("local", 109)):
        model = random_model(torch.float64, attn_layers=[kind, kind])
        decoding = Decoding(model, _new_cache(model)).take(3, padding=[0, 1, 2]).take(num_new)
        decoding.crop(num_new)
        decoding.take(100)
        decoding.crop(30)
        for _ in range(5):
            decoding.take(1)
        decoding.check()


def test_record_past():
    """The length that the last crop left can then be restored, however far back it is."""
    model = random_model(torch.float64, num_buckets=2, max_position_embeddings=1024)
    decoding = Decoding(model, _new_cache(model)).take(700)
    decoding.cache.activate_past_recording()
    decoding.crop(0)
    for _ in range(3):
        decoding.take(60).take(60).take(60)
        decoding.crop(175)
    decoding.take(1)
    decoding.check()


def test_crop_to_nothing():
    model = random_model(torch.float64)
    decoding = Decoding(model, _new_cache(model)).take(200).take(1)
    decoding.crop(201)
    assert decoding.cache.get_seq_length() == 0
    decoding.take(9).take(1)
    decoding.check()
    decoding.cache.reset()
    again = Decoding(model, decoding.cache, batch_size=2).take(9).take(1)
    again.check()


@each_cache
def test_step_attentions(static):
    model = random_model(torch.float64, num_hashes=3)
    decoding = Decoding(model, _new_cache(model, static)).take(1)
    wanted = {"output_attentions": True, "output_hidden_states": True}
    for num_new in (1, 40, 3, 1, 70, 1):
        new = torch.randint(1, 60, (3, num_new))
        decoding.ids = torch.cat([decoding.ids, new], dim=1)
        with torch.no_grad():
            step = model(new, cache=decoding.cache, **wanted)
            whole = model(decoding.ids, **wanted)
        for found, expected in zip(step.hidden_states, whole.hidden_states, strict=True):
            assert_close(found, expected[:, -num_new:], 1e-12)
        _assert_same_attentions(step, whole)


def _assert_same_attentions(step, whole):
    """The attention weights of new tokens by cache position, of a pass with a cache and of one over all tokens."""
    (_, num_new, _), (_, length, _) = step.logits.shape, whole.logits.shape
    for layer in range(len(whole.attentions)):
        found, expected = (
            _by_position(output.attentions[layer], output.attention_positions[layer], length)
            for output in (step, whole)
        )
        assert_close(found, expected[:, :, -num_new:], 1e-12, f"layer {layer}")


def _by_position(weights, positions, length):
    """Attention weights `[B, H, n, L]` of `[B, H, R, n, W]`, of all rounds."""
    weights, positions = (x.transpose(2, 3).flatten(3) for x in (weights, positions.long()))
    assert torch.equal(weights > 0, positions >= 0)
    by_position = weights.new_zeros(*weights.shape[:3], length + 1)
    return by_position.scatter_add_(3, positions % (length + 1), weights)[..., :-1]


def test_attentions_of_long_piece():
    """More tokens than a full layer appends at once: each of its blocks sees more keys than the one before."""
    model = random_model(torch.float64, attn_layers=["full", "full"], max_position_embeddings=1024)
    decoding = Decoding(model, _new_cache(model)).take(10)
    new = torch.randint(1, 60, (3, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        step = model(new, cache=decoding.cache, output_attentions=True)
        whole = model(torch.cat([decoding.ids, new], dim=1), output_attentions=True)
    _assert_same_attentions(step, whole)


def test_step_weights_sum_to_one():
    model = random_model(torch.float64, attn_layers=["lsh", "local", "full"])
    cache = model(torch.ones(1, 1, dtype=torch.long), use_cache=True).cache
    for token in range(1, 30):
        output = model(torch.tensor([[token]]), cache=cache, output_attentions=True)
        for weights in output.attentions:
            assert_close(weights.sum((2, 4)), torch.ones(1, 2, 1, dtype=torch.float64), 1e-12)


def test_half_precision():
    for dtype in (torch.bfloat16, torch.float16):
        model = random_model(torch.float32)
        decoding = Decoding(model.to(dtype), _new_cache(model)).take(60)
        for _ in range(10):
            decoding.take(1)
        assert decoding.cache.layers[0].keys.dtype == dtype
        assert decoding.logits.isfinite().all(), dtype
        assert_close(decoding.logits, decoding.expected(), 0.05, str(dtype))


def test_autocast():
    """Of the prompt, of the steps, and of both."""
    model = random_model(torch.float32)
    for cached, stepped in ((True, True), (False, True), (True, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=cached):
            decoding = Decoding(model, _new_cache(model)).take(60)
        with torch.autocast("cpu", torch.bfloat16, enabled=stepped):
            for _ in range(10):
                decoding.take(1)
            assert_close(decoding.logits, decoding.expected(), 0.05, f"prompt {cached}, steps {stepped}")


def test_fp16_steps():
    """Of a cache in fp32, whose bias for a query without keys is beyond fp16."""
    for kind, fields in KINDS.items():
        model = random_model(torch.float32, num_buckets=64, **fields)
        decoding = Decoding(model, _new_cache(model)).take(60)
        with torch.autocast("cpu", torch.float16):
            for _ in range(10):
                decoding.take(1)
        # A rounded vector may hash to another bucket.
        assert_close(decoding.logits, decoding.expected(), 0.05, kind)


def test_train_mode_keeps_rotations():
    """Without a seed of its own, training hashes by new rotations in each call, but a cache keeps its own."""
    model = random_model(torch.float64, attn_layers=["lsh"]).train()
    torch.manual_seed(3)
    decoding = Decoding(model, _new_cache(model)).take(40)
    state = torch.get_rng_state()
    for _ in range(20):
        decoding.take(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    decoding.check()
    assert model(decoding.ids, use_cache=True).cache is None


@pytest.mark.parametrize(("kind", "static"), [("local", True), ("lsh", False), ("full", True)])
@torch.no_grad()
def test_step_dropout(kind, static):
    """In training, a step drops attention weights and scales the others, and drops the output, each at its rate."""
    rates = {"lsh_attention_probs_dropout_prob": 0.25, "local_attention_probs_dropout_prob": 0.25}
    fields = {"num_buckets": 2, "lsh_deduplicate_keys": True, "hash_seed": 1}
    model = random_model(torch.float64, attn_layers=[kind], hidden_dropout_prob=0.5, **rates, **fields)
    attention = model.reformer.encoder.layers[0].attention
    cache = model(torch.arange(1, 16).expand(64, -1), cache=_new_cache(model, static)).cache
    # One-hot values of the 15 cached tokens: the output of a head is the weight of each token.
    cache.layers[0].entries[:, :15, :, 16:] = torch.eye(16, dtype=torch.float64)[:15, None]
    attention.self_attention.value.weight.zero_()
    new = torch.randn(32, dtype=torch.float64).expand(64, 1, 32)
    call = AttentionCall.on(new, output_attentions=True)
    expected = attention.self_attention.append(new, call, copy.deepcopy(cache), 0)[0]
    model.train()
    out, weights = attention.self_attention.append(new, call, copy.deepcopy(cache), 0)
    by_position = _by_position(*weights, 16)[:, :, 0, :15]
    assert_close(by_position, expected.view(64, 2, 16)[..., :15], 1e-12)
    seen = by_position > 0
    factors = (out.view(64, 2, 16)[..., :15] / by_position)[seen]
    kept = factors > 0.5
    assert_close(factors, kept.double() / 0.75, 1e-12)
    # Of 64 × 2 × 8 weights or more, with a standard deviation of 0.013 at most.
    assert len(factors) > 500 and abs(kept.double().mean() - 0.75) < 0.06
    added = attention(new, call, cache)[0]
    assert abs((added == 0).double().mean() - 0.5) < 0.06


def test_dropout_spares_query_without_keys():
    """In a step as in a parallel pass, it returns its value."""
    rates = {"lsh_attention_probs_dropout_prob": 0.5}
    for kind, num_buckets in (("full", 8), ("lsh", 64)):
        model = random_model(torch.float64, attn_layers=[kind], num_buckets=num_buckets, hash_seed=1, **rates)
        expected = Decoding(model, _new_cache(model), batch_size=8).take(1, [1] * 8).take(1)
        model.train()
        found = Decoding(model, _new_cache(model), batch_size=8).take(1, [1] * 8).take(1)
        assert_close(found.logits[:, 1], expected.logits[:, 1], 1e-12, kind)


def test_no_cache_unless_wanted():
    model = random_model()
    ids = torch.ones(1, 9, dtype=torch.long)
    assert model(ids).cache is None
    assert "cache" not in model(ids) and "past_key_values" not in model(ids)
    output = model(ids, use_cache=True)
    assert output.cache.get_seq_length() == 9
    assert output.past_key_values is output.cache
    assert model.reformer(ids, use_cache=True).cache.get_seq_length() == 9


def test_step_outputs_work_with_autograd():
    """Steps leave autograd behind; what they give may be used in it all the same, and the model be trained after."""
    model = random_model()
    ids = torch.ones(2, 9, dtype=torch.long)
    cache = model(ids, use_cache=True).cache
    wanted = {"output_hidden_states": True, "output_attentions": True}
    output = model(ids[:, :1], cache=cache, **wanted)
    assert not output.logits.is_inference()
    probe = torch.nn.Linear(32, 1)
    for hidden in (*output.hidden_states, output.attentions[0][..., :1].expand(*[-1] * 4, 32)):
        probe(hidden).sum().backward()
    assert all(
        not getattr(layer, name).is_inference() for layer in cache.layers for name in ("entries", "num_padding")
    )
    model.train()(ids, labels=ids).loss.backward()


def test_cache_made_in_inference_mode():
    model = random_model(torch.float64)
    with torch.inference_mode():
        decoding = Decoding(model, _new_cache(model)).take(30).take(1)
    decoding.take(60).take(1)
    decoding.map_rows(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), torch.tensor([2, 0, 1]))
    decoding.crop(20)
    decoding.take(1).take(90)
    decoding.check()


def test_copy_and_pickle():
    model = random_model(torch.float64)
    first = Decoding(model, _new_cache(model)).take(30).take(1)
    second = copy.copy(first)
    second.cache = copy.deepcopy(first.cache)
    third = copy.copy(first)
    third.cache = pickle.loads(pickle.dumps(first.cache))
    for decoding, num_new in ((first, 5), (second, 1), (third, 90)):
        decoding.take(num_new).take(1)
    for decoding in (first, second, third):
        decoding.check()


def test_offload_and_prefetch():
    """What `Cache` does between layers when it was made with `offloading=True`, which needs CUDA itself."""
    model = random_model(torch.float64)
    decoding = Decoding(model, _new_cache(model)).take(30)
    # A few tokens are appended, and many are computed in parallel with the cached ones.
    for num_new in (1, 1, 70, 1):
        for layer in decoding.cache.layers:
            _offload(layer)
        decoding.take(num_new)
    decoding.check()


def _offload(layer):
    """On a CPU, `offload` moves nothing. Here, what it moves away is NaN until it is fetched."""
    layer.offload()
    kept, layer.entries = layer.entries, torch.full_like(layer.entries, math.nan)

    def prefetch():
        if layer._offloaded:
            layer.entries = kept
        type(layer).prefetch(layer)

    layer.prefetch = prefetch


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_offloading_on_cuda():
    model = random_model(torch.float64).cuda()
    ids = torch.randint(1, 60, (2, 30), device="cuda")
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **options, use_cache=False)
    assert torch.equal(model.generate(ids, **options, cache_implementation="offloaded"), expected)


@pytest.mark.parametrize("num_new", [30, 1])
def test_interrupted_call(num_new):
    """Layers that hold different tokens are not continued."""
    model = random_model(torch.float64)
    decoding = Decoding(model, _new_cache(model))
    if num_new == 1:
        decoding.take(30)

    def interrupt(module, args):
        raise KeyboardInterrupt

    hook = model.reformer.encoder.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        decoding.take(num_new)
    hook.remove()
    with pytest.raises(ValueError, match=r"interrupted.*start with a new cache, or empty this one.*cache.reset"):
        decoding.take(num_new)
    decoding.cache.reset()
    Decoding(model, decoding.cache).take(30).take(1).check()


def _tensors(cache):
    tensors = {(i, name): getattr(layer, name) for i, layer in enumerate(cache.layers) for name in layer.tensors}
    return {key: tensor.clone() for key, tensor in tensors.items() if tensor is not None}


IDS = torch.ones(2, 1, dtype=torch.long)

BAD_CALLS = {
    "of-no-layers": (
        {"cache": DynamicCache()},
        r"`cache` is a DynamicCache, but.*\['reformer_hf_local', 'reformer_hf_lsh', 'reformer_hf_full'\].*"
        r"`DynamicCache\(config=model.config\)`",
    ),
    "of-dense-layers": (
        {"cache": DynamicCache(ddp_cache_data=[(torch.ones(1, 1, 1, 1),) * 2] * 3)},
        "`cache` is a DynamicCache of .*DynamicLayer",
    ),
    "a-tuple": ({"past_key_values": ()}, "`cache` is a tuple, but"),
    "both": (
        {"past_key_values": DynamicCache(), "cache": DynamicCache()},
        "Both `past_key_values` and `cache` are set",
    ),
    "other-rows": ({"input_ids": IDS[:1]}, "The input has batch size 1, but `cache` has 2: repeat or select"),
    "other-rounds": ({"num_hashes": 3}, "`cache` was created by another model or with other options.*num_hashes=2"),
    "other-buckets": ({"num_buckets": 4}, r"`num_buckets` is \[4\], but the tokens in `cache` were hashed with \[8\]"),
    "odd-buckets": ({"num_buckets": 3}, "`num_buckets` is 3, but random rotations give an even number"),
    "mask-too-short": (
        {"attention_mask": torch.ones(2, 20)},
        r"`attention_mask` has shape \(2, 20\), but must be \(2, 31\).*or \(2, 1\) for the new ones",
    ),
    "a-token-of-another-vocabulary": ({"input_ids": IDS * 60}, "`input_ids` holds 60"),
    "a-position-too-many": ({"input_ids": IDS.expand(2, 227)}, "`position_ids` holds 256.*`max_position_embeddings`"),
}


@each_cache
def test_bad_call_leaves_cache(static):
    model = random_model()
    cache = model(torch.ones(2, 30, dtype=torch.long), cache=_new_cache(model, static, 300)).cache
    before = _tensors(cache)

    def check(call):
        if "past_key_values" not in call and "cache" not in call:
            call = {**call, "cache": cache}
        try:
            model(**{"input_ids": IDS, **call})
        finally:
            after = _tensors(cache)
            assert cache.get_seq_length() == 30, call
            assert before.keys() == after.keys(), call
            assert all(torch.equal(before[key], after[key]) for key in before), call

    assert_refused(check, BAD_CALLS)


def test_refuses_cache_of_other_model():
    cache = random_model()(IDS, use_cache=True).cache
    for other in ({"local_attn_chunk_length": 4}, {"lsh_num_chunks_before": 1}, {"num_attention_heads": 4}):
        with pytest.raises(ValueError, match="`cache` was created by another model.*Start with a new cache"):
            random_model(**other)(IDS, cache=cache)
    with pytest.raises(ValueError, match="the layers of this model need"):
        random_model(attn_layers=["lsh"] * 3)(IDS, cache=cache)


def test_refuses_full_static_cache():
    model = random_model()
    cache = model(IDS.expand(2, 30), cache=_new_cache(model, True, 32)).cache
    model(IDS, cache=cache)
    before = _tensors(cache)
    with pytest.raises(ValueError, match="`cache` holds 31 of at most 32 tokens, too many to add 2.*at least 33"):
        model(IDS.expand(2, 2), cache=cache)
    assert all(torch.equal(before[key], value) for key, value in _tensors(cache).items())


def test_refuses_bad_crop():
    model = random_model()
    cache = model(IDS.expand(2, 30), use_cache=True).cache
    with pytest.raises(ValueError, match="`tokens_to_remove` is 5.*such as -1"):
        cache.crop(5)
    with pytest.raises(ValueError, match="Cannot remove 31 tokens from a cache that holds 30"):
        cache.crop(-31)


def test_encoder_has_no_cache():
    from reformer_hf import ReformerHfModel

    encoder = ReformerHfModel(tiny_config(is_decoder=False)).eval()
    assert encoder(IDS, use_cache=True).cache is None
    with pytest.raises(ValueError, match="without `is_decoder=True` each token also sees later tokens"):
        encoder(IDS, cache=DynamicCache(config=encoder.config))


def test_layer_types():
    """By the names in the config, for `DynamicCache` and `StaticCache` to find."""
    config = tiny_config()
    types = [LocalCacheLayer, LSHCacheLayer, FullCacheLayer]
    assert [type(layer) for layer in DynamicCache(config=config).layers] == types
    static = StaticCache(config=config, max_cache_len=9)
    assert all(isinstance(layer, cls) for layer, cls in zip(static.layers, types, strict=True))
    in_chunks = DynamicCache(config=tiny_config(lsh_pattern="chunk"))
    assert [type(layer) for layer in in_chunks.layers] == [LocalCacheLayer, LSHChunkCacheLayer, FullCacheLayer]
    assert static.is_compileable and not DynamicCache(config=config).is_compileable
    assert not any(isinstance(layer, DynamicLayer) for layer in static.layers)
    assert "layer_types" not in config.to_dict()


@each_cache
def test_sizes_for_transformers(static):
    model = random_model()
    cache = _new_cache(model, static, 64)
    assert cache.get_seq_length() == 0
    for layer in cache.layers:
        with pytest.raises(AttributeError, match="empty cache"):
            _ = layer.batch_size
        with pytest.raises(ValueError, match="run the model on a prompt"):
            layer.lazy_initialization(torch.ones(2, 1, 2, 16), torch.ones(2, 1, 2, 16))
    model(IDS.expand(2, 30), cache=cache)
    for layer in range(3):
        assert cache.get_mask_sizes(3, layer) == (33, 0)
        assert cache.layers[layer].batch_size == 2
        assert cache.layers[layer].get_max_length() == (64 if static else -1)


def test_num_buckets_of_call():
    model, other = (random_model(torch.float64, num_buckets=n) for n in (8, 2))
    ids = torch.arange(1, 59)[None]
    expected = other(ids).logits
    assert_close(model(ids, num_buckets=2).logits, expected, 1e-12)
    assert_close(model(ids, num_buckets=[2]).logits, expected, 1e-12)
    assert relative_rms(model(ids).logits, expected) > 1e-3
    cache = model(ids[:, :40], num_buckets=2, use_cache=True).cache
    assert_close(model(ids[:, 40:], cache=cache).logits, expected[:, 40:], 1e-12)


def test_cache_has_no_gradients():
    model = random_model()
    output = model(IDS.expand(2, 9), use_cache=True)
    for layer in output.cache.layers:
        assert not layer.keys.requires_grad
    assert isinstance(model, ReformerHfForCausalLM)


@torch.no_grad()
def test_decoding_by_hand():
    """As with Llama, outputs without gradient have a cache, whose name may be the older one."""
    model, ids = random_model(torch.float64), torch.arange(1, 41).view(2, 20)
    for lengths in ((19, 1), (7, 9, 4)):
        past, found = None, []
        for new in ids.split(lengths, dim=1):
            output = model(new, past_key_values=past)
            past = output.past_key_values
            found.append(output.logits)
        assert_close(torch.cat(found, dim=1), model(ids, use_cache=False).logits, 1e-12)


def test_cache_by_default():
    model, ids = random_model(), torch.arange(1, 41).view(2, 20)
    packed = torch.arange(10).repeat(2)[None].expand(2, -1)
    increasing = torch.arange(20)[None]

    def has_cache(called=model, **options):
        return called(ids, **options).cache is not None

    with torch.no_grad():
        assert has_cache() and has_cache(model.reformer) and has_cache(position_ids=increasing)
        assert not has_cache(labels=ids) and has_cache(labels=ids, use_cache=True)
        assert not has_cache(position_ids=packed) and not has_cache(use_cache=False)
        model.config.use_cache = False
        assert not has_cache()
        model.config.use_cache = True
        assert not has_cache(model.train())
    model.eval()
    assert not has_cache()
    model(ids).logits.sum().backward()


def test_no_gradient_with_cache():
    """What was computed with a cache has no gradient, and says so; other uses of the output are unaffected."""
    model, ids = random_model(torch.float64), torch.arange(1, 41).view(2, 20)
    for options in ({"cache": _new_cache(model)}, {"use_cache": True}):
        output = model(ids, labels=ids, **options)
        assert output.loss.item() == model(ids, labels=ids).loss.item()
        with pytest.raises(RuntimeError, match="computed with a KV cache.*`use_cache=False`"):
            output.loss.backward()
    # A frozen model passes its outputs to what is trained on top of it.
    model.reformer.requires_grad_(False)
    model(ids, labels=ids, use_cache=True).loss.backward()
    assert model.lm_head.decoder.weight.grad.abs().sum() > 0


def test_short_first_call(caplog):
    """Tokens after a short prompt share its few buckets, unless the call or a static cache says what is to come."""
    model = random_model(torch.float64, num_buckets=None, attn_layers=["lsh"], lsh_pattern="window").eval()
    ids = torch.randint(1, 60, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for cache, options, warns in (
            (DynamicCache(config=model.config), {}, True),
            (DynamicCache(config=model.config), {"num_buckets": factors_of(model.config, 200)}, False),
            (StaticCache(config=model.config, max_cache_len=200), {}, False),
        ):
            transformers_logging.warning_once.cache_clear()
            caplog.clear()
            logits = [model(ids[:, :2], cache=cache, **options).logits]
            logits += [model(ids[:, i : i + 1], cache=cache).logits for i in range(2, 200)]
            said = [record.message for record in caplog.records if "hashed into 1 buckets" in record.message]
            assert len(said) == warns
            if not warns:
                assert_close(torch.cat(logits, 1), expected, 1e-12)
