# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""What LSH and full attention share: one projection that serves queries and keys."""

from torch import Tensor, nn

from .configuration_reformer_hf import ReformerHfConfig


class SharedQueryKeyAttention(nn.Module):
    """Projections of shared query-key attention; a subclass attends."""

    def __init__(self, config: ReformerHfConfig):
        super().__init__()
        self.config = config
        all_head_size = config.num_attention_heads * config.attention_head_size
        self.query_key = nn.Linear(config.hidden_size, all_head_size, bias=False)
        self.value = nn.Linear(config.hidden_size, all_head_size, bias=False)

    @property
    def dropout(self) -> float:
        """Rate at which attention weights are dropped in this mode."""
        return (self.config.lsh_attention_probs_dropout_prob or 0.0) if self.training else 0.0

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Queries, which serve as keys too, and values `[B, L, H, D]` of hidden states `[B, L, E]`."""
        head_shape = (self.config.num_attention_heads, self.config.attention_head_size)
        query = self.query_key(hidden_states).unflatten(-1, head_shape)
        value = self.value(hidden_states).unflatten(-1, head_shape)
        return query, value
