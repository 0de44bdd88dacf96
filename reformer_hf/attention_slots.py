# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
The layout of a sorted order in *slots*.

A round has one slot for each position, in sorted order, padded to a multiple of the chunk length: n chunks of C slots.
The *windows* of the first and last chunks extend beyond them on both sides, so that a round has
S = (n + chunks before and after) * C slots in total. The additional slots are empty or, in a ring, hold the chunks of
the other end.

Shapes: g heads of any batch row, R rounds, L length, n chunks, C chunk length, W window length.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from .attention_pattern import AttentionPattern


@dataclass(frozen=True)
class SlotLayout:
    """Lay out an input of `length` positions in slots."""

    pattern: AttentionPattern
    length: int

    @cached_property
    def num_chunks(self) -> int:
        return math.ceil(self.pattern.padded_length(self.length) / self.pattern.chunk_length)

    @property
    def num_empty(self) -> int:
        """Number of empty slots at the end of the last chunk."""
        return self.num_chunks * self.pattern.chunk_length - self.length

    def slots(self, sorted_gRL: Tensor, round: int, empty: float) -> Tensor:
        """Return all slots `[g, S]` of one round; empty slots hold `empty`."""
        pattern = self.pattern
        chunk_length, before, after = pattern.chunk_length, pattern.chunks_before, pattern.chunks_after
        if not pattern.wraps:
            pad_widths = (before * chunk_length, after * chunk_length + self.num_empty)
            return pad(sorted_gRL[:, round], pad_widths, value=empty)
        ring = pad(sorted_gRL, (0, self.num_empty), value=empty).view(sorted_gRL.shape[0], -1, chunk_length)
        first = round * self.num_chunks
        chunks = torch.arange(first - before, first + self.num_chunks + after, device=ring.device)
        return ring.index_select(1, chunks % ring.shape[1]).flatten(1)

    def own_slots(self, slots_gS: Tensor) -> Tensor:
        """Return the slots of the chunks themselves, `[g, n * C]`."""
        start = self.pattern.chunk_length * self.pattern.chunks_before
        return slots_gS[:, start : start + self.num_chunks * self.pattern.chunk_length]

    def queries(self, sorted_gL: Tensor) -> Tensor:
        """Reshape a value per query to `[g, n, C, 1]`, which broadcasts against windows; empty slots hold zero."""
        return pad(sorted_gL, (0, self.num_empty)).unflatten(1, (-1, self.pattern.chunk_length))[..., None]

    def windows(self, slots_gS: Tensor) -> Tensor:
        """Return the windows `[g, n, 1, W]` of a value per slot, which broadcast against queries."""
        return slots_gS.unfold(1, self.pattern.window_length, self.pattern.chunk_length)[:, :, None]
