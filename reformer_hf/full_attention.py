# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Full shared query-key attention: what LSH attention approximates, at O(L²)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .attention_kernels import attend_rows, normalized_keys
from .cache import Geometry
from .self_attention import AttentionCall, SharedQueryKeyAttention, see_themselves


class FullSelfAttention(SharedQueryKeyAttention):
    """Attention of each position to all others; to itself only where there is no other."""

    def attend(self, projected: Sequence[Tensor], call: AttentionCall, heads: slice) -> Tensor:
        query, value = (x.transpose(1, 2) for x in projected)
        key = normalized_keys(query)
        if call.state is not None:
            states = key.transpose(1, 2), projected[1]
            call.state.prepare(self.geometry(), *states)
            call.state.reserve(key.shape[2])
            call.update(*states, call.state.fill(key.shape[2], call.padding, heads))
        if self.config.is_decoder and call.padding is None:
            out = _causal_attention(query, key, value, self.dropout)
        else:
            out = _masked_attention(query, key, value, self._visible(query, call.padding), self.dropout)
        if call.output_attentions:
            call.add_weights(self._weights(query, key, call.padding))
        return out.transpose(1, 2)

    def step(self, projected: Sequence[Tensor], call: AttentionCall) -> Tensor:
        query, value = projected
        state, num_new = call.state, query.shape[1]
        state.reserve(num_new)
        places = state.places(num_new, call.padding)
        seen = call.update(normalized_keys(query), value, places)
        out, weights = attend_rows(query, *seen, places.hidden, self.dropout)
        hidden = alone = None
        if places.hidden is not None:
            hidden = places.hidden[:, None]
            alone = hidden.all(-1, keepdim=True)
            out = torch.where(alone.transpose(1, 2), value, out)
        if call.output_attentions:
            positions = state.positions(places).int().expand(weights.shape)
            if hidden is not None:
                weights, positions = weights.masked_fill(hidden, 0.0), positions.masked_fill(hidden, -1)
                see_themselves(weights, positions, alone, int(state.length))
            call.add_weights((weights[:, :, None], positions[:, :, None]))
        state.advance(num_new, call.padding)
        return out

    def geometry(self, num_hashes: int | None = None) -> Geometry:
        return Geometry(self.config.num_attention_heads, self.config.attention_head_size)

    def _visible(self, query: Tensor, padding: Tensor | None) -> Tensor:
        """Who sees whom, `[B or 1, 1, L, L]`."""
        length = query.shape[2]
        visible = ~torch.eye(length, dtype=torch.bool, device=query.device)[None, None]
        if self.config.is_decoder:
            visible = visible.tril()
        return visible if padding is None else visible & ~padding[:, None, None, :]

    def _weights(self, query: Tensor, key: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights and positions `[B, H, 1, L, L]`, without gradient."""
        with torch.no_grad():
            visible = _or_itself(self._visible(query, padding))
            scores = torch.matmul(query, key.transpose(-1, -2)).masked_fill(~visible, -torch.inf)
            weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
            positions = torch.arange(query.shape[2], dtype=torch.int32, device=query.device)
            positions = torch.where(visible, positions, -1).expand(weights.shape)
        return weights[:, :, None], positions[:, :, None]


def _causal_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Queries 1, 2, … over keys 0, 1, …: causal attention without the diagonal. The first is its own value."""
    first = value[:, :, :1]
    if query.shape[2] == 1:
        return first
    query, key, later = query[:, :, 1:], key[:, :, :-1], value[:, :, :-1]
    out = scaled_dot_product_attention(query, key, later, dropout_p=dropout, is_causal=True, scale=1.0)
    return torch.cat([first, out], dim=2)


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, dropout: float) -> Tensor:
    mask = _or_itself(visible)
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=1.0)
    # Not left to the softmax over one key, which dropout would drop.
    return torch.where(visible.any(-1, keepdim=True), out, value)


def _or_itself(visible: Tensor) -> Tensor:
    """A position that sees no other one sees itself."""
    itself = torch.eye(visible.shape[-1], dtype=torch.bool, device=visible.device)
    return visible | (itself & ~visible.any(-1, keepdim=True))
