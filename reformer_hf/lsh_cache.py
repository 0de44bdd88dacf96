# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Decoding state of LSH layers: for each round, head and bucket a ring of the rows that hold its last positions.

A step looks up what a token attends to in the rings of its own buckets, whatever the length of what came before. What
no ring holds any more is dropped when the table is full, so that the state is bounded.

Shapes: B batch, n new tokens, H heads, D head size, R rounds, N buckets (bucket N holds padding), M length of a ring,
W slots of the sorted order that a token sees in a round.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cache import SLACK, Geometry, Past, Places, StateLayer, grown, in_mode_of_table, table_rows
from .hashing import both_signs, hash_few, invert_order, sort_by_bucket, unpack_order


@dataclass(frozen=True)
class LSHGeometry(Geometry):
    """
    Args:
        num_hashes: Rounds.
        window_length: Slots of the sorted order that a token sees in a round.
        deduplicate_keys: Whether a key counts in the first round that shows it only.
        chunk_length: `None` for the pattern `"window"`, the last positions of a token's own bucket. Else a token sees
            the chunks of the sorted order that it would see were it the last of a parallel pass.
        same_bucket: With chunks, whether it sees keys of its own bucket only.
        ring_multiple: With chunks, the multiple to which a length beyond `shortest_chunk` is padded for the chunks of
            all rounds to form a ring; `None` for no ring.
    """

    num_hashes: int
    window_length: int
    deduplicate_keys: bool = False
    chunk_length: int | None = None
    same_bucket: bool = False
    ring_multiple: int | None = None
    shortest_chunk: int = 0


class LSHStateLayer(StateLayer):
    """
    For each round, head and bucket a ring of the rows that hold its last positions.

    The i-th position of a bucket stands in cell `i % M` of the bucket's ring; `counts` says how many there were. With
    chunks, the first positions of each bucket are kept as well.
    """

    attention = "lsh"
    # The bucket of each row `[B, H, rows, R]`, N where there is padding or nothing.
    buckets: Tensor | None
    # Columns of the rows `[B, H, rows]`, once some were dropped; until then they are the rows.
    _positions: Tensor | None
    # How many positions each bucket had, `[B, H, R, N + 1]`, and the rows of the last and of the first ones.
    counts: Tensor | None
    rings: Tensor | None
    firsts: Tensor | None
    # Rows of the table in use, a number or a tensor. Differs from the length once something was dropped.
    stored: Any
    _bases: tuple[Tensor, Tensor] | None
    tensors = (*StateLayer.tensors, "buckets", "_positions", "counts", "rings", "firsts")

    def _clear(self) -> None:
        super()._clear()
        # Set by the first input: rotations as `hashing.projections_of` gives them, and the factors of N.
        self.projections: list[Tensor] = []
        self.factors: list[int] = []
        self.stored = 0
        # Columns that there were when something was last dropped.
        self._dropped_at: int = 0
        self._signed: list[Tensor] = []

    @property
    def num_buckets(self) -> int:
        return self.counts.shape[-1] - 1

    @property
    def ring_length(self) -> int:
        return self.rings.shape[-1]

    def prepare_hashing(self, factors: list[int], projections: list[Tensor], num_hashes: int) -> None:
        """What the first input says of all later ones."""
        self.factors, self.projections = factors, projections
        self._signed = both_signs(projections, num_hashes)

    def _make_tensors(self, batch_size: int) -> None:
        geometry = self.geometry
        num_buckets = 1
        for factor in self.factors:
            num_buckets *= factor
        heads = (batch_size, geometry.num_heads)
        rounds = (*heads, geometry.num_hashes)
        integers = torch.zeros((), dtype=torch.int32, device=self.device)
        rows = (*heads, self.table.shape[1], geometry.num_hashes)
        self.buckets = integers.new_full(rows, num_buckets)
        self.counts = torch.zeros((*rounds, num_buckets + 1), dtype=torch.long, device=self.device)
        self.rings = integers.new_zeros((*self.counts.shape, geometry.window_length + SLACK))
        if geometry.chunk_length is not None:
            self.firsts = integers.new_zeros((*self.counts.shape, geometry.chunk_length))
        self._ages = torch.arange(geometry.window_length, 0, -1, device=self.device)
        if self.is_compileable:
            self.stored = self.length

    def takes_step(self, num_new: int) -> bool:
        # A parallel pass computes the past as well, a step twenty times as much for each token.
        return self.has_tokens and (num_new <= SLACK or int(self.stored) > 20 * num_new)

    def places(self, buckets: Tensor) -> Places:
        """
        Where new tokens of these buckets `[B, H, n, R]` (N for padding), n at most `SLACK`, stand in the table, and
        what they see: for each head, rows and which of them are hidden, `[B, H, n, R, W]`.
        """
        num_new = buckets.shape[2]
        rows = self._new_rows(num_new)
        self.buckets.index_copy_(2, rows, buckets.int())
        if self._positions is not None:
            self._positions.index_copy_(2, rows, self._columns(rows))
        rings, index = self._push(buckets, rows)
        if self.geometry.chunk_length is None:
            seen, hidden = self._in_window(rings, index)
        else:
            seen, hidden = self._in_chunks(rings, index, rows)
        if self.geometry.deduplicate_keys and self.geometry.num_hashes > 1:
            hidden = hidden | _seen_before(seen, hidden)
        batch_size, _, num_heads, _ = self.table.shape
        write = rows if batch_size == 1 else table_rows(self.table, rows.expand(batch_size, -1)).flatten()
        read = torch.add(self._base_rows()[1], seen, alpha=num_heads)
        return Places(write, read, hidden)

    def _new_rows(self, num_new: int) -> Tensor:
        if isinstance(self.stored, int):
            return torch.arange(self.stored, self.stored + num_new, device=self.device)
        return torch.arange(num_new, device=self.device) + self.stored

    def positions(self, places: Places) -> Tensor:
        """The columns of what is read, `[B, H, n, R, W]`; anything for what is hidden."""
        rows = (places.read - self._base_rows()[1]).div(self.table.shape[2], rounding_mode="floor")
        return rows if self._positions is None else self._positions.gather(-1, rows.flatten(2)).view(rows.shape)

    def _read(self, read: Tensor) -> Tensor:
        """`[B * H * n, R * W, 2 * D]`."""
        rows, size = read.shape[:3].numel(), self.table.shape[-1]
        return self.table.view(-1, size).index_select(0, read.flatten()).view(rows, -1, size)

    def _push(self, buckets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """
        Take the rows of new tokens into the rings of their buckets `[B, H, n, R]`.

        Returns:
            Which ring each is in, of all rings of all rows and rounds, and its index there.
        """
        rings = buckets + self._base_rows()[0]
        counts = self.counts.view(-1)
        index = counts.take(rings)
        if rings.shape[2] > 1:
            # New tokens of one bucket follow each other.
            same = rings[:, :, :, None] == rings[:, :, None]
            earlier = torch.ones(same.shape[2:4], dtype=torch.bool, device=self.device).tril(-1)
            index = index + (same & earlier[..., None]).sum(3)
        flat_rings, flat_index = rings.flatten(), index.flatten()
        cells = torch.add(flat_index % self.ring_length, flat_rings, alpha=self.ring_length)
        self._put(self.rings, cells, rows, rings)
        if self.firsts is not None:
            chunk_length = self.firsts.shape[-1]
            # What is not among the first goes where padding is.
            last = flat_rings - flat_rings % (self.num_buckets + 1) + self.num_buckets
            cells = flat_rings * chunk_length + flat_index
            cells = torch.where(flat_index < chunk_length, cells, (last + 1) * chunk_length - 1)
            self._put(self.firsts, cells, rows, rings)
        counts.index_add_(0, flat_rings, torch.ones_like(flat_rings))
        return rings, index

    def _put(self, table: Tensor, cells: Tensor, rows: Tensor, rings: Tensor) -> None:
        """Write the row of each new token into its cells."""
        if isinstance(self.stored, int) and rings.shape[2] == 1:
            table.view(-1).index_fill_(0, cells, self.stored)
        else:
            table.view(-1).index_copy_(0, cells, rows.int()[:, None].expand(rings.shape).flatten())

    def _in_window(self, rings: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The last rows of each token's own bucket before it, `[B, H, n, R, W]`, and which of them there are not."""
        earlier = index[..., None] - self._ages
        cells = torch.add(earlier % self.ring_length, rings[..., None], alpha=self.ring_length)
        return self.rings.view(-1).take(cells), earlier < 0

    def _in_chunks(self, rings: Tensor, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows in the chunks of the sorted order around the last token, `[B, H, 1, R, W]`, and which are hidden."""
        geometry, num_buckets = self.geometry, self.num_buckets
        buckets = rings - self._base_rows()[0]
        ends = self.counts.cumsum(-1)
        starts = ends - self.counts
        slots = starts.gather(-1, buckets.transpose(2, 3)).transpose(2, 3) + index
        first = slots.div(geometry.chunk_length, rounding_mode="floor") + 1
        first = first * geometry.chunk_length - geometry.window_length
        # [B, H, R, W]
        slots = (first[..., None] + torch.arange(geometry.window_length, device=self.device))[:, :, 0]
        wrapped = slots < 0
        if geometry.ring_multiple is not None:
            slots = torch.where(wrapped, slots + self._padded_length(), slots)
        # The first chunk of a round looks back at the last one of the round before.
        search = _OfRounds(wrapped)
        seen_buckets = search(ends, lambda of_buckets: torch.searchsorted(of_buckets, slots, right=True))
        hidden = (slots < 0) | (seen_buckets >= num_buckets)
        seen_buckets = seen_buckets.clamp(max=num_buckets)
        places = slots - search(starts, lambda of_buckets: of_buckets.gather(-1, seen_buckets))
        counts = search(self.counts, lambda of_buckets: of_buckets.gather(-1, seen_buckets))
        seen_rings = search(
            self._base_rows()[0].transpose(2, 3).contiguous(), lambda of_rounds: of_rounds + seen_buckets
        )
        last = self.rings.view(-1).take(seen_rings * self.ring_length + places % self.ring_length)
        early = places.clamp(min=0, max=geometry.chunk_length - 1)
        early = self.firsts.view(-1).take(seen_rings * geometry.chunk_length + early)
        seen = torch.where(counts - places <= self.ring_length, last, early)
        hidden |= seen == rows
        if geometry.same_bucket:
            hidden |= seen_buckets != buckets[:, :, 0, :, None]
        return seen[:, :, None], hidden[:, :, None]

    def _padded_length(self) -> int | Tensor:
        """Length of a round in the ring of all chunks, with the token that is being taken."""
        geometry, length = self.geometry, self.length + 1
        padded = -(-length // geometry.ring_multiple) * geometry.ring_multiple
        if isinstance(length, int):
            return length if length <= geometry.shortest_chunk else padded
        return torch.where(length <= geometry.shortest_chunk, length, padded)

    def _base_rows(self) -> tuple[Tensor, Tensor]:
        """Where rings of each row and round begin, `[B, H, 1, R]`, and rows of the table, `[B, H, 1, 1, 1]`."""
        if self._bases is None:
            batch_size, capacity, num_heads, _ = self.table.shape
            rounds = torch.arange(self.counts.shape[:3].numel(), device=self.device).view(self.counts.shape[:3])
            batch_rows = torch.arange(batch_size, device=self.device)[:, None] * (capacity * num_heads)
            rows = batch_rows + torch.arange(num_heads, device=self.device)
            self._bases = rounds[:, :, None] * (self.num_buckets + 1), rows[:, :, None, None, None]
        return self._bases

    def hash(self, query: Tensor, padding: Tensor | None) -> Tensor:
        """Buckets `[B, H, n, R]` of a few queries `[B, n, H, D]`, N for padding."""
        num_hashes = self.geometry.num_hashes
        buckets = hash_few(self._signed, query, num_hashes)
        return buckets if padding is None else buckets.masked_fill(padding[:, None, :, None], self.num_buckets)

    def past(self, heads: slice) -> Past | None:
        """All that is held; `None` if there is nothing."""
        if not self.has_tokens:
            return None
        stored = int(self.stored)
        buckets = self.buckets[:, heads, :stored].transpose(2, 3)
        hidden = buckets[:, 0, 0] == self.num_buckets
        key, value = self.split(self.table[:, :stored, heads])
        if self._positions is None:
            columns = torch.arange(stored, dtype=torch.int32, device=self.device).expand(len(hidden), 1, -1)
        else:
            columns = self._positions[:, heads, :stored]
        return Past(key, value, hidden, columns, buckets=buckets)

    def fill(self, heads: slice, buckets: Tensor, order: Tensor) -> Places:
        """
        Where new tokens stand after a parallel pass.

        Args:
            buckets: Of the new tokens `[B, h, R, n]`, N for padding.
            order: Rows held before and new tokens in sorted order, as `sort_by_bucket` gives it, `[B, h, R, T + n]`.
        """
        num_new = buckets.shape[-1]
        rows = torch.arange(num_new, device=self.device) + int(self.stored)
        self.buckets[:, heads].index_copy_(2, rows, buckets.transpose(2, 3))
        if self._positions is not None and heads.start == 0:
            self._positions.index_copy_(2, rows, self._columns(rows))
        self._rebuild(heads, unpack_order(order)[0])
        return Places(table_rows(self.table, rows.expand(buckets.shape[0], -1)).flatten(), heads=heads)

    def _rebuild(self, heads: slice, order: Tensor) -> None:
        """Make counts and rings of the sorted order `[B, h, R, T]` of all rows."""
        buckets = self.buckets[:, heads, : order.shape[-1]].transpose(2, 3).long()
        counts = torch.zeros_like(self.counts[:, heads]).scatter_add_(3, buckets, torch.ones_like(buckets))
        starts = counts.cumsum(-1) - counts
        self.counts[:, heads] = counts
        cells = torch.arange(self.ring_length, device=self.device)
        last = counts[..., None] - 1
        # The last position whose index has this remainder.
        index = last - (last - cells) % self.ring_length
        self.rings[:, heads] = self._rows_at(order, starts[..., None] + index)
        # Made here, not in a step, which may be compiled.
        self._base_rows()
        if self.firsts is not None:
            firsts = starts[..., None] + torch.arange(self.firsts.shape[-1], device=self.device)
            self.firsts[:, heads] = self._rows_at(order, firsts)

    @staticmethod
    def _rows_at(order: Tensor, slots: Tensor) -> Tensor:
        slots = slots.clamp(min=0, max=order.shape[-1] - 1)
        return order.gather(-1, slots.flatten(3)).view(slots.shape)

    def advance(self, num_new: int, padding: Tensor | None) -> None:
        super().advance(num_new, padding)
        if not self.is_compileable:
            self.stored += num_new

    def _columns(self, rows: Tensor) -> Tensor:
        columns = (rows - self.stored + self.length).int()
        return columns.expand(*self._positions.shape[:2], -1)

    def reserve(self, num_new: int) -> None:
        """Make room in the table: drop what no ring holds, where that is worth while, else grow."""
        if self.is_compileable or self.stored + num_new <= self.table.shape[1]:
            return
        # What rings hold, and a quarter more, so that rows are dropped now and then only.
        bound = self.counts.shape[2:].numel() * self.ring_length + SLACK
        bound += max(bound // 4, SLACK)
        is_window = self.geometry.chunk_length is None
        if is_window and self.stored > bound // 2 and self.stored + num_new > bound:
            recent = max(self._longest, self.length + num_new) - self._last_kept
            if not self.record_past or recent <= SLACK:
                self._drop()
        needed = self.stored + num_new
        if needed > self.table.shape[1]:
            size = grown(self.table.shape[1], needed)
            if is_window:
                size = max(needed, min(size, bound))
            self._resize(("table",), 1, size)
            self._resize(("buckets",), 2, size, fill=self.num_buckets)
            if self._positions is not None:
                self._resize(("_positions",), 2, size)

    @in_mode_of_table
    def _drop(self) -> None:
        """Keep the rows that rings hold and the last ones, of each head, at the end of the part in use."""
        stored = self.stored
        # What stands in cells that were never written, or that were taken back, does no harm.
        held = self.rings[..., : self.num_buckets, :].flatten(2).long().clamp(max=stored - 1)
        keep = torch.zeros((*held.shape[:2], stored), dtype=torch.bool, device=self.device).scatter_(-1, held, True)
        keep[..., -SLACK:] = True
        num_kept = int(keep.sum(-1).max())
        order = torch.sort(keep.int(), dim=-1, stable=True).indices
        places = (invert_order(order) - (stored - num_kept)).clamp(min=0)
        kept = order[..., stored - num_kept :]
        if self._positions is None:
            self._positions = kept.new_zeros((*kept.shape[:2], self.table.shape[1]), dtype=torch.int32)
            self._positions[..., :stored] = torch.arange(stored, device=self.device)
        self._positions[..., :num_kept] = self._positions.gather(-1, kept)
        index = kept.transpose(1, 2)[..., None].expand(-1, -1, -1, self.table.shape[-1])
        self.table[:, :num_kept] = self.table.gather(1, index)
        index = kept[..., None].expand(-1, -1, -1, self.buckets.shape[-1])
        self.buckets[:, :, :num_kept] = self.buckets.gather(2, index)
        self.buckets[:, :, num_kept:] = self.num_buckets
        held = self.rings.flatten(2).long().clamp(max=stored - 1)
        self.rings.copy_(places.gather(-1, held).view(self.rings.shape))
        self.stored = num_kept
        self._dropped_at = self.length

    def _can_restore(self, target: int) -> bool:
        return max(self._longest, int(self.length)) - target <= SLACK or target >= self._dropped_at

    def _crop(self, num_columns: int) -> None:
        stored = int(self.stored)
        removed = self.buckets[:, :, stored - num_columns : stored].transpose(2, 3)
        self.num_tokens -= (removed[:, 0, 0] != self.num_buckets).sum(-1)
        kept = stored - num_columns
        within_slack = max(self._longest, int(self.length)) - (int(self.length) - num_columns) <= SLACK
        if within_slack:
            index = removed.long()
            self.counts.scatter_add_(-1, index, -torch.ones_like(index))
        self.buckets[:, :, kept:stored] = self.num_buckets
        if not self.is_compileable:
            self.stored = kept
        if not within_slack:
            order = sort_by_bucket(self.buckets[:, :, :kept].transpose(2, 3))
            self._rebuild(slice(None), unpack_order(order)[0])
            self._longest = int(self.length) - num_columns

    def _table_changed(self) -> None:
        super()._table_changed()
        # See `_base_rows`.
        self._bases = None


class _OfRounds:
    """Looks up `[B, H, R, W]` in what there is of each round, `[B, H, R, …]`: its own, or that of the round before."""

    def __init__(self, before: Tensor):
        self._before = before

    def __call__(self, of_rounds: Tensor, look_up: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.where(self._before, look_up(of_rounds.roll(1, 2)), look_up(of_rounds))


def _seen_before(rows: Tensor, hidden: Tensor) -> Tensor:
    """Which rows `[…, R, W]` are not hidden in an earlier round."""
    seen = torch.zeros_like(hidden)
    for round in range(1, rows.shape[-2]):
        earlier = rows.masked_fill(hidden, -1)[..., :round, :].flatten(-2)
        seen[..., round, :] = (rows[..., round, :, None] == earlier[..., None, :]).any(-1)
    return seen
