# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Decoding state: what a causal model keeps of the tokens it has seen, as layers of the caches of Transformers.

Every layer holds a table of keys beside values `[B, rows, H, 2 * D]`, and knows which rows a new token attends to:

* a local layer keeps the last chunks, row by row in a ring;
* a full layer keeps everything;
* an LSH layer keeps what stands in the rings of its buckets, see `lsh_cache`.

`DynamicCache(config=…)` makes layers that grow as they need, `StaticCache(config=…, max_cache_len=…)` layers of a
fixed shape, for `torch.compile`.

Shapes: B batch, n new tokens, H heads, D head size, M length of a ring.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
)

# Attention weights and the positions of their keys.
Weights = tuple[Tensor, Tensor]

# What rings hold beyond what a token attends to: so many tokens can be taken in one step, or back by `crop`.
SLACK = 64

# The class of the state of each kind of attention.
LAYER_TYPES: dict[str, type["StateLayer"]] = {}

# Of a table that grows, the least number of rows to add.
_MIN_ROWS_ADDED = 64


def in_mode_of_table(method: Callable) -> Callable:
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
    What the states of all kinds of attention share. A subclass says whose state it is; caches find it by that name.

    A token is a *column* of the input, padding included. `length` counts columns, `num_tokens` `[B]` those that are
    not padding.

    Args:
        max_cache_len (`int`, *optional*): Columns that fit; tensors then have a fixed shape. `None` lets them grow.
    """

    # Among `attn_layers`.
    attention: str = ""
    is_sliding = False
    is_croppable = True
    supports_early_init = False
    # Names of the tensors, which have the batch on their first axis.
    tensors: tuple[str, ...] = ("table", "num_tokens")
    table: Tensor | None
    num_tokens: Tensor | None
    # What the state is made for: a `Geometry` of its kind.
    geometry: Any
    # A number, or where the shape is fixed a tensor.
    length: Any

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        LAYER_TYPES[cls.attention] = cls
        # See `ReformerHfConfig.layer_types`.
        DYNAMIC_LAYER_TYPE_MAPPING[f"reformer_hf_{cls.attention}"] = cls
        STATIC_LAYER_TYPE_MAPPING[f"reformer_hf_{cls.attention}"] = cls

    def __init__(self, max_cache_len: int | None = None, **kwargs):
        # Not that of the base class, whose keys and values are views here.
        self.max_cache_len = max_cache_len
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        for name in self.tensors:
            setattr(self, name, None)
        self.is_initialized = self.has_tokens = self._offloaded = False
        self.geometry, self.length = None, 0
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
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """`[B, rows, H, D]`."""
        return None if self.table is None else self.split(self.table)[0]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """`[B, rows, H, D]`."""
        return None if self.table is None else self.split(self.table)[1]

    def split(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        key, value = torch.chunk(table, 2, dim=-1)
        return key, value

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
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
        self.table = key_states.new_zeros((batch_size, self._first_rows(), geometry.num_heads, 2 * geometry.head_size))
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

    def get_seq_length(self) -> int:
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

    @in_mode_of_table
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

    @in_mode_of_table
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

    @in_mode_of_table
    def _resize(self, names: tuple[str, ...], axis: int, size: int, fill: int = 0) -> None:
        for name in names:
            old = getattr(self, name)
            new = old.new_full((*old.shape[:axis], size, *old.shape[axis + 1 :]), fill)
            new.narrow(axis, 0, old.shape[axis]).copy_(old)
            setattr(self, name, new)
        self._table_changed()


class FullStateLayer(StateLayer):
    """All keys and values. A token sees those of earlier columns that are not padding."""

    attention = "full"
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
        return table_rows(self.table, columns.expand(self.table.shape[0], -1)).flatten()

    def reserve(self, num_new: int) -> None:
        rows = self.table.shape[1]
        if not self.is_compileable and self.length + num_new > rows:
            self._resize(("table", "padding"), 1, grown(rows, self.length + num_new))

    def positions(self, places: Places) -> Tensor:
        """The columns `[T]` of what is read."""
        return torch.arange(places.read, device=self.device)  # type: ignore[arg-type]

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

    attention = "local"
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
        read = table_rows(self.table, read_ranks % self.ring_length)
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
        rows = table_rows(self.table, ranks % self.ring_length)
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
        return table_rows(self.table, cells).flatten(), columns.flatten()

    def _read(self, read: Tensor) -> Tensor:
        rows = self.rows.index_select(0, read.flatten())
        return rows.view(*read.shape, *rows.shape[1:])

    def reserve(self, num_new: int) -> None:
        """Where `crop` is to be expected, make room before what it needs is overwritten."""
        if not self.record_past or self.is_compileable:
            return
        needed = self.geometry.window_length + max(self._longest, self.length + num_new) - self._last_kept
        if needed > self.ring_length:
            self._resize_ring(grown(self.ring_length, needed))

    def _after_crop(self) -> None:
        usual = self._first_rows() - 1
        if self.ring_length > usual and not self.is_compileable:
            self._resize_ring(usual)
            self._longest = int(self.length)

    @in_mode_of_table
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


def table_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows `[B, n]` of each batch row, counted through the whole table `[B, rows, …]`."""
    if table.shape[0] == 1:
        return rows
    return rows + torch.arange(table.shape[0], device=rows.device)[:, None] * table.shape[1]


def grown(size: int, needed: int) -> int:
    """A size for what grows and grows: copying what there is costs little for each addition."""
    return max(needed, size + max(size // 2, _MIN_ROWS_ADDED))


def states_of(cache: Cache) -> list[StateLayer]:
    """The layers of a cache that was found to be one of this model's."""
    return cache.layers  # type: ignore[return-value]
