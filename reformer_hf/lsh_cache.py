# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
KV cache of LSH attention: a ring buffer of recent tokens for each round, head and bucket.

The ring buffers hold row numbers in a common buffer of keys and values. Appending a token looks up what it attends to
in the ring buffers of its own buckets, at a cost that does not depend on the number of cached tokens. When the common
buffer is full, the cache drops tokens that are in none of the ring buffers. Its size is therefore bounded.

Shapes: B batch, n new tokens, H heads, D head size, R rounds, N buckets (bucket N holds padding), M length of a ring,
W keys that a token sees in a round. A *row* is a row of the buffer of keys and values. The *index* of a token counts
the tokens of its bucket before it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .attention_kernels import key_epsilon
from .cache import SLACK, AttentionCacheLayer, CacheSpec, FixedShape, Past, Seen, grown, ordinary_tensors, self_bias
from .hashing import both_signs, invert_order, sort_by_bucket, unpack_order

# A parallel pass over cached and new tokens costs about as much as appending this fraction of the cached ones.
_PARALLEL_COST = 1 / 20


class LSHCacheLayer(AttentionCacheLayer):
    """
    Cache layer of the pattern `"window"`: a token sees the last W tokens of its own bucket in each round.

    Token i of a bucket is in cell `i % M` of the bucket's ring; `counts` holds the number of tokens per bucket.
    """

    layer_type = "reformer_hf_lsh"
    # The bucket of each row, `[B, H, rows, R]`; N for padding and unused rows.
    buckets: Tensor | None
    # Cache positions of the rows, `[B, H, rows]`. `None` until tokens are dropped: positions then equal rows.
    row_positions: Tensor | None
    # Number of tokens in each bucket, `[B, H, R, N + 1]`, and the rows of the last ones, `[B, H, R, N + 1, M]`.
    counts: Tensor | None
    rings: Tensor | None
    tensors = (*AttentionCacheLayer.tensors, "buckets", "row_positions", "counts", "rings")

    def reset(self) -> None:
        super().reset()
        # The result of `hashing.projections_of` for all heads, and the factors of N.
        self.projections: list[Tensor] = []
        self.factors: list[int] = []
        # The same with both signs, as `hashing.hash_few` takes them.
        self.signed_projections: list[Tensor] = []
        # Number of dropped tokens.
        self._num_dropped = 0
        self._offsets: tuple[Tensor, Tensor] | None = None

    @property
    def _num_rows(self) -> Any:
        """Number of rows in use."""
        return self.length - self._num_dropped

    @property
    def num_buckets(self) -> int:
        return self.counts.shape[-1] - 1

    @property
    def ring_length(self) -> int:
        return self.rings.shape[-1]

    @property
    def _bucket_starts(self) -> Tensor:
        """First slot of each bucket in the sorted order, `[B, H, R, N + 1]`."""
        return self.counts.cumsum(-1) - self.counts

    def _num_seen(self) -> int:
        """Return W, the number of tokens that a token sees in a round, without its own."""
        return self.spec.pattern.chunk_length * self.spec.pattern.chunks_before

    def _initialize(self, spec: CacheSpec, key: Tensor, value: Tensor) -> None:
        super()._initialize(spec, key, value)
        num_buckets = math.prod(self.factors)
        heads = (key.shape[0], spec.num_heads)
        integers = torch.zeros((), dtype=torch.int32, device=self.device)
        self.buckets = integers.new_full((*heads, self.entries.shape[1], spec.num_hashes), num_buckets)
        self.counts = torch.zeros((*heads, spec.num_hashes, num_buckets + 1), dtype=torch.long, device=self.device)
        self.rings = integers.new_zeros((*self.counts.shape, self._num_seen() + SLACK))
        # Distances from a token back to those that it sees in its bucket: W to 1, and 0 for itself, see `self_bias`.
        self._distances = torch.arange(self._num_seen(), -1, -1, device=self.device)
        self._bias = self.entries.new_zeros(len(self._distances))
        self._bias[-1] = self_bias(self.entries.dtype)
        self.key_epsilon = key_epsilon(key)
        self._masked = self._bias.new_tensor(float("-inf"))
        self._one = torch.ones((), dtype=torch.long, device=self.device)

    def can_append(self, num_new: int) -> bool:
        return self.is_initialized and (num_new <= SLACK or num_new < int(self._num_rows) * _PARALLEL_COST)

    def prefill(
        self,
        spec: CacheSpec,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None = None,
        *,
        projections: list[Tensor] | None = None,
        factors: list[int] | None = None,
        **hashing: Any,
    ) -> None:
        """
        Write the tokens of a parallel pass.

        Args:
            spec, key, value, padding: As in `AttentionCacheLayer.prefill`.
            projections, factors: The rotations and bucket factors of the tokens' hashes. An empty layer stores them.
            buckets: Buckets of the new tokens, `[B, H, R, n]`; N for padding.
            order: Sorted order of cached and new tokens as `sort_by_bucket` returns it, `[B, H, R, T + n]`.
        """
        if not self.is_initialized:
            self.projections, self.factors = list(projections), list(factors)
            self.signed_projections = both_signs(projections, spec.num_hashes)
        super().prefill(spec, key, value, padding, **hashing)

    def _prefill(self, key: Tensor, value: Tensor, padding: Tensor | None, *, buckets: Tensor, order: Tensor) -> None:
        self._write(key, value, buckets.transpose(2, 3))
        num_rows = self._num_rows + key.shape[1]
        # The order includes the rows that `_reserve` has just dropped.
        is_stale = self._num_dropped and order.shape[-1] != num_rows
        self._rebuild(self._sorted_rows(num_rows) if is_stale else unpack_order(order)[0])

    def _append(
        self, key: Tensor, value: Tensor, padding: Tensor | None, with_positions: bool, *, buckets: Tensor
    ) -> Seen:
        """Append new tokens with the buckets `[B, H, n, R]`; N for padding."""
        row = self._num_rows
        self._write(key, value, buckets)
        ring_offsets, row_offsets = self._get_offsets()
        # [B, H, n, R, W + 1]
        seen, bias = self._push_and_look_up((buckets + ring_offsets)[..., None], row)
        if seen.shape[3] > 1:
            # A token sees its own key in one round at most.
            bias[..., 1:, -1] = float("-inf")
            if self.spec.pattern.deduplicate_keys:
                bias = bias.masked_fill(_seen_before(seen, bias < 0), float("-inf"))
        rows = torch.add(row_offsets, seen, alpha=self.spec.num_heads).flatten()
        entries = self.entries.view(-1, self.entries.shape[-1]).index_select(0, rows)
        # Each token of each head is one batch entry of attention.
        size = seen.shape[3] * seen.shape[4]
        seen_key, seen_value = entries.view(-1, 1, size, entries.shape[-1]).chunk(2, dim=-1)
        positions = None
        if with_positions:
            positions = self._cache_positions(seen).reshape(-1, 1, 1, size)
        return Seen(seen_key, seen_value, bias.reshape(-1, 1, 1, size), positions)

    def _write(self, key: Tensor, value: Tensor, buckets: Tensor) -> None:
        """Write new tokens with the buckets `[B, H, n, R]` to the next rows."""
        row = self._num_rows
        self._write_entries(row, key, value)
        self._write_rows(self.buckets, 2, row, buckets)
        if self.row_positions is not None:
            positions = self._new_positions(key.shape[1]).expand(*self.row_positions.shape[:2], -1)
            self._write_rows(self.row_positions, 2, row, positions)

    def _push_and_look_up(self, rings: Tensor, row: Any) -> tuple[Tensor, Tensor]:
        """
        Write new tokens to their rings, and look up what each of them sees there.

        Args:
            rings: Each token's rings, `[B, H, n, R, 1]`, as indices into the rings of all rounds.
            row: The row of the first new token.

        Returns:
            Rows of the keys, with the token's own row last, and the bias of the scores, both `[B, H, n, R, W + 1]`.
        """
        index = self._next_index(rings)
        earlier = index - self._distances
        cells = torch.add(earlier % self.ring_length, rings, alpha=self.ring_length)
        self._put(self.rings, cells[..., -1], row)
        self._count_in_buckets(rings)
        return self.rings.view(-1).take(cells), torch.where(earlier >= 0, self._bias, self._masked)

    def _next_index(self, rings: Tensor) -> Tensor:
        """Return the index of each new token in its bucket, `[B, H, n, R, 1]`."""
        index = self.counts.view(-1).take(rings)
        if rings.shape[2] == 1:
            return index
        # New tokens of one bucket have consecutive indices.
        same = (rings[:, :, :, None] == rings[:, :, None])[..., 0]
        earlier = torch.ones(same.shape[2:4], dtype=torch.bool, device=self.device).tril(-1)
        return index + (same & earlier[..., None]).sum(3)[..., None]

    def _put(self, rings: Tensor, cells: Tensor, row: Any) -> None:
        """Write the rows of new tokens to cells `[B, H, n, R]`."""
        if cells.shape[2] == 1 and not self.is_compileable:
            rings.view(-1).index_fill_(0, cells.flatten(), row)
            return
        rows = torch.arange(cells.shape[2], dtype=torch.int32, device=self.device) + row
        rings.view(-1).index_copy_(0, cells.flatten(), rows.int()[:, None].expand(cells.shape).flatten())

    def _count_in_buckets(self, rings: Tensor) -> None:
        flat = rings.flatten()
        self.counts.view(-1).index_add_(0, flat, self._one.expand(flat.shape))

    def _get_offsets(self) -> tuple[Tensor, Tensor]:
        """Return the offset of each round's first ring, `[B, H, 1, R]`, and of the first row, `[B, H, 1, 1, 1]`."""
        if self._offsets is None:
            batch_size, capacity, num_heads, _ = self.entries.shape
            rounds = torch.arange(self.counts.shape[:3].numel(), device=self.device).view(self.counts.shape[:3])
            batch_rows = torch.arange(batch_size, device=self.device)[:, None] * (capacity * num_heads)
            rows = batch_rows + torch.arange(num_heads, device=self.device)
            self._offsets = rounds[:, :, None] * (self.num_buckets + 1), rows[:, :, None, None, None]
        return self._offsets

    def _cache_positions(self, rows: Tensor) -> Tensor:
        if self.row_positions is None:
            return rows
        return self.row_positions.gather(-1, rows.long().flatten(2)).view(rows.shape)

    def past(self) -> Past:
        num_rows = int(self._num_rows)
        buckets = self.buckets[:, :, :num_rows].transpose(2, 3)
        # Once rows were dropped, heads hold different tokens in a row. Padding has a bucket of its own in any case.
        masked = (buckets[:, :, 0] == self.num_buckets).all(1)
        key, value = self.entries[:, :num_rows].chunk(2, dim=-1)
        if self.row_positions is None:
            positions = torch.arange(num_rows, dtype=torch.int32, device=self.device).expand(len(masked), 1, -1)
        else:
            positions = self.row_positions[:, :, :num_rows]
        return Past(key, value, masked, positions, int(self.length), buckets=buckets)

    def _sorted_rows(self, num_rows: int) -> Tensor:
        """Return the sorted order `[B, H, R, T]` of the first rows."""
        return unpack_order(sort_by_bucket(self.buckets[:, :, :num_rows].transpose(2, 3)))[0]

    def _rebuild(self, order: Tensor) -> None:
        """Recompute counts and rings from the sorted order `[B, H, R, T]` of all rows."""
        buckets = self.buckets[:, :, : order.shape[-1]].transpose(2, 3).long()
        self.counts.zero_().scatter_add_(3, buckets, torch.ones_like(buckets))
        starts = self._bucket_starts
        last = self.counts[..., None] - 1
        cells = torch.arange(self.ring_length, device=self.device)
        # A cell holds the last token whose index modulo M is the cell.
        self.rings.copy_(_rows_at(order, starts[..., None] + last - (last - cells) % self.ring_length))
        # Computed here and not in `append`, which may be compiled.
        self._get_offsets()

    def _reserve(self, num_new: int) -> None:
        """Make new tokens fit: drop tokens that are in no ring if that is worthwhile, else grow."""
        if self._num_rows + num_new <= self.entries.shape[1]:
            return
        limit = self._row_limit()
        if self._num_rows > limit // 2 and self._num_rows + num_new > limit:
            recent = max(self._longest, self.length + num_new) - self._kept_by_crop
            if not self.record_past or recent <= SLACK:
                self._drop()
        needed = self._num_rows + num_new
        if needed > self.entries.shape[1]:
            size = max(needed, min(grown(self.entries.shape[1], needed), limit))
            self._resize("entries", 1, size)
            self._resize("buckets", 2, size, fill=self.num_buckets)
            if self.row_positions is not None:
                self._resize("row_positions", 2, size)

    def _row_limit(self) -> float:
        """Return the maximum number of rows: those that rings can hold, plus a quarter, so that drops are rare."""
        limit = self.counts.shape[2:].numel() * self.ring_length + SLACK
        return limit + max(limit // 4, SLACK)

    def _drop(self) -> None:
        """
        Drop tokens: for each head, keep the rows that are in rings and the most recent rows.

        Heads keep the same number of rows, so that some keep additional ones. Kept rows move to the front, in order.
        """
        num_rows = self._num_rows
        # Cells that were never written or were cropped may hold any row: this only keeps additional rows.
        held = self.rings[..., : self.num_buckets, :].flatten(2).long().clamp(max=num_rows - 1)
        keep = torch.zeros((*held.shape[:2], num_rows), dtype=torch.bool, device=self.device).scatter_(-1, held, True)
        keep[..., -SLACK:] = True
        num_kept = int(keep.sum(-1).max())
        order = torch.sort(keep.int(), dim=-1, stable=True).indices
        new_rows = (invert_order(order) - (num_rows - num_kept)).clamp(min=0)
        kept = order[..., num_rows - num_kept :]
        if self.row_positions is None:
            with ordinary_tensors():
                self.row_positions = self.buckets.new_zeros(self.buckets.shape[:3])
            self.row_positions[..., :num_rows] = torch.arange(num_rows, device=self.device)
        self.row_positions[..., :num_kept] = self.row_positions.gather(-1, kept)
        index = kept.transpose(1, 2)[..., None].expand(-1, -1, -1, self.entries.shape[-1])
        self.entries[:, :num_kept] = self.entries.gather(1, index)
        index = kept[..., None].expand(-1, -1, -1, self.buckets.shape[-1])
        self.buckets[:, :, :num_kept] = self.buckets.gather(2, index)
        self.buckets[:, :, num_kept:] = self.num_buckets
        held = self.rings.flatten(2).long().clamp(max=num_rows - 1)
        self.rings.copy_(new_rows.gather(-1, held).view(self.rings.shape))
        self._num_dropped = self.length - num_kept
        # Rings hold SLACK tokens more than what a token at the longest length sees.
        self._restorable_from = max(self._restorable_from, max(self._longest, self.length) - SLACK)

    def _crop(self, num_removed: int) -> None:
        num_rows = int(self._num_rows)
        kept, target = num_rows - num_removed, int(self.length) - num_removed
        removed = self.buckets[:, :, kept:num_rows].transpose(2, 3).long()
        self.num_padding -= (removed[:, 0, 0] == self.num_buckets).sum(-1)
        within_slack = max(self._longest, int(self.length)) - target <= SLACK
        if within_slack:
            self.counts.scatter_add_(-1, removed, -torch.ones_like(removed))
        self.buckets[:, :, kept:num_rows] = self.num_buckets
        if not within_slack:
            self._rebuild(self._sorted_rows(kept))
            self._longest = target

    def _replace(self, name: str, tensor: Tensor) -> None:
        super()._replace(name, tensor)
        self._offsets = None


class LSHChunkCacheLayer(LSHCacheLayer):
    """
    Cache layer of the pattern `"chunk"`: a token sees the same chunks as the last token of a parallel pass (in-tree).

    The layer stores the first tokens of each bucket in addition to the last ones, and drops no tokens.
    """

    layer_type = "reformer_hf_lsh_chunk"
    # Each token shifts the chunks that the next one sees.
    append_limit = 1
    # Rows of the first tokens of each bucket, `[B, H, R, N + 1, C]`.
    firsts: Tensor | None
    tensors = (*LSHCacheLayer.tensors, "firsts")

    def _num_seen(self) -> int:
        """Return W, the number of slots of the chunk of a token and of those before it."""
        return self.spec.pattern.chunk_length * (self.spec.pattern.chunks_before + 1)

    def _initialize(self, spec: CacheSpec, key: Tensor, value: Tensor) -> None:
        super()._initialize(spec, key, value)
        self.firsts = self.rings.new_zeros((*self.counts.shape, spec.pattern.chunk_length))

    def can_append(self, num_new: int) -> bool:
        return AttentionCacheLayer.can_append(self, num_new)

    def _row_limit(self) -> float:
        return math.inf

    def _rebuild(self, order: Tensor) -> None:
        super()._rebuild(order)
        slots = self._bucket_starts[..., None] + torch.arange(self.firsts.shape[-1], device=self.device)
        self.firsts.copy_(_rows_at(order, slots))

    def _push_and_look_up(self, rings: Tensor, row: Any) -> tuple[Tensor, Tensor]:
        index, ring_length = self._next_index(rings), self.ring_length
        self._put(self.rings, torch.add(index % ring_length, rings, alpha=ring_length)[..., 0], row)
        self._put_first(rings, index, row)
        self._count_in_buckets(rings)
        # There is one new token.
        index, rings = index[:, :, 0], rings[:, :, 0]
        seen, masked = self._look_up(self._seen_slots(rings, index), rings)
        own = self.rings.view(-1).take(rings * ring_length + index % ring_length)
        masked |= seen == own
        seen = torch.cat([seen, own], dim=-1)[:, :, None]
        bias = self._bias.repeat(*seen.shape[:-1], 1)
        return seen, bias.masked_fill_(pad(masked, (0, 1))[:, :, None], float("-inf"))

    def _seen_slots(self, rings: Tensor, index: Tensor) -> Tensor:
        """
        Return the slots of the sorted order `[B, H, R, W]` in the chunks that a token sees.

        Args:
            rings: The rings of the token, `[B, H, R, 1]`.
            index: Its indices in its buckets, `[B, H, R, 1]`.

        Returns:
            Slots; negative ones are in the round before.
        """
        chunk_length, num_seen = self.spec.pattern.chunk_length, self._num_seen()
        own_slot = self._bucket_starts.gather(-1, rings - self._first_rings()) + index
        first = (own_slot.div(chunk_length, rounding_mode="floor") + 1) * chunk_length - num_seen
        return first + torch.arange(num_seen, device=self.device)

    def _look_up(self, slots: Tensor, rings: Tensor) -> tuple[Tensor, Tensor]:
        """
        Look up the tokens in slots of the sorted order.

        Args:
            slots: The result of `_seen_slots`, `[B, H, R, W]`.
            rings: The rings of the token that sees them, `[B, H, R, 1]`.

        Returns:
            Their rows, and whether they are masked, both `[B, H, R, W]`.
        """
        pattern, ring_length, chunk_length = self.spec.pattern, self.ring_length, self.firsts.shape[-1]
        wrapped, ends = slots < 0, self.counts.cumsum(-1)
        if pattern.wraps:
            slots = torch.where(wrapped, slots + pattern.padded_length(self.length + 1), slots)

        def search(of_rounds: Tensor, look_up: Callable[[Tensor], Tensor]) -> Tensor:
            # In a ring, the first chunk of a round sees the last chunk of the previous round.
            return torch.where(wrapped, look_up(of_rounds.roll(1, 2)), look_up(of_rounds))

        buckets = search(ends, lambda of_buckets: torch.searchsorted(of_buckets, slots, right=True))
        masked = (slots < 0) | (buckets >= self.num_buckets)
        buckets = buckets.clamp(max=self.num_buckets)
        index = slots - search(ends - self.counts, lambda of_buckets: of_buckets.gather(-1, buckets))
        counts = search(self.counts, lambda of_buckets: of_buckets.gather(-1, buckets))
        seen_rings = search(self._first_rings().contiguous(), lambda of_rounds: of_rounds + buckets)
        last = self.rings.view(-1).take(seen_rings * ring_length + index % ring_length)
        early = index.clamp(min=0, max=chunk_length - 1)
        early = self.firsts.view(-1).take(seen_rings * chunk_length + early)
        if pattern.same_bucket:
            masked |= buckets != rings - self._first_rings()
        return torch.where(counts - index <= ring_length, last, early), masked

    def _first_rings(self) -> Tensor:
        """Return the first ring of each round, `[B, H, R, 1]`."""
        return self._get_offsets()[0].transpose(2, 3)

    def _put_first(self, rings: Tensor, index: Tensor, row: Any) -> None:
        chunk_length = self.firsts.shape[-1]
        # Tokens that are not among the first of their bucket are written to the padding bucket.
        trash = rings - rings % (self.num_buckets + 1) + self.num_buckets
        cells = torch.where(index < chunk_length, rings * chunk_length + index, (trash + 1) * chunk_length - 1)
        self._put(self.firsts, cells[..., 0], row)


class StaticLSHCacheLayer(FixedShape, LSHCacheLayer):
    """An `LSHCacheLayer` of a fixed shape."""


class StaticLSHChunkCacheLayer(FixedShape, LSHChunkCacheLayer):
    """An `LSHChunkCacheLayer` of a fixed shape."""


def _rows_at(order: Tensor, slots: Tensor) -> Tensor:
    """Return the rows in slots `[B, H, R, N + 1, …]` of a sorted order `[B, H, R, T]`; arbitrary rows outside it."""
    slots = slots.clamp(min=0, max=order.shape[-1] - 1)
    return order.gather(-1, slots.flatten(3)).view(slots.shape)


def _seen_before(rows: Tensor, masked: Tensor) -> Tensor:
    """Return which rows `[…, R, W]` are visible in an earlier round."""
    seen = torch.zeros_like(masked)
    for round in range(1, rows.shape[-2]):
        earlier = rows.masked_fill(masked, -1)[..., :round, :].flatten(-2)
        seen[..., round, :] = (rows[..., round, :, None] == earlier[..., None, :]).any(-1)
    return seen
