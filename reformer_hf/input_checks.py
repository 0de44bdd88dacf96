# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Checks of user inputs, each called once per model call. Each raises a `ValueError` that says what to change."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from .cache import CacheSpec
from .configuration_reformer_hf import ReformerHfConfig
from .cross_attention import Context
from .documents import Documents, starts_by_index, starts_by_length, starts_by_position

EMPTY_INPUT = (
    "The input is empty (0 tokens long), but needs at least one token: to generate from an empty prompt, start with "
    "the token `bos_token_id`."
)

# Up to this number, ids are compared faster in Python than by torch.
_FEW_IDS = 16


def check_call(config: ReformerHfConfig, kwargs: dict[str, Any], parameter: Tensor, cache: Cache | None) -> None:
    """Check that the model supports how it is called, apart from its inputs; `parameter` is one of the model."""
    _check_not_transformed()
    check_not_in_tree_cache(kwargs)
    _check_not_partitioned(config, parameter)
    if not all(getattr(layer, "is_complete", True) for layer in getattr(cache, "layers", ())):
        raise ValueError(
            "An earlier call with this `cache` was interrupted, and its layers hold different tokens: start with a "
            "new cache, or empty this one (`cache.reset()`)."
        )


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
    Check that the shapes of inputs match the config and each other.

    Returns:
        `input_ids` or `inputs_embeds`, whichever is given.
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
    if shape[1] == 0:
        raise ValueError(EMPTY_INPUT)
    if attention_mask is not None and tuple(attention_mask.shape) != shape:
        length = 0 if cache is None or torch.compiler.is_compiling() else int(cache.get_seq_length())
        full_shape = (shape[0], length + shape[1])
        if tuple(attention_mask.shape) != full_shape:
            raise ValueError(
                f"`attention_mask` has shape {tuple(attention_mask.shape)}, but must be {full_shape}, one entry for "
                "each token" + (f" including those in `cache`, or {shape} for the new ones." if length else ".")
            )
    if position_ids is not None and tuple(position_ids.shape) not in (shape, (1, shape[1])):
        raise ValueError(
            f"`position_ids` has shape {tuple(position_ids.shape)}, but must be {shape} or {(1, shape[1])}."
        )
    if num_hashes is not None and num_hashes < 1:
        raise ValueError(f"`num_hashes` is {num_hashes}, but must be at least 1: leave it None to use the config's.")
    return inputs


def check_length(config: ReformerHfConfig, length: int) -> None:
    """Check that the model has positions for the tokens of one document."""
    if length > config.max_position_embeddings:
        raise ValueError(
            f"The input is {length} tokens long, but this model takes at most {config.max_position_embeddings} "
            "(`max_position_embeddings`): truncate the input, or add positions (`model.resize_position_embeddings`) "
            "and train them."
        )


def check_values(
    config: ReformerHfConfig,
    input_ids: Tensor | None,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    encoder_attention_mask: Tensor | None,
    length: int,
) -> None:
    """Check the values of inputs of `length` tokens, which waits for the device."""
    _check_range("input_ids", input_ids, config.vocab_size, "vocab_size")
    check_position_ids(config, position_ids)
    if attention_mask is not None:
        _check_mask(attention_mask[:, -length:])
    if encoder_attention_mask is not None:
        # The `attention_mask` of an encoder-decoder.
        _check_mask(encoder_attention_mask)


def check_position_ids(config: ReformerHfConfig, position_ids: Tensor | None) -> None:
    """Check that the model has an embedding for each position. This reads values, and so waits for the device."""
    _check_range("position_ids", position_ids, config.max_position_embeddings, "max_position_embeddings")


def _check_mask(mask: Tensor) -> None:
    if mask.dtype == torch.bool:
        return
    wrong = mask[(mask != 0) & (mask != 1)]
    if wrong.numel():
        raise ValueError(
            f"`attention_mask` holds {wrong[0].item()}, but must be 1 for tokens and 0 for padding: do not pass an "
            "additive mask (0 and -inf) or the indices of packed documents."
        )


def _check_range(name: str, ids: Tensor | None, limit: int, field: str) -> None:
    if ids is None or ids.numel() == 0:
        return
    if ids.numel() <= _FEW_IDS:
        smallest, largest = min(few := ids.flatten().tolist()), max(few)
    else:
        smallest, largest = torch.stack(torch.aminmax(ids)).tolist()
    if smallest < 0 or largest >= limit:
        bad_id = smallest if smallest < 0 else largest
        raise ValueError(
            f"`{name}` holds {bad_id}, but ids of this model must be in [0, {limit - 1}] (`{field}` is {limit}): "
            "use the tokenizer of the model, or enlarge the model (`resize_token_embeddings` for tokens, "
            "`resize_position_embeddings` for positions)."
        )


def check_cache(
    cache: Cache,
    config: ReformerHfConfig,
    specs: Sequence[CacheSpec],
    inputs: Tensor,
    factors: Sequence[int] | None,
) -> None:
    """
    Check that a cache matches the model, its options and the input.

    Args:
        cache: The cache.
        config: The config of the model.
        specs: Specs of the model's cache layers.
        inputs: Ids `[B, L]` or embeddings `[B, L, E]` of the new tokens.
        factors: Factors of the number of buckets, if the call gives one.
    """
    if not config.is_decoder:
        raise ValueError(
            "`cache` is given, but without `is_decoder=True` each token also sees later tokens: pass no cache."
        )
    layers: Sequence[Any] = getattr(cache, "layers", ())
    layer_types = config.layer_types
    if [getattr(layer, "layer_type", None) for layer in layers] != layer_types:
        names = f" of {[type(layer).__name__ for layer in layers]}" if layers else ""
        raise ValueError(
            f"`cache` is a {type(cache).__name__}{names}, but the layers of this model need {layer_types}: create it "
            "with `DynamicCache(config=model.config)` or `StaticCache(config=model.config, max_cache_len=…)`. "
            "Adapters that consist of keys and values, such as prefix tuning, are not supported."
        )
    if torch.compiler.is_compiling():
        return
    for layer, spec in zip(layers, specs, strict=True):
        if layer.spec is not None and layer.spec is not spec and layer.spec != spec:
            raise ValueError(
                f"`cache` was created by another model or with other options: it is for {layer.spec}, but this input "
                f"needs {spec}. Start with a new cache."
            )
        if layer.spec is not None and factors is not None and getattr(layer, "factors", factors) != factors:
            raise ValueError(
                f"`num_buckets` is {factors}, but the tokens in `cache` were hashed with {layer.factors}: leave it "
                "None, or start with a new cache."
            )
    _check_batch(layers[0], inputs)


def _check_batch(layer: Any, inputs: Tensor) -> None:
    if layer.is_initialized and layer.batch_size != inputs.shape[0]:
        raise ValueError(
            f"The input has batch size {inputs.shape[0]}, but `cache` has {layer.batch_size}: repeat or select its "
            "rows (`batch_repeat_interleave`, `batch_select_indices`), or start with a new cache."
        )
    if layer.is_initialized and layer.device != inputs.device:
        raise ValueError(
            f"The input is on {inputs.device}, but `cache` is on {layer.device}: move the input to that device."
        )
    max_length = layer.get_max_length()
    if 0 <= max_length < layer.length + inputs.shape[1]:
        raise ValueError(
            f"`cache` holds {int(layer.length)} of at most {max_length} tokens, too many to add {inputs.shape[1]}: "
            f"create it with a `max_cache_len` of at least {int(layer.length) + inputs.shape[1]}."
        )


def check_last_tokens(cache: Cache, attention_mask: Tensor | None, inputs: Tensor | None) -> None:
    """Check that the last token of each row, whose logits are needed, is among these inputs."""
    if attention_mask is None or torch.compiler.is_compiling() or inputs is None:
        return
    empty = ~attention_mask[:, -inputs.shape[1] :].bool().any(-1)
    layers = [layer for layer in getattr(cache, "layers", ()) if layer.is_initialized]
    if not layers or not empty.any():
        return
    rows = (empty & (layers[0].num_tokens.to(empty.device) > 0)).nonzero().flatten().tolist()
    if rows:
        raise ValueError(
            f"The new input of row {rows[0]} is only padding, after tokens in `cache`, and has no last token to "
            "compute logits for: pad on the left (`padding_side='left'`), or set `prefill_chunk_size=None`."
        )


def documents_of_call(
    inputs: Tensor,
    position_ids: Tensor | None,
    padding: Tensor | None,
    seq_idx: Tensor | None,
    cu_seq_lens: Tensor | None,
    cache: Cache | None,
) -> Documents | None:
    """
    Return the packed documents of an input, or `None` if each row is one document.

    They follow from `seq_idx`, from `cu_seq_lens`, or from `position_ids` that start again. This reads values, and so
    waits for the device, if one of them is given.
    """
    shape = (inputs.shape[0], inputs.shape[1])
    if seq_idx is not None:
        if tuple(seq_idx.shape) != shape:
            raise ValueError(f"`seq_idx` has shape {tuple(seq_idx.shape)}, but must be {shape}.")
        starts = starts_by_index(seq_idx)
    elif cu_seq_lens is not None:
        ends = cu_seq_lens.tolist() if cu_seq_lens.dim() == 1 else []
        if not ends or ends[0] != 0 or ends[-1] != shape[0] * shape[1] or ends != sorted(ends):
            raise ValueError(
                f"`cu_seq_lens_q` is {ends or tuple(cu_seq_lens.shape)}, but must hold ascending lengths from 0 to "
                f"the {shape[0] * shape[1]} tokens of the input."
            )
        starts = starts_by_length(cu_seq_lens, shape)
    elif position_ids is not None and shape[1] > 1 and not (cache is not None and torch.compiler.is_compiling()):
        starts = starts_by_position(position_ids.expand(shape), padding)
    else:
        return None
    return Documents.of(starts, padding)


def check_documents(config: ReformerHfConfig, cache: Cache | None) -> None:
    """Check that a model can read several packed documents in a row."""
    if cache is not None:
        raise ValueError(
            "The input holds several documents in a row (positions start again), which a KV cache cannot continue: "
            "generate for one document per row, or pass no `cache`."
        )
    if config.add_cross_attention:
        raise ValueError(
            "The decoder input holds several documents in a row (positions start again), each of which would attend "
            "to the whole encoder output: give each document its own row."
        )
    if config.wrap_chunks:
        raise ValueError(
            "The input holds several documents in a row (positions start again), but with `wrap_chunks=True` "
            "(in-tree) chunks of different documents see each other: give each document its own row, or set "
            "`wrap_chunks=False`."
        )


def check_encoder_decoder_call(cache: Any, kwargs: dict[str, Any]) -> None:
    """Check that an encoder-decoder gets a cache of both kinds of attention, and no packed documents."""
    if cache is not None and not isinstance(cache, EncoderDecoderCache):
        raise ValueError(
            f"`cache` is a {type(cache).__name__}, but an encoder-decoder needs one for each kind of attention: "
            "create it with `EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache())`."
        )
    for name in ("seq_idx", "cu_seq_lens_q"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"`{name}` is given, but an encoder-decoder takes no packed documents, because each would attend to "
                "the encoder output of all: give each document its own row."
            )


def context_of_call(
    config: ReformerHfConfig,
    hidden_states: Tensor | None,
    attention_mask: Tensor | None,
    batch_size: int,
    cross_cache: Cache | None,
) -> Context | None:
    """
    Check the encoder output that a decoder attends to, with its mask and a cache of its keys and values.

    Returns:
        The encoder output and its mask; `None` for models without cross-attention.
    """
    if not config.add_cross_attention:
        if hidden_states is not None:
            raise ValueError(
                "`encoder_hidden_states` is given, but `add_cross_attention` is False, so the model would not read "
                "it: build the model with `add_cross_attention=True`, or use `ReformerHfForConditionalGeneration`."
            )
        return None
    if hidden_states is None:
        raise ValueError(
            "`encoder_hidden_states` is missing, but `add_cross_attention` is True: pass the output of an encoder."
        )
    width = config.output_size
    if hidden_states.dim() != 3 or hidden_states.shape[0] != batch_size or hidden_states.shape[2] != width:
        raise ValueError(
            f"`encoder_hidden_states` has shape {tuple(hidden_states.shape)}, but must be [{batch_size}, S, {width}] "
            "(2 * `hidden_size`), with one row for each row of the decoder input."
        )
    shape = tuple(hidden_states.shape[:2])
    if attention_mask is not None and tuple(attention_mask.shape) != shape:
        raise ValueError(
            f"`encoder_attention_mask` has shape {tuple(attention_mask.shape)}, but must be {shape}, one entry for "
            "each token of the encoder."
        )
    _check_cross_cache(cross_cache, shape)
    return Context.of(hidden_states, attention_mask)


def _check_cross_cache(cache: Cache | None, shape: tuple[int, ...]) -> None:
    layers: Sequence[Any] = getattr(cache, "layers", ())
    if not layers:
        return
    if type(layers[0]) is not DynamicLayer:
        raise ValueError(
            f"The cache of cross-attention has layers of type {type(layers[0]).__name__}, but keys and values of the "
            "encoder output need a plain one: create it with `EncoderDecoderCache(DynamicCache(config=model.config), "
            "DynamicCache())`."
        )
    if layers[0].is_initialized:
        cached = (layers[0].keys.shape[0], layers[0].keys.shape[2])
        if cached != shape:
            raise ValueError(
                f"`cache` holds keys and values of an encoder output of shape {cached}, but this call has one of "
                f"{shape}: pass the same encoder output in all calls, or start with a new cache."
            )


def bucket_factors_of_call(config: ReformerHfConfig, num_buckets: int | Sequence[int] | None) -> list[int] | None:
    """Check the number of buckets of one call and return its factors; `None` if the call gives none."""
    if num_buckets is None:
        return None
    config.check_num_buckets(num_buckets)
    return [num_buckets] if isinstance(num_buckets, int) else list(num_buckets)


def check_is_causal(config: ReformerHfConfig) -> None:
    """Check that a causal language model is not built from a config, or a checkpoint, of bidirectional attention."""
    if config.is_decoder:
        return
    saved = [name for name in config.architectures or () if not name.endswith(("ForCausalLM", "WithLMHead"))]
    if saved:
        raise ValueError(
            f"The checkpoint is of `{saved[0]}`, which attends in both directions (`is_decoder` is False), but a "
            "causal language model needs weights of causal attention: load the encoder with `ReformerHfModel`, or "
            "train a causal model. (`is_decoder=True` would use weights that were trained for other attention.)"
        )
    raise ValueError(
        "`is_decoder` is False, but a causal language model needs causal attention: set `is_decoder=True`."
    )


def _check_not_partitioned(config: ReformerHfConfig, parameter: Tensor) -> None:
    """Raise a `ValueError` if DeepSpeed partitions the parameters that a recomputation in the backward pass needs."""
    if not (config.reversible or config.chunk_size_feed_forward or config.chunk_size_lm_head):
        return
    if torch.is_grad_enabled() and hasattr(parameter, "ds_id"):
        raise ValueError(
            "The parameters are partitioned by DeepSpeed ZeRO-3, so reversible layers and chunks cannot recompute "
            "activations: use ZeRO-2 or FSDP2, or set `reversible=False`, `chunk_size_feed_forward=0` and "
            "`chunk_size_lm_head=0`."
        )


def check_not_in_tree_cache(kwargs: dict[str, Any]) -> None:
    """Raise a `ValueError` for the cache argument of the in-tree model. As in Llama, other names are ignored."""
    if kwargs.get("past_buckets_states") is not None:
        raise ValueError(
            "`past_buckets_states` is the cache of the in-tree Reformer, which this model does not read: pass "
            "`cache=DynamicCache(config=model.config)`, or `use_cache=True`, and then the returned `cache`."
        )


def _check_not_transformed() -> None:
    """Raise a `ValueError` under `torch.export`, `torch.jit.trace`, `torch.func` and forward-mode differentiation."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        raise ValueError(
            "`torch.export`, `torch.jit.trace` and exports to ONNX are not supported, because they would keep the "
            "sorted order of one input for all inputs: use `torch.compile`, or share the model as a folder "
            "(`save_pretrained`)."
        )
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        raise ValueError(
            "The transforms of `torch.func` (`grad`, `vmap`, `jvp`) and forward-mode differentiation are not "
            "supported, because attention has its own backward pass: use `backward()`, for gradients of single "
            "examples with batches of one."
        )
