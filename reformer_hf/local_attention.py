# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Local attention: separate queries and keys, in chunks of neighboring positions."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from .attention_pattern import AttentionPattern
from .cache import CacheSpec
from .configuration_reformer_hf import ReformerHfConfig
from .dropout import RateDropout
from .hashing import sort_by_bucket
from .rotary import rotate
from .self_attention import AttentionCall, Found, SelfAttention, Weights


class LocalSelfAttention(SelfAttention):
    """Attention of each position to its chunk and the chunks around it."""

    projections = ("query", "key", "value")

    def __init__(self, config: ReformerHfConfig):
        super().__init__(config)
        self.pattern = AttentionPattern(
            chunk_length=config.local_attn_chunk_length,
            chunks_before=config.chunks_before("local"),
            chunks_after=config.chunks_after("local"),
            causal=config.is_decoder,
            include_self=True,
            **config.ring,
        )
        self.cache_spec = CacheSpec(self.pattern, self.num_heads, self.head_size)
        self.weights_dropout = RateDropout(config.local_attention_probs_dropout_prob)

    def project(self, hidden_states: Tensor, heads: slice, values: bool = True) -> list[Tensor]:
        query, key, value = super().project(hidden_states, heads, values)
        return [query, key / math.sqrt(self.head_size), value]

    def project_new(self, hidden_states: Tensor) -> list[Tensor]:
        query, key, value = super().project_new(hidden_states)
        return [query, key / math.sqrt(self.head_size), value]

    def attend(
        self, projected: Sequence[Tensor], call: AttentionCall, heads: slice, found: Found | None = None
    ) -> tuple[Tensor, Found]:
        query, key, value = projected
        query, key = _rotate(query, key, call)
        inputs, padding, pattern = (query, key, value), call.padding, self.pattern
        # In the in-tree pattern, padding keeps its slots in the chunks. Otherwise, it is sorted to the end.
        last = None if pattern.wraps else padding
        if call.past is not None:
            past = call.past.heads(heads)
            inputs, padding = past.prepend(query, key, value, padding)
            last = pad(past.empty, (0, query.shape[1])) if pattern.wraps else padding
            # Cached tokens form no ring: new tokens see them and not, around the ring, other new tokens.
            pattern = replace(pattern, ring_multiple=None)
        pattern = pattern.for_length(inputs[0].shape[1])
        if call.documents is not None:
            # A document is a bucket.
            pattern = replace(pattern, same_bucket=True)
        if found is None:
            order = None if last is None else _positions_with_last(last)
            order = order if call.documents is None else call.document_order
            found = Found(order, key, value) if call.fills_cache else Found(order)
        return self.attend_in_chunks(inputs, pattern, found.order, padding, call, heads, found)

    def _append(
        self, hidden_states: Tensor, call: AttentionCall, cache: Cache, layer_idx: int
    ) -> tuple[Tensor, Weights | None]:
        query, key, value = self.project_new(hidden_states)
        query, key = _rotate(query, key, call)
        return self.append_and_attend(query, key, value, call, cache, layer_idx)


def _rotate(query: Tensor, key: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    return (query, key) if call.rotation is None else (rotate(query, call.rotation), rotate(key, call.rotation))


def _positions_with_last(last: Tensor) -> Tensor:
    """Return the order that moves the positions marked in `last` `[B, L]` after all others."""
    one_bucket = torch.zeros((last.shape[0], 1, 1, last.shape[1]), dtype=torch.int32, device=last.device)
    return sort_by_bucket(one_bucket, last)
