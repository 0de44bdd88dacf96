# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Local attention: queries and keys of their own, in chunks of neighbouring positions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .attention_kernels import attend_rows
from .attention_pattern import AttentionPattern
from .cache import LocalGeometry, with_past
from .chunk_attention import chunk_attention, chunk_attention_weights
from .hashing import sort_by_bucket
from .self_attention import AttentionCall, SelfAttention


class LocalSelfAttention(SelfAttention):
    """Attention of each position to its chunk and the chunks around it."""

    projections = ("query", "key", "value")

    @property
    def dropout(self) -> float:
        return self.config.local_attention_probs_dropout_prob if self.training else 0.0

    def project(self, hidden_states: Tensor, heads: slice, values: bool = True) -> list[Tensor]:
        return self._scaled(*super().project(hidden_states, heads, values))

    def project_all(self, hidden_states: Tensor) -> list[Tensor]:
        return self._scaled(*super().project_all(hidden_states))

    def _scaled(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        return [query, key / math.sqrt(self.head_size), value]

    def attend(self, projected: Sequence[Tensor], call: AttentionCall, heads: slice) -> Tensor:
        query, key, value = projected
        state, past, padding = call.state, None, call.padding
        if state is not None:
            state.prepare(self.geometry(), key, value)
            if heads.start == 0:
                state.reserve(key.shape[1])
            past = state.past(heads)
        if past is None:
            # In-tree, padding has its place.
            last = None if self.config.wrap_chunks else padding
            order = call.keep("order", lambda: self._order(last))
            inputs = query, key, value
        else:
            inputs, padding = past.before(query, key, value, padding=call.padding)
            last = with_past(past.absent, None, padding.shape[1]) if self.config.wrap_chunks else padding
            order = self._order(last)
        # What is past is no ring: a new token looks back at it and not at what is new.
        pattern = self._pattern(inputs[0].shape[1], in_ring=past is None)
        weights = None
        if call.output_attentions:
            weights = chunk_attention_weights(inputs[0], inputs[1], pattern, order, padding)
        # Groups of heads drop nothing in common.
        seed = call.dropout_seed + heads.start
        out = chunk_attention(*inputs, pattern, order, padding, self.dropout, seed)
        if past is not None:
            out, weights = past.cut(out, weights, int(state.length))
        call.add_weights(weights)
        if state is not None:
            call.update(key, value, state.fill(key.shape[1], call.padding, heads))
        return out

    def step(self, projected: Sequence[Tensor], call: AttentionCall) -> Tensor:
        query, key, value = projected
        state, num_new = call.state, query.shape[1]
        state.reserve(num_new)
        places = call.share(state.geometry, lambda: state.places(num_new, call.padding))
        seen = call.update(key, value, places)
        out, weights = attend_rows(query, *seen, places.hidden, self.dropout)
        if call.output_attentions:
            hidden = places.hidden[:, None]
            positions = state.positions(places)[:, None].masked_fill(hidden, -1).int()
            weights = weights.masked_fill(hidden, 0.0)
            call.add_weights((weights[:, :, None], positions.expand(weights.shape)[:, :, None]))
        state.advance(num_new, call.padding)
        return out

    def geometry(self, num_hashes: int | None = None) -> LocalGeometry:
        config = self.config
        return LocalGeometry(
            num_heads=config.num_attention_heads,
            head_size=config.attention_head_size,
            chunk_length=config.local_attn_chunk_length,
            num_chunks_before=config.local_num_chunks_before,
            counts_padding=config.wrap_chunks,
        )

    def _order(self, last: Tensor | None) -> Tensor | None:
        """Some positions `[B, L]` after all others, so that chunks begin with the first token."""
        if last is None:
            return None
        one_bucket = torch.zeros((last.shape[0], 1, 1, last.shape[1]), dtype=torch.int32, device=last.device)
        return sort_by_bucket(one_bucket, last)

    def _pattern(self, length: int, in_ring: bool = True) -> AttentionPattern:
        config = self.config
        return AttentionPattern(
            chunk_length=config.local_attn_chunk_length,
            chunks_before=config.local_num_chunks_before,
            chunks_after=config.local_num_chunks_after,
            causal=config.is_decoder,
            include_self=True,
            ring_multiple=math.lcm(*config.chunk_lengths) if config.wrap_chunks and in_ring else None,
            ring_min_length=min(config.chunk_lengths),
        ).for_length(length)
