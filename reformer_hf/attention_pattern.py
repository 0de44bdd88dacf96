# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Which keys a query sees. The parallel pass and the KV cache share this definition."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .device_policy import policy_for


@dataclass(frozen=True)
class AttentionPattern:
    """
    Define which keys a query sees.

    Args:
        chunk_length: Slots per chunk of the sorted order.
        chunks_before, chunks_after: Number of chunks before and after its own chunk that a query sees.
        causal: Whether a query sees no later positions.
        include_self: Whether a query sees its own key. If False, a query without keys returns its own value.
        same_bucket: Whether a query only sees keys of its own bucket.
        window: Whether a query sees `chunk_length * chunks_before` slots before its own slot and
            `chunk_length * chunks_after` slots after it, instead of whole chunks. Implies `same_bucket`.
        deduplicate_keys: Whether a key that is visible in several rounds only counts in the first of them.
        ring_multiple: If given, a multiple of the chunk length. The chunks of all rounds then form a ring, in which
            the last chunk precedes the first one, and each round is padded to this multiple (in-tree). `None` means
            no ring.
        ring_min_length: A ring is not padded up to this length.
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
        """Whether the chunks form a ring."""
        return self.ring_multiple is not None

    def padded_length(self, length: Any) -> Any:
        """
        Return the slots of one round for an input of `length` positions, before the last chunk is filled up.

        The length may be a tensor, on which no branch may depend.
        """
        return length + (length > self.ring_min_length) * (-length % self.ring_multiple) if self.wraps else length

    def for_length(self, length: int) -> "AttentionPattern":
        """
        Return the pattern for an input of `length` positions.

        A ring that fits into one chunk becomes a single chunk in the order of positions, without hashing (in-tree).
        """
        if not self.wraps or self.padded_length(length) > self.chunk_length:
            return self
        return AttentionPattern(length, chunks_before=0, causal=self.causal, include_self=self.include_self)

    @property
    def window_length(self) -> int:
        """Number of slots in the window of a chunk of queries."""
        return self.chunk_length * (self.chunks_before + 1 + self.chunks_after)

    def for_device(self, device: torch.device) -> "AttentionPattern":
        """
        Return the same pattern with the chunk length that is fastest on a device.

        In a `window` pattern the visible keys do not depend on the chunk length. But each query is scored against the
        keys of all queries of its chunk: shorter chunks waste fewer scores, down to the shortest chunk that still
        makes an efficient matrix product.
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

    def with_wider_windows(self) -> "AttentionPattern":
        """Return a pattern whose windows also hold the keys of queries whose chunks begin at any slot."""
        if self.window:
            return self
        # Within a bucket, a causal query sees no later slots.
        chunks_after = self.chunks_after + (0 if self.causal and self.same_bucket else 1)
        return replace(self, chunks_before=self.chunks_before + 1, chunks_after=chunks_after)

    def seen_slots(self, starts: Tensor, document_starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Return the first and the last slot that each query may see, both `[…, L]` and indexed by the query's own slot.

        All slots between them are visible, except those that `include_self` or, across buckets, `causal` excludes.

        Args:
            starts: `[…, L]`, True where a bucket begins.
            document_starts: `[…, L]`, True where a document begins, if there are several. A query only sees its own
                document, whose first slot begins a chunk.
        """
        slots = torch.arange(starts.shape[-1], dtype=torch.int32, device=starts.device)
        before, after = (self.chunk_length * chunks for chunks in (self.chunks_before, self.chunks_after))
        origin = None if document_starts is None else _starts(document_starts, slots)
        if self.window:
            first, last = slots - before, slots + after
        else:
            own_chunk = slots - (slots if origin is None else slots - origin) % self.chunk_length
            first, last = own_chunk - before, own_chunk + (self.chunk_length + after - 1)
        if self.same_bucket or self.window:
            first = torch.maximum(first, _starts(starts, slots))
            # Within a bucket, slots are in the order of positions.
            last = slots if self.causal else torch.minimum(last, _ends(starts, slots))
        elif origin is not None:
            first = torch.maximum(first, origin)
            last = torch.minimum(last, _ends(document_starts, slots))
        else:
            first, last = first.clamp(min=0), last.clamp(max=starts.shape[-1] - 1)
        return first.expand(starts.shape), last.expand(starts.shape)


def _starts(starts: Tensor, slots: Tensor) -> Tensor:
    """Return the first slot of each slot's bucket."""
    return torch.where(starts, slots, 0).cummax(-1).values


def _ends(starts: Tensor, slots: Tensor) -> Tensor:
    """Return the last slot of each slot's bucket."""
    is_end = torch.cat([starts[..., 1:], torch.ones_like(starts[..., :1])], dim=-1)
    return torch.where(is_end, slots, slots[-1]).flip(-1).cummin(-1).values.flip(-1)
