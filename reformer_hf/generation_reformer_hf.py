# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Generation methods of Transformers that the Reformer overrides."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin

from .input_checks import EMPTY_INPUT
from .lsh_attention import factors_of


class ReformerHfGenerationMixin(GenerationMixin):
    """Generation with a KV cache, or without one by processing the whole sequence at each step."""

    config: Any
    get_input_embeddings: Callable[[], nn.Module]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # Transformers returns False for class names that contain "reformer".
        return True

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, inputs_embeds: Tensor, **kwargs) -> Tensor | None:
        """Return the mask `[B, n]` of the new tokens, or `None` without padding. Compiled code needs a fixed shape."""
        if attention_mask is not None:
            attention_mask = attention_mask[:, -inputs_embeds.shape[1] :]
            if attention_mask.all():
                return None
        return attention_mask

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, inputs_embeds=None, cache=None, **kwargs
    ):
        """Prepare inputs as in Transformers. Without a cache, each step processes the whole sequence."""
        if inputs_embeds is not None and cache is None and not self.config.is_encoder_decoder:
            # Append the embeddings of the generated tokens to a prompt of embeddings. Their number follows from the
            # position ids, because a mask of ones is not passed on.
            num_new = kwargs["position_ids"].shape[-1] - inputs_embeds.shape[1]
            new_ids = input_ids[:, input_ids.shape[1] - num_new :]
            inputs_embeds = torch.cat([inputs_embeds, self.get_input_embeddings()(new_ids)], dim=1)
            kwargs["is_first_iteration"] = True
        if cache is not None:
            kwargs.update(cache=cache, next_sequence_length=next_sequence_length)
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)

    def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs):
        """Infer padding as in Transformers, but not in a single row after cached tokens, where it was generated."""
        cache = model_kwargs.get("cache")
        if cache is not None and len(inputs_tensor) == 1 and cache.get_seq_length() > 0:
            return inputs_tensor.new_ones(inputs_tensor.shape[:2], dtype=torch.long)
        return super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """Count tokens as in Transformers, but give padding on the right the position of the last token."""
        if inputs_tensor.shape[1] == 0:
            raise ValueError(EMPTY_INPUT)
        attention_mask = model_kwargs.get("attention_mask")
        if attention_mask is None:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """
        Prepare the cache as in Transformers, and fix the number of buckets.

        If the number of buckets follows from the length, all steps use the number for the planned length of prompt and
        new tokens, with and without a cache.

        Raises:
            ValueError: If the model has too few positions for a prompt of embeddings and the new tokens, or for
                options that are not supported.
        """
        self._check_options(generation_config)
        self._check_planned_length(max_cache_length)
        given = model_kwargs.get("cache")
        rest = generation_mode, batch_size, max_cache_length
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest)  # type: ignore[misc]
        cache = model_kwargs.get("cache")
        if isinstance(cache, EncoderDecoderCache):
            if given is None:
                # Transformers creates layers for self-attention.
                cache.cross_attention_cache = DynamicCache()
            cache = cache.self_attention_cache
        if self.config.num_buckets is not None or model_kwargs.get("num_buckets") is not None:
            return
        layers = getattr(cache, "layers", ())
        if any(layer.is_initialized for layer in layers):
            # The tokens in the cache are already hashed.
            return
        # The length in the generation config does not count a prompt of embeddings.
        planned = min(max_cache_length + 1, self.config.max_position_embeddings)
        config = self.config.decoder_config if self.config.is_encoder_decoder else self.config
        model_kwargs["num_buckets"] = factors_of(config, planned)

    def _validate_generated_length(self, generation_config, input_ids_length, has_default_max_length):
        """
        Validate the length as in Transformers, and check that the model has enough positions.

        The last token needs no position because the model does not process it.

        Raises:
            ValueError: If the model has too few positions.
        """
        length, is_default = input_ids_length, has_default_max_length
        super()._validate_generated_length(generation_config, length, is_default)  # type: ignore[misc]
        if generation_config.max_length is not None:
            self._check_planned_length(generation_config.max_length - 1)

    def _check_options(self, generation_config: Any) -> None:
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                f"`assistant_early_exit` is {generation_config.assistant_early_exit}, but the LM head reads both "
                "residual streams after the last layer: use an `assistant_model`, or `prompt_lookup_num_tokens`."
            )
        if generation_config.prefill_chunk_size is not None and self.config.is_encoder_decoder:
            raise ValueError(
                f"`prefill_chunk_size` is {generation_config.prefill_chunk_size}, but the prompt of this model is the "
                "encoder input, which is processed as a whole: leave it None."
            )

    def _check_planned_length(self, length: int) -> None:
        longest = self.config.max_position_embeddings
        if length > longest:
            raise ValueError(
                f"Generation would process up to {length} tokens, but this model takes 1 to {longest} "
                "(`max_position_embeddings`): lower `max_new_tokens` (or `max_length`), truncate the prompt, or add "
                "positions (`model.resize_position_embeddings`) and train them."
            )
