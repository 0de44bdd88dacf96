# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The causal models of a comparison: equal width, depth and heads, and nearly equal numbers of parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    ReformerConfig,
    ReformerModelWithLMHead,
)

from reformer_hf import ReformerHfConfig, ReformerHfForCausalLM


@dataclass(frozen=True)
class Sizes:
    """
    What the models of a comparison share.

    Args:
        vocab_size: Number of tokens.
        length: Sequence length.
        width: Width of a residual stream. Heads have a size of 64, or 16 in narrow models.
        depth: Number of layers, an even number.
        feed_forward: Inner width of the feed-forward of the Reformers, which has two matrices.
        local_chunk, lsh_chunk: Chunk lengths.
        num_hashes: Number of hash rounds.
        initializer_range: Standard deviation of initial weights; `None` for the default of each model.
        position_columns: Size of their last axis; `None` for the default of this package.
    """

    vocab_size: int
    length: int
    width: int = 256
    depth: int = 6
    feed_forward: int = 512
    local_chunk: int = 64
    lsh_chunk: int = 64
    num_hashes: int = 1
    initializer_range: float | None = None
    position_columns: int | None = None

    @property
    def head_size(self) -> int:
        return 64 if self.width >= 128 else 16

    @property
    def num_heads(self) -> int:
        return self.width // self.head_size

    @property
    def initial(self) -> dict[str, float]:
        return {} if self.initializer_range is None else {"initializer_range": self.initializer_range}

    @property
    def axial_pos_shape(self) -> tuple[int, ...]:
        """Axes of the position embeddings of both Reformers, whose product is the length."""
        if self.position_columns is None:
            return tuple(ReformerHfConfig(max_position_embeddings=self.length).axial_pos_shape)
        return self.length // self.position_columns, self.position_columns

    @property
    def local_reach(self) -> int:
        """How far back a local layer sees, at most."""
        return 2 * self.local_chunk - 1


def causal_lm(**fields: Any) -> ReformerHfForCausalLM:
    """Build a causal model of this package without special tokens and without dropout."""
    config = ReformerHfConfig(
        is_decoder=True, hidden_dropout_prob=0.0, pad_token_id=None, bos_token_id=None, eos_token_id=None, **fields
    )
    return ReformerHfForCausalLM(config)


def _reformer_fields(sizes: Sizes, layers: list[str]) -> dict:
    return {
        "attn_layers": layers,
        "is_decoder": True,
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.width,
        "num_attention_heads": sizes.num_heads,
        "attention_head_size": sizes.head_size,
        "feed_forward_size": sizes.feed_forward,
        "max_position_embeddings": sizes.length,
        "local_attn_chunk_length": sizes.local_chunk,
        "lsh_attn_chunk_length": sizes.lsh_chunk,
        "num_hashes": sizes.num_hashes,
        "hidden_dropout_prob": 0.0,
        "axial_pos_shape": sizes.axial_pos_shape,
        **sizes.initial,
    }


def reformer(sizes: Sizes) -> PreTrainedModel:
    """The default layers of this package: local and LSH in turn."""
    return ReformerHfForCausalLM(ReformerHfConfig(**_reformer_fields(sizes, ["local", "lsh"] * (sizes.depth // 2))))


def local(sizes: Sizes) -> PreTrainedModel:
    """Local layers alone."""
    return ReformerHfForCausalLM(ReformerHfConfig(**_reformer_fields(sizes, ["local"] * sizes.depth)))


def in_tree(sizes: Sizes) -> PreTrainedModel:
    """The in-tree Reformer with its own defaults for what `Sizes` leaves open."""
    config = ReformerConfig(
        **_reformer_fields(sizes, ["local", "lsh"] * (sizes.depth // 2)),
        axial_pos_embds_dim=(sizes.width // 4, sizes.width - sizes.width // 4),
        local_num_chunks_after=0,
        lsh_num_chunks_after=0,
        local_attention_probs_dropout_prob=0.0,
        use_cache=False,
    )
    return ReformerModelWithLMHead(config)


def _llama_fields(sizes: Sizes) -> dict:
    return {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_heads,
        "head_dim": sizes.head_size,
        # Three matrices instead of two.
        "intermediate_size": sizes.feed_forward * 2 // 3 // 8 * 8,
        "max_position_embeddings": sizes.length,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": False,
        **sizes.initial,
    }


def dense(sizes: Sizes) -> PreTrainedModel:
    """Llama with fused attention, without activation checkpointing, which would make it slower."""
    return LlamaForCausalLM._from_config(LlamaConfig(**_llama_fields(sizes)), attn_implementation="sdpa")


def sliding_window(sizes: Sizes) -> PreTrainedModel:
    """Mistral whose window is the reach of our local layers."""
    config = MistralConfig(**_llama_fields(sizes), sliding_window=sizes.local_reach + 1)
    return MistralForCausalLM._from_config(config, attn_implementation="sdpa")


MODELS: dict[str, Callable[[Sizes], PreTrainedModel]] = {
    "reformer": reformer,
    "local": local,
    "in-tree": in_tree,
    "dense": dense,
    "sliding-window": sliding_window,
}
# As the figures call them, in a fixed color.
LABELS = {
    "reformer": "Reformer (local and LSH)",
    "local": "local layers alone",
    "in-tree": "in-tree Reformer",
    "dense": "Llama",
    "sliding-window": "Mistral (sliding window)",
}
COLORS = {"reformer": "C0", "local": "C1", "in-tree": "C2", "dense": "black", "sliding-window": "C4"}
