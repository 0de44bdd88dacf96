# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The position-wise feed-forward layer, with the parameter names of the in-tree model."""

from torch import Tensor, nn
from transformers.activations import ACT2FN

from .chunked import apply_chunked
from .configuration_reformer_hf import ReformerHfConfig
from .dropout import RateDropout, draw_block_seeds, dropout_in_blocks
from .stream_norm import StreamLayerNorm


class _Dense(nn.Module):
    """A linear layer under the name `dense`."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.dense = nn.Linear(in_features, out_features)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dense(hidden_states)


class ReformerHfFeedForward(nn.Module):
    """Layer norm, linear layer, activation, linear layer."""

    def __init__(self, config: ReformerHfConfig):
        super().__init__()
        self.chunk_size = config.chunk_size_feed_forward
        inner_rate = config.feed_forward_dropout_prob
        self.dropout = RateDropout(config.hidden_dropout_prob)
        self.inner_dropout = RateDropout(config.hidden_dropout_prob if inner_rate is None else inner_rate)
        self.activation = ACT2FN[config.hidden_act]
        self.layer_norm = StreamLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dense = _Dense(config.hidden_size, config.feed_forward_size)
        self.output = _Dense(config.feed_forward_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the update `[B, L, E]` of the second residual stream, in chunks of `chunk_size_feed_forward`."""
        return apply_chunked(self._update, hidden_states, self.chunk_size, self)

    def _update(self, hidden_states: Tensor) -> Tensor:
        inner = self.dense(self.layer_norm(hidden_states))
        rate, inner_rate = self.dropout.rate, self.inner_dropout.rate
        if not (rate or inner_rate):
            return self.output(self.activation(inner))
        # The masks do not depend on whether this is called for chunks, as in a reversible layer, or for all positions.
        seeds = draw_block_seeds(hidden_states)
        inner = self.activation(dropout_in_blocks(inner, inner_rate, seeds))
        return dropout_in_blocks(self.output(inner), rate, [seed + 1 for seed in seeds])
