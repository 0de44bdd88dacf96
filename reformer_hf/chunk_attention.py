# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Attention within chunks of a sorted order: the one operation under local and LSH attention.

Positions are laid out, round by round, in *slots*: the order given, padded to a multiple of the chunk length, with
the chunks that the first and last ones look at added on both sides. A query sees keys of the *window* of its chunk,
`chunks_before + 1 + chunks_after` chunks, as far as the pattern lets it. Work goes in *slabs*, some heads times some
chunks, so that nothing of the size of all scores exists; rounds are merged as they come.

Shapes: B batch, L length, H heads, D size of queries and keys, E size of values, R rounds; within a slab g heads of
any batch row, n chunks, C chunk length, W window length, S = slots. A *row* is a (batch, position, head).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

# Scores that exist at a time: few enough for the cache of a CPU, many enough to fill a GPU.
_SLAB_SCORES = {"cpu": 1 << 19, "cuda": 1 << 26}

# Position of a slot that no query may see: after every real one.
_NOWHERE = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class AttentionPattern:
    """
    Which keys a query sees.

    Args:
        chunk_length, chunks_before, chunks_after: A query sees its chunk of the order and so many around it.
        causal: Whether it sees no later position.
        sees_itself: Whether a position is among its own keys. Otherwise one that has no key takes its own value.
        same_bucket: Whether it sees keys of its own bucket only.
        window: Whether it sees `chunk_length * chunks_before` slots before and `chunk_length * chunks_after` after its
            own one, instead of whole chunks. Implies `same_bucket`.
        each_key_once: Whether a key counts in the first round that shows it only.
        ring_length: Length to which the order of a round is padded to close the chunks of all rounds to a ring, in
            which the first chunk looks back at the last one. A multiple of the chunk length; `None` for no ring.
    """

    chunk_length: int
    chunks_before: int = 1
    chunks_after: int = 0
    causal: bool = False
    sees_itself: bool = False
    same_bucket: bool = False
    window: bool = False
    each_key_once: bool = False
    ring_length: int | None = None

    @property
    def window_length(self) -> int:
        """Slots that are looked at for a chunk of queries."""
        return self.chunk_length * (self.chunks_before + 1 + self.chunks_after)

    @property
    def reach(self) -> tuple[int, int]:
        """How far a query sees before and after itself, in the unit of codes: slots or chunks."""
        unit = self.chunk_length if self.window else 1
        return unit * self.chunks_before, unit * self.chunks_after

    @property
    def needs_codes(self) -> bool:
        """Whether positions do not suffice to tell who sees whom."""
        return self.same_bucket or self.window or self.each_key_once

    def codes(self, starts: Tensor) -> Tensor:
        """
        Codes of sorted slots, such that one slot sees another only if its code is within `reach` of the other's.

        The slot (or its chunk's number) is spread apart by more than the reach wherever a bucket begins. `starts`
        says where that is, along the last axis.
        """
        slots = torch.arange(starts.shape[-1], dtype=torch.int32, device=starts.device)
        codes = slots if self.window else slots.div(self.chunk_length, rounding_mode="floor")
        if not (self.same_bucket or self.window):
            return codes.expand(starts.shape)
        return codes + (max(self.reach) + 1) * starts.cumsum(-1, dtype=torch.int32)


def chunk_attention(
    query_BLHD: Tensor,
    key_BLHD: Tensor,
    value_BLHE: Tensor,
    pattern: AttentionPattern,
    order: Tensor | None = None,
    padding_BL: Tensor | None = None,
    dropout: float = 0.0,
    dropout_seed: int = 0,
) -> Tensor:
    """
    Attend within chunks; one softmax over the keys of all rounds.

    Queries meet keys as they are: any scale is part of one of them.

    Args:
        query_BLHD, key_BLHD, value_BLHE: All of one floating dtype.
        pattern: Which keys a query sees.
        order: The order of each round as `hashing.sort_by_bucket` returns it, `[B or 1, H or 1, R, L]`. `None` stands
            for one round in the order of positions.
        padding_BL: True where there is padding, which no query sees. Outputs there mean nothing.
        dropout: Rate at which attention weights are dropped. The value that a position without a key takes is kept.
        dropout_seed: Seed of the generator that draws what is dropped.

    Returns:
        `[B, L, H, E]` in the dtype of the values. Rows without a key are their own value, or zero where a position
        that is not padding would see itself.
    """
    return _ChunkAttention.apply(query_BLHD, key_BLHD, value_BLHE, pattern, order, padding_BL, dropout, dropout_seed)


def chunk_attention_weights(
    query_BLHD: Tensor,
    key_BLHD: Tensor,
    pattern: AttentionPattern,
    order: Tensor | None = None,
    padding_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """
    The weights that `chunk_attention` gives to keys, before dropout, and the positions of those keys.

    Returns:
        `weights` and `positions` (int32), both `[B, H, R, L, W]`, where W is the window's length. Positions are -1
        where a query does not see what is there. The weights of a query sum to 1 over R and W.
    """
    with torch.no_grad(), torch.autocast(query_BLHD.device.type, enabled=False):
        layout = _Layout(pattern, order, padding_BL, query_BLHD)
        _, lse = _forward(query_BLHD, key_BLHD, key_BLHD[..., :1], layout, None)
        query, key = _rows(query_BLHD), _rows(key_BLHD)
        size = (layout.num_rounds, layout.num_rows + 1, pattern.window_length)
        weights = lse.new_zeros(size)
        positions = torch.full(size, -1, dtype=torch.int32, device=lse.device)
        offsets = torch.arange(pattern.chunk_length, device=lse.device)
        itself = (..., offsets, offsets + pattern.chunk_length * pattern.chunks_before)
        for slab in layout:
            scores = _scores(slab.queries_of(query), slab.windows_of(key), slab.visible)
            slab_lse = lse[slab.query_rows]
            slab_weights = torch.exp(scores - slab_lse[..., None])
            slab_positions = slab.key_positions.unfold(1, pattern.window_length, pattern.chunk_length)[:, :, None, :]
            slab_positions = torch.where(slab.visible, slab_positions, -1)
            if slab.round == 0 and not pattern.sees_itself:
                alone = slab_lse == math.inf
                slab_weights[itself] = torch.where(alone, 1.0, slab_weights[itself])
                slab_positions[itself] = torch.where(alone, slab.query_positions, slab_positions[itself])
            rows = slab.query_rows.flatten()
            weights[slab.round].index_copy_(0, rows, slab_weights.flatten(0, 2))
            positions[slab.round].index_copy_(0, rows, slab_positions.flatten(0, 2))
    batch_size, length, num_heads, _ = query_BLHD.shape
    shape = (layout.num_rounds, batch_size, length, num_heads, -1)
    weights, positions = (x[:, :-1].reshape(shape).permute(1, 3, 0, 2, 4) for x in (weights, positions))
    return weights, positions


class _ChunkAttention(torch.autograd.Function):
    """Keeps inputs, the order, the merged output and the merged logsumexp; nothing of the size of the scores."""

    @staticmethod
    def forward(ctx, query, key, value, pattern, order, padding, dropout, dropout_seed):
        with torch.autocast(query.device.type, enabled=False):
            layout = _Layout(pattern, order, padding, query)
            out, lse = _forward(query, key, value, layout, _Dropout.of(dropout, dropout_seed, query.device))
        ctx.save_for_backward(query, key, value, out, lse, order, padding)
        ctx.pattern, ctx.dropout, ctx.dropout_seed = pattern, dropout, dropout_seed
        return out

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, out, lse, order, padding = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            layout = _Layout(ctx.pattern, order, padding, query)
            drop = _Dropout.of(ctx.dropout, ctx.dropout_seed, query.device)
            grads = _backward(query, key, value, out, lse, grad_out, layout, drop)
        return *grads, None, None, None, None, None


class _Dropout:
    """What to keep of the attention weights, slab by slab, the same for the same seed."""

    def __init__(self, rate: float, seed: int, device: torch.device):
        self._keep_rate = 1.0 - rate
        self._generator = torch.Generator(device).manual_seed(seed)

    @classmethod
    def of(cls, rate: float, seed: int, device: torch.device) -> "_Dropout | None":
        return cls(rate, seed, device) if rate > 0 else None

    def __call__(self, weights: Tensor) -> Tensor:
        """Factors of the weights: zero, or the inverse of the rate at which they are kept."""
        keep = torch.empty_like(weights).bernoulli_(self._keep_rate, generator=self._generator)
        return keep.div_(self._keep_rate)


@dataclass
class _Slab:
    """Some heads times some chunks of one round."""

    pattern: AttentionPattern
    round: int
    # [g, n, C]: rows of the queries, the row after the last where a slot is empty; and their positions.
    query_rows: Tensor
    query_positions: Tensor
    # [g, S]: rows of the keys, any where a slot is empty; and their positions, `_NOWHERE` where no query may look.
    key_rows: Tensor
    key_positions: Tensor
    # [g, n, C, W]
    visible: Tensor

    def queries_of(self, rows: Tensor) -> Tensor:
        """`[g, n, C, D]` of rows `[B * L * H, D]`."""
        # Empty slots read any row; what comes of it is written to none.
        index = self.query_rows.clamp(max=rows.shape[0] - 1)
        return rows.index_select(0, index.flatten()).unflatten(0, index.shape)

    def windows_of(self, rows: Tensor) -> Tensor:
        """`[g, n, W, D]` of rows `[B * L * H, D]`; windows of neighbours overlap in memory."""
        slots = rows.index_select(0, self.key_rows.flatten()).unflatten(0, self.key_rows.shape)
        return slots.unfold(1, self.pattern.window_length, self.pattern.chunk_length).transpose(-1, -2)

    def add_windows(self, rows: Tensor, windows: Tensor) -> None:
        """Add `[g, n, W, D]` to rows `[B * L * H, D]`: the transpose of `windows_of`."""
        (heads, num_chunks, _, size), chunk_length = windows.shape, self.pattern.chunk_length
        slots = windows.new_zeros(heads, self.key_rows.shape[1] // chunk_length, chunk_length, size)
        for offset, part in enumerate(windows.split(chunk_length, dim=2)):
            slots[:, offset : offset + num_chunks] += part
        rows.index_add_(0, self.key_rows.flatten(), slots.view(-1, size).to(rows.dtype))


class _Layout:
    """Iterates over the slabs of an input, heads outermost, then rounds, then chunks."""

    def __init__(self, pattern: AttentionPattern, order: Tensor | None, padding_BL: Tensor | None, query: Tensor):
        self.pattern = pattern
        self.batch_size, self.length, self.num_heads, _ = query.shape
        self.device = query.device
        if order is None:
            order = torch.arange(self.length, dtype=torch.int32, device=self.device)[None, None, None]
        self.num_rounds = order.shape[2]
        self.num_rows = self.batch_size * self.length * self.num_heads
        self._order = order.expand(self.batch_size, self.num_heads, -1, -1)
        self._padding_BL = padding_BL
        self.num_chunks = math.ceil((pattern.ring_length or self.length) / pattern.chunk_length)
        scores_per_chunk = pattern.chunk_length * pattern.window_length
        slab_scores = _SLAB_SCORES.get(self.device.type, _SLAB_SCORES["cuda"])
        self._chunks_per_slab = min(max(slab_scores // scores_per_chunk, 1), self.num_chunks)
        self._heads_per_slab = max(slab_scores // (scores_per_chunk * self.num_chunks), 1)

    def __iter__(self) -> Iterator[_Slab]:
        groups = torch.arange(self.batch_size * self.num_heads, device=self.device).split(self._heads_per_slab)
        for group in groups:
            yield from self._slabs_of_heads(group)

    def _slabs_of_heads(self, group: Tensor) -> Iterator[_Slab]:
        pattern = self.pattern
        batch_rows, heads = group.div(self.num_heads, rounding_mode="floor"), group % self.num_heads
        order = self._order[batch_rows, heads]
        starts = order < 0
        positions = torch.where(starts, ~order, order)
        first_rows = (batch_rows * self.length * self.num_heads + heads)[:, None]
        visible_positions = positions
        if self._padding_BL is not None:
            padding = self._padding_BL[batch_rows][:, None].expand(positions.shape)
            visible_positions = positions.masked_fill(padding.gather(-1, positions.long()), _NOWHERE)
        codes = pattern.codes(starts) if pattern.needs_codes else None
        earlier_codes: list[Tensor] = []
        for round in range(self.num_rounds):
            round_positions = self._slots(positions, round, -1)
            round_visible = self._slots(visible_positions, round, _NOWHERE)
            round_codes = None if codes is None else self._slots(codes, round, 0)
            at_slots = [code.gather(-1, round_positions.clamp(min=0).long()) for code in earlier_codes]
            for first in range(0, self.num_chunks, self._chunks_per_slab):
                last = min(first + self._chunks_per_slab, self.num_chunks)
                yield self._slab(round, first, last, first_rows, round_positions, round_visible, round_codes, at_slots)
            if pattern.each_key_once and round + 1 < self.num_rounds:
                by_position = torch.empty_like(codes[:, round])
                earlier_codes.append(by_position.scatter_(-1, positions[:, round].long(), codes[:, round]))

    def _slots(self, sorted_gRL: Tensor, round: int, empty: int) -> Tensor:
        """`[g, S]` of one round: its chunks and those that they look at beyond the ends, `empty` in empty slots."""
        pattern = self.pattern
        chunk_length, before, after = pattern.chunk_length, pattern.chunks_before, pattern.chunks_after
        filled = self.num_chunks * chunk_length - self.length
        if pattern.ring_length is None:
            margins = (before * chunk_length, after * chunk_length + filled)
            return pad(sorted_gRL[:, round], margins, value=empty)
        ring = pad(sorted_gRL, (0, filled), value=empty).view(sorted_gRL.shape[0], -1, chunk_length)
        first = round * self.num_chunks
        chunks = torch.arange(first - before, first + self.num_chunks + after, device=self.device)
        return ring.index_select(1, chunks % ring.shape[1]).flatten(1)

    def _slab(self, round, first, last, first_rows, positions, visible_positions, codes, earlier_codes) -> _Slab:
        pattern, chunk_length = self.pattern, self.pattern.chunk_length
        own = slice(first + pattern.chunks_before, last + pattern.chunks_before)
        window = slice(first * chunk_length, (last + pattern.chunks_before + pattern.chunks_after) * chunk_length)

        def queries(slots: Tensor) -> Tensor:
            return slots.unflatten(1, (-1, chunk_length))[:, own]

        def windows(slots: Tensor) -> Tensor:
            return slots[:, window].unfold(1, pattern.window_length, chunk_length)[:, :, None, :]

        def within_reach(slots: Tensor) -> Tensor:
            behind, ahead = pattern.reach
            distance = queries(slots)[..., None] - windows(slots)
            return (distance >= -ahead).logical_and_(distance <= behind)

        query_positions, key_positions = queries(positions), windows(visible_positions)
        if pattern.causal:
            compare = torch.le if pattern.sees_itself else torch.lt
            visible = compare(key_positions, query_positions[..., None])
        else:
            visible = (key_positions < _NOWHERE).expand(-1, -1, chunk_length, -1)
            if not pattern.sees_itself:
                visible = visible & (key_positions != query_positions[..., None])
        if pattern.same_bucket or pattern.window:
            visible = visible & within_reach(codes)
        for slots in earlier_codes:
            visible = visible & ~within_reach(slots)

        rows = first_rows + self.num_heads * positions
        key_slots = positions[:, window]
        return _Slab(
            pattern=pattern,
            round=round,
            query_rows=torch.where(query_positions < 0, self.num_rows, queries(rows)),
            query_positions=query_positions,
            key_rows=torch.where(key_slots < 0, first_rows, rows[:, window]),
            key_positions=visible_positions[:, window],
            visible=visible,
        )


def _forward(query, key, value, layout: _Layout, drop: _Dropout | None) -> tuple[Tensor, Tensor]:
    """Output `[B, L, H, E]`, and logsumexp of all rows and one more, infinite where a row has no key."""
    query, key, value_rows = _rows(query), _rows(key), _rows(value)
    dtype = torch.promote_types(value.dtype, torch.float32)
    # One row more than there are takes what is computed for empty slots.
    out = torch.empty((layout.num_rows + 1, value_rows.shape[1]), dtype=dtype, device=value.device)
    lse = torch.empty(layout.num_rows + 1, dtype=dtype, device=value.device)
    for slab in layout:
        slab_out, slab_lse = _attend(
            slab.queries_of(query), slab.windows_of(key), slab.windows_of(value_rows), slab, drop
        )
        rows, slab_out, slab_lse = slab.query_rows.flatten(), slab_out.flatten(0, 2), slab_lse.flatten()
        if slab.round > 0:
            slab_out, slab_lse = _merge(out.index_select(0, rows), lse.index_select(0, rows), slab_out, slab_lse)
        out.index_copy_(0, rows, slab_out)
        lse.index_copy_(0, rows, slab_lse)
    out, alone = out[:-1], lse[:-1] == -math.inf
    if not layout.pattern.sees_itself:
        out = torch.where(alone[:, None], value_rows, out)
    lse[:-1].masked_fill_(alone, math.inf)
    lse[-1] = math.inf
    return out.to(value.dtype).view(value.shape), lse


def _backward(query, key, value, out, lse, grad_out, layout: _Layout, drop: _Dropout | None) -> list[Tensor]:
    """
    Gradients of queries, keys and values.

    The gradient of a softmax over the keys of all rounds is, for each slab, that of a softmax whose output and
    logsumexp are the merged ones (Dao et al. 2022, algorithm 4, with several passes over the keys).
    """
    inputs = [_rows(x) for x in (query, key, value)]
    grad_rows = _rows(grad_out)
    dtype = torch.promote_types(value.dtype, torch.float32)
    delta = torch.linalg.vecdot(grad_rows.to(dtype), _rows(out).to(dtype))
    grads = [torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in inputs]
    if not layout.pattern.sees_itself:
        grads[2] += torch.where((lse[:-1] == math.inf)[:, None], grad_rows, 0)
    for slab in layout:
        pieces = _attend_backward(
            slab.queries_of(inputs[0]),
            slab.windows_of(inputs[1]),
            slab.windows_of(inputs[2]),
            slab.queries_of(grad_rows),
            lse[slab.query_rows],
            slab.queries_of(delta),
            slab,
            drop,
        )
        rows = slab.query_rows.flatten().clamp(max=layout.num_rows - 1)
        grads[0].index_add_(0, rows, pieces[0].flatten(0, 2).to(dtype))
        slab.add_windows(grads[1], pieces[1])
        slab.add_windows(grads[2], pieces[2])
    return [grad.to(x.dtype).view(x.shape) for grad, x in zip(grads, (query, key, value), strict=True)]


def _rows(x_BLHD: Tensor) -> Tensor:
    return x_BLHD.reshape(-1, x_BLHD.shape[-1])


def _scores(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    scores = torch.matmul(query, key.transpose(-1, -2))
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill_(~visible, -math.inf)


def _attend(query, key, value, slab: _Slab, drop: _Dropout | None) -> tuple[Tensor, Tensor]:
    """Output `[g, n, C, E]` and logsumexp `[g, n, C]` of one slab; zero and -inf where a query has no key."""
    scores = _scores(query, key, slab.visible)
    peak = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = total.log().add_(peak).squeeze(-1)
    weights.div_(total.clamp_(min=torch.finfo(total.dtype).tiny))
    if drop is not None:
        weights.mul_(drop(weights))
    return torch.matmul(weights.to(value.dtype), value).to(weights.dtype), lse


def _attend_backward(
    query, key, value, grad_out, lse, delta, slab: _Slab, drop: _Dropout | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries `[g, n, C, D]`, keys and values `[g, n, W, D or E]` of one slab."""
    weights = _scores(query, key, slab.visible).sub_(lse[..., None]).exp_()
    grad_weights = torch.matmul(grad_out, value.transpose(-1, -2)).to(weights.dtype)
    kept = weights
    if drop is not None:
        factors = drop(weights)
        kept = weights * factors
        grad_weights.mul_(factors)
    grad_value = torch.matmul(kept.transpose(-1, -2).to(value.dtype), grad_out)
    grad_scores = weights.mul_(grad_weights.sub_(delta[..., None])).to(query.dtype)
    return torch.matmul(grad_scores, key), torch.matmul(grad_scores.transpose(-1, -2), query), grad_value


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of two."""
    lse = torch.logaddexp(lse_a, lse_b)
    finite = lse.clamp(min=torch.finfo(lse.dtype).min)
    share_a, share_b = (torch.exp(part - finite)[:, None] for part in (lse_a, lse_b))
    return out_a * share_a + out_b * share_b, lse
