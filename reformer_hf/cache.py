# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Decoding state: what a causal model keeps of the tokens it has seen, as layers of the caches of Transformers.

Every layer holds a table of keys beside values `[B, rows, H, 2 * D]`, and knows which rows a new token attends to:

* a local layer keeps the last chunks, row by row in a ring;
* a full layer keeps everything;
* an LSH layer keeps, for each round, head and bucket, a ring of the rows that hold the last positions of that bucket.
  What no ring holds any more is dropped when the table is full, so that the state is bounded.

`DynamicCache(config=…)` makes layers that grow as they need, `StaticCache(config=…, max_cache_len=…)` layers of a fixed
shape, for `torch.compile`.

Shapes: B batch, n new tokens, H heads, D head size, R rounds, N buckets (bucket N holds padding), M length of a ring.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin

from .hashing import both_signs, hash_few, invert_order, sort_by_bucket, unpack_order

# Attention weights and the positions of their keys.
Weights = tuple[Tensor, Tensor]

# What rings hold beyond what a token attends to: so many tokens can be taken in one step, or back by `crop`.
SLACK = 64

# Of a table that grows, the least number of rows to add.
_MIN_ROWS_ADDED = 64


def _in_mode_of_table(method: Callable) -> Callable:
    """Run a method that writes to or makes tensors as those of the state were made: in inference mode or not."""

    @wraps(method)
    def run(self, *args, **kwargs):
        if not self.is_initialized or torch.compiler.is_compiling():
            return method(self, *args, **kwargs)
        with torch.inference_mode(self.table.is_inference()), torch.no_grad():
            return method(self, *args, **kwargs)

    return run


@dataclass(frozen=True)
class Places:
    """
    Where tokens stand in the table.

    Args:
        write: Rows `[B * n]` of the new tokens.
        read: What the new tokens attend to, in the form that their layer wants; `None` for nothing.
        hidden: Which of what is read each of them does not see; `None` for nothing.
        heads: Whose keys and values are written, by default all.
        columns: Of the new tokens, `[B * n]`, where the layer keeps them.
    """

    write: Tensor
    read: Tensor | int | None = None
    hidden: Tensor | None = None
    heads: slice | None = None
    columns: Tensor | None = None


@dataclass(frozen=True)
class Past:
    """
    What was before the new tokens, for a parallel pass over both.

    Args:
        key, value: `[B, T, h, D]`.
        hidden: `[B, T]`, what is not to be seen.
        columns: `[B, 1 or h, T]`, int32.
        absent: `[B, T]`, what is not there at all; `None` for nothing.
        buckets: `[B, h, R, T]` in LSH layers, N for padding.
    """

    key: Tensor
    value: Tensor
    hidden: Tensor
    columns: Tensor
    absent: Tensor | None = None
    buckets: Tensor | None = None

    def before(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Queries, keys and values of past and new tokens `[B, T + n, h, D]`, and padding; no past token asks."""
        inputs = (torch.zeros_like(self.key), query), (self.key, key), (self.value, value)
        query, key, value = (torch.cat([old.to(new.dtype), new], dim=1) for old, new in inputs)
        return (query, key, value), with_past(self.hidden, padding, query.shape[1])

    def cut(self, out: Tensor, weights: Weights | None, length: int) -> tuple[Tensor, Weights | None]:
        """Outputs and attention weights of the new tokens alone, with columns for positions."""
        num_past = self.key.shape[1]
        out = out[:, num_past:]
        if weights is None:
            return out, None
        values, positions = (x[:, :, :, num_past:] for x in weights)
        columns = torch.arange(out.shape[1], dtype=torch.int32, device=out.device) + length
        columns = torch.cat([self.columns, columns.expand(*self.columns.shape[:-1], -1)], dim=-1)
        columns = columns[:, :, None, None].expand(*positions.shape[:-1], -1)
        seen = columns.gather(-1, positions.clamp(min=0).long())
        return out, (values, torch.where(positions < 0, positions, seen))


def with_past(past: Tensor, new: Tensor | None, length: int) -> Tensor:
    """Flags `[B, length]` of past and new tokens; `None` for no new one."""
    if new is None:
        return pad(past, (0, length - past.shape[1]))
    return torch.cat([past, new], dim=1)


@dataclass(frozen=True)
class Geometry:
    """What a state is made for."""

    num_heads: int
    head_size: int


class StateLayer(CacheLayerMixin):
    """
    What the states of all kinds of attention share.

    A token is a *column* of the input, padding included. `length` counts columns, `num_tokens` `[B]` those that are
    not padding.

    Args:
        max_cache_len (`int`, *optional*): Columns that fit; tensors then have a fixed shape. `None` lets them grow.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False
    # Names of the tensors, which have the batch on their first axis.
    tensors: tuple[str, ...] = ("table", "num_tokens")

    def __init__(self, max_cache_len: int | None = None, **kwargs):
        # Not that of the base class, whose keys and values are views here.
        self.max_cache_len = max_cache_len
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        for name in self.tensors:
            setattr(self, name, None)
        self.is_initialized = self.has_tokens = self._offloaded = False
        self.geometry: Geometry | None = None
        self.length: int | Tensor = 0
        # The layers of all of the model, which are cropped together or not at all.
        self.peers: list[StateLayer] = [self]
        self._longest = self._last_kept = 0
        # For which model and options the state was found to fit.
        self.checked_by: tuple | None = None
        self._table_changed()

    def _table_changed(self) -> None:
        """Forget what follows from the table and the batch."""
        self._rows: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """The table as `[B * rows, H, 2 * D]`."""
        if self.is_compileable:
            # Two inputs of compiled code that share memory would be copied.
            return self.table.flatten(0, 1)
        if self._rows is None:
            self._rows = self.table.flatten(0, 1)
        return self._rows

    @property
    def keys(self) -> Tensor | None:
        """`[B, rows, H, D]`."""
        return None if self.table is None else self.split(self.table)[0]

    @property
    def values(self) -> Tensor | None:
        """`[B, rows, H, D]`."""
        return None if self.table is None else self.split(self.table)[1]

    def split(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        return torch.chunk(table, 2, dim=-1)

    @property
    def is_compileable(self) -> bool:
        return self.max_cache_len is not None

    @property
    def batch_size(self) -> int:
        if not self.is_initialized:
            raise AttributeError("A state that is empty has no batch size.")
        return self.num_tokens.shape[0]

    def prepare(self, geometry: Geometry, key_states: Tensor, value_states: Tensor) -> None:
        """Make the tensors for states like these `[B, n, h, D]`, unless there are some."""
        if not self.is_initialized:
            self.geometry = geometry
            self.lazy_initialization(key_states, value_states)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        batch_size, geometry = key_states.shape[0], self.geometry
        self.table = key_states.new_zeros(
            (batch_size, self._first_rows(), geometry.num_heads, 2 * geometry.head_size)
        )
        self.num_tokens = torch.zeros(batch_size, dtype=torch.long, device=self.device)
        if self.is_compileable:
            self.length = torch.zeros((), dtype=torch.long, device=self.device)
        self._make_tensors(batch_size)
        self.is_initialized = True
        if self.is_compileable and not torch.compiler.is_compiling():
            for name in self.tensors:
                if getattr(self, name) is not None:
                    torch._dynamo.mark_static_address(getattr(self, name))
            torch._dynamo.mark_static_address(self.length)

    def _first_rows(self) -> int:
        return self.max_cache_len or 0

    def _make_tensors(self, batch_size: int) -> None:
        """Make what the layer has besides keys and values."""

    def takes_step(self, num_new: int) -> bool:
        """Whether `places` is the way for so many new tokens, rather than a parallel pass over them and the past."""
        return self.has_tokens and num_new <= SLACK

    def reserve(self, num_new: int) -> None:
        """Make room for new tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, places: Places) -> tuple[Tensor | None, Tensor | None]:
        """
        Write keys and values `[B, n, h, D]`, and return those that the new tokens attend to.

        (The base class lets a subclass choose its arguments and the shape of what it returns.)
        """
        if self._offloaded:
            self.prefetch()
        rows, states = self.rows, torch.cat([key_states, value_states], dim=-1).flatten(0, 1)
        if places.heads is not None:
            rows = rows[:, places.heads]
        rows.index_copy_(0, places.write, states if states.dtype == rows.dtype else states.to(rows.dtype))
        if places.read is None:
            return None, None
        return self.split(self._read(places.read))

    def _read(self, read) -> Tensor:
        raise NotImplementedError

    def offload(self) -> None:
        """Put the table into the memory of the CPU."""
        if self.is_initialized:
            self.table = self.table.to("cpu", non_blocking=True)
            self._offloaded = True
            self._table_changed()

    def prefetch(self) -> None:
        """Bring the table back to where it is used."""
        if self._offloaded:
            self.table = self.table.to(self.device, non_blocking=True)
            self._offloaded = False
            self._table_changed()

    def advance(self, num_new: int, padding: Tensor | None) -> None:
        """Count the new tokens, when all heads have taken them; `padding` `[B, n]` is True where there is none."""
        self.length += num_new
        if padding is None:
            self.num_tokens += num_new
        else:
            self.num_tokens += (~padding).sum(-1)
        self.has_tokens = True

    def get_seq_length(self) -> int | Tensor:
        """Columns so far."""
        return self.length

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All columns: masks `[B, length]` are what the model takes."""
        return self.length + query_length, 0

    def reset(self) -> None:
        """Forget everything; the next input makes new tensors."""
        self._clear()

    def activate_past_recording(self) -> None:
        """Keep whatever is needed to `crop` to where the state stood at the last crop."""
        self.record_past = True

    @_in_mode_of_table
    def crop(self, tokens_to_remove: int) -> None:
        """
        Take back the last columns: `-5` five of them, as in Transformers.

        Raises:
            ValueError: Where a layer of the model does not hold any more what it would need, which leaves all layers
                as they are; or for a positive number.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"`tokens_to_remove` is {tokens_to_remove}; give the number of tokens to remove as a negative one, "
                "such as -1."
            )
        if not self.is_initialized:
            return
        length = int(self.length)
        target = length + tokens_to_remove
        if target < 0:
            raise ValueError(f"{-tokens_to_remove} tokens cannot be removed from a cache that holds {length}.")
        for layer in self.peers:
            layer._check_crop(target)
        self._last_kept = target
        if target < length:
            self._longest = max(self._longest, length)
            self._crop(-tokens_to_remove)
            self.length -= length - target
        if target == 0:
            self.reset()
        else:
            self._after_crop()

    def _check_crop(self, target: int) -> None:
        if self.is_initialized and 0 < target < int(self.length) and not self._can_restore(target):
            raise ValueError(
                f"A cache of {int(self.length)} tokens is to be cropped to {target}, but its {type(self).__name__} "
                f"has dropped what came before: it can give back {SLACK} tokens of the longest state it had. Crop by "
                "less, call `activate_past_recording()` before the tokens that are to be taken back, or begin with a "
                "new cache."
            )

    def _can_restore(self, target: int) -> bool:
        """Whether nothing that a token at column `target` sees was overwritten."""
        return True

    def _crop(self, num_columns: int) -> None:
        raise NotImplementedError

    def _after_crop(self) -> None:
        """Give back what was kept for `crop` alone."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of the batch in this order."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    @_in_mode_of_table
    def _map(self, function) -> None:
        for name in self.tensors:
            tensor = getattr(self, name)
            if tensor is None:
                continue
            mapped = function(tensor)
            # Compiled code knows a tensor by its address.
            if self.is_compileable and mapped.shape == tensor.shape:
                tensor.copy_(mapped)
            else:
                setattr(self, name, mapped)
        self._table_changed()

    @_in_mode_of_table
    def _resize(self, names: tuple[str, ...], axis: int, size: int, fill: int = 0) -> None:
        for name in names:
            old = getattr(self, name)
            new = old.new_full((*old.shape[:axis], size, *old.shape[axis + 1 :]), fill)
            new.narrow(axis, 0, old.shape[axis]).copy_(old)
            setattr(self, name, new)
        self._table_changed()


class FullStateLayer(StateLayer):
    """All keys and values. A token sees those of earlier columns that are not padding."""

    tensors = (*StateLayer.tensors, "padding")

    def _make_tensors(self, batch_size: int) -> None:
        self.padding = torch.zeros(self.table.shape[:2], dtype=torch.bool, device=self.device)
        self.may_have_padding = self.is_compileable

    def places(self, num_new: int, padding: Tensor | None) -> Places:
        """Where new tokens stand, and which columns `[B, n, T]` they do not see."""
        write = self._write(num_new, padding)
        total = self.table.shape[1] if self.is_compileable else self.length + num_new
        if num_new == 1 and not self.may_have_padding:
            # All columns before its own, and where there are none itself, unseen.
            first = total == 1
            hidden = torch.ones((1, 1, 1), dtype=torch.bool, device=self.device) if first else None
            return Places(write, 1 if first else total - 1, hidden)
        own = torch.arange(num_new, device=self.device) + self.length
        hidden = torch.arange(total, device=self.device) >= own[:, None]
        return Places(write, total, hidden | self.padding[:, None, :total])

    def fill(self, num_new: int, padding: Tensor | None, heads: slice) -> Places:
        """Where new tokens stand after a parallel pass. Nothing is read."""
        return Places(self._write(num_new, padding), heads=heads)

    def _write(self, num_new: int, padding: Tensor | None) -> Tensor:
        columns = torch.arange(num_new, device=self.device) + self.length
        if padding is not None:
            self.may_have_padding = True
            self.padding.index_copy_(1, columns, padding)
        return _table_rows(self.table, columns.expand(self.table.shape[0], -1)).flatten()

    def reserve(self, num_new: int) -> None:
        rows = self.table.shape[1]
        if not self.is_compileable and self.length + num_new > rows:
            self._resize(("table", "padding"), 1, _grown(rows, self.length + num_new))

    def positions(self, places: Places) -> Tensor:
        """The columns `[T]` of what is read."""
        return torch.arange(places.read, device=self.device)

    def _read(self, read: int) -> Tensor:
        return self.table[:, :read]

    def _crop(self, num_columns: int) -> None:
        target = int(self.length) - num_columns
        self.num_tokens -= (~self.padding[:, target : target + num_columns]).sum(-1)
        self.padding[:, target : target + num_columns] = False

    def takes_step(self, num_new: int) -> bool:
        return self.has_tokens


@dataclass(frozen=True)
class LocalGeometry(Geometry):
    """`counts_padding`: whether padding has a place in the chunks, as in-tree."""

    chunk_length: int
    num_chunks_before: int
    counts_padding: bool

    @property
    def window_length(self) -> int:
        return self.chunk_length * (self.num_chunks_before + 1)


class LocalStateLayer(StateLayer):
    """The last chunks in a ring: the token of rank r, which has r tokens before it, stands in row `r % M`."""

    # The column of each row, or its complement where there is padding; `_NOTHING` where there is nothing.
    tensors = (*StateLayer.tensors, "columns")
    _NOTHING = torch.iinfo(torch.long).min

    @property
    def ring_length(self) -> int:
        # The last row takes what is to be written nowhere.
        return self.table.shape[1] - 1

    def _first_rows(self) -> int:
        return self.geometry.window_length + SLACK + 1

    def _make_tensors(self, batch_size: int) -> None:
        self.columns = torch.full(self.table.shape[:2], self._NOTHING, dtype=torch.long, device=self.device)

    def places(self, num_new: int, padding: Tensor | None) -> Places:
        """
        Where new tokens stand, and rows `[B, S]` of the ring, of which some are hidden from some, `[B, n, S]`.

        The same for all layers of one geometry.
        """
        ranks, totals = self._ranks(num_new, padding)
        write, columns = self._write(ranks, totals, padding)
        geometry = self.geometry
        num_read = geometry.window_length + num_new - 1
        read_ranks = totals[:, None] + torch.arange(-num_read, 0, device=self.device)
        read = _table_rows(self.table, read_ranks % self.ring_length)
        hidden = (read_ranks[:, None] < self._first_seen(ranks)[..., None]) | (read_ranks[:, None] > ranks[..., None])
        if geometry.counts_padding:
            hidden |= (self.columns.view(-1).index_copy(0, write, columns)[read] < 0)[:, None]
        return Places(write, read, hidden, columns=columns)

    def update(self, key_states: Tensor, value_states: Tensor, places: Places) -> tuple[Tensor | None, Tensor | None]:
        self.columns.view(-1).index_copy_(0, places.write, places.columns)
        return super().update(key_states, value_states, places)

    def positions(self, places: Places) -> Tensor:
        """The columns `[B, 1, S]` of what is read; anything for what is hidden."""
        return self.columns.view(-1)[places.read][:, None]

    def fill(self, num_new: int, padding: Tensor | None, heads: slice) -> Places:
        """Where new tokens stand after a parallel pass. Nothing is read, and only the last of them are kept."""
        ranks, totals = self._ranks(num_new, padding)
        write, columns = self._write(ranks, totals, padding)
        return Places(write, heads=heads, columns=columns)

    def past(self, heads: slice) -> Past | None:
        """What stands in the chunks that new tokens may see; `None` if there is nothing."""
        if not self.has_tokens:
            return None
        first = self._first_seen(self._next_ranks)
        ranks = first[:, None] + torch.arange(self.geometry.window_length, device=self.device)
        rows = _table_rows(self.table, ranks % self.ring_length)
        absent = ranks >= self._next_ranks[:, None]
        key, value = self.split(self._read(rows)[:, :, heads])
        columns = self.columns.view(-1)[rows]
        return Past(key, value, absent | (columns < 0), columns[:, None].int(), absent)

    @property
    def _next_ranks(self) -> Tensor:
        """Rank `[B]` of the next token."""
        if self.geometry.counts_padding:
            return torch.zeros_like(self.num_tokens) + self.length
        return self.num_tokens

    def _first_seen(self, ranks: Tensor) -> Tensor:
        """The first rank that a token of each rank sees."""
        geometry = self.geometry
        own_chunks = ranks.div(geometry.chunk_length, rounding_mode="floor")
        return ((own_chunks - geometry.num_chunks_before) * geometry.chunk_length).clamp(min=0)

    def _ranks(self, num_new: int, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ranks `[B, n]` of new tokens, and how many there are then, `[B]`."""
        next_ranks = self._next_ranks
        if padding is None or self.geometry.counts_padding:
            return next_ranks[:, None] + torch.arange(num_new, device=self.device), next_ranks + num_new
        counts = next_ranks[:, None] + (~padding).cumsum(-1)
        return counts - 1, counts[:, -1]

    def _write(self, ranks: Tensor, totals: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows to write, and the columns that are to stand there, `[B * n]`."""
        cells = ranks % self.ring_length
        num_new = ranks.shape[1]
        if num_new > self.ring_length:
            # Of two tokens in one row the later one stays.
            cells = torch.where(ranks >= (totals - self.ring_length)[:, None], cells, self.ring_length)
        columns = (torch.arange(num_new, device=self.device) + self.length).expand(ranks.shape)
        if padding is not None and self.geometry.counts_padding:
            columns = torch.where(padding, ~columns, columns)
        elif padding is not None:
            cells = torch.where(padding, self.ring_length, cells)
        return _table_rows(self.table, cells).flatten(), columns.flatten()

    def _read(self, read: Tensor) -> Tensor:
        return self.rows.index_select(0, read.flatten()).unflatten(0, read.shape)

    def reserve(self, num_new: int) -> None:
        """Where `crop` is to be expected, make room before what it needs is overwritten."""
        if not self.record_past or self.is_compileable:
            return
        needed = self.geometry.window_length + max(self._longest, self.length + num_new) - self._last_kept
        if needed > self.ring_length:
            self._resize_ring(_grown(self.ring_length, needed))

    def _after_crop(self) -> None:
        usual = self._first_rows() - 1
        if self.ring_length > usual and not self.is_compileable:
            self._resize_ring(usual)
            self._longest = int(self.length)

    @_in_mode_of_table
    def _resize_ring(self, new_length: int) -> None:
        old_length = self.ring_length
        kept = min(old_length, new_length)
        ranks = self._next_ranks[:, None] + torch.arange(-kept, 0, device=self.device)
        old, new = ranks % old_length, torch.where(ranks < 0, new_length, ranks % new_length)
        for name, fill in (("table", 0), ("columns", self._NOTHING)):
            table = getattr(self, name)
            grown = table.new_full((table.shape[0], new_length + 1, *table.shape[2:]), fill)
            index = torch.arange(len(table), device=self.device)[:, None]
            grown[index, new] = table[index, old]
            setattr(self, name, grown)
        self._table_changed()

    def _can_restore(self, target: int) -> bool:
        longest = max(self._longest, int(self.length))
        return longest - target <= self.ring_length - self.geometry.window_length or longest <= self.ring_length

    def _crop(self, num_columns: int) -> None:
        target = int(self.length) - num_columns
        ring = self.columns[:, :-1]
        self.num_tokens -= (ring >= target).sum(-1)
        removed = (torch.where(ring < 0, ~ring, ring) >= target) & (ring != self._NOTHING)
        ring.masked_fill_(removed, self._NOTHING)


@dataclass(frozen=True)
class LSHGeometry(Geometry):
    """
    Args:
        num_hashes, hash_seed: Of the hashing.
        window_length: Slots of the sorted order that a token sees in a round.
        each_key_once: Whether a key counts in the first round that shows it only.
        chunk_length: `None` for the pattern `"window"`, the last positions of a token's own bucket. Else a token sees
            the chunks of the sorted order that it would see were it the last of a parallel pass.
        same_bucket: With chunks, whether it sees keys of its own bucket only.
        ring_multiple: With chunks, the multiple to which a length beyond `shortest_chunk` is padded for the chunks of
            all rounds to form a ring; `None` for no ring.
    """

    num_hashes: int
    window_length: int
    each_key_once: bool = False
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

    tensors = (*StateLayer.tensors, "buckets", "_positions", "counts", "rings", "firsts")

    def _clear(self) -> None:
        super()._clear()
        # Set by the first input: rotations as `hashing.projections_of` gives them, and the factors of N.
        self.projections: list[Tensor] = []
        self.factors: list[int] = []
        # Rows of the table in use. Differs from the length once something was dropped.
        self.stored: int | Tensor = 0
        # Columns that there were when something was last dropped.
        self._dropped_at = 0
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
        integers = {"dtype": torch.int32, "device": self.device}
        # The bucket of each row, N where there is padding or nothing.
        rows = (*heads, self.table.shape[1], geometry.num_hashes)
        self.buckets = torch.full(rows, num_buckets, **integers)
        self.counts = torch.zeros((*rounds, num_buckets + 1), dtype=torch.long, device=self.device)
        self.rings = torch.zeros((*self.counts.shape, geometry.window_length + SLACK), **integers)
        if geometry.chunk_length is not None:
            self.firsts = torch.zeros((*self.counts.shape, geometry.chunk_length), **integers)
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
        if self.geometry.each_key_once and self.geometry.num_hashes > 1:
            hidden = hidden | _seen_before(seen, hidden)
        batch_size, _, num_heads, _ = self.table.shape
        write = rows if batch_size == 1 else _table_rows(self.table, rows.expand(batch_size, -1)).flatten()
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
        """First of the rings of each row and round, `[B, H, 1, R]`, and of the rows of the table, `[B, H, 1, 1, 1]`."""
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
        return Places(_table_rows(self.table, rows.expand(buckets.shape[0], -1)).flatten(), heads=heads)

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
            size = _grown(self.table.shape[1], needed)
            if is_window:
                size = max(needed, min(size, bound))
            self._resize(("table",), 1, size)
            self._resize(("buckets",), 2, size, fill=self.num_buckets)
            if self._positions is not None:
                self._resize(("_positions",), 2, size)

    @_in_mode_of_table
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
        self._bases: tuple[Tensor, Tensor] | None = None


class _OfRounds:
    """Looks up `[B, H, R, W]` in what there is for each round, `[B, H, R, …]`: its own, or that of the round before."""

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


def _table_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows `[B, n]` of each batch row, counted through the whole table `[B, rows, …]`."""
    if table.shape[0] == 1:
        return rows
    return rows + torch.arange(table.shape[0], device=rows.device)[:, None] * table.shape[1]


def _grown(size: int, needed: int) -> int:
    """A size for what grows and grows: copying what there is costs little for each addition."""
    return max(needed, size + max(size // 2, _MIN_ROWS_ADDED))


LAYER_TYPES = {"local": LocalStateLayer, "lsh": LSHStateLayer, "full": FullStateLayer}


for _attention, _layer in LAYER_TYPES.items():
    # See `ReformerHfConfig.layer_types`.
    DYNAMIC_LAYER_TYPE_MAPPING[f"reformer_hf_{_attention}"] = _layer
    STATIC_LAYER_TYPE_MAPPING[f"reformer_hf_{_attention}"] = _layer
