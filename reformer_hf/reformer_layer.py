# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
One layer of the Reformer: a pair of residual branches on two streams (Kitaev et al. 2020, section 3).

    y1 = x1 + Attention(x2)
    y2 = x2 + FeedForward(y1)

In the decoder of an encoder-decoder, a triple that also reads the encoder output e. The streams swap from one
layer to the next, so that each branch reads the stream that was changed last (as in trax):

    y1 = x1 + Attention(x2)
    y2 = x2 + CrossAttention(y1, e)
    y3 = y1 + FeedForward(y2)        the next layer starts with (y2, y3)
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache

from .chunked import needs_plain_call
from .configuration_reformer_hf import ReformerHfConfig
from .cross_attention import CrossAttention
from .dropout import RateDropout, SeededDropout, draw_block_seeds, draw_seed, dropout_in_blocks
from .feed_forward import ReformerHfFeedForward
from .full_attention import FullSelfAttention
from .local_attention import LocalSelfAttention
from .lsh_attention import LSHSelfAttention
from .reversible import AttentionBranch, AttentionPart, Branch, ContextBranch, PositionWiseBranch, Tape, residual_layer
from .self_attention import AttentionCall, Found, ReformerHfSelfOutput, SelfAttention, Weights
from .stream_norm import StreamLayerNorm

SELF_ATTENTIONS = {"local": LocalSelfAttention, "lsh": LSHSelfAttention, "full": FullSelfAttention}


class LayerWeights(NamedTuple):
    """
    The attention weights of a layer.

    Args:
        values, positions: Weights of the tokens and the positions of their keys, see `ReformerHfModelOutput`.
        cross: Weights of the encoder output, `[B, H, L, S]`; `None` without cross-attention.
    """

    values: Tensor
    positions: Tensor
    cross: Tensor | None

    @classmethod
    def of(cls, weights: Weights | None, cross: Tensor | None) -> "LayerWeights | None":
        """Combine the weights of both kinds of attention; `None` if there are none."""
        return None if weights is None else cls(*weights, cross)


class ReformerHfAttention(nn.Module):
    """Layer norm, attention of the layer's type, output projection and dropout."""

    def __init__(self, config: ReformerHfConfig, layer_idx: int):
        super().__init__()
        self.dropout = RateDropout(config.hidden_dropout_prob)
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
            chunk_size=call.suitable_chunk_size,
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
        rate = self.dropout.rate
        return SeededDropout(rate, draw_seed()) if rate else None


class ReformerHfCrossAttention(nn.Module):
    """Layer norm, attention to the encoder output, output projection and dropout."""

    def __init__(self, config: ReformerHfConfig, layer_idx: int):
        super().__init__()
        self.dropout = RateDropout(config.hidden_dropout_prob)
        self.layer_idx = layer_idx
        self.layer_norm = StreamLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = CrossAttention(config)
        self.output = ReformerHfSelfOutput(config)

    def forward(self, y1: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """
        Compute the branch that is added to the second stream.

        Args:
            y1: The first stream `[B, n, E]`.
            key, value: Keys and values of the encoder output, `[B, H, S, D]`.
            bias: Bias of the scores, `[B, 1, 1, S]`.
        """
        added = self.output(self.attention(self.layer_norm(y1), key, value, bias))
        rate = self.dropout.rate
        return dropout_in_blocks(added, rate, draw_block_seeds(added)) if rate else added

    def weights(self, y1: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the attention weights `[B, H, n, S]`, without gradient."""
        with torch.no_grad():
            return self.attention.weights(self.layer_norm(y1), key, bias)

    def keys_and_values(self, context: Tensor, cache: Cache | None = None) -> tuple[Tensor, Tensor]:
        """Return keys and values `[B, H, S, D]` of the encoder output, which a cache keeps after the first call."""
        # As in `StreamLayerNorm`. The dtype of quantized projections is not that of their inputs.
        context = context.to(self.layer_norm.weight.dtype)
        if cache is None:
            return self.attention.keys_and_values(context)
        return self.attention.cached_keys_and_values(context, cache, self.layer_idx)

    def branch(self, call: AttentionCall, cache: Cache | None) -> ContextBranch:
        """
        Return the same branch for a reversible layer, in chunks of positions.

        A cache is read, or written, before the branch runs, and the encoder output then gets no gradient.
        """
        bias, context = call.context.bias, call.context.hidden_states
        cached = None if cache is None else self.keys_and_values(context, cache)
        return ContextBranch(
            self,
            function=partial(self, bias=bias),
            context=context,
            prepare=lambda context: cached or self.keys_and_values(context),
            chunk_size=call.suitable_chunk_size,
            observe=(lambda y1, prepared: self.weights(y1, prepared[0], bias)) if call.output_attentions else None,
        )


class ReformerHfLayer(nn.Module):
    """Two or three residual branches. The layer is reversible if it is given a tape and gradients are needed."""

    def __init__(self, config: ReformerHfConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.attention = ReformerHfAttention(config, layer_idx)
        self.cross_attention = ReformerHfCrossAttention(config, layer_idx) if config.add_cross_attention else None
        self.feed_forward = ReformerHfFeedForward(config)

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        call: AttentionCall,
        tape: Tape | None = None,
        cache: Cache | None = None,
        cross_cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor, LayerWeights | None]:
        """
        Compute both streams after the layer.

        Args:
            x1, x2: The streams `[B, L, E]`.
            call: The inputs of attention.
            tape: The tape that the layers of a reversible stack share; `None` saves activations.
            cache: KV cache of the earlier tokens. The layer adds the new tokens to it.
            cross_cache: Cache of the keys and values of the encoder output. The first call writes to it.

        Returns:
            The streams after the layer, and attention weights if the call requests them.
        """
        cache_layer: Any = None if cache is None else cache.layers[self.layer_idx]
        appends = cache_layer is not None and cache_layer.can_append(call.length)
        if appends or (tape is None and torch.is_grad_enabled()) or self._is_changed():
            return self._call_modules(x1, x2, call, cache, cross_cache)
        drop = self.attention.draw_dropout()
        call = self.attention.self_attention.begin(call, cache_layer)
        branches: list[Branch] = [self.attention.branch(call, drop), self._feed_forward_branch(call)]
        if self.cross_attention is not None:
            branches.insert(1, self.cross_attention.branch(call, cross_cache))
        x1, x2, (found, cross_weights, *_) = residual_layer(x1, x2, branches, tape)
        found = Found.join(found)
        if cache is not None:
            self.attention.self_attention.prefill(found, call, cache, self.layer_idx)
        return x1, x2, LayerWeights.of(found.weights, cross_weights)

    def _call_modules(
        self, x1: Tensor, x2: Tensor, call: AttentionCall, cache: Cache | None, cross_cache: Cache | None
    ) -> tuple[Tensor, Tensor, LayerWeights | None]:
        """Compute the layer by calling each of its modules once. The streams swap after each branch."""
        added, weights = self.attention(x2, call, cache)
        x1, x2 = x2, x1 + added
        cross_weights = None
        if self.cross_attention is not None:
            key, value = self.cross_attention.keys_and_values(call.context.hidden_states, cross_cache)
            if call.output_attentions:
                cross_weights = self.cross_attention.weights(x2, key, call.context.bias)
            x1, x2 = x2, x1 + self.cross_attention(x2, key, value, call.context.bias)
        return x2, x1 + self.feed_forward(x2), LayerWeights.of(weights, cross_weights)

    def _is_changed(self) -> bool:
        """Return whether the layer needs a plain call, or has parts that are other modules with a `forward` alone."""
        attention, cross = self.attention, self.cross_attention
        is_original = (
            isinstance(attention, ReformerHfAttention)
            and isinstance(attention.self_attention, SelfAttention)
            and isinstance(attention.output, ReformerHfSelfOutput)
            and isinstance(self.feed_forward, ReformerHfFeedForward)
            and (cross is None or isinstance(cross, ReformerHfCrossAttention))
        )
        return not is_original or needs_plain_call(self)

    def _feed_forward_branch(self, call: AttentionCall) -> PositionWiseBranch:
        return PositionWiseBranch(self.feed_forward, self.feed_forward.chunk_size or call.suitable_chunk_size)
