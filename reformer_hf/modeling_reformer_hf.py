# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
The Reformer (Kitaev, Kaiser, Levskaya 2020, arXiv 2001.04451) as Transformers models.

    embeddings → x1 = x2 → layers, y1 = x1 + Attention(x2), y2 = x2 + FeedForward(y1) → LayerNorm([y1; y2]) → head

Parameter names are those of the in-tree model, so that its checkpoints load as they are.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import dropout, linear, linear_cross_entropy, pad
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel, initialization
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .cache import LAYER_TYPES, states_of
from .chunked import apply_chunked, suitable_chunk_size
from .configuration_reformer_hf import ReformerHfConfig
from .embeddings import AxialPositionEmbeddings, AxialTables, PositionEmbeddings
from .feed_forward import ReformerHfFeedForward
from .full_attention import FullSelfAttention
from .local_attention import LocalSelfAttention
from .lsh_attention import LSHSelfAttention, factors_of
from .reversible import AttentionBranch, AttentionPart, PositionWiseBranch, Tape, reversible_layer
from .rng import SharedDropout, draw_seed
from .self_attention import AttentionCall, apply_linear
from .stream_norm import StreamLayerNorm

# What LoRA adapts by default: what scores and values are made of. (`query_key` in LSH layers, `query` in local ones.)
LORA_TARGETS = ["query_key", "query", "value"]

_POSITIONS = "max_position_embeddings"

# Ids that are compared faster one by one.
_FEW_IDS = 16

# Label of a position that has no part in the loss.
IGNORED = -100

SELF_ATTENTIONS = {"local": LocalSelfAttention, "lsh": LSHSelfAttention, "full": FullSelfAttention}


@dataclass
class ReformerHfModelOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`[B, L, 2 * hidden_size]`): Both streams side by side, normalised.
        hidden_states (*optional*): The second stream `[B, L, hidden_size]` before each layer and after the last.
        attentions (*optional*): For each layer, the attention weights `[B, H, R, L, W]` by round and place in the
            query's window, before dropout. They sum to 1 over R and W, and carry no gradient.
        attention_positions (*optional*): For each layer, the positions `[B, H, R, L, W]` of the keys that the weights
            are for, -1 where there is none.
        cache (*optional*): The decoding state after this input, if there is one.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    attention_positions: tuple[Tensor, ...] | None = None
    cache: Cache | None = None


@dataclass
class ReformerHfCausalLMOutput(ModelOutput):
    """
    Args:
        loss (*optional*): Cross entropy of the next token, if there were labels.
        logits (`[B, L, vocab_size]`): Scores of the next token.
        hidden_states, attentions, attention_positions, cache (*optional*): As in `ReformerHfModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    attention_positions: tuple[Tensor, ...] | None = None
    cache: Cache | None = None


class ReformerHfEmbeddings(nn.Module):
    """Sum of word and position embeddings."""

    def __init__(self, config: ReformerHfConfig):
        super().__init__()
        self.dropout = config.hidden_dropout_prob
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        positions = AxialPositionEmbeddings if config.axial_pos_embds else PositionEmbeddings
        self.position_embeddings = positions(config)

    def forward(self, input_ids: Tensor | None, position_ids: Tensor, inputs_embeds: Tensor | None) -> Tensor:
        """`[B, L, E]`, in fp32 at least: the streams of the reversible stack start here."""
        embeds = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if self.training:
            embeds = dropout(embeds, self.dropout)
        embeds = embeds + self.position_embeddings(position_ids)
        return embeds.to(torch.promote_types(embeds.dtype, torch.float32))


class ReformerHfSelfOutput(nn.Module):
    """Project heads back to the stream."""

    def __init__(self, config: ReformerHfConfig):
        super().__init__()
        all_head_size = config.num_attention_heads * config.attention_head_size
        self.dense = nn.Linear(all_head_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, features: slice) -> Tensor:
        """What heads `[B, L, H * D]` add to the sum over all heads, given which features of all heads they are."""
        if features == slice(0, self.dense.in_features):
            return self.dense(hidden_states)
        return linear(hidden_states, self.dense.weight[:, features])


class ReformerHfAttention(nn.Module):
    """Layer norm, attention of the layer's type, output projection, dropout."""

    def __init__(self, config: ReformerHfConfig, layer_idx: int):
        super().__init__()
        self.dropout = config.hidden_dropout_prob
        self.layer_norm = StreamLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attention = SELF_ATTENTIONS[config.attn_layers[layer_idx]](config)
        self.output = ReformerHfSelfOutput(config)

    def branch(self, stream: Tensor, call: AttentionCall) -> AttentionBranch:
        """The branch of the first stream, for one call on the second one `[B, L, E]`: a sum over groups of heads."""
        groups = self.self_attention.head_groups(stream, self.output.dense)
        drops = self.training and self.dropout > 0
        return AttentionBranch(
            parts=[self._part(call, heads) for heads in groups],
            parameters=trainable_parameters(self),
            uses_rng=self.training,
            chunk_size=suitable_chunk_size(stream.shape[0], stream.shape[1], stream.device.type),
            dropout=partial(SharedDropout, self.dropout, draw_seed()) if drops else None,
        )

    def step(self, stream: Tensor, call: AttentionCall) -> Tensor:
        """What the branch adds for few new tokens `[B, n, E]`, by looking up in the decoding state what they see."""
        self_attention = self.self_attention
        projected = self_attention.project_all(self.layer_norm(stream))
        added = apply_linear(self.output.dense, self_attention.step(projected, call).flatten(2))
        return dropout(added, self.dropout) if self.training else added

    def _part(self, call: AttentionCall, heads: slice) -> AttentionPart:
        features = self.self_attention.features(heads)
        return AttentionPart(
            read=lambda stream, values=True: self.self_attention.project(self.layer_norm(stream), heads, values),
            attend=lambda projected: self.self_attention.attend(projected, call, heads).flatten(2),
            write=lambda hidden_states: self.output(hidden_states, features),
        )


class ReformerHfLayer(nn.Module):
    """One pair of residual branches, reversible where gradients are wanted and the config says so."""

    def __init__(self, config: ReformerHfConfig, layer_idx: int):
        super().__init__()
        self.attention = ReformerHfAttention(config, layer_idx)
        self.feed_forward = ReformerHfFeedForward(config)

        self.layer_idx = layer_idx

    def forward(
        self, x1: Tensor, x2: Tensor, padding: Tensor | None = None, tape: Tape | None = None, **options
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """
        Args:
            x1, x2: The streams `[B, L, E]`.
            padding: `[B, L]`, True where there is padding.
            tape: Shared by the layers of a reversible stack; `None` computes plainly.
            **options: Those of an `AttentionCall`.

        Returns:
            The streams after the layer, and attention weights with positions or `None`.
        """
        batch_size, length, _ = x1.shape
        cache = options.get("cache")
        state = None if cache is None else states_of(cache)[self.layer_idx]
        if state is not None and state.takes_step(length):
            call = AttentionCall(padding, layer_idx=self.layer_idx, **options)
            y1 = x1 + self.attention.step(x2, call)
            return y1, x2 + self.feed_forward(y1), call.take_weights()
        call = self.attention.self_attention.begin(padding, layer_idx=self.layer_idx, **options)
        attention = self.attention.branch(x2, call)
        feed_forward = PositionWiseBranch(
            self.feed_forward,
            trainable_parameters(self.feed_forward),
            uses_rng=self.training,
            chunk_size=self.feed_forward.chunk_size or suitable_chunk_size(batch_size, length, x1.device.type),
            recompute=self.feed_forward.chunk_size > 0,
        )
        trains = x1.requires_grad or x2.requires_grad or attention.parameters or feed_forward.parameters
        if not (torch.is_grad_enabled() and trains):
            y1 = attention.add_to(x1, x2)
            y2 = feed_forward.add_to(x2, y1)
        elif tape is None:
            y1 = attention.add(x1, x2)
            y2 = feed_forward.add(x2, y1)
        else:
            y1, y2 = reversible_layer(x1, x2, attention, feed_forward, tape)
        if state is not None:
            state.advance(length, padding)
        return y1, y2, call.take_weights()


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that require gradients."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class ReformerHfEncoder(nn.Module):
    """The stack of layers and the norm over both streams."""

    def __init__(self, config: ReformerHfConfig):
        super().__init__()
        self.reversible = config.reversible
        self.dropout = config.hidden_dropout_prob
        self.layers = nn.ModuleList(ReformerHfLayer(config, i) for i in range(len(config.attn_layers)))
        self.layer_norm = StreamLayerNorm(2 * config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        padding: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        **options,
    ) -> ReformerHfModelOutput:
        x1 = x2 = hidden_states
        tape = Tape() if self.reversible and torch.is_grad_enabled() else None
        all_hidden_states, all_attentions = [x2], []
        options = {"output_attentions": output_attentions, **options}
        leaves_autograd = self._leaves_autograd(options.get("cache"), hidden_states.shape[1])
        with torch.inference_mode() if leaves_autograd else nullcontext():
            for layer in self.layers:
                x1, x2, attentions = layer(x1, x2, padding, tape, **options)
                if output_hidden_states:
                    all_hidden_states.append(x2)
                all_attentions.append(attentions)
        both = torch.cat([x1, x2], dim=-1)
        if tape is not None:
            # The norm keeps them for its backward pass.
            width = x1.shape[-1]
            tape.share((both.detach()[..., :width], both.detach()[..., width:]))
        del x1, x2
        hidden_states = self.layer_norm(both)
        if leaves_autograd:
            # Ordinary tensors, with which anything may be done.
            all_hidden_states = [x.clone() for x in all_hidden_states]
            all_attentions = [seen if seen is None else tuple(x.clone() for x in seen) for seen in all_attentions]
        return ReformerHfModelOutput(
            last_hidden_state=dropout(hidden_states, self.dropout) if self.training else hidden_states,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(weights for weights, _ in all_attentions) if output_attentions else None,
            attention_positions=tuple(positions for _, positions in all_attentions) if output_attentions else None,
            cache=options.get("cache"),
        )

    def _leaves_autograd(self, cache: Cache | None, num_new: int) -> bool:
        """Whether to compute in inference mode: where the state was made in it, and in steps, of which each operation
        then costs less, unless a hook, such as that of FSDP, could make tensors that training meets later."""
        if cache is None or torch.compiler.is_compiling():
            return False
        states = states_of(cache)
        if states[0].is_initialized and states[0].table.is_inference():
            return True
        if not all(state.takes_step(num_new) for state in states):
            return False
        layer = self.layers[0]
        return not (layer._forward_pre_hooks or self._forward_pre_hooks or "forward" in vars(layer))


class ReformerHfLMHead(nn.Module):
    """Scores of tokens. Its bias goes by two names: `bias`, in in-tree checkpoints, is `decoder.bias`."""

    # Read when a model is saved; see `ReformerHfForCausalLM.get_expanded_tied_weights_keys` for all else.
    _tied_weights_keys = {"decoder.bias": "bias"}

    def __init__(self, config: ReformerHfConfig):
        super().__init__()
        self.chunk_size = config.chunk_size_lm_head
        self.tied = config.tie_word_embeddings
        in_features = config.hidden_size if self.tied else 2 * config.hidden_size
        self.decoder = nn.Linear(in_features, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: Tensor, targets: Tensor | None = None) -> Tensor:
        """
        Logits of hidden states `[B, L, 2 * hidden_size]`, or, given targets `[B, L]` (-100 where there is none), the
        sum of their cross entropies, for which only the logits of one chunk exist at a time.
        """
        if self.tied:
            # Word embeddings are as wide as one stream.
            hidden_states = hidden_states.unflatten(-1, (2, -1)).mean(-2)
        if targets is not None:
            return self._sum_cross_entropy(hidden_states, targets)
        if not torch.is_grad_enabled() and not 0 < self.chunk_size < hidden_states.shape[1]:
            return self.decoder(hidden_states)
        return apply_chunked(self.decoder, hidden_states, self.chunk_size, list(self.decoder.parameters()))

    def _sum_cross_entropy(self, hidden_states: Tensor, targets: Tensor) -> Tensor:
        chunk = LinearCrossEntropyOptions(
            batch_chunk_size=self.chunk_size * hidden_states.shape[0], chunking_method=None
        )
        # In fp32 at least, as the loss of Transformers is.
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with torch.autocast(hidden_states.device.type, enabled=False):
            return linear_cross_entropy(
                hidden_states.flatten(0, 1).to(dtype),
                self.decoder.weight.to(dtype),
                targets.flatten(),
                linear_bias=self.decoder.bias.to(dtype),
                reduction="sum",
                ignore_index=IGNORED,
                options=chunk,
            )


class ReformerHfPreTrainedModel(PreTrainedModel):
    """What all models share: initialisation, and what they do not support."""

    config_class = ReformerHfConfig
    config: ReformerHfConfig
    base_model_prefix = "reformer"
    supports_gradient_checkpointing = False
    _input_embed_layer = "word_embeddings"
    _no_split_modules = ["ReformerHfEmbeddings", "ReformerHfLayer"]
    _supports_context_parallel = False
    # What a saved folder says of the classes in the files that are shipped with it.
    _auto_map = {
        "AutoConfig": "configuration_reformer_hf.ReformerHfConfig",
        "AutoModel": "modeling_reformer_hf.ReformerHfModel",
        "AutoModelForCausalLM": "modeling_reformer_hf.ReformerHfForCausalLM",
    }

    def __init__(self, config: ReformerHfConfig, *args, **kwargs):
        # Fields may have been set since the config was made.
        config.validate_reformer()
        if "peft" in sys.modules:
            mapping = sys.modules["peft"].utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
            mapping.setdefault(config.model_type, LORA_TARGETS)
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, AxialTables):
            for weight in module:
                initialization.normal_(weight, std=self.config.axial_norm_std)
        elif isinstance(module, ReformerHfLMHead):
            initialization.zeros_(module.bias)

    def gradient_checkpointing_enable(self, *args, **kwargs):
        """Refused: reversible layers keep no activations that a checkpoint could save."""
        raise ValueError(
            "`gradient_checkpointing` is True, but reversible layers recompute activations already, in memory that "
            "does not grow with depth: leave it False. For less memory yet set `chunk_size_feed_forward` and "
            "`chunk_size_lm_head`."
        )

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in Transformers, with the code of the model beside the weights for `trust_remote_code=True`."""
        self.config.auto_map = dict(self._auto_map)
        return super().save_pretrained(save_directory, *args, **kwargs)


class ReformerHfModel(ReformerHfPreTrainedModel):
    """Embeddings and the reversible stack."""

    def __init__(self, config: ReformerHfConfig):
        super().__init__(config)
        self.embeddings = ReformerHfEmbeddings(config)
        self.encoder = ReformerHfEncoder(config)
        # By which a cache remembers that it is one for this model.
        self._cache_key = uuid4().hex
        self.post_init()

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
        **kwargs,
    ) -> ReformerHfModelOutput:
        """
        Args:
            input_ids (`[B, L]`, *optional*): Token ids, L from 1 to `max_position_embeddings`.
            attention_mask (`[B, L]`, *optional*): 1 for tokens, 0 for padding, on any side. With a cache that holds T
                tokens, `[B, T + L]` or for the new ones alone `[B, L]`.
            position_ids (`[B, L]`, *optional*): Positions; by default tokens are counted from 0, without padding.
            inputs_embeds (`[B, L, E]`, *optional*): Word embeddings instead of `input_ids`.
            num_hashes (`int`, *optional*): Hash rounds for this call, instead of the config's.
            num_buckets (`int` or `list[int]`, *optional*): Buckets per round for this call, instead of the config's.
            cache (`Cache`, *optional*): Decoding state, a `DynamicCache(config=model.config)` or `StaticCache`: the
                input continues what it holds, and is taken into it. Nothing has a gradient then. (`past_key_values`
                is what Transformers before 5.24 calls it.)
            use_cache (`bool`, *optional*): Whether to make a `DynamicCache` and return it, where none is given; a
                causal model does so in evaluation. Otherwise than in other models, None means no.
            output_hidden_states, output_attentions (`bool`, *optional*): What to return besides; for its form see
                `ReformerHfModelOutput`.

        Raises:
            ValueError: If an input does not fit the config or another one. A cache is as it was, then.
        """
        cache = _only_cache(cache, kwargs)
        if torch.compiler.is_exporting():
            raise ValueError(
                "`torch.export` traces one order of the sorted positions, which is another one for each input: use "
                "`torch.compile`, or share the model as a folder (`save_pretrained`)."
            )
        if cache is None and use_cache and self.config.is_decoder and not self.training:
            cache = DynamicCache(config=self.config)
        inputs = _check_inputs(self.config, input_ids, inputs_embeds, attention_mask, position_ids, num_hashes, cache)
        factors = _bucket_factors(self.config, num_buckets)
        if cache is not None:
            self._check_cache(cache, inputs, num_hashes, factors)
        padding = None
        if attention_mask is not None:
            attention_mask = attention_mask[:, -inputs.shape[1] :].to(inputs.device, torch.bool)
            # Padding that is not there costs nothing; what is compiled may not look.
            if torch.compiler.is_compiling() or not attention_mask.all():
                padding = ~attention_mask
        if position_ids is None:
            position_ids = self._position_ids(inputs, padding, cache)
        options = {"num_hashes": num_hashes, "num_buckets": factors, "cache": cache, "shared": {}}
        with torch.no_grad() if cache is not None and torch.is_grad_enabled() else nullcontext():
            return self.encoder(
                self.embeddings(input_ids, position_ids.expand(inputs.shape[:2]), inputs_embeds),
                padding,
                self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
                self.config.output_attentions if output_attentions is None else output_attentions,
                **options,
            )

    def _position_ids(self, inputs: Tensor, padding: Tensor | None, cache: Cache | None) -> Tensor:
        """Tokens counted from those that the cache holds, `[B or 1, L]`; padding has the place of the one before."""
        if padding is None:
            position_ids = torch.arange(inputs.shape[1], device=inputs.device)[None]
        else:
            position_ids = (~padding).long().cumsum(-1) - 1
        if cache is not None and states_of(cache)[0].is_initialized:
            position_ids = position_ids + states_of(cache)[0].num_tokens.to(inputs.device)[:, None]
        position_ids = position_ids.clamp(min=0)
        if cache is not None and not torch.compiler.is_compiling():
            _check_range("position_ids", position_ids, self.config.max_position_embeddings, _POSITIONS)
        return position_ids

    def _check_cache(self, cache: Cache, inputs: Tensor, num_hashes: int | None, factors: list[int] | None) -> None:
        """Raise a `ValueError`, before anything has changed, where a cache is not one of this model and input."""
        layers: Sequence[Any] = getattr(cache, "layers", ())
        key = (self._cache_key, num_hashes, factors)
        if not layers or any(getattr(layer, "checked_by", None) != key for layer in layers):
            self._check_layers(cache, key)
        if torch.compiler.is_compiling():
            return
        layer = layers[0]
        if layer.is_initialized and layer.batch_size != inputs.shape[0]:
            raise ValueError(
                f"The input has {inputs.shape[0]} rows, but `cache` holds {layer.batch_size}: repeat or select its "
                "rows (`batch_repeat_interleave`, `batch_select_indices`), or begin with a new cache."
            )
        if layer.is_initialized and layer.device != inputs.device:
            raise ValueError(f"The input is on {inputs.device}, but `cache` on {layer.device}: move the input there.")
        room = layer.get_max_length()
        if 0 <= room < layer.length + inputs.shape[1]:
            raise ValueError(
                f"`cache` holds {int(layer.length)} of at most {room} tokens, too many for {inputs.shape[1]} more: "
                f"make it with `max_cache_len` of at least {int(layer.length) + inputs.shape[1]}."
            )

    def _check_layers(self, cache: Cache, key: tuple) -> None:
        """Raise a `ValueError` where a cache is not made for this model, or for other options."""
        _, num_hashes, factors = key
        layers = getattr(cache, "layers", ())
        kinds = [LAYER_TYPES[kind].__name__ for kind in self.config.attn_layers]
        if not isinstance(cache, Cache) or [type(layer).__name__ for layer in layers] != kinds:
            held = f" of {[type(layer).__name__ for layer in layers]}" if layers else ""
            raise ValueError(
                f"`cache` is a {type(cache).__name__}{held}, but the layers of this model need {kinds}: make it with "
                "`DynamicCache(config=model.config)` or `StaticCache(config=model.config, max_cache_len=…)`."
            )
        if not self.config.is_decoder:
            raise ValueError("`cache` is given, but without `is_decoder=True` each token sees those after it.")
        for encoder_layer, layer in zip(self.encoder.layers, layers, strict=True):
            layer.peers = layers
            geometry = cast(ReformerHfLayer, encoder_layer).attention.self_attention.geometry(num_hashes)
            if layer.is_initialized and layer.geometry != geometry:
                raise ValueError(
                    f"`cache` is that of another model, or of other options: it was made for {layer.geometry}, but "
                    f"this input needs {geometry}. Begin with a new cache."
                )
            if layer.is_initialized and factors is not None and getattr(layer, "factors", factors) != factors:
                raise ValueError(
                    f"`num_buckets` is {factors}, but `cache` has hashed what it holds into {layer.factors}: leave "
                    "it None, or begin with a new cache."
                )
        for layer in layers:
            layer.checked_by = key


class ReformerHfForCausalLM(ReformerHfPreTrainedModel, GenerationMixin):
    """A causal Reformer that predicts the next token."""

    _tied_weights_keys = {"lm_head.decoder.weight": "reformer.embeddings.word_embeddings.weight"}
    # The other name of `lm_head.bias`: `Trainer` is not to miss it in a checkpoint.
    _keys_to_ignore_on_save = ["lm_head.decoder.bias"]
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: ReformerHfConfig):
        if not config.is_decoder:
            raise ValueError(
                "`is_decoder` is False, but a causal language model needs causal attention: set `is_decoder=True`."
            )
        super().__init__(config)
        self.reformer = ReformerHfModel(config)
        self.lm_head = ReformerHfLMHead(config)
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Besides what Transformers ties: the two names of the head's bias, always."""
        keys = super().get_expanded_tied_weights_keys(all_submodels=all_submodels)
        return keys if all_submodels else {**keys, "lm_head.decoder.bias": "lm_head.bias"}

    def init_parallel_plans(self) -> None:
        """As in Transformers; but what is tied is sharded in one piece, with what no rule names."""
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
        """As in Transformers. Of a checkpoint that has both names of the head's bias, the decoder's is the one that
        counts: in-tree, where they are two since 5.24, the other is not used."""
        if missing_keys is not None and not missing_keys & {"lm_head.bias", "lm_head.decoder.bias"}:
            self.lm_head.bias = self.lm_head.decoder.bias
        super().tie_weights(missing_keys, recompute_mapping)

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
        """As in Transformers. A number of buckets that comes from the length is that of the prompt at every step."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if self.config.num_buckets is not None or model_kwargs.get("num_buckets") is not None:
            return
        cache = model_kwargs.get("cache")
        factors = factors_of(self.config, model_kwargs["position_ids"].shape[-1])
        if cache is None:
            model_kwargs["num_buckets"] = factors
            return
        for layer in getattr(cache, "layers", ()):
            if getattr(layer, "factors", None) == []:
                layer.factors = factors

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
        **kwargs,
    ) -> ReformerHfCausalLMOutput:
        """
        Args:
            labels (`[B, L]`, *optional*): The tokens, -100 where no loss is wanted; shifted inside. In training with
                `chunk_size_lm_head` there is the loss alone then, and no logits.
            logits_to_keep (`int` or `Tensor`, defaults to 0): Compute the logits of so many last positions (where
                these are padding, of the last token before it), or of these positions; 0 means all.
            **kwargs: What the loss takes, such as `num_items_in_batch` and `shift_labels`.

        The other arguments, and what is raised, are those of `ReformerHfModel.forward`.
        """
        cache = _only_cache(cache, kwargs)
        if cache is not None and isinstance(logits_to_keep, int) and logits_to_keep > 0:
            _check_last_tokens(cache, attention_mask, input_ids if inputs_embeds is None else inputs_embeds)
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
            return_dict=True,
        )
        logits = loss = None
        has_labels = labels is not None or kwargs.get("shift_labels") is not None
        if has_labels and self._loss_without_logits:
            loss = self._chunked_loss(outputs.last_hidden_state, labels, **kwargs)
        else:
            logits = self.lm_head(_kept(outputs.last_hidden_state, logits_to_keep, attention_mask))
            if has_labels:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return ReformerHfCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            attention_positions=outputs.attention_positions,
            cache=outputs.cache,
        )

    @property
    def _loss_without_logits(self) -> bool:
        """Whether a training step gives the loss alone: in chunks, of a plain linear layer, by the usual formula."""
        usual = self.loss_function is LOSS_MAPPING["ForCausalLM"] and type(self.lm_head.decoder) is nn.Linear
        return self.training and self.lm_head.chunk_size > 0 and usual

    def _chunked_loss(
        self,
        hidden_states: Tensor,
        labels: Tensor | None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORED,
        **kwargs,
    ) -> Tensor:
        """What `ForCausalLMLoss` computes from the logits."""
        targets = pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
        targets = targets.to(hidden_states.device)
        targets = targets.masked_fill(targets == ignore_index, IGNORED)
        if num_items_in_batch is None:
            num_items_in_batch = (targets != IGNORED).sum()
        elif torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(hidden_states.device)
        return self.lm_head(hidden_states, targets) / num_items_in_batch


def _kept(hidden_states: Tensor, logits_to_keep: int | Tensor, attention_mask: Tensor | None) -> Tensor:
    """The hidden states `[B, L, …]` whose logits are wanted."""
    if not isinstance(logits_to_keep, int):
        return hidden_states[:, logits_to_keep]
    kept = hidden_states[:, -logits_to_keep:]
    if attention_mask is None or logits_to_keep == 0 or torch.compiler.is_compiling():
        return kept
    mask = attention_mask[:, -hidden_states.shape[1] :].to(hidden_states.device, torch.bool)
    if mask[:, -logits_to_keep:].all():
        return kept
    places = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), 0).cummax(-1).values
    places = places[:, -logits_to_keep:, None].expand(-1, -1, hidden_states.shape[-1])
    return hidden_states.gather(1, places)


def _check_last_tokens(cache: Cache, attention_mask: Tensor | None, inputs: Tensor):
    """The last tokens, whose logits are wanted, must be among these inputs."""
    if attention_mask is None or torch.compiler.is_compiling() or inputs is None:
        return
    empty = ~attention_mask[:, -inputs.shape[1] :].bool().any(-1)
    layers = [layer for layer in getattr(cache, "layers", ()) if layer.is_initialized]
    if not layers or not empty.any():
        return
    rows = (empty & (layers[0].num_tokens.to(empty.device) > 0)).nonzero().flatten().tolist()
    if rows:
        raise ValueError(
            f"The new input of row {rows[0]} is padding alone, after tokens in `cache`, so that the logits of its "
            "last token are not to be had: pad on the left (`padding_side='left'`), or set `prefill_chunk_size=None`."
        )


def _only_cache(cache: Cache | None, kwargs: dict) -> Cache | None:
    """The decoding state, by whichever name it was given."""
    old = kwargs.pop("past_key_values", None)
    if old is None:
        return cache
    if cache is not None:
        raise ValueError("Give one of `cache` and `past_key_values`, two names for the same, not both.")
    return old


def _bucket_factors(config: ReformerHfConfig, num_buckets: int | Sequence[int] | None) -> list[int] | None:
    """The factors of a number of buckets that was given for one call."""
    if num_buckets is None:
        return None
    config.check_num_buckets(num_buckets)
    return [num_buckets] if isinstance(num_buckets, int) else list(num_buckets)


def _check_inputs(
    config: ReformerHfConfig,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    num_hashes: int | None,
    cache: Cache | None,
) -> Tensor:
    """Whichever of `input_ids` and `inputs_embeds` is given, after all inputs were found to fit."""
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
    # Looking at values would break what is compiled or exported.
    if not torch.compiler.is_compiling():
        _check_range("input_ids", input_ids, config.vocab_size, "vocab_size")
        _check_range("position_ids", position_ids, config.max_position_embeddings, _POSITIONS)
    return inputs


def _check_range(name: str, ids: Tensor | None, limit: int, field: str):
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


# Trainer shifts labels for label smoothing, and pipelines take models, by these names.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(ReformerHfConfig.model_type, ReformerHfForCausalLM.__name__)

ReformerHfConfig.register_for_auto_class()
ReformerHfModel.register_for_auto_class("AutoModel")
ReformerHfForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["ReformerHfForCausalLM", "ReformerHfModel", "ReformerHfPreTrainedModel"]
