# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The Reformer models: ours with two patterns, the in-tree model, and `reformer-pytorch`."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import ReformerConfig, ReformerModelWithLMHead
from transformers.models.reformer import modeling_reformer

from reformer_hf import ReformerHfConfig, ReformerHfForCausalLM
from reformer_hf.configuration_encoder_decoder import ReformerHfEncoderDecoderConfig
from reformer_hf.encoder_decoder import ReformerHfForConditionalGeneration
from reformer_hf.hashing import bucket_factors
from reformer_hf.lsh_attention import LSHSelfAttention

from .cases import Shape

# What the in-tree model computes: whole chunks across buckets, wrapped, with duplicate keys counted.
IN_TREE_PATTERN = {
    "lsh_pattern": "chunk",
    "lsh_across_buckets": True,
    "lsh_deduplicate_keys": False,
    "wrap_chunks": True,
    "local_rope_theta": None,
}


def axial_shape(length: int) -> tuple[int, int]:
    """Return the two closest factors of `length`; the in-tree model trains only on sequences of their product."""
    columns = max(factor for factor in range(1, math.isqrt(length) + 1) if length % factor == 0)
    return length // columns, columns


def num_buckets(shape: Shape, length: int) -> int | list[int]:
    """Return the number of buckets per round by the in-tree formula."""
    factors = bucket_factors(None, length, shape.lsh_chunk, length)
    return factors[0] if len(factors) == 1 else factors


def _shared_fields(shape: Shape, length: int, num_hashes: int) -> dict:
    """Return the fields that our config and the in-tree config share."""
    return {
        "attn_layers": list(shape.layers),
        "hidden_size": shape.width,
        "num_attention_heads": shape.num_heads,
        "attention_head_size": shape.head_size,
        "feed_forward_size": shape.feed_forward,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": length,
        "axial_pos_shape": axial_shape(length),
        "axial_pos_embds_dim": (shape.width // 4, shape.width - shape.width // 4),
        "lsh_attn_chunk_length": shape.lsh_chunk,
        "local_attn_chunk_length": shape.local_chunk,
        "num_hashes": num_hashes,
        "num_buckets": num_buckets(shape, length),
        "lsh_num_chunks_before": 1,
        "hash_seed": None,
        "is_decoder": True,
        "use_cache": False,
        "lsh_num_chunks_after": 0,
        "local_num_chunks_after": 0,
        "hidden_dropout_prob": 0.0,
        "lsh_attention_probs_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    }


def our_config(shape: Shape, length: int, num_hashes: int, **fields) -> ReformerHfConfig:
    """Return our config; other fields, such as the pattern, have their defaults unless given."""
    config_class = ReformerHfEncoderDecoderConfig if shape.decoder_layers else ReformerHfConfig
    chunks = {"chunk_size_feed_forward": shape.feed_forward_chunk, "chunk_size_lm_head": shape.head_chunk}
    return config_class(**{**_shared_fields(shape, length, num_hashes), **chunks, **fields})


def our_model(shape: Shape, length: int, num_hashes: int, **fields) -> nn.Module:
    """Build our model with the pattern `window` and its default number of buckets."""
    if shape.decoder_layers:
        return _our_encoder_decoder(shape, length, num_hashes, num_buckets=None, **fields)
    return ReformerHfForCausalLM(our_config(shape, length, num_hashes, num_buckets=None, **fields))


def _our_encoder_decoder(shape: Shape, length: int, num_hashes: int, **fields) -> nn.Module:
    """Build our encoder-decoder. Its encoder sees as many chunks after each position as before it."""
    stacks = {"decoder_attn_layers": shape.decoder_layers, "is_decoder": False, "lsh_num_chunks_after": None}
    config = our_config(shape, max(length, shape.target_length), num_hashes, **{**stacks, **fields})
    return ReformerHfForConditionalGeneration(config)


def our_attention(shape: Shape, length: int, num_hashes: int, **fields) -> nn.Module:
    return LSHSelfAttention(our_config(shape, length, num_hashes, num_buckets=None, **fields))


def our_default_model(shape: Shape, length: int, num_hashes: int) -> nn.Module:
    """Build our model with the default window of two chunks."""
    return our_model(shape, length, num_hashes, lsh_num_chunks_before=None)


def our_default_attention(shape: Shape, length: int, num_hashes: int) -> nn.Module:
    return our_attention(shape, length, num_hashes, lsh_num_chunks_before=None)


def our_in_tree_model(shape: Shape, length: int, num_hashes: int, **fields) -> nn.Module:
    return ReformerHfForCausalLM(our_config(shape, length, num_hashes, **IN_TREE_PATTERN, **fields))


def our_in_tree_attention(shape: Shape, length: int, num_hashes: int) -> nn.Module:
    return LSHSelfAttention(our_config(shape, length, num_hashes, **IN_TREE_PATTERN))


def _in_tree_config(shape: Shape, length: int, num_hashes: int, **fields) -> ReformerConfig:
    return ReformerConfig(**{**_shared_fields(shape, length, num_hashes), **fields})


def in_tree_model(shape: Shape, length: int, num_hashes: int, **fields) -> nn.Module:
    return ReformerModelWithLMHead(_in_tree_config(shape, length, num_hashes, **fields))


def in_tree_attention(shape: Shape, length: int, num_hashes: int) -> nn.Module:
    return modeling_reformer.LSHSelfAttention(_in_tree_config(shape, length, num_hashes))


class _ReformerPytorch(nn.Module):
    """`reformer_pytorch.ReformerLM` with the signature of Transformers models."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.model(input_ids)
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


def reformer_pytorch_model(shape: Shape, length: int, num_hashes: int) -> nn.Module:
    """Build `ReformerLM` without chunked layers, with axial position embeddings and buckets of one chunk."""
    from reformer_pytorch import ReformerLM

    if set(shape.layers) != {"lsh"}:
        raise ValueError(f"Shape {shape.name!r} has layers {shape.layers}, but reformer-pytorch supports only 'lsh'.")
    return _ReformerPytorch(
        ReformerLM(
            num_tokens=shape.vocab_size,
            dim=shape.width,
            depth=len(shape.layers),
            max_seq_len=length,
            heads=shape.num_heads,
            dim_head=shape.head_size,
            bucket_size=shape.lsh_chunk,
            n_hashes=num_hashes,
            ff_chunks=1,
            attn_chunks=1,
            causal=True,
            lsh_dropout=0.0,
            ff_mult=shape.feed_forward // shape.width,
            ff_activation=nn.ReLU,
            use_full_attn=False,
            axial_position_emb=True,
            axial_position_shape=axial_shape(length),
        )
    )


def reformer_pytorch_attention(shape: Shape, length: int, num_hashes: int) -> nn.Module:
    """Build the attention module without its output projection, which the other attention modules do not contain."""
    from reformer_pytorch import LSHSelfAttention as ReformerPytorchAttention

    module = ReformerPytorchAttention(
        shape.width,
        heads=shape.num_heads,
        dim_head=shape.head_size,
        bucket_size=shape.lsh_chunk,
        n_hashes=num_hashes,
        causal=True,
        attn_chunks=1,
    )
    module.to_out = nn.Identity()
    return module


def random_ids(shape: Shape, length: int, device: torch.device | str = "cpu") -> Tensor:
    """Return fixed random token ids `[1, L]`."""
    return torch.randint(0, shape.vocab_size, (1, length), generator=torch.Generator().manual_seed(1)).to(device)
