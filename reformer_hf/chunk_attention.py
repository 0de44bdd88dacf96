# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Attention within chunks of a sorted order: the one operation under local and LSH attention.

`attention_tiles` says who sees whom and cuts the work into tiles, `attention_kernels` computes one. Here rounds are
merged as they come, and gradients are summed.

Shapes: B batch, L length, H heads, D size of queries and keys, E size of values, R rounds. A *row* is a (batch,
position, head).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_kernels import NO_KEY, attend, attend_backward, key_scale, merge, scores_of
from .attention_pattern import AttentionPattern
from .attention_tiles import Tile, Tiling
from .rng import Dropout


def chunk_attention(
    query_BLHD: Tensor,
    key_BLHD: Tensor | None,
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
        query_BLHD, key_BLHD, value_BLHE: All of one floating dtype. No keys stand for those of shared query-key
            attention, `normalized_keys(query_BLHD)`, which never exist as a whole.
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
    key_BLHD: Tensor | None,
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
        tiling = Tiling(pattern, order, padding_BL, query_BLHD)
        rows = _Rows.of(query_BLHD, key_BLHD, query_BLHD)
        _, lse = _forward(rows, tiling, None)
        size = (tiling.num_rounds, tiling.num_rows + 1, pattern.window_length)
        weights = lse.new_zeros(size)
        positions = torch.full(size, -1, dtype=torch.int32, device=lse.device)
        offsets = torch.arange(pattern.chunk_length, device=lse.device)
        itself = (..., offsets, offsets + pattern.chunk_length * pattern.chunks_before)
        for tile in tiling:
            loaded = rows.load(tile)
            visible = tile.mask == 0
            tile_lse = tile.targets_of(lse)
            tile_weights = torch.exp(scores_of(loaded.query, loaded.key, tile.mask) - tile_lse[..., None])
            tile_positions = torch.where(visible, tiling.key_positions(tile), -1)
            if tile.round == 0 and not pattern.include_self:
                without_key = tile_lse == math.inf
                tile_weights[itself] = torch.where(without_key, 1.0, tile_weights[itself])
                tile_positions[itself] = torch.where(without_key, tiling.query_positions(tile), tile_positions[itself])
            target_rows = tile.target_rows.flatten()
            weights[tile.round].index_copy_(0, target_rows, tile_weights.flatten(0, 2))
            positions[tile.round].index_copy_(0, target_rows, tile_positions.flatten(0, 2))
    batch_size, length, num_heads, _ = query_BLHD.shape
    shape = (tiling.num_rounds, batch_size, length, num_heads, -1)
    weights, positions = (x[:, :-1].reshape(shape).permute(1, 3, 0, 2, 4) for x in (weights, positions))
    return weights, positions


class _ChunkAttention(torch.autograd.Function):
    """Keeps inputs, the order, the merged output and the merged logsumexp; nothing of the size of the scores."""

    @staticmethod
    def forward(ctx, query, key, value, pattern, order, padding, dropout, dropout_seed):
        with torch.autocast(query.device.type, enabled=False):
            tiling = Tiling(pattern.for_device(query.device), order, padding, query)
            drop = Dropout.of(dropout, dropout_seed, query.device)
            out, lse = _forward(_Rows.of(query, key, value), tiling, drop)
        out = out.view(value.shape)
        ctx.save_for_backward(query, key, value, out, lse, order, padding)
        ctx.pattern, ctx.dropout, ctx.dropout_seed = pattern, dropout, dropout_seed
        return out

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, out, lse, order, padding = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            tiling = Tiling(ctx.pattern.for_device(query.device), order, padding, query)
            drop = Dropout.of(ctx.dropout, ctx.dropout_seed, query.device)
            grads = _backward(_Rows.of(query, key, value), _rows(out), lse, _rows(grad_out), tiling, drop)
        grads = [
            None if grad is None else grad.to(x.dtype).view(x.shape)
            for grad, x in zip(grads, (query, key, value), strict=True)
        ]
        return *grads, None, None, None, None, None


@dataclass
class _Rows:
    """Inputs by row `[B * L * H, …]`, and where queries serve as keys the factor that makes a key of each."""

    query: Tensor
    key: Tensor | None
    value: Tensor
    key_scale: Tensor | None

    @classmethod
    def of(cls, query: Tensor, key: Tensor | None, value: Tensor) -> "_Rows":
        query = _rows(query)
        return cls(query, None if key is None else _rows(key), _rows(value), key_scale(query) if key is None else None)

    def load(self, tile: Tile) -> "_TileInputs":
        value = tile.windows(tile.slots_of(self.value))
        if self.key is not None:
            return _TileInputs(tile.queries_of(self.query), tile.windows(tile.slots_of(self.key)), value)
        query, scale = tile.slots_of(self.query), tile.slots_of(self.key_scale)[..., None]
        key = (query * scale).to(query.dtype)
        return _TileInputs(tile.own(query), tile.windows(key), value, key, scale)


@dataclass
class _TileInputs:
    """What one tile attends with."""

    query: Tensor  # [g, n, C, D]
    key: Tensor  # [g, n, W, D]
    value: Tensor  # [g, n, W, E]
    # Where queries serve as keys: the keys `[g, S, D]` and their factors `[g, S, 1]`.
    slot_keys: Tensor | None = None
    slot_scales: Tensor | None = None

    def add_grads(self, tile: Tile, grads: list[Tensor | None], query: Tensor, key: Tensor, value: Tensor) -> None:
        """Add the gradients of this tile's inputs to those of the rows."""
        tile.add_slots(grads[2], tile.fold(value))
        if self.slot_keys is None:
            tile.add_queries(grads[0], query)
            tile.add_slots(grads[1], tile.fold(key))
            return
        # A key k = s q has a fixed length, so that dq = s (dk - k (k · dk)); the epsilon included.
        keys, grad = self.slot_keys.to(grads[0].dtype), tile.fold(key).to(grads[0].dtype)
        grad.addcmul_(keys, torch.linalg.vecdot(keys, grad)[..., None], value=-1.0).mul_(self.slot_scales)
        tile.own(grad).add_(query)
        tile.add_slots(grads[0], grad)


def _forward(inputs: _Rows, tiling: Tiling, drop: Dropout | None) -> tuple[Tensor, Tensor]:
    """
    Output `[B * L * H, E]` in the dtype of the values, and logsumexp of all rows and one more, infinite where a row
    has no key.
    """
    # One row more than there are takes what is computed for empty slots.
    size = (tiling.num_rows + 1, inputs.value.shape[1])
    out = torch.empty(size, dtype=tiling.mask_dtype, device=inputs.value.device)
    lse = torch.empty(size[0], dtype=tiling.mask_dtype, device=inputs.value.device)
    for tile in tiling:
        loaded = inputs.load(tile)
        part, part_lse = attend(loaded.query, loaded.key, loaded.value, tile.mask, drop)
        rows = tile.target_rows.flatten()
        part, part_lse = part.flatten(0, 2).to(out.dtype), part_lse.flatten()
        if tile.round > 0:
            part, part_lse = merge(out.index_select(0, rows), lse.index_select(0, rows), part, part_lse)
        out.index_copy_(0, rows, part)
        lse.index_copy_(0, rows, part_lse)
    out, without_key = out[:-1].to(inputs.value.dtype), lse <= NO_KEY
    lse.masked_fill_(without_key, math.inf)
    lse[-1] = math.inf
    if not tiling.has_key_everywhere:
        # By weights of 0 and 1, which are exact: to list these rows, the host would have to wait for the device.
        instead = out.new_zeros(()) if tiling.pattern.include_self else inputs.value
        out.lerp_(instead, without_key[:-1, None].to(out.dtype))
    return out, lse


def _backward(
    inputs: _Rows, out: Tensor, lse: Tensor, grad_out: Tensor, tiling: Tiling, drop: Dropout | None
) -> list[Tensor | None]:
    """Gradients of queries, keys and values by row."""
    grads = [
        None if x is None else torch.zeros(x.shape, dtype=tiling.mask_dtype, device=x.device)
        for x in (inputs.query, inputs.key, inputs.value)
    ]
    if not tiling.pattern.include_self:
        torch.mul(grad_out, (lse[:-1] == math.inf)[:, None], out=grads[2])
    for tile in tiling:
        loaded = inputs.load(tile)
        tile_grads = attend_backward(
            tile.queries_of(grad_out),
            loaded.query,
            loaded.key,
            loaded.value,
            tile.mask,
            tile.queries_of(out),
            tile.targets_of(lse),
            drop,
        )
        loaded.add_grads(tile, grads, *tile_grads)
    return grads


def _rows(x_BLHD: Tensor) -> Tensor:
    return x_BLHD.reshape(-1, x_BLHD.shape[-1])
