# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Who sees whom in chunk attention, and the pieces in which it is computed.

Positions are laid out, round by round, in *slots*: the order given, padded to a multiple of the chunk length, with
the chunks that the first and last ones look at added on both sides. A query sees keys of the *window* of its chunk,
`chunks_before + 1 + chunks_after` chunks, as far as the pattern lets it. Work goes in *tiles*, some heads times some
chunks, so that nothing of the size of all scores exists.

Shapes: g heads of any batch row, n chunks, C chunk length, W window length, S = (n + chunks before and after) * C
slots. A *row* is a (batch, position, head); rows of a tensor `[B, L, H, D]` are `[B * L * H, D]`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .attention_kernels import MASKED
from .attention_pattern import AttentionPattern
from .hashing import invert_order, unpack_order

# Scores that exist at a time: few enough for the cache of a CPU, many enough to fill a GPU.
TILE_SCORES = {"cpu": 3 << 16, "cuda": 1 << 26}

# What stands between visible and hidden is a *clearance*, a small number of slots or positions, positive where a key
# is visible. Scaled by this power of two, which keeps it exact, and cut off at zero it is the mask.
_SCALE = -MASKED

# Halves and quarters of a slot must be exact in fp32.
_MAX_LENGTH = 1 << 22


@dataclass
class Tile:
    """Some heads times some chunks of one round."""

    pattern: AttentionPattern
    round: int
    # [g, n, C]: rows of the queries; the row to write to is the one after the last where a slot is empty.
    query_rows: Tensor
    target_rows: Tensor
    # [g, S]: rows of the keys.
    key_rows: Tensor
    # [g, n, C, W], to be added to scores: 0 where a query sees a key, hugely negative where it does not.
    mask: Tensor

    def slots_of(self, rows: Tensor) -> Tensor:
        """`[g, S, …]` of rows `[B * L * H, …]`; anything in empty slots."""
        return _select(rows, self.key_rows)

    def queries_of(self, rows: Tensor) -> Tensor:
        """`[g, n, C, …]` of rows `[B * L * H, …]`; anything in empty slots."""
        return _select(rows, self.query_rows)

    def targets_of(self, rows: Tensor) -> Tensor:
        """`[g, n, C, …]` of what was written to the target rows, `[B * L * H + 1, …]`."""
        return _select(rows, self.target_rows)

    def own(self, slots: Tensor) -> Tensor:
        """The slots `[g, n, C, D]` of the tile's own chunks, of `[g, S, D]`; shares memory with it."""
        num_chunks, chunk_length = self.query_rows.shape[1:]
        start = chunk_length * self.pattern.chunks_before
        own = slots[:, start : start + num_chunks * chunk_length]
        return own.view(own.shape[0], num_chunks, chunk_length, -1)

    def windows(self, slots: Tensor) -> Tensor:
        """The windows `[g, n, W, D]` of `[g, S, D]`; shares memory with it, as neighbours do with each other."""
        return slots.unfold(1, self.pattern.window_length, self.pattern.chunk_length).transpose(-1, -2)

    def fold(self, windows: Tensor) -> Tensor:
        """Sums `[g, S, D]` of what stands for the same slot in `[g, n, W, D]`: the transpose of `windows`."""
        (heads, num_chunks, _, size), chunk_length = windows.shape, self.pattern.chunk_length
        slots = windows.new_empty(heads, self.key_rows.shape[1] // chunk_length, chunk_length, size)
        slots[:, num_chunks:] = 0
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


@dataclass
class _MaskMargin:
    """
    How far a key is from being hidden from a query, one bound of several: `keys - queries`, or, with a margin, `margin
    - |keys - queries|`, negated where what lies within the margin is hidden. All in units of `_SCALE`.
    """

    queries: Tensor  # [g, n, C, 1]
    keys: Tensor  # [g, n, 1, W]
    margin: Tensor | None = None  # [g, n, C, 1]
    hides_within: bool = False

    def write(self, chunks: slice, out: Tensor) -> None:
        """Fill `out` `[g, n, C, W]` for some of the chunks."""
        torch.sub(self.keys[:, chunks], self.queries[:, chunks], out=out)
        if self.margin is not None and self.hides_within:
            out.abs_().sub_(self.margin[:, chunks])
        elif self.margin is not None:
            torch.sub(self.margin[:, chunks], out.abs_(), out=out)


@dataclass
class _SeenBefore:
    """By position, `[g, L]`: slots in an earlier round, and the first and last ones that were visible from there."""

    slots: Tensor
    first: Tensor
    last: Tensor


class Tiling:
    """
    Iterates over the tiles of an input, heads outermost, then rounds, then chunks.

    Args:
        pattern: Which keys a query sees.
        order: The order of each round `[B or 1, H or 1, R, L]`, where a bucket begins the complement of the position;
            padding last, in a bucket of its own. `None` stands for one round and one bucket in the order of positions.
        padding_BL: True where there is padding, which no query sees.
        query_BLHD: For its shape, dtype and device.

    The masks of all tiles share memory: use one before the next comes.

    Raises:
        ValueError: For more positions than masks are exact for.
    """

    def __init__(self, pattern: AttentionPattern, order: Tensor | None, padding_BL: Tensor | None, query_BLHD: Tensor):
        self.pattern = pattern
        self.batch_size, self.length, self.num_heads, _ = query_BLHD.shape
        self.device = query_BLHD.device
        self.mask_dtype = torch.promote_types(query_BLHD.dtype, torch.float32)
        if self.length > _MAX_LENGTH:
            raise ValueError(f"The input is {self.length} tokens long, but attention takes at most {_MAX_LENGTH}.")
        # Whether all that a query sees lies between two slots.
        self._sees_interval = not pattern.wraps and (
            pattern.window
            or (pattern.same_bucket and (order is not None or padding_BL is None))
            or (padding_BL is None and (order is None or not pattern.causal))
        )
        if order is None:
            order = torch.arange(self.length, dtype=torch.int32, device=self.device)[None, None, None]
            order = torch.where(order == 0, ~order, order)
        self.num_rounds = order.shape[2]
        self.num_rows = self.batch_size * self.length * self.num_heads
        self._order = order.expand(self.batch_size, self.num_heads, -1, -1)
        self._padding_BL = padding_BL
        self.num_chunks = math.ceil(pattern.padded_length(self.length) / pattern.chunk_length)
        scores_per_chunk = pattern.chunk_length * pattern.window_length
        tile_scores = TILE_SCORES.get(self.device.type, TILE_SCORES["cuda"])
        num_tiles = max(round(scores_per_chunk * self.num_chunks / tile_scores), 1)
        self._chunks_per_tile = math.ceil(self.num_chunks / num_tiles)
        self._heads_per_tile = max(tile_scores // (scores_per_chunk * self.num_chunks), 1)
        self._static_mask = self._make_static_mask()
        self._buffers: dict[tuple, Tensor] = {}

    def __iter__(self) -> Iterator[Tile]:
        groups = torch.arange(self.batch_size * self.num_heads, device=self.device).split(self._heads_per_tile)
        for group in groups:
            yield from self._tiles_of_heads(group)

    def query_positions(self, tile: Tile) -> Tensor:
        """`[g, n, C]` (int32); anything in empty slots."""
        return self._positions(tile.query_rows)

    def key_positions(self, tile: Tile) -> Tensor:
        """`[g, n, 1, W]` (int32); anything in empty slots."""
        return self._windows(self._positions(tile.key_rows))

    def _positions(self, rows: Tensor) -> Tensor:
        return (rows.div(self.num_heads, rounding_mode="floor") % self.length).int()

    def _tiles_of_heads(self, group: Tensor) -> Iterator[Tile]:
        pattern = self.pattern
        batch_rows, heads = group.div(self.num_heads, rounding_mode="floor"), group % self.num_heads
        positions, starts = unpack_order(self._order[batch_rows, heads])
        first_rows = (batch_rows * self.length * self.num_heads + heads)[:, None]
        hidden = None
        if self._padding_BL is not None and not self._sees_interval:
            hidden = self._padding_BL[batch_rows][:, None].expand(positions.shape).gather(-1, positions.long())
        seen = None
        if self._sees_interval or (pattern.deduplicate_keys and self.num_rounds > 1):
            seen = pattern.seen_slots(starts)
        before: list[_SeenBefore] = []
        for round in range(self.num_rounds):
            if self._sees_interval:
                bounds = [self._within_interval(*(slots[:, round] for slots in seen))]
            else:
                bounds = self._positional_bounds(positions, hidden, round)
            bounds += [self._not_seen_before(slots, positions[:, round]) for slots in before]
            key_rows = first_rows + self.num_heads * self._slots(positions, round, 0).long()
            yield from self._tiles_of_round(round, key_rows, bounds)
            if pattern.deduplicate_keys and round + 1 < self.num_rounds:
                before.append(self._seen_in(positions[:, round], *(slots[:, round] for slots in seen)))

    def _tiles_of_round(self, round: int, key_rows: Tensor, bounds: list[_MaskMargin]) -> Iterator[Tile]:
        pattern = self.pattern
        margin = pattern.chunks_before + pattern.chunks_after
        query_rows = self._own_slots(key_rows)
        target_rows = query_rows
        if query_rows.shape[1] > self.length:
            target_rows = query_rows.clone()
            target_rows[:, self.length :] = self.num_rows
        query_rows, target_rows = (rows.unflatten(1, (-1, pattern.chunk_length)) for rows in (query_rows, target_rows))
        for first in range(0, self.num_chunks, self._chunks_per_tile):
            last = min(first + self._chunks_per_tile, self.num_chunks)
            yield Tile(
                pattern=pattern,
                round=round,
                query_rows=query_rows[:, first:last],
                target_rows=target_rows[:, first:last],
                key_rows=key_rows[:, first * pattern.chunk_length : (last + margin) * pattern.chunk_length],
                mask=self._mask(bounds, slice(first, last), key_rows.shape[0]),
            )

    def _mask(self, bounds: list[_MaskMargin], chunks: slice, num_heads: int) -> Tensor:
        shape = (num_heads, chunks.stop - chunks.start, self.pattern.chunk_length, self.pattern.window_length)
        mask = self._buffer("mask", shape)
        bounds[0].write(chunks, mask)
        for bound in bounds[1:]:
            other = self._buffer("other", shape)
            bound.write(chunks, other)
            torch.minimum(mask, other, out=mask)
        return torch.minimum(mask, self._static_mask, out=mask)

    def _buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if (name, shape) not in self._buffers:
            self._buffers[name, shape] = torch.empty(shape, dtype=self.mask_dtype, device=self.device)
        return self._buffers[name, shape]

    def _make_static_mask(self) -> Tensor:
        """What the places of queries and keys in their chunks hide, `[C, W]` or a zero."""
        pattern = self.pattern
        own = (
            torch.arange(pattern.chunk_length, device=self.device)[:, None]
            + pattern.chunk_length * pattern.chunks_before
        )
        places = torch.arange(pattern.window_length, device=self.device)
        hidden = torch.zeros((1, 1), dtype=torch.bool, device=self.device)
        if self._sees_interval and pattern.causal:
            hidden = places > own if pattern.include_self else places >= own
        elif not pattern.wraps and not pattern.include_self:
            hidden = places == own
        return -_SCALE * hidden.to(self.mask_dtype)

    def _within_interval(self, first: Tensor, last: Tensor) -> _MaskMargin:
        """Keys between two slots, `[g, L]` by slot of the query."""
        pattern = self.pattern
        places = self._scaled(torch.arange(pattern.window_length, device=self.device)).expand(
            1, self.num_chunks, 1, -1
        )
        slots = torch.arange(self.length, dtype=torch.int32, device=self.device)
        window_starts = slots - slots % pattern.chunk_length - pattern.chunk_length * pattern.chunks_before
        first = first - window_starts
        if pattern.causal:
            # The static mask ends the interval.
            return _MaskMargin(self._queries(self._scaled(first) - 0.5 * _SCALE), places)
        last = last - window_starts
        return _MaskMargin(
            self._queries(self._scaled(first + last) / 2),
            places,
            self._queries(self._scaled(last - first) / 2 + 0.25 * _SCALE),
        )

    def _positional_bounds(self, positions: Tensor, hidden: Tensor | None, round: int) -> list[_MaskMargin]:
        """Real keys, no later ones if causal, and in a ring, where a position may come twice, not the query itself."""
        pattern = self.pattern
        nowhere = float(2 * _MAX_LENGTH) * _SCALE
        slots = self._scaled(positions)
        keys = slots if hidden is None else slots.masked_fill(hidden, nowhere)
        queries = self._queries(slots[:, round])
        keys = self._windows(self._slots(keys, round, nowhere))
        if pattern.causal:
            return [_MaskMargin(-queries + (-0.5 if pattern.include_self else 0.5) * _SCALE, -keys)]
        bounds = [_MaskMargin(torch.full_like(queries, -_MAX_LENGTH * _SCALE), -keys)]
        if pattern.wraps and not pattern.include_self:
            bounds.append(_MaskMargin(queries, keys, torch.full_like(queries, 0.5 * _SCALE), hides_within=True))
        return bounds

    def _seen_in(self, positions: Tensor, first: Tensor, last: Tensor) -> _SeenBefore:
        slots = invert_order(positions)
        index = slots.long()
        return _SeenBefore(slots, first.gather(-1, index), last.gather(-1, index))

    def _not_seen_before(self, seen: _SeenBefore, positions: Tensor) -> _MaskMargin:
        """Keys that were not between the slots that the query saw in an earlier round."""
        slots, first, last = (x.gather(-1, positions.long()) for x in (seen.slots, seen.first, seen.last))
        return _MaskMargin(
            self._queries(self._scaled(first + last) / 2),
            self._windows(self._slots(self._scaled(slots)[:, None], 0, 0.0)),
            self._queries(self._scaled(last - first) / 2 + 0.25 * _SCALE),
            hides_within=True,
        )

    def _scaled(self, numbers: Tensor) -> Tensor:
        return numbers.to(self.mask_dtype) * _SCALE

    def _slots(self, sorted_gRL: Tensor, round: int, empty: float) -> Tensor:
        """`[g, S]` of one round: its chunks and those that they look at beyond the ends, `empty` in empty slots."""
        pattern = self.pattern
        chunk_length, before, after = pattern.chunk_length, pattern.chunks_before, pattern.chunks_after
        filled = self.num_chunks * chunk_length - self.length
        if not pattern.wraps:
            margins = (before * chunk_length, after * chunk_length + filled)
            return pad(sorted_gRL[:, round], margins, value=empty)
        ring = pad(sorted_gRL, (0, filled), value=empty).view(sorted_gRL.shape[0], -1, chunk_length)
        first = round * self.num_chunks
        chunks = torch.arange(first - before, first + self.num_chunks + after, device=self.device)
        return ring.index_select(1, chunks % ring.shape[1]).flatten(1)

    def _own_slots(self, slots: Tensor) -> Tensor:
        """`[g, n * C]` of `[g, S]`."""
        start = self.pattern.chunk_length * self.pattern.chunks_before
        return slots[:, start : start + self.num_chunks * self.pattern.chunk_length]

    def _queries(self, sorted_gL: Tensor) -> Tensor:
        """`[g, n, C, 1]` of `[g, L]`, zero in empty slots."""
        chunk_length = self.pattern.chunk_length
        return pad(sorted_gL, (0, self.num_chunks * chunk_length - self.length)).unflatten(1, (-1, chunk_length))[
            ..., None
        ]

    def _windows(self, slots: Tensor) -> Tensor:
        """`[g, n, 1, W]` of `[g, S]`."""
        return slots.unfold(1, self.pattern.window_length, self.pattern.chunk_length)[:, :, None]
