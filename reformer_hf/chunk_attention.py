# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Attention within chunks of a sorted order, the operation that local and LSH attention share.

`attention_tiles` splits the computation into tiles with their masks, and `attention_kernels` computes one tile. This
file merges the outputs of the rounds one by one, and sums the gradients.

Shapes: B batch, L length, H heads, D size of queries and keys, E size of values, R rounds. A *row* is a (batch,
position, head).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_kernels import NO_KEY, attend, attend_backward, key_scale, merge, merge_all, scores_of
from .attention_pattern import AttentionPattern
from .attention_tiles import Tile, Tiling
from .dropout import DropoutFactors
from .gradient_checks import refuse_second_derivatives


def chunk_attention(
    query_BLHD: Tensor,
    key_BLHD: Tensor | None,
    value_BLHE: Tensor,
    pattern: AttentionPattern,
    order: Tensor | None = None,
    padding_BL: Tensor | None = None,
    dropout: float = 0.0,
    dropout_seed: int = 0,
    document_order: Tensor | None = None,
) -> Tensor:
    """
    Attend within chunks, with one softmax over the keys of all rounds.

    Scores are plain dot products: the caller applies any scale to the queries or the keys.

    Args:
        query_BLHD, key_BLHD, value_BLHE: All of the same floating dtype. If the keys are `None`, they are those of
            shared query-key attention, `normalized_keys(query_BLHD)`, computed tile by tile.
        pattern: Which keys a query sees.
        order: The order of each round as `hashing.sort_by_bucket` returns it, `[B or 1, H or 1, R, L]`. `None` means
            one round in the order of positions.
        padding_BL: True for padding, which no query sees. Outputs of padding are undefined.
        dropout: Dropout rate of attention weights. Dropout does not apply to the value of a query without keys.
        dropout_seed: Seed of the dropout.
        document_order: The order of packed documents, see `attention_tiles.Tiling`.

    Returns:
        `[B, L, H, E]` in the dtype of the values. The output of a query without keys is its own value, or zero if
        `pattern.include_self` is True.
    """
    options = (dropout, dropout_seed, document_order)
    return _ChunkAttention.apply(query_BLHD, key_BLHD, value_BLHE, pattern, order, padding_BL, *options)


def chunk_attention_weights(
    query_BLHD: Tensor,
    key_BLHD: Tensor | None,
    pattern: AttentionPattern,
    order: Tensor | None = None,
    padding_BL: Tensor | None = None,
    document_order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Compute the attention weights of `chunk_attention` before dropout, and the positions of the keys.

    Args:
        query_BLHD, key_BLHD, pattern, order, padding_BL, document_order: As in `chunk_attention`.

    Returns:
        `weights` and `positions` (int32), both `[B, H, R, L, W]`, where W is the length of the window. The position is
        -1 for masked keys. The weights of a query sum to 1 over R and W.
    """
    with torch.no_grad(), torch.autocast(query_BLHD.device.type, enabled=False):
        tiling = Tiling(pattern, order, padding_BL, query_BLHD, document_order, batch_rounds=False)
        pattern = tiling.pattern
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
    """Save the inputs, the order, the merged output and the merged logsumexp, but no tensor of the scores' size."""

    @staticmethod
    def forward(ctx, query, key, value, pattern, order, padding, dropout, dropout_seed, document_order):
        with torch.autocast(query.device.type, enabled=False):
            tiling = Tiling(pattern.for_device(query.device), order, padding, query, document_order)
            drop = DropoutFactors.of(dropout, dropout_seed, query.device)
            out, lse = _forward(_Rows.of(query, key, value), tiling, drop)
        out = out.view(value.shape)
        ctx.save_for_backward(query, key, value, out, lse, order, padding, document_order)
        ctx.pattern, ctx.dropout, ctx.dropout_seed = pattern, dropout, dropout_seed
        return out

    @staticmethod
    def backward(ctx, grad_out):
        refuse_second_derivatives()
        query, key, value, out, lse, order, padding, document_order = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            tiling = Tiling(ctx.pattern.for_device(query.device), order, padding, query, document_order)
            drop = DropoutFactors.of(ctx.dropout, ctx.dropout_seed, query.device)
            grads = _backward(_Rows.of(query, key, value), _rows(out), lse, _rows(grad_out), tiling, drop)
        grads = [
            None if grad is None else grad.to(x.dtype).view(x.shape)
            for grad, x in zip(grads, (query, key, value), strict=True)
        ]
        return *grads, None, None, None, None, None, None


@dataclass
class _Rows:
    """Inputs by row `[B * L * H, …]`; in shared query-key attention, factors that turn queries into keys."""

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
    """Queries, keys and values of one tile."""

    query: Tensor  # [g, n, C, D]
    key: Tensor  # [g, n, W, D]
    value: Tensor  # [g, n, W, E]
    # In shared query-key attention: the keys `[g, S, D]` and their factors `[g, S, 1]`.
    slot_keys: Tensor | None = None
    slot_scales: Tensor | None = None

    def add_grads(self, tile: Tile, grads: list[Tensor | None], query: Tensor, key: Tensor, value: Tensor) -> None:
        """Add the gradients of this tile's inputs to the gradients of the rows."""
        tile.add_slots(grads[2], tile.fold(value))
        if self.slot_keys is None:
            tile.add_queries(grads[0], query)
            tile.add_slots(grads[1], tile.fold(key))
            return
        # A key k = s q has a fixed norm, so that dq = s (dk - k (k · dk)). This includes the epsilon.
        keys, grad = self.slot_keys.to(grads[0].dtype), tile.fold(key).to(grads[0].dtype)
        grad.addcmul_(keys, torch.linalg.vecdot(keys, grad)[..., None], value=-1.0).mul_(self.slot_scales)
        tile.own(grad).add_(query)
        tile.add_slots(grads[0], grad)


def _forward(inputs: _Rows, tiling: Tiling, drop: DropoutFactors | None) -> tuple[Tensor, Tensor]:
    """
    Compute the output and the logsumexp of all rows.

    Returns:
        Output `[B * L * H, E]` in the dtype of the values, and logsumexp `[B * L * H + 1]`, infinite for rows without
        keys and for the additional row.
    """
    # The additional row at the end receives the results of empty slots.
    num_batched_rounds = tiling.num_batched_rounds
    size = (num_batched_rounds * (tiling.num_rows + 1), inputs.value.shape[1])
    out = torch.empty(size, dtype=tiling.mask_dtype, device=inputs.value.device)
    lse = torch.empty(size[0], dtype=tiling.mask_dtype, device=inputs.value.device)
    for tile in tiling:
        loaded = inputs.load(tile)
        part, part_lse = attend(loaded.query, loaded.key, loaded.value, tile.mask, drop)
        rows = tile.result_rows.flatten()
        part, part_lse = part.flatten(0, 2).to(out.dtype), part_lse.flatten()
        if tile.round > 0:
            part, part_lse = merge(out.index_select(0, rows), lse.index_select(0, rows), part, part_lse)
        out.index_copy_(0, rows, part)
        lse.index_copy_(0, rows, part_lse)
    if num_batched_rounds > 1:
        out, lse = merge_all(out.unflatten(0, (num_batched_rounds, -1)), lse.unflatten(0, (num_batched_rounds, -1)))
    out, without_key = out[:-1].to(inputs.value.dtype), lse <= NO_KEY
    lse.masked_fill_(without_key, math.inf)
    # Assigning to `lse[-1]` would make the host wait for the device.
    lse[-1:].fill_(math.inf)
    if not tiling.has_key_everywhere:
        # Weights of 0 and 1 are exact. To index the rows without keys, the host would have to wait for the device.
        fallback = out.new_zeros(()) if tiling.pattern.include_self else inputs.value
        out.lerp_(fallback, without_key[:-1, None].to(out.dtype))
    return out, lse


def _backward(
    inputs: _Rows, out: Tensor, lse: Tensor, grad_out: Tensor, tiling: Tiling, drop: DropoutFactors | None
) -> list[Tensor | None]:
    """Compute the gradients of queries, keys and values by row."""
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
