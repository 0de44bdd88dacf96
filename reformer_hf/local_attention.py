# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Local attention: queries and keys of their own, in chunks of neighbouring positions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .chunk_attention import AttentionPattern, chunk_attention, chunk_attention_weights
from .hashing import sort_by_bucket
from .self_attention import AttentionCall, SelfAttention


class LocalSelfAttention(SelfAttention):
    """Attention of each position to its chunk and the chunks around it."""

    projections = ("query", "key", "value")

    @property
    def dropout(self) -> float:
        return self.config.local_attention_probs_dropout_prob if self.training else 0.0

    def project(self, hidden_states: Tensor, heads: slice, values: bool = True) -> list[Tensor]:
        query, key, value = super().project(hidden_states, heads, values)
        return [query, key / math.sqrt(self.config.attention_head_size), value]

    def attend(self, projected: Sequence[Tensor], call: AttentionCall, heads: slice) -> Tensor:
        query, key, value = projected
        order = call.keep("order", lambda: self._order(call.padding))
        inputs = (self._pattern(query.shape[1]), order, call.padding)
        if call.output_attentions:
            call.add_weights(chunk_attention_weights(query, key, *inputs))
        # Groups of heads drop nothing in common.
        return chunk_attention(query, key, value, *inputs, self.dropout, call.dropout_seed + heads.start)

    def _order(self, padding: Tensor | None) -> Tensor | None:
        """Padding after all else, so that chunks begin with the first token. In-tree, padding has its place."""
        if padding is None or self.config.wrap_chunks:
            return None
        one_bucket = torch.zeros((padding.shape[0], 1, 1, padding.shape[1]), dtype=torch.int32, device=padding.device)
        return sort_by_bucket(one_bucket, padding)

    def _pattern(self, length: int) -> AttentionPattern:
        config = self.config
        ring_length = config.padded_length(length) if config.wrap_chunks else None
        if ring_length is not None and ring_length <= config.local_attn_chunk_length:
            return AttentionPattern(length, chunks_before=0, causal=config.is_decoder, sees_itself=True)
        return AttentionPattern(
            chunk_length=config.local_attn_chunk_length,
            chunks_before=config.local_num_chunks_before,
            chunks_after=config.local_num_chunks_after,
            causal=config.is_decoder,
            sees_itself=True,
            ring_length=ring_length,
        )
