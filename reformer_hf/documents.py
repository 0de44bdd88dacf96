# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Packed documents: rows of a batch that hold several documents, which do not see each other.

Attention gives each document the same result as in a row of its own. Tokens sort by document first, then by bucket.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .hashing import sort_by_bucket


@dataclass(frozen=True)
class Documents:
    """
    The documents of a batch `[B, L]`.

    Args:
        starts: `[B, L]`, True at the first position of each document.
        spans: Row, first and last position (exclusive) of each document, in order.
        lengths: Number of tokens of each document, without padding.
    """

    starts: Tensor
    spans: Sequence[tuple[int, int, int]]
    lengths: Sequence[int]

    @classmethod
    def of(cls, starts: Tensor, padding: Tensor | None = None) -> "Documents | None":
        """
        Find the documents; return `None` if each row is one document.

        This reads the positions of the starts, and so waits for the device.

        Args:
            starts: `[B, L]`, True where a document begins. The first position of a row always does.
            padding: `[B, L]`, True for padding.
        """
        batch_size, length = starts.shape
        starts = starts.clone()
        starts[:, 0] = True
        firsts = starts.flatten().nonzero().flatten().tolist()
        if len(firsts) == batch_size:
            return None
        ends = [*firsts[1:], batch_size * length]
        spans = [
            (first // length, first % length, (end - 1) % length + 1) for first, end in zip(firsts, ends, strict=True)
        ]
        lengths = [stop - start for _, start, stop in spans]
        if padding is not None:
            is_token = (~padding).flatten().cpu()
            lengths = [int(tokens.sum()) for tokens in is_token.split(lengths)]
        return cls(starts, spans, lengths)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Documents":
        """Move the tensors to a device."""
        return replace(self, starts=self.starts.to(device, non_blocking=non_blocking))

    @cached_property
    def index(self) -> Tensor:
        """Index of each position's document in its row, `[B, L]` int32."""
        return (self.starts.cumsum(-1) - 1).int()

    def sort(self, padding: Tensor | None) -> Tensor:
        """Sort positions by document, padding last, as `hashing.sort_by_bucket` returns it: `[B, 1, 1, L]`."""
        return sort_by_bucket(self.index[:, None, None], padding)

    def positions(self, padding: Tensor | None) -> Tensor:
        """Count the tokens of each document from 0, `[B, L]`; padding has the position of the token before it."""
        count = torch.ones_like(self.starts, dtype=torch.long) if padding is None else (~padding).long()
        total = count.cumsum(-1)
        before = torch.where(self.starts, total - count, 0).cummax(-1).values
        return (total - before - 1).clamp(min=0)

    def flat_positions(self, spans: Sequence[tuple[int, int, int]]) -> Tensor:
        """Return the positions of some documents as indices into the flattened batch `[B * L]`."""
        length, device = self.starts.shape[1], self.starts.device
        return torch.cat([torch.arange(row * length + a, row * length + b, device=device) for row, a, b in spans])


def starts_by_position(position_ids: Tensor, padding: Tensor | None) -> Tensor:
    """
    Return where documents begin, `[B, L]`: at tokens whose position is not above that of the token before.

    Args:
        position_ids: `[B, L]`.
        padding: `[B, L]`, True for padding, whose positions are ignored.
    """
    if padding is not None:
        indices = torch.arange(position_ids.shape[1], device=position_ids.device)
        latest = torch.where(padding, -1, indices).cummax(-1).values
        # Padding has the position of the token before it, and before the first token a position below all others.
        position_ids = torch.where(latest < 0, -1, position_ids.gather(-1, latest.clamp(min=0)))
    starts = torch.zeros_like(position_ids, dtype=torch.bool)
    torch.le(position_ids[:, 1:], position_ids[:, :-1], out=starts[:, 1:])
    return starts if padding is None else starts & ~padding


def starts_by_index(index: Tensor) -> Tensor:
    """Return where documents begin, given the index of each position's document, `[B, L]`."""
    starts = torch.zeros_like(index, dtype=torch.bool)
    torch.ne(index[:, 1:], index[:, :-1], out=starts[:, 1:])
    return starts


def starts_by_length(cumulative_lengths: Tensor, shape: tuple[int, int]) -> Tensor:
    """
    Return where documents begin, given their cumulative lengths.

    Args:
        cumulative_lengths: `[N + 1]`, from 0 to B * L, of the documents of all rows.
        shape: B and L.
    """
    starts = torch.zeros(shape, dtype=torch.bool, device=cumulative_lengths.device)
    firsts = cumulative_lengths[:-1].long()
    # Lengths of zero repeat a start.
    starts.view(-1).index_fill_(0, firsts[firsts < starts.numel()], True)
    return starts
