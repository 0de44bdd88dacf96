# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
The KV cache: Transformers cache layers for what generation keeps of earlier tokens.

Two methods write to a cache layer:

* `prefill` writes the keys, values and buckets of a parallel pass, after it has run for all heads;
* `append` writes a few new tokens and returns what they attend to.

`DynamicCache(config=…)` creates layers that grow, and `StaticCache(config=…, max_cache_len=…)` creates layers of a
fixed shape for `torch.compile`. The layers are in `full_cache`, `local_cache` and `lsh_cache`.

Shapes: B batch, n new tokens, T cached tokens, H heads, D head size, M length of a ring buffer. The *cache position*
of a token is the number of tokens before it, padding included. Its *token index* is the number of tokens before it
that are not padding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .attention_pattern import AttentionPattern

# Maximum number of tokens per append, and number of tokens that `crop` can always remove.
SLACK = 64

# Minimum number of rows by which a buffer grows.
_MIN_GROWTH = 64


@dataclass(frozen=True)
class CacheSpec:
    """
    The attention that a cache layer is built for. A model with another spec cannot use the layer.

    Args:
        pattern: Which keys a query sees; `None` for all earlier keys.
        num_heads, head_size: Number and size of the heads of keys and values.
        num_hashes: Hash rounds of an LSH layer.
    """

    pattern: AttentionPattern | None
    num_heads: int
    head_size: int
    num_hashes: int = 0

    def with_hashes(self, num_hashes: int) -> "CacheSpec":
        """Return the spec for a number of hash rounds; other layers than LSH layers have none."""
        return replace(self, num_hashes=num_hashes) if self.num_hashes not in (0, num_hashes) else self


@dataclass(frozen=True)
class Seen:
    """
    The keys and values that new tokens attend to, in the layout of `scaled_dot_product_attention`.

    Args:
        key, value: `[B, H, T, D]`, or `[B * H * n, 1, T, D]` if each token of each head has separate keys.
        bias: Added to the scores, `[B or 1, 1, n, T]` or `[B * H * n, 1, 1, T]`; `None` for no bias.
        positions: Cache positions of the keys, broadcastable to the scores; `None` unless requested.
    """

    key: Tensor
    value: Tensor
    bias: Tensor | None
    positions: Tensor | None = None


@dataclass(frozen=True)
class Past:
    """
    The cached tokens as input of a parallel pass over cached and new tokens.

    Args:
        key, value: `[B, T, H, D]`.
        masked: `[B, T]`, True for tokens that no query may see.
        positions: Cache positions, `[B, 1 or H, T]` int32.
        length: Number of cached tokens, including dropped ones.
        empty: `[B, T]`, True for entries without a token; `None` if there are none.
        buckets: `[B, H, R, T]` in LSH layers.
    """

    key: Tensor
    value: Tensor
    masked: Tensor
    positions: Tensor
    length: int
    empty: Tensor | None = None
    buckets: Tensor | None = None

    def heads(self, heads: slice) -> "Past":
        """Return the part that belongs to some of the heads."""
        return replace(
            self,
            key=self.key[:, :, heads],
            value=self.value[:, :, heads],
            positions=self.positions if self.positions.shape[1] == 1 else self.positions[:, heads],
            buckets=None if self.buckets is None else self.buckets[:, heads],
        )

    def prepend(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """
        Prepend the cached tokens to new ones.

        Args:
            query, key, value: Of the new tokens, `[B, n, H, D]`.
            padding: `[B, n]`, True for padding.

        Returns:
            Queries (zero for cached tokens), keys and values `[B, T + n, H, D]` of cached and new tokens, and which of
            them no query may see, `[B, T + n]`.
        """
        query = torch.cat([torch.zeros_like(self.key, dtype=query.dtype), query], dim=1)
        key, value = (
            torch.cat([old.to(new.dtype), new], dim=1) for old, new in ((self.key, key), (self.value, value))
        )
        if padding is None:
            padding = self.masked.new_zeros(len(self.masked), query.shape[1] - self.masked.shape[1])
        return (query, key, value), torch.cat([self.masked, padding], dim=1)

    def cache_positions(self, index: Tensor) -> Tensor:
        """Convert indices `[B, H, R, n, W]` into cached and new tokens to cache positions; keep -1."""
        num_new = index.shape[3]
        new = torch.arange(self.length, self.length + num_new, dtype=torch.int32, device=index.device)
        positions = torch.cat([self.positions, new.expand(*self.positions.shape[:-1], -1)], dim=-1)
        positions = positions[:, :, None, None].expand(*index.shape[:-1], -1)
        return torch.where(index < 0, index, positions.gather(-1, index.clamp(min=0).long()))


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Create tensors that can be written to inside and outside inference mode, regardless of the current mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def writing(cache: Cache | None) -> Iterator[None]:
    """
    Link the layers of a cache (if any), so that they are cropped together, and run a model that writes to it.

    If the body raises an exception, the layers stay incomplete: some of them may hold more tokens than others.
    """
    layers: Sequence[Any] = () if cache is None or torch.compiler.is_compiling() else cache.layers
    for layer in layers:
        layer.peers, layer.is_complete = layers, False
    yield
    for layer in layers:
        layer.is_complete = True


class AttentionCacheLayer(CacheLayerMixin):
    """
    Base class of the cache layers of all attention types. Its buffers grow with the number of tokens.

    Transformers' caches look up a subclass by its `layer_type`, see `ReformerHfConfig.layer_types`.
    """

    layer_type = ""
    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False
    # Names of the tensors. Their first axis is the batch.
    tensors: tuple[str, ...] = ("entries", "num_padding")
    # Concatenated keys and values, `[B, rows, H, 2 * D]`.
    entries: Tensor | None
    # Number of padding tokens in each row of the batch, `[B]`.
    num_padding: Tensor | None
    spec: CacheSpec | None
    # Number of cached tokens, padding included: an `int`, or a tensor in layers of a fixed shape.
    length: Any

    def __init__(self, **kwargs):
        # The base class is not initialized: its keys and values are views here.
        self.record_past = False
        # All layers of the cache, which are cropped together or not at all.
        self.peers: list[AttentionCacheLayer] = [self]
        self.reset()

    def reset(self) -> None:
        """Discard all tokens. The next prefill creates new tensors."""
        for name in self.tensors:
            setattr(self, name, None)
        self.is_initialized = self.has_padding = self._offloaded = False
        # When the keys and values that a prefetch moves to the device are there.
        self._fetched: torch.Event | None = None
        # Whether no call has failed after some of the layers of the cache were written, see `writing`.
        self.is_complete = True
        self.spec, self.length = None, 0
        # The longest length since the last crop, and the length that the last crop kept.
        self._longest = self._kept_by_crop = 0
        # The shortest length that `crop` can restore.
        self._restorable_from = 0

    def _initialize(self, spec: CacheSpec, key: Tensor, value: Tensor) -> None:
        """Create the tensors for keys and values of these shapes and dtypes."""
        batch_size, _, num_heads, head_size = key.shape
        self.spec, self.device = spec, key.device
        self.entries = key.new_zeros((batch_size, self._initial_rows(), num_heads, head_size + value.shape[-1]))
        self.num_padding = torch.zeros(batch_size, dtype=torch.long, device=self.device)

    def _initial_rows(self) -> int:
        return 0

    def prefill(
        self, spec: CacheSpec, key: Tensor, value: Tensor, padding: Tensor | None = None, **hashing: Any
    ) -> None:
        """
        Write the tokens of a parallel pass.

        Args:
            spec: The attention that an empty layer is built for.
            key, value: `[B, n, H, D]`.
            padding: `[B, n]`, True for padding.
            hashing: Additional arguments of an LSH layer.
        """
        if not self.is_initialized:
            with ordinary_tensors():
                self._initialize(spec, key, value)
            self.is_initialized = True
        self._reserve(key.shape[1])
        self._note_padding(padding)
        self._prefill(key, value, padding, **hashing)
        self._count(key.shape[1], padding)

    def _prefill(self, *args: Any, **kwargs: Any) -> None:
        """Write the tokens of `prefill` to tensors that are large enough, without counting them."""
        raise NotImplementedError

    def append(
        self, key: Tensor, value: Tensor, padding: Tensor | None = None, with_positions: bool = False, **hashing: Any
    ) -> Seen:
        """
        Write a few new tokens, at most `append_limit`, and return what they attend to.

        Args:
            key, value: `[B, n, H, D]`.
            padding: `[B, n]`, True for padding.
            with_positions: Whether to return the cache positions of the keys as well.
            hashing: Additional arguments of an LSH layer.
        """
        self._reserve(key.shape[1])
        self._note_padding(padding)
        seen = self._append(key, value, padding, with_positions, **hashing)
        self._count(key.shape[1], padding)
        return seen

    def _append(self, *args: Any, **kwargs: Any) -> Seen:
        """Write the tokens of `append` to tensors that are large enough and read, without counting them."""
        raise NotImplementedError

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Call `prefill` if a spec is given, else `append`. `Cache.update` calls this and handles offloading."""
        self.prefetch()
        if "spec" not in kwargs:
            return self.append(key_states, value_states, **kwargs), None
        self.prefill(key=key_states, value=value_states, **kwargs)
        return None, None

    # Maximum number of tokens per `append`.
    append_limit = SLACK

    def can_append(self, num_new: int) -> bool:
        """Return whether to append new tokens, rather than compute them in one parallel pass with the cached ones."""
        return self.is_initialized and num_new <= SLACK

    def past(self) -> Past:
        """Return the cached tokens that new ones may see."""
        raise NotImplementedError

    def _new_positions(self, num_new: int) -> Tensor:
        """Return the cache positions `[n]` of new tokens."""
        return torch.arange(self.length, self.length + num_new, device=self.device)

    def _count(self, num_new: int, padding: Tensor | None) -> None:
        if padding is not None:
            self.num_padding += padding.sum(-1)
        self.length += num_new

    def _reserve(self, num_new: int) -> None:
        """Grow the buffers to make new tokens fit."""

    def _note_padding(self, padding: Tensor | None) -> None:
        if padding is not None:
            self.has_padding = True

    @property
    def num_tokens(self) -> Tensor:
        """Number of cached tokens that are not padding, `[B]`."""
        return self.length - self.num_padding

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """`[B, rows, H, D]`."""
        return None if self.entries is None else self.entries.chunk(2, dim=-1)[0]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """`[B, rows, H, D]`."""
        return None if self.entries is None else self.entries.chunk(2, dim=-1)[1]

    def _as_entries(self, key: Tensor, value: Tensor) -> Tensor:
        """Concatenate keys and values, in the dtype of the cache."""
        states = torch.cat([key, value], dim=-1)
        return states if states.dtype == self.entries.dtype else states.to(self.entries.dtype)

    def _write_entries(self, row: Any, key: Tensor, value: Tensor) -> None:
        """Write keys and values to consecutive rows, those of many tokens without a concatenated copy."""
        if key.shape[1] <= SLACK:
            self._write_rows(self.entries, 1, row, self._as_entries(key, value))
            return
        self._write_rows(self.entries[..., : key.shape[-1]], 1, row, key)
        self._write_rows(self.entries[..., key.shape[-1] :], 1, row, value)

    def _write_rows(self, buffer: Tensor, axis: int, row: Any, values: Tensor) -> None:
        """Write values into consecutive rows of a buffer."""
        buffer.narrow(axis, row, values.shape[axis]).copy_(values)

    # The interface of Transformers' cache layers.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise ValueError("A cache layer of this model is initialized by its first prefill: run the model on a prompt.")

    @property
    def batch_size(self) -> int:
        if not self.is_initialized:
            raise AttributeError("An empty cache has no batch size.")
        return self.num_padding.shape[0]

    def get_seq_length(self) -> int:
        """Return the number of cached tokens, padding included."""
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return all cache positions: the model takes masks `[B, length]`."""
        return self.length + query_length, 0

    def offload(self) -> None:
        """Move keys and values to CPU memory."""
        if self.is_initialized:
            self.entries = self.entries.to("cpu", non_blocking=True)
            self._offloaded = True

    def prefetch(self) -> None:
        """Move keys and values back to the device. `Cache` does so ahead of time, in a stream of its own."""
        if self._offloaded:
            self.entries = self.entries.to(self.device, non_blocking=True)
            self._offloaded = False
            if self.device.type != "cpu":
                self._fetched = torch.Event(self.device)
                self._fetched.record()

    def fetch(self) -> None:
        """Move keys and values back to the device, if no prefetch has, and let the current stream wait for them."""
        self.prefetch()
        if self._fetched is not None:
            self._fetched.wait()
            self._fetched = None

    def activate_past_recording(self) -> None:
        """Keep all that `crop` needs to restore the length that the last crop kept."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """
        Remove the last tokens.

        Args:
            tokens_to_remove: Number of tokens as a negative number: `-5` removes five, as in Transformers.

        Raises:
            ValueError: If the number is positive or exceeds the length, or if a layer of the cache has dropped tokens
                that it would need. All layers are then unchanged.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"`tokens_to_remove` is {tokens_to_remove}, but must not be positive: pass the number of tokens to "
                "remove as a negative number, such as -1."
            )
        if not self.is_initialized:
            return
        length = int(self.length)
        target = length + tokens_to_remove
        if target < 0:
            raise ValueError(f"Cannot remove {-tokens_to_remove} tokens from a cache that holds {length}.")
        for layer in self.peers:
            layer._check_crop(target)
        self.fetch()
        self._kept_by_crop = target
        if target == 0:
            self.reset()
            return
        if target < length:
            self._longest = max(self._longest, length)
            self._crop(-tokens_to_remove)
            self.length -= length - target
        self._after_crop()

    def _check_crop(self, target: int) -> None:
        if self.is_initialized and 0 < target < int(self.length) and not self._can_restore(target):
            raise ValueError(
                f"Cannot crop a cache of {int(self.length)} tokens to {target}: its {type(self).__name__} has dropped "
                f"earlier tokens and can only be cropped by {SLACK} tokens from its longest length. Remove fewer "
                "tokens, call `activate_past_recording()` before adding tokens to be removed, or use a new cache."
            )

    def _can_restore(self, target: int) -> bool:
        """Return whether all that a token at cache position `target` sees is still stored."""
        return target >= self._restorable_from

    def _crop(self, num_removed: int) -> None:
        """Remove the last tokens, before `length` is updated."""
        raise NotImplementedError

    def _after_crop(self) -> None:
        """Free the memory that was only kept for `crop`."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows of the batch."""
        self._map_batch(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._map_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows of the batch."""
        self._map_batch(lambda tensor: tensor[indices.to(tensor.device)])

    def _map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        self.fetch()
        with ordinary_tensors():
            for name in self.tensors:
                tensor = getattr(self, name)
                if tensor is not None:
                    self._replace(name, function(tensor))

    def _replace(self, name: str, tensor: Tensor) -> None:
        """Replace a tensor by one whose batch size or capacity may differ."""
        setattr(self, name, tensor)

    def _resize(self, name: str, axis: int, size: int, fill: int = 0) -> None:
        """Enlarge a tensor along an axis, keeping its content at the beginning."""
        old = getattr(self, name)
        with ordinary_tensors():
            new = old.new_full((*old.shape[:axis], size, *old.shape[axis + 1 :]), fill)
            new.narrow(axis, 0, old.shape[axis]).copy_(old)
            self._replace(name, new)


class FixedShape(AttentionCacheLayer):
    """Mixin for cache layers of a fixed shape, for `StaticCache`: the length is a tensor, and buffers do not grow."""

    is_compileable = True

    def __init__(self, max_cache_len: int, **kwargs):
        self.max_cache_len = max_cache_len
        super().__init__()

    def _initialize(self, spec: CacheSpec, key: Tensor, value: Tensor) -> None:
        # Compiled code would treat a number as a constant.
        self.length = torch.zeros((), dtype=torch.long, device=key.device)
        # Compiled code cannot depend on whether later tokens contain padding.
        self.has_padding = True
        super()._initialize(spec, key, value)
        if not torch.compiler.is_compiling():
            for name in (*self.tensors, "length"):
                if getattr(self, name) is not None:
                    torch._dynamo.mark_static_address(getattr(self, name))

    def _initial_rows(self) -> int:
        return super()._initial_rows() or self.max_cache_len

    def _new_positions(self, num_new: int) -> Tensor:
        return torch.arange(num_new, device=self.device) + self.length

    def _write_rows(self, buffer: Tensor, axis: int, row: Tensor, values: Tensor) -> None:
        rows = torch.arange(values.shape[axis], device=self.device) + row
        buffer.index_copy_(axis, rows, values if values.dtype == buffer.dtype else values.to(buffer.dtype))

    def _reserve(self, num_new: int) -> None:
        """Do nothing: `input_checks` ensures that new tokens fit."""

    def _note_padding(self, padding: Tensor | None) -> None:
        """Do nothing: `has_padding` is always set."""

    def _replace(self, name: str, tensor: Tensor) -> None:
        # Compiled code refers to a tensor by its address.
        if tensor.shape == getattr(self, name).shape:
            getattr(self, name).copy_(tensor)
        else:
            super()._replace(name, tensor)

    def get_max_length(self) -> int:
        return self.max_cache_len


def self_bias(dtype: torch.dtype) -> float:
    """Return the bias of a token's score with itself, under which it only counts if all other keys are masked."""
    return torch.finfo(dtype).min / 4


def bias_in(dtype: torch.dtype, bias: Tensor) -> Tensor:
    """Convert the bias of `Seen`. In another dtype, `self_bias` may be infinite, which means a masked key."""
    return torch.where(bias.isneginf(), bias, bias.clamp(min=self_bias(dtype))).to(dtype)


def grown(size: int, needed: int) -> int:
    """Return a new size for a growing buffer that keeps the amortized cost of copying low."""
    return max(needed, size + max(size // 2, _MIN_GROWTH))
