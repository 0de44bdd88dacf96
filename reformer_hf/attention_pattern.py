# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Which keys a query sees: the one definition, for the parallel pass and for the KV cache."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .device_policy import policy_for


@dataclass(frozen=True)
class AttentionPattern:
    """
    Which keys a query sees.

    Args:
        chunk_length, chunks_before, chunks_after: A query sees its chunk of the order and so many around it.
        causal: Whether it sees no later position.
        include_self: Whether a position is among its own keys. Otherwise one that has no key takes its own value.
        same_bucket: Whether it sees keys of its own bucket only.
        window: Whether it sees `chunk_length * chunks_before` slots before and `chunk_length * chunks_after` after its
            own one, instead of whole chunks. Implies `same_bucket`.
        deduplicate_keys: Whether a key counts in the first round that shows it only.
        ring_multiple: With a multiple of the chunk length, the chunks of all rounds form a ring, in which the first
            chunk is preceded by the last one, and each round is padded to this multiple (in-tree). `None`: no ring.
        ring_min_length: Up to this length a ring is not padded.
    """

    chunk_length: int
    chunks_before: int = 1
    chunks_after: int = 0
    causal: bool = False
    include_self: bool = False
    same_bucket: bool = False
    window: bool = False
    deduplicate_keys: bool = False
    ring_multiple: int | None = None
    ring_min_length: int = 0

    @property
    def wraps(self) -> bool:
        """Whether chunks form a ring."""
        return self.ring_multiple is not None

    def padded_length(self, length: int) -> int:
        """Slots of one round for an input of `length` positions, up to the multiple of a chunk."""
        if not self.wraps or length <= self.ring_min_length:
            return length
        return math.ceil(length / self.ring_multiple) * self.ring_multiple

    def for_length(self, length: int) -> "AttentionPattern":
        """
        The pattern for an input of `length` positions.

        A ring that is no longer than a chunk is one chunk in the order of positions, without hashing (in-tree).
        """
        if not self.wraps or self.padded_length(length) > self.chunk_length:
            return self
        return AttentionPattern(length, chunks_before=0, causal=self.causal, include_self=self.include_self)

    @property
    def window_length(self) -> int:
        """Slots that are looked at for a chunk of queries."""
        return self.chunk_length * (self.chunks_before + 1 + self.chunks_after)

    def for_device(self, device: torch.device) -> "AttentionPattern":
        """
        The same pattern in chunks that cost least on a device.

        What a query of a window sees does not depend on chunks, but it is computed for the keys of all queries of its
        chunk: fewer for shorter chunks, as long as these are worth a matrix product.
        """
        shortest = policy_for(device).window_chunk_length
        if not self.window or shortest is None:
            return self
        chunk_length, parts = self.chunk_length, 1
        while chunk_length > shortest and chunk_length % 2 == 0:
            chunk_length, parts = chunk_length // 2, parts * 2
        return replace(
            self,
            chunk_length=chunk_length,
            chunks_before=self.chunks_before * parts,
            chunks_after=self.chunks_after * parts,
        )

    def seen_slots(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """
        First and last slot that each query may see, `[…, L]` by its own slot.

        All between is visible but what `include_self` forbids and, across buckets, `causal`. `starts` `[…, L]` says
        where buckets begin.
        """
        slots = torch.arange(starts.shape[-1], dtype=torch.int32, device=starts.device)
        own_chunk = slots - slots % self.chunk_length
        first = own_chunk - self.chunk_length * self.chunks_before
        last = own_chunk + self.chunk_length * (1 + self.chunks_after) - 1
        if self.window:
            first = slots - self.chunk_length * self.chunks_before
            last = slots + self.chunk_length * self.chunks_after
        if self.same_bucket or self.window:
            first = torch.maximum(first, torch.where(starts, slots, 0).cummax(-1).values)
            # Within a bucket, slots follow positions.
            last = slots if self.causal else torch.minimum(last, _ends(starts, slots))
        return first.clamp(min=0).expand(starts.shape), last.clamp(max=slots[-1]).expand(starts.shape)


def _ends(starts: Tensor, slots: Tensor) -> Tensor:
    """Last slot of each slot's bucket."""
    is_end = torch.cat([starts[..., 1:], torch.ones_like(starts[..., :1])], dim=-1)
    return torch.where(is_end, slots, slots[-1]).flip(-1).cummin(-1).values.flip(-1)
