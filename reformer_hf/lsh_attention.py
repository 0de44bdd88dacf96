# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""LSH attention (Kitaev et al. 2020, section 2): shared query-key attention among positions that hash together."""

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from .attention_kernels import attend_to, normalized_keys
from .attention_pattern import AttentionPattern
from .cache import SLACK, Places, Weights
from .chunk_attention import chunk_attention, chunk_attention_weights
from .configuration_reformer_hf import ReformerHfConfig
from .hashing import (
    bucket_factors,
    hash_by,
    hash_vectors,
    projections_of,
    random_rotations,
    sort_by_bucket,
)
from .lsh_cache import LSHGeometry, LSHStateLayer
from .rng import draw_seed
from .self_attention import AttentionCall, SharedQueryKeyAttention, see_themselves


class LSHSelfAttention(SharedQueryKeyAttention):
    """Attention of each position to those of its buckets, in `num_hashes` rounds."""

    def attend(self, projected: Sequence[Tensor], call: AttentionCall, heads: slice) -> Tensor:
        query, value = projected
        if call.state is not None:
            return self._attend_and_keep(query, value, call, heads)
        order = None
        if self._pattern(query.shape[1]) is not None:
            order = call.keep(("order", heads.start), lambda: self._sorted_order(query, call, heads))
        out, weights = self._attend(query, None, value, order, call.padding, call, heads)
        call.add_weights(weights)
        return out

    def _attend(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor,
        order: Tensor | None,
        padding: Tensor | None,
        call: AttentionCall,
        heads: slice,
    ) -> tuple[Tensor, Weights | None]:
        length = query.shape[1]
        pattern = self._pattern(length)
        if pattern is None:
            pattern, order = self._short_pattern(length), None
        weights = None
        if call.output_attentions:
            weights = chunk_attention_weights(query, key, pattern, order, padding)
        # Groups of heads drop nothing in common.
        seed = call.dropout_seed + heads.start
        return chunk_attention(query, key, value, pattern, order, padding, self.dropout, seed), weights

    def _attend_and_keep(self, query: Tensor, value: Tensor, call: AttentionCall, heads: slice) -> Tensor:
        """A parallel pass over new tokens and all that the state holds, which then takes the new ones."""
        state, key = call.state, normalized_keys(query)
        if not state.is_initialized:
            factors = state.factors if call.num_buckets is None and state.factors else None
            factors = factors or self._factors(query.shape[1], call)
            rotations = self._rotations(call, query.shape[3], factors)
            state.prepare_hashing(factors, projections_of(rotations, factors, query), rotations.shape[2])
            state.prepare(self.geometry(call.num_hashes), key, value)
        if heads.start == 0:
            state.reserve(query.shape[1])
        past = state.past(heads)
        buckets = self._buckets(query, call, heads, call.padding)
        if past is None:
            order = sort_by_bucket(buckets)
            out, weights = self._attend(query, None, value, order, call.padding, call, heads)
        else:
            order = sort_by_bucket(torch.cat([past.buckets, buckets], dim=-1))
            (all_queries, all_keys, all_values), padding = past.before(query, key, value, padding=call.padding)
            out, weights = self._attend(all_queries, all_keys, all_values, order, padding, call, heads)
            out, weights = past.cut(out, weights, int(state.length))
        call.add_weights(weights)
        call.update(key, value, state.fill(heads, buckets, order))
        return out

    def step(self, projected: Sequence[Tensor], call: AttentionCall) -> Tensor:
        query, value = projected
        # In chunks of the sorted order each token moves what the next one sees.
        size = SLACK if call.state.geometry.chunk_length is None else 1
        outs, weights = [], []
        for start in range(0, query.shape[1], size):
            at = slice(start, start + size)
            padding = None if call.padding is None else call.padding[:, at]
            out, seen = self._step(query[:, at], value[:, at], padding, call)
            outs.append(out)
            weights.append(seen)
        if call.output_attentions:
            values, positions = (torch.cat(parts, dim=3) for parts in zip(*weights, strict=True))
            call.add_weights((values, positions))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def _step(
        self, query: Tensor, value: Tensor, padding: Tensor | None, call: AttentionCall
    ) -> tuple[Tensor, Weights | None]:
        state, num_new = call.state, query.shape[1]
        state.reserve(num_new)
        places = state.places(state.hash(query, padding))
        seen_keys, seen_values = call.update(normalized_keys(query), value, places)
        # One batch row of attention for each token and head.
        query, value = query.transpose(1, 2), value.transpose(1, 2)
        hidden = places.hidden.view(seen_keys.shape[0], 1, -1)
        out, weights = attend_to(query.reshape(-1, 1, query.shape[3]), seen_keys, seen_values, hidden, self.dropout)
        alone = hidden.all(-1).view(*query.shape[:3], 1)
        out = torch.where(alone, value, out.view(query.shape)).transpose(1, 2)
        seen = None
        if call.output_attentions:
            seen = self._step_weights(weights.view(places.hidden.shape), alone, places, state)
        state.advance(num_new, padding)
        return out, seen

    @staticmethod
    def _step_weights(weights: Tensor, alone: Tensor, places: Places, state: LSHStateLayer) -> Weights:
        """Weights and positions `[B, H, R, n, W]` of a step; a token that is alone sees itself, last in round 0."""
        weights = weights.masked_fill(places.hidden, 0.0)
        positions = state.positions(places).masked_fill(places.hidden, -1).int()
        see_themselves(weights[..., 0, :], positions[..., 0, :], alone, int(state.length))
        return weights.transpose(2, 3), positions.transpose(2, 3)

    def geometry(self, num_hashes: int | None = None) -> LSHGeometry:
        config, in_chunks = self.config, self.config.lsh_pattern == "chunk"
        chunk_length, before = config.lsh_attn_chunk_length, config.lsh_num_chunks_before
        return LSHGeometry(
            num_heads=config.num_attention_heads,
            head_size=config.attention_head_size,
            num_hashes=num_hashes or config.num_hashes,
            window_length=chunk_length * (before + 1 if in_chunks else before),
            deduplicate_keys=config.lsh_deduplicate_keys,
            chunk_length=chunk_length if in_chunks else None,
            same_bucket=in_chunks and not config.lsh_across_buckets,
            ring_multiple=math.lcm(*config.chunk_lengths) if config.wrap_chunks else None,
            shortest_chunk=min(config.chunk_lengths),
        )

    def _hash_seed(self) -> int:
        if self.config.hash_seed is not None:
            return self.config.hash_seed
        return draw_seed() if self.training else 0

    @staticmethod
    def _buckets(query: Tensor, call: AttentionCall, heads: slice, padding: Tensor | None) -> Tensor:
        """Buckets `[B, h, R, n]` by the rotations of the state, N for padding."""
        state = call.state
        projections = [projection[heads] for projection in state.projections]
        buckets = hash_by(projections, query.detach(), state.geometry.num_hashes)
        return buckets if padding is None else buckets.masked_fill(padding[:, None, None], state.num_buckets)

    def _sorted_order(self, query: Tensor, call: AttentionCall, heads: slice) -> Tensor:
        factors = self._factors(query.shape[1], call)
        rotations = self._rotations(call, query.shape[3], factors)[heads]
        return sort_by_bucket(hash_vectors(query.detach(), rotations, factors), call.padding)

    def _factors(self, length: int, call: AttentionCall) -> list[int]:
        return factors_of(self.config, length) if call.num_buckets is None else list(call.num_buckets)

    def _rotations(self, call: AttentionCall, head_size: int, factors: list[int]) -> Tensor:
        num_hashes = call.num_hashes or self.config.num_hashes
        return random_rotations(call.hash_seed, self.config.num_attention_heads, head_size, num_hashes, factors)

    def _pattern(self, length: int) -> AttentionPattern | None:
        """The pattern for an input of this length; `None` where all positions see each other, without hashing."""
        pattern = self.pattern.for_length(length)
        return pattern if pattern is self.pattern else None

    def _short_pattern(self, length: int) -> AttentionPattern:
        """In-tree, an input no longer than a chunk is one chunk, in the order of positions."""
        return self.pattern.for_length(length)

    @cached_property
    def pattern(self) -> AttentionPattern:
        config = self.config
        return AttentionPattern(
            chunk_length=config.lsh_attn_chunk_length,
            chunks_before=config.lsh_num_chunks_before,
            chunks_after=config.lsh_num_chunks_after,
            causal=config.is_decoder,
            same_bucket=not config.lsh_across_buckets,
            window=config.lsh_pattern == "window",
            deduplicate_keys=config.lsh_deduplicate_keys,
            ring_multiple=math.lcm(*config.chunk_lengths) if config.wrap_chunks else None,
            ring_min_length=min(config.chunk_lengths),
        )


def factors_of(config: ReformerHfConfig, length: int) -> list[int]:
    """Factors of the number of buckets, for an input of this length."""
    window_length = config.lsh_attn_chunk_length * config.lsh_num_chunks_before
    return bucket_factors(
        config.num_buckets,
        config.padded_length(length),
        config.lsh_attn_chunk_length,
        config.max_position_embeddings,
        window_length if config.lsh_pattern == "window" else None,
    )
