# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
The *tiles* of chunk attention: some heads times some chunks of one round. Attention is computed tile by tile, so that
no tensor has the size of all scores. Where rounds are batched, each round of a head counts as a head of its own.

Shapes: g heads of any batch row, n chunks, C chunk length, W window length, S slots; see `attention_slots`. A *row* is
a (batch, position, head); rows of a tensor `[B, L, H, D]` are `[B * L * H, D]`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_masks import MAX_LENGTH, MaskBuffers, MaskMargin, MaskMargins, SortedHeads, is_interval
from .attention_pattern import AttentionPattern
from .attention_slots import SlotLayout
from .device_policy import policy_for
from .hashing import unpack_order


@dataclass
class Tile:
    """
    Some heads times some chunks of one round.

    Args:
        pattern: Which keys a query sees.
        round: The hash round; 0 if rounds are batched.
        query_rows: Rows of the queries, `[g, n, C]`.
        target_rows: Rows to write the results to, `[g, n, C]`: the rows of the queries or, for empty slots, the one
            additional row at the end.
        result_rows: Rows to write the results of a round to, `[g, n, C]`: the target rows, counted on from round to
            round if rounds are batched.
        key_rows: Rows of the keys, `[g, S]`.
        mask: Added to the scores, `[g, n, C, W]`: 0 for visible keys, very negative for masked ones.
    """

    pattern: AttentionPattern
    round: int
    query_rows: Tensor
    target_rows: Tensor
    result_rows: Tensor
    key_rows: Tensor
    mask: Tensor

    def slots_of(self, rows: Tensor) -> Tensor:
        """Gather the slots `[g, S, …]` from rows `[B * L * H, …]`; empty slots hold arbitrary values."""
        return _select(rows, self.key_rows)

    def queries_of(self, rows: Tensor) -> Tensor:
        """Gather the queries `[g, n, C, …]` from rows `[B * L * H, …]`; empty slots hold arbitrary values."""
        return _select(rows, self.query_rows)

    def targets_of(self, rows: Tensor) -> Tensor:
        """Gather the target rows `[g, n, C, …]` from `[B * L * H + 1, …]`."""
        return _select(rows, self.target_rows)

    def own(self, slots: Tensor) -> Tensor:
        """Return a view of the tile's own chunks `[g, n, C, D]` in the slots `[g, S, D]`."""
        num_chunks, chunk_length = self.query_rows.shape[1:]
        start = chunk_length * self.pattern.chunks_before
        own = slots[:, start : start + num_chunks * chunk_length]
        return own.view(own.shape[0], num_chunks, chunk_length, -1)

    def windows(self, slots: Tensor) -> Tensor:
        """Return a view of the windows `[g, n, W, D]` in the slots `[g, S, D]`; neighboring windows overlap."""
        return slots.unfold(1, self.pattern.window_length, self.pattern.chunk_length).transpose(-1, -2)

    def fold(self, windows: Tensor) -> Tensor:
        """Sum the elements of windows `[g, n, W, D]` that share a slot, to `[g, S, D]`: the transpose of `windows`."""
        (heads, num_chunks, _, size), chunk_length = windows.shape, self.pattern.chunk_length
        slots = windows.new_empty(heads, self.key_rows.shape[1] // chunk_length, chunk_length, size)
        slots[:, num_chunks:].zero_()
        for offset, part in enumerate(windows.split(chunk_length, dim=2)):
            target = slots[:, offset : offset + num_chunks]
            target.add_(part) if offset else target.copy_(part)
        return slots.flatten(1, 2)

    def add_slots(self, rows: Tensor, slots: Tensor) -> None:
        """Add `[g, S, D]` to rows `[B * L * H, D]`: the transpose of `slots_of`."""
        rows.index_add_(0, self.key_rows.flatten(), slots.flatten(0, 1).to(rows.dtype))

    def add_queries(self, rows: Tensor, queries: Tensor) -> None:
        """Add `[g, n, C, D]` to rows `[B * L * H, D]`: the transpose of `queries_of`."""
        rows.index_add_(0, self.query_rows.flatten(), queries.flatten(0, 2).to(rows.dtype))


def _select(rows: Tensor, index: Tensor) -> Tensor:
    return rows.index_select(0, index.flatten()).view(*index.shape, *rows.shape[1:])


class Tiling:
    """
    Iterate over the tiles of an input: over heads in the outer loop, then rounds, then chunks.

    Independent rounds are batched, up to the size that the policy of the device gives. `num_batched_rounds` is then
    their number, and otherwise 1.

    The masks of all tiles share memory: use one before requesting the next.

    Args:
        pattern: Which keys a query sees.
        order: The order of each round `[B or 1, H or 1, R, L]` as `hashing.sort_by_bucket` returns it, with padding
            last, in its own bucket. `None` means one round with one bucket, in the order of positions.
        padding_BL: True for padding, which no query sees.
        query_BLHD: The queries, which give the shape, dtype and device.
        document_order: The order of packed documents, `[B, 1, 1, L]` as `Documents.sort` returns it. A query only sees
            its own document, and the buckets of `order` are those of single documents. `None` means one document.
        batch_rounds: Whether rounds may be batched.

    Raises:
        ValueError: If the input has more positions than masks can represent exactly.
    """

    def __init__(
        self,
        pattern: AttentionPattern,
        order: Tensor | None,
        padding_BL: Tensor | None,
        query_BLHD: Tensor,
        document_order: Tensor | None = None,
        batch_rounds: bool = True,
    ):
        # The pattern of the tiles. What a query sees in their windows follows from `pattern`.
        self.pattern = pattern if document_order is None else pattern.with_wider_windows()
        self.batch_size, self.length, self.num_heads, _ = query_BLHD.shape
        self.device = query_BLHD.device
        self.mask_dtype = torch.promote_types(query_BLHD.dtype, torch.float32)
        if self.length > MAX_LENGTH:
            raise ValueError(f"The input has {self.length} tokens, but attention supports at most {MAX_LENGTH}.")
        interval = is_interval(pattern, order is not None, padding_BL is not None)
        if order is None:
            order = torch.arange(self.length, dtype=torch.int32, device=self.device)[None, None, None]
            order = torch.where(order == 0, ~order, order)
        self.num_rounds = order.shape[2]
        self.num_rows = self.batch_size * self.length * self.num_heads
        policy = policy_for(self.device)
        independent = batch_rounds and not pattern.wraps and not pattern.deduplicate_keys
        fits = self.num_rows * self.num_rounds <= policy.batched_rounds
        self.num_batched_rounds = self.num_rounds if independent and fits else 1
        order = order.expand(self.batch_size, self.num_heads, -1, -1)
        # Each batched round counts as a head.
        self._order = order.reshape(self.batch_size, self.num_heads * self.num_batched_rounds, -1, self.length)
        self._document_starts = None if document_order is None else unpack_order(document_order[:, 0])[1]
        # An interval of visible slots contains no padding.
        self._padding_BL = None if interval else padding_BL
        self.has_key_everywhere = pattern.include_self and self._padding_BL is None
        self._layout = SlotLayout(self.pattern, self.length)
        self._margins = MaskMargins(self._layout, pattern, interval, self.mask_dtype, self.device)
        self._buffers = MaskBuffers(self._margins.static_mask())
        scores_per_head = self.pattern.chunk_length * self.pattern.window_length * self._layout.num_chunks
        num_tiles = max(round(scores_per_head / policy.tile_scores), 1)
        self._chunks_per_tile = math.ceil(self._layout.num_chunks / num_tiles)
        self._heads_per_tile = max(policy.tile_scores // scores_per_head, 1)

    def __iter__(self) -> Iterator[Tile]:
        num_groups = self.batch_size * self.num_heads * self.num_batched_rounds
        for group in torch.arange(num_groups, device=self.device).split(self._heads_per_tile):
            yield from self._tiles_of_heads(group)

    def query_positions(self, tile: Tile) -> Tensor:
        """Return the positions `[g, n, C]` (int32) of the queries; empty slots hold arbitrary values."""
        return self._positions(tile.query_rows)

    def key_positions(self, tile: Tile) -> Tensor:
        """Return the positions `[g, n, 1, W]` (int32) of the keys; empty slots hold arbitrary values."""
        return self._layout.windows(self._positions(tile.key_rows))

    def _positions(self, rows: Tensor) -> Tensor:
        return (rows.div(self.num_heads, rounding_mode="floor") % self.length).int()

    def _tiles_of_heads(self, group: Tensor) -> Iterator[Tile]:
        num_batched_rounds = self.num_batched_rounds
        heads_per_row = self.num_heads * num_batched_rounds
        batch_rows, heads = group.div(heads_per_row, rounding_mode="floor"), group % heads_per_row
        positions, starts = unpack_order(self._order[batch_rows, heads])
        rounds = None
        if num_batched_rounds > 1:
            heads, rounds = heads.div(num_batched_rounds, rounding_mode="floor"), heads % num_batched_rounds
        padding = None
        if self._padding_BL is not None:
            padding = self._padding_BL[batch_rows][:, None].expand(positions.shape).gather(-1, positions.long())
        first_rows = (batch_rows * self.length * self.num_heads + heads)[:, None]
        document_starts = None if self._document_starts is None else self._document_starts[batch_rows]
        sorted_heads = SortedHeads(positions, starts, padding, document_starts)
        for round, margins in enumerate(self._margins.of_rounds(sorted_heads)):
            key_rows = first_rows + self.num_heads * self._layout.slots(positions, round, 0).long()
            yield from self._tiles_of_round(round, key_rows, margins, rounds)

    def _tiles_of_round(
        self, round: int, key_rows: Tensor, margins: list[MaskMargin], rounds: Tensor | None
    ) -> Iterator[Tile]:
        pattern, num_chunks = self.pattern, self._layout.num_chunks
        around = pattern.chunks_before + pattern.chunks_after
        query_rows = self._layout.own_slots(key_rows)
        target_rows = query_rows
        if self._layout.num_empty:
            target_rows = query_rows.clone()
            target_rows[:, self.length :].fill_(self.num_rows)
        query_rows, target_rows = (rows.unflatten(1, (-1, pattern.chunk_length)) for rows in (query_rows, target_rows))
        result_rows = target_rows if rounds is None else target_rows + (self.num_rows + 1) * rounds[:, None, None]
        for first in range(0, num_chunks, self._chunks_per_tile):
            chunks = slice(first, min(first + self._chunks_per_tile, num_chunks))
            shape = (key_rows.shape[0], chunks.stop - first, pattern.chunk_length, pattern.window_length)
            yield Tile(
                pattern=pattern,
                round=round,
                query_rows=query_rows[:, chunks],
                target_rows=target_rows[:, chunks],
                result_rows=result_rows[:, chunks],
                key_rows=key_rows[:, first * pattern.chunk_length : (chunks.stop + around) * pattern.chunk_length],
                mask=self._buffers.mask(margins, chunks, shape),
            )
