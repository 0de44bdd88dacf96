# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""KV cache of local attention: the last chunks of tokens, in a ring."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .cache import SLACK, AttentionCacheLayer, CacheSpec, FixedShape, Past, Seen, grown, ordinary_tensors, self_bias


class LocalCacheLayer(AttentionCacheLayer):
    """
    The last chunks in a ring: the token of rank r is in slot `r % M`, and what padding writes in slot M.

    Where chunks form a ring (in-tree), padding counts as a token: ranks are cache positions.
    """

    layer_type = "reformer_hf_local"
    # Cache position of each slot, or its complement for padding; `_EMPTY` where there is no token. Made only once
    # there is padding: before that, slots follow from the length.
    tensors = (*AttentionCacheLayer.tensors, "stored_positions")
    stored_positions: Tensor | None
    _EMPTY = torch.iinfo(torch.long).min

    @property
    def ring_length(self) -> int:
        return self.entries.shape[1] - 1

    @property
    def _window_length(self) -> int:
        return self.spec.pattern.window_length

    def _initial_rows(self) -> int:
        return self._window_length + SLACK + 1

    def _initialize(self, spec: CacheSpec, key: Tensor, value: Tensor) -> None:
        super()._initialize(spec, key, value)
        self._slots = torch.arange(self.ring_length, device=self.device)
        if self.has_padding:
            self.stored_positions = self._slot_positions()

    def _note_padding(self, padding: Tensor | None) -> None:
        if padding is not None and not self.has_padding:
            with ordinary_tensors():
                self.stored_positions = self._slot_positions()
            self.has_padding = True

    def _prefill(self, key: Tensor, value: Tensor, padding: Tensor | None) -> None:
        num_new = key.shape[1]
        positions = self._new_positions(num_new)
        ranks, slots = self._ranks_and_slots(positions, padding)
        if num_new > self.ring_length:
            # Of two tokens in one slot the later one stays.
            kept = ranks >= ranks[:, -1:] + 1 - self.ring_length
            slots = torch.where(kept, slots, self.ring_length)
        self._write(slots, positions, key, value, padding)

    def _append(self, key: Tensor, value: Tensor, padding: Tensor | None, with_positions: bool) -> Seen:
        pattern, ring_length = self.spec.pattern, self.ring_length
        positions = self._new_positions(key.shape[1])
        ranks, slots = self._ranks_and_slots(positions, padding)
        self._write(slots, positions, key, value, padding)
        # How far back the token in a slot is, and how far back a query sees: to the first of its chunks.
        ranks = ranks[..., None]
        ages = torch.remainder(ranks - self._slots, ring_length)
        reach = torch.remainder(ranks, pattern.chunk_length) + pattern.chunk_length * pattern.chunks_before
        masked = ages > torch.minimum(reach, ranks)
        if self._counts_padding and self.has_padding:
            masked = masked | (self.stored_positions[:, None, :ring_length] < 0)
        # Finite, as padding may see nothing.
        bias = self.entries.new_zeros(masked.shape).masked_fill_(masked, self_bias(self.entries.dtype))[:, None]
        seen_key, seen_value = self.entries[:, :ring_length].transpose(1, 2).chunk(2, dim=-1)
        seen_positions = None
        if with_positions:
            seen_positions = self._slot_positions(key.shape[1])[:, None, None, :ring_length]
        return Seen(seen_key, seen_value, bias, seen_positions)

    def past(self) -> Past:
        first = self._first_seen(self._next_ranks())
        ranks = first[:, None] + self._slots[: self._window_length]
        slots = ranks % self.ring_length
        empty = ranks >= self._next_ranks()[:, None]
        rows = torch.arange(len(self.entries), device=self.device)[:, None]
        key, value = self.entries[rows, slots].chunk(2, dim=-1)
        positions = self._slot_positions().expand(len(self.entries), -1).gather(1, slots)
        masked = empty | (positions < 0)
        return Past(key, value, masked, positions[:, None].int(), int(self.length), empty)

    @property
    def _counts_padding(self) -> bool:
        return self.spec.pattern.wraps

    def _next_ranks(self) -> Tensor:
        """Rank `[B]` of the next token."""
        return torch.zeros_like(self.num_padding) + self.length if self._counts_padding else self.num_tokens

    def _first_seen(self, ranks: Tensor) -> Tensor:
        """The first rank that tokens of these ranks see."""
        pattern = self.spec.pattern
        own_chunks = ranks.div(pattern.chunk_length, rounding_mode="floor")
        return ((own_chunks - pattern.chunks_before) * pattern.chunk_length).clamp(min=0)

    def _ranks_and_slots(self, positions: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ranks and slots `[B or 1, n]` of new tokens; padding has the rank of the token before it."""
        ranks = positions[None]
        if self._counts_padding or not self.has_padding:
            return ranks, ranks % self.ring_length
        ranks = ranks - self.num_padding[:, None]
        if padding is None:
            return ranks, ranks % self.ring_length
        ranks = ranks - padding.cumsum(-1)
        return ranks, torch.where(padding, self.ring_length, ranks % self.ring_length)

    def _write(self, slots: Tensor, positions: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> None:
        entries = self._as_entries(key, value)
        if slots.shape[0] == 1:
            self.entries.index_copy_(1, slots[0], entries)
        else:
            index = slots + torch.arange(len(slots), device=self.device)[:, None] * self.entries.shape[1]
            self.entries.flatten(0, 1).index_copy_(0, index.flatten(), entries.flatten(0, 1))
        if self.has_padding:
            positions = positions.expand(len(self.entries), -1)
            if padding is not None and self._counts_padding:
                positions = torch.where(padding, ~positions, positions)
            self.stored_positions.scatter_(1, slots.expand(len(self.entries), -1), positions)

    def _slot_positions(self, num_new: int = 0) -> Tensor:
        """Cache positions `[B, M + 1]`, or `[1, M + 1]` without padding, of what is in each slot; see `tensors`."""
        if self.stored_positions is not None:
            return self.stored_positions
        last = self.length + num_new - 1
        positions = last - torch.remainder(last - self._slots, self.ring_length)
        positions = torch.where(positions < 0, self._EMPTY, positions)
        return pad(positions, (0, 1), value=self._EMPTY).repeat(len(self.entries), 1)

    def _reserve(self, num_new: int) -> None:
        """Where `crop` is to be expected, grow before what it needs is overwritten."""
        if self.record_past:
            needed = self._window_length + max(self._longest, self.length + num_new) - self._kept_by_crop
            if needed > self.ring_length:
                self._resize_ring(grown(self.ring_length, needed))

    def _after_crop(self) -> None:
        usual = self._initial_rows() - 1
        if self.ring_length > usual and not self.is_compileable:
            self._resize_ring(usual)
            self._longest = int(self.length)

    def _resize_ring(self, new_length: int) -> None:
        old_length = self.ring_length
        kept = min(old_length, new_length)
        ranks = self._next_ranks()[:, None] + torch.arange(-kept, 0, device=self.device)
        old, new = ranks % old_length, torch.where(ranks < 0, new_length, ranks % new_length)
        rows = torch.arange(len(self.entries), device=self.device)[:, None]
        with ordinary_tensors():
            for name, fill in (("entries", 0), ("stored_positions", self._EMPTY)):
                ring = getattr(self, name)
                if ring is not None:
                    resized = ring.new_full((ring.shape[0], new_length + 1, *ring.shape[2:]), fill)
                    resized[rows, new] = ring[rows, old]
                    self._replace(name, resized)
            self._slots = torch.arange(new_length, device=self.device)

    def _can_restore(self, target: int) -> bool:
        longest = max(self._longest, int(self.length))
        return longest - target <= self.ring_length - self._window_length or longest <= self.ring_length

    def _crop(self, num_removed: int) -> None:
        if not self.has_padding:
            return
        target = int(self.length) - num_removed
        slots = self.stored_positions[:, :-1]
        is_token = slots != self._EMPTY
        positions = torch.where(slots < 0, ~slots, slots)
        removed = is_token & (positions >= target)
        self.num_padding -= num_removed - (removed & (slots >= 0)).sum(-1)
        slots.masked_fill_(removed, self._EMPTY)


class StaticLocalCacheLayer(FixedShape, LocalCacheLayer):
    """`LocalCacheLayer` of a fixed shape."""
