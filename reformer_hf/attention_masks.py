# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Additive attention masks: which keys are visible to a query.

A mask is the minimum of several *mask margins* and zero. A margin is a difference of slots or positions that is
positive where a key is visible and negative where it is masked. Margins are scaled by a power of two, which keeps them
exact. A margin takes two vector operations and no boolean temporaries.

Shapes: g heads of any batch row, R rounds, L length, n chunks, C chunk length, W window length, S slots; see
`attention_slots`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .attention_kernels import MASKED
from .attention_pattern import AttentionPattern
from .attention_slots import SlotLayout
from .hashing import invert_order

# The mask margin of one slot.
_UNIT = -MASKED

# Halves and quarters of a slot must be exact in fp32.
MAX_LENGTH = 1 << 22


def is_interval(pattern: AttentionPattern, has_order: bool, has_padding: bool) -> bool:
    """Return whether the visible keys of each query are an interval of slots, so that masks need no positions."""
    if pattern.wraps:
        return False
    in_bucket = pattern.same_bucket and (has_order or not has_padding)
    of_chunks = not has_padding and not (has_order and pattern.causal)
    return pattern.window or in_bucket or of_chunks


@dataclass
class MaskMargin:
    """
    A margin `keys - queries` or, with a radius, `radius - |keys - queries|`.

    `masks_within` negates the latter, which masks the keys within the radius.
    """

    queries: Tensor  # [g, n, C, 1]
    keys: Tensor  # [g, n, 1, W]
    radius: Tensor | None = None  # [g, n, C, 1]
    masks_within: bool = False

    def write(self, chunks: slice, out: Tensor) -> None:
        """Write the margins of some of the chunks to `out` `[g, n, C, W]`."""
        torch.sub(self.keys[:, chunks], self.queries[:, chunks], out=out)
        if self.radius is not None and self.masks_within:
            out.abs_().sub_(self.radius[:, chunks])
        elif self.radius is not None:
            torch.sub(self.radius[:, chunks], out.abs_(), out=out)


@dataclass
class SortedHeads:
    """
    The sorted order of some heads, in tensors `[g, R, L]` that are indexed by slot.

    Args:
        positions: Positions (int32).
        starts: True where a bucket begins.
        padding: True for padding; `None` if there is none.
        document_starts: True where a document begins, `[g, 1, L]`; `None` if there is one.
    """

    positions: Tensor
    starts: Tensor
    padding: Tensor | None
    document_starts: Tensor | None = None


@dataclass
class _VisibleBefore:
    """For each position `[g, L]`, its slot in an earlier round, and the first and last slots that it saw there."""

    slots: Tensor
    first: Tensor
    last: Tensor


class MaskMargins:
    """
    Compute the mask margins of an input.

    Args:
        layout: The slots of the input.
        pattern: Which keys a query sees. Its windows may be smaller than those of the layout.
        interval: The result of `is_interval` for the input.
        dtype: The dtype of masks, at least fp32.
        device: The device of masks.
    """

    def __init__(
        self, layout: SlotLayout, pattern: AttentionPattern, interval: bool, dtype: torch.dtype, device: torch.device
    ):
        self.layout = layout
        self.pattern = pattern
        self.interval = interval
        self.dtype = dtype
        self.device = device

    def of_rounds(self, heads: SortedHeads) -> Iterator[list[MaskMargin]]:
        """Yield the margins of some heads for each round: those of the pattern, and those of deduplication."""
        num_rounds = heads.positions.shape[1]
        deduplicates = self.pattern.deduplicate_keys and num_rounds > 1
        has_documents = heads.document_starts is not None
        needs_slots = self.interval or deduplicates or has_documents
        seen = self.pattern.seen_slots(heads.starts, heads.document_starts) if needs_slots else ()
        before: list[_VisibleBefore] = []
        for round in range(num_rounds):
            seen_in_round = [slots[:, round] for slots in seen]
            margins = [] if self.interval else self._by_position(heads, round)
            if self.interval or has_documents:
                margins.append(self._in_interval(*seen_in_round))
            yield margins + [self._not_visible_before(x, heads.positions[:, round]) for x in before]
            if deduplicates and round + 1 < num_rounds:
                before.append(self._visible_in(heads.positions[:, round], *seen_in_round))

    def static_mask(self) -> Tensor:
        """Return the part of the mask that only depends on the index in the window, `[C, W]`, or `[1, 1]` if none."""
        pattern = self.layout.pattern
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        masked = torch.full((pattern.chunk_length, pattern.window_length), -_UNIT, **options)
        # The diagonal of the queries themselves.
        own = pattern.chunk_length * pattern.chunks_before
        if self.interval and pattern.causal:
            return masked.triu_(own + pattern.include_self)
        if not pattern.wraps and not pattern.include_self:
            return masked.triu_(own).tril_(own)
        return torch.zeros((1, 1), **options)

    def _in_interval(self, first: Tensor, last: Tensor) -> MaskMargin:
        """Return the margin of the keys from slot `first` to `last`, both `[g, L]` and indexed by the query's slot."""
        first = first - self._window_starts
        if self.pattern.causal and self.interval:
            # The static mask excludes the slots after the interval.
            return MaskMargin(self.layout.queries(self._scaled(first) - 0.5 * _UNIT), self._window_indices)
        middle, radius = self._middle_and_radius(first, last - self._window_starts)
        return MaskMargin(middle, self._window_indices, radius)

    def _by_position(self, heads: SortedHeads, round: int) -> list[MaskMargin]:
        """
        Return the margins that compare positions.

        They mask padding and empty slots, later positions if causal, and in a ring, where a window may hold a position
        twice, the query itself.
        """
        pattern, layout = self.pattern, self.layout
        beyond_all = float(2 * MAX_LENGTH) * _UNIT
        positions = self._scaled(heads.positions)
        keys = positions if heads.padding is None else positions.masked_fill(heads.padding, beyond_all)
        queries = layout.queries(positions[:, round])
        keys = layout.windows(layout.slots(keys, round, beyond_all))
        if pattern.causal:
            return [MaskMargin(-queries + (-0.5 if pattern.include_self else 0.5) * _UNIT, -keys)]
        margins = [MaskMargin(torch.full_like(queries, -MAX_LENGTH * _UNIT), -keys)]
        if pattern.wraps and not pattern.include_self:
            margins.append(MaskMargin(queries, keys, torch.full_like(queries, 0.5 * _UNIT), masks_within=True))
        return margins

    @cached_property
    def _window_starts(self) -> Tensor:
        """First slot of each query's window, `[L]`, indexed by slot; negative before the first slot of the round."""
        slots = torch.arange(self.layout.length, dtype=torch.int32, device=self.device)
        chunk_length, chunks_before = self.pattern.chunk_length, self.layout.pattern.chunks_before
        return slots - slots % chunk_length - chunk_length * chunks_before

    @cached_property
    def _window_indices(self) -> Tensor:
        """Index of each key in its window, `[1, n, 1, W]`."""
        indices = self._scaled(torch.arange(self.layout.pattern.window_length, device=self.device))
        return indices.expand(1, self.layout.num_chunks, 1, -1)

    def _visible_in(self, positions: Tensor, first: Tensor, last: Tensor) -> _VisibleBefore:
        """Index the first and last visible slots of one round by position; all arguments are `[g, L]` by slot."""
        slots = invert_order(positions)
        index = slots.long()
        return _VisibleBefore(slots, first.gather(-1, index), last.gather(-1, index))

    def _not_visible_before(self, before: _VisibleBefore, positions: Tensor) -> MaskMargin:
        """Return the margin that masks the keys that the query saw in an earlier round."""
        slots, first, last = (x.gather(-1, positions.long()) for x in (before.slots, before.first, before.last))
        middle, radius = self._middle_and_radius(first, last)
        keys = self.layout.windows(self.layout.slots(self._scaled(slots)[:, None], 0, 0.0))
        return MaskMargin(middle, keys, radius, masks_within=True)

    def _middle_and_radius(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Return the middle and the radius of the interval of slots from `first` to `last`, both included."""
        middle = self._scaled(first + last) / 2
        radius = self._scaled(last - first) / 2 + 0.25 * _UNIT
        return self.layout.queries(middle), self.layout.queries(radius)

    def _scaled(self, numbers: Tensor) -> Tensor:
        return numbers.to(self.dtype) * _UNIT


class MaskBuffers:
    """Compute masks from margins. All masks share memory: use one before computing the next."""

    def __init__(self, static_mask: Tensor):
        self._static_mask = static_mask
        self._buffers: dict[tuple, Tensor] = {}

    def mask(self, margins: list[MaskMargin], chunks: slice, shape: tuple[int, int, int, int]) -> Tensor:
        """Return the mask `[g, n, C, W]` of some of the chunks: 0 for visible keys, very negative for masked ones."""
        mask = self._buffer("mask", shape)
        margins[0].write(chunks, mask)
        for margin in margins[1:]:
            other = self._buffer("other", shape)
            margin.write(chunks, other)
            torch.minimum(mask, other, out=mask)
        return torch.minimum(mask, self._static_mask, out=mask)

    def _buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if (name, shape) not in self._buffers:
            self._buffers[name, shape] = self._static_mask.new_empty(shape)
        return self._buffers[name, shape]
