# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""LSH attention (Kitaev et al. 2020, section 2): shared query-key attention among positions that hash together."""

from torch import Tensor

from .chunk_attention import AttentionPattern, chunk_attention, chunk_attention_weights
from .hashing import bucket_factors, hash_vectors, random_rotations, sort_by_bucket
from .rng import draw_seed
from .shared_query_key import SharedQueryKeyAttention


class LSHSelfAttention(SharedQueryKeyAttention):
    """Attention of each position to those of its buckets, in `num_hashes` rounds."""

    def forward(
        self,
        hidden_states: Tensor,
        padding: Tensor | None = None,
        num_hashes: int | None = None,
        memo: dict[str, Tensor] | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """
        Args:
            hidden_states: `[B, L, E]`.
            padding: `[B, L]`, True where there is padding.
            num_hashes: Rounds, instead of the config's.
            memo: Takes the sorted order in a first call and gives it in a second one on the same input.
            output_attentions: Whether to return the weights too, see `chunk_attention_weights`.

        Returns:
            `[B, L, H * D]`, and weights with their keys' positions or `None`.
        """
        query, value = self.project(hidden_states)
        pattern = self._pattern(hidden_states.shape[1])

        seed = self._hash_seed()
        order = memo.get("order") if memo else None
        if order is None and pattern is not None:
            order = self._sorted_order(query, padding, num_hashes or self.config.num_hashes, seed)
            if memo is not None:
                memo["order"] = order
        pattern = pattern or self._short_pattern(hidden_states.shape[1])
        dropout_seed = draw_seed() if self.dropout else 0
        out = chunk_attention(query, None, value, pattern, order, padding, self.dropout, dropout_seed)
        weights = chunk_attention_weights(query, None, pattern, order, padding) if output_attentions else None
        return out.flatten(2), weights

    def _hash_seed(self) -> int:
        """The seed of this call's rotations. Drawn in training even where the order is known, so that what is drawn
        after it, when activations are recomputed, is what it was."""
        if self.config.hash_seed is not None:
            return self.config.hash_seed
        return draw_seed() if self.training else 0

    def _sorted_order(self, query: Tensor, padding: Tensor | None, num_hashes: int, seed: int) -> Tensor:
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
        rotations = random_rotations(seed, query.shape[2], query.shape[3], num_hashes, factors)
        return sort_by_bucket(hash_vectors(query.detach(), rotations, factors), padding)

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
