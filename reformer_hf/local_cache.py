# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""KV cache of local attention: the last chunks of tokens, in a ring buffer."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .cache import SLACK, AttentionCacheLayer, CacheSpec, FixedShape, Past, Seen, grown, ordinary_tensors, self_bias


class LocalCacheLayer(AttentionCacheLayer):
    """
    Store the last chunks in a ring buffer: token index i is in slot `i % M`, and padding is written to slot M.

    If chunks form a ring (in-tree), padding counts as tokens: token indices are cache positions.
    """

    layer_type = "reformer_hf_local"
    # Cache position of each slot, its complement for padding, or `_EMPTY` without a token. Created with the first
    # padding: until then, cache positions follow from the length.
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
        # Larger than necessary, so that few windows wrap around.
        return 3 * self._window_length + SLACK + 1

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
        if not self.has_padding:
            # The ring keeps the last tokens.
            first = max(num_new - self.ring_length, 0)
            key, value, positions = key[:, first:], value[:, first:], positions[first:]
        indices, slots = self._indices_and_slots(positions, padding)
        if key.shape[1] > self.ring_length:
            # If two tokens share a slot, keep the later one.
            kept = indices >= indices[:, -1:] + 1 - self.ring_length
            slots = torch.where(kept, slots, self.ring_length)
        self._write(slots, positions, key, value, padding)

    def _append(self, key: Tensor, value: Tensor, padding: Tensor | None, with_positions: bool) -> Seen:
        if key.shape[1] == 1 and not self.has_padding and not with_positions:
            seen = self._append_in_slice(key, value)
            if seen is not None:
                return seen
        pattern, ring_length = self.spec.pattern, self.ring_length
        positions = self._new_positions(key.shape[1])
        indices, slots = self._indices_and_slots(positions, padding)
        self._write(slots, positions, key, value, padding)
        # The distance from a query back to the token in a slot, and to the first token that it sees.
        indices = indices[..., None]
        distances = torch.remainder(indices - self._slots, ring_length)
        reach = torch.remainder(indices, pattern.chunk_length) + pattern.chunk_length * pattern.chunks_before
        masked = distances > torch.minimum(reach, indices)
        if self._counts_padding and self.has_padding:
            masked = masked | (self.stored_positions[:, None, :ring_length] < 0)
        # The bias is finite because padding may see no keys.
        bias = self.entries.new_zeros(masked.shape).masked_fill_(masked, self_bias(self.entries.dtype))[:, None]
        seen_key, seen_value = self.entries[:, :ring_length].transpose(1, 2).chunk(2, dim=-1)
        seen_positions = None
        if with_positions:
            seen_positions = self._slot_positions(key.shape[1])[:, None, None, :ring_length]
        return Seen(seen_key, seen_value, bias, seen_positions)

    def _append_in_slice(self, key: Tensor, value: Tensor) -> Seen | None:
        """Append one token if the slots that it sees are consecutive; return `None` if they wrap around."""
        pattern, slot = self.spec.pattern, self.length % self.ring_length
        reach = min(self.length % pattern.chunk_length + pattern.chunk_length * pattern.chunks_before, self.length)
        if reach > slot:
            return None
        self._write_rows(self.entries, 1, slot, self._as_entries(key, value))
        seen_key, seen_value = self.entries[:, slot - reach : slot + 1].transpose(1, 2).chunk(2, dim=-1)
        return Seen(seen_key, seen_value, None)

    def past(self) -> Past:
        first = self._first_seen(self._next_indices())
        indices = first[:, None] + self._slots[: self._window_length]
        slots = indices % self.ring_length
        empty = indices >= self._next_indices()[:, None]
        rows = torch.arange(len(self.entries), device=self.device)[:, None]
        key, value = self.entries[rows, slots].chunk(2, dim=-1)
        positions = self._slot_positions().expand(len(self.entries), -1).gather(1, slots)
        masked = empty | (positions < 0)
        return Past(key, value, masked, positions[:, None].int(), int(self.length), empty)

    @property
    def _counts_padding(self) -> bool:
        return self.spec.pattern.wraps

    def _next_indices(self) -> Tensor:
        """Return the token index `[B]` of the next token."""
        return torch.zeros_like(self.num_padding) + self.length if self._counts_padding else self.num_tokens

    def _first_seen(self, indices: Tensor) -> Tensor:
        """Return the first token index that tokens with these indices see."""
        pattern = self.spec.pattern
        own_chunks = indices.div(pattern.chunk_length, rounding_mode="floor")
        return ((own_chunks - pattern.chunks_before) * pattern.chunk_length).clamp(min=0)

    def _indices_and_slots(self, positions: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return token indices and slots `[B or 1, n]` of new tokens; padding has the index of the token before it."""
        indices = positions[None]
        if self._counts_padding or not self.has_padding:
            return indices, indices % self.ring_length
        indices = indices - self.num_padding[:, None]
        if padding is None:
            return indices, indices % self.ring_length
        indices = indices - padding.cumsum(-1)
        return indices, torch.where(padding, self.ring_length, indices % self.ring_length)

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
        """Return the cache positions `[B, M + 1]` of the tokens in all slots; encoded like `stored_positions`."""
        if self.stored_positions is not None:
            return self.stored_positions
        last = self.length + num_new - 1
        positions = last - torch.remainder(last - self._slots, self.ring_length)
        positions = torch.where(positions < 0, self._EMPTY, positions)
        return pad(positions, (0, 1), value=self._EMPTY).repeat(len(self.entries), 1)

    def _reserve(self, num_new: int) -> None:
        """If the past is recorded for `crop`, grow before tokens that it needs are overwritten."""
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
        self._restorable_from = max(self._restorable_from, self._first_restorable())
        kept = min(old_length, new_length)
        indices = self._next_indices()[:, None] + torch.arange(-kept, 0, device=self.device)
        old, new = indices % old_length, torch.where(indices < 0, new_length, indices % new_length)
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
        return target >= max(self._restorable_from, self._first_restorable())

    def _first_restorable(self) -> int:
        """Return the shortest length that `crop` can restore, if the ring is full."""
        longest = max(self._longest, int(self.length))
        return 0 if longest <= self.ring_length else longest - self.ring_length + self._window_length

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
    """A `LocalCacheLayer` of a fixed shape."""
