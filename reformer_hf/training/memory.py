# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Estimate the peak memory of a training step from the terms of `docs/memory.md`."""

from dataclasses import dataclass

import torch

from ..activation_memory import kept_activations, recomputes_activations
from ..chunked import suitable_chunk_size
from ..configuration_reformer_hf import ReformerHfConfig
from ..device_policy import policy_for
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
        layer = max(self.attention, self.feed_forward)
        start = self.sort_orders + self.activations + max(self.head, layer + self.last_layer)
        return self.parameters + self.optimizer + max(start, layer + self.gradients)


def estimate_training_memory(
    config: ReformerHfConfig | ReformerHfForCausalLM,
    length: int,
    batch_size: int = 1,
    num_hashes: int | None = None,
    dtype: torch.dtype | str | None = None,
    optimizer_bytes: int = 8,
    device: str = "cpu",
) -> MemoryEstimate:
    """
    Estimate the peak memory of a training step of `ReformerHfForCausalLM`, without dropout and padding.

    For a step that keeps activations (`max_kept_activations` of the config) the estimate is an upper bound.

    Args:
        config (`ReformerHfConfig` or `ReformerHfForCausalLM`): A config or model with `reversible=True` and without
            layers of full attention, whose memory is quadratic. Frozen parameters of a model have no gradients.
        length (`int`): Sequence length.
        batch_size (`int`, defaults to 1): Batch size.
        num_hashes (`int`, *optional*): Number of hash rounds. `None` uses that of the config.
        dtype (`torch.dtype` or `str`, *optional*): Dtype of the weights, such as `"bfloat16"`. `None` means that of
            the model, or fp32 for a config. The residual streams are in fp32 or a wider dtype.
        optimizer_bytes (`int`, defaults to 8): Bytes of optimizer state per parameter. AdamW in fp32 has 8.
        device (`str`, defaults to `"cpu"`): Device type, which determines chunk and tile sizes.

    Returns:
        `MemoryEstimate`: The terms and their total, in bytes.

    Raises:
        `ValueError`: If the config is not reversible or has layers of full attention, or if an argument is out of
            range.
    """
    model = config if isinstance(config, ReformerHfForCausalLM) else None
    if model is not None:
        config = model.config
    if not isinstance(config, ReformerHfConfig) or config.is_encoder_decoder:
        raise ValueError(
            f"`config` is a {type(config).__name__}, but must be a `ReformerHfConfig` or a `ReformerHfForCausalLM`."
        )
    num_hashes = config.num_hashes if num_hashes is None else num_hashes
    dtype = _dtype(dtype) if dtype is not None else torch.float32 if model is None else model.dtype
    for name, value in (("length", length), ("batch_size", batch_size), ("num_hashes", num_hashes)):
        if value < 1:
            raise ValueError(f"`{name}` is {value}, but must be at least 1.")
    if length > config.max_position_embeddings:
        raise ValueError(
            f"`length` is {length}, but the model takes at most {config.max_position_embeddings} tokens: increase "
            "`max_position_embeddings` of the config."
        )
    if not config.reversible or "full" in config.attn_layers:
        raise ValueError(
            f"`reversible` is {config.reversible} and `attn_layers` is {config.attn_layers}, but the estimate covers "
            "only reversible models of local and LSH layers."
        )
    shape = _Shape(
        config,
        batch_size,
        length,
        size=dtype.itemsize,
        wide=torch.promote_types(dtype, torch.float32).itemsize,
        rounds=num_hashes,
        device=device,
    )
    recomputes = recomputes_activations(config, shape.positions, torch.device(device))
    if model is None:
        with torch.device("meta"):
            model = ReformerHfForCausalLM(config)
    num_trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return MemoryEstimate(
        parameters=model.num_parameters() * shape.size,
        gradients=num_trainable * shape.size,
        optimizer=num_trainable * optimizer_bytes,
        sort_orders=config.attn_layers.count("lsh") * shape.sort_order,
        head=shape.head,
        attention=max(shape.attention(kind) for kind in set(config.attn_layers)),
        feed_forward=shape.feed_forward,
        last_layer=2 * shape.stream + (2 * config.hidden_size + 1) * config.vocab_size * shape.size,
        activations=0 if recomputes else kept_activations(config, shape.positions) * shape.wide // 4,
    )


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"`dtype` is {dtype!r}, but must be a floating-point dtype of torch, such as 'bfloat16'.")
    return found


@dataclass(frozen=True)
class _Shape:
    """Sizes of the model and its input, and the terms in bytes that follow from them."""

    config: ReformerHfConfig
    batch_size: int
    length: int
    size: int
    wide: int
    rounds: int
    device: str

    @property
    def positions(self) -> int:
        return self.batch_size * self.length

    @property
    def stream(self) -> int:
        return self.positions * self.config.hidden_size * self.wide

    @property
    def sort_order(self) -> int:
        """Sort order of one layer, int32."""
        return self.positions * self.config.num_attention_heads * self.rounds * 4

    @property
    def head(self) -> int:
        """
        Temporary tensors of the head.

        The concatenated streams, which the tape shares, their normalized copy, and the larger of two terms: the logits
        with their fp32 copy, log-softmax and gradient, or the gradients of the streams.
        """
        both, normalized = 2 * self.stream, 2 * self.stream * self.size // self.wide
        chunk = min(self.config.chunk_size_lm_head or self.length, self.length)
        logits = self.batch_size * chunk * self.config.vocab_size
        if self.config.chunk_size_lm_head:
            return 2 * (both + normalized) + 2 * logits * self.wide
        copies = 2 * self.wide + self.size + (self.wide if self.size < self.wide else 0)
        return both + normalized + max(logits * copies, both + normalized + logits * self.size)

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
        kept = (projections + 2) * rows * head_size * self.size
        grads = projections * rows * head_size * self.wide
        # Positions, bounds of visible slots, and rows of keys; long inputs take one head at a time.
        index = self.positions * (16 * (self.rounds if kind == "lsh" else 1) + 32)
        return 6 * self.stream + kept + grads + index + _tile(self.device)

    @property
    def feed_forward(self) -> int:
        """As for attention, with one gradient less, and the inner activations of a chunk with their gradients."""
        suitable = suitable_chunk_size(self.batch_size, self.length, self.device)
        chunk = min(self.config.chunk_size_feed_forward or suitable, self.length)
        inner = self.batch_size * chunk * self.config.feed_forward_size * self.size
        return 5 * self.stream + 4 * inner


def _tile(device: str) -> int:
    """Scores and masks of one tile, and the tensors gathered for it."""
    return 12 * 4 * policy_for(device).tile_scores
