# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Full shared query-key attention, which LSH attention approximates, in O(L²)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache

from .attention_kernels import normalized_keys
from .configuration_reformer_hf import ReformerHfConfig
from .self_attention import AttentionCall, Found, SelfAttention, Weights


class FullSelfAttention(SelfAttention):
    """Attention of each position to all others, and to itself only if it sees no other."""

    projections = ("query_key", "value")

    def __init__(self, config: ReformerHfConfig):
        super().__init__(config)
        self.is_causal = config.is_decoder

    def attend(
        self, projected: Sequence[Tensor], call: AttentionCall, heads: slice, found: Found | None = None
    ) -> tuple[Tensor, Found]:
        query, value = (x.transpose(1, 2) for x in projected)
        key = normalized_keys(query)
        out = self._attend_documents(query, key, value, call)
        if found is None:
            weights = self._weights(query, key, call) if call.output_attentions else None
            found = Found(weights=weights)
            if call.fills_cache:
                found = Found(key=key.transpose(1, 2), value=projected[1], weights=weights)
        return out.transpose(1, 2), found

    def _attend_documents(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        if call.documents is None:
            return self._attend_all(query, key, value, call.padding)
        rows: list[list[Tensor]] = [[] for _ in range(call.batch_size)]
        for row, start, stop in call.documents.spans:
            at = (slice(row, row + 1), slice(None), slice(start, stop))
            padding = None if call.padding is None else call.padding[row : row + 1, start:stop]
            rows[row].append(self._attend_all(query[at], key[at], value[at], padding))
        return torch.cat([torch.cat(row, dim=2) for row in rows])

    def _attend_all(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
        if self.is_causal and padding is None:
            return _causal_attention(query, key, value, self.dropout)
        visible = visible_keys(_positions(query), query.shape[2], self.is_causal, padding)
        return _masked_attention(query, key, value, visible, self.dropout)

    def _append(
        self, hidden_states: Tensor, call: AttentionCall, cache: Cache, layer_idx: int
    ) -> tuple[Tensor, Weights | None]:
        query, value = self.project_new(hidden_states)
        return self.append_and_attend(query, normalized_keys(query), value, call, cache, layer_idx)

    def _weights(self, query: Tensor, key: Tensor, call: AttentionCall) -> Weights:
        """Compute attention weights and key positions `[B, H, 1, L, L]`, without gradient."""
        with torch.no_grad():
            positions = _positions(query)
            visible = visible_keys(positions, query.shape[2], self.is_causal, call.padding)
            if call.documents is not None:
                index = call.documents.index
                visible = visible & (index[:, None, :, None] == index[:, None, None, :])
            visible = or_itself(visible, positions)
            weights = weights_of(query, key, visible)
            positions = torch.where(visible, positions.int(), -1).expand(weights.shape)
        return weights[:, :, None], positions[:, :, None]


def visible_keys(queries: Tensor, length: int, causal: bool, padding: Tensor | None = None) -> Tensor:
    """
    Return which keys some queries see in full attention, `[B or 1, 1, n, length]`: all others, and none of themselves.

    Args:
        queries: Positions of the queries, `[n]`.
        length: Number of keys.
        causal: Whether a query sees no later positions.
        padding: `[B, length]`, True for padding, which no query sees.
    """
    keys = torch.arange(length, device=queries.device)
    visible = (keys < queries[:, None]) if causal else (keys != queries[:, None])
    return visible[None, None] if padding is None else visible & ~padding[:, None, None, :]


def or_itself(visible: Tensor, queries: Tensor) -> Tensor:
    """
    Unmask the own key of each query without other keys.

    Args:
        visible: The result of `visible_keys`, `[…, n, L]`.
        queries: Positions of the queries, `[n]`.
    """
    itself = torch.arange(visible.shape[-1], device=visible.device) == queries[:, None]
    return visible | (itself & ~visible.any(-1, keepdim=True))


def weights_of(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    """
    Compute attention weights `[…, n, L]`, at least in fp32.

    Args:
        query, key: `[…, n, D]` and `[…, L, D]`.
        visible: Which keys each query sees, `[…, n, L]`, at least one.
    """
    scores = torch.matmul(query, key.transpose(-1, -2)).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def _causal_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Compute causal attention without the diagonal: queries 1, 2, … over keys 0, 1, …. Query 0 returns its value."""
    first = value[:, :, :1]
    if query.shape[2] == 1:
        return first
    query, key, later = query[:, :, 1:], key[:, :, :-1], value[:, :, :-1]
    out = scaled_dot_product_attention(query, key, later, dropout_p=dropout, is_causal=True, scale=1.0)
    return torch.cat([first, out], dim=2)


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, dropout: float) -> Tensor:
    mask = or_itself(visible, _positions(query))
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=1.0)
    # A query without keys returns its value, to which dropout must not apply as it would in a softmax over one key.
    return torch.where(visible.any(-1, keepdim=True), out, value)


def _positions(query: Tensor) -> Tensor:
    """Return the positions `[L]` of queries `[B, H, L, D]`."""
    return torch.arange(query.shape[2], device=query.device)
