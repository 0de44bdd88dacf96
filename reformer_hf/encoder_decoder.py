# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
The Reformer encoder-decoder (Kitaev, Kaiser, Levskaya 2020, section 5).

    encoder:  e = Encoder(tokens)                        bidirectional, two branches per layer
    decoder:  y1 = x1 + Attention(x2)                    causal
              y2 = x2 + CrossAttention(y1, e)            exact
              y3 = y1 + FeedForward(y2)                  the next layer starts with (y2, y3)

Both stacks are reversible. The encoder output is kept once, for all layers of the decoder.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from .configuration_encoder_decoder import ReformerHfEncoderDecoderConfig
from .configuration_reformer_hf import ReformerHfConfig
from .generation_reformer_hf import ReformerHfGenerationMixin
from .input_checks import check_encoder_decoder_call
from .lm_head import IGNORED
from .modeling_outputs import ReformerHfModelOutput, ReformerHfSeq2SeqLMOutput, ReformerHfSeq2SeqModelOutput
from .modeling_reformer_hf import ReformerHfLMHeadModel, ReformerHfModel, ReformerHfPreTrainedModel


class ReformerHfEncoderDecoderPreTrainedModel(ReformerHfPreTrainedModel):
    """Base class of the encoder-decoder models, which always share the word embeddings of both stacks."""

    config_class: type[ReformerHfConfig] = ReformerHfEncoderDecoderConfig
    config: ReformerHfEncoderDecoderConfig
    base_model_prefix = "model"
    _auto_map = {
        "AutoConfig": "configuration_encoder_decoder.ReformerHfEncoderDecoderConfig",
        "AutoModel": "encoder_decoder.ReformerHfEncoderDecoderModel",
        "AutoModelForSeq2SeqLM": "encoder_decoder.ReformerHfForConditionalGeneration",
    }

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Return the tied weights of Transformers and, always, the word embeddings of both stacks."""
        keys = super().get_expanded_tied_weights_keys(all_submodels=all_submodels)
        if all_submodels:
            return keys
        prefix = "" if self.base_model is self else f"{self.base_model_prefix}."
        decoder, encoder = (f"{prefix}{stack}.embeddings.word_embeddings.weight" for stack in ("decoder", "encoder"))
        return {**keys, decoder: encoder}

    def get_encoder(self, modality: str | None = None) -> ReformerHfModel:
        return cast(ReformerHfModel, self.base_model.encoder)

    def get_decoder(self) -> ReformerHfModel:
        return cast(ReformerHfModel, self.base_model.decoder)

    def get_input_embeddings(self) -> nn.Module:
        return self.get_encoder().get_input_embeddings()

    def set_input_embeddings(self, new_embeddings: nn.Module):
        for stack in (self.get_encoder(), self.get_decoder()):
            stack.set_input_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Resize the word embeddings as in Transformers."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for stack in (self.get_encoder(), self.get_decoder()):
            stack.config.vocab_size = self.config.vocab_size
        return embeddings

    def get_position_embeddings(self) -> tuple[nn.Module, nn.Module]:  # type: ignore[override]
        """Return the position embeddings of both stacks, see `ReformerHfPreTrainedModel`."""
        return self.get_encoder().get_position_embeddings(), self.get_decoder().get_position_embeddings()

    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Change the number of positions of both stacks, see `ReformerHfPreTrainedModel`."""
        for stack in (self.get_encoder(), self.get_decoder()):
            stack.resize_position_embeddings(new_num_position_embeddings)
            self.config.axial_pos_shape = stack.config.axial_pos_shape
        self.config.max_position_embeddings = new_num_position_embeddings


class ReformerHfEncoderDecoderModel(ReformerHfEncoderDecoderPreTrainedModel):
    """A bidirectional encoder, and a causal decoder that attends to its output."""

    # Only used to save a model; see `get_expanded_tied_weights_keys` for all other purposes.
    _tied_weights_keys = {"decoder.embeddings.word_embeddings.weight": "encoder.embeddings.word_embeddings.weight"}

    def __init__(self, config: ReformerHfEncoderDecoderConfig):
        super().__init__(config)
        self.encoder = ReformerHfModel(config.encoder_config)
        self.decoder = ReformerHfModel(config.decoder_config)
        self.post_init()

    @property
    def checks_values(self) -> bool:
        """Whether both stacks check the values of inputs, see `ReformerHfModel`."""
        return self.encoder.checks_values

    @checks_values.setter
    def checks_values(self, value: bool):
        self.encoder.checks_values = self.decoder.checks_values = value

    @property
    def reads_values(self) -> bool:
        """Whether both stacks read the values of inputs, see `ReformerHfModel`."""
        return self.encoder.reads_values

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache", raise_if_both_names=True)
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        cache: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        num_hashes: int | None = None,
        num_buckets: int | Sequence[int] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> ReformerHfSeq2SeqModelOutput:
        """
        Compute the hidden states of decoder inputs, given encoder inputs.

        Args:
            input_ids (`[B, S]`, *optional*): Token ids of the encoder.
            attention_mask (`[B, S]`, *optional*): 1 for tokens of the encoder, 0 for padding, on any side.
            decoder_input_ids (`[B, L]`): Token ids of the decoder.
            decoder_attention_mask (`[B, L]`, *optional*): As `attention_mask`, for the decoder.
            encoder_outputs (*optional*): The output of the encoder, which is then not computed: a model output, or a
                tuple with `last_hidden_state` `[B, S, 2 * hidden_size]` in the first place.
            cache (`EncoderDecoderCache`, *optional*): KV cache of both kinds of attention of the decoder.
            inputs_embeds, decoder_inputs_embeds (*optional*): Word embeddings instead of ids.
            position_ids (`[B, S]`, *optional*): Positions of the encoder, see `ReformerHfModel.forward`.
            decoder_position_ids (`[B, L]`, *optional*): Positions of the decoder.
            num_hashes (`int`, *optional*): Number of hash rounds for this call, in both stacks.
            num_buckets (`int` or `list[int]`, *optional*): Buckets per round for this call, in both stacks.
            use_cache (`bool`, *optional*): Whether to create and return a cache if none is given, in evaluation mode.
                `None` means `config.use_cache` without gradients, and False otherwise.
            output_hidden_states, output_attentions (`bool`, *optional*): Whether to return those of both stacks.

        Raises:
            ValueError: If an input does not match the config or another input.
        """
        check_encoder_decoder_call(cache, kwargs)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        shared = {
            "num_hashes": num_hashes,
            "num_buckets": num_buckets,
            "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
            "return_dict": True,
            "use_cache": False,
        }
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError(
                "`decoder_input_ids` is missing: pass the tokens of the decoder, or, to a model with an LM head, "
                "`labels`."
            )
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **shared,
            )
        elif not isinstance(encoder_outputs, dict):
            encoder_outputs = ReformerHfModelOutput(last_hidden_state=encoder_outputs[0])
        if use_cache is None:
            use_cache = self.uses_cache_by_default
        if cache is None and use_cache and not self.training:
            cache = EncoderDecoderCache(DynamicCache(config=self.decoder.config), DynamicCache())
        outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            inputs_embeds=decoder_inputs_embeds,
            cache=None if cache is None else cache.self_attention_cache,
            cross_cache=None if cache is None else cache.cross_attention_cache,
            encoder_hidden_states=encoder_outputs["last_hidden_state"],
            encoder_attention_mask=attention_mask,
            **shared,
        )
        return ReformerHfSeq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            cache=cache,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            decoder_attention_positions=outputs.attention_positions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs["last_hidden_state"],
            encoder_hidden_states=encoder_outputs.get("hidden_states"),
            encoder_attentions=encoder_outputs.get("attentions"),
            encoder_attention_positions=encoder_outputs.get("attention_positions"),
        )


class ReformerHfForConditionalGeneration(
    ReformerHfGenerationMixin, ReformerHfEncoderDecoderPreTrainedModel, ReformerHfLMHeadModel
):
    """An encoder-decoder with an LM head, for tasks from sequence to sequence."""

    _tied_weights_keys = {"lm_head.decoder.weight": "model.encoder.embeddings.word_embeddings.weight"}
    _loss_name = "ForMaskedLM"

    _base_class = ReformerHfEncoderDecoderModel

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Return decoder inputs for labels `[B, L]`, as `DataCollatorForSeq2Seq` needs them."""
        return shift_tokens_right(labels, self.config.pad_token_id, self.config.decoder_start_token_id)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache", raise_if_both_names=True)
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        cache: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> ReformerHfSeq2SeqLMOutput:
        """
        Compute the logits of the target tokens and, given labels, the loss.

        The other arguments and exceptions are those of `ReformerHfEncoderDecoderModel.forward`.

        Args:
            labels (`[B, L]`, *optional*): The target tokens, or -100 for positions without loss. Without decoder
                inputs, these are the labels, moved by one position and starting with `decoder_start_token_id`. In
                training with `chunk_size_lm_head`, the model then only returns the loss and no logits.
            **kwargs: Other arguments of the base model, and `num_items_in_batch` of the loss.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if labels is not None and use_cache is None:
            use_cache = False
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            cache=cache,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            **{**kwargs, "return_dict": True},
        )
        logits, loss = self.logits_and_loss(outputs.last_hidden_state, labels, **kwargs)
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return ReformerHfSeq2SeqLMOutput(loss=loss, logits=logits, **others)


def shift_tokens_right(labels: Tensor, pad_token_id: int | None, decoder_start_token_id: int | None) -> Tensor:
    """
    Return decoder inputs for labels `[B, L]`: the start token, then the labels without the last one.

    Positions without loss (-100) become padding.

    Raises:
        ValueError: If the start token or the padding token is missing.
    """
    for name, value in (("decoder_start_token_id", decoder_start_token_id), ("pad_token_id", pad_token_id)):
        if value is None:
            raise ValueError(
                f"`{name}` of the config is None, but decoder inputs are made of labels with it: set it, or pass "
                "`decoder_input_ids`."
            )
    start = labels.new_full((labels.shape[0], 1), decoder_start_token_id)
    return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, pad_token_id)], dim=1)


# By this name, `Trainer` writes the task into model cards.
MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.setdefault(
    ReformerHfEncoderDecoderConfig.model_type, ReformerHfForConditionalGeneration.__name__
)

ReformerHfEncoderDecoderModel.register_for_auto_class("AutoModel")
ReformerHfForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")

__all__ = ["ReformerHfEncoderDecoderModel", "ReformerHfForConditionalGeneration"]
