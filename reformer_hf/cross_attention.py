# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Attention of a decoder to the output of an encoder: exact, without a score matrix of both lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache

from .configuration_reformer_hf import ReformerHfConfig
from .dropout import RateDropout


@dataclass(frozen=True)
class Context:
    """
    What a decoder attends to besides its own tokens.

    Args:
        hidden_states: The encoder output `[B, S, 2 * hidden_size]`.
        bias: Bias of the scores, `[B, 1, 1, S]`, 0 or -inf; `None` if there is no padding.
    """

    hidden_states: Tensor
    bias: Tensor | None = None

    @property
    def num_positions(self) -> int:
        """Number of positions, summed over the batch."""
        return self.hidden_states.shape[0] * self.hidden_states.shape[1]

    def to(self, device: torch.device, non_blocking: bool = False) -> "Context":
        """Move the tensors to a device."""
        bias = None if self.bias is None else self.bias.to(device, non_blocking=non_blocking)
        return Context(self.hidden_states.to(device, non_blocking=non_blocking), bias)

    @classmethod
    def of(cls, hidden_states: Tensor, attention_mask: Tensor | None) -> "Context":
        """Create a context from the encoder output and its mask `[B, S]`, 1 for tokens and 0 for padding."""
        if attention_mask is None:
            return cls(hidden_states)
        bias = hidden_states.new_zeros(attention_mask.shape)
        bias.masked_fill_(~attention_mask.to(bias.device, torch.bool), -torch.inf)
        return cls(hidden_states, bias[:, None, None])


class CrossAttention(nn.Module):
    """Exact attention from decoder positions to all positions of the encoder output."""

    def __init__(self, config: ReformerHfConfig):
        super().__init__()
        self.num_heads, self.head_size = config.num_attention_heads, config.attention_head_size
        self.weights_dropout = RateDropout(config.lsh_attention_probs_dropout_prob or 0.0)
        features = self.num_heads * self.head_size
        self.query = nn.Linear(config.hidden_size, features, bias=False)
        self.key = nn.Linear(config.output_size, features, bias=False)
        self.value = nn.Linear(config.output_size, features, bias=False)

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Project the encoder output `[B, S, 2 * hidden_size]` to keys and values `[B, H, S, D]`."""
        return self._heads(self.key(context)), self._heads(self.value(context))

    def forward(self, hidden_states: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute the output of all heads `[B, n, H * D]` for hidden states `[B, n, E]`."""
        query = self._heads(self.query(hidden_states))
        key, value = key.to(query.dtype), value.to(query.dtype)
        out = scaled_dot_product_attention(query, key, value, _in_dtype(bias, query.dtype), self.weights_dropout.rate)
        return out.transpose(1, 2).flatten(2)

    def weights(self, hidden_states: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute the attention weights `[B, H, n, S]`, before dropout, at least in fp32."""
        query = self._heads(self.query(hidden_states))
        scores = query @ key.to(query.dtype).transpose(-1, -2) / self.head_size**0.5
        bias = _in_dtype(bias, query.dtype)
        scores = scores if bias is None else scores + bias
        return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def cached_keys_and_values(self, context: Tensor, cache: Cache, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values in the cross-attention cache. The first call computes them and writes them."""
        layers: Sequence[Any] = cache.layers
        if layer_idx < len(layers) and layers[layer_idx].is_initialized:
            return layers[layer_idx].keys, layers[layer_idx].values
        return cache.update(*self.keys_and_values(context), layer_idx)


def _in_dtype(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Convert a bias of the scores. It is finite then, so that a row of padding alone has no NaN."""
    return None if bias is None else bias.clamp(min=torch.finfo(dtype).min / 4).to(dtype)
