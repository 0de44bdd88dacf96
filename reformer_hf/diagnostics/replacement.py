# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Evaluate a trained model with its LSH attention replaced: a model that uses it must get worse."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..full_attention import FullSelfAttention
from ..hashing import sort_by_bucket, unpack_order
from ..lsh_attention import LSHSelfAttention
from ..reformer_layer import ReformerHfLayer
from ..self_attention import AttentionCall, Found, SelfAttention
from .lsh_layers import find_lsh_layers, no_cache_by_default


@contextmanager
def replace_lsh(
    model: nn.Module, replacement: str, layers: Sequence[int | str] | None = None, seed: int = 0
) -> Iterator[None]:
    """
    Replace the LSH attention of a model in a `with` block, to see what it contributes.

    Weights and config stay as they are, and the model is restored at the end of the block, also after an error.

    Args:
        model: Any model of this package that has LSH layers, in either mode.
        replacement: What replaces LSH attention:

            - `"random"`: the same attention with random buckets. In each round, head and text, tokens are exchanged at
              random, so that all buckets keep their sizes.
            - `"skip"`: nothing. The residual branch of attention adds zero, and the feed-forward layer stays.
            - `"full"`: full attention with the same weights, which LSH attention approximates, in O(L²).
        layers: Names of layers, or indices in `attn_layers`. `None` means all LSH layers.
        seed: Seed of random buckets. Calls with inputs of the same shape use the same permutations.

    Raises:
        ValueError: If the model has no such layer, if the replacement is unknown, or if the model is called with a KV
            cache, which only `"skip"` supports.
    """
    if replacement not in _REPLACEMENTS:
        raise ValueError(f"`replacement` is {replacement!r}, but must be one of {sorted(_REPLACEMENTS)}.")
    found = find_lsh_layers(model, layers)
    seeds = torch.randint(2**62, (len(found),), generator=torch.Generator().manual_seed(seed)).tolist()
    with ExitStack() as stack:
        for layer, layer_seed in zip(found.values(), seeds, strict=True):
            stack.callback(_REPLACEMENTS[replacement](layer, layer_seed))
        stack.enter_context(no_cache_by_default(model))
        yield


class RandomBucketAttention(LSHSelfAttention):
    """LSH attention whose buckets have the sizes that hashing gives them, and random members."""

    seed = 0

    def _hash(self, query: Tensor, value: Tensor, call: AttentionCall, heads: slice) -> Found:
        found = super()._hash(query, value, call, heads)
        if found.order is None:
            return found
        # Drawn for all heads, so that the buckets of a head do not depend on how heads are grouped.
        shape = (call.batch_size, self.num_heads, call.num_hashes, call.length)
        random = torch.rand(shape, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        return replace(found, order=shuffle_buckets(found.order, random[:, heads].to(call.device), call))


def shuffle_buckets(order: Tensor, random: Tensor, call: AttentionCall) -> Tensor:
    """
    Exchange the positions of a sorted order at random. All buckets keep their sizes.

    Tokens are only exchanged with tokens of the same document, and padding stays.

    Args:
        order: The result of `hashing.sort_by_bucket`, `[B, h, R, L]`.
        random: Random numbers from 0 to 1 (exclusive), `[B, h, R, L]`, in fp64.
        call: The call, for its padding and documents.

    Returns:
        Another result of `sort_by_bucket`.
    """
    positions, starts = unpack_order(order)
    buckets_by_slot = starts.int().cumsum(-1, dtype=torch.int32)
    # The slots of a group are consecutive.
    group = torch.zeros((call.batch_size, call.length), dtype=torch.int32, device=order.device)
    if call.documents is not None:
        group = call.documents.index
    if call.padding is not None:
        group = group.masked_fill(call.padding, call.length)
    group = group[:, None, None].expand(positions.shape).gather(-1, positions.long())
    shuffled = positions.gather(-1, (group + random).argsort(-1))
    buckets = torch.empty_like(positions).scatter_(-1, shuffled.long(), buckets_by_slot)
    return sort_by_bucket(buckets, call.padding)


def _randomize(layer: ReformerHfLayer, seed: int) -> Callable[[], None]:
    return _swap_attention(layer, RandomBucketAttention, seed=seed)


def _use_full_attention(layer: ReformerHfLayer, seed: int) -> Callable[[], None]:
    return _swap_attention(layer, FullSelfAttention)


def _swap_attention(layer: ReformerHfLayer, cls: type[SelfAttention], **fields: int) -> Callable[[], None]:
    """Replace the attention of a layer by another type with the same projections; return a function that undoes it."""
    attention = layer.attention
    original = attention.self_attention
    # Its own modules, which are dropped, take no memory and draw no random numbers.
    with torch.device("meta"):
        other = cls(original.config)
    for name, module in original.named_children():
        setattr(other, name, module)
    for name, value in fields.items():
        setattr(other, name, value)
    other.training = original.training
    attention.self_attention = other
    handle = layer.register_forward_pre_hook(_refuse_cache, with_kwargs=True)

    def undo() -> None:
        handle.remove()
        original.training = other.training
        attention.self_attention = original

    return undo


def _refuse_cache(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if signature(layer.forward).bind(*args, **kwargs).arguments.get("cache") is not None:
        raise ValueError(
            "A KV cache keeps the keys of LSH attention, which `replace_lsh` has replaced: call the model without "
            "`cache` and with `use_cache=False`."
        )


def _skip(layer: ReformerHfLayer, seed: int) -> Callable[[], None]:
    return layer.attention.register_forward_hook(lambda module, args, out: (torch.zeros_like(out[0]), out[1])).remove


_REPLACEMENTS = {"random": _randomize, "skip": _skip, "full": _use_full_attention}
