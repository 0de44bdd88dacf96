# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Estimate the peak memory of a training step from the terms of `docs/memory.md`."""

from dataclasses import dataclass

import torch
from torch import nn

from ..activation_memory import kept_activations, recomputes_activations
from ..configuration_encoder_decoder import ReformerHfEncoderDecoderConfig
from ..configuration_reformer_hf import ReformerHfConfig
from ..device_policy import policy_for, suitable_chunk_size
from ..encoder_decoder import ReformerHfForConditionalGeneration
from ..modeling_reformer_hf import ReformerHfForCausalLM
from ..self_attention import parallel_heads


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Bytes of the tensors of a training step.

    Args:
        parameters (`int`): Parameters.
        gradients (`int`): Gradients of the parameters.
        optimizer (`int`): Optimizer state.
        sort_orders (`int`): Sort orders of all LSH layers, kept from the forward to the backward pass.
        head (`int`): Temporary tensors of the backward pass of the LM head.
        attention (`int`): Temporary tensors of the backward pass of one attention layer, including the streams.
        feed_forward (`int`): Temporary tensors of the backward pass of one feed-forward layer, including the streams.
        last_layer (`int`): Additional tensors of the last layer: its output, which is not overwritten, and the
            gradients of the head.
        activations (`int`): Activations of all layers, if the step keeps them (`max_kept_activations` of the config).
    """

    parameters: int
    gradients: int
    optimizer: int
    sort_orders: int
    head: int
    attention: int
    feed_forward: int
    last_layer: int
    activations: int

    @property
    def total(self) -> int:
        """
        Peak memory in bytes.

        Only the largest of the temporary terms counts, because they do not exist at the same time. The backward pass
        ends with the first layer, where all gradients exist and the sort orders of later layers are freed. With
        gradient accumulation all gradients exist from the second backward pass on, and the peak is higher by at most
        `gradients`.
        """
        return self.parameters + self.optimizer + max(self.start, self.end)

    @property
    def start(self) -> int:
        """Bytes at the start of the backward pass, in the head or the last layer, without parameters."""
        return self.sort_orders + self.activations + max(self.head, self._layer + self.last_layer)

    @property
    def end(self) -> int:
        """Bytes at its end, in the first layer, without parameters."""
        return self._layer + self.gradients

    @property
    def _layer(self) -> int:
        return max(self.attention, self.feed_forward)


@dataclass(frozen=True)
class EncoderDecoderMemoryEstimate:
    """
    Bytes of the tensors of a training step of an encoder-decoder.

    Args:
        encoder (`MemoryEstimate`): The encoder, with the word embeddings that both stacks share; its `head` is 0.
        decoder (`MemoryEstimate`): The decoder with the LM head. Its `attention` is the larger one of self-attention
            and cross-attention.
        encoder_output (`int`): The encoder output, the streams it is made of, and its gradient.
    """

    encoder: MemoryEstimate
    decoder: MemoryEstimate
    encoder_output: int

    @property
    def total(self) -> int:
        """
        Peak memory in bytes.

        The backward pass of the decoder comes first, while sort orders and activations of the encoder are kept. All
        gradients of the decoder exist when the backward pass of the encoder begins.
        """
        encoder, decoder = self.encoder, self.decoder
        of_decoder = encoder.sort_orders + encoder.activations + self.encoder_output + max(decoder.start, decoder.end)
        of_encoder = decoder.gradients + max(encoder.start, encoder.end)
        states = encoder.parameters + encoder.optimizer + decoder.parameters + decoder.optimizer
        return states + max(of_decoder, of_encoder)


def estimate_training_memory(
    config: ReformerHfConfig | ReformerHfForCausalLM | ReformerHfForConditionalGeneration,
    length: int,
    batch_size: int = 1,
    num_hashes: int | None = None,
    dtype: torch.dtype | str | None = None,
    optimizer_bytes: int = 8,
    device: str = "cpu",
    target_length: int | None = None,
) -> MemoryEstimate | EncoderDecoderMemoryEstimate:
    """
    Estimate the peak memory of a training step with an LM head, without dropout and padding.

    For a step that keeps activations (`max_kept_activations` of the config) the estimate is an upper bound.

    Args:
        config: A config or model (`ReformerHfForCausalLM`, `ReformerHfForConditionalGeneration`) with
            `reversible=True` and without layers of full attention, whose memory is quadratic. Frozen parameters of a
            model have no gradients.
        length (`int`): Sequence length; of the source, for an encoder-decoder.
        batch_size (`int`, defaults to 1): Batch size.
        num_hashes (`int`, *optional*): Number of hash rounds. `None` uses that of the config.
        dtype (`torch.dtype` or `str`, *optional*): Dtype of the weights, such as `"bfloat16"`. `None` means that of
            the model, or fp32 for a config. The residual streams are in fp32 or a wider dtype.
        optimizer_bytes (`int`, defaults to 8): Bytes of optimizer state per parameter. AdamW in fp32 has 8.
        device (`str`, defaults to `"cpu"`): Device type, which determines chunk and tile sizes.
        target_length (`int`, *optional*): Length of the target, which an encoder-decoder needs.

    Returns:
        `MemoryEstimate`, or `EncoderDecoderMemoryEstimate` for an encoder-decoder: terms and total, in bytes.

    Raises:
        `ValueError`: If the config is not reversible or has layers of full attention, or if an argument is out of
            range or missing.
    """
    model = config if isinstance(config, (ReformerHfForCausalLM, ReformerHfForConditionalGeneration)) else None
    if model is not None:
        config = model.config
    if not isinstance(config, ReformerHfConfig):
        raise ValueError(
            f"`config` is a {type(config).__name__}, but must be a `ReformerHfConfig`, a `ReformerHfForCausalLM`, or "
            "the config or model of an encoder-decoder."
        )
    num_hashes = config.num_hashes if num_hashes is None else num_hashes
    dtype = _dtype(dtype) if dtype is not None else torch.float32 if model is None else model.dtype
    _check_arguments(config, length, target_length, batch_size, num_hashes)

    def shape_of(stack_config: ReformerHfConfig, stack_length: int, source_length: int = 0) -> _Shape:
        stream_bytes = torch.promote_types(dtype, torch.float32).itemsize
        sizes = batch_size, stack_length, dtype.itemsize, stream_bytes, num_hashes
        return _Shape(stack_config, *sizes, device, source_length)

    if model is None:
        with torch.device("meta"):
            is_encoder_decoder = isinstance(config, ReformerHfEncoderDecoderConfig)
            model = (ReformerHfForConditionalGeneration if is_encoder_decoder else ReformerHfForCausalLM)(config)
    parameters = set(model.parameters())
    if target_length is None:
        return _estimate_stack(shape_of(config, length), parameters, optimizer_bytes, has_head=True)
    of_encoder = set(model.get_encoder().parameters())
    encoder = shape_of(config.encoder_config, length)
    decoder = shape_of(config.decoder_config, target_length, length)
    return EncoderDecoderMemoryEstimate(
        encoder=_estimate_stack(encoder, of_encoder, optimizer_bytes, has_head=False),
        decoder=_estimate_stack(decoder, parameters - of_encoder, optimizer_bytes, has_head=True),
        # Both streams, the normalized output, and its gradient.
        encoder_output=2 * encoder.stream + 4 * encoder.normalized,
    )


def _check_arguments(
    config: ReformerHfConfig, length: int, target_length: int | None, batch_size: int, num_hashes: int
) -> None:
    if config.is_encoder_decoder != (target_length is not None):
        raise ValueError(
            f"`target_length` is {target_length}, but an encoder-decoder needs it, and only an encoder-decoder has "
            "one: pass the length of the target, or leave it out for a causal model."
        )
    lengths = {"length": length} | ({} if target_length is None else {"target_length": target_length})
    for name, value in (*lengths.items(), ("batch_size", batch_size), ("num_hashes", num_hashes)):
        if value < 1:
            raise ValueError(f"`{name}` is {value}, but must be at least 1.")
    for name, value in lengths.items():
        if value > config.max_position_embeddings:
            raise ValueError(
                f"`{name}` is {value}, but the model takes at most {config.max_position_embeddings} tokens: increase "
                "`max_position_embeddings` of the config."
            )
    layer_types = {*config.attn_layers, *getattr(config, "decoder_attn_layers", ())}
    if not config.reversible or "full" in layer_types:
        raise ValueError(
            f"`reversible` is {config.reversible} and the layer types are {sorted(layer_types)}, but the estimate "
            "covers only reversible models of local and LSH layers."
        )


def _estimate_stack(
    shape: "_Shape", parameters: set[nn.Parameter], optimizer_bytes: int, has_head: bool
) -> MemoryEstimate:
    """Estimate the terms of one stack with these parameters, and of an LM head."""
    config = shape.config
    recomputes = recomputes_activations(config, shape.positions, torch.device(shape.device), shape.source_positions)
    kept = kept_activations(config, shape.positions, shape.source_positions)
    num_trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    attention = [shape.attention(kind) for kind in set(config.attn_layers)]
    if config.add_cross_attention:
        attention.append(shape.cross_attention)
    head_gradients = (2 * config.hidden_size + 1) * config.vocab_size * shape.weight_bytes if has_head else 0
    return MemoryEstimate(
        parameters=sum(parameter.numel() for parameter in parameters) * shape.weight_bytes,
        gradients=num_trainable * shape.weight_bytes,
        optimizer=num_trainable * optimizer_bytes,
        sort_orders=config.attn_layers.count("lsh") * shape.sort_order,
        head=shape.head if has_head else 0,
        attention=max(attention),
        feed_forward=shape.feed_forward,
        last_layer=2 * shape.stream + head_gradients,
        activations=0 if recomputes else kept * shape.stream_bytes // 4,
    )


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"`dtype` is {dtype!r}, but must be a floating-point dtype of torch, such as 'bfloat16'.")
    return found


@dataclass(frozen=True)
class _Shape:
    """
    Sizes of the model and its input, and the terms in bytes that follow from them.

    `weight_bytes` and `stream_bytes` are bytes per element of the weights and of the residual streams.
    """

    config: ReformerHfConfig
    batch_size: int
    length: int
    weight_bytes: int
    stream_bytes: int
    num_hashes: int
    device: str
    source_length: int = 0

    @property
    def positions(self) -> int:
        return self.batch_size * self.length

    @property
    def source_positions(self) -> int:
        return self.batch_size * self.source_length

    @property
    def stream(self) -> int:
        return self.positions * self.config.hidden_size * self.stream_bytes

    @property
    def normalized(self) -> int:
        """A stream in the dtype of the weights."""
        return self.stream * self.weight_bytes // self.stream_bytes

    @property
    def sort_order(self) -> int:
        """Sort order of one layer, int32."""
        return self.positions * self.config.num_attention_heads * self.num_hashes * 4

    @property
    def head(self) -> int:
        """
        Temporary tensors of the head.

        The concatenated streams, which the tape shares, their normalized copy, and the larger of two terms: the logits
        with their fp32 copy, log-softmax and gradient, or the gradients of the streams.
        """
        both, normalized = 2 * self.stream, 2 * self.normalized
        chunk = min(self.config.chunk_size_lm_head or self.length, self.length)
        logits = self.batch_size * chunk * self.config.vocab_size
        if self.config.chunk_size_lm_head:
            return 2 * (both + normalized) + 2 * logits * self.stream_bytes
        copies = 2 * self.stream_bytes + self.weight_bytes
        if self.weight_bytes < self.stream_bytes:
            copies += self.stream_bytes
        return both + normalized + max(logits * copies, both + normalized + logits * self.weight_bytes)

    def attention(self, kind: str) -> int:
        """
        Temporary tensors of an attention layer.

        Two streams, which their inversion overwrites, and two gradients of each (input and output). For the heads that
        are computed at a time: projections, output, and gradients of all.
        """
        config = self.config
        rows = self.positions * parallel_heads(config, self.positions, self.device)
        projections = {"local": 3, "lsh": 2}[kind]
        head_size = config.attention_head_size
        kept = (projections + 2) * rows * head_size * self.weight_bytes
        grads = projections * rows * head_size * self.stream_bytes
        # Positions, bounds of visible slots, and rows of keys; long inputs take one head at a time.
        index = self.positions * (16 * (self.num_hashes if kind == "lsh" else 1) + 32)
        if kind == "local" and config.local_rope_theta is not None:
            # Rotated queries and keys, and cosines and sines of all positions.
            kept += 2 * rows * head_size * self.weight_bytes + self.positions * head_size * self.weight_bytes
        if kind == "lsh" and 1 < self.num_hashes and rows * self.num_hashes <= policy_for(self.device).batched_rounds:
            # Outputs of all rounds, once more with their weights, and rows of queries and keys.
            kept += rows * self.num_hashes * (2 * head_size * self.stream_bytes + 32)
        return 6 * self.stream + kept + grads + index + _tile(self.device)

    @property
    def cross_attention(self) -> int:
        """
        Temporary tensors of cross-attention, beyond the encoder output.

        Keys and values of the source with their gradients, the gradient of the encoder output from this layer, and
        queries and outputs with their gradients.
        """
        features = self.config.num_attention_heads * self.config.attention_head_size
        source = self.source_positions * (4 * features + self.config.output_size) * self.weight_bytes
        return 6 * self.stream + source + 4 * self.positions * features * self.weight_bytes

    @property
    def feed_forward(self) -> int:
        """As for attention, with one gradient less, and the inner activations of a chunk with their gradients."""
        suitable = suitable_chunk_size(self.batch_size, self.length, self.device)
        chunk = min(self.config.chunk_size_feed_forward or suitable, self.length)
        inner = self.batch_size * chunk * self.config.feed_forward_size * self.weight_bytes
        return 5 * self.stream + 4 * inner


def _tile(device: str) -> int:
    """Scores and masks of one tile, and the tensors gathered for it."""
    return 12 * 4 * policy_for(device).tile_scores
