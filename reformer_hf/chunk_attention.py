# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Attention within chunks of a sorted order: the one operation under local and LSH attention.

`attention_layout` says who sees whom and cuts the work into slabs, `attention_kernels` computes one. Here rounds are
merged as they come, and gradients are summed.

Shapes: B batch, L length, H heads, D size of queries and keys, E size of values, R rounds. A *row* is a (batch,
position, head).
"""

import math

import torch
from torch import Tensor

from .attention_kernels import Dropout, attend, attend_backward, merge, scores_of
from .attention_layout import NO_KEY, AttentionPattern, Layout


def chunk_attention(
    query_BLHD: Tensor,
    key_BLHD: Tensor,
    value_BLHE: Tensor,
    pattern: AttentionPattern,
    order: Tensor | None = None,
    padding_BL: Tensor | None = None,
    dropout: float = 0.0,
    dropout_seed: int = 0,
) -> Tensor:
    """
    Attend within chunks; one softmax over the keys of all rounds.

    Queries meet keys as they are: any scale is part of one of them.

    Args:
        query_BLHD, key_BLHD, value_BLHE: All of one floating dtype.
        pattern: Which keys a query sees.
        order: The order of each round as `hashing.sort_by_bucket` returns it, `[B or 1, H or 1, R, L]`. `None` stands
            for one round in the order of positions.
        padding_BL: True where there is padding, which no query sees. Outputs there mean nothing.
        dropout: Rate at which attention weights are dropped. The value that a position without a key takes is kept.
        dropout_seed: Seed of the generator that draws what is dropped.

    Returns:
        `[B, L, H, E]` in the dtype of the values. Rows without a key are their own value, or zero where a position
        that is not padding would see itself.
    """
    return _ChunkAttention.apply(query_BLHD, key_BLHD, value_BLHE, pattern, order, padding_BL, dropout, dropout_seed)


def chunk_attention_weights(
    query_BLHD: Tensor,
    key_BLHD: Tensor,
    pattern: AttentionPattern,
    order: Tensor | None = None,
    padding_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """
    The weights that `chunk_attention` gives to keys, before dropout, and the positions of those keys.

    Returns:
        `weights` and `positions` (int32), both `[B, H, R, L, W]`, where W is the window's length. Positions are -1
        where a query does not see what is there. The weights of a query sum to 1 over R and W.
    """
    with torch.no_grad(), torch.autocast(query_BLHD.device.type, enabled=False):
        layout = Layout(pattern, order, padding_BL, query_BLHD)
        _, lse = _forward(query_BLHD, key_BLHD, key_BLHD, layout, None)
        query, key = _rows(query_BLHD), _rows(key_BLHD)
        size = (layout.num_rounds, layout.num_rows + 1, pattern.window_length)
        weights = lse.new_zeros(size)
        positions = torch.full(size, -1, dtype=torch.int32, device=lse.device)
        offsets = torch.arange(pattern.chunk_length, device=lse.device)
        itself = (..., offsets, offsets + pattern.chunk_length * pattern.chunks_before)
        for slab in layout:
            visible = slab.mask == 0
            slab_lse = lse[slab.target_rows]
            slab_weights = torch.exp(
                scores_of(slab.queries_of(query), slab.windows_of(key), slab.mask) - slab_lse[..., None]
            )
            slab_positions = torch.where(visible, layout.key_positions(slab), -1)
            if slab.round == 0 and not pattern.sees_itself:
                alone = slab_lse == math.inf
                slab_weights[itself] = torch.where(alone, 1.0, slab_weights[itself])
                slab_positions[itself] = torch.where(alone, layout.query_positions(slab), slab_positions[itself])
            rows = slab.target_rows.flatten()
            weights[slab.round].index_copy_(0, rows, slab_weights.flatten(0, 2))
            positions[slab.round].index_copy_(0, rows, slab_positions.flatten(0, 2))
    batch_size, length, num_heads, _ = query_BLHD.shape
    shape = (layout.num_rounds, batch_size, length, num_heads, -1)
    weights, positions = (x[:, :-1].reshape(shape).permute(1, 3, 0, 2, 4) for x in (weights, positions))
    return weights, positions


class _ChunkAttention(torch.autograd.Function):
    """Keeps inputs, the order, the merged output and the merged logsumexp; nothing of the size of the scores."""

    @staticmethod
    def forward(ctx, query, key, value, pattern, order, padding, dropout, dropout_seed):
        with torch.autocast(query.device.type, enabled=False):
            layout = Layout(pattern, order, padding, query)
            out, lse = _forward(query, key, value, layout, Dropout.of(dropout, dropout_seed, query.device))
        ctx.save_for_backward(query, key, value, out, lse, order, padding)
        ctx.pattern, ctx.dropout, ctx.dropout_seed = pattern, dropout, dropout_seed
        return out

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, out, lse, order, padding = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            layout = Layout(ctx.pattern, order, padding, query)
            drop = Dropout.of(ctx.dropout, ctx.dropout_seed, query.device)
            grads = _backward(query, key, value, out, lse, grad_out, layout, drop)
        return *grads, None, None, None, None, None


def _forward(query, key, value, layout: Layout, drop: Dropout | None) -> tuple[Tensor, Tensor]:
    """Output `[B, L, H, E]`, and logsumexp of all rows and one more, infinite where a row has no key."""
    query, key, value_rows = _rows(query), _rows(key), _rows(value)
    # One row more than there are takes what is computed for empty slots.
    out = torch.empty((layout.num_rows + 1, value_rows.shape[1]), dtype=layout.mask_dtype, device=value.device)
    lse = torch.full((layout.num_rows + 1,), NO_KEY, dtype=layout.mask_dtype, device=value.device)
    for slab in layout:
        part, part_lse = attend(
            slab.queries_of(query), slab.windows_of(key), slab.windows_of(value_rows), slab.mask, drop
        )
        rows = slab.target_rows.flatten()
        part, part_lse = part.flatten(0, 2).to(out.dtype), part_lse.flatten()
        # Merged with what earlier rounds found, in place of which the first one has the value of the query itself.
        if slab.round > 0:
            found = out.index_select(0, rows)
        elif not layout.pattern.sees_itself:
            found = slab.queries_of(value_rows).flatten(0, 2).to(out.dtype)
        else:
            found = part
        merged, merged_lse = merge(found, lse.index_select(0, rows), part, part_lse)
        out.index_copy_(0, rows, merged)
        lse.index_copy_(0, rows, merged_lse)
    lse.masked_fill_(lse <= NO_KEY, math.inf)
    lse[-1] = math.inf
    return out[:-1].to(value.dtype).view(value.shape), lse


def _backward(query, key, value, out, lse, grad_out, layout: Layout, drop: Dropout | None) -> list[Tensor]:
    """Gradients of queries, keys and values."""
    inputs = [_rows(x) for x in (query, key, value)]
    out, grad_out = _rows(out), _rows(grad_out)
    grads = [torch.zeros(x.shape, dtype=layout.mask_dtype, device=x.device) for x in inputs]
    if not layout.pattern.sees_itself:
        alone = (lse[:-1] == math.inf).nonzero()[:, 0]
        grads[2].index_copy_(0, alone, grad_out.index_select(0, alone).to(layout.mask_dtype))
    for slab in layout:
        grad_query, grad_key, grad_value = attend_backward(
            slab.queries_of(grad_out),
            slab.queries_of(inputs[0]),
            slab.windows_of(inputs[1]),
            slab.windows_of(inputs[2]),
            slab.mask,
            slab.queries_of(out),
            lse[slab.target_rows],
            drop,
        )
        slab.add_queries(grads[0], grad_query)
        slab.add_windows(grads[1], grad_key)
        slab.add_windows(grads[2], grad_value)
    return [grad.to(x.dtype).view(x.shape) for grad, x in zip(grads, (query, key, value), strict=True)]


def _rows(x_BLHD: Tensor) -> Tensor:
    return x_BLHD.reshape(-1, x_BLHD.shape[-1])
