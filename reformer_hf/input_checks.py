# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Checks of what users give to a model, called once per call. Each raises a `ValueError` that says what to change."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from .cache import CacheSpec
from .configuration_reformer_hf import ReformerHfConfig

# Ids that are compared faster one by one.
_FEW_IDS = 16


def check_inputs(
    config: ReformerHfConfig,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    num_hashes: int | None,
    cache: Cache | None,
) -> Tensor:
    """
    Check that inputs fit the config and each other, by their shapes.

    Returns:
        Whichever of `input_ids` and `inputs_embeds` is given.
    """
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"Give one of `input_ids` and `inputs_embeds`, not {given}.")
    if input_ids is not None and input_ids.dim() != 2:
        raise ValueError(f"`input_ids` has shape {tuple(input_ids.shape)}, but must be [B, L].")
    if inputs_embeds is not None and (inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != config.hidden_size):
        raise ValueError(
            f"`inputs_embeds` has shape {tuple(inputs_embeds.shape)}, but must be [B, L, {config.hidden_size}] "
            "(`hidden_size`)."
        )
    inputs = input_ids if inputs_embeds is None else inputs_embeds
    shape = tuple(inputs.shape[:2])
    if not 1 <= shape[1] <= config.max_position_embeddings:
        raise ValueError(
            f"The input is {shape[1]} tokens long, but this model takes 1 to {config.max_position_embeddings} "
            "(`max_position_embeddings`): cut the input, or train a model with more positions."
        )
    if attention_mask is not None and tuple(attention_mask.shape) != shape:
        length = 0 if cache is None or torch.compiler.is_compiling() else int(cache.get_seq_length())
        whole = (shape[0], length + shape[1])
        if tuple(attention_mask.shape) != whole:
            raise ValueError(
                f"`attention_mask` has shape {tuple(attention_mask.shape)}, but must be {whole}, one entry for each "
                "token" + (f", those in `cache` included, or {shape} for the new ones." if length else ".")
            )
    if position_ids is not None and tuple(position_ids.shape) not in (shape, (1, shape[1])):
        raise ValueError(
            f"`position_ids` has shape {tuple(position_ids.shape)}, but must be {shape} or {(1, shape[1])}."
        )
    if num_hashes is not None and num_hashes < 1:
        raise ValueError(f"`num_hashes` is {num_hashes}, but must be at least 1; leave it None for the config's.")
    return inputs


def check_input_ids(config: ReformerHfConfig, input_ids: Tensor | None) -> None:
    """Check that the model has an embedding for each token. Looks at values: waits for the device."""
    _check_range("input_ids", input_ids, config.vocab_size, "vocab_size")


def check_position_ids(config: ReformerHfConfig, position_ids: Tensor | None) -> None:
    """Check that the model has an embedding for each position. Looks at values: waits for the device."""
    _check_range("position_ids", position_ids, config.max_position_embeddings, "max_position_embeddings")


def _check_range(name: str, ids: Tensor | None, limit: int, field: str) -> None:
    if ids is None or ids.numel() == 0:
        return
    if ids.numel() <= _FEW_IDS:
        smallest, largest = min(few := ids.flatten().tolist()), max(few)
    else:
        smallest, largest = (int(x) for x in torch.aminmax(ids))
    if smallest < 0 or largest >= limit:
        wrong = smallest if smallest < 0 else largest
        raise ValueError(
            f"`{name}` holds {wrong}, but ids of this model lie in [0, {limit - 1}] (`{field}` is {limit}): use the "
            "tokenizer that belongs to the model, or enlarge it (`resize_token_embeddings` for tokens)."
        )


def check_cache(
    cache: Cache,
    layer_types: Sequence[str],
    specs: Sequence[CacheSpec],
    inputs: Tensor,
    factors: Sequence[int] | None,
) -> None:
    """
    Check that a cache is one for this model, these options and this input; the cache is as it was where it is not.

    Its layers learn of each other, so that they are cropped together.

    Args:
        layer_types: Names of the cache layers that the model needs; none where it is no decoder.
        specs: What the cache layers of the model are built for.
        inputs: Ids `[B, L]` or embeddings `[B, L, E]` of the new tokens.
        factors: Of the number of buckets, where the call gives one.
    """
    if not layer_types:
        raise ValueError("`cache` is given, but without `is_decoder=True` each token sees those after it.")
    layers: Sequence[Any] = getattr(cache, "layers", ())
    if [getattr(layer, "layer_type", None) for layer in layers] != layer_types:
        names = f" of {[type(layer).__name__ for layer in layers]}" if layers else ""
        raise ValueError(
            f"`cache` is a {type(cache).__name__}{names}, but the layers of this model need {layer_types}: make it "
            "with `DynamicCache(config=model.config)` or `StaticCache(config=model.config, max_cache_len=…)`."
        )
    if torch.compiler.is_compiling():
        return
    for layer, spec in zip(layers, specs, strict=True):
        if layer.spec is not None and layer.spec is not spec and layer.spec != spec:
            raise ValueError(
                f"`cache` is that of another model, or of other options: it was made for {layer.spec}, but this "
                f"input needs {spec}. Begin with a new cache."
            )
        if layer.spec is not None and factors is not None and getattr(layer, "factors", factors) != factors:
            raise ValueError(
                f"`num_buckets` is {factors}, but `cache` has hashed what it holds into {layer.factors}: leave it "
                "None, or begin with a new cache."
            )
    _check_batch(layers[0], inputs)
    for layer in layers:
        layer.peers = layers


def _check_batch(layer: Any, inputs: Tensor) -> None:
    if layer.is_initialized and layer.batch_size != inputs.shape[0]:
        raise ValueError(
            f"The input has {inputs.shape[0]} rows, but `cache` holds {layer.batch_size}: repeat or select its rows "
            "(`batch_repeat_interleave`, `batch_select_indices`), or begin with a new cache."
        )
    if layer.is_initialized and layer.device != inputs.device:
        raise ValueError(f"The input is on {inputs.device}, but `cache` on {layer.device}: move the input there.")
    max_length = layer.get_max_length()
    if 0 <= max_length < layer.length + inputs.shape[1]:
        raise ValueError(
            f"`cache` holds {int(layer.length)} of at most {max_length} tokens, too many for {inputs.shape[1]} more: "
            f"make it with `max_cache_len` of at least {int(layer.length) + inputs.shape[1]}."
        )


def check_last_tokens(cache: Cache, attention_mask: Tensor | None, inputs: Tensor | None) -> None:
    """Check that the last tokens, whose logits are wanted, are among these inputs."""
    if attention_mask is None or torch.compiler.is_compiling() or inputs is None:
        return
    empty = ~attention_mask[:, -inputs.shape[1] :].bool().any(-1)
    layers = [layer for layer in getattr(cache, "layers", ()) if layer.is_initialized]
    if not layers or not empty.any():
        return
    rows = (empty & (layers[0].num_tokens.to(empty.device) > 0)).nonzero().flatten().tolist()
    if rows:
        raise ValueError(
            f"The new input of row {rows[0]} is padding alone, after tokens in `cache`, so that it has no last token "
            "to give logits of: pad on the left (`padding_side='left'`), or set `prefill_chunk_size=None`."
        )


def bucket_factors_of_call(config: ReformerHfConfig, num_buckets: int | Sequence[int] | None) -> list[int] | None:
    """The factors of a number of buckets that is given for one call, checked; `None` where none is given."""
    if num_buckets is None:
        return None
    config.check_num_buckets(num_buckets)
    return [num_buckets] if isinstance(num_buckets, int) else list(num_buckets)


def check_not_exporting() -> None:
    """Refuse `torch.export`."""
    if torch.compiler.is_exporting():
        raise ValueError(
            "`torch.export` traces one order of the sorted positions, which is another one for each input: use "
            "`torch.compile`, or share the model as a folder (`save_pretrained`)."
        )
