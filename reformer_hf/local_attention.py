# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Local attention: queries and keys of their own, in chunks of neighbouring positions."""

import math

import torch
from torch import Tensor, nn

from .chunk_attention import AttentionPattern, chunk_attention, chunk_attention_weights
from .configuration_reformer_hf import ReformerHfConfig
from .hashing import sort_by_bucket
from .rng import draw_seed


class LocalSelfAttention(nn.Module):
    """Attention of each position to its chunk and the chunks around it."""

    def __init__(self, config: ReformerHfConfig):
        super().__init__()
        self.config = config
        all_head_size = config.num_attention_heads * config.attention_head_size
        self.query = nn.Linear(config.hidden_size, all_head_size, bias=False)
        self.key = nn.Linear(config.hidden_size, all_head_size, bias=False)
        self.value = nn.Linear(config.hidden_size, all_head_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        padding: Tensor | None = None,
        num_hashes: int | None = None,
        memo: dict[str, Tensor] | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """As `LSHSelfAttention.forward`, in one round; `num_hashes` and `memo` mean nothing here."""
        head_shape = (self.config.num_attention_heads, self.config.attention_head_size)
        query = self.query(hidden_states).unflatten(-1, head_shape)
        key = self.key(hidden_states).unflatten(-1, head_shape) / math.sqrt(self.config.attention_head_size)
        value = self.value(hidden_states).unflatten(-1, head_shape)
        pattern = self._pattern(hidden_states.shape[1])
        order = self._order(padding)
        dropout = self.config.local_attention_probs_dropout_prob if self.training else 0.0
        dropout_seed = draw_seed() if dropout else 0
        out = chunk_attention(query, key, value, pattern, order, padding, dropout, dropout_seed)
        weights = chunk_attention_weights(query, key, pattern, order, padding) if output_attentions else None
        return out.flatten(2), weights

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
