# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""What a training step will take: the terms of `docs/memory.md`, for a config and a length."""

from dataclasses import dataclass

import torch

from ..chunked import suitable_chunk_size
from ..configuration_reformer_hf import ReformerHfConfig
from ..device_policy import policy_for
from ..modeling_reformer_hf import ReformerHfForCausalLM
from ..self_attention import parallel_heads


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Bytes of the tensors that a training step keeps, and of those that come and go.

    Args:
        parameters, gradients, optimizer: Of the model.
        sort_orders: Of all LSH layers, from the forward to the backward pass.
        head, attention, feed_forward: What is alive where the step goes backward through the head, through one
            attention layer, through one feed-forward: streams, their gradients, and what is computed at a time.
        last_layer: By how much more in the last layer, whose output is not written over; and the head's gradients.
    """

    parameters: int
    gradients: int
    optimizer: int
    sort_orders: int
    head: int
    attention: int
    feed_forward: int
    last_layer: int

    @property
    def total(self) -> int:
        """
        The peak: of what comes and goes the largest counts, for one is gone when the next comes.

        The first layer is the last to go backward: all gradients are there then, and the sort orders of the layers
        after it are gone. Where gradients are there from the beginning, as when they are accumulated over several
        steps, this is too little by `gradients` at most.
        """
        layer = max(self.attention, self.feed_forward)
        begin = self.sort_orders + max(self.head, layer + self.last_layer)
        return self.parameters + self.optimizer + max(begin, layer + self.gradients)


def estimate_training_memory(
    config: ReformerHfConfig,
    length: int,
    batch_size: int = 1,
    num_hashes: int | None = None,
    dtype: torch.dtype = torch.float32,
    optimizer_bytes: int = 8,
    device: str = "cpu",
) -> MemoryEstimate:
    """
    Estimate the peak of a training step of `ReformerHfForCausalLM`, without dropout or padding.

    Args:
        config: With `reversible=True` and no layers of full attention, whose memory is quadratic.
        length, batch_size: Of the input.
        num_hashes: Rounds, instead of the config's.
        dtype: That of the weights. The streams are in fp32 at least.
        optimizer_bytes: Bytes of the optimizer's state for each parameter: 8 for AdamW in fp32.
        device: Its type decides what is computed at a time.

    Raises:
        `ValueError`: for a config that is not covered.
    """
    if not config.reversible or "full" in config.attn_layers:
        raise ValueError(
            f"`reversible` is {config.reversible} and `attn_layers` is {config.attn_layers}, but the estimate is for "
            "reversible models of local and LSH layers."
        )
    shape = _Shape(
        config,
        batch_size,
        length,
        size=dtype.itemsize,
        wide=torch.promote_types(dtype, torch.float32).itemsize,
        rounds=num_hashes or config.num_hashes,
        device=device,
    )
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in ReformerHfForCausalLM(config).parameters())
    return MemoryEstimate(
        parameters=num_parameters * shape.size,
        gradients=num_parameters * shape.size,
        optimizer=num_parameters * optimizer_bytes,
        sort_orders=config.attn_layers.count("lsh") * shape.sort_order,
        head=shape.head,
        attention=max(shape.attention(kind) for kind in set(config.attn_layers)),
        feed_forward=shape.feed_forward,
        last_layer=2 * shape.stream + (2 * config.hidden_size + 1) * config.vocab_size * shape.size,
    )


@dataclass(frozen=True)
class _Shape:
    """Sizes, and the terms that are made of them; all in bytes but for the first ones."""

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
        """Of one layer, int32."""
        return self.positions * self.config.num_attention_heads * self.rounds * 4

    @property
    def head(self) -> int:
        """
        The streams side by side, which the tape shares, and normalised; then either logits (their own, in fp32 if
        they are not, their logarithmic softmax, a gradient), or the gradients of those two.
        """
        both, normalised = 2 * self.stream, 2 * self.stream * self.size // self.wide
        chunk = min(self.config.chunk_size_lm_head or self.length, self.length)
        logits = self.batch_size * chunk * self.config.vocab_size
        if self.config.chunk_size_lm_head:
            return 2 * (both + normalised) + 2 * logits * self.wide
        copies = 2 * self.wide + self.size + (self.wide if self.size < self.wide else 0)
        return both + normalised + max(logits * copies, both + normalised + logits * self.size)

    def attention(self, kind: str) -> int:
        """
        Two streams, written over as they are inverted, and two gradients of each, those that come and those that go.
        Besides, for the heads that are computed at a time: projections, output, and gradients of all.
        """
        config = self.config
        rows = self.positions * parallel_heads(config, self.positions, self.device)
        projections = {"local": 3, "lsh": 2}[kind]
        head_size = config.attention_head_size
        kept = (projections + 2) * rows * head_size * self.size
        grads = projections * rows * head_size * self.wide
        # Positions, bounds of what is seen, and rows of keys, for one head at a time of those that are long.
        index = self.positions * (16 * (self.rounds if kind == "lsh" else 1) + 32)
        return 6 * self.stream + kept + grads + index + _tile(self.device)

    @property
    def feed_forward(self) -> int:
        """As for attention, but for one gradient; and the inner activations of a chunk, with their gradients."""
        suitable = suitable_chunk_size(self.batch_size, self.length, self.device)
        chunk = min(self.config.chunk_size_feed_forward or suitable, self.length)
        inner = self.batch_size * chunk * self.config.feed_forward_size * self.size
        return 5 * self.stream + 4 * inner


def _tile(device: str) -> int:
    """Scores and masks that exist at a time, and what is gathered for them."""
    return 12 * 4 * policy_for(device).tile_scores
