# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the encoder-decoder: that of the Reformer, and the layers of the decoder."""

from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict

from .configuration_reformer_hf import ReformerHfConfig


@strict
class ReformerHfEncoderDecoderConfig(ReformerHfConfig):
    r"""
    Configuration of a Reformer encoder-decoder (Kitaev, Kaiser, Levskaya 2020, section 5).

    All fields of `ReformerHfConfig` apply to both stacks, except that the decoder is causal, so that it sees no chunks
    after (`*_num_chunks_after`). `max_position_embeddings` and `max_kept_activations` are limits for each stack.

    Args:
        attn_layers (`list[str]`): Type of each encoder layer.
        decoder_attn_layers (`list[str]`, *optional*): Type of the self-attention of each decoder layer. `None` means
            `attn_layers`.
        decoder_start_token_id (`int`, *optional*): Token that the decoder starts with. `None` means `pad_token_id`, as
            in T5.

    Raises:
        `ValueError`: As for `ReformerHfConfig`, or if `decoder_start_token_id` is not in the vocabulary.

    ```python
    >>> from reformer_hf import ReformerHfEncoderDecoderConfig

    >>> config = ReformerHfEncoderDecoderConfig(attn_layers=["local", "lsh"], decoder_attn_layers=["local"])
    >>> config.decoder_config.is_decoder
    True
    ```"""

    model_type = "reformer_hf_encoder_decoder"
    keys_to_ignore_at_inference = [
        "cache",
        "cross_attentions",
        "decoder_attentions",
        "decoder_attention_positions",
        "decoder_hidden_states",
        "encoder_attentions",
        "encoder_attention_positions",
        "encoder_hidden_states",
        "encoder_last_hidden_state",
    ]
    # The root group shards the word embeddings, which both stacks share.
    base_model_fsdp_plan = {
        "encoder.encoder.layers.*": "free_full_weight",
        "encoder.encoder.layer_norm": "keep_full_weight",
        "decoder.encoder.layers.*": "free_full_weight",
        "decoder.encoder.layer_norm": "keep_full_weight",
    }

    is_encoder_decoder: bool = True
    decoder_attn_layers: list[str] | tuple[str, ...] | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.decoder_attn_layers is None:
            self.decoder_attn_layers = self.attn_layers
        self.decoder_attn_layers = tuple(self.decoder_attn_layers)
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.pad_token_id
        super().__post_init__(**kwargs)

    @property
    def encoder_config(self) -> ReformerHfConfig:
        """The config of the encoder."""
        return ReformerHfConfig(**self._shared_fields())

    @property
    def decoder_config(self) -> ReformerHfConfig:
        """The config of the decoder."""
        changed = {"attn_layers": self.decoder_attn_layers, "is_decoder": True, "add_cross_attention": True}
        after = {"local_num_chunks_after": None, "lsh_num_chunks_after": None, "pooling": None}
        return ReformerHfConfig(**{**self._shared_fields(), **changed, **after})

    def _shared_fields(self) -> dict[str, Any]:
        names = {each.name for each in fields(ReformerHfConfig)} - {"architectures", "is_encoder_decoder"}
        return {name: getattr(self, name) for name in names}

    def validate_reformer(self):
        """Check all fields. Raises `ValueError` if one is out of range or contradicts another."""
        if self.is_decoder or not self.is_encoder_decoder or self.add_cross_attention:
            raise ValueError(
                f"`is_encoder_decoder` is {self.is_encoder_decoder}, `is_decoder` is {self.is_decoder} and "
                f"`add_cross_attention` is {self.add_cross_attention}, but an encoder-decoder needs True, False and "
                "False: leave them out, or use `ReformerHfConfig` for a single stack."
            )
        super().validate_reformer()
        self._check_layer_types("decoder_attn_layers")
        if not 0 <= (self.decoder_start_token_id or 0) < self.vocab_size:
            raise ValueError(
                f"`decoder_start_token_id` is {self.decoder_start_token_id}, but must be in "
                f"[0, {self.vocab_size - 1}] (`vocab_size` is {self.vocab_size}): choose another token, such as "
                "`pad_token_id`."
            )
        # Both stacks check their fields when their configs are created.
        for name in ("encoder_config", "decoder_config"):
            getattr(self, name)


ReformerHfEncoderDecoderConfig.register_for_auto_class()

__all__ = ["ReformerHfEncoderDecoderConfig"]
