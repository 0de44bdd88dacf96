# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Dense O(L²) oracles: the definitions, written to be read.

Who sees whom is a matrix of counts N[i, j], how often query i meets key j in all rounds. Attention is then
out_i = Σ_j N[i, j] exp(q_i · k_j) v_j / Σ_j N[i, j] exp(q_i · k_j).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from reformer_hf.attention_pattern import AttentionPattern


def key_counts(pattern: AttentionPattern, buckets: Sequence[Sequence[int]], padding: Sequence[bool]) -> Tensor:
    """
    How often each query meets each key, `[L, L]`, for one head of one sequence.

    Args:
        pattern: Which keys a query sees in a round.
        buckets: For each round, the bucket of every position.
        padding: Whether a position is padding.
    """
    length = len(padding)
    counts = torch.zeros(length, length, dtype=torch.float64)
    # The slots of all rounds, one after the other: the position there, or None where the last chunk is not full.
    orders = [[i for *_, i in sorted(zip(padding, of_round, range(length), strict=True))] for of_round in buckets]
    slots_of_round = -(-pattern.padded_length(length) // pattern.chunk_length) * pattern.chunk_length
    rounds = [order + [None] * (slots_of_round - length) for order in orders]
    ring = [position for order in rounds for position in order]
    for r, order in enumerate(rounds):
        for slot, query in enumerate(order):
            if query is None:
                continue
            for key in _looked_at(pattern, slot, order, r * slots_of_round, ring):
                if key is None or padding[key]:
                    continue
                if pattern.causal and key > query:
                    continue
                if key == query and not pattern.include_self:
                    continue
                if (pattern.same_bucket or pattern.window) and buckets[r][key] != buckets[r][query]:
                    continue
                counts[query, key] += 1
        if pattern.deduplicate_keys:
            counts.clamp_(max=1)
    return counts


def _looked_at(pattern: AttentionPattern, slot: int, order: list, first_slot: int, ring: list) -> list:
    """The positions in the slots that the query at `slot` looks at."""
    chunk_length = pattern.chunk_length
    if pattern.window:
        behind, ahead = chunk_length * pattern.chunks_before, chunk_length * pattern.chunks_after
        return order[max(slot - behind, 0) : slot + ahead + 1]
    first_chunk = slot // chunk_length - pattern.chunks_before
    last_chunk = slot // chunk_length + pattern.chunks_after
    slots = range(first_chunk * chunk_length, (last_chunk + 1) * chunk_length)
    if pattern.wraps:
        return [ring[(first_slot + other) % len(ring)] for other in slots]
    return [order[other] for other in slots if 0 <= other < len(order)]


def dense_attention(
    query_BLHD: Tensor,
    key_BLHD: Tensor,
    value_BLHE: Tensor,
    counts_BHLL: Tensor,
    own_value: bool,
    kept_counts_BHLL: Tensor | None = None,
) -> Tensor:
    """
    One softmax over the keys that each query meets, as often as it meets them.

    Args:
        counts_BHLL: N of the module's docstring.
        own_value: Whether a query that meets no key takes its own value, not zero.
        kept_counts_BHLL: With dropout, the counts of what is kept, each divided by the rate of keeping.
    """
    scores = torch.einsum("bihd,bjhd->bhij", query_BLHD, key_BLHD)
    counts = counts_BHLL.to(scores)
    without_keys = counts.sum(-1) == 0
    scores = scores.masked_fill(counts == 0, -torch.inf).masked_fill(without_keys[..., None], 0.0)
    # Counts enter as factors, so that a count is what it says and no logarithm of zero is met.
    weights = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
    total = (counts * weights).sum(-1, keepdim=True).masked_fill(without_keys[..., None], 1.0)
    kept = counts if kept_counts_BHLL is None else kept_counts_BHLL.to(scores)
    out = torch.einsum("bhij,bjhe->bihe", kept * weights / total, value_BLHE)
    return torch.where(without_keys.transpose(1, 2)[..., None], value_BLHE, out) if own_value else out


def full_attention_counts(causal: bool, padding_BL: Tensor) -> Tensor:
    """Counts `[B, 1, L, L]` of exact attention that leaves out a position itself."""
    length = padding_BL.shape[1]
    seen = ~torch.eye(length, dtype=torch.bool)
    if causal:
        seen = seen.tril()
    return (seen & ~padding_BL[:, None, None, :].cpu()).double()


def normalized_keys(query_BLHD: Tensor) -> Tensor:
    """Keys of shared query-key attention: queries at unit length, scaled by 1/√D (in-tree epsilon)."""
    mean_square = query_BLHD.pow(2).mean(-1, keepdim=True)
    return query_BLHD / torch.sqrt(mean_square + 1e-6) / query_BLHD.shape[-1] ** 0.5


def cross_attention(
    hidden_BLE: Tensor, context_BSE: Tensor, weights: dict[str, Tensor], num_heads: int, padding_BS: Tensor
) -> Tensor:
    """
    Attention to an encoder output: out_i = Σ_j softmax_j(q_i · k_j / √D) v_j over all j that are not padding.

    Args:
        weights: `query`, `key` and `value`, each with `.weight`.
    """
    query, key, value = (
        (x @ weights[f"{name}.weight"].T).unflatten(-1, (num_heads, -1))
        for x, name in ((hidden_BLE, "query"), (context_BSE, "key"), (context_BSE, "value"))
    )
    counts = (~padding_BS)[:, None, None, :].expand(-1, num_heads, query.shape[1], -1)
    return dense_attention(query / query.shape[-1] ** 0.5, key, value, counts, own_value=False).flatten(2)


def full_decoder_layer(
    x1: Tensor, x2: Tensor, context_BSE: Tensor, weights: dict[str, Tensor], num_heads: int, padding_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """
    One layer of a decoder, with full attention, without padding in the decoder and without dropout.

    The three half-steps are y1 = x1 + Attention(x2), y2 = x2 + CrossAttention(y1, e), y3 = y1 + FeedForward(y2).

    Returns:
        y2 and y3.
    """

    def of(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}

    def norm(x: Tensor, branch: str) -> Tensor:
        return layer_norm(
            x, x.shape[-1:], *(weights[f"{branch}.layer_norm.{name}"] for name in ("weight", "bias")), 1e-12
        )

    shared, value = (
        (norm(x2, "attention") @ weights[f"attention.self_attention.{name}.weight"].T).unflatten(-1, (num_heads, -1))
        for name in ("query_key", "value")
    )
    counts = full_attention_counts(True, torch.zeros(x2.shape[:2], dtype=torch.bool))
    heads = dense_attention(
        shared, normalized_keys(shared), value, counts.expand(-1, num_heads, -1, -1), own_value=True
    )
    y1 = x1 + heads.flatten(2) @ weights["attention.output.dense.weight"].T
    heads = cross_attention(
        norm(y1, "cross_attention"), context_BSE, of("cross_attention.attention."), num_heads, padding_BS
    )
    y2 = x2 + heads @ weights["cross_attention.output.dense.weight"].T
    dense, output = of("feed_forward.dense.dense."), of("feed_forward.output.dense.")
    inner = (norm(y2, "feed_forward") @ dense["weight"].T + dense["bias"]).relu()
    return y2, y1 + inner @ output["weight"].T + output["bias"]


def rotated(x_BLHD: Tensor, position_ids_BL: Tensor, theta: float) -> Tensor:
    """Rotary position embeddings: features i and i + D/2 are a complex number, turned by position * theta^(-2i/D)."""
    half = x_BLHD.shape[-1] // 2
    wavelengths = theta ** (torch.arange(half, dtype=torch.float64) / half)
    angles = position_ids_BL[..., None, None] / wavelengths
    turned = torch.complex(x_BLHD[..., :half], x_BLHD[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)
