# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""What `generate` does otherwise for a Reformer than for other models."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from .lsh_attention import factors_of


class ReformerHfGenerationMixin(GenerationMixin):
    """Generation with a KV cache, or without one with the whole sequence at each step."""

    config: Any
    get_input_embeddings: Callable[[], nn.Module]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # Transformers says no by the name of the class.
        return True

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, inputs_embeds: Tensor, **kwargs) -> Tensor | None:
        """Which new tokens are padding, `[B, n]`, or `None`: of a fixed shape, as what is compiled needs it."""
        if attention_mask is not None:
            attention_mask = attention_mask[:, -inputs_embeds.shape[1] :]
            if attention_mask.all():
                return None
        return attention_mask

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, inputs_embeds=None, cache=None, **kwargs
    ):
        """As in Transformers; without a cache every step takes the whole sequence."""
        if inputs_embeds is not None and cache is None:
            # What was generated follows a prompt that was given as embeddings. A mask of ones is not handed on.
            num_new = kwargs["position_ids"].shape[-1] - inputs_embeds.shape[1]
            new_ids = input_ids[:, input_ids.shape[1] - num_new :]
            inputs_embeds = torch.cat([inputs_embeds, self.get_input_embeddings()(new_ids)], dim=1)
            kwargs["is_first_iteration"] = True
        if cache is not None:
            kwargs.update(cache=cache, next_sequence_length=next_sequence_length)
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """As in Transformers, but padding on the right counts no token more."""
        attention_mask = model_kwargs.get("attention_mask")
        if attention_mask is None:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """As in Transformers. A number of buckets that comes from the length is that of all tokens that are planned,
        prompt and new ones, at every step, with and without a cache."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if self.config.num_buckets is not None or model_kwargs.get("num_buckets") is not None:
            return
        layers = getattr(model_kwargs.get("cache"), "layers", ())
        if any(layer.is_initialized for layer in layers):
            # What it holds is hashed already.
            return
        planned = min(generation_config.max_length, self.config.max_position_embeddings)
        model_kwargs["num_buckets"] = factors_of(self.config, planned)

    def _validate_generated_length(self, generation_config, input_ids_length, has_default_max_length):
        """As in Transformers, and that there are as many positions; the last token takes none."""
        length, is_default = input_ids_length, has_default_max_length
        super()._validate_generated_length(generation_config, length, is_default)  # type: ignore[misc]
        longest = self.config.max_position_embeddings
        if generation_config.max_length is not None and generation_config.max_length - 1 > longest:
            raise ValueError(
                f"The prompt and what is to be generated are up to {generation_config.max_length - 1} tokens long, "
                f"but this model takes 1 to {longest} (`max_position_embeddings`): lower `max_new_tokens` (or "
                "`max_length`), cut the prompt, or train a model with more positions."
            )
