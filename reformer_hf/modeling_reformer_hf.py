# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
The Reformer (Kitaev, Kaiser, Levskaya 2020, arXiv 2001.04451) as Transformers models.

    embeddings → x1 = x2 → layers, y1 = x1 + Attention(x2), y2 = x2 + FeedForward(y1) → LayerNorm([y1; y2]) → head

Parameter names are those of the in-tree model, so that its checkpoints load without conversion.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from .cache import CacheSpec, writing
from .chunked import has_hooks
from .configuration_reformer_hf import ReformerHfConfig
from .documents import Documents
from .embeddings import ReformerHfEmbeddings
from .full_cache import FullCacheLayer, StaticFullCacheLayer
from .generation_reformer_hf import ReformerHfGenerationMixin
from .gradient_checks import refuse_gradient
from .input_checks import (
    bucket_factors_of_call,
    check_cache,
    check_call,
    check_documents,
    check_inputs,
    check_is_causal,
    check_last_tokens,
    check_length,
    check_not_in_tree_cache,
    check_position_ids,
    check_values,
    context_of_call,
    documents_of_call,
)
from .label_checks import check_token_labels
from .lm_head import IGNORED, ReformerHfLMHead, check_not_fused, next_tokens, states_to_keep, tie_bias
from .local_cache import LocalCacheLayer, StaticLocalCacheLayer
from .lsh_attention import warn_of_few_buckets
from .lsh_cache import LSHCacheLayer, LSHChunkCacheLayer, StaticLSHCacheLayer, StaticLSHChunkCacheLayer
from .modeling_outputs import ReformerHfCausalLMOutput, ReformerHfModelOutput
from .pretrained_model import ReformerHfPreTrainedModel
from .reformer_encoder import ReformerHfEncoder
from .reformer_layer import ReformerHfLayer
from .rotary import Rotation, rotation_of
from .self_attention import AttentionCall, is_plain

if TYPE_CHECKING:
    # Transformers saves the files of all relative imports with a model: with this one, the other heads as well.
    from .task_heads import ReformerHfForMaskedLM  # noqa: F401


class ReformerHfModel(ReformerHfPreTrainedModel):
    """Embeddings and the stack of reversible layers."""

    # Whether to check the values of inputs in addition to their shapes: ids out of range then raise a `ValueError`,
    # and a mask of ones has no cost. On a GPU, each of these checks waits for the device.
    checks_values = True

    def __init__(self, config: ReformerHfConfig):
        super().__init__(config)
        self.embeddings = ReformerHfEmbeddings(config)
        self.encoder = ReformerHfEncoder(config)
        layers = cast(Sequence[ReformerHfLayer], self.encoder.layers)
        # By type of attention. Layers may be wrapped, skipped or deleted later.
        attentions = [layer.attention.self_attention for layer in layers]
        self._base_cache_specs = dict(zip(config.attn_layers, (each.cache_spec for each in attentions), strict=True))
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache", raise_if_both_names=True)
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        num_hashes: int | None = None,
        num_buckets: int | Sequence[int] | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cross_cache: Cache | None = None,
        **kwargs,
    ) -> ReformerHfModelOutput:
        """
        Compute the hidden states of an input.

        Args:
            input_ids (`[B, L]`, *optional*): Token ids, L from 1 to `max_position_embeddings`.
            attention_mask (`[B, L]`, *optional*): 1 for tokens, 0 for padding, on any side. With a cache that holds T
                tokens, `[B, T + L]`, or `[B, L]` for the new tokens only.
            position_ids (`[B, L]`, *optional*): Positions. By default, tokens are counted from 0, without padding.
                Where they do not increase, another document begins: packed documents do not see each other, and L may
                exceed `max_position_embeddings`.
            inputs_embeds (`[B, L, E]`, *optional*): Word embeddings instead of `input_ids`.
            num_hashes (`int`, *optional*): Number of hash rounds for this call; overrides the config.
            num_buckets (`int` or `list[int]`, *optional*): Buckets per round for this call; overrides the config.
            cache (`Cache`, *optional*): KV cache, a `DynamicCache(config=model.config)` or a `StaticCache`. The input
                continues the cached tokens and is added to them. Outputs have no gradient then: a backward pass from
                `last_hidden_state` raises an error, and `hidden_states` are constants. (Transformers before 5.24 calls
                this argument `past_key_values`.)
            use_cache (`bool`, *optional*): Whether to create and return a `DynamicCache` if none is given. Only has an
                effect on causal models in evaluation mode. `None` means `config.use_cache` without gradients
                (`torch.no_grad()`) and for one document per row, and False otherwise.
            output_hidden_states, output_attentions (`bool`, *optional*): Whether to return these as well, see
                `ReformerHfModelOutput`.
            seq_idx (`[B, L]`, *optional*): Index of the packed document that each token belongs to.
            cu_seq_lens_q (`[N + 1]`, *optional*): Cumulative lengths of packed documents, over all rows.
            encoder_hidden_states (`[B, S, 2 * E]`, *optional*): Encoder output, with `add_cross_attention`.
            encoder_attention_mask (`[B, S]`, *optional*): 1 for tokens of the encoder, 0 for padding.
            cross_cache (`Cache`, *optional*): Cache of the keys and values of the encoder output. As with `cache`,
                outputs have no gradient.

        Returns:
            `ReformerHfModelOutput`.

        Raises:
            ValueError: If an input does not match the config or another input. A given cache is then unchanged.
        """
        check_call(self.config, kwargs, self.encoder.layer_norm.weight, cache)
        inputs = check_inputs(self.config, input_ids, inputs_embeds, attention_mask, position_ids, num_hashes, cache)
        factors = bucket_factors_of_call(self.config, num_buckets)
        if self.reads_values:
            check_values(self.config, input_ids, position_ids, attention_mask, encoder_attention_mask, inputs.shape[1])
        context = context_of_call(
            self.config, encoder_hidden_states, encoder_attention_mask, inputs.shape[0], cross_cache
        )
        padding = self._padding(attention_mask, inputs)
        documents = documents_of_call(inputs, position_ids, padding, seq_idx, cu_seq_lens_q, cache)
        if cache is None:
            cache = self._new_cache(use_cache, documents)
        if documents is not None:
            check_documents(self.config, cache)
        if cache is not None:
            check_cache(cache, self.config, self._cache_specs(num_hashes), inputs, factors)
            warn_of_few_buckets(self.config, cache, inputs.shape[1])
        if position_ids is None:
            position_ids = self._position_ids(inputs, padding, documents, cache)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        layers: Sequence[Any] = () if cache is None else cache.layers
        appends = cache is not None and all(layer.can_append(inputs.shape[1]) for layer in layers)
        encode = self._encode if appends else self._encode_uncompiled
        lacks_gradient = torch.is_grad_enabled() and (cache is not None or cross_cache is not None)
        with torch.no_grad() if lacks_gradient else nullcontext(), writing(cache):
            output = encode(
                input_ids,
                position_ids,
                inputs_embeds,
                (cache, cross_cache),
                output_hidden_states,
                padding=padding,
                context=context,
                num_hashes=num_hashes,
                factors=factors,
                output_attentions=output_attentions,
                documents=documents,
            )
        if lacks_gradient:
            sources = (inputs, encoder_hidden_states, *self.parameters())
            if any(x is not None and x.requires_grad for x in sources):
                output.last_hidden_state = refuse_gradient(output.last_hidden_state)
        return output

    def _encode(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor,
        inputs_embeds: Tensor | None,
        caches: tuple[Cache | None, Cache | None],
        output_hidden_states: bool,
        **options,
    ) -> ReformerHfModelOutput:
        """Embed checked inputs and call the stack of layers; `options` are fields of `AttentionCall`."""
        inputs: Any = input_ids if inputs_embeds is None else inputs_embeds
        hidden_states = self.embeddings(input_ids, position_ids.expand(inputs.shape[:2]), inputs_embeds)
        rotation = self._rotation(position_ids, hidden_states.dtype)
        call = AttentionCall.on(hidden_states, rotation=rotation, **options)
        return self.encoder(hidden_states, call, *caches, output_hidden_states)

    @torch.compiler.disable(reason="Only decoding steps with a static cache are compiled: set `fullgraph=False`.")
    def _encode_uncompiled(self, *args, **options) -> ReformerHfModelOutput:
        return self._encode(*args, **options)

    def _rotation(self, position_ids: Tensor, dtype: torch.dtype) -> Rotation | None:
        """Return the rotation of the positions `[B or 1, L]` in local layers, or `None` if they have none."""
        theta = self.config.local_rope_theta
        if theta is None or "local" not in self.config.attn_layers:
            return None
        return rotation_of(position_ids, self.config.attention_head_size, theta, dtype)

    @property
    def reads_values(self) -> bool:
        """Whether checks read the values of inputs and labels: `checks_values`, but never in compiled code."""
        return self.checks_values and not torch.compiler.is_compiling()

    def _padding(self, attention_mask: Tensor | None, inputs: Tensor) -> Tensor | None:
        """Return which of the new tokens are padding, `[B, L]`, or `None` if the mask is known to have no zeros."""
        if attention_mask is None:
            return None
        attention_mask = attention_mask[:, -inputs.shape[1] :].to(inputs.device, torch.bool)
        return None if self.reads_values and attention_mask.all() else ~attention_mask

    def _new_cache(self, use_cache: bool | None, documents: Documents | None) -> Cache | None:
        """Create a KV cache for a call that has none, if it asks for one, or by default."""
        if use_cache is None:
            use_cache = documents is None and self.uses_cache_by_default
        return DynamicCache(config=self.config) if use_cache and self.config.is_decoder and not self.training else None

    def _position_ids(
        self, inputs: Tensor, padding: Tensor | None, documents: Documents | None, cache: Cache | None
    ) -> Tensor:
        """Count tokens from those in the cache on, `[B or 1, L]`; padding has the position of the token before it."""
        if documents is not None:
            position_ids = documents.positions(padding)
            check_position_ids(self.config, position_ids)
            return position_ids
        check_length(self.config, inputs.shape[1])
        if padding is None:
            position_ids = torch.arange(inputs.shape[1], device=inputs.device)[None]
        else:
            position_ids = (~padding).long().cumsum(-1) - 1
        layer: Any = None if cache is None else cache.layers[0]
        if layer is None or not layer.is_initialized:
            return position_ids.clamp(min=0)
        position_ids = (position_ids + layer.num_tokens.to(inputs.device)[:, None]).clamp(min=0)
        if self.reads_values:
            check_position_ids(self.config, position_ids)
        return position_ids

    def _cache_specs(self, num_hashes: int | None) -> list[CacheSpec]:
        """Return the specs of this model's cache layers."""
        specs = (self._base_cache_specs[layer_type] for layer_type in self.config.attn_layers)
        return [spec.with_hashes(num_hashes or self.config.num_hashes) for spec in specs]


class ReformerHfLMHeadModel(ReformerHfPreTrainedModel):
    """Base class of the language models: a Reformer with an LM head, which may share the word embeddings."""

    _tied_weights_keys = {"lm_head.decoder.weight": "reformer.embeddings.word_embeddings.weight"}
    # An alias of `lm_head.bias`. `Trainer` must not report it as missing in a checkpoint.
    _keys_to_ignore_on_save = ["lm_head.decoder.bias"]
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    _base_class: type[PreTrainedModel] = ReformerHfModel
    reformer: ReformerHfModel
    # The name of the default loss in Transformers.
    _loss_name: str

    def __init__(self, config: ReformerHfConfig):
        super().__init__(config)
        # By its name, Transformers would choose a loss with shifted labels for `ReformerHfForConditionalGeneration`.
        self.loss_type = self._loss_name
        setattr(self, self.base_model_prefix, self._base_class(config))
        self.lm_head: Any = ReformerHfLMHead(config)
        self.post_init()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "lm_head" and isinstance(value, nn.Linear):
            raise ValueError(
                "`lm_head` is a module that holds a linear layer: replace that, by "
                "`model.set_output_embeddings(linear)`, so that the model can be trained and saved."
            )
        super().__setattr__(name, value)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Return the tied weights of Transformers and, always, the two names of the LM head's bias."""
        keys = super().get_expanded_tied_weights_keys(all_submodels=all_submodels)
        return keys if all_submodels else {**keys, "lm_head.decoder.bias": "lm_head.bias"}

    def init_parallel_plans(self) -> None:
        """Initialize the plans as in Transformers, but without rules for tied modules: the root group shards them."""
        super().init_parallel_plans()
        if self.config.tie_word_embeddings:
            self._fsdp_plan = {
                name: style
                for name, style in self._fsdp_plan.items()
                if name not in ("lm_head", "reformer.embeddings")
            }

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.lm_head.decoder = new_embeddings
        self.lm_head.bias = new_embeddings.bias

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True):
        """
        Tie weights as in Transformers. If a checkpoint has both names of the LM head's bias, use the decoder's.

        In-tree, they are two parameters since 5.24, and only the decoder's bias is used.
        """
        if self.config.tie_word_embeddings and not getattr(self.lm_head, "tied", True):
            raise ValueError(
                "`tie_word_embeddings` was set after the model was built, whose LM head is twice as wide as its word "
                "embeddings: build the model from a config with `tie_word_embeddings=True`."
            )
        if missing_keys is not None and not missing_keys & {"lm_head.bias", "lm_head.decoder.bias"}:
            self.lm_head.bias = self.lm_head.decoder.bias
        super().tie_weights(missing_keys, recompute_mapping)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """
        Save the model, with an LM head as wide as the config says: PEFT unties it when it merges adapters.

        The bias that is saved is the one in use, also where `to_empty` has made two parameters of its two names.
        """
        tie_bias(self.lm_head)
        head = self.lm_head
        if getattr(head, "tied", False) and not self.config.tie_word_embeddings and is_plain(head.decoder):
            head.untie()
        return super().save_pretrained(save_directory, *args, **kwargs)

    def check_labels(
        self,
        labels: Tensor | None,
        states: Tensor,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **kwargs,
    ) -> None:
        """Raise a `ValueError` if labels do not match hidden states `[B, L, …]` or the vocabulary."""
        for name, given in (("labels", labels), ("shift_labels", shift_labels)):
            if given is not None:
                vocabulary = self.config.vocab_size, "vocab_size"
                check_token_labels(given, states, *vocabulary, bool(self.base_model.reads_values), ignore_index, name)

    def logits_and_loss(
        self, hidden_states: Tensor, labels: Tensor | None, **kwargs
    ) -> tuple[Tensor | None, Tensor | None]:
        """
        Compute logits and, given labels, the loss of the token at each position.

        Args:
            hidden_states: The output of the base model, `[B, L, 2 * E]`.
            labels: `[B, L]`, -100 for positions without loss.
            **kwargs: Arguments of the loss.

        Returns:
            Logits `[B, L, vocab_size]` and loss; the logits are `None` in training with `chunk_size_lm_head`.
        """
        if labels is None:
            return self.lm_head(hidden_states), None
        self.check_labels(labels, hidden_states, **kwargs)
        # The losses of Transformers take no views with gaps, such as `labels[:, :n]`.
        labels = labels.contiguous()
        if self._loss_without_logits:
            return None, self.lm_head.loss(hidden_states, labels, **kwargs)
        logits = self.lm_head(hidden_states)
        return logits, self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

    @property
    def _has_default_loss(self) -> bool:
        return self.loss_function is LOSS_MAPPING[self._loss_name]

    @property
    def _loss_without_logits(self) -> bool:
        """Whether training steps compute the loss without logits: only the default loss of a plain linear layer."""
        is_default = self._has_default_loss and is_plain(self.lm_head.decoder) and not has_hooks(self.lm_head)
        return self.training and self.lm_head.chunk_size > 0 and is_default


class ReformerHfForCausalLM(ReformerHfGenerationMixin, ReformerHfLMHeadModel):
    """A causal Reformer that predicts the next token."""

    _loss_name = "ForCausalLM"

    def __init__(self, config: ReformerHfConfig):
        check_is_causal(config)
        super().__init__(config)
        if config.tie_word_embeddings:
            self.register_forward_pre_hook(check_not_fused, with_kwargs=True)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache", raise_if_both_names=True)
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        num_hashes: int | None = None,
        labels: Tensor | None = None,
        num_buckets: int | Sequence[int] | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cross_cache: Cache | None = None,
        **kwargs,
    ) -> ReformerHfCausalLMOutput:
        """
        Compute the logits of the next token and, given labels, the loss.

        The other arguments and exceptions are those of `ReformerHfModel.forward`.

        Args:
            labels (`[B, L]`, *optional*): The tokens, or -100 for positions without loss. The model shifts them. In
                training with `chunk_size_lm_head`, the model then only returns the loss and no logits.
            use_cache (`bool`, *optional*): As in `ReformerHfModel.forward`; with labels, `None` means False.
            logits_to_keep (`int` or `Tensor`, defaults to 0): Compute only the logits of that many last positions, or
                of the positions in a tensor; 0 means all. A position of padding gets the logits of the last token
                before it, if a number is given.
            **kwargs: Arguments of the loss, such as `num_items_in_batch` and `shift_labels`.

        Returns:
            `ReformerHfCausalLMOutput`.
        """
        check_not_in_tree_cache(kwargs)
        has_labels = labels is not None or kwargs.get("shift_labels") is not None
        if has_labels and use_cache is None:
            use_cache = False
        if cache is not None and isinstance(logits_to_keep, int) and logits_to_keep > 0:
            check_last_tokens(cache, attention_mask, input_ids if inputs_embeds is None else inputs_embeds)
        outputs = self.reformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            num_hashes=num_hashes,
            num_buckets=num_buckets,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            cross_cache=cross_cache,
            return_dict=True,
        )
        logits = loss = None
        self.check_labels(labels, outputs.last_hidden_state, **kwargs)
        if has_labels and self._loss_without_logits:
            loss = self.lm_head.loss(outputs.last_hidden_state, next_tokens(labels, **kwargs), **kwargs)
        else:
            logits = self.lm_head(states_to_keep(outputs.last_hidden_state, logits_to_keep, attention_mask))
            if has_labels:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return ReformerHfCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            attention_positions=outputs.attention_positions,
            cross_attentions=outputs.cross_attentions,
            cache=outputs.cache,
        )


# `DynamicCache` and `StaticCache` look up cache layers by the names in `config.layer_types`.
DYNAMIC_LAYER_TYPE_MAPPING.update(
    {each.layer_type: each for each in (LocalCacheLayer, LSHCacheLayer, LSHChunkCacheLayer, FullCacheLayer)}
)
STATIC_LAYER_TYPE_MAPPING.update(
    {
        each.layer_type: each
        for each in (StaticLocalCacheLayer, StaticLSHCacheLayer, StaticLSHChunkCacheLayer, StaticFullCacheLayer)
    }
)

# By these names, Trainer decides whether to shift labels for label smoothing, and pipelines accept models.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(ReformerHfConfig.model_type, ReformerHfForCausalLM.__name__)

ReformerHfConfig.register_for_auto_class()
ReformerHfModel.register_for_auto_class("AutoModel")
ReformerHfForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["ReformerHfForCausalLM", "ReformerHfModel", "ReformerHfPreTrainedModel"]
