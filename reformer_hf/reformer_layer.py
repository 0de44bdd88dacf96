# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
One layer of the Reformer: a pair of residual branches on two streams (Kitaev et al. 2020, section 3).

    y1 = x1 + Attention(x2)
    y2 = x2 + FeedForward(y1)
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from .chunked import suitable_chunk_size
from .configuration_reformer_hf import ReformerHfConfig
from .feed_forward import ReformerHfFeedForward
from .full_attention import FullSelfAttention
from .local_attention import LocalSelfAttention
from .lsh_attention import LSHSelfAttention
from .reversible import AttentionBranch, AttentionPart, PositionWiseBranch, Tape, residual_layer
from .rng import SeededDropout, draw_seed
from .self_attention import AttentionCall, Found, ReformerHfSelfOutput, Weights
from .stream_norm import StreamLayerNorm

SELF_ATTENTIONS = {"local": LocalSelfAttention, "lsh": LSHSelfAttention, "full": FullSelfAttention}


class ReformerHfAttention(nn.Module):
    """Layer norm, attention of the layer's type, output projection and dropout."""

    def __init__(self, config: ReformerHfConfig, layer_idx: int):
        super().__init__()
        self.dropout = config.hidden_dropout_prob
        self.layer_idx = layer_idx
        self.layer_norm = StreamLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attention = SELF_ATTENTIONS[config.attn_layers[layer_idx]](config)
        self.output = ReformerHfSelfOutput(config)

    def forward(self, x2: Tensor, call: AttentionCall, cache: Cache | None = None) -> tuple[Tensor, Weights | None]:
        """
        Compute the branch that is added to the first stream.

        Args:
            x2: The second stream `[B, L, E]`.
            call: The inputs of attention.
            cache: KV cache of the earlier tokens, to which the new ones are added.

        Returns:
            The update `[B, L, E]`, and attention weights with the positions of their keys or `None`.
        """
        drop = self.draw_dropout()
        heads, weights = self.self_attention(self.layer_norm(x2), call, cache, self.layer_idx)
        added = self.output(heads)
        return added if drop is None else drop(added), weights

    def branch(self, call: AttentionCall, drop: SeededDropout | None) -> AttentionBranch:
        """Return the same branch for a reversible layer: a sum over groups of heads, in chunks of positions."""
        return AttentionBranch(
            self,
            parts=[self._part(call, heads) for heads in self.self_attention.head_groups(call, self.output.dense)],
            uses_rng=self.training,
            chunk_size=suitable_chunk_size(call.batch_size, call.length, call.device.type),
            dropout=drop,
        )

    def _part(self, call: AttentionCall, heads: slice) -> AttentionPart:
        self_attention, features = self.self_attention, self.self_attention.features(heads)
        return AttentionPart(
            read=lambda stream, values=True: self_attention.project(self.layer_norm(stream), heads, values),
            attend=lambda projected, found: self_attention.attend_heads(projected, call, heads, found),
            write=lambda hidden_states: self.output(hidden_states, features),
        )

    def draw_dropout(self) -> SeededDropout | None:
        """Draw the seed of the dropout of one call; return `None` without dropout."""
        return SeededDropout(self.dropout, draw_seed()) if self.training and self.dropout else None


class ReformerHfLayer(nn.Module):
    """A pair of residual branches. The layer is reversible if it is given a tape and gradients are needed."""

    def __init__(self, config: ReformerHfConfig, layer_idx: int):
        super().__init__()
        self.attention = ReformerHfAttention(config, layer_idx)
        self.feed_forward = ReformerHfFeedForward(config)

    def forward(
        self, x1: Tensor, x2: Tensor, call: AttentionCall, tape: Tape | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor, Weights | None]:
        """
        Compute both streams after the layer.

        Args:
            x1, x2: The streams `[B, L, E]`.
            call: The inputs of attention.
            tape: The tape that the layers of a reversible stack share; `None` saves activations.
            cache: KV cache of the earlier tokens. The layer adds the new tokens to it.

        Returns:
            The streams after the layer, and attention weights with the positions of their keys or `None`.
        """
        cache_layer: Any = None if cache is None else cache.layers[self.attention.layer_idx]
        appends = cache_layer is not None and cache_layer.can_append(call.length)
        if appends or (tape is None and torch.is_grad_enabled()) or has_inner_hooks(self):
            added, weights = self.attention(x2, call, cache)
            y1 = x1 + added
            return y1, x2 + self.feed_forward(y1), weights
        drop = self.attention.draw_dropout()
        call = self.attention.self_attention.begin(call, cache_layer)
        branches = self.attention.branch(call, drop), self._feed_forward_branch(call)
        y1, y2, (found, _) = residual_layer(x1, x2, branches, tape)
        found = Found.join(found)
        if cache is not None:
            self.attention.self_attention.prefill(found, call, cache, self.attention.layer_idx)
        return y1, y2, found.weights

    def _feed_forward_branch(self, call: AttentionCall) -> PositionWiseBranch:
        suitable = suitable_chunk_size(call.batch_size, call.length, call.device.type)
        chunk_size = self.feed_forward.chunk_size or suitable
        return PositionWiseBranch(self.feed_forward, uses_rng=self.training, chunk_size=chunk_size)


def has_inner_hooks(module: nn.Module) -> bool:
    """
    Return whether a module inside this one has hooks. They may change its output by tensors with gradients.

    Such a layer calls each of its modules once, and saves activations.
    """
    return any(
        inner._forward_hooks or inner._forward_pre_hooks or inner._backward_hooks or inner._backward_pre_hooks
        for inner in module.modules()
        if inner is not module
    )
