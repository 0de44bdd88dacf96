# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""LSH attention (Kitaev et al. 2020, section 2): shared query-key attention among positions that hash together."""

from collections.abc import Sequence

from torch import Tensor

from .chunk_attention import AttentionPattern, chunk_attention, chunk_attention_weights
from .hashing import bucket_factors, hash_vectors, random_rotations, sort_by_bucket
from .rng import draw_seed
from .self_attention import AttentionCall, SharedQueryKeyAttention


class LSHSelfAttention(SharedQueryKeyAttention):
    """Attention of each position to those of its buckets, in `num_hashes` rounds."""

    def attend(self, projected: Sequence[Tensor], call: AttentionCall, heads: slice) -> Tensor:
        query, value = projected
        length = query.shape[1]
        pattern, order = self._pattern(length), None
        if pattern is None:
            pattern = self._short_pattern(length)
        else:
            order = call.keep(("order", heads.start), lambda: self._sorted_order(query, call, heads))
        inputs = (pattern, order, call.padding)
        if call.output_attentions:
            call.add_weights(chunk_attention_weights(query, None, *inputs))
        # Groups of heads drop nothing in common.
        return chunk_attention(query, None, value, *inputs, self.dropout, call.dropout_seed + heads.start)

    def _hash_seed(self) -> int:
        if self.config.hash_seed is not None:
            return self.config.hash_seed
        return draw_seed() if self.training else 0

    def _sorted_order(self, query: Tensor, call: AttentionCall, heads: slice) -> Tensor:
        config = self.config
        length = config.padded_length(query.shape[1])
        window_length = config.lsh_attn_chunk_length * config.lsh_num_chunks_before
        factors = bucket_factors(
            config.num_buckets,
            length,
            config.lsh_attn_chunk_length,
            config.max_position_embeddings,
            window_length if config.lsh_pattern == "window" else None,
        )
        sizes = (config.num_attention_heads, query.shape[3], call.num_hashes or config.num_hashes)
        rotations = random_rotations(call.hash_seed, *sizes, factors)[heads]
        return sort_by_bucket(hash_vectors(query.detach(), rotations, factors), call.padding)

    def _pattern(self, length: int) -> AttentionPattern | None:
        """The pattern for an input of this length; `None` where all positions see each other, without hashing."""
        config = self.config
        ring_length = config.padded_length(length) if config.wrap_chunks else None
        if ring_length is not None and ring_length <= config.lsh_attn_chunk_length:
            return None
        return AttentionPattern(
            chunk_length=config.lsh_attn_chunk_length,
            chunks_before=config.lsh_num_chunks_before,
            chunks_after=config.lsh_num_chunks_after,
            causal=config.is_decoder,
            same_bucket=not config.lsh_across_buckets,
            window=config.lsh_pattern == "window",
            each_key_once=not config.lsh_count_duplicates,
            ring_length=ring_length,
        )

    def _short_pattern(self, length: int) -> AttentionPattern:
        """In-tree, an input no longer than a chunk is one chunk, in the order of positions."""
        return AttentionPattern(chunk_length=length, chunks_before=0, causal=self.config.is_decoder)
