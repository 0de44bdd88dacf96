# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
KV cache: what a causal model keeps of the tokens it has seen, as cache layers of Transformers.

A cache layer has two ways in:

* `prefill` takes the keys, values and buckets of a parallel pass, once it has run for all heads;
* `append` takes a few new tokens and returns what they attend to.

`DynamicCache(config=…)` makes layers that grow, `StaticCache(config=…, max_cache_len=…)` layers of a fixed shape for
`torch.compile`. The layers are in `full_cache`, `local_cache` and `lsh_cache`.

Shapes: B batch, n new tokens, T cached tokens, H heads, D head size, M length of a ring. A token's *cache position*
counts all tokens before it, padding included; its *rank* counts those that are not padding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .attention_pattern import AttentionPattern

# Tokens that can be appended at a time, and the least number of tokens that `crop` can remove.
SLACK = 64

# The least number of rows by which a buffer grows.
_MIN_GROWTH = 64


@dataclass(frozen=True)
class CacheSpec:
    """
    What a cache layer is built for; a model of another spec cannot use it.

    Args:
        pattern: Which keys a query sees; `None` for all before it.
        num_heads, head_size: Of keys and values.
        num_hashes: Hash rounds of an LSH layer.
    """

    pattern: AttentionPattern | None
    num_heads: int
    head_size: int
    num_hashes: int = 0


@dataclass(frozen=True)
class Seen:
    """
    What new tokens attend to, in the layout of `scaled_dot_product_attention`.

    Args:
        key, value: `[B, H, T, D]`, or, where each token of each head has keys of its own, `[B * H * n, 1, T, D]`.
        bias: Added to the scores, `[B or 1, 1, n, T]` or `[B * H * n, 1, 1, T]`; `None` for nothing.
        positions: Cache positions of the keys, broadcastable to the scores; `None` unless they were asked for.
    """

    key: Tensor
    value: Tensor
    bias: Tensor | None
    positions: Tensor | None = None


@dataclass(frozen=True)
class Past:
    """
    The cached tokens, as input of a parallel pass over them and new ones.

    Args:
        key, value: `[B, T, H, D]`.
        masked: `[B, T]`, True where no query may see the token.
        positions: Cache positions, `[B, 1 or H, T]` int32.
        empty: `[B, T]`, True where there is no token; `None` for nowhere.
        buckets: `[B, H, R, T]` in LSH layers.
        length: Cached tokens, those included that were dropped.
    """

    key: Tensor
    value: Tensor
    masked: Tensor
    positions: Tensor
    length: int
    empty: Tensor | None = None
    buckets: Tensor | None = None

    def heads(self, heads: slice) -> "Past":
        """The part of some heads."""
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
        """Queries (zero for cached tokens), keys and values `[B, T + n, H, D]` of cached and new tokens, and which of
        them no query may see, `[B, T + n]`."""
        query = torch.cat([torch.zeros_like(self.key, dtype=query.dtype), query], dim=1)
        key, value = (
            torch.cat([old.to(new.dtype), new], dim=1) for old, new in ((self.key, key), (self.value, value))
        )
        if padding is None:
            padding = self.masked.new_zeros(len(self.masked), query.shape[1] - self.masked.shape[1])
        return (query, key, value), torch.cat([self.masked, padding], dim=1)

    def cache_positions(self, index: Tensor) -> Tensor:
        """Cache positions of indices `[B, H, R, n, W]` into cached and new tokens; -1 stays."""
        num_new = index.shape[3]
        new = torch.arange(self.length, self.length + num_new, dtype=torch.int32, device=index.device)
        positions = torch.cat([self.positions, new.expand(*self.positions.shape[:-1], -1)], dim=-1)
        positions = positions[:, :, None, None].expand(*index.shape[:-1], -1)
        return torch.where(index < 0, index, positions.gather(-1, index.clamp(min=0).long()))


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Make tensors that can be written to in inference mode and outside, whatever the mode is now."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class AttentionCacheLayer(CacheLayerMixin):
    """
    What the cache layers of all kinds of attention share, growing as tokens come.

    Caches find a subclass by its `layer_type`, see `ReformerHfConfig.layer_types`.
    """

    layer_type = ""
    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False
    # Names of the tensors, whose first axis is the batch.
    tensors: tuple[str, ...] = ("entries", "num_padding")
    # Keys and values side by side, `[B, rows, H, 2 * D]`.
    entries: Tensor | None
    # Tokens of each row of the batch that are padding, `[B]`.
    num_padding: Tensor | None
    spec: CacheSpec | None
    # Cached tokens, padding included: a number, or a tensor where the shape is fixed.
    length: Any

    def __init__(self, **kwargs):
        # Not that of the base class, whose keys and values are views here.
        self.record_past = False
        # All layers of the cache: they are cropped together or not at all.
        self.peers: list[AttentionCacheLayer] = [self]
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next prefill makes new tensors."""
        for name in self.tensors:
            setattr(self, name, None)
        self.is_initialized = self.has_padding = self._offloaded = False
        self.spec, self.length = None, 0
        # Of the tokens since the last crop, the most there were, and those that it kept.
        self._longest = self._kept_by_crop = 0

    def _initialize(self, spec: CacheSpec, key: Tensor, value: Tensor) -> None:
        """Make the tensors for keys and values like these."""
        batch_size, _, num_heads, head_size = key.shape
        self.spec, self.device = spec, key.device
        self.entries = key.new_zeros((batch_size, self._initial_rows(), num_heads, head_size + value.shape[-1]))
        self.num_padding = torch.zeros(batch_size, dtype=torch.long, device=self.device)

    def _initial_rows(self) -> int:
        return 0

    # The two ways in.

    def prefill(
        self, spec: CacheSpec, key: Tensor, value: Tensor, padding: Tensor | None = None, **hashing: Any
    ) -> None:
        """
        Take the tokens of a parallel pass.

        Args:
            spec: What an empty layer is built for.
            key, value: `[B, n, H, D]`.
            padding: `[B, n]`, True where there is padding.
            hashing: What an LSH layer takes besides.
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
        """`prefill` once the tensors are made and large enough: write, without counting."""
        raise NotImplementedError

    def append(
        self, key: Tensor, value: Tensor, padding: Tensor | None = None, with_positions: bool = False, **hashing: Any
    ) -> Seen:
        """
        Take a few new tokens, at most `append_limit`, and return what they attend to.

        Args:
            key, value: `[B, n, H, D]`.
            padding: `[B, n]`, True where there is padding.
            with_positions: Whether the cache positions of the keys are wanted too.
            hashing: What an LSH layer takes besides.
        """
        self._reserve(key.shape[1])
        self._note_padding(padding)
        seen = self._append(key, value, padding, with_positions, **hashing)
        self._count(key.shape[1], padding)
        return seen

    def _append(self, *args: Any, **kwargs: Any) -> Seen:
        """`append` once the tensors are large enough: write and read, without counting."""
        raise NotImplementedError

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """`prefill` where a spec is given, else `append`: `Cache.update` calls this, and offloads layers around it."""
        self.prefetch()
        if "spec" not in kwargs:
            return self.append(key_states, value_states, **kwargs), None
        self.prefill(key=key_states, value=value_states, **kwargs)
        return None, None

    # Tokens that `append` takes at a time.
    append_limit = SLACK

    def can_append(self, num_new: int) -> bool:
        """Whether new tokens are to be appended, rather than computed together with the cached ones."""
        return self.is_initialized and num_new <= SLACK

    def past(self) -> Past:
        """The cached tokens that new ones may see."""
        raise NotImplementedError

    # Counting tokens, and growing.

    def _new_positions(self, num_new: int) -> Tensor:
        """Cache positions `[n]` of new tokens."""
        return torch.arange(self.length, self.length + num_new, device=self.device)

    def _count(self, num_new: int, padding: Tensor | None) -> None:
        if padding is not None:
            self.num_padding += padding.sum(-1)
        self.length += num_new

    def _reserve(self, num_new: int) -> None:
        """Grow, so that new tokens fit."""

    def _note_padding(self, padding: Tensor | None) -> None:
        if padding is not None:
            self.has_padding = True

    @property
    def num_tokens(self) -> Tensor:
        """Tokens so far that are not padding, `[B]`."""
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
        states = torch.cat([key, value], dim=-1)
        return states if states.dtype == self.entries.dtype else states.to(self.entries.dtype)

    # What Transformers asks of every cache layer.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise ValueError("A cache layer of this model is made by its first prefill, which knows the attention.")

    @property
    def batch_size(self) -> int:
        if not self.is_initialized:
            raise AttributeError("An empty cache has no batch size.")
        return self.num_padding.shape[0]

    def get_seq_length(self) -> int:
        """Cached tokens, padding included."""
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All cache positions: masks `[B, length]` are what the model takes."""
        return self.length + query_length, 0

    def offload(self) -> None:
        """Move keys and values to the memory of the CPU."""
        if self.is_initialized:
            self.entries = self.entries.to("cpu", non_blocking=True)
            self._offloaded = True

    def prefetch(self) -> None:
        """Move keys and values back to the device."""
        if self._offloaded:
            self.entries = self.entries.to(self.device, non_blocking=True)
            self._offloaded = False

    def activate_past_recording(self) -> None:
        """Keep whatever `crop` needs to return to the tokens that the last crop kept."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """
        Remove the last tokens: `-5` removes five, as in Transformers.

        Raises:
            ValueError: If a layer of the cache has dropped what it would need, which leaves all layers as they are; or
                for a positive number.
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
                f"A cache of {int(self.length)} tokens is to be cropped to {target}, but its {type(self).__name__} "
                f"has dropped earlier tokens: it can return to {SLACK} tokens before the longest length it had. Crop "
                "by less, call `activate_past_recording()` before the tokens that are to be removed, or use a new "
                "cache."
            )

    def _can_restore(self, target: int) -> bool:
        """Whether nothing was overwritten that a token at cache position `target` sees."""
        return True

    def _crop(self, num_removed: int) -> None:
        """Remove the last tokens; `length` is still the old one."""
        raise NotImplementedError

    def _after_crop(self) -> None:
        """Give back what was kept for `crop` alone."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of the batch in this order."""
        self._map_batch(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._map_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self._map_batch(lambda tensor: tensor[indices.to(tensor.device)])

    def _map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        with ordinary_tensors():
            for name in self.tensors:
                tensor = getattr(self, name)
                if tensor is not None:
                    self._replace(name, function(tensor))

    def _replace(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in the place of another one, of another batch size or capacity perhaps."""
        setattr(self, name, tensor)

    def _resize(self, name: str, axis: int, size: int, fill: int = 0) -> None:
        """Change the size of a tensor along an axis; what it holds stays at the beginning."""
        old = getattr(self, name)
        with ordinary_tensors():
            new = old.new_full((*old.shape[:axis], size, *old.shape[axis + 1 :]), fill)
            new.narrow(axis, 0, old.shape[axis]).copy_(old)
            self._replace(name, new)


class FixedShape(AttentionCacheLayer):
    """Makes a cache layer one of a fixed shape, for `StaticCache`: the length is a tensor, and nothing grows."""

    is_compileable = True

    def __init__(self, max_cache_len: int, **kwargs):
        self.max_cache_len = max_cache_len
        super().__init__()

    def _initialize(self, spec: CacheSpec, key: Tensor, value: Tensor) -> None:
        # A number would be compiled into the code.
        self.length = torch.zeros((), dtype=torch.long, device=key.device)
        # Nor can that know whether there will be padding.
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

    def _reserve(self, num_new: int) -> None:
        """The door of the model has checked that new tokens fit."""

    def _note_padding(self, padding: Tensor | None) -> None:
        """`has_padding` is set already."""

    def _replace(self, name: str, tensor: Tensor) -> None:
        # Compiled code knows a tensor by its address.
        if tensor.shape == getattr(self, name).shape:
            getattr(self, name).copy_(tensor)
        else:
            super()._replace(name, tensor)

    def get_max_length(self) -> int:
        return self.max_cache_len


def self_bias(dtype: torch.dtype) -> float:
    """Added to the score of a token with itself: it then counts only where all other keys are masked."""
    return torch.finfo(dtype).min / 4


def grown(size: int, needed: int) -> int:
    """A new size that makes copying cheap for a buffer that keeps growing."""
    return max(needed, size + max(size // 2, _MIN_GROWTH))
